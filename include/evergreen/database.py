"""The events table, which is only ever appended to, and leases. SQLite embedded; any SQLAlchemy URL.

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
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError, IntegrityError

from evergreen.errors import DatabaseError, LeaseHeldError

HEAD = "0001"
"""The newest revision in `migrations/versions`: what the code below is written for."""

metadata = sa.MetaData()

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
    sa.UniqueConstraint("pack", "position", name="uq_events_pack_position"),
    sa.Index("ix_events_pack_kind", "pack", "kind", "position"),
    sa.Index("ix_events_key", "key"),
    sa.Index("ix_events_run_id", "run_id"),
)

leases = sa.Table(
    "leases",
    metadata,
    sa.Column("name", sa.String(128), primary_key=True),
    sa.Column("holder", sa.String(300), nullable=False),
    sa.Column("token", sa.String(32), nullable=False),
    sa.Column("expires_at", sa.String(32), nullable=False),
)

HOME = "-home-"
"""The chain of what concerns no single pack; no pack can have this name."""

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


class Database:
    """The events database at `url`. Connects, and brings the schema up to date, on first use."""

    def __init__(self, url: str) -> None:
        self.url = url

    @functools.cached_property
    def engine(self) -> sa.Engine:
        """The engine, its schema at HEAD. Raises DatabaseError when it cannot be reached."""
        try:
            url = make_url(self.url)
        except sa.exc.ArgumentError as error:
            raise DatabaseError(
                f"{self.url!r} is not a database URL", fix="set EVERGREEN_DATABASE_URL, as in sqlite:////path/events.db"
            ) from error
        if url.get_backend_name() == "sqlite" and url.database:
            Path(url.database).parent.mkdir(parents=True, exist_ok=True)
        engine = sa.create_engine(
            url, **({"connect_args": {"timeout": 30}} if _is_sqlite(url) else {"pool_pre_ping": True})
        )
        if _is_sqlite(url):
            _make_sqlite_serializable(engine)
        try:
            _upgrade(engine)
        except DBAPIError as error:
            shown = url.render_as_string(hide_password=True)
            raise DatabaseError(
                f"{shown}: the events database cannot be used: {error.orig}",
                fix="check that it runs and that EVERGREEN_DATABASE_URL is right",
            ) from error
        return engine

    def append(
        self, pack: str, kind: str, body: dict[str, Any], *, run_id: str | None = None, key: str | None = None
    ) -> Event:
        """Add an event at the end of `pack`'s chain and return it. Concurrent appends queue."""
        while True:
            try:
                with self.engine.begin() as connection:
                    return _append(connection, pack, kind, body, run_id, key)
            except IntegrityError:
                continue  # another process took the position: take the next one

    def events(
        self,
        pack: str | None = None,
        *,
        kind: str | None = None,
        run_id: str | None = None,
        key: str | None = None,
        newest_first: bool = False,
        limit: int | None = None,
    ) -> list[Event]:
        """The events that match every condition given, in the order in which they were appended."""
        query = sa.select(events)
        for column, wanted in (("pack", pack), ("kind", kind), ("run_id", run_id), ("key", key)):
            if wanted is not None:
                query = query.where(events.c[column] == wanted)
        query = query.order_by(events.c.id.desc() if newest_first else events.c.id.asc())
        if limit is not None:
            query = query.limit(limit)
        with self.engine.connect() as connection:
            return [_event(row) for row in connection.execute(query)]

    def latest(
        self, pack: str | None = None, *, kind: str | None = None, run_id: str | None = None, key: str | None = None
    ) -> Event | None:
        """The newest event that matches, or None."""
        found = self.events(pack, kind=kind, run_id=run_id, key=key, newest_first=True, limit=1)
        return found[0] if found else None

    def first_bad(self, pack: str) -> int | None:
        """The position of the first event of `pack` that breaks the chain, or None when it holds."""
        previous = GENESIS
        for expected, event in enumerate(self.events(pack), start=1):
            if event.position != expected or event.previous != previous or event.hash != _hash_of(event):
                return expected
            previous = event.hash
        return None

    def made_at(self) -> datetime:
        """When this home was made: the instant from which packs' clocks run. Written down by whoever asks first."""
        if not (found := self.events(HOME, kind="home", limit=1)):
            self.append(HOME, "home", {})
            found = self.events(HOME, kind="home", limit=1)
        return found[0].at

    @contextlib.contextmanager
    def lease(self, name: str, holder: str, *, ttl_s: float = 30.0, wait_s: float = 0.0) -> Iterator[None]:
        """Hold the lease `name` while the block runs; renewed meanwhile, free again `ttl_s` after a sudden death.

        A second holder waits up to `wait_s`, then gets LeaseHeldError. The same `holder` takes its lease over at once:
        it is the retry of an attempt that died.
        """
        token = uuid.uuid4().hex
        deadline = time.monotonic() + wait_s
        while (other := self._take(name, holder, token, ttl_s)) is not None:
            if time.monotonic() >= deadline:
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
            with self.engine.begin() as connection:
                connection.execute(sa.delete(leases).where(leases.c.name == name, leases.c.token == token))

    def _take(self, name: str, holder: str, token: str, ttl_s: float) -> str | None:
        """Take the lease, or say who holds it."""
        now = datetime.now(UTC)
        expires_at = (now + timedelta(seconds=ttl_s)).isoformat(timespec="microseconds")
        free = sa.or_(leases.c.expires_at < now.isoformat(timespec="microseconds"), leases.c.holder == holder)
        with contextlib.suppress(IntegrityError), self.engine.begin() as connection:
            connection.execute(sa.delete(leases).where(leases.c.name == name, free))
            connection.execute(sa.insert(leases).values(name=name, holder=holder, token=token, expires_at=expires_at))
            return None
        with self.engine.connect() as connection:
            return connection.execute(sa.select(leases.c.holder).where(leases.c.name == name)).scalar() or "another run"

    def _renew(self, name: str, token: str, ttl_s: float, stop: threading.Event) -> None:
        while not stop.wait(ttl_s / 3):
            expires_at = (datetime.now(UTC) + timedelta(seconds=ttl_s)).isoformat(timespec="microseconds")
            # A database that is away for a moment must not end the work: the next renewal may reach it in time.
            with contextlib.suppress(DBAPIError), self.engine.begin() as connection:
                connection.execute(
                    sa.update(leases)
                    .where(leases.c.name == name, leases.c.token == token)
                    .values(expires_at=expires_at)
                )


def this_process() -> str:
    """`host:pid`: the holder of a lease that no retry may take over."""
    return f"{socket.gethostname()}:{os.getpid()}"


@functools.cache
def connect(url: str) -> Database:
    """The database at `url`: one engine a process."""
    return Database(url)


def _append(
    connection: sa.Connection, pack: str, kind: str, body: dict[str, Any], run_id: str | None, key: str | None
) -> Event:
    last = connection.execute(
        sa.select(events.c.position, events.c.hash)
        .where(events.c.pack == pack)
        .order_by(events.c.position.desc())
        .limit(1)
    ).first()
    unhashed = Event(
        pack=pack,
        position=last.position + 1 if last else 1,
        kind=kind,
        run_id=run_id,
        key=key,
        at=datetime.now(UTC),
        body=json.loads(_canonical(body)),
        previous=last.hash if last else GENESIS,
        hash="",
    )
    event = Event(**{**_fields(unhashed), "hash": _hash_of(unhashed)})
    row = {**_fields(event), "at": event.at.isoformat(), "body": _canonical(event.body)}
    connection.execute(sa.insert(events).values(**row))
    return event


def _fields(event: Event) -> dict[str, Any]:
    return {name: getattr(event, name) for name in Event.__dataclass_fields__}


def _event(row: sa.Row[Any]) -> Event:
    values = {name: getattr(row, name) for name in Event.__dataclass_fields__}
    return Event(**{**values, "at": datetime.fromisoformat(row.at), "body": json.loads(row.body)})


def _hash_of(event: Event) -> str:
    content = asdict(event)
    del content["hash"]
    content["at"] = event.at.isoformat()
    return hashlib.sha256(_canonical(content).encode()).hexdigest()


def _canonical(content: Any) -> str:
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _is_sqlite(url: sa.URL) -> bool:
    return url.get_backend_name() == "sqlite"


def _make_sqlite_serializable(engine: sa.Engine) -> None:
    """Take SQLite's write lock when a transaction begins, so that read-then-insert cannot interleave."""

    @sa.event.listens_for(engine, "connect")
    def _connect(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # SQLAlchemy's own BEGIN below, not the driver's late one
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")

    @sa.event.listens_for(engine, "begin")
    def _begin(connection: sa.Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")


def _upgrade(engine: sa.Engine) -> None:
    """Bring the schema to HEAD. Alembic is imported only when there is something to do."""
    with engine.connect() as connection:
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
