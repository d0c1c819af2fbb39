"""What hostile bodies cost the server: measured on a process of its own, by what it computed and its largest memory."""

import contextlib
import json
import re
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest

SERVER = """
import json, sys, time
from pathlib import Path
from tests.served import Served
from evergreen.triggers import webhook
webhook.READ_WITHIN_S = 4.0
with Served(Path(sys.argv[1])).running() as served:
    print(json.dumps({"port": served.port, "token": served.token}), flush=True)
    sys.stdin.read()
"""


class Apart:
    """The server, in a process of its own; a body may take four seconds."""

    def __init__(self, process):
        self.process = process
        told = json.loads(process.stdout.readline())
        self.port, self.token = told["port"], told["token"]
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=60, trust_env=False)

    def post(self, body):
        """The status."""
        headers = {"authorization": f"Bearer {self.token}", "content-type": "application/json"}
        return self.client.post("/alerts/digits", content=body, headers=headers).status_code

    def computed_s(self):
        """Seconds of processor that it has used: what the machine does beside it is not in them."""
        used = psutil.Process(self.process.pid).cpu_times()
        return used.user + used.system

    def peak_mib(self):
        """The largest resident memory that the process ever had."""
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="ascii")
        return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024

    def grown_mib(self):
        """By how much that grew since the first alert."""
        return self.peak_mib() - self.first_peak_mib

    def connection(self, *lines):
        """A connection with the head of a post sent."""
        lines = ("POST /alerts/digits HTTP/1.1", "host: x", f"authorization: Bearer {self.token}", *lines)
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        connection.sendall("\r\n".join((*lines, "content-type: application/json", "", "")).encode())
        return connection


def notification(number, **change):
    """A body of Alertmanager's with so many alerts."""
    alert = {
        "status": "firing",
        "labels": {"alertname": "Drift"},
        "annotations": {},
        "startsAt": "2026-05-04T11:58:00Z",
    }
    alerts = [alert | change | {"fingerprint": f"{n:016x}"} for n in range(number)]
    return json.dumps({"version": "4", "alerts": alerts}, separators=(",", ":")).encode()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    command = [sys.executable, "-c", SERVER, str(tmp_path_factory.mktemp("bounds") / "home")]
    root = Path(__file__).resolve().parents[2]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=root) as process:
        apart = Apart(process)
        apart.post(b'{"reason": "what the first alert needs is imported and made"}')
        apart.first_peak_mib = apart.peak_mib()
        yield apart
        apart.client.close()
        process.stdin.close()
        process.wait()


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"[" * 1_100_000, 413),
        (b'{"reason": "x", "evidence": {"a": "' + b"x" * 1_000_000 + b'"}}', 413),
        (b"[" * 65_000, 422),
        (b'{"a":' * 13_000, 422),
        (b'{"reason": "x", "evidence": {"a": ' + b"9" * 65_000 + b"}}", 422),
        (b'{"reason": "x", "evidence": {"a": [' + b"0," * 32_000 + b"0]}}", 202),
        (b'{"reason": "x", "evidence": {"a": "' + b"\\u0041" * 10_000 + b'"}}', 202),
        (b'{"reason": "x", "evidence": {"a":' + b"[" * 190 + b"0," * 30_000 + b"0" + b"]" * 190 + b"}}", 202),
        (b'{"version": "4", "alerts": [' + b"{}," * 20_000 + b"{}]}", 422),
        (b"{" + b",".join(b'"k%x": 1' % number for number in range(5_000)) + b"}", 422),
        (b"[" * 1_000_000, 422),
        (b'{"version": "4", "alerts": [' + b"{}," * 340_000 + b"{}]}", 422),
        (b'{"version": "4", "alerts": [' + b"[[]]," * 200_000 + b"{}]}", 422),
        (notification(1, values={"a": [0] * 340_000}), 422),
        (notification(1, values={"a": ["\0"] * 90_000}), 422),
        (notification(1, values={"a": [{}] * 250_000}), 422),
        (notification(1, labels={"alertname": "\0" * 150_000}), 422),
        (notification(1, labels={f"\0{number}": "" for number in range(60_000)}), 422),
        (notification(1000, labels={"alertname": "Drift", "text": "x" * 850}), 202),
    ],
    ids=[
        *(
            "too deep and too large",
            "one alert of a megabyte",
            "deep lists",
            "deep objects",
            "digits",
            "many numbers",
            "escapes",
        ),
        *("deep and wide", "many wrong alerts", "many unknown fields", "deeper lists", "many more wrong alerts"),
        *("lists for alerts", "many values", "many escapes", "many objects", "one long label", "many labels"),
        "a thousand alerts",
    ],
)
def test_a_hostile_body_costs_little(server, body, status):
    """Four at a time, less than half a second of computing each, and hardly any memory."""
    before = server.computed_s()
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(lambda _: server.post(body), range(20))) == {status}
    assert server.computed_s() - before < 20 * 0.5
    assert server.grown_mib() < 48


def test_a_body_without_end_is_not_read_to_its_end(server):
    """Twenty connections would send 100 MiB each: they are cut off, and memory stays where it was."""
    chunk = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"

    def pour(_):
        sent = 0
        with server.connection("transfer-encoding: chunked") as connection:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                for _ in range(1600):
                    connection.sendall(chunk)
                    sent += len(chunk)
        return sent

    with ThreadPoolExecutor(20) as pool:
        assert max(pool.map(pour, range(20))) < 16 * 1024 * 1024  # what the sockets between them hold
    assert server.grown_mib() < 48


def test_bodies_that_dawdle_hold_nobody_up(server):
    """A hundred connections that never finish: others are answered meanwhile, and they are given up in their time."""
    slow = [server.connection("content-length: 60000") for _ in range(100)]
    try:
        for connection in slow:
            connection.sendall(b'{"reason": "')
        assert server.post(b'{"reason": "meanwhile"}') == 202
        assert all(connection.recv(100).startswith(b"HTTP/1.1 408") for connection in slow)
    finally:
        for connection in slow:
            connection.close()
    assert server.grown_mib() < 48
