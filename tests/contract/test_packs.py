"""Every pack there is, the scaffolded one included, against every law; and for each law a pack that breaks it."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from evergreen.laws import LAWS, check_pack, scaffold
from evergreen.pack import find, load
from evergreen.settings import Settings

pytestmark = pytest.mark.slow

PACKS = Path(__file__).parents[2] / "include" / "packs"
AS_OF = datetime(2024, 1, 13, tzinfo=UTC)
READS, VALID, TRAINS, REPEATS, PREDICTS, JUDGED = LAWS


def judge(settings, name, home, as_of=None):
    """The laws that were judged, by name."""
    return {law.name: law for law in check_pack(settings, load(settings.packs, name), home, as_of)}


@pytest.fixture(scope="module", params=[*(folder.name for folder in find(PACKS)), "the scaffolded one"])
def judged(request, tmp_path_factory):
    """What is said of a pack, law by law."""
    root = tmp_path_factory.mktemp("judged")
    settings = Settings.from_env({"EVERGREEN_HOME": str(root / "home")})
    if request.param != "the scaffolded one":
        return judge(settings, request.param, root / "home")
    scaffold(root / "packs", "fresh")
    return judge(settings.model_copy(update={"packs": root / "packs"}), "fresh", root / "home", AS_OF)


@pytest.mark.parametrize("law", LAWS)
def test_a_pack_keeps_the_law(judged, law):
    """Every pack of the project keeps every law, and so does what `evergreen new` makes."""
    assert law in judged, f"not judged: {[found.detail for found in judged.values() if not found.holds]}"
    assert judged[law].holds, judged[law].detail


def test_checking_takes_less_than_a_minute(judged):
    """`evergreen check` is something to run after each change."""
    assert sum(law.seconds for law in judged.values()) < 60


PACK = """
description: Will the water reach the road?
owner: gauge@example.com
source: {kind: parquet, path: "rows.parquet"}
data: {target: flooded, event_time: seen_at, train: 6d, validation: 2d, holdout: 3d, max_staleness: 5d}
training: {call: "model:train", params: {noise: 0}, gpus: 0}
gate: {primary: {metric: roc_auc, min: 0.6}}
"""
MODEL = '''
import json
import os
import random
import time
from pathlib import Path

LOADER = """
import json
from pathlib import Path
import numpy as np

class Model:
    def __init__(self, weight):
        self.weight = weight

    def predict(self, frame):
        north = (frame["station"] == "north").to_numpy(dtype="float64")
        return 1 / (1 + np.exp(-self.weight * frame["height"].to_numpy() - north))

def load(folder):
    return Model(json.loads((Path(folder) / "weight.json").read_text()))
"""


def train(data, job):
    weight = round(float(data.train["height"].std()), 6)
    job.progress(1, 1, weight=weight)
    (job.model_dir / "weight.json").write_text(json.dumps(weight))
    (job.model_dir / "loader.py").write_text(LOADER)
    job.describe(inputs=["height", "station"], requirements=["numpy", "pandas"])
'''


@pytest.fixture
def wrong(tmp_path):
    """Judge a pack that is sound but for what is replaced in its two files, or for its rows."""

    def judge_it(*replaced, rows=lambda rows: rows, as_of=AS_OF):
        yaml, model = PACK, MODEL
        for old, new in replaced:
            assert (old in yaml) != (old in model)
            yaml, model = yaml.replace(old, new), model.replace(old, new)
        folder = tmp_path / "packs" / "gauge"
        folder.mkdir(parents=True)
        (folder / "pack.yaml").write_text(yaml)
        (folder / "model.py").write_text(model)
        rows(sound_rows()).write_parquet(folder / "rows.parquet")
        settings = Settings.from_env({"EVERGREEN_PACKS": str(tmp_path / "packs")})
        return judge(settings, "gauge", tmp_path / "home", as_of)

    return judge_it


def sound_rows():
    """50 rows of each of twelve days."""
    chance, rows = np.random.default_rng(7), 50 * 12
    height, station = chance.normal(size=rows), chance.choice(["north", "south"], size=rows)
    return pl.DataFrame(
        {
            "seen_at": [AS_OF - timedelta(days=12) + timedelta(days=12) * n / rows for n in range(rows)],
            "height": height,
            "station": station,
            "flooded": height + (station == "north") + chance.normal(size=rows) > 0.5,
        }
    )


def breaks(judged, law, *says):
    """Whether `law` alone is broken, those before it hold, and its detail says all of `says`."""
    assert list(judged) == list(LAWS)[: list(LAWS).index(law) + 1], judged
    assert [found.name for found in judged.values() if not found.holds] == [law]
    missing = [words for words in (*says, "fix: ") if words not in judged[law].detail]
    assert missing == [], judged[law].detail


def test_the_pack_that_is_made_wrong_is_sound(wrong):
    """Before anything is replaced, every law is judged and holds: what follows breaks one each."""
    judged = wrong()
    assert [found.detail for found in judged.values() if not found.holds] == []
    assert list(judged) == list(LAWS)


def test_a_window_without_rows_is_found(wrong):
    """A source that begins within the training window, and one that has nothing at all before as-of."""
    breaks(wrong(as_of=datetime(2020, 1, 1, tzinfo=UTC)), READS, "no rows in 2019-12-21", "source")


def test_an_event_time_that_is_not_there_is_found(wrong):
    """A column that the source does not have is named."""
    breaks(wrong(("event_time: seen_at", "event_time: seen_on")), READS, "seen_on")


def test_an_expectation_that_does_not_hold_is_found(wrong):
    """It is named with its column."""
    expectation = "expectations: [{expect_column_values_to_be_between: {column: height, min_value: 100}}]\ngate:"
    breaks(wrong(("gate:", expectation)), VALID, "expect_column_values_to_be_between", "height")


def test_an_unknown_expectation_is_found(wrong):
    """A type that Great Expectations does not have is answered with the nearest one."""
    expectation = "expectations: [{expect_column_values_to_not_be_nul: {column: height}}]\ngate:"
    breaks(wrong(("gate:", expectation)), VALID, "did you mean", "expect_column_values_to_not_be_null")


def test_training_that_fails_is_found(wrong):
    """What the training function raised is said."""
    breaks(wrong(("    weight = round(", "    weight = data.train['heigth']\n    round(")), TRAINS, "heigth")


def test_a_model_folder_without_a_loader_is_found(wrong):
    """A model that nothing can load is no model."""
    breaks(wrong(('    (job.model_dir / "loader.py").write_text(LOADER)\n', "")), TRAINS, "loader.py")


def test_a_path_in_a_model_is_found(wrong):
    """The folder that a model was trained in is not there where it is used."""
    judged = wrong(("json.dumps(weight)", "json.dumps([weight, str(job.model_dir)])"))
    breaks(judged, TRAINS, "weight.json", "keep no absolute path")


@pytest.mark.parametrize("noise", ["random.SystemRandom().random()", "time.time()", "os.getpid()"])
def test_chance_and_clocks_in_a_model_are_found(wrong, noise):
    """The same seed must make the same bytes; the file that differs is named, and only it."""
    judged = wrong(("json.dumps(weight)", f"json.dumps([weight, {noise}])"))
    breaks(judged, REPEATS, "the model folders differ: weight.json\n", "seed 7")


def test_a_model_that_changes_its_rows_is_found(wrong):
    """`predict` is called with a client's own frame."""
    judged = wrong(("        north =", '        frame["height"] = 0.0\n        north ='))
    breaks(judged, PREDICTS, "height")


def test_a_loader_that_needs_the_packs_python_is_found(wrong):
    """A model folder is complete in itself: the pack's files are not there where it is used."""
    breaks(wrong(("import numpy as np\n\nclass", "import numpy as np\nimport model\n\nclass")), PREDICTS, "model")


def test_a_loader_that_needs_the_jobs_folder_is_found(wrong):
    """A model folder may lie anywhere: a path that held where it was trained does not later."""
    judged = wrong(('Path(folder) / "weight.json"', 'Path("output/model/weight.json")'))
    breaks(judged, PREDICTS, "output/model/weight.json")


def test_a_model_that_does_not_take_raw_columns_is_found(wrong):
    """Text comes as text: a model that was given numbers for it in training fails on raw rows."""
    judged = wrong(('(frame["station"] == "north").to_numpy(dtype="float64")', 'frame["station"].astype("float64")'))
    breaks(judged, PREDICTS, "north")


def test_a_metric_that_the_evaluation_cannot_produce_is_found(wrong):
    """A hold-out of one class has no ROC-AUC, which the gate asks for."""
    one_class = pl.when(pl.col("seen_at") < AS_OF - timedelta(days=3)).then("flooded").otherwise(pl.lit(True))
    judged = wrong(rows=lambda rows: rows.with_columns(flooded=one_class))
    breaks(judged, JUDGED, "roc_auc")


def test_a_slice_by_a_column_that_is_not_there_is_found(wrong):
    """The gate asks for a metric by a misspelt column: better said now than after the first training."""
    judged = wrong(("min: 0.6}", "min: 0.6}, slices: [{by: stattion, metric: roc_auc}]"))
    breaks(judged, JUDGED, "figures by 'stattion'", "did you mean 'station'?")


def test_predictions_of_the_wrong_length_are_found(wrong):
    """One prediction for each row."""
    judged = wrong(('frame["height"].to_numpy() - north)', 'frame["height"].to_numpy() - north)[1:]'))
    breaks(judged, PREDICTS, "predict")
