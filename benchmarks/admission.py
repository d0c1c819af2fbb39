"""The inbox and admission, beside a plain queue: a table, a row an alert, nothing said of why.

Claims, on SQLite and on PostgreSQL: 10,000 alerts of one pack are decided in at most 5 s, under the default policy and
from the first look to the last final decision; one alert after the other is kept at 200 a second or more from 8
threads, with a 99th percentile well under 100 ms; and a million old alerts make neither dearer. The peer is the same
SQLAlchemy on the same database: an INSERT and a commit to keep an alert; to decide it SELECT the next, UPDATE it,
commit. It forgets repeats, reasons, the order of events and what was seen; it is what a simple worker does.

    python benchmarks/admission.py
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import sqlalchemy as sa

sys.path.append(str(Path(__file__).resolve().parents[1]))

from tests.servers import MissingError, Postgres

from evergreen import database as db
from evergreen.laws import scaffold
from evergreen.loop import admit, confirm
from evergreen.settings import Settings
from evergreen.triggers import inbox
from evergreen.triggers.inbox import NewAlert

ALERTS = 10_000
KEPT = 4_000
THREADS = 8
OLD = 1_000_000

queue = sa.Table(
    "queue",
    sa.MetaData(),
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("message", sa.Text),
    sa.Column("done", sa.Boolean, nullable=False, default=False, index=True),
)


class Runs:
    """Every run that is asked for is there at once: what Airflow takes is measured elsewhere."""

    def is_paused(self, _pack: str) -> bool:
        return False

    def run_exists(self, _pack: str, _run_id: str) -> bool:
        return True

    def run_failed(self, _pack: str, _run_id: str) -> bool:
        return False


def alert(number: int) -> NewAlert:
    return NewAlert("me", str(number), f"error rate of service {number} above 5 %", f"service {number}")


def timed(act: Callable[[], object]) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def one_by_one(act: Callable[[int], object]) -> tuple[float, float, float]:
    """How many a second from so many threads at once, and the median and 99th percentile of one, in ms."""
    with ThreadPoolExecutor(THREADS) as pool:
        ready = threading.Barrier(THREADS)
        list(pool.map(lambda _: ready.wait(), range(THREADS)))
        took: list[float] = []
        whole = timed(lambda: took.extend(pool.map(lambda number: timed(lambda: act(number)), range(KEPT))))
    return KEPT / whole, 1000 * statistics.median(took), 1000 * statistics.quantiles(took, n=100)[98]


def plain(database: db.Database) -> tuple[tuple[float, float, float], float]:
    """The queue: keeping, and deciding."""

    def put(number: int) -> None:
        with database.engine.begin() as connection:
            connection.execute(sa.insert(queue).values(message=alert(number).reason))

    def take() -> None:
        following = sa.select(queue.c.id).where(~queue.c.done).order_by(queue.c.id).limit(1)
        for _ in range(ALERTS):
            with database.engine.begin() as connection:
                found = connection.execute(following).scalar()
                connection.execute(sa.update(queue).where(queue.c.id == found).values(done=True))

    queue.metadata.create_all(database.engine)
    kept = one_by_one(put)
    with database.engine.begin() as connection:
        connection.execute(sa.insert(queue), [{"message": alert(number).reason} for number in range(KEPT, ALERTS)])
    return kept, timed(take)


def age(database: db.Database, pack: str) -> None:
    """A million alerts of a year ago, each with its final decision, straight into the table: their hashes are empty."""
    numbers = (
        f"WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {2 * OLD}) SELECT i FROM n"
        if database.engine.dialect.name == "sqlite"
        else f"SELECT i FROM generate_series(1, {2 * OLD}) AS i"
    )
    at = (datetime.now(UTC) - timedelta(days=365)).isoformat()
    with database.writing() as connection:
        connection.exec_driver_sql(
            "INSERT INTO events (pack, position, kind, key, at, body, previous, hash) "
            f"SELECT '{pack}', i, CASE i & 1 WHEN 1 THEN 'alert' ELSE 'decision' END, 'old-' || (i + 1) / 2, "
            f"'{at}', '{{}}', '', '' FROM ({numbers}) AS numbers"
        )
    with database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        if database.engine.dialect.name == "postgresql":
            connection.exec_driver_sql("VACUUM ANALYZE events")
            connection.exec_driver_sql("CHECKPOINT")


def measure(name: str, url: str, folder: Path) -> None:
    settings = Settings.from_env({"EVERGREEN_HOME": str(folder), "EVERGREEN_DATABASE_URL": url})
    settings = settings.model_copy(update={"packs": folder / "packs"})
    for pack in ("storm", "old"):
        scaffold(settings.packs, pack)
    database, runs = db.connect(url), Runs()
    database.made_at()

    peer, taken = plain(database)
    kept = one_by_one(lambda number: inbox.keep(database, "kept", [alert(number)]))

    inbox.keep(database, "storm", [alert(number) for number in range(ALERTS)])
    # The default policy brakes a storm: what is above 60 in a minute is held until that is over.
    first = timed(lambda: admit(settings, runs))
    second = timed(lambda: admit(settings, runs, datetime.now(UTC) + timedelta(minutes=2)))
    final = timed(lambda: confirm(settings, runs))
    decided = database.events("storm", kind="decision")
    assert sum(event.body["outcome"] != "hold" for event in decided) == ALERTS
    assert database.first_bad("storm") is None

    age(database, "old")
    bell = sorted(timed(lambda: inbox.packs_due(database, datetime.now(UTC))) for _ in range(200))
    inbox.keep(database, "old", [alert(1)])
    one = timed(lambda: admit(settings, runs))
    late = one_by_one(lambda number: inbox.keep(database, "old", [alert(number)]))

    whole = first + second + final
    print(f"{name}: keeping one by one, {THREADS} threads (a second · median · 99th percentile)")
    for what, (rate, median, p99) in {"inbox": kept, "with 1 M old": late, "plain queue": peer}.items():
        print(f"  {what:<14} {rate:6.0f}/s  {median:6.1f} ms  {p99:6.1f} ms")
    print(f"  inbox / plain queue: {kept[0] / peer[0]:.2f} × the rate  (goals: 200/s, p99 well under 100 ms)")
    print(f"{name}: deciding {ALERTS:,} alerts of one pack")
    print(
        f"  admission      {whole:6.2f} s  (first look {first:.2f}, two minutes later {second:.2f}, confirmed {final:.2f})"
    )
    print(f"  plain queue    {taken:6.2f} s")
    print(f"  admission / plain queue: {whole / taken:.2f}  (goal: at most 5 s)")
    print(f"{name}: beside a million old alerts")
    print(
        f"  the bell's look {1000 * bell[100]:.1f} ms, slowest of 200 {1000 * bell[-1]:.1f} ms; one alert decided {one:.3f} s"
    )
    print(flush=True)
    database.engine.dispose()


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        measure("SQLite", f"sqlite:///{folder}/events.db", Path(folder))
    try:
        server = Postgres(durable=True)
    except MissingError as missing:
        print(f"PostgreSQL: not measured: {missing}")
        return
    try:
        server.start()
        with tempfile.TemporaryDirectory() as folder:
            measure("PostgreSQL", server.database(), Path(folder))
    finally:
        server.stop()


if __name__ == "__main__":
    main()
