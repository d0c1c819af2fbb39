"""The home's own place: where it lies, where it lay before, and whether it is a copy of another.

A home may be moved or copied. Its `home.json` says where it was opened last. When it is opened at another place, `adopt`
rewrites the absolute paths that MLflow, Airflow and stock DVC keep in it. Nothing here writes to the place where the home
was. Homes without `home.json`, made by earlier versions, are adopted in the same way.

What lies outside of the home (a database, a git server, a bucket) is never touched: see `faults`.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import socket
import sqlite3
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

from pydantic import BaseModel, ConfigDict

from evergreen.errors import SettingsError
from evergreen.settings import PREFIX, Settings

MARKER = "home.json"
SERVICES = "services.json"
"""The processes that `evergreen up` started; see `orchestration/embedded.py`."""
PLACES = ("database_url", "data_repository", "data_remote", "cache", "jobs", "mlflow_tracking_uri", "mlflow_artifacts")
"""The settings that say where a home's things lie."""
URIS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)
"""Tables and columns of MLflow's database that hold the URI of a file."""
REPOSITORY_TAG = "evergreen.snapshot.repository"
PLACE_TAGS = (("tags", REPOSITORY_TAG), ("trace_tags", "mlflow.artifactLocation"))
"""Tables of tags, and the tag whose value is a place."""
WRITTEN = "# Evergreen writes this file: it says where the store lies, seen from here.\n"
WAIT_S = 60.0
"""How long MLflow's database may be busy."""


class Origin(BaseModel):
    """The home that a copy was made from."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    id: str | None
    """None where it had no `home.json`."""
    place: str
    host: str | None


class Marker(BaseModel):
    """`home.json`."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    id: str
    place: str
    host: str
    device: int
    inode: int
    """Of the home's folder: a folder that was renamed keeps them, a copy has others."""
    since: datetime
    before: tuple[str, ...] = ()
    """The places where this home was earlier, the last one last."""
    copied_from: Origin | None = None


@dataclass(frozen=True)
class Whereabouts:
    """How a home lies now, compared with its `home.json`."""

    kind: Literal["new", "here", "moved", "copied"]
    """`new`: it has no `home.json` yet, and nothing in it speaks of another place."""
    was: Path | None = None
    """Where a moved home was, or where the home lies that it was copied from."""
    marker: Marker | None = None

    def is_renamed(self, settings: Settings) -> bool:
        """Whether the home is opened by a name, a symbolic link say, that its `home.json` does not have yet."""
        marker = self.marker
        return marker is not None and str(settings.home) not in (marker.place, *marker.before)


def whereabouts(settings: Settings) -> Whereabouts:
    """Compare the home's `home.json` with where the home is. Changes nothing.

    A home at another place is moved where it is the same folder, or where its old place is on this machine and no longer
    holds it. Otherwise it is a copy.
    """
    home, marker = settings.home, read_marker(settings)
    if marker is None:
        was = _recorded_place(settings)
        if was is None or _same(was, home):
            return Whereabouts("new")
        is_home = any((was / name).exists() for name in ("evergreen.db", "mlflow.db"))
        return Whereabouts("copied" if is_home else "moved", was)
    was = Path(marker.place)
    stat = home.stat()
    is_same_folder = (stat.st_dev, stat.st_ino) == (marker.device, marker.inode)
    is_same_host = marker.host == socket.gethostname()
    if was == home:
        return Whereabouts("here" if is_same_folder or is_same_host else "copied", was, marker)
    if _same(was, home):  # the same folder by another name: a symbolic link
        return Whereabouts("here", was, marker)
    if not is_same_host:
        return Whereabouts("copied", was, marker)
    other = _marker_at(was)
    is_copy = not is_same_folder and other is not None and other.id == marker.id
    return Whereabouts("copied" if is_copy else "moved", was, marker)


def adopt(settings: Settings) -> None:
    """Make what lies in the home speak of the place where the home is now; then raise what `faults` finds.

    Idempotent, and safe with many processes: `home.json` is written last, under a lock, so the next opening finishes what
    a killed one began. Raises SettingsError.
    """
    if not settings.home.is_dir():
        return  # what makes it comes later; the next opening writes `home.json`
    if not (is_inside(settings, "mlflow_tracking_uri") or is_inside(settings, "data_repository")):
        return  # a machine of an installation whose databases are services: nothing in its home names a place
    found = whereabouts(settings)
    if found.kind != "here" or found.is_renamed(settings):
        try:
            with _alone(settings):
                _adopt(settings, whereabouts(settings))
        except OSError as error:
            if whereabouts(settings).kind != "new":  # a new home is marked when there is room
                raise SettingsError(
                    f"{settings.home} lies elsewhere than before, and cannot be made to work here: {error}",
                    fix=f"make {settings.home} writable, with room on its disk",
                ) from error
    if errors := faults(settings):
        raise errors[0]


def faults(settings: Settings) -> list[SettingsError]:
    """Find the settings that a moved or copied home must not use. Changes nothing.

    No setting may point to where the home was, and none into the home that it was copied from. A copy shares nothing that
    is outside of it with the original.
    """
    found = whereabouts(settings)
    marker, home = found.marker, settings.home
    earlier = [*(marker.before if marker else ()), *([str(found.was)] if found.kind in ("moved", "copied") else [])]
    origin = marker.copied_from if marker else None
    if found.kind == "copied":
        origin = Origin(id=marker.id if marker else None, place=str(found.was), host=marker.host if marker else None)
    if origin is not None:
        earlier.append(origin.place)
    errors = []
    outside = {name: _file(str(getattr(settings, name))) for name in PLACES if not is_inside(settings, name)}
    for name, place in outside.items():
        if any(_within(place, Path(old)) for old in earlier):
            errors.append(
                SettingsError(
                    f"{PREFIX}{name.upper()} is {place}, where the home {home} was before it was moved or copied",
                    fix=f"unset {PREFIX}{name.upper()}, or set it to a place of this home",
                )
            )
    if origin is not None and outside and not errors:
        names = ", ".join(f"{PREFIX}{name.upper()}" for name in outside)
        errors.append(
            SettingsError(
                f"{home} is a copy of the home {origin.place}{f' on {origin.host}' if origin.host else ''}, and uses the "
                f"same {names}: two homes that write there destroy each other's work",
                fix=f"give the copy its own {names}; or, once nobody uses the original any more, remove `copied_from` "
                f"from {home / MARKER}",
            )
        )
    return errors


def read_marker(settings: Settings) -> Marker | None:
    """Read `home.json`; None where there is none. Raises SettingsError for one that cannot be read."""
    file = settings.home / MARKER
    try:
        return Marker.model_validate_json(file.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise SettingsError(
            f"{file} cannot be read: {reason[:200]}",
            fix=f"remove {file}: it is written again, as for a home that moved",
        ) from error


def point_to_store(settings: Settings) -> None:
    """Tell stock DVC where the store is, seen from the snapshots' repository: `.dvc/config.local`, which git ignores.

    Each commit names the store by its absolute path of then. Stock `dvc` prefers this file in the repository that it is
    given, so snapshots from before a move can be read.
    """
    folder = Path(_file(settings.data_repository)) / ".dvc"
    file = folder / "config.local"
    if not (is_inside(settings, "data_repository") and folder.is_dir()):
        return
    theirs = file.read_text(encoding="utf-8") if file.is_file() else ""
    if theirs and not theirs.startswith(WRITTEN):
        return  # somebody's own
    if is_inside(settings, "data_remote"):
        remote = os.path.relpath(_file(settings.data_remote), folder)
        text = f"{WRITTEN}['remote \"store\"']\n    url = {remote}\n"
        if theirs != text:
            _write(file, text)
    else:
        file.unlink(missing_ok=True)  # the commits name a place that does not move with the home


def is_inside(settings: Settings, name: str) -> bool:
    """Whether the place that a setting names lies in the home."""
    return _within(_file(str(getattr(settings, name))), settings.home)


# -- adoption, step by step ------------------------------------------------------------------------------------------


def _adopt(settings: Settings, found: Whereabouts) -> None:
    marker, was = found.marker, found.was
    before = marker.before if marker else ()
    if found.kind == "here":  # another process was first, or the home has one more name
        if marker is not None and found.is_renamed(settings):
            named = marker.model_copy(update={"before": (*before, str(settings.home))})
            _write(settings.home / MARKER, named.model_dump_json(indent=2) + "\n")
        return
    if found.kind == "moved":
        _require_no_services(settings, was)
    for old in dict.fromkeys(filter(None, [was, *map(Path, before)])):
        if old != settings.home:
            _rewrite_mlflow(settings, old)
            _rewrite_airflow(settings, old)
    point_to_store(settings)
    if found.kind == "copied":
        _forget_processes(settings)
    stat = settings.home.stat()
    here = Marker(
        id=marker.id if marker and found.kind == "moved" else uuid.uuid4().hex,
        place=str(settings.home),
        host=socket.gethostname(),
        device=stat.st_dev,
        inode=stat.st_ino,
        since=datetime.now(UTC),
    )
    if found.kind == "moved":
        earlier = tuple(dict.fromkeys((*before, str(was))))
        here = here.model_copy(update={"before": earlier, "copied_from": marker.copied_from if marker else None})
    if found.kind == "copied":
        origin = Origin(id=marker.id if marker else None, place=str(was), host=marker.host if marker else None)
        here = here.model_copy(update={"copied_from": origin})
    _write(settings.home / MARKER, here.model_dump_json(indent=2) + "\n")


def _rewrite_mlflow(settings: Settings, was: Path) -> None:
    """Turn the places in MLflow's database that lie under `was` into those of the home, in one transaction.

    A place that is the home's already stays, where the home was moved into a folder of its own: this may be done again.
    """
    file = _file(settings.mlflow_tracking_uri)
    if not is_inside(settings, "mlflow_tracking_uri") or not Path(file).is_file():
        return
    prefixes = [(f"{was.as_uri()}/", f"{settings.home.as_uri()}/"), (f"{was}/", f"{settings.home}/")]
    with contextlib.closing(sqlite3.connect(file, timeout=WAIT_S, isolation_level=None)) as database:
        database.execute("BEGIN IMMEDIATE")
        tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        for old, new in prefixes:
            for table, column in URIS:
                if table in tables:
                    database.execute(
                        f"UPDATE {table} SET {column} = :new || substr({column}, length(:old) + 1) "  # noqa: S608 - ours
                        f"WHERE substr({column}, 1, length(:old)) = :old AND substr({column}, 1, length(:new)) != :new",
                        {"old": old, "new": new},
                    )
            for table, tag in PLACE_TAGS:
                if table in tables:
                    database.execute(
                        f"UPDATE {table} SET value = :new || substr(value, length(:old) + 1) "  # noqa: S608 - ours
                        "WHERE key = :tag AND substr(value, 1, length(:old)) = :old AND substr(value, 1, length(:new)) != :new",
                        {"old": old, "new": new, "tag": tag},
                    )
        if "datasets" in tables:
            query = (
                "SELECT rowid, dataset_source FROM datasets WHERE instr(dataset_source, 'mlflow.source.git.repoURL')"
            )
            for row, source in database.execute(query).fetchall():
                moved = _moved_source(source, f"{was}/", f"{settings.home}/")
                database.execute("UPDATE datasets SET dataset_source = ? WHERE rowid = ?", (moved, row))
        database.execute("COMMIT")


def _moved_source(source: str, old: str, new: str) -> str:
    """A dataset's source, its repository at the new place."""
    try:
        tags: dict[str, Any] = json.loads(source)["tags"]
    except (ValueError, KeyError, TypeError):
        return source
    for name, value in tags.items():
        if str(value).startswith(old) and not str(value).startswith(new):
            tags[name] = new + value.removeprefix(old)
    return json.dumps({"tags": tags})


def _rewrite_airflow(settings: Settings, was: Path) -> None:
    """Turn the folders in `airflow.cfg` into those of the home; Airflow would go on writing its logs at the old place."""
    file = settings.home / "airflow" / "airflow.cfg"
    if not file.is_file():
        return
    text = file.read_text(encoding="utf-8")
    old = re.compile(rf"(?<=[ /=]){re.escape(str(was / 'airflow'))}(?=/|$)", re.MULTILINE)
    moved = old.sub(lambda _match: str(settings.home / "airflow"), text)
    if moved != text:
        _write(file, moved, mode=file.stat().st_mode & 0o777)


def _forget_processes(settings: Settings) -> None:
    """Remove from a copy what names the original's processes: nobody may take them for the copy's, or end them."""
    (settings.home / SERVICES).unlink(missing_ok=True)
    if is_inside(settings, "jobs"):
        for file in settings.jobs.glob("*/pid.json"):
            file.unlink(missing_ok=True)


def _require_no_services(settings: Settings, was: Path | None) -> None:
    """Raise SettingsError while Airflow or MLflow, started before the home was moved, runs: it writes to the old place."""
    file = settings.home / SERVICES
    services = json.loads(file.read_bytes()) if file.is_file() else {}
    living = [name for name, entry in services.items() if any(map(_lives, entry["processes"]))]
    if living:
        raise SettingsError(
            f"{settings.home} was moved from {was} while {' and '.join(living)} ran: they still write there",
            fix="stop them with `evergreen down`, then try again",
        )


def _lives(process: dict[str, Any]) -> bool:
    import psutil

    try:
        return bool(abs(psutil.Process(process["pid"]).create_time() - process["started"]) < 2.0)
    except psutil.Error:
        return False


def _recorded_place(settings: Settings) -> Path | None:
    """The place that a home without `home.json` speaks of; None where nothing in it names one."""
    home = settings.home
    with contextlib.suppress(OSError):
        text = (home / "airflow" / "airflow.cfg").read_text(encoding="utf-8")
        if match := re.search(r"^base_log_folder = (/.*)/airflow/logs$", text, re.MULTILINE):
            return Path(match[1])
    database = Path(_file(settings.mlflow_tracking_uri))
    is_embedded = is_inside(settings, "mlflow_tracking_uri") and is_inside(settings, "mlflow_artifacts")
    if not is_embedded or not database.is_file():
        return None
    inner = Path(_file(settings.mlflow_artifacts)).relative_to(home)
    with contextlib.suppress(sqlite3.Error), contextlib.closing(_reading(database)) as connection:
        for name, location in connection.execute("SELECT name, artifact_location FROM experiments"):
            place = Path(unquote(urlsplit(str(location)).path))
            if str(location).startswith("file:///") and place.parts[-len(inner.parts) - 1 :] == (*inner.parts, name):
                return place.parents[len(inner.parts)]
    return None


def _reading(database: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True, timeout=WAIT_S)


# -- paths -----------------------------------------------------------------------------------------------------------


def _file(place: str) -> str:
    """The path in a setting: of an SQLite URL its file, of a file URL its path; another URL as it is."""
    place = re.sub(r"^sqlite(\+\w+)?:///|^file://|(?<=\.db)\?.*$", "", place)
    return place if "://" in place or ":" in place.split("/", 1)[0] else str(Path(place).absolute())


def _within(place: str, folder: Path) -> bool:
    """Whether a place is a path in `folder`."""
    return Path(place).is_absolute() and Path(os.path.normpath(place)).is_relative_to(folder)


def _same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:
        return False


def _marker_at(place: Path) -> Marker | None:
    try:
        return Marker.model_validate_json((place / MARKER).read_bytes())
    except (OSError, ValueError):
        return None


@contextlib.contextmanager
def _alone(settings: Settings) -> Iterator[None]:
    """Hold the home against other processes that want to adopt it."""
    with (settings.home / ".home.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _write(file: Path, text: str, mode: int = 0o644) -> None:
    """Write a file so that it is there in full or not at all."""
    part = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)
