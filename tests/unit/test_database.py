"""Claims about the events table and leases, on real SQLite files."""

import contextlib
import multiprocessing
import os
import sqlite3
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime

import pytest
import sqlalchemy as sa

from evergreen.database import HEAD, Database, _write_ahead, connect
from evergreen.errors import DatabaseError, LeaseHeldError


@pytest.fixture
def database(tmp_path):
    return Database(f"sqlite:///{tmp_path / 'made' / 'events.db'}")


def test_an_event_comes_back_as_it_was_written(database):
    """What is read equals what was appended."""
    written = database.append("digits", "run", {"b": [1, 2.5, None], "a": "ü"}, run_id="manual__1", key="k")
    assert database.events("digits") == [written]


def test_events_are_chained_per_pack(database):
    """Each event names the hash of the one before it in its own pack."""
    first = database.append("a", "run", {})
    database.append("b", "run", {})
    second = database.append("a", "run", {})
    assert (second.position, second.previous) == (2, first.hash)


@pytest.mark.parametrize(
    ("statement", "first_bad"),
    [
        ("UPDATE events SET body = '{\"n\":9}' WHERE position = 3", 3),
        ("UPDATE events SET at = '2020-01-01T00:00:00+00:00' WHERE position = 2", 2),
        ("DELETE FROM events WHERE position = 2", 2),
        ("UPDATE events SET position = position + 10 WHERE position >= 4", 4),
    ],
)
def test_tampering_shows(database, statement, first_bad):
    """An edit, a removal and a shift are found, at the first bad entry."""
    for number in range(5):
        database.append("a", "run", {"n": number})
    assert database.first_bad("a") is None
    with database.engine.begin() as connection:
        connection.exec_driver_sql(statement)
    assert database.first_bad("a") == first_bad


def test_events_appended_together_are_chained_as_single_ones_are(database):
    """One transaction, many events: each is returned as it will be read, and the chain goes on after it."""
    database.append("a", "run", {})
    with database.chain("a") as chain:
        written = [chain.append("alert", {"n": number}, run_id="r", key="k") for number in range(5)]
    database.append("a", "run", {})
    assert database.events("a")[1:-1] == written
    assert (len(database.events("a")), database.first_bad("a")) == (7, None)


def test_what_raises_undoes_what_was_appended_with_it(database):
    """All of a transaction or nothing, what it changed in other tables included."""
    with contextlib.suppress(ZeroDivisionError), database.chain("a") as chain:
        chain.append("alert", {})
        chain.connection.execute(sa.text("INSERT INTO leases VALUES ('a', 'b', 'c', 'd')"))
        chain.write()
        raise ZeroDivisionError
    with database.reading() as connection:
        left = connection.exec_driver_sql("SELECT count(*) FROM leases").scalar()
    assert (database.events("a"), left) == ([], 0)


def test_reading_waits_for_no_writer(database):
    """While one appends, others read what was there before."""
    first = database.append("a", "run", {})
    with database.chain("a") as chain:
        chain.append("alert", {})
        chain.write()
        assert database.events("a") == [first]
    assert len(database.events("a")) == 2


def test_a_writer_that_hangs_is_named_in_the_end(database, monkeypatch):
    """A thread that waits too long for its turn to write says so instead of hanging as well."""
    monkeypatch.setattr("evergreen.database.WAIT_S", 0.05)
    caught = []

    def append():
        try:
            database.append("a", "run", {})
        except DatabaseError as error:
            caught.append(error)

    with database.chain("a"):
        other = threading.Thread(target=append)
        other.start()
        other.join(10)
    assert "other threads have been writing" in caught[0].what


def test_events_are_found_by_kinds_and_since(database):
    """Several kinds at once, and only what was appended at an instant or after it."""
    written = [database.append("a", kind, {}) for kind in ("run", "alert", "stage", "alert")]
    assert database.events("a", kind=("run", "stage")) == written[::2]
    assert database.events("a", kind=["alert"], since=written[2].at) == written[3:]
    assert database.events("a", since=written[1].at) == written[1:]
    assert database.latest("a", kind=("run", "stage")) == written[2]
    assert database.events("a", kind=()) == []


def test_reading_the_newest_events_costs_the_same_in_a_long_history(database):
    """The database finds them by an index and sorts nothing."""
    database.append("a", "run", {})
    plans = []
    sa.event.listen(database.engine, "before_cursor_execute", lambda *call: plans.append(call[2:4]))
    database.events("a", since=datetime.now(UTC), kind=("run", "alert"))
    database.latest("a", kind="promotion")
    with database.reading() as connection:
        for statement, parameters in [plan for plan in plans if "SELECT" in plan[0]]:
            steps = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters).all()
            assert all("SCAN" not in step.detail for step in steps), steps


def test_a_child_process_never_uses_its_parents_connections(database, monkeypatch):
    """The database of a URL is one of its process: a fork must not share connections with its parent."""
    assert connect(database.url) is connect(database.url)
    mine = connect(database.url)
    monkeypatch.setattr(os, "getpid", lambda: -1)
    assert connect(database.url) is not mine


def test_concurrent_appends_lose_nothing(database):
    """Four processes appending at once leave one unbroken chain with every event."""
    database.append("a", "run", {})
    code = (
        "from evergreen.database import Database\n"
        f"for number in range(25): Database({database.url!r}).append('a', 'alert', {{'number': number}})"
    )
    workers = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(4)]
    assert ([worker.wait() for worker in workers], len(database.events("a")), database.first_bad("a")) == (
        [0] * 4,
        101,
        None,
    )


def test_two_processes_may_make_the_database_at_once(tmp_path):
    """The first use by several processes at the same moment migrates once and fails for none."""
    url = f"sqlite:///{tmp_path / 'events.db'}"
    code = f"from evergreen.database import Database; Database({url!r}).append('a', 'run', {{}})"
    processes = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert len(Database(url).events("a")) == 3


def test_a_lease_has_one_holder(database):
    """A second holder is refused and told who acts; after the block the lease is free."""
    with database.lease("digits", "run one"):
        with pytest.raises(LeaseHeldError, match="run one is acting"), database.lease("digits", "run two"):
            pass
    with database.lease("digits", "run two"):
        pass


def test_the_retry_of_a_dead_attempt_takes_its_lease_over(database):
    """The same holder does not wait for its own dead attempt."""
    with database.lease("digits", "run one"), database.lease("digits", "run one"):
        pass


def test_a_dead_holders_lease_ends(database):
    """A lease whose process was killed is free after its time."""
    code = (
        "import os; from evergreen.database import Database\n"
        f"with Database({database.url!r}).lease('digits', 'dead', ttl_s=0.5): os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", code], check=False)
    began = time.monotonic()
    with database.lease("digits", "alive", ttl_s=0.5, wait_s=20):
        assert time.monotonic() - began < 20


def test_a_clock_that_was_ahead_holds_no_lease_for_a_year(database):
    """Once the clock is right again, a dead process's lease ends after its time to live, and not when it says."""
    with database.writing() as connection:
        connection.exec_driver_sql(
            "INSERT INTO leases VALUES ('digits', 'dead', 'token', '2999-01-01T00:00:00.000000+00:00')"
        )
    with database.lease("digits", "alive", ttl_s=0.5, wait_s=20):
        assert database.holder("digits") == "alive"


def test_a_lease_is_renewed_while_it_is_held(database):
    """Work longer than the lease's time keeps the lease: its end moves on."""

    def end():
        with database.reading() as connection:
            return connection.exec_driver_sql("SELECT expires_at FROM leases").scalar()

    with database.lease("digits", "slow", ttl_s=2):
        first = end()
        while (moved := end()) == first:
            time.sleep(0.02)
        assert moved > first


def test_a_database_from_the_future_is_refused(database):
    """A revision that this code does not know is an error, not a guess."""
    database.append("a", "run", {})
    with database.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(DatabaseError, match="9999"):
        Database(database.url).events("a")


def test_an_older_database_is_brought_up_to_date(database):
    """What the first release wrote is kept, and what came since is there."""
    first = database.append("a", "run", {})
    read = database.append("a", "stage", {"stage": "ingest", "value": {"rows": 1}})
    look = database.append("a", "drift", {"stage": "monitor", "value": {"as_of": "2013-04-01T00:00:00Z"}})
    with database.engine.begin() as connection:
        connection.exec_driver_sql("DROP TABLE undecided")
        for index in ("ix_events_pack_at", "ix_events_stage", "ix_events_as_of"):
            connection.exec_driver_sql(f"DROP INDEX {index}")
        for column in ("stage", "as_of"):
            connection.exec_driver_sql(f"ALTER TABLE events DROP COLUMN {column}")
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '0001'")
    later = Database(database.url)
    assert later.events("a") == [first, read, look]
    assert later.latest("a", kind="stage", stage="ingest") == read
    day = datetime(2013, 4, 1, tzinfo=UTC)
    assert later.events("a", kind="drift", as_of=(day, day)) == [look]
    assert later.first_bad("a") is None
    tables = sa.inspect(later.engine)
    assert tables.has_table("undecided")
    assert "ix_events_pack_at" in {index["name"] for index in tables.get_indexes("events")}


def test_going_back_reads_no_further_than_it_is_asked_to(database):
    """The newest event about a stage is found by an index, beside any number of others; those before it one by one."""
    with database.chain("a") as chain:
        for number in range(120):
            chain.append("stage", {"stage": "train" if number % 60 == 0 else "ingest", "number": number})
    found = database.newest("a", kind="stage", stage="ingest")
    assert [next(found).body["number"] for _ in range(60)] == [n for n in range(119, 58, -1) if n != 60]
    assert [event.body["number"] for event in database.newest("a", kind="stage", stage="train")] == [60, 0]
    assert [event.position for event in database.newest("a", kind="stage", stage="train", before=61)] == [1]
    with database.reading() as connection:
        query = "SELECT * FROM events WHERE pack = 'a' AND kind = 'stage' AND stage = 'train' ORDER BY position DESC"
        plan = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {query} LIMIT 1").all()
    assert [step.detail for step in plan] == [
        "SEARCH events USING INDEX ix_events_stage (pack=? AND kind=? AND stage=?)"
    ]


def test_a_database_of_another_kind_is_refused(tmp_path):
    """What the chain cannot be held in is named before anything is written there."""
    with pytest.raises(DatabaseError, match="mysql is not a database of Evergreen"):
        Database("mysql://me:secret@localhost/events").events("a")


def test_an_unreachable_database_names_itself(tmp_path):
    """A path that cannot be a database is named, with what to do."""
    (tmp_path / "file").mkdir()
    with pytest.raises(DatabaseError, match="EVERGREEN_DATABASE_URL"):
        Database(f"sqlite:///{tmp_path / 'file'}").events("a")


def test_the_migrations_make_the_tables_the_code_expects(database):
    """The migrated schema has the columns of the tables declared in code."""
    database.append("a", "run", {})
    inspector = sa.inspect(database.engine)
    from evergreen.database import metadata

    made = {name: {column["name"] for column in inspector.get_columns(name)} for name in metadata.tables}
    assert made == {name: set(table.columns.keys()) for name, table in metadata.tables.items()}
    with database.engine.connect() as connection:
        assert connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar() == HEAD


def test_a_new_file_is_opened_by_many_at_once(tmp_path):
    """SQLite refuses all but one of those that change its mode at the same moment; none of ours fails."""
    fork = multiprocessing.get_context("fork")
    start = fork.Barrier(8)

    def work():
        for number in range(30):
            start.wait(60)
            with contextlib.closing(sqlite3.connect(tmp_path / f"{number}.db", timeout=60)) as connection:
                connection.isolation_level = None
                _write_ahead(connection)
                connection.execute("CREATE TABLE IF NOT EXISTS rows (number INTEGER)")

    workers = [fork.Process(target=work) for _ in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 8
