"""The store: what goes in comes out again, or says why not."""

import errno
import hashlib
import json
import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from tests.remotes import Remote, object_of

from evergreen.data.store import Store
from evergreen.errors import StoreError
from evergreen.run import Ref
from evergreen.settings import Settings

HELLO = Ref(hash="5d41402abc4b2a76b9719d911017c592", size=5)
APRIL = datetime(2013, 4, 1, tzinfo=UTC)
MAY = datetime(2013, 5, 1, tzinfo=UTC)


def store_at(home: Path, **places: str) -> Store:
    return Store(
        Settings.from_env(
            {f"EVERGREEN_{name.upper()}": value for name, value in places.items()} | {"EVERGREEN_HOME": str(home)}
        )
    )


@pytest.fixture
def store(tmp_path: Path, remote: Remote) -> Store:
    return store_at(tmp_path / "home", data_remote=remote.url)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "home" / "cache"


every_remote = pytest.mark.parametrize("remote", ["folder", "http", "s3"], indirect=True)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "home" / "data"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """`a.txt` and `sub/b.txt`."""
    (tmp_path / "folder" / "sub").mkdir(parents=True)
    (tmp_path / "folder" / "a.txt").write_text("hello")
    (tmp_path / "folder" / "sub" / "b.txt").write_text("world")
    return tmp_path / "folder"


def files_under(place: Path) -> list[str]:
    return sorted(str(path.relative_to(place)) for path in place.rglob("*") if path.is_file())


def alter(path: Path) -> None:
    """Turn the last bit of the file's last byte."""
    content = path.read_bytes()
    path.chmod(0o644)
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    path.chmod(0o444)


def lose(place: Path) -> None:
    """All objects at once, as if the disk had been changed."""
    place.rename(place.with_name(f"{place.name}-lost"))


def git(repository: Path, *arguments: str) -> str:
    return subprocess.run(
        ["git", "-C", str(repository), *arguments], check=True, capture_output=True, text=True
    ).stdout.strip()


# Objects


def test_making_a_store_touches_nothing(store: Store, tmp_path: Path) -> None:
    """A store is cheap to make: no folder appears before it is used."""
    assert list(tmp_path.iterdir()) == []


def test_importing_the_store_does_not_import_dvc() -> None:
    """DAG files that name the store parse fast."""
    script = "import sys, evergreen.data.store; print([name for name in sys.modules if name.startswith('dvc')])"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_file_lies_under_its_md5(store: Store, cache: Path, folder: Path) -> None:
    """A file is kept where DVC 3 looks for it, read-only."""
    assert store.put(folder / "a.txt") == HELLO
    kept = cache / "files" / "md5" / "5d" / "41402abc4b2a76b9719d911017c592"
    assert (kept.read_text(), kept.stat().st_mode & 0o777) == ("hello", 0o444)


def test_the_callers_file_may_go(store: Store, folder: Path) -> None:
    """An object outlives the file it was made from."""
    ref = store.put(folder / "a.txt")
    (folder / "a.txt").unlink()
    assert store.path(ref).read_text() == "hello"


def test_a_symbolic_link_is_kept_as_the_file_it_names(store: Store, folder: Path) -> None:
    """What is stored is bytes: a link's target may go too."""
    (folder / "link").symlink_to(folder / "a.txt")
    ref = store.put(folder / "link")
    (folder / "a.txt").unlink()
    assert store.path(ref).read_text() == "hello"


def test_a_file_of_another_disk_is_copied(store: Store, tmp_path: Path) -> None:
    """Where no link is possible the bytes are copied."""
    if not Path("/dev/shm").is_dir():
        pytest.skip("this machine has no /dev/shm to be another disk")
    other = Path("/dev/shm") / f"evergreen-{os.getpid()}"
    other.write_bytes(b"hello")
    try:
        assert store.put(other) == HELLO
    finally:
        other.unlink()
    assert store.read_bytes(HELLO) == b"hello"


def test_a_folder_has_the_hash_that_dvc_gives_it(store: Store, folder: Path) -> None:
    """The literal is `dvc add`'s for the same folder."""
    assert store.put(folder) == Ref(hash="80dd490eacb686e61199254d9e0cce52.dir", size=10)


def test_a_folder_lists_its_files(store: Store, folder: Path) -> None:
    """A folder's files are known by path, hash and size."""
    listing = store.listing(store.put(folder))
    assert listing == {"a.txt": HELLO, "sub/b.txt": Ref(hash="7d793037a0760186574b0282f2f435e7", size=5)}


@every_remote
def test_a_folder_lists_its_files_from_afar(store: Store, folder: Path, cache: Path) -> None:
    """Sizes are known without pulling the files."""
    ref = store.put(folder)
    store.push([ref])
    lose(cache)
    assert {name: file.size for name, file in store.listing(ref).items()} == {"a.txt": 5, "sub/b.txt": 5}
    assert files_under(cache) == [f"files/md5/{ref.hash[:2]}/{ref.hash[2:]}"]


def test_putting_again_changes_nothing(store: Store, folder: Path, cache: Path) -> None:
    """The same folder is the same objects, and nothing else is left in the cache."""
    first = store.put(folder)
    before = files_under(cache)
    assert (store.put(folder), files_under(cache), len(before)) == (first, before, 3)


def test_putting_again_mends_an_altered_object(store: Store, cache: Path) -> None:
    """Bytes that are made again replace those that were altered."""
    store.put_bytes(b"hello")
    alter(object_of(cache, HELLO))
    store.put_bytes(b"hello")
    assert object_of(cache, HELLO).read_bytes() == b"hello"


def test_json_is_canonical(store: Store) -> None:
    """The same content is the same object, in whatever order its keys were written."""
    ref = store.put_json({"b": [1, 2.5, None], "a": "é"})
    assert ref == store.put_json({"a": "é", "b": [1, 2.5, None]})
    assert store.read_json(ref) == {"a": "é", "b": [1, 2.5, None]}


def test_what_is_not_there_cannot_be_put(store: Store, tmp_path: Path) -> None:
    """The error names the path."""
    with pytest.raises(StoreError, match=r"nothing\.parquet"):
        store.put(tmp_path / "nothing.parquet")


# The remote


@every_remote
def test_a_pushed_object_survives_the_cache(store: Store, cache: Path) -> None:
    """Put and pushed on one machine, read on another."""
    ref = store.put_bytes(b"hello")
    store.push([ref])
    lose(cache)
    assert store.read_bytes(ref) == b"hello"


@every_remote
def test_a_pushed_folder_survives_the_cache(store: Store, folder: Path, cache: Path, tmp_path: Path) -> None:
    """Pushing a folder pushes its files."""
    ref = store.put(folder)
    store.push([ref])
    lose(cache)
    store.checkout(ref, tmp_path / "out")
    assert files_under(tmp_path / "out") == ["a.txt", "sub/b.txt"]
    assert (tmp_path / "out" / "sub" / "b.txt").read_text() == "world"


@every_remote
def test_pushing_again_writes_nothing(store: Store, remote: Remote) -> None:
    """An object that the remote holds is left alone."""
    ref = store.put_bytes(b"hello")
    store.push([ref])
    remote.write(ref, b"as it was")
    store.push([ref])
    assert remote.read(ref) == b"as it was"


def test_the_remote_shares_no_bytes_with_the_cache(store: Store, cache: Path, remote: Remote) -> None:
    """An altered cache leaves the remote whole."""
    store.push([store.put_bytes(b"hello")])
    alter(object_of(cache, HELLO))
    assert remote.read(HELLO) == b"hello"


@every_remote
def test_pushing_needs_no_cache_for_what_the_remote_holds(store: Store, cache: Path) -> None:
    """A later stage may push again what an earlier one stored from another machine."""
    ref = store.put_bytes(b"hello")
    store.push([ref])
    lose(cache)
    store.push([ref])
    assert not cache.exists()


def test_an_object_that_is_nowhere_is_named(store: Store) -> None:
    """Neither pushing nor reading invents an object: the error names it, both places and the fix."""
    for use in (store.path, store.read_bytes, lambda ref: store.push([ref])):
        with pytest.raises(
            StoreError, match=rf"cache .*/cache nor from the remote .*/remote: {HELLO.hash}\n  fix: .*--force"
        ):
            use(HELLO)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """All attempts, without the seconds between them."""
    monkeypatch.setattr("evergreen.data.repository.PAUSE_S", 0.001)


@pytest.fixture
def unreachable(tmp_path: Path, impatient: None) -> str:
    """A place under a file: not to be made, read or written by anybody, root included."""
    (tmp_path / "file").write_text("no folder")
    return str(tmp_path / "file" / "remote")


def test_an_unreachable_remote_ends_in_an_error_soon(tmp_path: Path) -> None:
    """Pushing gives up after bounded retries, within seconds, and names the remote and the setting."""
    (tmp_path / "file").write_text("no folder")
    unreachable = str(tmp_path / "file" / "remote")
    store = store_at(tmp_path / "home", data_remote=unreachable)
    ref = store.put_bytes(b"hello")
    begun = time.monotonic()
    with pytest.raises(StoreError, match=f"cannot write to the remote {unreachable}.*\n  fix: .*EVERGREEN_DATA_REMOTE"):
        store.push([ref])
    assert time.monotonic() - begun < 10


def test_a_remote_of_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    """A URL that DVC does not know is a setting to be mended."""
    store = store_at(tmp_path / "home", data_remote="gopher://hole/data")
    with pytest.raises(StoreError, match=r"gopher://hole/data cannot be used(.|\n)*EVERGREEN_DATA_REMOTE"):
        store.push([store.put_bytes(b"hello")])


def test_a_commit_waits_for_its_objects(tmp_path: Path, unreachable: str) -> None:
    """Where the objects cannot be pushed no branch and no tag appears."""
    store = store_at(tmp_path / "home", data_remote=unreachable)
    with pytest.raises(StoreError):
        store.commit("flights", {"a": store.put_bytes(b"hello")}, tag_time=APRIL, message="as of April")
    assert not (tmp_path / "home" / "data").exists()


@every_remote
def test_a_folder_goes_from_one_machine_to_another(tmp_path: Path, folder: Path, remote: Remote) -> None:
    """Pushed here, it is listed, pulled and verified there."""
    here = store_at(tmp_path / "here", data_remote=remote.url)
    ref = here.put(folder)
    here.push([ref])
    there = store_at(tmp_path / "there", data_remote=remote.url)
    assert {name: file.size for name, file in there.listing(ref).items()} == {"a.txt": 5, "sub/b.txt": 5}
    there.checkout(ref, tmp_path / "out")
    assert (tmp_path / "out" / "a.txt").read_text() == "hello"
    assert there.verify(ref)


@pytest.mark.parametrize("remote", ["http", "s3"], indirect=True)
def test_a_remote_that_fails_is_asked_again(store: Store, cache: Path, remote: Remote, impatient: None) -> None:
    """A passing fault of the remote is no fault of the run."""
    store.push([store.put_bytes(b"hello")])
    lose(cache)
    remote.fail(HELLO)
    assert store.read_bytes(HELLO) == b"hello"


@pytest.mark.parametrize("remote", ["http", "s3"], indirect=True)
def test_a_remote_that_does_not_know_us_is_an_error(
    tmp_path: Path, remote: Remote, impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong credentials end in an error that names the remote and the setting, and no secret."""
    store = store_at(tmp_path / "home", data_remote=remote.url)
    with (
        remote.locked(),
        pytest.raises(StoreError, match=rf"the remote {remote.url}.*\n  fix: .*EVERGREEN_DATA_REMOTE") as caught,
    ):
        store.push([store.put_bytes(b"hello")])
    assert "not so secret" not in str(caught.value)


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/store", "s3://evergreen/store"])
def test_a_remote_where_nobody_listens_is_an_error(
    tmp_path: Path, url: str, impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pushing and reading give up, and neither takes an absent server for an absent object."""
    for name, value in {"ENDPOINT_URL": "http://127.0.0.1:9", "MAX_ATTEMPTS": "1", "DEFAULT_REGION": "a"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY"):
        monkeypatch.setenv(f"AWS_{name}", "x")
    monkeypatch.setattr("s3fs.S3FileSystem.retries", 1)
    monkeypatch.setattr("evergreen.data.store.ATTEMPTS", 2)
    store = store_at(tmp_path / "home", data_remote=url)
    with pytest.raises(StoreError, match=f"cannot write to the remote {url}"):
        store.push([store.put_bytes(b"hello")])
    lose(tmp_path / "home" / "cache")
    with pytest.raises(StoreError, match=f"cannot read from the remote {url}"):
        store.read_bytes(HELLO)


# Bytes that were altered


def test_a_whole_object_is_verified(store: Store, folder: Path) -> None:
    """Nothing is wrong with what was stored and pushed."""
    ref = store.put(folder)
    store.push([ref])
    assert store.verify(ref)


@every_remote
def test_an_altered_cache_is_mended_from_the_remote(store: Store, cache: Path) -> None:
    """One bit turned in the cache is noticed, and the true bytes come back."""
    ref = store.put_bytes(b"hello")
    store.push([ref])
    alter(object_of(cache, ref))
    assert store.verify(ref)
    assert object_of(cache, ref).read_bytes() == b"hello"


@pytest.mark.parametrize("part", ["a file", "the listing"])
def test_an_altered_folder_is_mended_from_the_remote(store: Store, folder: Path, cache: Path, part: str) -> None:
    """Every file of a folder is hashed again, and so is the listing itself."""
    ref = store.put(folder)
    store.push([ref])
    victim = object_of(cache, ref if part == "the listing" else HELLO)
    whole = victim.read_bytes()
    alter(victim)
    assert store.verify(ref)
    assert victim.read_bytes() == whole


@every_remote
def test_an_object_altered_everywhere_is_not_verified(store: Store, cache: Path, remote: Remote) -> None:
    """What is to be had intact nowhere is said to be lost, and its altered bytes are out of the way."""
    ref = store.put_bytes(b"hello")
    store.push([ref])
    alter(object_of(cache, ref))
    remote.alter(ref)
    assert not store.verify(ref)
    assert (object_of(cache, ref).exists(), remote.read(ref)) == (False, None)


@every_remote
def test_an_object_altered_everywhere_can_be_made_again(store: Store, cache: Path, remote: Remote) -> None:
    """After the stage has made it again, it is whole in both places."""
    ref = store.put_bytes(b"hello")
    store.push([ref])
    alter(object_of(cache, ref))
    remote.alter(ref)
    store.verify(ref)
    store.push([store.put_bytes(b"hello")])
    assert store.verify(ref)
    assert remote.read(ref) == b"hello"


@every_remote
def test_an_object_that_the_remote_lost_is_pushed_again(store: Store, folder: Path, remote: Remote) -> None:
    """Verifying asks the remote too, file by file."""
    ref = store.put(folder)
    store.push([ref])
    remote.remove(HELLO)
    assert store.verify(ref)
    assert remote.read(HELLO) == b"hello"


@every_remote
def test_an_object_that_is_nowhere_is_not_verified(store: Store) -> None:
    """There is nothing to trust."""
    assert not store.verify(HELLO)


@every_remote
def test_altered_bytes_are_never_pulled(store: Store, cache: Path, remote: Remote) -> None:
    """What the remote hands out under a hash that is not its own does not enter the cache."""
    ref = store.put_bytes(b"hello")
    store.push([ref])
    lose(cache)
    remote.alter(ref)
    with pytest.raises(StoreError, match=ref.hash):
        store.path(ref)
    assert files_under(cache) == []


def test_reading_checks_the_bytes(store: Store, cache: Path) -> None:
    """A value read from an altered object is the true one, from the remote."""
    ref = store.put_bytes(b"hello")
    store.push([ref])
    alter(object_of(cache, ref))
    assert store.read_bytes(ref) == b"hello"


def test_an_altered_listing_is_not_believed(store: Store, folder: Path, cache: Path) -> None:
    """A folder lists the files it was stored with, from the remote if need be."""
    ref = store.put(folder)
    store.push([ref])
    alter(object_of(cache, ref))
    assert sorted(store.listing(ref)) == ["a.txt", "sub/b.txt"]


USES = {
    "path": lambda store, ref, _: store.path(ref).read_bytes(),
    "checkout": lambda store, ref, place: (store.checkout(ref, place), place.read_bytes())[1],
    "contents": lambda store, ref, _: json.dumps(store.contents([ref.hash])[ref.hash]).encode(),
}


@pytest.mark.parametrize("use", USES)
def test_bytes_are_hashed_before_they_are_used(
    store: Store, cache: Path, remote: Remote, tmp_path: Path, use: str
) -> None:
    """An altered object of the same size is never handed out: the true bytes come from the remote, or there is an error."""
    ref = store.put_bytes(b'"hello"')
    store.push([ref])
    assert USES[use](store, ref, tmp_path / "first") == b'"hello"'  # it is known to be intact, until it changes
    alter(object_of(cache, ref))
    assert USES[use](store, ref, tmp_path / "second") == b'"hello"'
    alter(object_of(cache, ref))
    remote.alter(ref)
    with pytest.raises(StoreError, match="neither from the cache"):
        USES[use](store, ref, tmp_path / "third")
    assert not (tmp_path / "third").exists()


def test_a_truncated_object_is_pulled_again(store: Store, cache: Path) -> None:
    """A file of another size than its reference is not handed out."""
    ref = store.put_bytes(b"hello")
    store.push([ref])
    object_of(cache, ref).chmod(0o644)
    os.truncate(object_of(cache, ref), 2)
    assert store.path(ref).read_bytes() == b"hello"


def test_a_listing_that_leaves_its_folder_is_refused(store: Store, cache: Path, tmp_path: Path) -> None:
    """A folder cannot write outside the place it is checked out to."""
    evil = store.put_bytes(json.dumps([{"md5": HELLO.hash, "relpath": "../evil"}]).encode())
    ref = Ref(hash=f"{evil.hash}.dir", size=5)
    object_of(cache, evil).rename(object_of(cache, ref))
    store.put_bytes(b"hello")
    with pytest.raises(StoreError, match=r"\.\./evil"):
        store.checkout(ref, tmp_path / "out")
    assert not (tmp_path / "evil").exists()


# Checking out


def test_a_file_is_checked_out(store: Store, tmp_path: Path) -> None:
    """At the very path asked for, read-only, over what was there."""
    (tmp_path / "out.txt").write_text("before")
    store.checkout(store.put_bytes(b"hello"), tmp_path / "out.txt")
    assert ((tmp_path / "out.txt").read_text(), (tmp_path / "out.txt").stat().st_mode & 0o777) == ("hello", 0o444)


def test_a_checkout_can_be_put_back(store: Store, folder: Path, cache: Path, tmp_path: Path) -> None:
    """A folder of links into the cache is the same folder, and leaves nothing behind when put again."""
    ref = store.put(folder)
    store.checkout(ref, tmp_path / "out")
    before = files_under(cache)
    assert (store.put(tmp_path / "out"), files_under(cache)) == (ref, before)


# A full disk

FULL = """
import resource, signal, sys
from pathlib import Path
from evergreen.data.store import Store
from evergreen.errors import StoreError
from evergreen.settings import Settings
import dvc.config, dvc.fs  # before the disk is full: Python writes what it compiles

store = Store(Settings.from_env({"EVERGREEN_HOME": sys.argv[1]}))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
"""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of one megabyte."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mount.returncode:
        pytest.skip("only root may mount a small disk; the limit on a file's size below says the same")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("full", ["cache", "data_remote"])
def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, small_disk: Path, impatient: None, full: str) -> None:
    """Cache or remote: the error says so, no bytes are left, and with more room the same call works."""
    store = store_at(tmp_path / "home", **{full: str(small_disk / "place")})
    big = tmp_path / "big.bin"
    big.write_bytes(os.urandom(3_000_000))
    with pytest.raises(StoreError, match="No space left on device"):
        store.push([store.put(big)])
    assert files_under(small_disk) == []
    subprocess.run(["mount", "-o", "remount,size=16m", str(small_disk)], check=True)
    ref = store.put(big)
    store.push([ref])
    assert store.verify(ref)


def test_a_write_cut_short_leaves_nothing_behind(tmp_path: Path) -> None:
    """A file that the system refuses to write whole is no object, and not half of one."""
    script = FULL + textwrap.dedent(
        """
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        try:
            store.put_bytes(b"x" * 3_000_000)
        except StoreError as error:
            print(error.__cause__.errno)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        print([path.name for path in Path(sys.argv[1]).rglob("*") if path.is_file()])
        print(store.put_bytes(b"x" * 3_000_000).size)
        """
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:3] == [str(errno.EFBIG), "[]", "3000000"]


# Snapshots


def test_a_commit_points_at_its_tree(store: Store, data: Path) -> None:
    """Branch and tag name one commit, whose pointer file is the DVC tree of the files."""
    files = {"a.txt": store.put_bytes(b"hello"), "sub/b.txt": store.put_bytes(b"world")}
    commit = store.commit("flights", files, tag_time=APRIL, message="flights as of 2013-04-01")
    assert (commit.tag, commit.new) == ("flights/20130401T000000Z-80dd490e", True)
    assert git(data, "rev-parse", "flights", commit.tag).split() == [commit.revision] * 2
    assert git(data, "show", f"{commit.tag}:flights.dvc").splitlines() == [
        "outs:",
        "- md5: 80dd490eacb686e61199254d9e0cce52.dir",
        "  size: 10",
        "  nfiles: 2",
        "  hash: md5",
        "  path: flights",
    ]


@every_remote
def test_a_committed_tree_is_in_the_remote(store: Store, cache: Path) -> None:
    """Another machine lists a snapshot by its hash alone."""
    commit = store.commit("flights", {"a": store.put_bytes(b"hello")}, tag_time=APRIL, message="April")
    lose(cache)
    assert store.listing(Ref(hash=commit.hash, size=commit.size)) == {"a": HELLO}


def test_an_unchanged_dataset_makes_no_commit(store: Store, data: Path) -> None:
    """A later run that saw the same data speaks of the earlier snapshot."""
    files = {"a": store.put_bytes(b"hello")}
    first = store.commit("flights", files, tag_time=APRIL, message="April")
    second = store.commit("flights", files, tag_time=MAY, message="May")
    assert second == first.model_copy(update={"new": False})
    assert git(data, "tag") == first.tag


def test_a_tag_is_committed_once(store: Store, data: Path) -> None:
    """An earlier as-of done again finds its own commit, though the branch has moved on."""
    april = store.commit("flights", {"a": store.put_bytes(b"hello")}, tag_time=APRIL, message="April")
    store.commit("flights", {"a": store.put_bytes(b"world")}, tag_time=MAY, message="May")
    again = store.commit("flights", {"a": HELLO}, tag_time=APRIL, message="April")
    assert again == april.model_copy(update={"new": False})
    assert git(data, "rev-list", "--count", "flights") == "2"


def test_a_lost_tag_is_set_again(store: Store, data: Path) -> None:
    """A commit whose tag somebody deleted gets one, so that the run can name it."""
    commit = store.commit("flights", {"a": store.put_bytes(b"hello")}, tag_time=APRIL, message="April")
    git(data, "tag", "--delete", commit.tag)
    again = store.commit("flights", {"a": HELLO}, tag_time=APRIL, message="April")
    assert (again.new, git(data, "rev-parse", again.tag)) == (False, commit.revision)


def test_history_is_a_line(store: Store, data: Path) -> None:
    """Each snapshot's parent is the one before it; datasets have lines of their own."""
    first = store.commit("flights", {"a": store.put_bytes(b"hello")}, tag_time=APRIL, message="April")
    store.commit("digits", {"a": store.put_bytes(b"hello")}, tag_time=APRIL, message="other")
    second = store.commit("flights", {"a": store.put_bytes(b"world")}, tag_time=MAY, message="May")
    assert git(data, "rev-list", "flights").split() == [second.revision, first.revision]


def test_files_that_people_add_to_a_branch_stay(store: Store, data: Path, tmp_path: Path) -> None:
    """A snapshot writes its own files only."""
    store.commit("flights", {"a": store.put_bytes(b"hello")}, tag_time=APRIL, message="April")
    git(tmp_path, "clone", "--quiet", "--branch", "flights", str(data), "clone")
    (tmp_path / "clone" / "NOTES.md").write_text("mind the weather\n")
    git(tmp_path / "clone", "add", "NOTES.md")
    git(tmp_path / "clone", "-c", "user.name=A", "-c", "user.email=a@example.com", "commit", "--quiet", "-m", "note")
    git(tmp_path / "clone", "push", "--quiet", "origin", "flights")
    commit = store.commit("flights", {"a": store.put_bytes(b"world")}, tag_time=MAY, message="May")
    assert git(data, "show", f"{commit.tag}:NOTES.md") == "mind the weather"


def test_the_repository_opens_on_its_readme(store: Store, data: Path) -> None:
    """`main` is checked out, clean, and says what there is; datasets are never checked out."""
    store.commit("flights", {"a": store.put_bytes(b"hello")}, tag_time=APRIL, message="April")
    assert (git(data, "branch", "--show-current"), git(data, "status", "--short")) == ("main", "")
    assert sorted(path.name for path in data.iterdir()) == [".dvc", ".dvcignore", ".git", "README.md"]


def test_no_dataset_takes_the_readmes_branch(store: Store) -> None:
    """A dataset named `main` is refused before anything is written."""
    with pytest.raises(StoreError, match="'main'"):
        store.commit("main", {}, tag_time=APRIL, message="April")


def test_a_commit_is_evergreens_own(store: Store, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a missing git identity, nor required signing, nor a surrounding git command's repository matters."""
    (tmp_path / "gitconfig").write_text("[commit]\n\tgpgSign = true\n[user]\n\tuseConfigOnly = true\n")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "gitconfig"))
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))
    store.commit("flights", {"a": store.put_bytes(b"hello")}, tag_time=APRIL, message="April\n\nbecause of cron")
    monkeypatch.delenv("GIT_DIR")
    author, subject = git(data, "log", "-1", "--format=%an <%ae>%n%s", "flights").splitlines()
    assert (author, subject) == ("Evergreen <evergreen@localhost>", "April")


def test_a_bare_repository_will_do(tmp_path: Path) -> None:
    """An empty bare repository of one's own, by URL, takes the branch and the tag."""
    git(tmp_path, "init", "--quiet", "--bare", "bare.git")
    store = store_at(tmp_path / "home", data_repository=f"file://{tmp_path / 'bare.git'}")
    commit = store.commit("flights", {"a": store.put_bytes(b"hello")}, tag_time=APRIL, message="April")
    assert git(tmp_path / "bare.git", "rev-parse", commit.tag, "flights").split() == [commit.revision] * 2


def test_an_unreachable_repository_ends_in_an_error(tmp_path: Path, impatient: None) -> None:
    """The error carries git's words and names the repository and the setting; nothing is written there."""
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "todo.txt").write_text("not a repository")
    store = store_at(tmp_path / "home", data_repository=str(tmp_path / "notes"))
    with pytest.raises(
        StoreError,
        match=r"repository .*/notes: (.|\n)*not appear to be a git repository(.|\n)*EVERGREEN_DATA_REPOSITORY",
    ):
        store.commit("flights", {"a": store.put_bytes(b"hello")}, tag_time=APRIL, message="April")
    assert files_under(tmp_path / "notes") == ["todo.txt"]


def test_a_repository_that_cannot_be_made_is_an_error(tmp_path: Path, unreachable: str) -> None:
    """A path under a file is named."""
    store = store_at(tmp_path / "home", data_repository=unreachable)
    with pytest.raises(StoreError, match=r"cannot commit flights: .*/file'"):
        store.commit("flights", {"a": store.put_bytes(b"hello")}, tag_time=APRIL, message="April")


# Many at once

WORKER = """
import sys
from datetime import UTC, datetime
from pathlib import Path
from evergreen.data.store import Store
from evergreen.settings import Settings

home, dataset, worker = sys.argv[1:]
store = Store(Settings.from_env({"EVERGREEN_HOME": home}))
print("ready", flush=True)
sys.stdin.readline()
shared = {f"{number:02}": store.put_bytes(bytes([number]) * 50_000) for number in range(20)}
store.push(shared.values())
for day in (1, 2):
    own = {"own": store.put_bytes(f"{dataset} {worker} {day}".encode())}
    commit = store.commit(dataset, shared | own, tag_time=datetime(2013, 4, day, tzinfo=UTC), message="as of")
    print(commit.revision, flush=True)
"""


def start(script: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", script, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def test_processes_share_one_cache_and_one_branch(store: Store, tmp_path: Path, data: Path) -> None:
    """Four processes put the same objects and commit to two datasets: each commit lands, histories stay lines."""
    home = str(tmp_path / "home")
    workers = [start(WORKER, home, dataset, str(worker)) for worker in range(2) for dataset in ("flights", "digits")]
    for worker in workers:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
    revisions = {
        "flights": [worker.communicate("go\n")[0].split() for worker in workers[0::2]],
        "digits": [worker.communicate("go\n")[0].split() for worker in workers[1::2]],
    }
    for dataset, made in revisions.items():
        line = git(data, "rev-list", dataset).split()
        assert sorted(line) == sorted(revision for revisions in made for revision in revisions)
        assert git(data, "rev-list", "--min-parents=2", dataset) == ""
        tip = git(data, "show", f"{dataset}:{dataset}.dvc").splitlines()
        tree = tip[1].removeprefix("- md5: ")
        assert store.verify(Ref(hash=tree, size=0))


KILLED = """
import sys
from pathlib import Path
from evergreen.data.store import Store
from evergreen.settings import Settings

store = Store(Settings.from_env({"EVERGREEN_HOME": sys.argv[1]}))
while True:
    ref = store.put(Path(sys.argv[2]))
    store.push([ref])
    print(ref.hash, flush=True)
    for place in ("cache", "remote"):
        for path in Path(sys.argv[1], place).rglob("*"):
            path.is_file() and path.unlink()
"""


def test_a_killed_process_leaves_whole_objects_only(store: Store, tmp_path: Path, cache: Path, remote: Remote) -> None:
    """Killed in the midst of putting and pushing: what is there is whole, and a retry ends as if nothing had been."""
    source = tmp_path / "source"
    source.mkdir()
    for number in range(30):
        (source / f"{number:02}").write_bytes(bytes([number]) * 300_000)
    worker = start(KILLED, str(tmp_path / "home"), str(source))
    assert worker.stdout is not None
    undisturbed = worker.stdout.readline().strip()
    worker.kill()
    worker.communicate()
    for place in (cache, remote.place):
        for path in (place / "files" / "md5").glob("??/[!.]*"):
            assert hashlib.md5(path.read_bytes()).hexdigest() == f"{path.parent.name}{path.stem}"
    ref = store.put(source)
    store.push([ref])
    assert (ref.hash, store.verify(ref)) == (undisturbed, True)


def test_notes_come_back_in_their_order(store, data):
    """Each is a commit without files on a branch of its own, once while it is the last; stock git shows them."""
    for text in ("1 a", "2 b", "2 b", "1 a"):
        store.note("tide", text)
    assert (store.notes("tide"), store.noted()) == (["1 a", "2 b", "1 a"], ["tide"])
    assert git(data, "log", "--format=%s", "evergreen-ledger/tide").splitlines() == ["1 a", "2 b", "1 a"]
    assert git(data, "ls-tree", "evergreen-ledger/tide") == ""


def test_where_nothing_was_noted_there_are_no_notes(store, data):
    """To look makes no repository."""
    assert (store.notes("tide"), store.noted(), data.exists()) == ([], [], False)
    store.note("tide", "1 a")
    assert (store.notes("wind"), store.noted()) == ([], ["tide"])


def test_notes_at_once_are_all_kept(store):
    """Whoever finds that another note came first adds his own after it."""
    texts = [f"{number} x" for number in range(4)]
    store.note("tide", "0 before")
    writers = [threading.Thread(target=store.note, args=("tide", text)) for text in texts]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert sorted(store.notes("tide")) == sorted(["0 before", *texts])


def test_a_folder_is_hashed_as_it_would_be_kept(store, folder, cache):
    """Its name without keeping it."""
    assert store.hash_of(folder) == store_at(cache.parent / "other").put(folder).hash
    assert not cache.exists()


@every_remote
def test_what_is_removed_is_gone_here_and_in_the_remote(store, folder, cache, remote):
    """Objects alone, or a folder by its listing; what is not there is not missed, and all else stays."""
    ref, hello = store.put(folder), store.put_bytes(b"hello")
    store.push([ref, hello])
    store.remove({ref.hash, "0" * 32})
    assert not object_of(cache, ref).exists()
    assert remote.read(ref) is None
    assert store.verify(hello)
    assert store.bytes_of({ref.hash, hello.hash}) == {hello.hash: 5}


@every_remote
def test_bytes_are_told_from_here_or_from_afar(store, cache):
    """The size of what the cache lacks is the remote's to say; what is nowhere is left out."""
    here, afar = store.put_bytes(b"here"), store.put_bytes(b"far away")
    store.push([afar])
    object_of(cache, afar).unlink()
    assert store.bytes_of({here.hash, afar.hash, "0" * 32}) == {here.hash: 4, afar.hash: 8}
    assert store.bytes_of(set()) == {}


@every_remote
def test_files_that_are_here_or_afar_are_held(store, cache):
    """Their bytes are not looked at; one that is nowhere is enough to say no."""
    here, afar = store.put_bytes(b"here"), store.put_bytes(b"far away")
    store.push([afar])
    object_of(cache, afar).unlink()
    assert store.holds([here, afar])
    assert not store.holds([here, afar, HELLO])


def test_contents_come_all_at_once(store, cache):
    """JSON objects by their hash, from here and from afar."""
    refs = [store.put_json({"number": number}) for number in range(3)]
    store.push(refs)
    object_of(cache, refs[0]).unlink()
    assert store.contents({ref.hash for ref in refs}) == {
        ref.hash: {"number": number} for number, ref in enumerate(refs)
    }


def test_an_empty_repository_of_a_server_says_what_it_holds(tmp_path, store, data):
    """A bare repository that somebody else made is given the README, once, and snapshots beside it."""
    subprocess.run(["git", "init", "--quiet", "--bare", "--initial-branch=main", data], check=True)
    store.open_repository()
    first = subprocess.run(["git", "-C", data, "rev-parse", "main"], check=True, capture_output=True, text=True).stdout
    store.open_repository()
    again = subprocess.run(["git", "-C", data, "rev-parse", "main"], check=True, capture_output=True, text=True).stdout
    subprocess.run(["git", "clone", "--quiet", data, tmp_path / "clone"], check=True)
    assert (tmp_path / "clone" / "README.md").read_text().startswith("# Snapshots")
    assert again == first
