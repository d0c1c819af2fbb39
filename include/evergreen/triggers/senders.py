"""The senders file: who may post alerts, and by which secrets. It is read again when it changes; no restart is needed.

evergreen:                          # the name that stands on each of the sender's alerts
  signing: [whsec_…, whsec_…]       # Standard Webhooks secrets, all of them active
alertmanager:
  bearer: ["… 32 characters or more …"]
  per_minute: 18000                 # how many requests are taken of it
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import stat
from base64 import b64encode
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from evergreen.errors import SendersError, nearest
from evergreen.settings import Settings
from evergreen.triggers.signatures import PREFIX, key_of
from evergreen.yaml_core import CoreLoader, dump

OWN = "evergreen"
"""The sender that `evergreen alert` signs as."""

MONITOR = "monitor"
"""The sender that the monitor signs as."""

RESERVED = ("data",)
"""Senders within, that do not post: nobody outside may bear their names."""

PER_MINUTE = 18_000

NAME = re.compile(r"[a-z][a-z0-9_-]{0,47}")
BEARER = re.compile(r"[A-Za-z0-9._~+/=-]{32,512}")

HEADER = """\
# Who may post alerts, and by which secrets; `evergreen sender` writes it (comments of yours would be lost), and whoever
# may read it may post: it stays readable by its owner only. All secrets listed are active, the newest first.
"""

Kind = Literal["signing", "bearer"]


@dataclass(frozen=True)
class Sender:
    """One who may post alerts."""

    name: str
    signing: tuple[str, ...] = ()
    bearer: tuple[str, ...] = ()
    per_minute: int = PER_MINUTE

    def __repr__(self) -> str:
        return f"Sender({self.name!r})"  # secrets stay out of logs and tracebacks


class Senders:
    """The senders of a file as it is now: looked at at every use, read when it is another."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known: tuple[object, dict[str, Sender]] | None = None

    def now(self) -> Mapping[str, Sender]:
        """The senders by name. Raises SendersError where the file cannot be used, whatever was known before."""
        try:
            state = _identity(self.path.stat())
        except OSError:
            state = None
        if state is None or self._known is None or self._known[0] != state:
            self._known = read(self.path)
        return self._known[1]


def read(path: Path) -> tuple[object, dict[str, Sender]]:
    """What tells this state of the file from another, and the senders in it. Raises SendersError."""
    try:
        with path.open("rb") as file:
            state = os.fstat(file.fileno())
            text = file.read()
    except FileNotFoundError:
        raise SendersError(f"{path} does not exist", fix="make a sender: evergreen sender NAME --signing") from None
    except OSError as error:
        raise SendersError(f"{path} cannot be read: {error.strerror}", fix="make it readable by its owner") from error
    if state.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise SendersError(
            f"{path} can be used by others: its mode is {stat.S_IMODE(state.st_mode):o}",
            fix=f"chmod 600 {path}, and make new secrets if anybody may have read these",
        )
    return _identity(state), _senders(path, _mapping(path, text))


def add(path: Path, name: str, kind: Kind, *, rotate: bool = False) -> str:
    """Make a secret for the sender `name`, and the sender and the file where they are new; → the secret.

    A sender that has a secret of this kind is refused unless `rotate`: then the newest of those stays active beside
    the new one, until the next rotation, and older ones end. Raises SendersError.
    """
    with _changing(path) as senders:
        if (sender := senders.get(name, Sender(name))) and getattr(sender, kind) and not rotate:
            raise SendersError(f"{path}: {name} has a {kind} secret already", fix="add --rotate to give it another")
        return _give(senders, sender, kind)


def ensure(settings: Settings) -> None:
    """Make the senders file with those that this home itself posts as, where they are not there. Raises SendersError."""
    with _changing(settings.senders) as senders:
        for name in (OWN, MONITOR):
            if not senders.get(name, Sender(name)).signing:
                _give(senders, senders.get(name, Sender(name)), "signing")


def accept(path: Path, name: str, kind: Kind, secret: str) -> None:
    """Let the sender `name` in by a secret that was made elsewhere, beside the newest it had. Raises SendersError."""
    with _changing(path) as senders:
        sender = senders.get(name, Sender(name))
        if secret not in getattr(sender, kind):
            senders[name] = Sender(**{**vars(sender), kind: (secret, *getattr(sender, kind)[:1])})


def own_secret(settings: Settings, name: str = OWN) -> str:
    """The secret that this home signs with as `name`: the newest. Raises SendersError."""
    _, senders = read(settings.senders)
    if name not in senders or not senders[name].signing:
        raise SendersError(
            f"{settings.senders}: there is no sender {name!r} with a signing secret",
            fix=f"make it: evergreen sender {name} --signing",
        )
    return senders[name].signing[0]


def _give(senders: dict[str, Sender], sender: Sender, kind: Kind) -> str:
    """Put a new secret first, and keep one before it."""
    secret = PREFIX + b64encode(secrets.token_bytes(32)).decode() if kind == "signing" else secrets.token_urlsafe(32)
    senders[sender.name] = Sender(**{**vars(sender), kind: (secret, *getattr(sender, kind)[:1])})
    return secret


@contextmanager
def _changing(path: Path) -> Iterator[dict[str, Sender]]:
    """The senders, to be changed in the block; written whole when it ends, by one process at a time."""
    folder = -1
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = os.open(path.parent, os.O_RDONLY)
        fcntl.flock(folder, fcntl.LOCK_EX)
        senders = read(path)[1] if path.exists() else {}
        before = dict(senders)
        yield senders
        if senders != before:
            _senders(path, content := {name: _plain(sender) for name, sender in senders.items()})
            _write(path, HEADER + dump(content))
            os.fsync(folder)
    except OSError as error:
        raise SendersError(
            f"{path} cannot be written: {error.strerror}", fix="make room, or the folder writable"
        ) from error
    finally:
        if folder != -1:
            os.close(folder)


def _write(path: Path, text: str) -> None:
    """Write the file whole or not at all, readable by its owner from its first byte on."""
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:  # noqa: PTH123
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _plain(sender: Sender) -> dict[str, Any]:
    content: dict[str, Any] = {kind: list(own) for kind in ("signing", "bearer") if (own := getattr(sender, kind))}
    return content if sender.per_minute == PER_MINUTE else {**content, "per_minute": sender.per_minute}


def _identity(state: os.stat_result) -> object:
    return (state.st_dev, state.st_ino, state.st_mtime_ns, state.st_ctime_ns, state.st_size)


def _mapping(path: Path, text: bytes) -> dict[str, Any]:
    """The file's YAML. What it says of a mistake is the place only: the line may hold a secret."""
    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=CoreLoader)):
            raise SendersError(f"{path}: YAML aliases (*) are refused", fix="write the value out")
        node = yaml.compose(text, Loader=CoreLoader)
        content = yaml.load(text, Loader=CoreLoader)  # noqa: S506  it is a safe one
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        raise SendersError(f"{path}:{mark.line + 1 if mark else 1}: not YAML", fix="mend the line") from None
    if content is None:
        return {}
    if not (isinstance(content, dict) and isinstance(node, yaml.MappingNode)):
        raise SendersError(f"{path}: holds no mapping", fix="make a sender: evergreen sender NAME --signing")
    names = [key.value for key, _ in node.value]
    for name in content:
        if names.count(name) > 1:
            raise SendersError(f"{path}: {str(name)[:60]} is there twice", fix="make one of the two")
    return content


def _senders(path: Path, content: Mapping[Any, Any]) -> dict[str, Sender]:
    """The senders that the file's mapping says, each secret checked."""
    senders: dict[str, Sender] = {}
    owners: dict[str, str] = {}
    for name, parts in content.items():
        if not (isinstance(name, str) and NAME.fullmatch(name)) or name in RESERVED:
            raise SendersError(
                f"{path}: {str(name)[:60]!r} cannot name a sender",
                fix=f"use lower-case letters, digits, - and _, a letter first, and not {' nor '.join(RESERVED)}",
            )
        senders[name] = sender = _sender(path, name, parts)
        for secret in (*sender.signing, *sender.bearer):
            if (owner := owners.setdefault(secret, name)) != name:
                raise SendersError(
                    f"{path}: {owner} and {name} have a secret in common, so that nobody can tell them apart",
                    fix=f"give one another: evergreen sender {name} --rotate …",
                )
    return senders


def _sender(path: Path, name: str, parts: Any) -> Sender:
    parts = {} if parts is None else parts
    if not isinstance(parts, dict):
        raise SendersError(f"{path}: {name}: is no mapping", fix="write signing: […] or bearer: […] under the name")
    known = ("signing", "bearer", "per_minute")
    for key in parts:
        if key not in known:
            raise SendersError(f"{path}: {name}.{str(key)[:60]}: unknown key", fix=nearest(str(key), known))
    own: dict[str, tuple[str, ...]] = {}
    for kind in ("signing", "bearer"):
        listed = parts.get(kind) or []
        if not isinstance(listed, list):
            raise SendersError(f"{path}: {name}.{kind}: is no list", fix=f"write {kind}: [SECRET, …]")
        for index, secret in enumerate(listed):
            if why := _wrong(kind, secret):
                raise SendersError(
                    f"{path}: {name}.{kind}.{index}: {why}", fix=f"make one: evergreen sender {name} --{kind} --rotate"
                )
        own[kind] = tuple(listed)
    per_minute = parts.get("per_minute", PER_MINUTE)
    if type(per_minute) is not int or per_minute < 1:
        raise SendersError(f"{path}: {name}.per_minute: is no number of requests", fix="write a whole number from 1")
    return Sender(name, own["signing"], own["bearer"], per_minute)


def _wrong(kind: str, secret: Any) -> str | None:
    """What keeps this from being a secret of this kind, without the secret."""
    if not isinstance(secret, str):
        return "is no text (quote it if it is all digits)"
    if kind == "signing":
        try:
            key_of(secret)
        except ValueError as error:
            return str(error)
        return None
    if secret.startswith(PREFIX):
        return f"is a signing secret (it begins with {PREFIX}), which is never sent as a token"
    return None if BEARER.fullmatch(secret) else "is not 32 or more letters, digits or ._~+/=-"
