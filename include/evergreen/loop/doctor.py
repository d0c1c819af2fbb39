"""The home examined: what is wrong with it, in plain words, and what to do about it. Nothing is changed.

Databases are opened for reading only; a home that is absent is not made, and an old one is not brought up to date. Each
check is a function that returns a `Check`; `examine` puts them in order.

Not covered: the bytes of objects, which a run hashes before it uses them; the chain of events, which `evergreen ledger
verify` holds to its hashes; the world that packs read from, which `evergreen check` reads.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import socket
import sqlite3
import sys
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import sqlalchemy as sa

from evergreen import database as db
from evergreen import home
from evergreen.data.repository import GitError, Repository
from evergreen.database import Database
from evergreen.errors import DatabaseError, PackError, RegistryError, SettingsError, StoreError, masked
from evergreen.pack import Pack, find
from evergreen.registry import ledger
from evergreen.run import Value, count
from evergreen.settings import PREFIX, Settings

LITTLE_BYTES = 2 * 2**30
"""A disk with less room than this is a finding: a training on it may end half-way."""
AHEAD = timedelta(minutes=1)
"""How far clocks of one installation may differ."""
NEWEST = 200
"""How many of a pack's newest stage values are looked at for objects."""
SAMPLE = 40
"""How many objects a remote elsewhere is asked for."""
BUDGET_S = 1.5
"""How long the objects of the store may take; the rest is said to be skipped."""
LOCKED = re.compile(r"^([A-Za-z0-9][\w.-]*)==([^\s;\\]+)\s*(?:;\s*([^\\]*?))?\s*\\?$", re.MULTILINE)
"""A line of the lock file: name, version, marker."""


class Finding(Value):
    """Something that is wrong."""

    what: str
    fix: str


class Check(Value):
    """What was looked at, and what is wrong with it."""

    name: str
    summary: str
    """One line for whoever wants to see what is well."""
    findings: tuple[Finding, ...] = ()
    skipped: str | None = None
    """What was not looked at, and why."""


def examine(settings: Settings, now: datetime | None = None) -> list[Check]:
    """Examine the home and what it leans on, and return every check that was made."""
    now = now or datetime.now(UTC)
    checks = [versions(settings), packs(settings)]
    if settings.database_url.startswith("sqlite") and not settings.home.is_dir():
        what = f"there is no home at {settings.home}"
        absent = Finding(what=what, fix=f"set {PREFIX}HOME to yours, or make one: evergreen run PACK")
        return [*checks, Check(name="home", summary=what, findings=(absent,))]
    checks += [places(settings), disk(_rooms(settings)), processes(settings)]
    try:
        database = db.read_only(settings.database_url)
        checks.append(events(database, now))
    except DatabaseError as error:
        finding = Finding(what=error.what, fix=error.fix)
        return [*checks, Check(name="events", summary="the events cannot be read", findings=(finding,))]
    checks += [leases(database, now), registry(settings, database), store(settings, database)]
    return [*checks, repository(settings, database)]


# -- the installation ------------------------------------------------------------------------------------------------


def versions(settings: Settings) -> Check:
    """Compare Python and the installed packages with the lock file."""
    lock = settings.project / "requirements.txt"
    if not lock.is_file():
        return Check(name="versions", summary=_python(), skipped=f"packages: there is no {lock}")
    wanted = locked(lock.read_text(encoding="utf-8"))
    installed = {_plain(found.metadata["Name"]): found.version for found in importlib.metadata.distributions()}
    other = [
        f"{name} {installed.get(name, 'is absent')} instead of {version}"
        for name, version in sorted(wanted.items())
        if installed.get(name, "").partition("+")[0] != version
    ]
    findings: tuple[Finding, ...] = ()
    if other:
        shown = ", ".join(other[:5]) + (f" and {len(other) - 5} more" if len(other) > 5 else "")
        what = f"{count(len(other), 'package')} not as {lock} says: {shown}"
        findings = (Finding(what=what, fix=f"uv pip install --python {sys.prefix} -r {lock}"),)
    return Check(name="versions", summary=f"{_python()}, {count(len(wanted), 'locked package')}", findings=findings)


def locked(text: str) -> dict[str, str]:
    """Return package → version of a lock file, of the lines that are meant for this machine."""
    from packaging.markers import Marker

    return {
        _plain(name): version.partition("+")[0]
        for name, version, marker in LOCKED.findall(text)
        if not marker or Marker(marker).evaluate()
    }


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _python() -> str:
    return f"Evergreen {importlib.metadata.version('evergreen-training')} on Python {platform.python_version()}"


def packs(settings: Settings) -> Check:
    """Load every pack."""
    folders = find(settings.packs) if settings.packs.is_dir() else []
    findings = []
    for folder in folders:
        try:
            Pack.load(folder)
        except PackError as error:
            findings.append(Finding(what=error.what, fix=error.fix))
    if not folders:
        fix = f"set {PREFIX}PACKS to the folder that holds them, or make one: evergreen new PACK"
        findings.append(Finding(what=f"there is no pack in {settings.packs}", fix=fix))
    return Check(name="packs", summary=f"{count(len(folders), 'pack')} in {settings.packs}", findings=tuple(findings))


# -- the home --------------------------------------------------------------------------------------------------------


def places(settings: Settings) -> Check:
    """Say where the home lies, whether it was moved or copied, and whether it may be written to."""
    findings = []
    try:
        lies = home.whereabouts(settings)
        if lies.kind in ("moved", "copied"):
            what = f"{settings.home} was {lies.kind} from {lies.was}, and nothing has opened it here since"
            fix = "run any command that opens it, as `evergreen ledger verify` does: it sets the paths in it right"
            findings.append(Finding(what=what, fix=fix))
        findings += [Finding(what=error.what, fix=error.fix) for error in home.faults(settings)]
    except SettingsError as error:
        findings.append(Finding(what=error.what, fix=error.fix))
    for name, place in _folders(settings).items():
        if place.exists() and not os.access(place, os.W_OK | os.X_OK):
            what = f"{place} cannot be written to by user {os.getuid()}"
            findings.append(
                Finding(what=what, fix=f"chown or chmod it, or set {PREFIX}{name.upper()} to another place")
            )
    return Check(name="home", summary=str(settings.home), findings=tuple(findings))


def _folders(settings: Settings) -> dict[str, Path]:
    """Return the settings that name folders of this machine, and those folders."""
    named = {
        name: str(getattr(settings, name)) for name in ("home", "cache", "jobs", "data_remote", "mlflow_artifacts")
    }
    return {name: path for name, place in named.items() if (path := _path(place)) is not None}


def _path(place: str) -> Path | None:
    """Return the path in a setting, or None for a place elsewhere."""
    place = place.removeprefix("file://")
    return Path(place) if place.startswith("/") else None


def _rooms(settings: Settings) -> dict[str, tuple[Path, int]]:
    """Return setting → folder and the free bytes of its disk, each disk once."""
    rooms: dict[int, tuple[str, Path, int]] = {}
    for name, place in _folders(settings).items():
        there = next(folder for folder in (place, *place.parents) if folder.exists())
        rooms.setdefault(there.stat().st_dev, (name, place, shutil.disk_usage(there).free))
    return {name: (place, free) for name, place, free in rooms.values()}


def disk(rooms: Mapping[str, tuple[Path, int]]) -> Check:
    """Find disks with little room; `rooms` is setting → folder and its disk's free bytes."""
    findings = tuple(
        Finding(
            what=f"the disk of {place} has {free / 1e9:.1f} GB left",
            fix=f"make room there: `evergreen prune PACK` removes what a pack's retention lets go of; or set {PREFIX}"
            f"{name.upper()} to a folder on a larger disk",
        )
        for name, (place, free) in rooms.items()
        if free < LITTLE_BYTES
    )
    shown = ", ".join(f"{free / 1e9:,.0f} GB free at {place}" for place, free in rooms.values())
    return Check(name="disk", summary=shown, findings=findings)


def processes(settings: Settings) -> Check:
    """Find services that `evergreen up` started and that have ended."""
    file = settings.home / home.SERVICES
    services = json.loads(file.read_bytes()) if file.is_file() else {}
    dead = [name for name, entry in services.items() if not all(map(_lives, entry["processes"]))]
    findings = tuple(
        Finding(
            what=f"{name}, which `evergreen up` started on this home, has ended; its logs are in {settings.home / 'logs'}",
            fix="start it again with `evergreen up`, or forget it with `evergreen down`",
        )
        for name in dead
    )
    running = ", ".join(f"{name} at {entry['address']}" for name, entry in services.items() if name not in dead)
    return Check(name="processes", summary=running or "Airflow does not run here: evergreen up", findings=findings)


def _lives(process: Mapping[str, Any]) -> bool:
    import psutil

    try:
        return bool(abs(psutil.Process(process["pid"]).create_time() - process["started"]) < 2.0)
    except psutil.Error:
        return False


# -- the events ------------------------------------------------------------------------------------------------------


def events(database: Database, now: datetime) -> Check:
    """Count the events, and find those that come from the future. Raises DatabaseError."""
    numbers = database.packs()
    query = sa.select(db.events.c.pack, sa.func.max(db.events.c.at).label("at")).group_by(db.events.c.pack)
    with database.reading() as connection:
        newest = {row.pack: datetime.fromisoformat(row.at) for row in connection.execute(query)}
    findings = tuple(
        Finding(
            what=f"the newest event of {pack} is of {at:%Y-%m-%d %H:%M:%S} UTC, {_long(at - now)} after this machine's clock",
            fix="set the clock of this machine, or of the one that wrote it, by NTP: timedatectl set-ntp true; if the "
            "event's time is wrong, decisions that count hours are right again after that time",
        )
        for pack, at in newest.items()
        if at - now > AHEAD
    )
    last = f", the newest {_long(now - max(newest.values()))} ago" if newest and not findings else ""
    summary = f"{count(sum(numbers.values()), 'event')} of {count(len(numbers.keys() - {db.HOME}), 'pack')}{last}"
    return Check(
        name="events", summary=summary, findings=findings, skipped="hashes of the chain: evergreen ledger verify"
    )


def _long(span: timedelta) -> str:
    """Return a span of time in its largest unit: `3 days`, `2 hours`."""
    seconds = int(span.total_seconds())
    for unit, size in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= size:
            return count(seconds // size, unit)
    return count(max(seconds, 0), "second")


def leases(database: Database, now: datetime) -> Check:
    """Find the leases whose holders have died."""
    with database.reading() as connection:
        held = list(connection.execute(sa.select(db.leases.c.name, db.leases.c.holder, db.leases.c.expires_at)))
    findings = []
    for name, holder, text in held:
        ends, pack = datetime.fromisoformat(text), name.partition(":")[2]
        if ends < now:
            what = f"{holder} died {_long(now - ends)} ago while it held the lease {name}"
            fix = f"nothing waits for it; the next run takes it over and finishes what was begun: evergreen run {pack}"
            findings.append(Finding(what=what, fix=fix))
        elif _is_dead(holder):
            what = f"{holder} died while it held the lease {name}"
            findings.append(Finding(what=what, fix=f"wait {_long(ends - now)}: the lease ends by itself"))
    return Check(name="leases", summary=f"{len(held) - len(findings)} held by living runs", findings=tuple(findings))


def _is_dead(holder: str) -> bool:
    """Whether the holder is a process of this machine that has ended; a run's id does not tell."""
    host, _, pid = holder.rpartition(":")
    return host == socket.gethostname() and pid.isdecimal() and not Path("/proc", pid).exists()


# -- versions and aliases --------------------------------------------------------------------------------------------


class Registered(Value):
    """A version as MLflow knows it."""

    version: int
    is_champion: bool
    is_pruned: bool
    folder: Path | None
    """Where its files lie; None where that is not on this machine."""


def registry(settings: Settings, database: Database) -> Check:
    """Compare the alias `champion` with the ledger, and find versions whose files are gone."""
    names = sorted(database.packs().keys() - {db.HOME})
    findings, number = [], 0
    try:
        known = registered(settings, names)
    except (sqlite3.Error, OSError, RegistryError) as error:
        fix = f"check that it is there, that it may be read, and that {PREFIX}MLFLOW_TRACKING_URI is right"
        finding = Finding(what=f"MLflow's {masked(settings.mlflow_tracking_uri)} cannot be read: {error}", fix=fix)
        return Check(name="registry", summary="MLflow cannot be read", findings=(finding,))
    for pack in names:
        number += len(known[pack])
        findings += aliases(pack, known[pack], ledger.champion(database, pack))
        findings += [
            Finding(
                what=f"the files of {pack} version {one.version} are gone: there is no {one.folder / 'MLmodel'}",
                fix=f"bring {one.folder} back from a backup; without one, delete the version in MLflow's UI, then make it "
                f"again: evergreen run {pack}",
            )
            for one in known[pack]
            if one.folder is not None and not one.is_pruned and not (one.folder / "MLmodel").is_file()
        ]
    return Check(name="registry", summary=f"{count(number, 'version')} in MLflow", findings=tuple(findings))


def aliases(pack: str, versions: Collection[Registered], expected: int | None) -> list[Finding]:
    """Find an alias that is not where the ledger has it."""
    champion = next((one.version for one in versions if one.is_champion), None)
    if champion == expected:
        return []
    if expected is not None and expected not in {one.version for one in versions}:
        return [
            Finding(
                what=f"{pack}: the ledger says that version {expected} is champion, and MLflow has no such version",
                fix=f"make a new one: evergreen run {pack}",
            )
        ]
    here, there = (f"version {version}" if version else "no version" for version in (champion, expected))
    back = f'evergreen rollback {pack} --to {expected} --why "…"' if expected else "delete the alias in MLflow's UI"
    keep = f"; to keep {here}, let the next run write it down: evergreen run {pack}" if champion else ""
    return [
        Finding(
            what=f"{pack}: MLflow's alias champion is on {here}, and the ledger says {there}: somebody moved it by hand",
            fix=f"to go back to {there}: {back}{keep}",
        )
    ]


def registered(settings: Settings, names: Collection[str]) -> dict[str, list[Registered]]:
    """Return the versions of each of these models; an embedded MLflow's are read from its tables, which takes no import."""
    uri = sa.make_url(settings.mlflow_tracking_uri) if "://" in settings.mlflow_tracking_uri else None
    if uri is None or uri.get_backend_name() != "sqlite":
        from evergreen.registry.models import Registry

        server = Registry(settings)
        return {
            name: [
                Registered(
                    version=v.version, is_champion="champion" in v.aliases, is_pruned=bool(v.pruned), folder=None
                )
                for v in server.versions(name)
            ]
            for name in names
        }
    if not (file := Path(str(uri.database))).is_file():
        return {name: [] for name in names}
    with contextlib.closing(db.open_sqlite_to_read(file)) as connection:
        rows = connection.execute(
            "SELECT v.name, v.version, coalesce(v.storage_location, v.source), EXISTS (SELECT 1 FROM "
            "registered_model_aliases a WHERE a.name = v.name AND a.alias = 'champion' AND a.version = v.version), "
            "EXISTS (SELECT 1 FROM model_version_tags t WHERE t.name = v.name AND t.version = v.version AND "
            "t.key = 'evergreen.pruned') FROM model_versions v WHERE v.current_stage != 'Deleted_Internal'"
        ).fetchall()
    versions: dict[str, list[Registered]] = {name: [] for name in names}
    for name, version, place, is_champion, is_pruned in rows:
        parts = urlsplit(str(place))
        folder = Path(unquote(parts.path)) if parts.scheme in ("", "file") else None
        one = Registered(version=version, is_champion=is_champion, is_pruned=is_pruned, folder=folder)
        versions.setdefault(name, []).append(one)
    return versions


# -- the store and the repository ------------------------------------------------------------------------------------


def store(settings: Settings, database: Database) -> Check:
    """Find objects that the newest events name and that the store's remote lacks. Their bytes are not hashed."""
    remote = _path(settings.data_remote)
    objects, skipped = _named(database, remote)
    looked_for = set(objects)
    if remote is None and len(objects) > SAMPLE:
        looked_for = set(islice(objects, SAMPLE))
        skipped.append(f"{len(objects) - SAMPLE} objects: a remote elsewhere is asked for {SAMPLE}, the newest first")
    try:
        missing = _missing(settings, remote, looked_for)
    except StoreError as error:
        finding = Finding(what=error.what, fix=error.fix)
        return Check(name="store", summary=masked(settings.data_remote), findings=(finding,))
    here = {md5 for md5 in missing if _object(settings.cache, md5).is_file()}
    findings = []
    for lost, is_here in ((here, True), (missing - here, False)):
        if lost:
            owners = sorted({objects[md5] for md5 in lost})
            examples = ", ".join(sorted(lost)[:3])
            what = f"the store's remote lacks {count(len(lost), 'object')} of {', '.join(owners)}: {examples}"
            findings.append(Finding(what=what, fix=_bring_back(settings, remote, owners, is_here=is_here)))
    return Check(
        name="store",
        summary=f"{count(len(looked_for), 'object')} that the newest events name, in {masked(settings.data_remote)}",
        findings=tuple(findings),
        skipped="; ".join(skipped) or None,
    )


def _named(database: Database, remote: Path | None) -> tuple[dict[str, str], list[str]]:
    """Return the objects that the newest values of each pack name, with the pack; and what was not looked at.

    Of each pack's newest snapshot the files are among them. What retention removed is not.
    """
    began = time.monotonic()
    objects: dict[str, str] = {}
    skipped = []
    for pack in sorted(database.packs().keys() - {db.HOME}):
        if time.monotonic() - began > BUDGET_S:
            skipped.append(f"{pack} and the packs after it, for want of time")
            break
        pruned = {event.run_id for event in database.events(pack, kind="pruned")}
        values = database.events(pack, kind=("stage", "drift"), newest_first=True, limit=NEWEST)
        if len(values) == NEWEST:
            skipped.append(f"what {pack} made before {values[-1].at:%Y-%m-%d}")
        for event in values:
            if event.run_id not in pruned:
                objects.update(dict.fromkeys(_objects(event.body["value"]), pack))
        newest = next((event for event in values if event.body["stage"] == "snapshot"), None)
        if newest is not None and newest.run_id not in pruned and remote is not None:
            objects.update(dict.fromkeys(_members(remote, newest.body["value"]), pack))
    return objects, skipped


def _missing(settings: Settings, remote: Path | None, hashes: Collection[str]) -> set[str]:
    if remote is not None:
        return {md5 for md5 in hashes if not _object(remote, md5).is_file()}
    from evergreen.data.store import Store

    return Store(settings).missing(hashes) if hashes else set()


def _bring_back(settings: Settings, remote: Path | None, packs: list[str], *, is_here: bool) -> str:
    again = " and ".join(f"evergreen run {pack} --force" for pack in packs)
    if is_here and remote is not None:
        return f"this machine's cache has them; copy what is not there: cp -r --no-clobber {settings.cache}/files {remote}/"
    if is_here:
        return f"this machine's cache has them; a run pushes what it uses: {again}"
    return f"bring them back from a backup of the remote, or make the newest again: {again}"


def _objects(value: Any) -> Iterator[str]:
    """Yield the hashes of the objects that a stage's value names."""
    if isinstance(value, dict):
        if ("hash" in value and "tag" in value) or value.keys() == {"hash", "size"}:  # a snapshot's tree
            yield value["hash"]
        for part in value.values():
            yield from _objects(part)
    elif isinstance(value, list):
        for part in value:
            yield from _objects(part)


def _members(remote: Path, snapshot: Mapping[str, Any]) -> Iterator[str]:
    """Yield the hashes of a snapshot's files, as its listing in the remote names them."""
    with contextlib.suppress(OSError, ValueError):  # what is not there is a finding of its own
        for entry in json.loads(_object(remote, snapshot["hash"]).read_bytes()):
            yield entry["md5"]


def _object(place: Path, md5: str) -> Path:
    return place / "files" / "md5" / md5[:2] / md5[2:]


def repository(settings: Settings, database: Database) -> Check:
    """Ask the snapshots' repository whether it takes a push; nothing is pushed."""
    place, shown = settings.data_repository, masked(settings.data_repository)
    path = _path(place)
    if path is not None and not path.exists():
        lost = [pack for pack in database.packs() if database.latest(pack, kind="stage", stage="snapshot")]
        fix = f"bring it back from a backup, or set {PREFIX}DATA_REPOSITORY to where it is"
        gone = (Finding(what=f"the repository of snapshots is gone: {place}", fix=fix),) if lost else ()
        return Check(name="snapshots", summary=f"{place}, made by the first run", findings=gone)
    with tempfile.TemporaryDirectory() as scratch:
        try:
            Repository(place, settings.data_remote).rehearse(Path(scratch))
        except GitError as error:
            fix = (
                f"see that it is a git repository that this user may push to, and that {PREFIX}DATA_REPOSITORY is right"
            )
            finding = Finding(what=f"the repository of snapshots {place} takes no push: {error}", fix=fix)
            return Check(name="snapshots", summary=place, findings=(finding,))
    closed = [folder for folder in (_git_folder(path),) if folder is not None and not os.access(folder, os.W_OK)]
    findings = tuple(
        Finding(what=f"{folder} cannot be written to by user {os.getuid()}", fix="chown or chmod it")
        for folder in closed
    )
    return Check(name="snapshots", summary=f"{shown} takes pushes", findings=findings)


def _git_folder(path: Path | None) -> Path | None:
    """Return the folder in which a repository of this machine keeps its objects."""
    if path is None:
        return None
    return next((folder for folder in (path / ".git" / "objects", path / "objects") if folder.is_dir()), None)
