"""What the store writes, stock DVC and git read, and the other way round: the commands are run as a user would."""

import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
from tests.remotes import Remote

from evergreen.data.store import Commit, Store
from evergreen.run import Ref
from evergreen.settings import Settings

DVC = str(Path(sys.executable).with_name("dvc"))
FILES = {"2013-03-30.parquet": b"saturday", "2013-03-31.parquet": b"sunday", "notes/read me.txt": b""}

pytestmark = pytest.mark.slow


def run(*command: str, cwd: Path) -> str:
    """What the command prints; its own site cache, so that no run sees another's."""
    environment = os.environ | {"DVC_SITE_CACHE_DIR": str(cwd.parent / "site"), "DVC_NO_ANALYTICS": "1"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A user's folder: neither a git nor a DVC repository."""
    (tmp_path / "elsewhere").mkdir()
    return tmp_path / "elsewhere"


@pytest.fixture(params=["the default repository", "a bare repository", "a relative remote"])
def committed(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Commit]:
    """The repository, and its first of two snapshots of `flights`; the cache that made them is gone."""
    environment = {"EVERGREEN_HOME": str(tmp_path / "home")}
    if request.param == "a bare repository":
        subprocess.run(["git", "init", "--quiet", "--bare", str(tmp_path / "bare.git")], check=True)
        environment["EVERGREEN_DATA_REPOSITORY"] = str(tmp_path / "bare.git")
    if request.param == "a relative remote":
        monkeypatch.chdir(tmp_path)
        environment["EVERGREEN_DATA_REMOTE"] = "objects/of mine, all"
    settings = Settings.from_env(environment)
    store = Store(settings)
    files = {name: store.put_bytes(content) for name, content in FILES.items()}
    april = store.commit("flights", files, tag_time=datetime(2013, 4, 1, tzinfo=UTC), message="as of 2013-04-01")
    files["2013-04-01.parquet"] = store.put_bytes(b"monday")
    store.commit("flights", files, tag_time=datetime(2013, 4, 2, tzinfo=UTC), message="as of 2013-04-02")
    settings.cache.rename(tmp_path / "gone")
    return settings.data_repository, april


def test_dvc_gets_a_snapshot_by_its_tag(committed: tuple[str, Commit], elsewhere: Path) -> None:
    """`dvc list` shows the files of a tag, and `dvc get` brings them, byte for byte."""
    repository, april = committed
    listed = run(DVC, "list", repository, "flights", "--rev", april.tag, "--dvc-only", "-R", cwd=elsewhere)
    assert sorted(listed.splitlines()) == sorted(FILES)
    run(DVC, "get", repository, "flights", "--rev", april.tag, cwd=elsewhere)
    assert contents(elsewhere / "flights") == FILES


def test_a_clone_pulls_the_newest_snapshot(committed: tuple[str, Commit], elsewhere: Path) -> None:
    """`git clone; git checkout flights; dvc pull` ends with the data, and nothing to commit."""
    repository, _ = committed
    run("git", "clone", "--quiet", repository, "clone", cwd=elsewhere)
    run("git", "checkout", "--quiet", "flights", cwd=elsewhere / "clone")
    run(DVC, "pull", "--quiet", cwd=elsewhere / "clone")
    assert contents(elsewhere / "clone" / "flights") == FILES | {"2013-04-01.parquet": b"monday"}
    assert run("git", "status", "--short", cwd=elsewhere / "clone") == ""
    assert "up to date" in run(DVC, "status", cwd=elsewhere / "clone")


@pytest.mark.parametrize("remote", ["http", "s3"], indirect=True)
def test_dvc_gets_a_snapshot_from_a_service(remote: Remote, tmp_path: Path, elsewhere: Path) -> None:
    """Where the remote is a web server or a bucket, too: the user's credentials are all that `dvc get` needs."""
    settings = Settings.from_env({"EVERGREEN_HOME": str(tmp_path / "home"), "EVERGREEN_DATA_REMOTE": remote.url})
    store = Store(settings)
    files = {name: store.put_bytes(content) for name, content in FILES.items()}
    april = store.commit("flights", files, tag_time=datetime(2013, 4, 1, tzinfo=UTC), message="as of 2013-04-01")
    run(DVC, "get", settings.data_repository, "flights", "--rev", april.tag, cwd=elsewhere)
    assert contents(elsewhere / "flights") == FILES


def test_a_folder_that_dvc_pushed_is_read(tmp_path: Path, elsewhere: Path) -> None:
    """`dvc add` gives a folder the hash that the store gives it, and what `dvc push` uploads the store reads."""
    store = Store(Settings.from_env({"EVERGREEN_HOME": str(tmp_path / "home")}))
    for name, content in FILES.items():
        (elsewhere / "flights" / name).parent.mkdir(parents=True, exist_ok=True)
        (elsewhere / "flights" / name).write_bytes(content)
    run(DVC, "init", "--quiet", "--no-scm", cwd=elsewhere)
    run(DVC, "remote", "add", "--quiet", "--default", "store", str(tmp_path / "home" / "remote"), cwd=elsewhere)
    run(DVC, "add", "--quiet", "flights", cwd=elsewhere)
    run(DVC, "push", "--quiet", cwd=elsewhere)
    pointer = (elsewhere / "flights.dvc").read_text()
    ref = Ref(hash=pointer.split("md5: ")[1].split()[0], size=14)
    store.checkout(ref, tmp_path / "out")
    assert contents(tmp_path / "out") == FILES
    assert store.put(elsewhere / "flights") == ref
