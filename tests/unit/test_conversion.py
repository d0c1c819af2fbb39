"""Rows of every origin become the frame that a model declares, or are refused: nothing is lost, nothing guessed."""

import json
import sys
from datetime import UTC, date, datetime
from decimal import Decimal

import mlflow
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest

from evergreen import runner
from evergreen.conversion import ConversionError, convert, from_arrow
from evergreen.errors import EvaluationError
from evergreen.registry import models
from evergreen.stages import scoring
from evergreen.training.jobs import JobSpec

BIG = 2**53 + 1
"""As float64, this is 2**53."""
AT = datetime(2013, 4, 1, 6, 0, 0, 123456, tzinfo=UTC)
DAY = date(2013, 4, 1)
DTYPES = {
    "int": "Int64",
    "float": "float64",
    "bool": "boolean",
    "string": "object",
    "datetime": "datetime64[us, UTC]",
    "date": "object",
}
VALUES = {"int": 3, "float": 0.5, "bool": True, "string": "02116", "datetime": AT, "date": DAY}
ARROW = {
    "int": pa.int64(),
    "float": pa.float64(),
    "bool": pa.bool_(),
    "string": pa.string(),
    "datetime": pa.timestamp("us", "UTC"),
    "date": pa.date32(),
}


def declared(kind, **more):
    return {"inputs": {"x": kind}, "dtypes": "nullable", **more}


def converted(values, kind):
    """The values of a column, None for a missing one, after conversion."""
    column = convert(pd.DataFrame({"x": values}), declared(kind))["x"]
    return [None if pd.isna(value) else value for value in column.tolist()]


def refusal(values, kind, **more):
    with pytest.raises(ConversionError) as caught:
        convert(pd.DataFrame({"x": values}), declared(kind), **more)
    return caught.value


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("held", ["all", "some", "none"])
def test_a_declared_type_has_one_dtype(kind, held):
    """Whether all rows have a value, some or none, from Arrow, from pandas, or from Arrow without a type."""
    values = {"all": [VALUES[kind]] * 2, "some": [VALUES[kind], None], "none": [None, None]}[held]
    table = pa.table({"x": pa.array(values, ARROW[kind])})
    tables = [table, *([pa.table({"x": pa.nulls(2)})] if held == "none" else [])]
    frames = [from_arrow(each, declared(kind)) for each in tables]
    frames.append(convert(pd.DataFrame({"x": pd.Series(values, dtype=object)}), declared(kind)))
    assert {str(frame["x"].dtype) for frame in frames} == {DTYPES[kind]}
    assert [None if pd.isna(value) else value for value in frames[0]["x"].tolist()] == values
    assert all(frame.equals(frames[0]) for frame in frames)


@pytest.mark.parametrize("kind", DTYPES)
def test_rows_that_fit_are_left_as_they_are(kind):
    """The frame itself comes back: a single row costs no copy."""
    frame = from_arrow(pa.table({"x": pa.array([VALUES[kind], None], ARROW[kind])}), declared(kind))
    assert convert(frame, declared(kind)) is frame


CONVERTED = {
    "whole floats": ([3.0, None], "int", [3, None]),
    "whole text": (["3", "-0", "+7", " 12 ", "12.0", "1e3", None], "int", [3, 0, 7, 12, 12, 1000, None]),
    "digits of text": ([str(BIG), f"{BIG}.0"], "int", [BIG, BIG]),
    "decimals": ([Decimal(BIG), Decimal("2.0")], "int", [BIG, 2]),
    "object integers": (pd.Series([BIG, None], dtype=object), "int", [BIG, None]),
    "small integers": (np.array([1, 2], dtype=np.int8), "int", [1, 2]),
    "unsigned": (np.array([2**63 - 1], dtype=np.uint64), "int", [2**63 - 1]),
    "nullable": (pd.array([1, None], dtype="UInt8"), "int", [1, None]),
    "nullable floats": (pd.array([1.0, None], dtype="Float64"), "int", [1, None]),
    "categories of integers": (pd.Categorical([5, None, 5]), "int", [5, None, 5]),
    "Arrow integers": (pd.array([BIG, None], dtype="int64[pyarrow]"), "int", [BIG, None]),
    "a fraction among integers": ([3, 0.5], "int", [3.0, 0.5]),
    "integers": ([1, 2], "float", [1.0, 2.0]),
    "integers that float64 holds": ([2**60, 1], "float", [2.0**60, 1.0]),
    "numbers as text": (["0.1", "1e-4", ".5", "NaN", "-inf", None], "float", [0.1, 1e-4, 0.5, None, -np.inf, None]),
    "single precision": (np.array([0.5], dtype=np.float32), "float", [0.5]),
    "prices": ([Decimal("0.1")], "float", [0.1]),
    "truth as text": (["true", "False", None], "bool", [True, False, None]),
    "truth as numbers": ([1.0, 0.0, None], "bool", [True, False, None]),
    "truth as objects": (pd.Series([True, None], dtype=object), "bool", [True, None]),
    "codes": (["02116", "2116", "1.10"], "string", ["02116", "2116", "1.10"]),
    "categories": (pd.Categorical(["02116", None]), "string", ["02116", None]),
    "pandas' text": (pd.array(["02116", None], dtype="string"), "string", ["02116", None]),
    "text with NaN": (["a", np.nan], "string", ["a", None]),
    "ISO text": (["2013-04-01T06:00:00.123456Z", "2013-04-01T08:00:00.123456+02:00"], "datetime", [AT, AT]),
    "naive times": ([datetime(2013, 4, 1, 6)], "datetime", [datetime(2013, 4, 1, 6, tzinfo=UTC)]),  # noqa: DTZ001
    "nanoseconds": (np.array(["2013-04-01T06:00:00.123456789"], dtype="datetime64[ns]"), "datetime", [AT]),
    "before 1970": (["1969-12-31 23:59:59.999999"], "datetime", [datetime(1969, 12, 31, 23, 59, 59, 999999, UTC)]),
    "the last year": (["9999-12-31"], "datetime", [datetime(9999, 12, 31, tzinfo=UTC)]),
    "dates": ([DAY], "datetime", [datetime(2013, 4, 1, tzinfo=UTC)]),
    "a zone": (pd.Series([AT]).dt.tz_convert("Europe/Berlin"), "datetime", [AT]),
    "dates as text": (["2013-04-01", "2013-04-01T00:00:00Z", None], "date", [DAY, DAY, None]),
    "dates as times": (np.array(["2013-04-01", "NaT"], dtype="datetime64[ns]"), "date", [DAY, None]),
}


@pytest.mark.parametrize("case", CONVERTED)
def test_a_value_that_fits_is_converted(case):
    """Nothing is lost: zeros, digits, missing values, zones."""
    values, kind, expected = CONVERTED[case]
    assert converted(values, kind) == expected
    assert all(isinstance(value, type(wanted)) for value, wanted in zip(converted(values, kind), expected, strict=True))


REFUSED = {
    "text for an int": (["1", "one"], "int", 1, "'one' is no number"),
    "empty text for an int": (["1", ""], "int", 1, "'' is no number"),
    "NaN as text for an int": (["1", "nan"], "int", 1, "'nan' is no whole number"),
    "underscores": (["1_000"], "int", 0, "'1_000' is no number"),
    "an id that is a float": ([2.0**53, None], "int", 0, "9007199254740992.0 is a float, which may be rounded"),
    "an int past 64 bits": ([str(2**63)], "int", 0, "too large for 64 bits"),
    "an unsigned int past 64 bits": (np.array([1, 2**63], dtype=np.uint64), "int", 1, "too large for 64 bits"),
    "an id among fractions": (["0.5", str(BIG)], "int", 1, "float64 would round"),
    "a time for an int": ([AT], "int", 0, "no number"),
    "an int that a float would round": ([1, BIG], "float", 1, f"{BIG} is a whole number that float64 would round"),
    "text for a float": (["0.5", "half"], "float", 1, "'half' is no number"),
    "a decimal that a float would round": ([Decimal(f"{BIG}.5")], "float", 0, "float64 would round"),
    "another number for a bool": ([1, 2], "bool", 1, "2 is neither true nor false"),
    "text for a bool": (["yes"], "bool", 0, "'yes' is neither true nor false"),
    "a number for text": ([2116], "string", 0, "2116 is no text"),
    "a float for text": ([None, 2116.0], "string", 1, "2116.0 is no text"),
    "a number among text": (["02116", 2116], "string", 1, "2116 is no text"),
    "bytes for text": ([b"a"], "string", 0, "no text"),
    "seconds for a time": ([1364796000], "datetime", 0, "1364796000 is no time"),
    "a local format": (["01/04/2013"], "datetime", 0, "'01/04/2013' is no time in ISO 8601"),
    "a time for a date": (["2013-04-01T06:00:00"], "date", 0, "no date but a time of a day"),
    "a number for a date": ([20130401], "date", 0, "no time"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_value_that_does_not_fit_is_refused(case):
    """With column, row, value, the declared type and a fix."""
    values, kind, row, why = REFUSED[case]
    error = refusal(values, kind)
    assert f"column 'x', row {row} (the first is 0): " in error.what
    assert why in error.what
    assert error.what.endswith(f"the model takes {kind}")
    assert error.fix


def test_the_fix_for_a_code_names_its_column():
    """Followed word by word, it keeps the leading zeros."""
    assert "pandas.read_csv(…, dtype={'x': str})" in refusal([2116], "string").fix


def test_a_long_value_is_cut():
    """A message quotes the beginning of a value."""
    assert len(refusal(["1" * 10_000 + "x"], "int").what) < 200


def test_rows_of_a_later_frame_keep_their_number():
    """Rows are predicted in several frames, and counted over all of them."""
    assert "row 1001 (the first is 0)" in refusal([1, "one"], "int", first_row=1000).what


def test_a_column_that_is_missing_or_there_twice_is_refused():
    """The message names it; the fix names what the model takes."""
    with pytest.raises(ConversionError, match="the column 'x' is missing") as caught:
        convert(pd.DataFrame({"y": [1]}), declared("int"))
    assert caught.value.fix == "the model takes: x"
    with pytest.raises(ConversionError, match="the column 'x' is there twice"):
        convert(pd.DataFrame([[1, 2]], columns=["x", "x"]), declared("int"))


def test_other_columns_stay_as_they_are():
    """Columns that the model does not take, and one that had no value when it was made, are not looked at."""
    frame = pd.DataFrame({"x": ["3"], "more": ["02116"], "never": [5]})
    described = {"inputs": {"x": "int", "never": "null"}, "dtypes": "nullable"}
    given = convert(frame, described)
    assert (given["more"].tolist(), given["never"].tolist(), given["x"].tolist()) == (["02116"], [5], [3])
    assert frame["x"].tolist() == ["3"]
    table = pa.table({"x": [1], "more": pa.array([None], pa.int64())})
    assert str(from_arrow(table, described | {"inputs": {"x": "int"}})["more"].dtype) == "float64"


# Model folders that were made before dtypes were fixed.


OLD = {
    "inputs": {"n": "int", "x": "float", "b": "bool", "s": "string", "at": "datetime", "day": "date", "later": "string"}
}


def test_an_old_model_folder_gets_what_it_got():
    """Parquet rows come as pandas makes them, integers beside missing values as floats, a column declared too early too."""
    rows = {"n": [BIG, None], "x": [1, 2], "b": [True, None], "s": ["a", None], "at": [AT, None], "day": [DAY, None]}
    for table in (pa.table(rows | {"later": [7, 8]}), pa.table(rows | {"later": [7, 8]}).slice(0, 1)):
        pd.testing.assert_frame_equal(from_arrow(table, OLD), table.to_pandas())


def test_an_old_model_folder_gets_declared_types_where_there_is_no_value_or_text():
    """A column without a value has the dtype of one that lacks some; text is converted."""
    empty = from_arrow(pa.table({name: pa.nulls(2) for name in OLD["inputs"]}), OLD)
    assert [str(dtype) for dtype in empty.dtypes] == [
        "float64",
        "float64",
        "object",
        "object",
        "datetime64[us, UTC]",
        "object",
        "object",
    ]
    text = {"n": "3", "x": "0.5", "b": "true", "s": "02116", "at": AT.isoformat(), "day": "2013-04-01", "later": "a"}
    typed = {"n": 3, "x": 0.5, "b": True, "s": "02116", "at": AT, "day": DAY, "later": "a"}
    tables = [pa.table({name: [value] for name, value in row.items()}) for row in (text, typed)]
    pd.testing.assert_frame_equal(*(from_arrow(table, OLD) for table in tables))


# All ways into a model.

LOADER = '''
import hashlib

class Model:
    def predict(self, frame):
        """A number for each row that changes with any digit, type or missing value that it is given."""
        rows = zip(*(frame[name].tolist() for name in INPUTS))
        return [int(hashlib.sha256(repr(row).encode()).hexdigest()[:13], 16) / 2**52 for row in rows]

def load(folder):
    return Model()
'''
INPUTS = {
    "code": "string",
    "n": "int",
    "whole": "int",
    "id": "int",
    "x": "float",
    "flag": "bool",
    "at": "datetime",
    "day": "date",
    **{f"no_{kind}": kind for kind in DTYPES},
}
ROWS = pl.DataFrame(
    {
        "code": ["02116", "2116", None, "1.10"],
        "n": [3, None, 0, -7],
        "whole": [1, 2, 3, 4],
        "id": [BIG, BIG + 1, None, BIG + 2],
        "x": [0.1, 3.0, None, 1e300],
        "flag": [True, False, None, True],
        "at": [AT, None, AT, AT],
        "day": [DAY, None, DAY, DAY],
        **{f"no_{kind}": [None] * 4 for kind in DTYPES},
    }
)
TYPED = ROWS.cast(
    {"no_int": pl.Int64, "no_float": pl.Float64, "no_bool": pl.Boolean, "no_string": pl.String, "no_date": pl.Date}
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model folder."""
    folder = tmp_path_factory.mktemp("made") / "model"
    folder.mkdir()
    (folder / "loader.py").write_text(f"INPUTS = {list(INPUTS)!r}\n{LOADER}")
    described = {"task": "binary", "inputs": INPUTS, "dtypes": "nullable", "requirements": []}
    (folder / "model.json").write_text(json.dumps(described))
    return folder


@pytest.fixture(scope="module")
def stock(model, tmp_path_factory):
    """The same model as a stock MLflow client loads it."""
    target = tmp_path_factory.mktemp("logged") / "model"
    models._save(target, model, TYPED.to_pandas(), model_id="m-1", run_id="r")
    return mlflow.pyfunc.load_model(str(target))


@pytest.fixture(scope="module")
def expected(model):
    """The model's predictions for the rows, each predicted alone."""
    described = json.loads((model / "model.json").read_text())
    loaded = runner._import(model / "loader.py").load(model)
    sys.modules.pop("loader", None)
    return [float(loaded.predict(from_arrow(TYPED[n : n + 1].to_arrow(), described))[0]) for n in range(len(TYPED))]


def score(model, folder, files, sample=None):
    """What the job that scores leaves: predictions, and those of a sample's rows as they are."""
    (folder / "input" / "rows").mkdir(parents=True)
    (folder / "output").mkdir()
    (folder / "input" / "model").symlink_to(model)
    for number, rows in enumerate(files):
        rows.write_parquet(folder / "input" / "rows" / f"{number}.parquet")
    if sample is not None:
        (folder / "input" / "samples" / "0").mkdir(parents=True)
        sample.write_parquet(folder / "input" / "samples" / "0" / "rows.parquet")
        told = {"columns": ["code"], "partners": list(range(len(sample))), "budget_s": 60}
        (folder / "input" / "samples" / "0" / "sample.json").write_text(json.dumps(told))
    spec = JobSpec(id="j", kind="score", pack="p", target="", event_time="", task="binary", timeout_s=60)
    runner.score(folder, spec)
    return pl.read_parquet(folder / "output" / "predictions.parquet")["prediction"].to_list()


def test_the_chain_predicts_as_single_rows_do(model, expected, tmp_path):
    """Partitions of which one has no value in some columns, in one frame or in several, and the sample of importance."""
    apart = [ROWS[:1], ROWS[1:3].with_columns(n=None, whole=pl.col("whole").cast(pl.Float64)), ROWS[3:]]
    together = score(model, tmp_path / "a", [TYPED], sample=ROWS)
    assert together == expected
    assert np.load(tmp_path / "a" / "output" / "samples" / "0.npy").tolist() == expected
    split = score(model, tmp_path / "b", apart)
    assert (split[0], split[3]) == (expected[0], expected[3])


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_files_predict_as_the_chain_does(ending, model, expected, tmp_path):
    """`evergreen predict` with a CSV gives what the same rows give as Parquet."""
    file = tmp_path / f"rows.{ending}"
    if ending == "parquet":
        TYPED.write_parquet(file)
    else:
        TYPED.write_csv(file, datetime_format="%Y-%m-%dT%H:%M:%S%.fZ")
    assert score(model, tmp_path / "job", [scoring.rows_of(file)]) == expected


FRAMES = {
    "as pandas has them": lambda: TYPED.to_pandas().assign(id=_exact()["id"]),
    "nullable": lambda: _exact().astype({"x": "Float64", "flag": "boolean", "code": "string", "whole": "Int8"}),
    "Arrow": lambda: TYPED.to_pandas(use_pyarrow_extension_array=True),
    "objects": lambda: _exact().astype(object),
    "categories": lambda: _exact().astype(dict.fromkeys(["code", "n", "whole", "flag", "day"], "category")),
    "text": lambda: pd.DataFrame({name: _text(TYPED[name]) for name in TYPED.columns}),
    "in another order, with more": lambda: _exact()[[*reversed(TYPED.columns)]].assign(more=1),
    "with an index": lambda: _exact().set_index(pd.Index([9, 9, 7, 5])),
}


def _exact():
    return TYPED.to_arrow().to_pandas(types_mapper={pa.int64(): pd.Int64Dtype()}.get)


def _text(column):
    values = [
        None if value is None else value.isoformat() if hasattr(value, "isoformat") else str(value) for value in column
    ]
    return pd.Series(values, dtype=object)


@pytest.mark.parametrize("frame", FRAMES)
def test_a_stock_client_predicts_as_the_chain_does(frame, stock, expected):
    """MLflow's pyfunc with a frame of other dtypes, and the frame stays as it was."""
    rows = FRAMES[frame]()
    before = rows.copy()
    assert list(stock.predict(rows)) == expected
    pd.testing.assert_frame_equal(rows, before)


def test_a_stock_client_refuses_what_does_not_fit(stock):
    """A code that pandas has read as a number, and an id that it has rounded."""
    with pytest.raises(
        ValueError, match=r"column 'code', row 0 \(the first is 0\): 2116.0 is no text(?s:.)*fix: give text"
    ):
        stock.predict(_exact().assign(code=[2116, None, 1, 2]))
    with pytest.raises(ValueError, match=r"column 'id', row 0(?s:.)*a float, which may be rounded(?s:.)*Int64"):
        stock.predict(TYPED.to_pandas())


def test_a_job_names_the_row_that_does_not_fit(model, tmp_path):
    """Over all files; the error is the model's, not a crash."""
    text = TYPED.with_columns(pl.col("n").cast(pl.String))
    with pytest.raises(EvaluationError, match=r"the model of p cannot take the rows: column 'n', row 5") as caught:
        score(model, tmp_path, [text, text.with_columns(n=pl.Series(["1", "one", "2", "3"]))])
    assert "whole numbers" in caught.value.fix
