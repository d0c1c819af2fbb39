"""The events table, which is only ever appended to, and leases. SQLite embedded, PostgreSQL as a service.

Every event carries the hash of the one before it in its pack, so an edit, a removal or a reordering shows:
`hash = sha256(canonical JSON of {pack, position, kind, run_id, key, at, body, previous})`.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import socket
import sqlite3
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError, IntegrityError

from evergreen.errors import DatabaseError, LeaseHeldError

HEAD = "0003"
"""The newest revision in `migrations/versions`: what the code below is written for."""

metadata = sa.MetaData()


def where(condition: str) -> dict[str, Any]:
    """What makes an index of those rows only, on either database."""
    return {"sqlite_where": sa.text(condition), "postgresql_where": sa.text(condition)}


events = sa.Table(
    "events",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("pack", sa.String(64), nullable=False),
    sa.Column("position", sa.Integer, nullable=False),
    sa.Column("kind", sa.String(32), nullable=False),
    sa.Column("run_id", sa.String(250)),
    sa.Column("key", sa.String(64)),
    sa.Column("at", sa.String(32), nullable=False),
    sa.Column("body", sa.Text, nullable=False),
    sa.Column("previous", sa.String(64), nullable=False),
    sa.Column("hash", sa.String(64), nullable=False),
    # What the body says of these, for finding events without reading them; they are no part of an event, nor hashed.
    sa.Column("stage", sa.String(32)),
    sa.Column("as_of", sa.String(32)),
    sa.UniqueConstraint("pack", "position", name="uq_events_pack_position"),
    sa.Index("ix_events_pack_kind", "pack", "kind", "position"),
    sa.Index("ix_events_pack_at", "pack", "at"),
    sa.Index("ix_events_key", "key"),
    sa.Index("ix_events_run_id", "run_id"),
    sa.Index("ix_events_stage", "pack", "kind", "stage", "position", **where("stage IS NOT NULL")),
    sa.Index("ix_events_as_of", "pack", "kind", "as_of", **where("as_of IS NOT NULL")),
)

leases = sa.Table(
    "leases",
    metadata,
    sa.Column("name", sa.String(128), primary_key=True),
    sa.Column("holder", sa.String(300), nullable=False),
    sa.Column("token", sa.String(32), nullable=False),
    sa.Column("expires_at", sa.String(32), nullable=False),
)

undecided = sa.Table(
    "undecided",
    metadata,
    sa.Column("alert", sa.String(64), primary_key=True),
    sa.Column("pack", sa.String(64), nullable=False),
    sa.Column("position", sa.Integer, nullable=False),
    sa.Column("due_at", sa.String(32), nullable=False),
    sa.Column("run_id", sa.String(250)),
    sa.Column("held", sa.Text),
    sa.Index("ix_undecided_due", "due_at", "pack"),
)
"""An index over the events, made again from them by `triggers.inbox.rebuild`: the alerts without a final decision."""

WAIT_S = 30
"""How long a transaction waits for its turn to write before it gives up."""

PATIENCE_S = 1.0
"""Whoever waits longer than this for a lease or a lock says what for."""

HOME = "-home-"
"""The chain of what concerns no single pack; no pack can have this name."""

PAGE = 50
"""How many events are read ahead of whoever goes back through them."""

COLUMNS = tuple(column for column in events.columns if column.name not in ("id", "stage", "as_of"))
"""The columns of an event, in the order of its fields."""

GENESIS = "0" * 64
"""`previous` of a pack's first event."""


@dataclass(frozen=True)
class Event:
    """One row: something that happened to a pack."""

    pack: str
    position: int
    """1, 2, 3 … within the pack."""
    kind: str
    run_id: str | None
    key: str | None
    at: datetime
    body: dict[str, Any]
    previous: str
    hash: str


class Chain:
    """The end of a pack's chain, held by one transaction; what is appended is written together when that ends."""

    def __init__(self, connection: sa.Connection, pack: str) -> None:
        self.connection = connection
        """The transaction, for what is to change together with the events."""
        self.pack = pack
        last = connection.execute(
            sa.select(events.c.position, events.c.hash)
            .where(events.c.pack == pack)
            .order_by(events.c.position.desc())
            .limit(1)
        ).first()
        self._position: int = last.position if last else 0
        self._previous: str = last.hash if last else GENESIS
        self._rows: list[dict[str, Any]] = []

    def append(self, kind: str, body: dict[str, Any], *, run_id: str | None = None, key: str | None = None) -> Event:
        """Add an event at the end of the chain and return it as it will be read."""
        at = datetime.now(UTC)
        row: dict[str, Any] = {
            "pack": self.pack,
            "position": self._position + 1,
            "kind": kind,
            "run_id": run_id,
            "key": key,
            "at": at.isoformat(),
            "body": _canonical(body),
            "previous": self._previous,
        }
        row["hash"] = _hash_of(row)
        self._rows.append({**row, **_found_by(body)})
        self._position, self._previous = row["position"], row["hash"]
        return Event(**{**row, "at": at, "body": json.loads(row["body"])})

    def write(self) -> None:
        """Write what was appended."""
        if self._rows:
            self.connection.execute(sa.insert(events), self._rows)
            self._rows = []


class Database:
    """The events database at `url`. Connects, and brings the schema up to date, on first use.

    Every method raises DatabaseError when the database cannot be reached, or goes away; then nothing was changed,
    unless the word that a transaction had ended was itself lost.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._turn = threading.Lock()

    @functools.cached_property
    def engine(self) -> sa.Engine:
        """The engine, its schema at HEAD."""
        try:
            url = make_url(self.url)
        except sa.exc.ArgumentError as error:
            raise DatabaseError(
                f"{self.url!r} is not a database URL", fix="set EVERGREEN_DATABASE_URL, as in sqlite:////path/events.db"
            ) from error
        if url.get_backend_name() not in CONNECT:
            raise DatabaseError(
                f"{url.render_as_string(hide_password=True)}: {url.get_backend_name()} is not a database of Evergreen",
                fix="set EVERGREEN_DATABASE_URL to sqlite:////path/events.db or postgresql://user@host/name",
            )
        if _is_sqlite(url) and url.database:
            Path(url.database).parent.mkdir(parents=True, exist_ok=True)
        engine = sa.create_engine(url, connect_args=CONNECT[url.get_backend_name()], pool_pre_ping=not _is_sqlite(url))
        if _is_sqlite(url):
            _make_sqlite_serializable(engine)
        with self._named():
            _upgrade(engine)
        return engine

    @contextlib.contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        """A transaction that only reads: it waits for nobody, and nobody waits for it."""
        with self._named(), self.engine.connect() as connection:
            yield connection.execution_options(reads=True)

    @contextlib.contextmanager
    def writing(self) -> Iterator[sa.Connection]:
        """A transaction that may write. It ends with the block; what raises in the block undoes it."""
        with self._named(), self._queued(), self.engine.begin() as connection:
            yield connection

    @contextlib.contextmanager
    def chain(self, pack: str) -> Iterator[Chain]:
        """The end of `pack`'s chain, held by one transaction: whoever else wants to append to it waits."""
        with self.writing() as connection:
            if not _is_sqlite(self.engine.url):
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(sa.func.hashtextextended(pack, 0))))
            chain = Chain(connection, pack)
            yield chain
            chain.write()

    @contextlib.contextmanager
    def _queued(self) -> Iterator[None]:
        """One writer of this process at a time on SQLite, whose own way to wait is to sleep and try again."""
        if not _is_sqlite(self.engine.url):
            yield
            return
        if not self._turn.acquire(timeout=WAIT_S):
            raise self._unusable(f"other threads have been writing for {WAIT_S} s")
        try:
            yield
        finally:
            self._turn.release()

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """What the driver raises, as a DatabaseError. IntegrityError is an answer, not a failure, and passes."""
        try:
            yield
        except IntegrityError:
            raise
        except (DBAPIError, sa.exc.TimeoutError) as error:
            raise self._unusable(getattr(error, "orig", error)) from error

    def _unusable(self, why: object) -> DatabaseError:
        shown = make_url(self.url).render_as_string(hide_password=True)
        return DatabaseError(
            f"{shown}: the events database cannot be used: {why}",
            fix="check that it runs, that it may be written to, and that EVERGREEN_DATABASE_URL is right",
        )

    def append(
        self, pack: str, kind: str, body: dict[str, Any], *, run_id: str | None = None, key: str | None = None
    ) -> Event:
        """Add an event at the end of `pack`'s chain and return it. Concurrent appends queue."""
        with self.chain(pack) as chain:
            return chain.append(kind, body, run_id=run_id, key=key)

    def events(
        self,
        pack: str | None = None,
        *,
        kind: str | Collection[str] | None = None,
        run_id: str | None = None,
        key: str | None = None,
        stage: str | None = None,
        as_of: tuple[datetime, datetime] | None = None,
        since: datetime | None = None,
        before: int | None = None,
        newest_first: bool = False,
        limit: int | None = None,
    ) -> list[Event]:
        """The events that match every condition given, in the order in which they were appended.

        `kind` may be several kinds; `stage` is what a stage's value, receipt or failure is of; `as_of` the first and
        the last that a look of the monitor may have; `since` the earliest instant at which an event was appended;
        `before` a position.
        """
        query = sa.select(*COLUMNS)
        for column, wanted in (("pack", pack), ("run_id", run_id), ("key", key), ("stage", stage)):
            if wanted is not None:
                query = query.where(events.c[column] == wanted)
        if kind is not None:
            query = query.where(events.c.kind.in_([kind] if isinstance(kind, str) else kind))
        if as_of is not None:
            first, last = (instant.astimezone(UTC).isoformat() for instant in as_of)
            query = query.where(events.c.as_of.between(first, last))
        if before is not None:
            query = query.where(events.c.position < before)
        if since is not None:
            query = query.where(events.c.at >= since.astimezone(UTC).isoformat())
        # Both orders are one within a pack. Each index gives one of them without a sort: a pack's gives positions.
        order = events.c.position if pack is not None and run_id is None and key is None else events.c.id
        query = query.order_by(order.desc() if newest_first else order.asc())
        if limit is not None:
            query = query.limit(limit)
        with self.reading() as connection:
            return [event_of(row) for row in connection.execute(query)]

    def latest(
        self,
        pack: str | None = None,
        *,
        kind: str | Collection[str] | None = None,
        run_id: str | None = None,
        key: str | None = None,
        stage: str | None = None,
    ) -> Event | None:
        """The newest event that matches, or None."""
        found = self.events(pack, kind=kind, run_id=run_id, key=key, stage=stage, newest_first=True, limit=1)
        return found[0] if found else None

    def newest(self, pack: str, *, kind: str, stage: str, before: int | None = None) -> Iterator[Event]:
        """The events about `stage`, the newest first; read as they are asked for, so that the first few cost little."""
        while page := self.events(pack, kind=kind, stage=stage, before=before, newest_first=True, limit=PAGE):
            yield from page
            before = page[-1].position

    def first_bad(self, pack: str, heads: Mapping[int, str] | None = None) -> int | None:
        """The position of the first event of `pack` that breaks the chain, or None when it holds.

        `heads` are hashes that were noted elsewhere, by position: an event that is not the one noted, or is not there,
        breaks it too. What is hashed are the texts as they are stored: other words for the same value are an edit.
        """
        noted = dict(heads or {})
        unlike: int | None = None
        previous, expected = GENESIS, 1
        with self.reading() as connection:
            columns = (*COLUMNS, events.c.stage, events.c.as_of)
            query = sa.select(*columns).where(events.c.pack == pack).order_by(events.c.position)
            for found in connection.execution_options(yield_per=1000).execute(query).mappings():
                row = dict(found)
                sha256, found_by = row.pop("hash"), {name: row.pop(name) for name in ("stage", "as_of")}
                linked = row["position"] == expected and row["previous"] == previous
                if not linked or sha256 != _hash_of(row) or found_by != _found_by_text(row["body"]):
                    broken = _inserted(connection, row, sha256) or expected
                    return min(broken, unlike or broken)
                if noted.pop(expected, sha256) != sha256:
                    unlike = unlike or expected
                previous, expected = sha256, expected + 1
        return unlike or (expected if noted else None)

    def packs(self) -> dict[str, int]:
        """How many events each pack has, by its name."""
        with self.reading() as connection:
            query = (
                sa.select(events.c.pack, sa.func.count().label("number"))
                .group_by(events.c.pack)
                .order_by(events.c.pack)
            )
            return {row.pack: row.number for row in connection.execute(query)}

    def made_at(self) -> datetime:
        """When this home was made: the instant from which packs' clocks run. Written down by whoever asks first."""
        if not (found := self.events(HOME, kind="home", limit=1)):
            self.append(HOME, "home", {})
            found = self.events(HOME, kind="home", limit=1)
        return found[0].at

    @contextlib.contextmanager
    def lease(
        self,
        name: str,
        holder: str,
        *,
        ttl_s: float = 30.0,
        wait_s: float = 0.0,
        waits: Callable[[str], None] = lambda _holder: None,
    ) -> Iterator[None]:
        """Hold the lease `name` while the block runs; renewed meanwhile, free again `ttl_s` after a sudden death.

        A second holder waits up to `wait_s`, then gets LeaseHeldError; after a moment `waits` is called with the first.
        The same `holder` takes its lease over at once: it is the retry of an attempt that died.
        """
        token = uuid.uuid4().hex
        began, waiting = time.monotonic(), False
        while (other := self._take(name, holder, token, ttl_s)) is not None:
            waited_s = time.monotonic() - began
            if waited_s > PATIENCE_S and not waiting:
                waits(other)
                waiting = True
            if waited_s >= wait_s:
                raise LeaseHeldError(
                    f"{name}: {other} is acting",
                    fix=f"wait until it has finished; its lease ends {ttl_s:.0f} s after it dies",
                )
            time.sleep(min(0.2, ttl_s / 10))
        stop = threading.Event()
        renewal = threading.Thread(target=self._renew, args=(name, token, ttl_s, stop), daemon=True)
        renewal.start()
        try:
            yield
        finally:
            stop.set()
            renewal.join()
            with self.writing() as connection:
                connection.execute(sa.delete(leases).where(leases.c.name == name, leases.c.token == token))

    def _take(self, name: str, holder: str, token: str, ttl_s: float) -> str | None:
        """Take the lease, or say who holds it."""
        now = datetime.now(UTC)
        expires_at = (now + timedelta(seconds=ttl_s)).isoformat(timespec="microseconds")
        free = sa.or_(leases.c.expires_at < now.isoformat(timespec="microseconds"), leases.c.holder == holder)
        with contextlib.suppress(IntegrityError), self.writing() as connection:
            connection.execute(sa.delete(leases).where(leases.c.name == name, free))
            connection.execute(sa.insert(leases).values(name=name, holder=holder, token=token, expires_at=expires_at))
            return None
        self._shorten(name, expires_at)
        return self.holder(name) or "another run"

    def _shorten(self, name: str, expires_at: str) -> None:
        """Let the lease end at `expires_at` where it would end later: a clock that was ahead has written that.

        A living holder renews its lease long before.
        """
        too_late = sa.and_(leases.c.name == name, leases.c.expires_at > expires_at)
        with self.reading() as connection:
            if connection.execute(sa.select(leases.c.name).where(too_late)).scalar() is None:
                return
        with self.writing() as connection:
            connection.execute(sa.update(leases).where(too_late).values(expires_at=expires_at))

    def holder(self, name: str) -> str | None:
        """Who has the lease `name`, or had it last and died."""
        with self.reading() as connection:
            return connection.execute(sa.select(leases.c.holder).where(leases.c.name == name)).scalar()

    def _renew(self, name: str, token: str, ttl_s: float, stop: threading.Event) -> None:
        while not stop.wait(ttl_s / 3):
            expires_at = (datetime.now(UTC) + timedelta(seconds=ttl_s)).isoformat(timespec="microseconds")
            # A database that is away for a moment must not end the work: the next renewal may reach it in time.
            with contextlib.suppress(DatabaseError), self.writing() as connection:
                connection.execute(
                    sa.update(leases)
                    .where(leases.c.name == name, leases.c.token == token)
                    .values(expires_at=expires_at)
                )


class ReadOnly(Database):
    """The events database for reading alone: it is neither made nor brought up to date. Raises DatabaseError."""

    @functools.cached_property
    def engine(self) -> sa.Engine:
        """The engine, for a database that is at HEAD."""
        url = make_url(self.url)
        if _is_sqlite(url):
            file = Path(str(url.database))
            if not file.is_file():
                raise DatabaseError(f"there is no events database at {file}", fix="make one: evergreen run PACK")
            engine = sa.create_engine("sqlite://", creator=lambda: open_sqlite_to_read(file), poolclass=sa.NullPool)
        else:
            options = {"options": "-c default_transaction_read_only=on"}
            engine = sa.create_engine(url, connect_args=CONNECT[url.get_backend_name()] | options)
        with self._named(), engine.connect() as connection:
            known = sa.inspect(connection).has_table("alembic_version")
            current = connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar() if known else None
        if current != HEAD:
            shown = url.render_as_string(hide_password=True)
            old = "back it up, then run any command that opens it, as `evergreen ledger verify` does: it is brought up to date"
            raise DatabaseError(
                f"{shown} is at revision {current or 'none'}, and this Evergreen works with {HEAD}",
                fix=old if current is None or current < HEAD else "install the Evergreen that made it, or a newer one",
            )
        return engine


def read_only(url: str) -> Database:
    """The database at `url`, for reading alone."""
    return ReadOnly(url)


def open_sqlite_to_read(file: Path) -> sqlite3.Connection:
    """Open a database so that nothing beside it is made either: without a journal nobody is writing to it."""
    journal = file.with_name(f"{file.name}-wal")
    quiet = "" if journal.exists() else "&immutable=1"
    return sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro{quiet}", uri=True, timeout=WAIT_S)


def this_process() -> str:
    """`host:pid`: the holder of a lease that no retry may take over."""
    return f"{socket.gethostname()}:{os.getpid()}"


def connect(url: str) -> Database:
    """The database at `url`: one engine a process, never a parent's, whose connections a fork must not share."""
    return _database(url, os.getpid())


@functools.cache
def _database(url: str, _process: int) -> Database:
    return Database(url)


def event_of(row: sa.Row[Any]) -> Event:
    """The event in a row of COLUMNS."""
    pack, position, kind, run_id, key, at, body, previous, sha256 = tuple(row)
    return Event(pack, position, kind, run_id, key, datetime.fromisoformat(at), json.loads(body), previous, sha256)


def _found_by(body: dict[str, Any]) -> dict[str, str | None]:
    """The columns that an event is found by."""
    stage, value = body.get("stage"), body.get("value")
    as_of = value.get("as_of") if isinstance(value, dict) else None
    return {"stage": stage, "as_of": as_of and datetime.fromisoformat(as_of).astimezone(UTC).isoformat()}


def _found_by_text(body: str) -> dict[str, str | None] | None:
    """The columns that an event of this body is found by; None where it is no body of an event."""
    try:
        return _found_by(json.loads(body))
    except (ValueError, AttributeError):
        return None


def _inserted(connection: sa.Connection, row: dict[str, Any], sha256: str) -> int | None:
    """Where strangers stand before an event that is whole but for its position: after the one that it names."""
    query = sa.select(events.c.position).where(events.c.pack == row["pack"], events.c.hash == row["previous"])
    before = connection.execute(query).scalar()
    place = 1 if row["previous"] == GENESIS else None if before is None else before + 1
    return place if place and _hash_of(row | {"position": place}) == sha256 and place < row["position"] else None


def _hash_of(row: dict[str, Any]) -> str | None:
    """The hash of an event whose `at` and `body` are text already, as they are stored; None where they are not."""
    if not all(value is None or isinstance(value, str | int) for value in row.values()):
        return None  # SQLite keeps whatever it is given
    # The body, the longest part, is canonical as it is. Before it in the text stands `at` alone, which holds no quotes.
    text = _canonical({**row, "body": None}).replace('"body":null', f'"body":{row["body"]}', 1)
    return hashlib.sha256(text.encode()).hexdigest()


_canonical = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False).encode


CONNECT: dict[str, dict[str, Any]] = {"sqlite": {"timeout": WAIT_S}, "postgresql": {"connect_timeout": 10}}
"""The databases that Evergreen knows how to hold a chain of, and how their drivers are called."""


def _is_sqlite(url: sa.URL) -> bool:
    return url.get_backend_name() == "sqlite"


def _make_sqlite_serializable(engine: sa.Engine) -> None:
    """Take SQLite's write lock when a transaction that may write begins, so that read-then-insert cannot interleave."""

    @sa.event.listens_for(engine, "connect")
    def _connect(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # SQLAlchemy's own BEGIN below, not the driver's late one
        _write_ahead(connection)
        connection.execute("PRAGMA synchronous=FULL")

    @sa.event.listens_for(engine, "begin")
    def _begin(connection: sa.Connection) -> None:
        connection.exec_driver_sql("BEGIN" if connection.get_execution_options().get("reads") else "BEGIN IMMEDIATE")


def _write_ahead(connection: sqlite3.Connection) -> None:
    """Put the file's journal in WAL mode, which it then keeps.

    Of several that do so in a new file at once SQLite refuses all but one without waiting, whatever the time-out.
    """
    give_up = time.monotonic() + WAIT_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > give_up:
                raise
            time.sleep(0.01)
        else:
            return


def _upgrade(engine: sa.Engine) -> None:
    """Bring the schema to HEAD. Alembic is imported only when there is something to do."""
    with engine.connect().execution_options(reads=True) as connection:
        known = sa.inspect(connection).has_table("alembic_version")
        current = connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar() if known else None
    if current == HEAD:
        return
    from alembic import command
    from alembic.config import Config
    from alembic.script import ScriptDirectory
    from alembic.util import CommandError

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    if current is not None and current not in {
        script.revision for script in ScriptDirectory.from_config(config).walk_revisions()
    }:
        raise DatabaseError(
            f"the events database is at revision {current}, which this Evergreen does not know (it knows up to {HEAD})",
            fix="install the Evergreen that made it, or a newer one",
        )
    try:
        with engine.begin() as connection:
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
    except (CommandError, DBAPIError):
        # Another process may have upgraded at the same moment: then there is nothing left to do.
        with engine.connect() as connection:
            if connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar() != HEAD:
                raise
