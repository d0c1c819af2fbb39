"""`make backup` and `make restore`: everything that the stack keeps, as files in one folder, at one consistent point.

    python3 config/backup.py make FOLDER        FOLDER/<UTC time>/ is there when it is whole
    python3 config/backup.py restore FOLDER     into a stack that has no volumes yet

Both databases' servers are stopped together while their files are copied, some seconds: all that writes waits, tries
again and goes on. Objects, artifacts and the repository come after them: whatever the copied events name was written
before its event. The folder holds the secrets, too: the passwords of the accounts in it. Only its owner can read it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
DATABASES = ("postgres", "postgres-airflow")
DATA = "/var/lib/postgresql/data"
FOLDERS = {"store": "/var/lib/store", "mlflow": "/var/lib/mlflow"}
REPOSITORY = "snapshots.git"


def make(where: Path) -> Path:
    """Copy everything into a new folder of `where`; → the folder."""
    name = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    folder, whole = where / f".{name}", where / name
    made = (_secrets() / "image.env").is_file()
    running = _compose("ps", "--services", "--status", "running").split() if made else []
    if missing := {*DATABASES, *FOLDERS, "metrics"} - {*running}:
        sys.exit(f"not running: {', '.join(sorted(missing))}; nothing was copied; start the stack: make stack")
    folder.mkdir(mode=0o700, parents=True)
    begun = time.monotonic()
    try:
        _copy_all(folder)
    except BaseException:
        shutil.rmtree(folder)  # half of a backup is none, and fills the disk
        raise
    files = {file.name: {"sha256": _sha256(file), "bytes": file.stat().st_size} for file in sorted(folder.iterdir())}
    (folder / "manifest.json").write_text(json.dumps({"made": name, "files": files}, indent=1), encoding="utf-8")
    folder.rename(whole)
    size = sum(file["bytes"] for file in files.values())
    _compose("up", "--detach", "--wait", "--no-recreate", "--no-deps", *DATABASES)
    note = ("python", "-m", "evergreen.orchestration.deployment", "backup", name, str(size))
    _compose(*_in("metrics"), *note)
    print(f"{whole}: {size / 1e6:.1f} MB in {time.monotonic() - begun:.0f} s")  # noqa: T201
    return whole


def _copy_all(folder: Path) -> None:
    """The databases while they stand still, then what goes on."""
    begun = time.monotonic()
    try:
        _compose("stop", *DATABASES)
        for service in DATABASES:
            _copy(folder / f"{service}.tar.gz", *_once(service, "tar", "cz", "-C", DATA, "."))
    finally:
        _compose("start", *DATABASES)
    print(f"databases, stopped for {time.monotonic() - begun:.0f} s")  # noqa: T201
    for service, path in FOLDERS.items():
        _copy(folder / f"{service}.tar", *_in(service), *_going_on(path))
    bundle = ("git", "-C", f"{FOLDERS['store']}/{REPOSITORY}", "bundle", "create", "--quiet", "-", "--all")
    _copy(folder / "snapshots.bundle", *_in("store"), *bundle)
    _copy(folder / "secrets.tar", "tar", "c", "-C", str(_secrets()), ".", compose=False)


def _going_on(path: str) -> tuple[str, ...]:
    """A command that prints a folder into which others write meanwhile, but for the repository and what still arrives.

    tar ends with 1 where something came or went while it read. What the copied events name was there, whole, before.
    """
    out = f"--exclude=./{REPOSITORY} --exclude=./incoming"
    return ("sh", "-c", f'tar c -C "$0" {out} . || [ $? -eq 1 ]', path)


def restore(folder: Path) -> None:
    """Fill the volumes of a stack that has none from a backup, and its secrets where it has none."""
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    for name, told in manifest["files"].items():
        if _sha256(folder / name) != told["sha256"]:
            sys.exit(f"{folder / name}: its bytes are not those that were backed up; take another backup")
    with _secrets_of(folder):
        project = json.loads(_compose("config", "--format", "json"))["name"]
        label = f"label=com.docker.compose.project={project}"
        if volumes := _run("docker", "volume", "ls", "--quiet", "--filter", label).split():
            sys.exit(
                f"the stack {project} has volumes: {', '.join(sorted(volumes)[:3])} …; a backup goes into an empty one: "
                "make stack-down, and docker compose down --volumes if nothing in them is needed"
            )
        _build()
    for service in DATABASES:
        _paste(folder / f"{service}.tar.gz", *_once(service, "tar", "xz", "-C", DATA))
    for service, path in FOLDERS.items():
        _paste(folder / f"{service}.tar", *_once(service, "tar", "x", "-C", path))
    home = FOLDERS["store"]
    clone = f"cat > {home}/bundle && git clone --quiet --mirror {home}/bundle {home}/{REPOSITORY} && rm {home}/bundle"
    _paste(folder / "snapshots.bundle", *_once("store", "sh", "-c", clone))
    print(f"restored {manifest['made']}; start it: make stack")  # noqa: T201


@contextmanager
def _secrets_of(folder: Path) -> Iterator[None]:
    """The backup's secrets where there are none, for Compose reads no file without them; kept if all goes well inside."""
    place = _secrets()
    if any(place.glob("*")):
        key = place / "fernet_key"
        if key.is_file() and key.read_bytes() != _fernet_key(folder / "secrets.tar"):
            sys.exit(
                f"{key}: another key than the backup's, by which alone the passwords of Airflow's connections can be read: "
                f"put {place} aside, and restore takes the backup's secrets"
            )
        yield
        return
    unpacked = place.with_name(f".{place.name}-restored")
    shutil.rmtree(unpacked, ignore_errors=True)
    unpacked.mkdir(mode=0o700, parents=True)
    os.environ["EVERGREEN_SECRETS"] = str(unpacked)
    try:
        _paste(folder / "secrets.tar", "tar", "x", "-p", "-C", str(unpacked), compose=False)
        yield
        unpacked.replace(place)
    finally:
        os.environ["EVERGREEN_SECRETS"] = str(place)
        shutil.rmtree(unpacked, ignore_errors=True)


def _fernet_key(archive: Path) -> bytes | None:
    """What the archive of secrets has of it."""
    with tarfile.open(archive) as opened:
        found = [member for member in opened if member.isfile() and member.name.removeprefix("./") == "fernet_key"]
        content = opened.extractfile(found[0]) if found else None
        return content.read() if content else None


def _secrets() -> Path:
    """Absolute: Compose takes `secrets/senders` for the name of a volume."""
    return (PROJECT / (os.environ.get("EVERGREEN_SECRETS") or "secrets")).resolve()


def _build() -> None:
    """The images, for the user who owns the secrets: a volume's files are those of whom its first container runs as."""
    words = ("make", "--no-print-directory", "image", f"EVERGREEN_SECRETS={_secrets()}")
    if subprocess.run(words, cwd=PROJECT, check=False).returncode:
        sys.exit(f"{' '.join(words)}: see above; nothing was restored")


def _once(service: str, command: str, *arguments: str) -> tuple[str, ...]:
    """A container of the service that runs one command alone."""
    return ("run", "--rm", "--no-deps", "--no-TTY", "--interactive", "--entrypoint", command, service, *arguments)


def _in(service: str) -> tuple[str, ...]:
    return ("exec", "--no-TTY", service)


def _compose(*arguments: str) -> str:
    return _run("docker", "compose", *arguments)


def _run(*command: str) -> str:
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: {done.stderr[-2000:]}")
    return done.stdout


def _copy(file: Path, *command: str, compose: bool = True) -> None:
    """What a command prints, in a file."""
    with file.open("wb") as target:
        _stream(command, compose, stdout=target)


def _paste(file: Path, *command: str, compose: bool = True) -> None:
    """A file, to a command."""
    with file.open("rb") as source:
        _stream(command, compose, stdin=source)


def _stream(command: tuple[str, ...], compose: bool, **ends: object) -> None:
    words = ("docker", "compose", *command) if compose else command
    done = subprocess.run(words, cwd=PROJECT, stderr=subprocess.PIPE, check=False, **ends)  # type: ignore[call-overload]
    if done.returncode:
        sys.exit(f"{' '.join(words)}: {done.stderr.decode(errors='replace')[-2000:]}")


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


if __name__ == "__main__":
    what, place = sys.argv[1:]
    {"make": make, "restore": restore}[what](Path(place).absolute())
