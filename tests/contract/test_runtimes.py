"""The laws that hold for every place a job can run in."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from evergreen.errors import JobError
from evergreen.training.runtimes import Runtime, process

SLEEP = "import time\ndef read(window):\n    time.sleep(600)\n    yield None\n"
UNTIL_GO = (
    "import pathlib, time\n"
    "def read(window):\n"
    "    while not pathlib.Path('go').exists():\n"
    "        time.sleep(0.01)\n"
    "    return []\n"
)
ENVIRONMENT = "import json, os, pathlib\ndef read(window):\n    pathlib.Path('environment').write_text(json.dumps(dict(os.environ)))\n    return []\n"


@pytest.fixture(params=[process], ids=["process"])
def runtime(request) -> Runtime:
    return request.param


@pytest.fixture
def folder(tmp_path, runtime):
    yield tmp_path
    runtime.stop(tmp_path, grace_s=0.0)


def write(folder, source, timeout_s=60.0):
    """A job's folder whose function is `read` of `source`."""
    (folder / "input" / "pack").mkdir(parents=True)
    (folder / "input" / "pack" / "model.py").write_text(source)
    spec = {"id": "a", "kind": "read", "pack": "demo", "call": "model:read", "timeout_s": timeout_s}
    data = {"target": "y", "event_time": "t", "task": "binary"}
    (folder / "job.json").write_text(json.dumps(spec | data))


def until(condition):
    """Wait for a condition; a test that waits for half a minute has failed."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_folder_without_a_job_has_nothing_alive(runtime, folder):
    """Before the first launch nothing runs, joining ends at once, and stopping is no error."""
    assert not runtime.alive(folder)
    assert runtime.join(folder, timeout_s=30)
    runtime.stop(folder)


def test_a_launched_job_is_alive_until_it_ends(runtime, folder):
    """It is alive from the moment launch returns; joining it says when it has ended."""
    write(folder, UNTIL_GO)
    runtime.launch(folder)
    assert runtime.alive(folder)
    assert not runtime.join(folder, timeout_s=0.05)
    (folder / "go").touch()
    assert runtime.join(folder, timeout_s=30)
    assert not runtime.alive(folder)
    assert json.loads((folder / "output" / "result.json").read_text())["ok"]


def test_the_end_is_seen_at_once(runtime, folder):
    """Joining returns when the job ends, long before the time that the caller would have waited."""
    write(folder, "def read(window):\n    return []\n")
    runtime.launch(folder)
    assert runtime.join(folder, timeout_s=30)
    assert time.time() - (folder / "output" / "result.json").stat().st_mtime < 0.2


def test_a_job_is_not_launched_twice(runtime, folder):
    """A second launch beside a living job is refused, and leaves the first alone."""
    write(folder, SLEEP)
    runtime.launch(folder)
    with pytest.raises(JobError):
        runtime.launch(folder)
    assert runtime.alive(folder)


def test_a_stopped_job_is_gone_with_its_children(runtime, folder):
    """Stopping ends the job and what it started, those that ignore SIGTERM too."""
    write(
        folder,
        "import os, pathlib, signal, subprocess, sys, time\n"
        "def read(window):\n"
        "    spawned = subprocess.Popen(['sleep', '600'])\n"
        "    signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "    forked = os.fork()\n"
        "    if forked:\n"
        "        pathlib.Path('part').write_text(f'{os.getpid()} {spawned.pid} {forked}')\n"
        "        pathlib.Path('part').rename('pids')\n"
        "    time.sleep(600)\n",
    )
    runtime.launch(folder)
    until((folder / "pids").exists)
    pids = [int(pid) for pid in (folder / "pids").read_text().split()]
    assert [alive(pid) for pid in pids] == [True] * 3
    runtime.stop(folder, grace_s=0.1)
    assert [alive(pid) for pid in pids] == [False] * 3


def test_a_job_outlives_the_process_that_launched_it(runtime, folder):
    """The caller's end, with its whole process group, is not the job's."""
    write(folder, UNTIL_GO)
    code = (
        "import os, pathlib, signal, sys\n"
        f"from evergreen.training.runtimes import {runtime.__name__.rpartition('.')[2]} as runtime\n"
        "runtime.launch(pathlib.Path(sys.argv[1]))\n"
        "os.killpg(0, signal.SIGKILL)\n"
    )
    caller = subprocess.run([sys.executable, "-c", code, str(folder)], check=False, start_new_session=True)
    assert caller.returncode == -9
    (folder / "go").touch()
    assert runtime.join(folder, timeout_s=30)
    assert json.loads((folder / "output" / "result.json").read_text())["ok"]


def test_a_living_job_touches_its_heartbeat(runtime, folder):
    """Anyone who sees the folder can see that the job lives."""
    write(folder, SLEEP)
    runtime.launch(folder)
    until((folder / "heartbeat").exists)
    first = (folder / "heartbeat").stat().st_mtime
    until(lambda: (folder / "heartbeat").stat().st_mtime > first)


def test_a_job_ends_itself_when_its_time_is_up(runtime, folder):
    """Nobody need be there to end it, and its children end with it."""
    source = "import subprocess, time\ndef read(window):\n    subprocess.run(['sleep', '600'])\n"
    write(folder, source, timeout_s=0.5)
    runtime.launch(folder)
    assert runtime.join(folder, timeout_s=30)
    failure = json.loads((folder / "output" / "result.json").read_text())["failure"]
    assert "ran past its 0.5 s" in failure["what"]


def test_a_job_is_given_no_settings_and_no_secrets(runtime, folder, monkeypatch):
    """Of the environment it gets what Python and CUDA need, and what makes it repeatable."""
    for name in (
        "AIRFLOW__CORE__FERNET_KEY",
        "MLFLOW_TRACKING_URI",
        "EVERGREEN_HOME",
        "AWS_SECRET_ACCESS_KEY",
        "NVIDIA_API_KEY",
    ):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    write(folder, ENVIRONMENT)
    runtime.launch(folder)
    assert runtime.join(folder, timeout_s=30)
    given = json.loads((folder / "environment").read_text())
    assert not {name for name in given if name.startswith(("AIRFLOW", "MLFLOW", "EVERGREEN", "AWS")) or "KEY" in name}
    assert (given["PATH"], given["CUDA_VISIBLE_DEVICES"]) == (os.environ["PATH"], "")
    assert (given["PYTHONHASHSEED"], given["CUBLAS_WORKSPACE_CONFIG"]) == ("0", ":4096:8")
