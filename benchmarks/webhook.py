"""Alerts posted to Airflow's real API server, beside Airflow's own way to ask for a run, on the same server.

Claim: 200 signed alerts a second for 30 s are answered with a 99th percentile of at most 100 ms, and none is lost: each
has its id, and the inbox has each. Peer: `POST /api/v2/dags/…/dagRuns`, which is what a sender without an inbox would
call, at half the rate that it was seen to stand. Posts are due at fixed instants, whatever became of those before;
times count from those instants, so that a server which falls behind shows. Client and server share this machine.

    python benchmarks/webhook.py [SECONDS]
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

sys.path.append(str(Path(__file__).resolve().parents[1]))

from tests.api_server import ApiServer

from evergreen import database as db
from evergreen.triggers.signatures import sign

PACK = "digits"
RATE = 200
SECONDS = 30
GOAL_MS = 100.0
CONNECTIONS = 64

PEER = '''
"""An airflow dag that does nothing."""
from datetime import UTC, datetime
from airflow.sdk import DAG
from airflow.providers.standard.operators.empty import EmptyOperator

with DAG("peer", schedule=None, start_date=datetime(2000, 1, 1, tzinfo=UTC)):
    EmptyOperator(task_id="nothing")
'''

Request = tuple[str, dict[str, str], bytes]
"""Path, headers, body."""


class Load:
    """Requests over connections that stay open."""

    def __init__(self, url: str, make: Callable[[int], Request]) -> None:
        self.host = str(urlsplit(url).hostname)
        self.port = urlsplit(url).port
        self.make = make
        self.seconds: list[float] = []
        self.answers: list[tuple[int, dict[str, Any]]] = []

    async def open(self, rate: float, count: int) -> None:
        """`rate` requests a second, each at its instant."""
        due: asyncio.Queue[tuple[int, float] | None] = asyncio.Queue()
        workers = [asyncio.create_task(self._work(due)) for _ in range(CONNECTIONS)]
        loop = asyncio.get_running_loop()
        began = loop.time() + 0.5
        for number in range(count):
            await asyncio.sleep(max(0.0, began + number / rate - loop.time()))
            due.put_nowait((number, began + number / rate))
        for _ in workers:
            due.put_nowait(None)
        await asyncio.gather(*workers)

    async def closed(self, connections: int, seconds: float) -> float:
        """As many as are answered, by `connections` that wait for each answer; → how many a second."""
        due: asyncio.Queue[tuple[int, float] | None] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        ends = loop.time() + seconds
        workers = [asyncio.create_task(self._work(due, refill=lambda: loop.time() < ends)) for _ in range(connections)]
        for number in range(connections):
            due.put_nowait((number, loop.time()))
        await asyncio.gather(*workers)
        return len(self.answers) / seconds

    async def _work(
        self, due: asyncio.Queue[tuple[int, float] | None], refill: Callable[[], bool] | None = None
    ) -> None:
        loop = asyncio.get_running_loop()
        reader, writer = await asyncio.open_connection(self.host, self.port)
        while (wanted := await due.get()) is not None:
            number, at = wanted
            path, headers, body = self.make(number)
            lines = [f"POST {path} HTTP/1.1", f"host: {self.host}", f"content-length: {len(body)}"]
            lines += [f"{name}: {value}" for name, value in {"content-type": "application/json", **headers}.items()]
            writer.write("\r\n".join([*lines, "", ""]).encode() + body)
            head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            length = next(int(line.split(":")[1]) for line in head.splitlines() if line.startswith("content-length"))
            answer = json.loads(await reader.readexactly(length))
            self.seconds.append(loop.time() - at)
            self.answers.append((int(head.split()[1]), answer))
            if refill is not None:
                due.put_nowait((number + 1_000_000, loop.time()) if refill() else None)
        writer.close()

    def percentile_ms(self, share: float) -> float:
        return 1000 * sorted(self.seconds)[round(share * (len(self.seconds) - 1))]


def main() -> None:
    seconds = int(sys.argv[1]) if len(sys.argv) > 1 else SECONDS
    with tempfile.TemporaryDirectory() as folder:
        dags = Path(folder) / "dags"
        dags.mkdir()
        (dags / "peer.py").write_text(PEER, encoding="utf-8")
        server = ApiServer(Path(folder) / "home", AIRFLOW__CORE__DAGS_FOLDER=str(dags))
        with server.running():
            server.airflow("dags", "reserialize")
            show(server, seconds)


def show(server: ApiServer, seconds: int) -> None:
    """Measure and print; fails where an alert is lost."""
    print(f"{os.cpu_count()} cores shared by client and server, load {os.getloadavg()[0]:.1f}; one worker, SQLite")

    def alert(number: int) -> Request:
        body = json.dumps({"reason": f"drift {number}", "pack": PACK, "evidence": {"psi": 0.31}}).encode()
        ids, at = uuid.uuid4().hex, int(time.time())
        signature = sign(server.secret, ids, at, body)
        headers = {"webhook-id": ids, "webhook-timestamp": str(at), "webhook-signature": signature}
        return f"/evergreen/alerts/{PACK}", headers, body

    def run(_number: int) -> Request:
        body = {"dag_run_id": uuid.uuid4().hex, "logical_date": None, "conf": {"reason": "drift"}}
        return "/api/v2/dags/peer/dagRuns", {}, json.dumps(body).encode()

    for warm in (alert, run):
        asyncio.run(Load(server.url, warm).closed(1, 2))
    stands = asyncio.run(Load(server.url, run).closed(1, 5))
    peer = Load(server.url, run)
    asyncio.run(peer.open(stands / 2, max(20, int(stands / 2 * seconds / 3))))
    assert {status for status, _ in peer.answers} == {200}, {status for status, _ in peer.answers}
    print(
        f"peer  {stands / 2:5.0f} runs/s   p50 {peer.percentile_ms(0.5):6.1f}  p95 {peer.percentile_ms(0.95):6.1f}"
        f"  p99 {peer.percentile_ms(0.99):6.1f} ms   (it stands {stands:.0f}/s)"
    )
    ours = Load(server.url, alert)
    asyncio.run(ours.open(RATE, RATE * seconds))
    p99 = ours.percentile_ms(0.99)
    print(
        f"ours  {RATE:5.0f} alerts/s p50 {ours.percentile_ms(0.5):6.1f}  p95 {ours.percentile_ms(0.95):6.1f}"
        f"  p99 {p99:6.1f} ms   max {ours.percentile_ms(1):.1f} ms, goal {GOAL_MS:.0f}"
    )
    told = {answer.get("alert") for status, answer in ours.answers if status == 202}
    kept = {event.key for event in db.connect(server.settings.database_url).events(PACK, kind="alert")}
    lost = RATE * seconds - len(told & kept)
    print(
        f"{len(told)} of {RATE * seconds} alerts answered with their ids, {lost} lost; p99 {p99 / peer.percentile_ms(0.99):.2f} x the peer's, at {RATE / (stands / 2):.1f} x its rate"
    )
    assert lost == 0


if __name__ == "__main__":
    main()
