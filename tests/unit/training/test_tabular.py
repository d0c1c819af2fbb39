"""The built-in trainer on small tables made up here, through real job folders."""

import json
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta

import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch
from sklearn.metrics import roc_auc_score

from evergreen.errors import TrainingError
from evergreen.training import tabular
from evergreen.training.checkpoints import FolderCheckpoint
from evergreen.training.jobs import Job, TrainingData, sizes
from evergreen.training.tabular_loader import load

QUICK = {"epochs": 8, "batch_size": 128, "min_count": 5, "learning_rate": 0.01}


def table(rows=1200, seed=0):
    """A number, a whole number, a flag and two texts, with gaps; odds that depend on all but one of them."""
    chance = np.random.default_rng(seed)
    speed = chance.normal(50, 20, rows)
    colour = chance.choice(["red", "green", "blue"], rows)
    odds = np.abs(speed - 50) / 8 - 2 + 2.0 * (colour == "red")
    gap = chance.random(rows) < 0.1
    return pl.DataFrame(
        {
            "at": [datetime(2024, 1, 1, tzinfo=UTC) + timedelta(minutes=n) for n in range(rows)],
            "speed": pl.Series(np.where(gap, np.nan, speed)).fill_nan(None),
            "wheels": chance.integers(2, 5, rows),
            "open": chance.random(rows) < 0.5,
            "colour": pl.Series(colour.tolist()),
            "place": pl.Series([None if n % 9 == 0 else f"p{n % 4}" for n in range(rows)]),
            "late": chance.random(rows) < 1 / (1 + np.exp(-odds)),
        }
    )


class Folder:
    """A job folder with rows in it."""

    def __init__(self, folder, rows, *, target="late", task="binary", params=QUICK, seed=7, checkpoint=None):
        self.validation = rows.tail(rows.height // 4)
        for window, part in (("train", rows.head(rows.height - rows.height // 4)), ("validation", self.validation)):
            (folder / "input" / window).mkdir(parents=True, exist_ok=True)
            part.write_parquet(folder / "input" / window / "rows.parquet")
        (folder / "model").mkdir(exist_ok=True)
        self.data = TrainingData(folder / "input", target=target, event_time="at", task=task)
        self.job = Job(
            params=params,
            seed=seed,
            device="cpu",
            model_dir=folder / "model",
            checkpoint=checkpoint or FolderCheckpoint(folder / "checkpoint"),
            folder=folder,
        )
        self.folder = folder

    def train(self, **arguments):
        tabular.train(self.data, self.job, **arguments)
        return self

    @property
    def model(self):
        return load(self.job.model_dir)

    @property
    def bytes(self):
        files = (name for name in sizes(self.job.model_dir) if "__pycache__" not in name)  # another test imported it
        return {name: (self.job.model_dir / name).read_bytes() for name in files}

    @property
    def curve(self):
        return [json.loads(line) for line in (self.folder / "progress.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A binary model of `table()`."""
    return Folder(tmp_path_factory.mktemp("job"), table()).train()


def test_learns_a_bent_curve_a_category_and_what_absence_means(trained):
    """A U-shaped effect and a category are found: on other rows, nearly as good as the odds that made them."""
    fresh = table(seed=1)
    odds = (fresh["speed"].fill_null(50) - 50).abs() / 8 + 2.0 * (fresh["colour"] == "red")
    learned = roc_auc_score(fresh["late"], trained.model.predict(fresh.to_pandas()))
    assert learned > roc_auc_score(fresh["late"], odds) - 0.02


def test_the_model_folder_predicts_as_the_network_did(trained):
    """What the loader computes with numpy is what training measured with torch."""
    predicted = trained.model.predict(trained.validation.to_pandas())
    auc = roc_auc_score(trained.validation["late"], predicted)
    assert trained.job.metrics["validation_roc_auc"] == pytest.approx(auc, abs=1e-6)


def test_inputs_are_the_raw_columns_and_requirements_are_few(trained):
    """A client needs the raw columns, numpy, pandas and safetensors."""
    assert trained.job.inputs == {
        "speed": "float",
        "wheels": "int",
        "open": "bool",
        "colour": "string",
        "place": "string",
    }
    assert [text.partition("==")[0] for text in trained.job.requirements] == ["numpy", "pandas", "safetensors"]


def test_loads_in_a_fresh_process_without_evergreen_and_torch(trained):
    """The model folder is complete in itself, and light."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import loader, pandas;"
        "row = dict(speed=[1.5], wheels=[4], open=[True], colour=['red'], place=[None]);"
        "print(loader.load(sys.argv[1]).predict(pandas.DataFrame(row)).shape,"
        "sorted({'evergreen', 'torch', 'sklearn', 'polars'} & set(sys.modules)))"
    )
    # Not -I: site-packages stay; but nothing of the project is on the path except what is installed.
    found = subprocess.run(
        [sys.executable, "-c", code, str(trained.job.model_dir)],
        capture_output=True,
        text=True,
        check=True,
        cwd=trained.folder,
    )
    assert found.stdout.strip() == "(1,) []"


def test_progress_reaches_its_end_and_tells_speed_and_quality(trained):
    """The curve ends at its last step with loss, validation figures and samples per second."""
    last = trained.curve[-1]
    assert last["step"] == last["of"]
    assert {"loss", "validation_loss", "validation_roc_auc", "samples_per_s"} == last["metrics"].keys()


def test_takes_what_it_has_never_seen(trained):
    """Unseen categories, nulls of every kind and infinities get a probability each."""
    frame = pd.DataFrame(
        {
            "speed": [1e9, -np.inf, np.nan, None, 50.0],
            "wheels": pd.array([3, None, 2, 99, 4], dtype="Int64"),
            "open": [True, None, False, pd.NA, True],
            "colour": ["red", "violet", None, np.nan, pd.NA],
            "place": pd.Categorical(["p1", None, "nowhere", "p2", "p3"]),
        }
    )
    predicted = trained.model.predict(frame)
    assert ((predicted > 0) & (predicted < 1)).tolist() == [True] * 5


def test_leaves_the_frame_as_it_is_and_does_not_mind_its_order(trained):
    """Predicting changes nothing, and neither column order, index nor extra columns matter."""
    frame = trained.validation.to_pandas()
    before = frame.copy(deep=True)
    expected = trained.model.predict(frame)
    pd.testing.assert_frame_equal(frame, before)
    shuffled = frame[frame.columns[::-1]].set_index(np.arange(len(frame)) * 3 + 1).assign(more="x")
    assert np.array_equal(trained.model.predict(shuffled), expected)


def test_a_row_alone_is_predicted_as_among_others(trained):
    """A prediction does not depend on the rows beside it."""
    frame = trained.validation.to_pandas()
    together = trained.model.predict(frame)
    alone = [trained.model.predict(frame.iloc[[n]])[0] for n in range(20)]
    assert alone == pytest.approx(together[:20], abs=1e-6)


def test_beyond_the_training_rows_a_number_counts_as_the_outermost(trained):
    """No prediction runs away with a number out of range."""
    frame = trained.validation.head(2).to_pandas().assign(open=True, colour="red", place="p1", wheels=3)
    top = trained.data.train["speed"].max()
    assert len(set(trained.model.predict(frame.assign(speed=[top, top * 1000])))) == 1


def test_no_rows_give_no_predictions(trained):
    """An empty frame is answered with an empty array."""
    assert trained.model.predict(trained.validation.head(0).to_pandas()).shape == (0,)


def test_a_missing_column_is_named(trained):
    """A ValueError names the column that a client forgot."""
    with pytest.raises(ValueError, match="the column 'colour' is missing; the model takes speed, wheels"):
        trained.model.predict(trained.validation.to_pandas().drop(columns="colour"))


def test_text_where_numbers_belong_is_named(trained):
    """A ValueError names the column and the value."""
    with pytest.raises(ValueError, match=r"the column 'speed' should hold numbers: .*'fast'"):
        trained.model.predict(trained.validation.to_pandas().assign(speed="fast"))


def test_one_row_takes_less_than_5_ms(trained):
    """Half of all single rows are answered within 5 ms, on a busy machine too."""
    frame = trained.validation.to_pandas()
    taken = []
    for n in range(60):
        row = frame.iloc[[n]]
        before = time.perf_counter()
        trained.model.predict(row)
        taken.append(time.perf_counter() - before)
    assert np.median(taken) < 0.005


def test_the_same_seed_gives_the_same_bytes(trained, tmp_path):
    """Two trainings with one seed leave the same model folder, byte for byte."""
    assert Folder(tmp_path, table()).train().bytes == trained.bytes


def test_another_seed_gives_other_weights(trained, tmp_path):
    """The seed is used."""
    other = Folder(tmp_path, table(), seed=8).train()
    assert other.bytes["weights.safetensors"] != trained.bytes["weights.safetensors"]


class Killed(FolderCheckpoint):
    """Keeps checkpoints, and ends the training after the second."""

    def save(self, step, tensors, state):
        super().save(step, tensors, state)
        if step == 2:
            raise KeyboardInterrupt


def test_killed_and_resumed_ends_with_the_same_bytes(trained, tmp_path):
    """A training that dies after two epochs and is started again ends as an undisturbed one."""
    with pytest.raises(KeyboardInterrupt):
        Folder(tmp_path, table(), checkpoint=Killed(tmp_path / "checkpoint")).train()
    assert Folder(tmp_path, table()).train().bytes == trained.bytes


def test_a_resumed_training_does_not_repeat_epochs(tmp_path):
    """Started again after its end, a training takes no step."""
    Folder(tmp_path, table()).train()
    (tmp_path / "progress.jsonl").unlink()
    assert len(Folder(tmp_path, table()).train().curve) == 1


def test_dropout_is_repeated_exactly_after_a_kill(tmp_path):
    """What is random in an epoch depends on seed and epoch alone, masks of dropout included."""
    params = {**QUICK, "dropout": 0.3}
    whole, halved = tmp_path / "whole", tmp_path / "halved"
    with pytest.raises(KeyboardInterrupt):
        Folder(halved, table(), params=params, checkpoint=Killed(halved / "checkpoint")).train()
    assert Folder(halved, table(), params=params).train().bytes == Folder(whole, table(), params=params).train().bytes


def test_stops_early_and_keeps_the_best_epoch(tmp_path):
    """Where there is nothing to learn, training stops, and the epoch of the lowest validation loss is the model."""
    noise = table().with_columns(late=pl.Series(np.random.default_rng(3).random(1200) < 0.5))
    made = Folder(tmp_path, noise, params={**QUICK, "epochs": 30, "learning_rate": 0.05}).train()
    losses = [line["metrics"]["validation_loss"] for line in made.curve if "validation_loss" in line["metrics"]]
    assert len(losses) < 30
    assert losses[-1] == min(losses)
    predicted = np.clip(made.model.predict(made.validation.to_pandas()), 1e-9, 1 - 1e-9)
    truth = made.validation["late"].to_numpy()
    assert -np.log(np.where(truth, predicted, 1 - predicted)).mean() == pytest.approx(min(losses), abs=1e-6)


def test_multiclass_gives_probabilities_in_sorted_order(tmp_path):
    """Text classes: a column for each, sorted by name, that sum to one and find the class."""
    rows = table().drop("late").drop_nulls("speed")
    kind = pl.when(pl.col("speed") < 40).then(pl.lit("slow")).when(pl.col("speed") < 60).then(pl.lit("middle"))
    made = Folder(
        tmp_path, rows.with_columns(kind=kind.otherwise(pl.lit("fast"))), target="kind", task="multiclass"
    ).train()
    predicted = made.model.predict(made.validation.to_pandas())
    assert made.model.classes == ["fast", "middle", "slow"]
    assert predicted.sum(axis=1) == pytest.approx(np.ones(len(predicted)))
    found = np.array(made.model.classes)[predicted.argmax(axis=1)]
    assert (found == made.validation["kind"].to_numpy()).mean() > 0.9


def test_a_class_that_only_validation_has_does_not_end_the_training(tmp_path):
    """A class that is new in the newest days has no column yet, and the others are still learned."""
    rows = table().drop("late").with_columns(kind=pl.when(pl.int_range(pl.len()) >= 1190).then(9).otherwise("wheels"))
    made = Folder(tmp_path, rows, target="kind", task="multiclass").train()
    assert made.model.classes == [2, 3, 4]


def test_regression_predicts_in_the_units_of_the_target(tmp_path):
    """Values far from 0 and 1 come back on their own scale."""
    rows = table().drop("late").drop_nulls("speed").with_columns(price=pl.col("speed") * 1000 + 5e5)
    made = Folder(tmp_path, rows, target="price", task="regression", params={**QUICK, "epochs": 10}).train()
    truth = made.validation["price"].to_numpy()
    wrong = made.model.predict(made.validation.to_pandas()) - truth
    assert 1 - np.square(wrong).mean() / truth.var() > 0.95


def test_columns_without_a_value_or_with_one_value_do_no_harm(tmp_path):
    """An empty column and a constant one are taken."""
    rows = table().with_columns(empty=pl.lit(None), void=pl.lit(None, dtype=pl.String), same=pl.lit(1.5))
    made = Folder(tmp_path, rows).train()
    assert np.isfinite(made.model.predict(made.validation.to_pandas())).all()


def test_deeper_and_single_networks_are_served_as_well(tmp_path):
    """Two hidden layers and one member: the loader still agrees with training."""
    made = Folder(tmp_path, table(), params={**QUICK, "hidden": [16, 8], "members": 1}).train()
    auc = roc_auc_score(made.validation["late"], made.model.predict(made.validation.to_pandas()))
    assert made.job.metrics["validation_roc_auc"] == pytest.approx(auc, abs=1e-6)


def test_dropped_columns_are_not_asked_for(tmp_path):
    """What is dropped is no input of the model."""
    made = Folder(tmp_path, table()).train(drop=["colour"])
    assert "colour" not in made.job.inputs
    assert len(made.model.predict(made.validation.to_pandas().drop(columns="colour"))) == 300


def test_what_training_changes_in_torch_it_puts_back(tmp_path):
    """Threads, determinism and the random state are afterwards as before."""
    torch.manual_seed(5)
    before = torch.get_num_threads(), torch.get_deterministic_debug_mode(), torch.random.get_rng_state().tolist()
    Folder(tmp_path, table(200), params={**QUICK, "epochs": 1}).train()
    after = torch.get_num_threads(), torch.get_deterministic_debug_mode(), torch.random.get_rng_state().tolist()
    assert after == before


def test_the_optimizer_is_adamw():
    """Ten steps move weights as torch.optim.AdamW does."""
    torch.manual_seed(0)
    ours, theirs = torch.nn.Linear(5, 3), torch.nn.Linear(5, 3)
    theirs.load_state_dict(ours.state_dict())
    optimizer = tabular.AdamW(ours, weight_decay=0.1)
    reference = torch.optim.AdamW(theirs.parameters(), weight_decay=0.1)
    for step in range(10):
        rows = torch.randn(8, 5)
        for network in (ours, theirs):
            network(rows).square().sum().backward()
        reference.param_groups[0]["lr"] = 0.01 * (step + 1)
        reference.step()
        reference.zero_grad()
        optimizer.step(0.01 * (step + 1))
    torch.testing.assert_close(ours.weight, theirs.weight)


def test_roc_auc_counts_ties_as_half():
    """The same as scikit-learn's, ties included."""
    chance = np.random.default_rng(0)
    truth, predicted = chance.integers(0, 2, 500), chance.integers(0, 20, 500) / 20
    assert tabular.roc_auc(truth, predicted) == pytest.approx(roc_auc_score(truth, predicted), abs=1e-12)


@pytest.mark.parametrize(
    ("params", "what", "fix"),
    [
        ({"epoch": 3}, "'epoch' is not a parameter", "did you mean 'epochs'?"),
        ({"batch_size": 0}, "training.params.batch_size: 0", "change batch_size"),
        ({"learning_rate": "fast"}, "training.params.learning_rate: 'fast'", "change learning_rate"),
    ],
)
def test_wrong_params_are_named(tmp_path, params, what, fix):
    """An unknown param is answered with the nearest, a wrong value with its name."""
    with pytest.raises(TrainingError) as error:
        Folder(tmp_path, table(200), params=params).train()
    assert what in error.value.what
    assert fix in error.value.fix


@pytest.mark.parametrize(
    ("late", "task", "what"),
    [
        (pl.when(pl.int_range(pl.len()) < 5).then(None).otherwise("late"), "binary", "has 5 without a value"),
        (pl.when(pl.int_range(pl.len()) >= 197).then(None).otherwise("late"), "binary", "validation window .* has 3"),
        (pl.lit(value=True), "binary", "holds True in all"),
        (pl.lit(3.5), "regression", "holds 3.5 in all"),
        (pl.col("wheels"), "binary", r"holds \d \(\d+ times\)"),
        (pl.col("colour"), "binary", "holds String"),
        (pl.when(pl.int_range(pl.len()) < 2).then(float("nan")).otherwise("wheels"), "regression", "has 2 without"),
    ],
)
def test_a_target_that_cannot_be_learned_is_refused(tmp_path, late, task, what):
    """Nulls, a single value and values of another task: the message names column, window and counts."""
    with pytest.raises(TrainingError, match=what) as error:
        Folder(tmp_path, table(200).with_columns(late=late), task=task).train()
    assert error.value.what.startswith("'late' in the ")


def test_a_loss_that_is_not_finite_ends_the_training_at_once(tmp_path):
    """The first report of such a loss is the last."""
    with pytest.raises(TrainingError, match=r"(NaN|infinite) loss at step"):
        Folder(tmp_path, table(), params={**QUICK, "learning_rate": 1e30}).train()
    assert not (tmp_path / "model" / "loader.py").exists()


def test_instants_are_refused_with_a_way_out(tmp_path):
    """A column of times is named, with what to do about it."""
    with pytest.raises(TrainingError, match="the column 'seen' holds Datetime") as error:
        Folder(tmp_path, table(200).with_columns(seen=pl.col("at"))).train()
    assert "drop=['seen']" in error.value.fix


def test_dropping_what_is_not_there_is_refused(tmp_path):
    """A misspelt column in drop is answered with the nearest."""
    with pytest.raises(TrainingError, match="there is no feature 'color'") as error:
        Folder(tmp_path, table(200)).train(drop=["color"])
    assert error.value.fix == "did you mean 'colour'?"
