"""Bad luck around a run: places that cannot be reached, disks that are full. A text, no change, and a good retry."""

import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from tests.web import serving

from evergreen.errors import RegistryError, StoreError, UnreachableError
from evergreen.history import history_of

NEXT = datetime(2024, 1, 14, tzinfo=UTC)
"""The as-of that sees day 12, which the champion of `first` has not seen."""

pytestmark = [pytest.mark.usefixtures("kept"), pytest.mark.slow, pytest.mark.fault]


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> Iterator[dict[str, str]]:
    """The snapshot repository and MLflow's artifacts on a disk of four megabytes, where one can be had."""
    disk = tmp_path_factory.mktemp("disk")
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
    mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    yield {"data_repository": str(disk / "data"), "mlflow_artifacts": str(disk / "artifacts")}
    if mounted:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.fixture
def full_disk(home):
    """Fills the disk, and frees it again."""
    disk = Path(home.settings.mlflow_artifacts).parent
    if not disk.is_mount():
        pytest.skip("only root may mount a small disk")
    filler = disk / "filler"

    def fill() -> None:
        file = os.open(filler, os.O_CREAT | os.O_WRONLY)
        try:
            while os.write(file, bytes(4096)):
                pass
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
        finally:
            os.close(file)

    yield fill
    filler.unlink(missing_ok=True)


class Away:
    """A folder that is not there for a while: a file lies in its place."""

    def __init__(self, folder: str | Path) -> None:
        self.folder, self.kept = Path(folder), Path(f"{folder}.away")

    def __enter__(self) -> None:
        self.folder.rename(self.kept)
        self.folder.write_text("in the way")

    def __exit__(self, *_: object) -> None:
        self.folder.unlink()
        self.kept.rename(self.folder)


def test_an_unreachable_source(home):
    """The address is named, and what to check; reachable again, it is read."""
    home.write(source={"kind": "parquet", "path": "http://127.0.0.1:9/rows.parquet"})
    home.refuses(UnreachableError, "unreachable", says=["http://127.0.0.1:9/rows.parquet", "network", "credentials"])
    home.write()
    assert home.perform("reachable", until="ingest")["ingest"].rows == 1100


def test_a_source_whose_server_fails_halfway(home):
    """Half of the newest file came: nothing is made of it, and the same run reads all of it when the server is well."""
    home.write_day(12)
    with serving(home.rows) as web:
        home.write(source={"kind": "parquet", "path": f"{web.url}/*.parquet"})
        web.ills["/012.parquet"] = "cut"
        home.refuses(UnreachableError, "halfway", as_of=NEXT, says=[f"{web.url}/012.parquet", "network", "run again"])
        web.ills.clear()
        assert home.perform("halfway", as_of=NEXT, until="ingest")["ingest"].rows == 1100


def test_an_unreachable_remote(home):
    """The store's remote is named, with the setting that says where it is; the same run goes on when it is back."""
    home.write_day(12)
    remote = home.settings.data_remote
    before = home.visible()
    with Away(remote):
        home.refuses(StoreError, "no remote", as_of=NEXT, says=[remote, "reachable", "EVERGREEN_DATA_REMOTE"])
    assert home.visible() == before
    home.recovers("no remote", as_of=NEXT)


def test_an_unreachable_snapshot_repository(home):
    """The git repository is named, with its setting; nothing is tagged until it is back."""
    home.write_day(12)
    home.write(data={"holdout": "4d"})  # other windows, so another snapshot, whatever the other tests have made
    repository = home.settings.data_repository
    before = home.visible()
    with Away(repository), pytest.raises(StoreError) as caught:
        home.perform("no repository", as_of=NEXT)
    assert repository in str(caught.value)
    assert "EVERGREEN_DATA_REPOSITORY" in caught.value.fix
    assert home.stages("failure", "no repository") == ["snapshot"]
    assert home.visible() == before
    assert len(home.perform("no repository", as_of=NEXT, until="snapshot")) == 3
    assert len(home.visible()["tags"]) == len(before["tags"]) + 1


def test_an_unreachable_registry(home):
    """MLflow's address is named within seconds, with its setting; the failure of `evaluate` is an event."""
    settings = home.settings.model_copy(update={"mlflow_tracking_uri": "http://127.0.0.1:9"})
    before = home.visible()
    with pytest.raises(RegistryError) as caught:
        type(home)(settings).perform("no registry")
    assert "http://127.0.0.1:9" in caught.value.what
    assert "EVERGREEN_MLFLOW_TRACKING_URI" in caught.value.fix
    assert [(event.body["stage"], event.body["what"]) for event in home.events("failure", "no registry")] == [
        ("evaluate", caught.value.what)
    ]
    assert home.visible() == before
    home.perform("no registry")


def test_a_disk_that_is_full_when_the_snapshot_is_named(home, full_disk):
    """No commit and no tag, not half of one; with room again the same run goes on."""
    home.write_day(12)
    home.write_day(11, lambda rows: rows.head(90))
    home.perform("full for data", as_of=NEXT, until="validate")
    full_disk()
    says = [home.settings.data_repository, "o space left on device", "fix:"]
    home.refuses(StoreError, "full for data", as_of=NEXT, says=says)
    assert home.git("fsck", "--no-dangling") == []
    shutil.rmtree(home.settings.cache)  # what a run goes on from is not on this machine
    (Path(home.settings.mlflow_artifacts).parent / "filler").unlink()
    values = home.perform("full for data", as_of=NEXT, until="snapshot")
    assert values["snapshot"].tag in home.visible()["tags"]


def test_a_disk_that_is_full_when_the_model_is_registered(home, full_disk):
    """No version, no run and no model in MLflow; with room again the same run makes one version."""
    home.write(training={"params": {"steps": 45}})
    home.perform("full for models", until="evaluate")
    before = home.visible()
    full_disk()
    says = ["cannot register tide", "o space left on device", "room on its disk"]
    home.refuses(RegistryError, "full for models", says=says)
    (Path(home.settings.mlflow_artifacts).parent / "filler").unlink()
    values = home.perform("full for models")
    assert values["register"].version == len(before["versions"]) + 1
    assert len(home.visible()["mlflow runs"]) == len(before["mlflow runs"]) + 1


def test_a_champion_that_changed_since_it_was_compared_with(home):
    """The verdict was against another: the alias stays, the void promotion says why, and the outcome is `superseded`."""
    home.write_day(12)
    home.write(training={"params": {"steps": 50}})
    values = home.perform("overtaken", as_of=NEXT, until="register")
    home.write(training={"params": {"steps": 60}})
    newer = home.recovers("overtakes", as_of=NEXT)["promote"]
    home.write(training={"params": {"steps": 50}})
    promoted = home.perform("overtaken", after=values)["promote"]
    void = home.events("promotion", "overtaken")[-1].body
    assert (promoted.verdict.decision, promoted.champion) == ("promote", newer.version)
    assert home.champion.version == newer.version
    assert (void["status"], f"the champion is version {newer.version} now" in void["why"]) == ("void", True)
    assert history_of(home.database, "overtaken")["outcome"] == "superseded"
