"""Figures are made for each kind of target, are the same for the same predictions, and show what they are given."""

import sys

import numpy as np
import pytest
from PIL import Image

from evergreen.errors import EvaluationError
from evergreen.evaluation import plots
from evergreen.evaluation.metrics import Rows
from evergreen.evaluation.plots import draw_importance
from evergreen.run import Estimate, Importance


def draw(task, truth, predicted, folder):
    clusters = np.arange(len(truth)) % 7
    return plots.draw({name: Rows.of(task, truth, each, clusters) for name, each in predicted.items()}, folder)


def binary(seed: int = 1):
    rng = np.random.default_rng(seed)
    truth = rng.random(800) < 0.3
    return truth, {
        "challenger": np.clip(0.3 + 0.2 * truth + rng.normal(0, 0.15, 800), 0, 1),
        "version 3": np.clip(0.3 + 0.1 * truth + rng.normal(0, 0.15, 800), 0, 1),
    }


def multiclass(seed: int = 1):
    rng = np.random.default_rng(seed)
    code = rng.integers(0, 3, 300)
    sure = 0.8 * np.eye(3)[code]
    predicted = {name: sure + 0.2 * rng.dirichlet(np.ones(3), 300) for name in ("challenger", "version 3")}
    return np.array(["ant", "cod", "wren"])[code], predicted


def regression(seed: int = 1):
    rng = np.random.default_rng(seed)
    truth = rng.gamma(2, 10, 300)
    return truth, {name: truth + rng.normal(0, 5, 300) for name in ("challenger", "version 3")}


KINDS = {
    "binary": (binary, ["roc.png", "precision_recall.png", "calibration.png"]),
    "multiclass": (multiclass, ["confusion.png"]),
    "regression": (regression, ["predicted_and_true.png"]),
}


@pytest.mark.parametrize("task", KINDS)
def test_each_kind_of_target_has_its_figures(task, tmp_path):
    """They are whole PNG files with ink of the challenger's colour on them."""
    rows, names = KINDS[task]
    files = draw(task, *rows(), tmp_path / "plots")
    assert files == [tmp_path / "plots" / name for name in names]
    for file in files:
        with Image.open(file) as image:
            pixels = np.asarray(image.convert("RGB")).astype(int)
        assert (np.abs(pixels - (0x0F, 0x76, 0x6E)).sum(axis=2) < 60).sum() > 100, file.name


@pytest.mark.parametrize("task", KINDS)
def test_the_same_predictions_give_the_same_bytes(task, tmp_path):
    """No date, no version, no chance in the files; other predictions give other bytes."""
    rows, _ = KINDS[task]
    once, again, other = (
        [file.read_bytes() for file in draw(task, *rows(seed), tmp_path / name)]
        for name, seed in (("once", 1), ("again", 1), ("other", 2))
    )
    assert once == again
    assert all(one != another for one, another in zip(once, other, strict=True))


def test_files_carry_no_trace_of_what_wrote_them(tmp_path):
    """PNG metadata would change with matplotlib's version."""
    for file in draw("binary", *binary(), tmp_path):
        with Image.open(file) as image:
            assert not {"Software", "Creation Time"} & set(image.info)


def test_one_model_alone_is_drawn(tmp_path):
    """The first model has no champion beside it, and its figure differs from that of two."""
    truth, predicted = binary()
    one = draw("binary", truth, {"challenger": predicted["challenger"]}, tmp_path / "one")
    two = draw("binary", truth, predicted, tmp_path / "two")
    assert all(a.read_bytes() != b.read_bytes() for a, b in zip(one, two, strict=True))


def test_a_model_that_says_one_thing_only_is_drawn(tmp_path):
    """Constant predictions have a curve of one step, not an error."""
    truth, _ = binary()
    assert len(draw("binary", truth, {"challenger": np.full(800, 0.3)}, tmp_path)) == 3


def test_many_classes_are_drawn_without_labels(tmp_path):
    """A hundred classes still make a picture of ordinary size."""
    rng = np.random.default_rng(3)
    (file,) = draw(
        "multiclass", rng.integers(0, 100, 2000), {"challenger": rng.dirichlet(np.ones(100), 2000)}, tmp_path
    )
    with Image.open(file) as image:
        assert max(image.size) < 1600


def test_drawing_leaves_no_global_state(tmp_path):
    """Pyplot keeps every figure it makes; it is never asked."""
    draw("binary", *binary(), tmp_path)
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or not pyplot.get_fignums()


def test_rows_that_cannot_be_judged_are_not_drawn(tmp_path):
    """One class only: an EvaluationError, and no file half written."""
    with pytest.raises(EvaluationError, match="roc_auc is undefined"):
        draw("binary", np.zeros(10), {"challenger": np.full(10, 0.5)}, tmp_path / "plots")
    assert not (tmp_path / "plots").exists()


def test_importance_is_drawn_with_what_helps_and_what_hurts(tmp_path):
    """Bars of two colours; of many columns the first; an interval that is not there is not drawn."""
    losses = [0.2 - 0.01 * place for place in range(30)]
    told = [
        Importance(column=f"column {place}", loss=Estimate(value=loss), share=loss / 4, share_error=None)
        for place, loss in enumerate(losses)
    ]
    several, few = (draw_importance(each, "roc_auc", tmp_path) for each in (told, told[19:22]))
    assert several == few == tmp_path / "importance.png"
    with Image.open(few) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    for colour in ((0x0F, 0x76, 0x6E), (0xC2, 0x41, 0x0C)):
        assert (np.abs(pixels - colour).sum(axis=2) < 60).sum() > 100
