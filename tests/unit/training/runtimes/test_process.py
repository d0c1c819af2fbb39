"""Which process is the job, told from any other."""

import fcntl
import json
import os
import select
import subprocess
import sys

import pytest

from evergreen.errors import JobError
from evergreen.training.runtimes import process


@pytest.fixture
def stranger():
    """A process that leads a session of its own and is no job."""
    child = subprocess.Popen(["sleep", "600"], start_new_session=True)
    yield child
    child.kill()
    child.wait()


def test_a_pid_given_to_another_is_not_the_job(tmp_path, stranger):
    """The same number with another start is neither alive nor stopped."""
    known = {"pid": stranger.pid, "started": "another boot/1", "at": 0.0}
    (tmp_path / "pid.json").write_text(json.dumps(known))
    assert not process.alive(tmp_path)
    process.stop(tmp_path)
    assert stranger.poll() is None


def test_a_recorded_process_is_the_job(tmp_path, stranger):
    """The number with its start is alive, and stopped when asked."""
    process.record(tmp_path, stranger.pid)
    assert process.alive(tmp_path)
    process.stop(tmp_path)
    assert not process.alive(tmp_path)


def test_children_of_a_killed_job_are_found(tmp_path):
    """Where the job's process is gone, what it left in its session is stopped."""
    code = "import subprocess\nprint(subprocess.Popen(['sleep', '600']).pid, flush=True)\ninput()"
    job = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    child = int(job.stdout.readline())
    process.record(tmp_path, job.pid)
    handle = os.pidfd_open(child)
    job.kill()
    job.wait()
    process.stop(tmp_path)
    assert select.select([handle], [], [], 10)[0] == [handle]
    os.close(handle)


def test_a_folder_that_an_unknown_process_holds_is_refused(tmp_path):
    """A held lock without a known process is never overruled; the message names the lock."""
    with (tmp_path / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(JobError, match=f"{tmp_path}/lock"):
            process.launch(tmp_path)


def test_a_damaged_record_names_nobody(tmp_path):
    """A `pid.json` that was cut short is as good as none."""
    (tmp_path / "pid.json").write_text('{"pid": 1, "sta')
    assert not process.alive(tmp_path)
    process.stop(tmp_path)
