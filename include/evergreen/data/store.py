"""The content-addressed store: DVC's cache on this machine, its remote shared by all, and snapshots of what is in them.

Objects lie in DVC 3's layout, `files/md5/<2 hex>/<30 hex>`, in the cache and in the remote alike, so stock `dvc` reads
whatever is stored here; a folder is DVC's listing, a JSON object whose name ends in `.dir`. Remotes are reached through
DVC's own file systems and configuration. What DVC leaves to one process at a time is done here so that many may work on
one cache: an object is written under a name of its own, hashed where it lies, and renamed to its hash; so nothing
half-written is ever visible, and nothing enters under a hash that is not its own.

It collects no garbage by itself: an object stays until `remove` is asked to, by `evergreen prune`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import cached_property, partial
from http import HTTPStatus
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from evergreen import home
from evergreen.data.git_errors import explain
from evergreen.data.repository import (
    ATTEMPTS,
    HTTP,
    MAIN,
    NOTES,
    REMOTE,
    Commit,
    GitError,
    Repository,
    Version,
    pause,
    remote_of,
)
from evergreen.errors import EvergreenError, StoreError, masked
from evergreen.run import Ref, canonical_json, count
from evergreen.settings import Settings

PROTECTED = 0o444
"""The mode of stored files: DVC trusts them without hashing them again."""
NO_SUCH_LINK = frozenset(
    {
        errno.EPERM,
        errno.EACCES,
        errno.ENOTSUP,
        errno.EXDEV,
        errno.ENOTTY,
        errno.ENOSYS,
        errno.EINVAL,
        errno.EMLINK,
    }
)
"""The disk has no such link, or no more of them, or not for us: the next way may do."""
A = TypeVar("A")
B = TypeVar("B")


class Store:
    """Objects by their hash, and snapshots by their tag. Cheap to make: nothing is touched until it is used.

    Every method that reads or writes raises StoreError: for a full or missing disk, an unreachable remote, an object
    that is nowhere to be had intact.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._objects = settings.cache / "files" / "md5"
        self._scratch = settings.cache / "tmp"

    # Objects in

    def put(self, path: Path) -> Ref:
        """Keep a file, or a folder with all its files, in the local cache: by link where the disk can.

        A hard link shares the file's bytes: it turns read-only, may be removed, and must not be altered in place.
        """
        with self._writing(f"keep {path}"):
            if not path.is_dir():
                return self._put_file(path)
            files = sorted(found for found in path.rglob("*") if found.is_file())
            refs = _each(self._put_file, files)
        return self._put_listing(
            {file.relative_to(path).as_posix(): ref for file, ref in zip(files, refs, strict=True)}
        )

    def hash_of(self, folder: Path) -> str:
        """What `put` would name a folder by; nothing is kept."""
        files = sorted(found for found in folder.rglob("*") if found.is_file())
        hashes = dict(zip((file.relative_to(folder).as_posix() for file in files), _each(_md5, files), strict=True))
        return f"{hashlib.md5(_listing_of(hashes), usedforsecurity=False).hexdigest()}.dir"

    def put_bytes(self, content: bytes) -> Ref:
        """Keep `content` in the local cache."""
        return self._put_content(content)

    def put_json(self, content: Any) -> Ref:
        """Keep the canonical JSON of `content` in the local cache."""
        return self._put_content(canonical_json(content).encode())

    def _put_file(self, path: Path) -> Ref:
        with _temporary(self._scratch) as temporary:
            _link(path, temporary)
            return self._keep(temporary)

    def _put_content(self, content: bytes, suffix: str = "") -> Ref:
        with self._writing("keep an object"), _temporary(self._scratch) as temporary:
            temporary.write_bytes(content)
            return self._keep(temporary, suffix)

    def _put_listing(self, files: Mapping[str, Ref]) -> Ref:
        """The folder of `files`: its listing's md5 is its name everywhere."""
        listing = self._put_content(_listing_of({name: ref.hash for name, ref in files.items()}), suffix=".dir")
        return Ref(hash=listing.hash, size=sum(ref.size for ref in files.values()))

    def _keep(self, temporary: Path, suffix: str = "") -> Ref:
        """Name what lies at `temporary` by the hash of its bytes, and have it in the cache under that name."""
        ref = Ref(hash=_md5(temporary) + suffix, size=temporary.stat().st_size)
        self._place(temporary, ref.hash)
        return ref

    def _place(self, temporary: Path, md5: str) -> None:
        # Over an object of that name, if there is one: should its bytes have been altered, now they are right again.
        target = self._object(md5)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.chmod(PROTECTED)
        temporary.replace(target)

    # Objects out

    def path(self, ref: Ref) -> Path:
        """Where a file object lies in the local cache, pulled from the remote if need be. Read-only."""
        assert not ref.is_folder
        self._have([ref.hash])
        return self._object(ref.hash)

    def read_bytes(self, ref: Ref) -> bytes:
        """The bytes of an object, checked against its hash."""
        self._have([ref.hash])
        return self._object(ref.hash).read_bytes()

    def read_json(self, ref: Ref) -> Any:
        """The content of a JSON object, its bytes checked against its hash."""
        return json.loads(self.read_bytes(ref))

    def contents(self, hashes: Collection[str]) -> dict[str, Any]:
        """The content of each of these JSON objects; those that are not here come all at once."""
        self._have(hashes)
        return {md5: self.read_json(Ref(hash=md5, size=0)) for md5 in hashes}

    def checkout(self, ref: Ref, destination: Path) -> None:
        """The file or the folder at `destination`, by link where the disk can: read-only, never to be edited in place.

        Files of the same name are replaced; others in the folder stay.
        """
        files = {"": ref.hash} if not ref.is_folder else self._members(ref)
        self._have(files.values())
        with self._writing(f"check out {destination}"):
            if ref.is_folder:
                destination.mkdir(parents=True, exist_ok=True)
            for name, md5 in files.items():
                target = destination / name
                with _temporary(target.parent) as temporary:
                    _link(self._object(md5), temporary)
                    temporary.chmod(PROTECTED)
                    temporary.replace(target)

    def listing(self, ref: Ref) -> dict[str, Ref]:
        """The files of a folder by their path in it."""
        members = self._members(ref)
        absent = {md5 for md5 in members.values() if not self._object(md5).is_file()}
        sizes = self._patiently("read from", lambda: self._remote.sizes(absent)) if absent else {}
        return {
            name: Ref(hash=md5, size=sizes[md5] if md5 in sizes else self._object(md5).stat().st_size)
            for name, md5 in members.items()
        }

    def _members(self, ref: Ref) -> dict[str, str]:
        """The hashes of a folder's files by their path in it."""
        members = {entry["relpath"]: entry["md5"] for entry in self.read_json(ref)}
        for name in members:
            if name.startswith("/") or ".." in name.split("/"):
                raise StoreError(
                    f"folder {ref.hash} names a file outside itself: {name!r}",
                    fix="do not use this object; find out who wrote it",
                )
        return members

    def _object(self, md5: str) -> Path:
        return self._objects / md5[:2] / md5[2:]

    # The remote

    @staticmethod
    def place(ref: Ref) -> str:
        """Where an object lies within the remote."""
        return f"files/md5/{ref.hash[:2]}/{ref.hash[2:]}"

    def push(self, refs: Iterable[Ref]) -> None:
        """Have the remote hold these objects, the files of folders included. Cheap where it does already."""
        refs = set(refs)
        files = {ref.hash for ref in refs if not ref.is_folder}
        listings = {ref.hash for ref in refs if ref.is_folder}
        files.update(*(self._members(ref).values() for ref in refs if ref.is_folder))
        self._push_in_order(files, listings)

    def _push_in_order(self, files: set[str], listings: set[str]) -> None:
        """Files first: a listing in the remote is a promise that its files are there."""
        for hashes in filter(None, (files, listings)):
            self._patiently("write to", partial(self._push, hashes))

    def _push(self, hashes: Collection[str]) -> None:
        missing = self._remote.missing(hashes)
        if lost := {md5 for md5 in missing if not self._object(md5).is_file()}:
            raise self._nowhere(lost)
        self._remote.upload({md5: self._object(md5) for md5 in missing})

    def _have(self, hashes: Iterable[str]) -> None:
        """Have these objects in the cache, each read and hashed before anybody uses it; pull what is absent or altered.

        Raises StoreError for an object that neither the cache nor the remote has intact.
        """
        wanted = sorted(set(hashes))
        broken = {md5 for md5, intact in zip(wanted, _each(self._is_intact, wanted), strict=True) if not intact}
        if lost := self._pull(broken):
            raise self._nowhere(lost)

    def _pull(self, hashes: set[str]) -> set[str]:
        """Pull these objects into the cache; those that the remote lacks or holds altered."""
        absent, altered = self._pull_once(hashes)
        if altered:  # Perhaps only on the way here.
            gone, altered = self._pull_once(altered)
            absent |= gone
        if altered:
            # Worthless to everybody under this name, and in the way of the next push of the true bytes.
            self._patiently("remove altered objects from", partial(self._remote.remove, altered))
        return absent | altered

    def _pull_once(self, hashes: set[str]) -> tuple[set[str], set[str]]:
        """Pull these objects into the cache; those that the remote lacks, and those whose bytes are not theirs."""
        if not hashes:
            return set(), set()
        with self._writing("pull objects"):
            self._scratch.mkdir(parents=True, exist_ok=True)
            with TemporaryDirectory(dir=self._scratch) as name:
                folder = Path(name)
                absent = self._patiently("read from", lambda: self._remote.download(hashes, folder))
                altered = set()
                for md5 in hashes - absent:
                    if _md5(folder / md5) == md5.removesuffix(".dir"):
                        self._place(folder / md5, md5)
                    else:
                        altered.add(md5)
        return absent, altered

    def verify(self, ref: Ref) -> bool:
        """Whether the object, every file of a folder, is here and in the remote, after mending what can be mended.

        The local bytes are hashed again; altered ones are deleted and pulled anew, and what the remote lacks is pushed
        from here. False when the object is not to be had intact: whoever made it must make it again.
        """
        if not self._mend({ref.hash}) or (ref.is_folder and not self._mend(set(self._members(ref).values()))):
            return False
        self.push([ref])
        return True

    def _mend(self, hashes: set[str]) -> bool:
        wanted = sorted(hashes)
        broken = {md5 for md5, intact in zip(wanted, _each(self._is_intact, wanted), strict=True) if not intact}
        for md5 in broken:
            self._object(md5).unlink(missing_ok=True)
        return not self._pull(broken)

    def _is_intact(self, md5: str) -> bool:
        path = self._object(md5)
        return path.is_file() and _known_md5(path) == md5.removesuffix(".dir")

    def holds(self, refs: Iterable[Ref]) -> bool:
        """Whether these files are here or in the remote; their bytes are not looked at."""
        absent = {ref.hash for ref in refs if not self._object(ref.hash).is_file()}
        return not absent or not self._patiently("read from", lambda: self._remote.missing(absent))

    def missing(self, hashes: Collection[str]) -> set[str]:
        """Return those of these objects that the remote lacks; their bytes are not looked at."""
        return self._patiently("read from", lambda: self._remote.missing(hashes))

    # Out for good

    def bytes_of(self, hashes: Collection[str]) -> dict[str, int]:
        """The bytes of each of these objects that is here or in the remote; a folder's are those of its listing."""
        there = set(hashes) - self._patiently("read from", lambda: self._remote.missing(hashes)) if hashes else set()
        here = {md5: self._object(md5).stat().st_size for md5 in hashes if self._object(md5).is_file()}
        return self._patiently("read from", lambda: self._remote.sizes(there - here.keys())) | here

    def remove(self, hashes: Collection[str]) -> None:
        """Remove these objects from the remote and from this machine's cache; those that are not there are not missed.

        A folder is removed by its listing. Whatever else names others must go first, too: what is there is a promise.
        """
        for some in ({md5 for md5 in hashes if md5.endswith(".dir")}, set(hashes)):
            self._patiently("remove objects from", partial(self._remote.remove, some))
            with self._writing("remove objects"):
                for md5 in some:
                    self._object(md5).unlink(missing_ok=True)

    @cached_property
    def _remote(self) -> _Remote:
        home.adopt(self._settings)
        try:
            return _Remote(_absolute(self._settings.data_remote))
        except Exception as error:
            raise StoreError(
                f"the remote {self._settings.data_remote} cannot be used: {error}",
                fix="set EVERGREEN_DATA_REMOTE to a folder or to a URL that the installed DVC knows",
            ) from error

    def _patiently(self, doing: str, act: Callable[[], B]) -> B:
        """`act()`, tried again after a pause when the remote fails."""
        for attempt in range(ATTEMPTS):
            if attempt:
                pause(attempt)
            try:
                return act()
            except EvergreenError:
                raise
            except Exception as error:  # noqa: BLE001 - each kind of remote has errors of its own
                last = error
        raise StoreError(
            f"cannot {doing} the remote {self._settings.data_remote}: {last}",
            fix="see that it is there, reachable, writable and not full (EVERGREEN_DATA_REMOTE), then run again",
        ) from last

    def _nowhere(self, hashes: Collection[str]) -> StoreError:
        examples = ", ".join(sorted(hashes)[:5])
        return StoreError(
            f"{count(len(hashes), 'object')} to be had intact neither from the cache {self._settings.cache} "
            f"nor from the remote {self._settings.data_remote}: {examples}",
            fix="run the pack again with --force: the stage that made it makes it again",
        )

    @contextmanager
    def _writing(self, doing: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StoreError(
                f"cannot {doing}: {error}",
                fix="make room on that disk or mend the path, then run again: nothing half-written was left",
            ) from error

    # Snapshots

    def commit(self, dataset: str, files: Mapping[str, Ref], *, tag_time: datetime, message: str) -> Commit:
        """Name `files`, stored already, as a version of `dataset`: DVC tree, commit on the dataset's branch, tag.

        The branch and the tag `<dataset>/<tag_time>-<first 8 hex of the tree hash>` appear together, after all objects
        are in the remote. What the branch's tip holds, or this very tag, is not committed again.
        """
        if dataset == MAIN:
            raise StoreError(
                f"a dataset cannot be named {MAIN!r}: that branch of the repository holds its README",
                fix="give the pack another name",
            )
        tree = self._put_listing(files)
        self._push_in_order({ref.hash for ref in files.values()}, {tree.hash})
        version = Version(dataset=dataset, tree=tree, files=len(files), time=tag_time, message=message)
        with self._repository(f"commit {dataset}") as repository:
            repository.make()
            home.point_to_store(self._settings)
            return repository.commit(version, self._scratch)

    def tagged(self, tag: str) -> str:
        """Return the git revision of a snapshot's tag; empty where the repository has no such tag."""
        with self._repository(f"look for the tag {tag}") as repository:
            return repository.tagged(tag, self._scratch)

    def note(self, name: str, text: str) -> None:
        """Add a line to the notes called `name`, unless it is the last already: a commit without files on a branch.

        Nothing but a forced push can take a note away, and a repository's server can forbid those.
        """
        with self._repository(f"note {text}") as repository:
            repository.make()
            repository.note(f"{NOTES}{name}", text, self._scratch)

    def notes(self, name: str) -> list[str]:
        """The lines of the notes called `name`, oldest first; none where there is no such branch or repository."""
        with self._repository(f"read the notes on {name}") as repository:
            return repository.notes(f"{NOTES}{name}", self._scratch)

    def noted(self) -> list[str]:
        """Of what there are notes, by name."""
        with self._repository("list the notes") as repository:
            return repository.noted(NOTES, self._scratch)

    def open_repository(self) -> None:
        """Have a repository that says what it holds: one is made where a path is free, an empty server's is filled."""
        with self._repository("open it") as repository:
            repository.make()
            home.point_to_store(self._settings)
            repository.introduce(self._scratch)

    @contextmanager
    def _repository(self, doing: str) -> Iterator[Repository]:
        """The repository of snapshots; what git says of it is a StoreError."""
        home.adopt(self._settings)
        repository = Repository(_absolute(self._settings.data_repository), _absolute(self._settings.data_remote))
        with self._writing(doing):
            self._scratch.mkdir(parents=True, exist_ok=True)
            try:
                yield repository
            except GitError as error:
                explained = explain(str(error), _absolute(self._settings.data_repository))
                raise StoreError(
                    f"cannot {doing}: the repository {masked(self._settings.data_repository)}: {masked(explained.what)}",
                    fix=masked(explained.fix),
                ) from error


class _Remote:
    """The DVC remote through DVC's own file systems: layout, URLs, credentials and plugins are those of stock DVC."""

    def __init__(self, url: str) -> None:
        from dvc.config import Config
        from dvc.fs import get_cloud_fs
        from dvc_data.hashfile.db import get_odb

        make, options, root = get_cloud_fs(Config(config={"remote": {REMOTE: remote_of(url)}}), name=REMOTE)
        self._fs = make(**options)
        self._db = get_odb(self._fs, self._fs.join(root, "files", "md5"), hash_name="md5", **options)

    def missing(self, hashes: Collection[str]) -> set[str]:
        """Which of these the remote lacks: asked of the remote itself, never of a local index."""
        self._fs.fs.invalidate_cache()
        return set(hashes) - set(self._db.oids_exist(list(hashes)))

    def sizes(self, hashes: Collection[str]) -> dict[str, int]:
        """Bytes of each."""
        wanted = sorted(hashes)
        infos = _each(lambda md5: self._fs.info(self._db.oid_to_path(md5)), wanted, jobs=self._fs.jobs)
        return {md5: int(info["size"]) for md5, info in zip(wanted, infos, strict=True)}

    def upload(self, paths: Mapping[str, Path]) -> None:
        """Put the file of each hash into the remote; each appears whole or not at all."""
        upload = self._upload_by_rename if self._fs.protocol == "local" else self._upload
        _each(lambda item: upload(*item), paths.items(), jobs=self._fs.jobs)

    def _upload(self, md5: str, path: Path) -> None:
        target = self._db.oid_to_path(md5)
        self._fs.makedirs(self._fs.parent(target))
        self._fs.put_file(str(path), target)

    def _upload_by_rename(self, md5: str, path: Path) -> None:
        """DVC's own way into a folder reflinks onto the final name, which truncates what another process just put."""
        from dvc_objects.fs.utils import copyfile  # A reflink where the disk can, else a copy; never a hard link.

        target = Path(self._db.oid_to_path(md5))
        with _temporary(target.parent) as temporary:
            copyfile(str(path), str(temporary))
            temporary.chmod(PROTECTED)
            temporary.replace(target)

    def download(self, hashes: Collection[str], folder: Path) -> set[str]:
        """Get the objects into `folder`, each under its hash; those that the remote lacks."""

        def download(md5: str) -> bool:
            try:
                self._fs.get_file(self._db.oid_to_path(md5), str(folder / md5))
            except FileNotFoundError:
                return False
            return True

        wanted = sorted(hashes)
        there = _each(download, wanted, jobs=self._fs.jobs)
        return {md5 for md5, found in zip(wanted, there, strict=True) if not found}

    def remove(self, hashes: Collection[str]) -> None:
        """Remove the objects."""
        delete = self._delete_over_http if self._fs.protocol in HTTP else self._db.delete
        for md5 in hashes:
            with suppress(FileNotFoundError):
                delete(md5)

    def _delete_over_http(self, md5: str) -> None:
        """What DVC does not do: to it an HTTP remote only grows."""
        from fsspec.asyn import sync

        web = self._fs.fs

        async def delete() -> None:
            session = await web.set_session()
            async with session.delete(self._db.oid_to_path(md5)) as answer:
                if answer.status != HTTPStatus.NOT_FOUND:
                    answer.raise_for_status()

        sync(web.loop, delete)


def _listing_of(hashes: Mapping[str, str]) -> bytes:
    """DVC's listing of a folder, to the byte, of the hashes of its files by their path in it."""
    return json.dumps([{"md5": hashes[name], "relpath": name} for name in sorted(hashes)]).encode()


def _absolute(place: str) -> str:
    """A path made absolute, for it is written down and read from other folders; a URL as it is."""
    place = place.removeprefix("file://")
    is_url = "://" in place or ":" in place.split("/", 1)[0]
    return place if is_url else str(Path(place).absolute())


def _link(source: Path, target: Path) -> None:
    """`source` at `target` by the cheapest way that the disk has: a reflink, a hard link, a copy."""
    from dvc_objects.fs import system

    for way in (system.reflink, system.hardlink):
        try:
            way(str(source), str(target))
        except OSError as error:
            if error.errno not in NO_SUCH_LINK:
                raise
        else:
            return
    shutil.copyfile(source, target)


@contextmanager
def _temporary(folder: Path) -> Iterator[Path]:
    """A name of its own in `folder`; what is still there at the end is removed."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f".{secrets.token_hex(8)}.tmp"
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


_MD5: dict[tuple[int, int, int, int], str] = {}
"""Hashes of files that this process has read: (device, inode, bytes, time of the last change in ns) → MD5."""


def _known_md5(path: Path) -> str:
    """The file's MD5; read again only where the file is not as this process last read it."""
    stat = path.stat()
    key = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)
    if key not in _MD5:
        _MD5[key] = _md5(path)
    return _MD5[key]


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _each(act: Callable[[A], B], items: Iterable[A], jobs: int | None = None) -> list[B]:
    """`act` of each item, in their order, several at a time; the first failure is raised."""
    items = list(items)
    if len(items) < 2:
        return [act(item) for item in items]
    with ThreadPoolExecutor(min(jobs or os.cpu_count() or 1, len(items))) as pool:
        return list(pool.map(act, items))
