"""What a training function is handed, and how jobs are started, found, waited for and removed."""

import json
import os
import time
from contextlib import suppress
from datetime import date
from unittest import mock

import numpy as np
import polars as pl
import pytest

from evergreen.data import partitions
from evergreen.errors import JobError, SourceError, TrainingError
from evergreen.pack import parse_instant
from evergreen.run import Window
from evergreen.settings import Settings
from evergreen.training import jobs
from evergreen.training.checkpoints import FolderCheckpoint
from evergreen.training.jobs import Handle, Job, JobSpec, TrainingData

WINDOW = Window(start=parse_instant("2013-01-01"), end=parse_instant("2013-01-02"))
FRAME = pl.DataFrame({"x": [1.0, 2.0], "n": [1, 2], "s": ["a", "b"], "y": [True, False]}).with_columns(
    day=pl.lit(WINDOW.start)
)
READ = "import pyarrow\ndef read(window):\n    yield pyarrow.table({'a': [1, 2]})\n"


@pytest.fixture
def settings(tmp_path):
    settings = Settings.from_env({"EVERGREEN_HOME": str(tmp_path)})
    yield settings
    jobs.discard(settings, "abc")


@pytest.fixture
def job(tmp_path):
    (tmp_path / "input" / "train").mkdir(parents=True)
    FRAME.write_parquet(tmp_path / "input" / "train" / "0.parquet")
    return Job(
        params={},
        seed=7,
        device="cpu",
        model_dir=tmp_path / "model",
        checkpoint=FolderCheckpoint(tmp_path / "checkpoint"),
        folder=tmp_path,
    )


def spec(**changes):
    base = JobSpec(
        id="abc",
        kind="read",
        pack="demo",
        call="model:read",
        target="y",
        event_time="day",
        task="binary",
        timeout_s=60,
        window=WINDOW,
    )
    return base.model_copy(update=changes)


def filling(source):
    def fill(folder):
        (folder / "pack").mkdir()
        (folder / "pack" / "model.py").write_text(source)

    return fill


def run(settings, source=READ, **changes):
    return jobs.wait(jobs.start(settings, spec(**changes), filling(source)))


def steps(job):
    return [json.loads(line)["step"] for line in (job.folder / "progress.jsonl").read_text().splitlines()]


def test_every_epoch_is_kept(job):
    """However quick the steps, each is a line of the training curve when there are at most a thousand."""
    for step in range(1, 51):
        job.progress(step, 50, loss=1 / step)
    assert steps(job) == list(range(1, 51))


def test_reports_for_every_batch_do_not_fill_the_disk(job):
    """Of twenty thousand quick reports about a thousand are written, the first and the last among them."""
    for step in range(1, 20_001):
        job.progress(step, 20_000, loss=1.0)
    written = steps(job)
    assert len(written) < 1200
    assert (written[0], written[-1]) == (1, 20_000)


def test_a_restarted_job_does_not_repeat_its_curve(job):
    """Going on from step 2 replaces what was reported of the steps after it, a half-written line included."""
    for step in (1, 2, 3):
        job.progress(step, 5, loss=1.0)
    with (job.folder / "progress.jsonl").open("a") as file:
        file.write('{"step": 4, "o')
    again = Job({}, 7, "cpu", job.model_dir, job.checkpoint, job.folder)
    for step in (3, 4, 5):
        again.progress(step, 5, loss=1.0)
    assert steps(job) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_loss_that_is_no_number_ends_the_training(job, value):
    """NaN and infinite metrics raise at once, with the step and what to try."""
    with pytest.raises(TrainingError, match=r"loss at step 3 of 9(?s:.)*learning rate"):
        job.progress(3, 9, loss=value)


def test_progress_tells_the_time_left(job):
    """The pace of the last reports gives the seconds left."""
    line = {"of": 10, "metrics": {"loss": 0.5}}
    lines = [json.dumps({"step": step, "time": 100.0 + 2 * step, **line}) for step in (1, 2, 3)]
    (job.folder / "progress.jsonl").write_text("\n".join(lines) + '\n{"step": 4, "o')
    now = jobs.progress(job.folder)
    assert (now.fraction, now.eta_s, now.metrics) == (0.3, 14.0, {"loss": 0.5})


def test_progress_is_read_from_the_end_of_a_long_curve(job):
    """Wherever the last few kilobytes begin, within a line too, the last report is found."""
    seen = []
    for step in range(1, 601):
        job.progress(step, 600, **{"loss" + "s" * (step % 7): 1 / step})
        seen.append(jobs.progress(job.folder).step)
    assert seen == list(range(1, 601))


def test_describe_takes_types_from_the_data(job):
    """The model's inputs carry canonical types."""
    job.describe(inputs=["s", "n", "x", "day", "y"], requirements=["numpy"])
    assert job.inputs == {"s": "string", "n": "int", "x": "float", "day": "datetime", "y": "bool"}


def test_describe_pins_what_is_installed(job):
    """Requirements are pinned without the local label that no index serves."""
    job.describe(inputs=["x"], requirements=["torch", "numpy"])
    assert [text.partition("==")[0] for text in job.requirements] == ["numpy", "torch"]
    assert not any("+" in text for text in job.requirements)


def test_describe_refuses_a_column_that_is_not_there(job):
    """The nearest name is in the message."""
    with pytest.raises(TrainingError, match=r"no column 'dya'(?s:.)*did you mean 'day'"):
        job.describe(inputs=["dya"], requirements=[])


def test_describe_refuses_a_distribution_that_is_not_there(job):
    """An import's name in place of a distribution's is refused."""
    with pytest.raises(TrainingError, match=r"no distribution 'sklearn'(?s:.)*scikit-learn"):
        job.describe(inputs=["x"], requirements=["sklearn"])


def test_describe_keeps_classes_as_json_has_them(job):
    """Numpy's numbers and truth values become Python's; the order stays, and so does the type."""
    for given in (["b", "1", "01"], np.array([3, 2**53 + 1, -1]), np.array([True, False]), [0.5, 2.0]):
        job.describe(inputs=["x"], requirements=[], classes=given)
        plain = [each.item() if isinstance(each, np.generic) else each for each in given]
        kept = json.loads(json.dumps(job.classes))
        assert (kept, list(map(type, kept))) == (plain, list(map(type, plain)))


@pytest.mark.parametrize(
    ("classes", "says"),
    [
        (["a", "b", "a"], "the class 'a' is there twice"),
        ([1, 2, True], "the class 'True' is there twice"),
        ([None, 1], "the class 'None' is a NoneType; a class is a bool, a number or a text"),
        ([0.5, float("nan")], "the class 'nan' is a float"),
        ([date(2024, 1, 1), date(2024, 1, 2)], "the class '2024-01-01' is a date"),
    ],
)
def test_describe_refuses_classes_that_are_not_kept_apart(job, classes, says):
    """What JSON has no value for, and what is equal to another."""
    with pytest.raises(TrainingError, match=says):
        job.describe(inputs=["x"], requirements=[], classes=classes)


def test_features_are_neither_target_nor_time(tmp_path, job):
    """A training function can take all features without leaking the target."""
    data = TrainingData(tmp_path / "input", target="y", event_time="day", task="binary")
    assert data.features == ["x", "n", "s"]


def test_training_rows_are_in_order_of_time(tmp_path):
    """Whatever the order of the files and of the rows within them."""
    (tmp_path / "train").mkdir()
    for name, hours in (("a", [3, 1]), ("b", [2, 0])):
        pl.DataFrame({"hour": hours, "y": hours}).write_parquet(tmp_path / "train" / f"{name}.parquet")
    data = TrainingData(tmp_path, target="y", event_time="hour", task="regression")
    assert data.train["y"].to_list() == [0, 1, 2, 3]


def test_a_job_leaves_its_result(settings):
    """What the function did is in the output folder, and the result says so."""
    handle = jobs.start(settings, spec(), filling(READ))
    result = jobs.wait(handle)
    assert (result.ok, result.metrics) == (True, {"rows": 2, "frames": 1})
    assert list(result.files) == ["frames/00000.arrow"]
    assert pl.read_ipc(handle.output / "frames" / "00000.arrow").rows() == [(1,), (2,)]


def test_a_finished_job_is_not_done_again(settings):
    """Asked for again, a finished job is found, not filled or started."""
    first = run(settings)
    again = jobs.start(settings, spec(), pytest.fail)
    assert again.found == "finished"
    assert jobs.wait(again) == first


def test_a_failed_job_may_try_again(settings):
    """A failure is not adopted: asking again starts the job again, on the inputs it has."""
    source = (
        "import pathlib\n"
        "def read(window):\n"
        "    mark = pathlib.Path('tried')\n"
        "    if not mark.exists():\n"
        "        mark.touch()\n"
        "        raise OSError('the line was cut')\n"
        "    return []\n"
    )
    with pytest.raises(SourceError, match="the line was cut"):
        run(settings, source)
    again = jobs.start(settings, spec(), pytest.fail)
    assert again.found == "dead"
    assert jobs.wait(again).ok


@pytest.mark.parametrize("victim", ["job.json", "inputs.json", "input/pack/model.py"])
def test_a_truncated_folder_is_made_anew(settings, victim):
    """A job whose description or inputs are not whole is not trusted, even when it has a result."""
    run(settings)
    file = settings.jobs / "abc" / victim
    file.write_bytes(file.read_bytes()[:-5])
    assert jobs.start(settings, spec(), filling(READ)).found == "absent"


@pytest.mark.parametrize("victim", ["result.json", "frames/00000.arrow"])
def test_a_truncated_output_is_made_again(settings, victim):
    """A result that cannot be read, or names a file that is not whole, is no result."""
    run(settings)
    file = settings.jobs / "abc" / "output" / victim
    file.write_bytes(file.read_bytes()[:-5])
    assert jobs.start(settings, spec(), pytest.fail).found == "dead"


def test_another_job_under_the_same_id_is_made_anew(settings):
    """The folder's description must be this very job's."""
    run(settings)
    again = jobs.start(settings, spec(seed=8), filling(READ))
    assert again.found == "absent"


def test_params_with_dates_and_tuples_are_the_same_job(settings):
    """What JSON cannot tell apart does not make another job."""
    params = {"since": WINDOW.start.date(), "sizes": (1, 2)}
    run(settings, params=params)
    assert jobs.start(settings, spec(params=params), pytest.fail).found == "finished"


def test_a_fill_that_fails_leaves_no_job(settings):
    """Inputs that could not be brought are brought anew next time."""

    def broken(folder):
        (folder / "half").touch()
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        jobs.start(settings, spec(), broken)
    assert jobs.start(settings, spec(), filling(READ)).found == "absent"


def test_an_error_of_the_pack_names_its_line(settings):
    """What escapes the pack's function is reported with file, line, code and log."""
    source = "def read(window):\n    rows = {}\n    yield rows['nothing']\n"
    with pytest.raises(SourceError) as caught:
        run(settings, source)
    assert "demo/model.py:3 in read: yield rows['nothing']" in str(caught.value)
    assert "KeyError" in str(caught.value)
    assert "log.txt" in caught.value.fix


def test_an_error_of_training_is_a_training_error(settings):
    """The class of the error says which part of the pack failed."""
    source = "def train(data, job):\n    job.progress(1, 2, loss=float('nan'))\n"
    with pytest.raises(TrainingError, match=r"NaN loss at step 1 of 2 \(demo/model\.py:2"):
        run(settings, source, kind="train", call="model:train", window=None)


def test_a_job_that_dies_shows_its_last_words(settings):
    """A process that ends without a result is a JobError with the end of its log and the log's path."""
    with pytest.raises(JobError, match=r"without a result(?s:.)*log\.txt(?s:.)*\| farewell"):
        run(settings, "import os\ndef read(window):\n    print('farewell')\n    os._exit(3)\n")


def test_a_job_past_its_time_is_ended(settings):
    """The job ends itself, and says where to give it more time."""
    with pytest.raises(JobError, match=r"ran past its 0\.5 s(?s:.)*training\.timeout"):
        run(settings, "import time\ndef read(window):\n    time.sleep(600)\n", timeout_s=0.5)


def test_a_job_that_cannot_end_itself_is_ended(settings):
    """A job long past its time, stopped or stuck in native code, is ended by whoever waits for it."""
    handle = jobs.start(settings, spec(timeout_s=600), filling("import time\ndef read(window):\n    time.sleep(600)\n"))
    known = handle.folder / "pid.json"
    known.write_text(json.dumps(json.loads(known.read_text()) | {"at": 0.0}))
    with pytest.raises(JobError, match="ran past 600 s"):
        jobs.wait(handle)


def test_progress_is_shown_while_waiting(settings):
    """Whoever waits sees the last report."""
    source = "def train(data, job):\n    job.progress(1, 2, loss=0.5)\n    job.progress(2, 2, loss=0.25)\n    1 / 0\n"
    seen = []
    handle = jobs.start(settings, spec(kind="train", call="model:train", window=None), filling(source))
    with pytest.raises(TrainingError, match="ZeroDivisionError"):
        jobs.wait(handle, seen.append)
    assert (seen[-1].step, seen[-1].metrics) == (2, {"loss": 0.25})


def test_a_discarded_job_is_gone(settings):
    """Its folder is removed; discarding once more is no error."""
    run(settings)
    jobs.discard(settings, "abc")
    jobs.discard(settings, "abc")
    assert not (settings.jobs / "abc").exists()


FAILS = "def read(window):\n    raise OSError('the line was cut')\n"


def left(settings, job_id, days, source=READ, **changes):
    """A job that ended, `days` ago by the times of its files."""
    with suppress(SourceError):
        run(settings, source, id=job_id, **changes)
    age(settings.jobs / job_id, days)


def age(folder, days):
    then = time.time() - days * 86400
    for path in [*folder.rglob("*"), folder]:
        os.utime(path, (then, then))


def kept(settings):
    """The folders that are there after another job of `demo` has started."""
    run(settings)
    return sorted(folder.name for folder in settings.jobs.glob("*/") if folder.name != "abc")


def test_jobs_of_this_pack_that_ended_long_ago_are_swept_away(settings):
    """After 7 days where the work was done, after 30 where it failed, and another pack's jobs are its own to sweep."""
    left(settings, "done-8", 8)
    left(settings, "done-6", 6)
    left(settings, "failed-31", 31, FAILS)
    left(settings, "failed-29", 29, FAILS)
    left(settings, "other-31", 31, pack="other")
    half = settings.jobs / "half-filled"
    half.mkdir()
    age(half, 31)
    assert kept(settings) == ["done-6", "failed-29", "other-31"]


def test_a_job_that_runs_is_never_swept_away(settings):
    """However old its files are, and whatever was left of an earlier attempt."""
    source = "import time\ndef read(window):\n    time.sleep(600)\n"
    handle = jobs.start(settings, spec(id="alive", timeout_s=900), filling(source))
    try:
        age(handle.folder, 40)
        with mock.patch.object(jobs, "USED", ("job.json",)):  # not the heartbeat, which tells too
            assert kept(settings) == ["alive"]
    finally:
        jobs.discard(settings, "alive")


def test_a_job_that_somebody_is_busy_with_is_not_swept_away(settings):
    """A folder that is held is passed over, not waited for."""
    left(settings, "busy", 8)
    with jobs._claimed(settings.jobs / "busy"):
        assert kept(settings) == ["busy"]
    jobs.sweep(settings, "demo")
    assert not (settings.jobs / "busy").exists()


def test_an_old_job_that_was_adopted_is_not_swept_away(settings):
    """A retry after more than a week finds the work done, and still there when the next job of the stage starts."""
    left(settings, "adopted", 8)
    assert jobs.start(settings, spec(id="adopted"), pytest.fail).found == "finished"
    assert kept(settings) == ["adopted"]


def test_an_id_cannot_leave_the_jobs_folder():
    """An id with a path in it is refused."""
    with pytest.raises(ValueError, match="id"):
        JobSpec.model_validate(spec().model_dump() | {"id": "../elsewhere"})


def test_waiting_for_a_folder_without_a_job_says_so(settings, tmp_path):
    """A handle to nothing ends in an error, not in waiting."""
    with pytest.raises(JobError, match="without a result"):
        jobs.wait(Handle(folder=tmp_path / "nothing", spec=spec(), found="alive"))


@pytest.mark.parametrize("name", ["a[b]", "what?", "all*", "{a,b}"])
def test_a_folder_whose_name_is_a_pattern(tmp_path, name):
    """What a job reads lies in the folder of that very name, not in those that the pattern would match."""
    folder = tmp_path / name / "train"
    folder.mkdir(parents=True)
    rows = pl.DataFrame({"at": [WINDOW.start], "x": [1]})
    rows.write_parquet(folder / "20240101T00.parquet")
    data = TrainingData(tmp_path / name, target="x", event_time="at", task="regression")
    assert data.train.equals(rows)
    assert jobs.column_types(folder) == {"at": "datetime", "x": "int"}
    assert partitions.load([folder / "20240101T00.parquet"]).equals(rows)
