"""What the job's entry does, each in a process of its own, as in life."""

import ast
import io
import json
import math
import pickle
import zipfile
from datetime import UTC, datetime, timedelta

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
import safetensors.numpy

from evergreen import conversion
from evergreen.errors import EvaluationError, PackError, SourceError, TrainingError
from evergreen.pack import parse_instant
from evergreen.run import Window
from evergreen.runner import _frames, check_model_folder, checked_predictions
from evergreen.settings import Settings
from evergreen.training import jobs
from evergreen.training.jobs import JobSpec

ROWS = pl.DataFrame({"x": [0.1, 0.2, 0.9, 0.8], "carrier": ["AA", "B6", None, "AA"], "y": [False, False, True, True]})
ROWS = ROWS.with_columns(t=pl.int_range(4))
LOADER = """
import json
from pathlib import Path

class Model:
    def __init__(self, weight):
        self.weight = weight

    def predict(self, frame):
        return PREDICTION

def load(folder):
    return Model(json.loads((Path(folder) / "weight.json").read_text()))
"""
TRAIN = f"""
import json, random
import numpy as np
LOADER = {LOADER.replace("PREDICTION", 'frame["x"].to_numpy() * self.weight')!r}

def train(data, job):
    weight = float(data.train["x"].mean()) + 0.1 * random.random() + 0.1 * np.random.rand()
    job.progress(1, 1, loss=weight)
    (job.model_dir / "weight.json").write_text(json.dumps(weight))
    (job.model_dir / "loader.py").write_text(LOADER)
"""


@pytest.fixture
def settings(tmp_path):
    return Settings.from_env({"EVERGREEN_HOME": str(tmp_path)})


def finish(settings, kind, fill, **changes):
    """A job of this kind, done; its handle and its result."""
    base = JobSpec(id="job", kind=kind, pack="demo", target="y", event_time="t", task="binary", timeout_s=60, gpus=0)
    handle = jobs.start(settings, base.model_copy(update=changes), fill)
    return handle, jobs.wait(handle)


def read(settings, source, **files):
    def fill(folder):
        (folder / "pack").mkdir()
        for name, text in {"model": source, **files}.items():
            (folder / "pack" / f"{name}.py").write_text(text)

    window = Window(start=parse_instant("2013-01-01"), end=parse_instant("2013-01-02"))
    return finish(settings, "read", fill, call="model:read", window=window)


def train(settings, source=TRAIN, **changes):
    def fill(folder):
        (folder / "pack").mkdir()
        (folder / "pack" / "model.py").write_text(source)
        for name in ("train", "validation"):
            (folder / name).mkdir()
            ROWS.write_parquet(folder / name / "0.parquet")

    return finish(settings, "train", fill, **{"call": "model:train", **changes})


INPUTS = {"x": "float", "carrier": "string", "t": "int"}


def score(settings, prediction, sample=None, stated=None, **changes):
    """The predictions of a model whose `predict` returns this expression; `sample`: rows, and what is told of them.

    `stated`: more of the folder's model.json.
    """

    def fill(folder):
        (folder / "model").mkdir()
        (folder / "model" / "weight.json").write_text("1.0")
        (folder / "model" / "loader.py").write_text(LOADER.replace("PREDICTION", prediction))
        inputs = {name: kind for name, kind in INPUTS.items() if sample is None or name in sample[0].columns}
        described = {"task": "binary", "inputs": inputs, "dtypes": "nullable", "requirements": []}
        described |= stated or {}
        (folder / "model" / "model.json").write_text(json.dumps(described))
        (folder / "rows").mkdir()
        ROWS[:3].drop("y").write_parquet(folder / "rows" / "0.parquet")
        ROWS[3:].drop("y").write_parquet(folder / "rows" / "1.parquet")
        if sample is not None:
            rows, told = sample
            (folder / "samples" / "0").mkdir(parents=True)
            rows.write_parquet(folder / "samples" / "0" / "rows.parquet")
            told = {"columns": rows.columns, "partners": [*range(1, rows.height), 0], "budget_s": 60.0} | told
            (folder / "samples" / "0" / "sample.json").write_text(json.dumps(told))

    handle, result = finish(settings, "score", fill, **changes)
    return pl.read_parquet(handle.output / "predictions.parquet"), result


# read


def test_frames_of_every_library_are_taken(settings):
    """Frames of polars, pandas and pyarrow become Arrow files, in the order they were yielded."""
    source = (
        "import pandas, polars, pyarrow\n"
        "def read(window):\n"
        "    yield polars.DataFrame({'a': [1], 's': ['x']})\n"
        "    yield pandas.DataFrame({'a': [2], 's': ['y']}, index=[9])\n"
        "    yield pyarrow.table({'a': [3], 's': ['z']})\n"
    )
    handle, result = read(settings, source)
    frames = [pa.ipc.open_file(file).read_all() for file in sorted((handle.output / "frames").iterdir())]
    assert [frame.to_pylist() for frame in frames] == [[{"a": n, "s": s}] for n, s in ((1, "x"), (2, "y"), (3, "z"))]
    assert result.metrics == {"rows": 3, "frames": 3}


def test_whole_numbers_that_pandas_has_rounded_are_refused(settings):
    """A pandas frame whose ids are floats, as they are where one is missing, is refused in the job that reads it."""
    source = "import pandas\ndef read(window):\n    yield pandas.DataFrame({'id': [2**53 + 1, None]})\n"
    with pytest.raises(SourceError, match="model:read: frame 1: column 'id' holds whole numbers as floats") as caught:
        read(settings, source)
    assert "Int64" in caught.value.fix


def test_the_window_reaches_the_function(settings):
    """`read` is handed the window it is asked for, with aware times."""
    source = "import pyarrow\ndef read(window):\n    yield pyarrow.table({'t': [window.start, window.end]})\n"
    handle, _ = read(settings, source)
    assert pl.read_ipc(handle.output / "frames" / "00000.arrow")["t"].to_list() == [
        parse_instant("2013-01-01"),
        parse_instant("2013-01-02"),
    ]


def test_files_of_a_pack_may_import_one_another(settings):
    """The pack's folder comes first, whatever the sibling's name is elsewhere."""
    source = "from columns import NAMES\nimport pyarrow\ndef read(window):\n    yield pyarrow.table({n: [1] for n in NAMES})\n"
    _, result = read(settings, source, columns="NAMES = ['a', 'b']\n")
    assert result.ok


def test_what_is_no_frame_is_refused(settings):
    """The message names the type that was yielded."""
    with pytest.raises(SourceError, match=r"model:read yielded builtins\.dict(?s:.)*polars, pandas or pyarrow"):
        read(settings, "def read(window):\n    yield {'a': [1]}\n")


def test_returning_nothing_is_refused(settings):
    """A function that forgot to yield is told so."""
    with pytest.raises(SourceError, match="model:read returned NoneType"):
        read(settings, "def read(window):\n    pass\n")


def test_a_function_that_is_not_there_is_a_pack_error(settings):
    """The nearest name of the file is in the message."""
    with pytest.raises(PackError, match=r"has no function 'read'(?s:.)*did you mean 'reads'"):
        read(settings, "def reads(window):\n    pass\n")


def test_a_pack_that_is_not_python_names_its_line(settings):
    """A syntax error is reported in the pack's own file."""
    with pytest.raises(SourceError, match=r"SyntaxError(?s:.)*demo/model\.py:2: def read"):
        read(settings, "\ndef read(window:\n    pass\n")


def test_leaving_by_exit_is_a_failure(settings):
    """`sys.exit(0)` within a pack does not pass for success."""
    with pytest.raises(SourceError, match="SystemExit"):
        read(settings, "import sys\ndef read(window):\n    sys.exit(0)\n")


# train


def test_a_model_folder_describes_itself(settings):
    """`model.json` says the task, the raw columns with their types, and what to install; the target is not among them."""
    handle, result = train(settings)
    described = json.loads((handle.output / "model" / "model.json").read_text())
    assert described["task"] == "binary"
    assert described["inputs"] == {"x": "float", "carrier": "string", "t": "int"} == result.inputs
    assert [text.partition("==")[0] for text in described["requirements"]] == ["numpy", "pandas"]
    assert result.metrics.keys() == {"loss"}


def test_the_snapshots_types_are_declared(settings):
    """A column that has no value, or only whole numbers, in the training window has the type of the whole snapshot."""
    described = "    job.describe(inputs=['x', 'carrier', 't'], requirements=['numpy'])\n"
    columns = {"x": "float", "carrier": "string", "t": "float", "y": "bool"}
    handle, result = train(settings, TRAIN + described, columns=columns)
    described = json.loads((handle.output / "model" / "model.json").read_text())
    assert described["inputs"] == {"x": "float", "carrier": "string", "t": "float"} == result.inputs
    assert described["dtypes"] == "nullable"


def test_the_same_seed_gives_the_same_bytes(settings):
    """Two jobs that differ in their id only leave equal model folders, random draws included."""
    models = [train(settings, id=name)[0].output / "model" for name in ("one", "two")]
    one, two = ({file.name: file.read_bytes() for file in model.iterdir()} for model in models)
    assert one == two


def test_the_target_is_no_input(settings):
    """A model that would need the target to predict it is refused."""
    source = TRAIN + "    job.describe(inputs=['x', 'y'], requirements=['numpy'])\n"
    with pytest.raises(TrainingError, match="takes 'y', the target"):
        train(settings, source)


def test_training_without_a_loader_is_refused(settings):
    """The message says what the folder holds instead."""
    with pytest.raises(TrainingError, match=r"left no loader\.py in job\.model_dir \(weights\.json\)"):
        train(settings, "def train(data, job):\n    (job.model_dir / 'weights.json').write_text('1')\n")


def archive(name):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        file.writestr(name, b"x")
    return content.getvalue()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model.pkl", b""),
        ("model.joblib", b"anything"),
        ("weights.bin", pickle.dumps({"w": [1.0]}, protocol=2)),
        ("deep/weights.bin", pickle.dumps(np.ones(3), protocol=5)),
        ("weights.zip", archive("archive/data.pkl")),
    ],
)
def test_a_pickle_is_refused(tmp_path, name, content):
    """By its name or by its bytes, whatever it is called."""
    file = tmp_path / "model" / name
    file.parent.mkdir(parents=True)
    (tmp_path / "model" / "loader.py").touch()
    file.write_bytes(content)
    with pytest.raises(TrainingError, match=f"{name} of the model folder is a pickle"):
        check_model_folder(tmp_path / "model", tmp_path)


def test_safetensors_are_no_pickle(tmp_path):
    """Weights pass, those too whose header's length makes them begin with a pickle's first bytes."""
    (tmp_path / "loader.py").touch()
    files = (safetensors.numpy.save({"w": np.ones(3)}, metadata={"note": "n" * size}) for size in range(1000))
    weights = next(content for content in files if content.startswith(b"\x80\x02"))
    (tmp_path / "weights.safetensors").write_bytes(weights)
    check_model_folder(tmp_path, tmp_path.parent)


def test_an_archive_without_pickles_passes(tmp_path):
    """Zips as such are welcome: skops is one."""
    (tmp_path / "loader.py").touch()
    (tmp_path / "tree.skops").write_bytes(archive("schema.json"))
    check_model_folder(tmp_path, tmp_path.parent)


def test_caches_are_removed(tmp_path):
    """Compiled files, which hold times and paths, are no part of a model."""
    (tmp_path / "part" / "__pycache__").mkdir(parents=True)
    (tmp_path / "loader.py").touch()
    check_model_folder(tmp_path, tmp_path)
    assert not (tmp_path / "part" / "__pycache__").exists()


def test_a_model_that_names_its_job_folder_is_refused(settings):
    """An absolute path in a model folder would be gone when the model is used."""
    source = TRAIN + "    (job.model_dir / 'config.json').write_text(json.dumps({'at': str(job.model_dir)}))\n"
    with pytest.raises(TrainingError, match=r"config\.json of the model folder names"):
        train(settings, source)


def test_a_link_in_a_model_folder_is_refused(tmp_path):
    """A model folder is complete in itself."""
    (tmp_path / "loader.py").touch()
    (tmp_path / "weights.json").symlink_to("/etc/hostname")
    with pytest.raises(TrainingError, match=r"weights\.json of the model folder is a link"):
        check_model_folder(tmp_path, tmp_path)


# score


def test_predictions_follow_the_rows(settings):
    """One prediction for each row, over all files, in their order."""
    predictions, result = score(settings, 'frame["x"].to_numpy() * self.weight')
    assert predictions["prediction"].to_list() == ROWS["x"].to_list()
    assert result.metrics["rows"] == 4


def test_single_rows_are_timed(settings):
    """The latencies are those of predicting one row, as a client would."""
    source = "__import__('time').sleep(0.002 if len(frame) == 1 else 0.5) or [0.5] * len(frame)"
    _, result = score(settings, source)
    assert 2 <= result.metrics["latency_p50_ms"] <= result.metrics["latency_p95_ms"] < 500


def permuted(settings):
    """What a job wrote of its sample, one array after another."""
    found = []
    with (settings.jobs / "job" / "output" / "samples" / "0.npy").open("rb") as file:
        while True:
            try:
                found.append(np.load(file).tolist())
            except EOFError:
                return found


def test_samples_are_predicted_as_they_are_and_with_one_column_permuted_at_a_time(settings):
    """In the order that is told; the rows' own predictions and number stay theirs."""
    rows = pl.DataFrame({"x": [0.1, 0.2], "z": [1.0, 2.0], "t": [0, 1]})
    source = "frame['x'].to_numpy() + (10 * frame['z'].to_numpy() if 'z' in frame else 0)"
    predictions, result = score(settings, source, (rows, {"columns": ["z", "x"]}), task="regression")
    for found, expected in zip(permuted(settings), [[10.1, 20.2], [20.1, 10.2], [10.2, 20.1]], strict=True):
        assert found == pytest.approx(expected)
    assert predictions["prediction"].to_list() == ROWS["x"].to_list()
    assert (result.metrics["rows"], result.notes) == (4, {})


def test_a_column_of_any_type_is_permuted_and_put_back(settings):
    """The model sees the types that it sees in the rows as they are, missing values among them."""
    day = datetime(2024, 1, 1, tzinfo=UTC)
    rows = pl.DataFrame(
        {
            "float": [0.5, None, 2.0],
            "int": [1, 2, 3],
            "gaps": [1, None, 3],
            "bool": [True, False, True],
            "text": ["a", None, "c"],
            "nothing": [None, None, None],
            "time": [day, None, day + timedelta(days=1)],
            "date": [day.date(), day.date(), None],
            "^.*$": ["b", "c", "d"],
        }
    ).with_columns(category=pl.col("text").cast(pl.Categorical))
    source = "print(frame.dtypes.to_dict(), frame.map(str).values.tolist()) or [0.5] * len(frame)"
    score(settings, source, (rows, {}))
    seen = [line for line in (settings.jobs / "job" / "log.txt").read_text().splitlines() if "category" in line]
    types, values = zip(*(line.split("} ", 1) for line in seen), strict=True)
    values = [ast.literal_eval(each) for each in values]
    assert len(set(types)) == 1
    for place, shuffled in enumerate(values[1:]):
        expected = [list(row) for row in values[0]]
        for row, partner in zip(expected, (1, 2, 0), strict=True):
            row[place] = values[0][partner][place]
        assert shuffled == expected, rows.columns[place]


def test_one_frame_serves_all_columns_of_a_sample(settings):
    """A wide table takes the memory of one frame, however many columns it has."""
    rows = pl.DataFrame({f"x{n}": [0.1, 0.2] for n in range(50)})
    score(settings, "[float(id(frame))] * len(frame)", (rows, {}), task="regression")
    assert len({prediction for found in permuted(settings) for prediction in found}) == 1


def test_a_model_that_refuses_shuffled_rows_keeps_its_other_columns(settings):
    """The note names the column and the error; the job succeeds."""
    rows = pl.DataFrame({"x": [1.0, 2.0], "y": [1.0, 2.0], "z": [1.0, 2.0]})
    source = "frame['x' if 'z' not in frame else 'z' if frame['y'].is_monotonic_increasing else 1 / 0].to_numpy()"
    _, result = score(settings, source, (rows, {}), task="regression")
    assert permuted(settings) == [[1.0, 2.0], [1.0, 2.0], [], [2.0, 1.0]]
    assert result.notes == {"0": "the model fails where 'y' is shuffled: ZeroDivisionError: division by zero"}


def test_a_sample_ends_when_its_time_is_used_up(settings):
    """What is left out is said; the predictions and the job are as they would be."""
    rows = pl.DataFrame({"x": [0.1, 0.2], "z": [1.0, 2.0]})
    source = "__import__('time').sleep(0.5 * (len(frame) == 2)) or frame['x'].to_numpy()"
    _, result = score(settings, source, (rows, {"budget_s": 0.75}))
    assert permuted(settings) == [[0.1, 0.2], [0.2, 0.1]]
    assert result.notes == {"0": "the 1 s that it may take were used up"}


def test_nothing_is_kept_of_a_model_that_changes_its_frame_now_and_then(settings):
    """What one column's turn left in the frame would stand in the next one's."""
    rows = pl.DataFrame({"x": [0.1, 0.2], "z": [5.0, 5.0]})
    source = "frame['x'].to_numpy() if frame.columns[-1] != 'z' else frame.pop('z').to_numpy() / 10"
    _, result = score(settings, source, (rows, {}))
    assert permuted(settings) == []
    assert result.notes == {"0": "the model changes the frame that it predicts from"}


def test_rows_of_a_wide_table_are_predicted_in_several_frames(settings, tmp_path, monkeypatch):
    """Each has the types that the columns have over all rows; the predictions are those of one frame."""
    for name, frame in (("a", ROWS[:3]), ("b", ROWS[3:].with_columns(x=pl.lit(None)))):
        frame.write_parquet(tmp_path / f"{name}.parquet")
    files = sorted(tmp_path.glob("*.parquet"))

    def to_frame(table, first_row):
        described = {"inputs": INPUTS | {"y": "bool"}, "dtypes": "nullable"}
        return conversion.from_arrow(table, described, first_row=first_row)

    whole = list(_frames(files, to_frame))
    monkeypatch.setattr("evergreen.runner.FRAME_CELLS", 1)
    parts = list(_frames(files, to_frame))
    assert ([len(each) for each in whole], [len(each) for each in parts]) == ([4], [3, 1])
    assert pd.concat(parts, ignore_index=True).equals(whole[0])
    assert all(each.dtypes.equals(whole[0].dtypes) for each in parts)


@pytest.mark.parametrize(
    "labels", [["b", "a", "a", "c"], [2, -1, 2, 999], [True, False, True, True], [1.5, 0.5, 0.5, 2.0]]
)
def test_a_multiclass_model_states_its_classes(settings, labels, monkeypatch):
    """In its folder and its result: the sorted values of the target, each of its type."""
    monkeypatch.setitem(globals(), "ROWS", ROWS.with_columns(y=pl.Series(labels)))
    handle, result = train(settings, task="multiclass")
    stated = json.loads((handle.output / "model" / "model.json").read_text())["classes"]
    assert stated == list(result.classes) == sorted(set(labels))
    assert [type(each) for each in stated] == [type(each) for each in result.classes] == [type(labels[0])] * len(stated)


def test_other_models_state_no_classes(settings):
    """A binary model's folder is as it was; stating classes for it is refused."""
    handle, result = train(settings)
    assert "classes" not in json.loads((handle.output / "model" / "model.json").read_text())
    assert result.classes is None
    stated = TRAIN + "    job.describe(inputs=['x'], requirements=[], classes=[False, True])\n"
    with pytest.raises(TrainingError, match="only a multiclass model has classes"):
        train(settings, stated, id="stated")


def test_classes_have_a_column_each(settings):
    """Predictions of k classes are k columns."""
    predictions, _ = score(settings, "[[0.5, 0.25, 0.25]] * len(frame)", task="multiclass")
    assert predictions.columns == ["prediction_0", "prediction_1", "prediction_2"]
    assert predictions.row(3) == (0.5, 0.25, 0.25)


def test_a_model_has_as_many_columns_as_classes(settings):
    """Else it is refused, by the number of classes that its own folder states."""
    with pytest.raises(EvaluationError, match="the model of demo returned 3 columns, and it has 4 classes"):
        score(settings, "[[0.5, 0.25, 0.25]] * len(frame)", task="multiclass", stated={"classes": list("abcd")})


def test_a_model_sees_raw_columns(settings):
    """Strings arrive as strings, and missing ones as missing."""
    source = "[1.0 if isinstance(c, str) else 0.0 for c in frame['carrier']]"
    assert score(settings, source)[0]["prediction"].to_list() == [1.0, 1.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("prediction", "task", "message"),
    [
        ([0.5] * 3, "binary", "returned 3 predictions for 4 rows"),
        (0.5, "regression", "returned a single number for 4 rows"),
        ([[0.5, 0.5]] * 4, "binary", r"predictions of shape \(4, 2\)"),
        ([0.5] * 4, "multiclass", r"predictions of shape \(4,\)"),
        ([0.5, math.nan, 0.5, math.nan], "regression", "nan for row 1, and 2 such values"),
        ([0.5, 0.5, 1.5, 0.5], "binary", r"1\.5 for row 2"),
    ],
)
def test_predictions_that_are_not_what_was_asked_for_are_refused(prediction, task, message):
    """Number, shape, finiteness and range: the message says what came."""
    spec = JobSpec(id="job", kind="score", pack="demo", target="y", event_time="t", task=task, timeout_s=60)
    with pytest.raises(EvaluationError, match=message):
        checked_predictions(prediction, 4, spec)


def test_a_model_that_changes_its_frame_is_refused(settings):
    """Predicting leaves the client's rows as they are; the message names the columns."""
    with pytest.raises(EvaluationError, match=r"changes the frame it predicts from: x"):
        score(settings, "frame.__setitem__('x', 1.0) or [0.5] * len(frame)")


def test_a_refused_prediction_reaches_who_waits(settings):
    """The class and both numbers come through the result."""
    with pytest.raises(EvaluationError, match="returned 3 predictions for 4 rows"):
        score(settings, "[0.5] * 3")


def test_an_error_of_the_model_names_its_line(settings):
    """What escapes a loader is an EvaluationError with the line of loader.py."""
    with pytest.raises(EvaluationError, match=r"KeyError(?s:.)*the model of demo/loader\.py:10 in predict"):
        score(settings, "frame['nothing']")


def test_scoring_imports_no_training_framework(settings):
    """A model of numpy is scored without waiting for torch or polars to load."""
    source = "[float(any(name in __import__('sys').modules for name in ('torch', 'polars', 'mlflow')))] * len(frame)"
    assert score(settings, source)[0]["prediction"].to_list() == [0.0] * 4
