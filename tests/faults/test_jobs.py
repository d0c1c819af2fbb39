"""Bad luck with jobs: whatever is killed, and whoever asks twice, the end is that of an undisturbed run."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import polars as pl
import pytest

from evergreen.settings import Settings
from evergreen.training import jobs
from evergreen.training.jobs import JobSpec
from evergreen.training.runtimes import process

STEPS = 8
PACK = f'''
import json, time
import numpy as np
import safetensors.numpy

LOADER = """
from pathlib import Path
from safetensors.numpy import load_file

class Model:
    def __init__(self, weights):
        self.weights = weights

    def predict(self, frame):
        return 1 / (1 + 2.718 ** -(frame["x"].to_numpy() * self.weights["w"][0]))

def load(folder):
    return Model(load_file(Path(folder) / "weights.safetensors"))
"""

def train(data, job):
    """Stochastic descent that waits in step 5 until the job is let go on."""
    x, y = data.train["x"].to_numpy(), data.train["y"].to_numpy()
    kept = job.checkpoint.load()
    step, w = (kept[0], kept[1]["w"]) if kept else (0, np.zeros(1))
    print("begins after step", step)
    while step < {STEPS}:
        step += 1
        chosen = np.random.default_rng([job.seed, step]).integers(0, len(x), 32)
        gradient = np.mean((1 / (1 + np.exp(-w * x[chosen])) - y[chosen]) * x[chosen])
        w = w - 0.1 * gradient
        job.checkpoint.save(step, {{"w": w}}, {{}})
        job.progress(step, {STEPS}, gradient=gradient)
        while step == 5 and not (job.folder / "input" / "go").exists():
            time.sleep(0.01)
    safetensors.numpy.save_file({{"w": w}}, job.model_dir / "weights.safetensors")
    (job.model_dir / "loader.py").write_text(LOADER)
    job.describe(inputs=["x"], requirements=["numpy", "pandas", "safetensors"])
'''
SPEC = JobSpec(
    id="job",
    kind="train",
    pack="demo",
    call="model:train",
    target="y",
    event_time="t",
    task="binary",
    timeout_s=120,
    gpus=0,
)
CALLER = """
import sys
from pathlib import Path
from evergreen.settings import Settings
from evergreen.training import jobs
from evergreen.training.jobs import JobSpec
home, spec, filled, ready = sys.argv[1:]
def fill(folder):
    import shutil
    shutil.copytree(filled, folder, dirs_exist_ok=True)
print("ready", flush=True)
if ready == "wait for a word":
    sys.stdin.readline()
handle = jobs.start(Settings.from_env({"EVERGREEN_HOME": home}), JobSpec.model_validate_json(spec), fill)
print(handle.found, flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def settings(tmp_path):
    settings = Settings.from_env({"EVERGREEN_HOME": str(tmp_path / "home")})
    yield settings
    jobs.discard(settings, SPEC.id)


def fill(folder):
    (folder / "pack").mkdir()
    (folder / "pack" / "model.py").write_text(PACK)
    rows = pl.DataFrame(
        {"x": [n / 50 - 1 for n in range(100)], "y": [n >= 50 for n in range(100)], "t": list(range(100))}
    )
    for name in ("train", "validation"):
        (folder / name).mkdir()
        rows.write_parquet(folder / name / "0.parquet")


def undisturbed(tmp_path):
    """The model's files, by name, of a run that nothing happens to."""

    def fill_and_go(folder):
        fill(folder)
        (folder / "go").touch()

    calm = Settings.from_env({"EVERGREEN_HOME": str(tmp_path / "calm")})
    handle = jobs.start(calm, SPEC, fill_and_go)
    jobs.wait(handle)
    return files(handle)


def files(handle):
    return {file.name: file.read_bytes() for file in (handle.output / "model").iterdir()}


def let_go(handle):
    (handle.folder / "input" / "go").touch()


def pid(handle):
    return json.loads((handle.folder / "pid.json").read_text())["pid"]


def kill(handle):
    """SIGKILL to the job's own process; it is dead afterwards, its children are not."""
    os.kill(pid(handle), signal.SIGKILL)
    assert process.join(handle.folder, timeout_s=30)


def begins(handle):
    lines = (handle.folder / "log.txt").read_text().splitlines()
    return [int(line.rpartition(" ")[2]) for line in lines if line.startswith("begins")]


def until(condition):
    """Wait for a condition; a test that waits for half a minute has failed."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def reached(handle, step):
    def there():
        now = jobs.progress(handle.folder)
        return now is not None and now.step >= step

    return there


def caller(tmp_path, ready="at once", code=CALLER):
    """Another process that asks for the job."""
    filled = tmp_path / "filled"
    if not filled.exists():
        filled.mkdir()
        fill(filled)
    return subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "home"), SPEC.model_dump_json(), str(filled), ready],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_a_job_killed_in_training_goes_on_from_its_checkpoint(settings, tmp_path):
    """After SIGKILL and a new start, the model has the very bytes and the curve has the steps of an undisturbed run."""
    first = jobs.start(settings, SPEC, fill)
    until(reached(first, 5))
    kill(first)
    second = jobs.start(settings, SPEC, pytest.fail)
    let_go(second)
    jobs.wait(second)
    assert (second.found, begins(second)) == ("dead", [0, 5])
    assert files(second) == undisturbed(tmp_path)
    curve = (second.folder / "progress.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in curve] == list(range(1, STEPS + 1))


def test_a_job_whose_last_checkpoint_is_torn_goes_on_from_the_one_before(settings, tmp_path):
    """A checkpoint cut short by the kill costs a step, not the result."""
    first = jobs.start(settings, SPEC, fill)
    until(reached(first, 5))
    kill(first)
    torn = max((first.folder / "checkpoint").glob("*.safetensors"))
    torn.write_bytes(torn.read_bytes()[:-4])
    second = jobs.start(settings, SPEC, pytest.fail)
    let_go(second)
    jobs.wait(second)
    assert begins(second) == [0, 4]
    assert files(second) == undisturbed(tmp_path)


def test_a_job_outlives_the_task_that_started_it(settings, tmp_path):
    """The task's process group is killed; the next try finds the job at work and takes its result."""
    task = caller(tmp_path)
    assert [task.stdout.readline(), task.stdout.readline()] == ["ready\n", "absent\n"]
    os.killpg(task.pid, signal.SIGKILL)
    task.communicate()
    handle = jobs.start(settings, SPEC, pytest.fail)
    let_go(handle)
    assert jobs.wait(handle).ok
    assert (handle.found, begins(handle)) == ("alive", [0])


def test_a_task_killed_before_it_could_note_the_process_starts_no_second(settings, tmp_path):
    """Killed between starting the process and writing down which it is, the task leaves a job that is found all the same."""
    dies = (
        "import os\nfrom evergreen.training.runtimes import process\nprocess.record = lambda *_: os._exit(9)\n" + CALLER
    )
    task = caller(tmp_path, code=dies)
    task.communicate()
    handle = jobs.start(settings, SPEC, pytest.fail)
    let_go(handle)
    assert jobs.wait(handle).ok
    assert (task.returncode, handle.found, begins(handle)) == (9, "alive", [0])


def test_of_callers_at_once_one_starts_the_job(settings, tmp_path):
    """Three processes ask at the same moment: one starts the job, the others find it alive."""
    callers = [caller(tmp_path, ready="wait for a word") for _ in range(3)]
    for each in callers:
        assert each.stdout.readline() == "ready\n"
    for each in callers:
        each.stdin.write("go\n")
        each.stdin.flush()
    found = sorted(each.stdout.readline().strip() for each in callers)
    for each in callers:
        each.communicate()
    handle = jobs.start(settings, SPEC, pytest.fail)
    let_go(handle)
    jobs.wait(handle)
    assert found == ["absent", "alive", "alive"]
    assert begins(handle) == [0]


def test_a_caller_killed_while_it_fills_leaves_nothing_to_trust(settings, tmp_path):
    """Half-brought inputs are brought anew."""
    dies = CALLER.replace("dirs_exist_ok=True)", "dirs_exist_ok=True)\n    __import__('os')._exit(9)")
    task = caller(tmp_path, code=dies)
    task.communicate()
    handle = jobs.start(settings, SPEC, fill)
    let_go(handle)
    assert (task.returncode, handle.found, jobs.wait(handle).ok) == (9, "absent", True)


def test_an_interrupt_while_waiting_leaves_the_job_at_work(settings, tmp_path):
    """Ctrl-C ends the waiting; asked for again, the job is alive and goes on."""
    first = jobs.start(settings, SPEC, fill)

    def interrupt(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        jobs.wait(first, interrupt)
    second = jobs.start(settings, SPEC, pytest.fail)
    let_go(second)
    assert (second.found, jobs.wait(second).ok) == ("alive", True)


def test_a_cancelled_job_is_ended_and_may_go_on_later(settings, tmp_path):
    """Cancelling ends the process and keeps the checkpoint."""
    first = jobs.start(settings, SPEC, fill)
    until(reached(first, 5))
    jobs.cancel(first)
    gone = not process.alive(first.folder)
    second = jobs.start(settings, SPEC, pytest.fail)
    let_go(second)
    jobs.wait(second)
    assert (gone, begins(second)) == (True, [0, 5])


def test_what_a_killed_job_left_running_is_ended_first(settings, tmp_path):
    """Children of a killed job are ended before the job goes on, so that they cannot write beside it."""
    forks = PACK.replace(
        "    x, y =",
        "    import os, subprocess\n    child = subprocess.Popen(['sleep', '600'])\n"
        "    with open('children', 'a') as file: file.write(f'{child.pid}\\n')\n    x, y =",
    )

    def fill_forks(folder):
        fill(folder)
        (folder / "pack" / "model.py").write_text(forks)

    first = jobs.start(settings, SPEC, fill_forks)
    until(reached(first, 5))
    child = int((first.folder / "children").read_text())
    kill(first)
    assert Path(f"/proc/{child}/exe").exists()
    second = jobs.start(settings, SPEC, pytest.fail)
    assert not Path(f"/proc/{child}/exe").exists()
    let_go(second)
    assert jobs.wait(second).ok
