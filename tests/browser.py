"""A real browser, headless, driven over its debugging pipe."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import subprocess
import time

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Browser:
    """Chromium over its debugging pipe: what it fetched and complained of, and what a page computes."""

    def __init__(self, folder, *more: str) -> None:
        """Start it with `folder` as its profile, and with `more` flags."""
        there, back = os.pipe(), os.pipe()
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"]
        quiet = ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
        pipe = f"exec {CHROMIUM} --remote-debugging-pipe --user-data-dir={folder} {shlex.join([*flags, *quiet, *more])} about:blank"
        self.process = subprocess.Popen(
            ["bash", "-c", f"{pipe} 3<&{there[0]} 4>&{back[1]}"],
            pass_fds=(there[0], back[1]),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(there[0])
        os.close(back[1])
        self.write, self.read = os.fdopen(there[1], "wb"), os.fdopen(back[0], "rb")
        self.said: list[dict] = []
        self.session, self.asked = None, 0
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Log", "Runtime"):
            self.ask(f"{domain}.enable")

    def next(self) -> dict:
        content = bytearray()
        while (byte := self.read.read(1)) != b"\0":
            assert byte, "Chromium has ended"
            content += byte
        message = json.loads(content)
        if "method" in message:
            self.said.append(message)
        return message

    def ask(self, method: str, **params):
        self.asked += 1
        message = {"id": self.asked, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        self.write.write(json.dumps(message).encode() + b"\0")
        self.write.flush()
        while (answer := self.next()).get("id") != self.asked:
            pass
        return answer["result"]

    def open(self, url: str, width: int) -> None:
        self.said.clear()
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self.ask("Page.navigate", url=url)
        while not any(each["method"] == "Page.loadEventFired" for each in self.said):
            self.next()

    def value(self, script: str):
        return self.ask("Runtime.evaluate", expression=script, returnByValue=True)["result"].get("value")

    def until(self, script: str, timeout_s: float = 60.0):
        """What the script gives as soon as it is true. The page shows what it knows when it knows it."""
        deadline = time.monotonic() + timeout_s
        while not (found := self.value(script)):
            assert time.monotonic() < deadline, f"{script}: not on {self.value('document.body.innerText')}"
            time.sleep(0.1)
        return found

    def close(self) -> None:
        with contextlib.suppress(OSError, AssertionError):
            self.session = None
            self.ask("Browser.close")
        self.write.close()
        self.read.close()
        self.process.wait(timeout=20)
