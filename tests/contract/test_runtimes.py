"""The laws that hold for every place a job can run in."""

import fcntl
import json
import os
import re
import subprocess
import sys
import time

import pytest

from evergreen.errors import JobError
from evergreen.settings import Settings
from evergreen.training import jobs
from evergreen.training.runtimes import Runtime, docker, process

SLEEP = "import time\ndef read(window):\n    time.sleep(600)\n    yield None\n"
UNTIL_GO = (
    "import pathlib, time\n"
    "def read(window):\n"
    "    while not pathlib.Path('go').exists():\n"
    "        time.sleep(0.01)\n"
    "    return []\n"
)
ENVIRONMENT = "import json, os, pathlib\ndef read(window):\n    pathlib.Path('environment').write_text(json.dumps(dict(os.environ)))\n    return []\n"


@pytest.fixture(params=["process", "docker", "door"])
def runtime(request, monkeypatch) -> Runtime:
    """`door` is `docker` by a socket that lets jobs pass and nothing else."""
    if request.param == "process":
        CONTAINER.clear()
        return process
    CONTAINER["container"] = {"image": request.getfixturevalue("image"), "memory_bytes": 2**30, "cpus": 2.0}
    if request.param == "door":
        monkeypatch.setenv("DOCKER_HOST", f"unix://{request.getfixturevalue('door')}")
    return docker


CONTAINER: dict[str, object] = {}
"""What a job's spec says beside, of the runtime under test."""


@pytest.fixture
def folder(tmp_path, runtime):
    yield tmp_path
    runtime.stop(tmp_path, grace_s=0.0)


def write(folder, source, timeout_s=60.0):
    """A job's folder whose function is `read` of `source`."""
    (folder / "input" / "pack").mkdir(parents=True)
    (folder / "input" / "pack" / "model.py").write_text(source)
    spec = {"id": "a", "kind": "read", "pack": "demo", "call": "model:read", "timeout_s": timeout_s, "gpus": 0}
    data = {"target": "y", "event_time": "t", "task": "binary"}
    (folder / "job.json").write_text(json.dumps(spec | data | CONTAINER))


def until(condition):
    """Wait for a condition; a test that waits for half a minute has failed."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_held(file):
    """Whether a living process holds the lock of a file: told apart from here, whatever numbers processes have there."""
    with file.open() as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
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


def test_a_job_lives_as_long_as_its_last_thread(runtime, folder):
    """Its first thread may end before others, which hold its files and its GPU; stopping it ends them."""
    write(
        folder,
        "import ctypes, fcntl, pathlib, threading, time\n"
        "def read(window):\n"
        "    held = open('own', 'w')\n"
        "    fcntl.flock(held, fcntl.LOCK_EX)\n"
        "    threading.Thread(target=time.sleep, args=(600,)).start()\n"
        "    threading.Thread(target=lambda: (time.sleep(0.1), pathlib.Path('ready').touch(), time.sleep(600))).start()\n"
        "    ctypes.CDLL(None).syscall(60, 0) if __import__('platform').machine() == 'x86_64' else time.sleep(600)\n",
    )
    runtime.launch(folder)
    until((folder / "ready").exists)
    assert runtime.alive(folder)
    runtime.stop(folder, grace_s=0.1)
    assert not is_held(folder / "own")


def test_the_end_is_seen_when_it_comes(runtime, folder):
    """Joining returns when the job ends, long before the time that the caller would have waited."""
    write(folder, "def read(window):\n    return []\n")
    runtime.launch(folder)
    assert runtime.join(folder, timeout_s=3600)  # which the test has not


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
        "import fcntl, os, pathlib, signal, subprocess, time\n"
        "def read(window):\n"
        "    own, spawned, forked = (open(name, 'w') for name in ('own', 'spawned', 'forked'))\n"
        "    for file in (own, spawned, forked):\n"
        "        fcntl.flock(file, fcntl.LOCK_EX)\n"
        "    subprocess.Popen(['sleep', '600'], pass_fds=[spawned.fileno()])\n"
        "    spawned.close()\n"
        "    signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "    if os.fork():\n"
        "        forked.close()\n"
        "        pathlib.Path('ready').touch()\n"
        "    else:\n"
        "        own.close()\n"
        "    time.sleep(600)\n",
    )
    runtime.launch(folder)
    until((folder / "ready").exists)
    assert [is_held(folder / name) for name in ("own", "spawned", "forked")] == [True] * 3
    runtime.stop(folder, grace_s=0.1)
    assert [is_held(folder / name) for name in ("own", "spawned", "forked")] == [False] * 3


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
    assert given["CUDA_VISIBLE_DEVICES"] == ""
    assert runtime is docker or given["PATH"] == os.environ["PATH"]
    assert (given["PYTHONHASHSEED"], given["CUBLAS_WORKSPACE_CONFIG"]) == ("0", ":4096:8")


LOOK = """
import json, os, pathlib, socket
def tried(act):
    try:
        act()
    except OSError as error:
        return error.strerror
    return "done"
def read(window):
    status = dict(line.split(":\\t", 1) for line in pathlib.Path("/proc/self/status").read_text().splitlines() if ":\\t" in line)
    found = {
        "user": os.getuid(),
        "capabilities": int(status["CapEff"], 16) | int(status["CapBnd"], 16),
        "no new privileges": status["NoNewPrivs"].strip(),
        "networks": sorted(name for _, name in socket.if_nameindex()),
        "root": tried(lambda: pathlib.Path("/srv/evergreen/x").touch()),
        "input": tried(lambda: pathlib.Path("input/x").touch()),
        "tmp": tried(lambda: pathlib.Path("/tmp/x").touch()),
        "beside": sorted(os.listdir(pathlib.Path.cwd().parent)),
    }
    pathlib.Path("found").write_text(json.dumps(found))
    return []
"""


@pytest.mark.parametrize("runtime", ["docker", "door"], indirect=True)
def test_a_container_shares_its_folder_and_nothing_else(runtime, folder):
    """Not root, no capability, no network but its own loopback, nothing to write to but its folder and /tmp."""
    write(folder, LOOK)
    (folder.parent / "another").mkdir(exist_ok=True)
    runtime.launch(folder)
    assert runtime.join(folder, timeout_s=60)
    found = json.loads((folder / "found").read_text())
    assert found.pop("user") == (os.geteuid() or 65534)
    assert found == {
        "capabilities": 0,
        "no new privileges": "1",
        "networks": ["lo"],
        "root": "Read-only file system",
        "input": "Read-only file system",
        "tmp": "done",
        "beside": [folder.name],
    }


@pytest.mark.parametrize("runtime", ["docker", "door"], indirect=True)
def test_a_container_has_limits(runtime, folder):
    """One that takes more memory than it may is killed, and the machine is not."""
    write(folder, "def read(window):\n    held = [b'x' * 2**26 for _ in range(64)]\n    return []\n")
    spec = json.loads((folder / "job.json").read_text())
    spec["container"]["memory_bytes"] = 2**29
    (folder / "job.json").write_text(json.dumps(spec))
    runtime.launch(folder)
    assert runtime.join(folder, timeout_s=60)
    assert not (folder / "output" / "result.json").exists()


@pytest.mark.parametrize("runtime", ["docker", "door"], indirect=True)
def test_an_image_is_known_by_what_it_holds(runtime, image):
    """A name gives its digest or id, which names it as well; a name that nobody knows is an error with its fix."""
    assert re.search("sha256:[0-9a-f]{64}$", runtime.pinned(image))
    with pytest.raises(JobError, match=r"image evergreen/no-such-image:1: the container engine refuses") as caught:
        runtime.pinned("evergreen/no-such-image:1")
    assert "training.runtime" in caught.value.fix


def test_without_an_engine_the_fix_is_named(tmp_path, monkeypatch):
    """A socket that nobody listens at is a setting to be mended, and stops nothing else."""
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/no.sock")
    with pytest.raises(JobError, match="no container engine answers") as caught:
        docker.alive(tmp_path)
    assert "training.runtime: process" in caught.value.fix


@pytest.mark.parametrize("runtime", ["docker", "door"], indirect=True)
def test_a_job_in_a_container_is_adopted_cancelled_and_discarded(runtime, tmp_path):
    """Asked for again while it runs, it is the same container; in the end nothing is left of it."""
    settings = Settings.from_env({"EVERGREEN_HOME": str(tmp_path)})
    told = {"id": "a", "kind": "read", "pack": "demo", "call": "model:read", "timeout_s": 60, **CONTAINER}
    spec = jobs.JobSpec.model_validate(told | {"target": "y", "event_time": "t", "task": "binary", "gpus": 0})

    def fill(folder):
        (folder / "pack").mkdir()
        (folder / "pack" / "model.py").write_text(SLEEP)

    first, second = jobs.start(settings, spec, fill), jobs.start(settings, spec, fill)
    assert (first.found, second.found) == ("absent", "alive")
    jobs.cancel(second)
    with pytest.raises(JobError, match="ended without a result"):
        jobs.wait(first)
    jobs.discard(settings, "a")
    assert not runtime.alive(first.folder)
    assert not first.folder.exists()


@pytest.mark.parametrize("runtime", ["docker", "door"], indirect=True)
def test_links_that_a_container_leaves_are_not_followed(runtime, tmp_path):
    """It may name a file of the machine, which only the reader could open."""
    settings = Settings.from_env({"EVERGREEN_HOME": str(tmp_path)})
    told = {"id": "a", "kind": "read", "pack": "demo", "call": "model:read", "timeout_s": 60, **CONTAINER}
    spec = jobs.JobSpec.model_validate(told | {"target": "y", "event_time": "t", "task": "binary", "gpus": 0})

    def fill(folder):
        (folder / "pack").mkdir()
        (folder / "pack" / "model.py").write_text(
            "import os\ndef read(window):\n    os.symlink('/etc/hostname', 'progress.jsonl')\n    return []\n"
        )

    with pytest.raises(JobError, match=r"progress\.jsonl is neither a file nor a folder"):
        jobs.wait(jobs.start(settings, spec, fill))
    jobs.discard(settings, "a")
