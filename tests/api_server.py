"""Airflow's real API server on loopback, with what the plugin mounts on it, in an embedded home of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from tests.servers import free_port

from evergreen.orchestration import embedded
from evergreen.settings import Settings
from evergreen.triggers import senders

PREPARE = """
from evergreen.orchestration import embedded
from evergreen.settings import Settings
embedded.prepare(Settings.from_env())
"""


class ApiServer:
    """The server of a home, whose senders file has `evergreen` in it."""

    def __init__(self, home: Path, **env: str) -> None:
        self.url = f"http://127.0.0.1:{free_port()}"
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("AIRFLOW", "_AIRFLOW"))}
        self.env = clean | {"EVERGREEN_HOME": str(home), **env}
        self.settings = Settings.from_env(self.env)
        own = embedded.environment(self.settings, clean)
        self.env |= own | {"AIRFLOW__API__PORT": self.url.rsplit(":", 1)[1], "AIRFLOW__API__BASE_URL": self.url, **env}
        self.log = home / "api-server.log"
        self.secret = ""
        self.process: subprocess.Popen[bytes] | None = None

    def python(self, code: str) -> str:
        """What Python prints, in this home."""
        done = subprocess.run([sys.executable, "-c", code], env=self.env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def airflow(self, *words: str) -> None:
        """One of Airflow's commands, in this home."""
        done = subprocess.run(
            [sys.executable, "-m", "airflow", *words], env=self.env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr

    @contextmanager
    def running(self) -> Iterator[ApiServer]:
        """Its database made, and the server up."""
        senders.ensure(self.settings)
        self.secret = senders.own_secret(self.settings)
        self.python(PREPARE)
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "airflow", "api-server"], env=self.env, stdout=log, stderr=log
            )
        try:
            self._wait()
            yield self
        finally:
            self.process.terminate()
            self.process.wait()

    def _wait(self) -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and self.process is not None and self.process.poll() is None:
            try:
                if httpx.get(f"{self.url}/api/v2/version", timeout=10, trust_env=False).is_success:
                    return
            except httpx.TransportError:
                time.sleep(0.1)
        raise TimeoutError(self.log.read_text(encoding="utf-8", errors="replace")[-2000:])
