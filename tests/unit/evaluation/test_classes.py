"""Each model is read by its own classes: what it does not know it is wrong on, by every metric, as scikit-learn reckons."""

import numpy as np
import pytest
import sklearn.metrics as reference

from evergreen.evaluation import plots
from evergreen.evaluation.importance import importance
from evergreen.evaluation.metrics import METRICS, Rows, value
from evergreen.evaluation.significance import estimate, paired
from evergreen.evaluation.slices import differences
from evergreen.pack import GateRules, PrimaryRule, SliceRule

NAMES = {
    "texts": ["ant", "cod", "mole", "wren"],
    "texts that look like numbers": ["1", "01", "1.0", "True"],
    "integers": [10, -1, 99, 7],
    "large integers": [2**53, 2**53 + 1, 2**60, 3],
    "numbers": [0.5, 1.0, 2.5, -3.0],
}
TRUE_AND_FALSE = [True, False]


def made(names, seed=1, n=400):
    """Rows of all four classes; a model that knows three of them, and one that knows them all in another order."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, 4, n)
    raw = np.exp(rng.normal(size=(n, 4)) + 1.5 * np.eye(4)[truth])
    three = raw[:, [2, 0, 1]] / raw[:, [2, 0, 1]].sum(axis=1, keepdims=True)
    order = [3, 1, 0, 2]
    four = (raw / raw.sum(axis=1, keepdims=True))[:, order]
    kind = object if isinstance(names[0], str) else None
    return (
        np.array(names, dtype=kind)[truth],
        (three, [names[2], names[0], names[1]]),
        (four, [names[place] for place in order]),
        np.arange(n) * 8 // n,
    )


def by_sklearn(truth, predicted, classes, labels) -> dict[str, float]:
    """scikit-learn's figures, the model's columns put under `labels` one by one, 0 where it has none."""
    spread = np.zeros((len(truth), len(labels)))
    for column, name in enumerate(classes):
        spread[:, labels.index(name)] = predicted[:, column]
    code = np.array([labels.index(name) for name in truth.tolist()])
    chosen = np.array([labels.index(classes[place]) for place in predicted.argmax(axis=1)])
    return {
        "accuracy": reference.accuracy_score(code, chosen),
        "macro_f1": reference.f1_score(code, chosen, average="macro"),
        "log_loss": reference.log_loss(code, spread, labels=range(len(labels))),
    }


@pytest.mark.parametrize("kind", NAMES)
def test_each_model_is_read_by_its_own_classes(kind):
    """A champion of three classes and a challenger of four, on rows of four: figures and differences are scikit-learn's."""
    names = NAMES[kind]
    truth, champion, challenger, day = made(names)
    old, new = (Rows.of("multiclass", truth, predicted, day, own) for predicted, own in (champion, challenger))
    wanted = [by_sklearn(truth, predicted, own, names) for predicted, own in (champion, challenger)]
    for metric in METRICS["multiclass"]:
        assert value(old, metric) == pytest.approx(wanted[0][metric], abs=1e-10), metric
        assert value(new, metric) == pytest.approx(wanted[1][metric], abs=1e-10), metric
        difference = wanted[1][metric] - wanted[0][metric]
        assert paired(new, old, metric, 0.95).value == pytest.approx(difference, abs=1e-10), metric


@pytest.mark.parametrize("kind", NAMES)
def test_the_interval_of_a_difference_leaves_out_each_day_of_both(kind):
    """Its standard error is the jackknife's over scikit-learn's figures without each day in turn."""
    names = NAMES[kind]
    truth, champion, challenger, day = made(names)
    old, new = (Rows.of("multiclass", truth, predicted, day, own) for predicted, own in (champion, challenger))
    for metric in METRICS["multiclass"]:
        gains = []
        for left_out in range(8):
            kept = day != left_out
            figures = [
                by_sklearn(truth[kept], predicted[kept], own, names)[metric]
                for predicted, own in (challenger, champion)
            ]
            gains.append(figures[0] - figures[1])
        found = paired(new, old, metric, 0.95)
        error = np.sqrt(7 / 8 * np.sum((np.array(gains) - found.value) ** 2))
        assert found.error == pytest.approx(error, abs=1e-10), metric


def test_a_group_is_judged_by_each_models_own_classes():
    """The group that the new class fills: the champion is wrong on all of it."""
    names = NAMES["texts"]
    truth, champion, challenger, day = made(names)
    old, new = (Rows.of("multiclass", truth, predicted, day, own) for predicted, own in (champion, challenger))
    rule = SliceRule(by="queue", metric="accuracy", min_rows=10)
    rules = GateRules(primary=PrimaryRule(metric="accuracy"), slices=(rule,))
    groups = np.where(truth == "wren", "new", "old")
    found = {
        each.group: each.estimate.value
        for each in differences(rules, new, old, columns={"queue": groups}, confidence=0.95)
    }
    right = np.array(challenger[1])[challenger[0].argmax(axis=1)] == truth
    assert found["new"] == pytest.approx(right[groups == "new"].mean(), abs=1e-10)


def test_a_class_that_nobody_knows_is_an_error_of_both():
    """It is only in the rows: figures are there, and both models lose the same by it."""
    truth, champion, _, day = made(NAMES["texts"])
    rows = Rows.of("multiclass", truth, champion[0], day, champion[1])
    unknown = truth == "wren"
    right = np.array(champion[1])[champion[0].argmax(axis=1)] == truth
    assert not right[unknown].any()
    assert value(rows, "accuracy") == pytest.approx(right.mean(), abs=1e-10)
    assert paired(rows, rows, "log_loss", 0.95).value == 0
    alone = estimate(rows.within(unknown), "log_loss", 0.95)
    assert alone.value == pytest.approx(-np.log(np.finfo(float).eps), abs=1e-10)


def test_true_and_false_are_the_numbers_1_and_0():
    """A target that is a bool here and a whole number there has the same two classes; the text "1" is another."""
    predicted = np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]])
    for truth in (np.array([True, False, True]), np.array([1, 0, 1]), np.array([1.0, 0.0, 1.0])):
        rows = Rows.of("multiclass", truth, predicted, np.zeros(3, dtype=int), TRUE_AND_FALSE)
        assert (value(rows, "accuracy"), len(rows.classes)) == (1.0, 2)
    texts = Rows.of("multiclass", np.array(["1", "0", "1"]), predicted, np.zeros(3, dtype=int), TRUE_AND_FALSE)
    assert (value(texts, "accuracy"), len(texts.classes)) == (0.0, 4)


def test_importance_is_of_the_models_own_classes():
    """Shuffling what a model leans on costs it the right answers it gives, and none on rows of a class it does not know."""
    truth, champion, _, day = made(NAMES["texts"])
    predicted, own = champion
    shuffled = {"x": predicted[:, [1, 2, 0]], "idle": predicted}
    found = {
        each.column: each.loss.value
        for each in importance(
            "multiclass", "accuracy", truth, predicted, shuffled.items(), day, confidence=0.95, classes=own
        )
    }
    rights = [
        (np.array(own)[each.argmax(axis=1)] == truth).mean() for each in (predicted, shuffled["x"], shuffled["idle"])
    ]
    assert found["x"] == pytest.approx(rights[0] - rights[1], abs=1e-10)
    assert found["idle"] == 0


@pytest.mark.parametrize("kind", NAMES)
def test_a_matrix_of_confusion_has_the_classes_of_both(kind, tmp_path):
    """Two models of unlike classes are drawn on the same axes."""
    truth, champion, challenger, day = made(NAMES[kind])
    models = {
        name: Rows.of("multiclass", truth, predicted, day, own)
        for name, (predicted, own) in {"challenger": challenger, "version 1": champion}.items()
    }
    cells = plots.confusion(models)
    assert list(cells) == ["challenger", "version 1"]
    names = sorted(NAMES[kind])
    for name, (predicted, own) in {"challenger": challenger, "version 1": champion}.items():
        chosen = [own[place] for place in predicted.argmax(axis=1)]
        code = {each: place for place, each in enumerate(names)}
        wanted = reference.confusion_matrix(
            [code[each] for each in truth.tolist()], [code[each] for each in chosen], labels=range(4)
        )
        assert (cells[name] == wanted).all()
    assert [file.name for file in plots.draw(models, tmp_path)] == ["confusion.png"]
