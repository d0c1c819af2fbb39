"""Airflow's SQLite in an embedded home: who reads in order to write has his turn first."""

import sqlite3
from contextlib import closing

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from evergreen.orchestration.sqlite import CONNECT_ARGS

COUNT = sa.text("SELECT count(*) FROM runs")
INSERT = sa.text("INSERT INTO runs VALUES (1)")


@pytest.fixture
def place(tmp_path):
    """A database as Airflow makes it."""
    file = tmp_path / "airflow.db"
    with closing(sqlite3.connect(file)) as connection:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("CREATE TABLE runs (id)")
    return file


@pytest.fixture
def session(place):
    """A session of Airflow's in this home."""
    engine = sa.create_engine(f"sqlite:///{place}", connect_args=CONNECT_ARGS)
    with Session(engine) as found:
        yield found
    engine.dispose()


@pytest.fixture
def other(place):
    """Another process, which does not wait for its turn to write."""
    with closing(sqlite3.connect(place, timeout=0, isolation_level=None)) as found:
        yield found


def test_nobody_writes_between_what_a_savepoint_reads_and_what_it_writes(session, other):
    """Or it would be refused for good: a backfill asked for on a busy machine could not be had."""
    with session.begin_nested():
        assert session.scalar(COUNT) == 0
        with pytest.raises(sqlite3.OperationalError, match="database is locked"):
            other.execute("INSERT INTO runs VALUES (2)")
        session.execute(INSERT)
    session.commit()
    other.execute("INSERT INTO runs VALUES (2)")
    assert session.scalar(COUNT) == 2


def test_savepoints_are_kept_together_or_not_at_all(session, other):
    """A scheduler never sees one run of a backfill before the others, which may yet fail."""
    for _ in range(2):
        with session.begin_nested():
            session.execute(INSERT)
        assert other.execute("SELECT count(*) FROM runs").fetchone() == (0,)
    session.commit()
    assert other.execute("SELECT count(*) FROM runs").fetchone() == (2,)


def test_who_only_reads_takes_no_turn(session, other):
    """Writers go on beside him."""
    assert session.scalar(COUNT) == 0
    other.execute("INSERT INTO runs VALUES (2)")
