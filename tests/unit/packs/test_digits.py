"""The pack `digits`: images on a calendar, a plain training function, a loader of its own."""

import importlib.util
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from evergreen.pack import Pack
from evergreen.run import Window, Windows
from evergreen.training.checkpoints import FolderCheckpoint
from evergreen.training.jobs import Job, TrainingData, sizes

FOLDER = Path(__file__).resolve().parents[3] / "include" / "packs" / "digits"
PACK = Pack.load(FOLDER)


def module(file):
    found = importlib.util.spec_from_file_location(f"digits_{file.stem}", file)
    made = importlib.util.module_from_spec(found)
    found.loader.exec_module(made)
    return made


@pytest.fixture(scope="module")
def model():
    return module(FOLDER / "model.py")


def trained(model, folder):
    """A model folder of the windows as of 2020-03-01, and the hold-out rows."""
    windows = Windows.ending(datetime(2020, 3, 1, tzinfo=UTC), PACK.data)
    for name in ("train", "validation"):
        (folder / "input" / name).mkdir(parents=True)
        rows = pl.concat(model.read(getattr(windows, name)))
        rows.write_parquet(folder / "input" / name / "rows.parquet")
    (folder / "model").mkdir()
    data = TrainingData(folder / "input", target=PACK.data.target, event_time=PACK.data.event_time, task=PACK.data.task)
    job = Job(
        params=PACK.training.params,
        seed=PACK.training.seed,
        device="cpu",
        model_dir=folder / "model",
        checkpoint=FolderCheckpoint(folder / "checkpoint"),
        folder=folder,
    )
    model.train(data, job)
    return folder / "model", pl.concat(model.read(windows.holdout))


def test_the_whole_set_lies_on_the_calendar_the_model_card_tells(model):
    """1797 images, the first at the start of 2020, the last on 29 May."""
    rows = pl.concat(model.read(Window(start=datetime(2000, 1, 1, tzinfo=UTC), end=datetime(2030, 1, 1, tzinfo=UTC))))
    times = rows["written_at"]
    assert (rows.height, times.min(), times.max(), times.n_unique()) == (
        1797,
        datetime(2020, 1, 1, tzinfo=UTC),
        datetime(2020, 5, 29, 16, tzinfo=UTC),
        1797,
    )


def test_every_window_as_of_march_is_full(model):
    """As of 2020-03-01 the first training row is the first image."""
    windows = Windows.ending(datetime(2020, 3, 1, tzinfo=UTC), PACK.data)
    assert windows.train.start == model.FIRST
    assert [pl.concat(model.read(getattr(windows, name))).height for name in ("train", "validation", "holdout")] == [
        42 * 12,
        4 * 12,
        14 * 12,
    ]


def test_passes_its_own_gate(model, tmp_path):
    """The hold-out accuracy, through the model folder, is above the pack's floor."""
    folder, rows = trained(model, tmp_path)
    predicted = module(folder / "loader.py").load(folder).predict(rows.to_pandas())
    accuracy = (predicted.argmax(axis=1) == rows["digit"].to_numpy()).mean()
    assert accuracy > PACK.gate.primary.min
    assert predicted.sum(axis=1) == pytest.approx(np.ones(rows.height))


def test_the_same_seed_gives_the_same_bytes(model, tmp_path):
    """Two trainings leave the same model folder, byte for byte."""
    first, second = (trained(model, tmp_path / name)[0] for name in ("first", "second"))
    assert {name: (first / name).read_bytes() for name in sizes(first)} == {
        name: (second / name).read_bytes() for name in sizes(second)
    }


def test_a_missing_pixel_is_paper_and_a_missing_column_an_error(model, tmp_path):
    """A null counts as no ink; a column that is not there is named."""
    folder, rows = trained(model, tmp_path)
    digits = module(folder / "loader.py").load(folder)
    frame = rows.head(3).to_pandas()
    assert np.array_equal(digits.predict(frame.assign(pixel_33=None)), digits.predict(frame.assign(pixel_33=0)))
    with pytest.raises(ValueError, match="the column 'pixel_33' is missing"):
        digits.predict(frame.drop(columns="pixel_33"))
