"""Full disks: the events database, MLflow's database, the jobs' folder. A text, the same champion, and a good retry."""

import errno
import subprocess
from contextlib import contextmanager
from datetime import UTC, datetime

import pytest
import sqlalchemy as sa

from evergreen.errors import DatabaseError, JobError, RegistryError, StoreError
from evergreen.stages import CHAIN

NEXT = datetime(2024, 1, 14, tzinfo=UTC)
"""The as-of that sees day 12, which the champion of `first` has not seen."""
STAGES = list(CHAIN)

pytestmark = [pytest.mark.usefixtures("kept"), pytest.mark.slow, pytest.mark.fault]


@contextmanager
def full(database):
    """No room for one page more in an SQLite database, for whoever uses it: what a full disk is to it, to any user."""

    def limit(connection, pages):
        if any(file == str(database) for _, _, file in connection.execute("PRAGMA database_list")):
            connection.execute(f"PRAGMA max_page_count = {pages}")

    def fill(connection, _record, _proxy):
        limit(connection, 1)  # SQLite takes the number of pages that there are for the least

    def free(connection, _record):
        limit(connection, 2**30)

    sa.event.listen(sa.pool.Pool, "checkout", fill)
    sa.event.listen(sa.pool.Pool, "checkin", free)  # a connection that is kept must not keep the limit
    try:
        yield
    finally:
        sa.event.remove(sa.pool.Pool, "checkout", fill)
        sa.event.remove(sa.pool.Pool, "checkin", free)


@pytest.fixture
def small_disk(home):
    """A disk of one megabyte for the jobs; fills it, and frees it again. Anybody may fill a disk, only root mount one."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(home.settings.jobs)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("only root may mount a small disk")
    filler = home.settings.jobs / "filler"

    def fill():
        with filler.open("wb", buffering=0) as file:
            try:
                while file.write(bytes(4096)):
                    pass
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise

    fill.free = filler.unlink
    yield fill
    subprocess.run(["umount", "--lazy", str(home.settings.jobs)], check=True)


def news(home, steps):
    """Something to learn that no other test has learned: rows of a new day, other parameters; and what was before."""
    home.write_day(12)
    home.write(training={"params": {"steps": steps}})
    return home.visible()


def ends_as_undisturbed(home, run_id, left=()):
    """The same run again ends well, and one that does all of it anew, undisturbed, comes to the same version."""
    values = home.recovers(run_id, as_of=NEXT)
    again = home.perform(f"{run_id}, undisturbed", as_of=NEXT, force=True)
    assert home.stages("stage", f"{run_id}, undisturbed") == STAGES
    assert (again["snapshot"].hash, again["train"].model) == (values["snapshot"].hash, values["train"].model)
    assert again["register"].version == values["register"].version
    assert home.leftovers() == list(left)


@pytest.mark.parametrize(("stage", "steps"), [("ingest", 41), ("promote", 43)])
def test_a_full_events_database(home, stage, steps):
    """It is named; wherever in the run its disk is full, the champion stays, and the chain of events is whole."""
    before, run_id = news(home, steps), f"no events from {stage} on"
    earlier = STAGES[: STAGES.index(stage)]
    values = home.perform(run_id, as_of=NEXT, until=earlier[-1]) if earlier else {}
    with full(home.settings.home / "evergreen.db"), pytest.raises(DatabaseError) as caught:
        home.perform(run_id, as_of=NEXT, after=values)
    assert str(home.settings.home / "evergreen.db") in caught.value.what
    assert "database or disk is full" in caught.value.what
    assert home.visible()["champion"] == before["champion"]
    assert home.database.first_bad("tide") is None
    ends_as_undisturbed(home, run_id)


def test_a_full_registry_database(home):
    """MLflow's database is named, and nothing of the version that could not be made is left in it."""
    news(home, 44)
    home.perform("no version", as_of=NEXT, until="evaluate")
    says = [
        str(home.settings.home / "mlflow.db"),
        "cannot register tide",
        "database or disk is full",
        "room on its disk",
    ]
    with full(home.settings.home / "mlflow.db"):
        home.refuses(RegistryError, "no version", as_of=NEXT, says=says)
    ends_as_undisturbed(home, "no version")


@pytest.mark.parametrize(
    ("stage", "steps", "error", "says"),
    [
        ("ingest", 45, JobError, "is full"),
        ("train", 46, JobError, "is full"),
        ("evaluate", 47, StoreError, "No space left on device"),  # the store notices first
    ],
)
def test_a_full_disk_of_the_jobs(home, small_disk, stage, steps, error, says):
    """The folder is named, whoever noticed first, and once there is room nothing is left on it."""
    before, run_id = news(home, steps), f"no jobs from {stage} on"
    earlier = STAGES[: STAGES.index(stage)]
    values = home.perform(run_id, as_of=NEXT, until=earlier[-1]) if earlier else {}
    small_disk()
    with pytest.raises(error, match=says) as caught:
        home.perform(run_id, as_of=NEXT, after=values)
    assert str(home.settings.jobs) in caught.value.what
    assert "make room" in caught.value.fix
    assert home.stages("failure", run_id) == [stage]
    assert home.visible()["champion"] == before["champion"]
    small_disk.free()
    ends_as_undisturbed(home, run_id)


def test_a_training_that_fills_the_disk_of_the_jobs(home, small_disk):
    """The job cannot even write down how it ended: that its disk is full is said all the same."""
    before = news(home, 48)
    filling = "    weights = np.zeros(3)\n    (job.folder / 'scratch').write_bytes(bytes(2**20))\n"
    home.write_model("    weights = np.zeros(3)\n", filling)
    with pytest.raises(JobError) as caught:
        home.perform("greedy", as_of=NEXT)
    assert f"the disk of {home.settings.jobs}" in caught.value.what
    assert "EVERGREEN_JOBS" in caught.value.fix
    assert home.visible()["champion"] == before["champion"]
    home.write_model()
    for entry in home.settings.jobs.glob("train-*/scratch"):
        entry.unlink()
    ends_as_undisturbed(home, "greedy", left=home.leftovers())  # the folder of the job that failed
