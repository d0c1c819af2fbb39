"""Classes that come and go on a real chain: every model is read by its own, nothing is refused, and the monitor retrains."""

import copy
import json
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import polars as pl
import pytest
import sklearn.metrics as reference
from tests.faults.conftest import AS_OF, DAYS, NAME, Home
from tests.faults.test_monitor import watch
from typer.testing import CliRunner

from evergreen import looks
from evergreen.cli import app
from evergreen.data.store import Store
from evergreen.errors import EvaluationError
from evergreen.loop.monitor import Champion, Watched, alert_of
from evergreen.loop.probation import Standing, judge
from evergreen.loop.rollback import drill
from evergreen.reports import of_version
from evergreen.run import Evaluated, Ref
from evergreen.stages import scoring
from evergreen.stages.judging import rejudge
from evergreen.work import manifest_of

pytestmark = [pytest.mark.slow, pytest.mark.fault]

DAY = timedelta(days=1)
MODEL = '''
"""The nearest of the classes' means: a softmax of distances, in the order in which the classes are first met."""
import json

import numpy as np

LOADER = """
import json
from pathlib import Path
import numpy as np

class Model:
    def __init__(self, means):
        self.means = np.array(means)

    def predict(self, frame):
        x = frame[["height", "wind"]].to_numpy(dtype="float64")
        logits = -((x[:, None] - self.means) ** 2).sum(axis=2)
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        return powers / powers.sum(axis=1, keepdims=True)

def load(folder):
    return Model(json.loads((Path(folder) / "means.json").read_text()))
"""


def train(data, job):
    target = data.train[data.target].to_numpy()
    classes = list(dict.fromkeys(target.tolist()))
    x = data.train[["height", "wind"]].to_numpy()
    (job.model_dir / "means.json").write_text(json.dumps([x[target == name].mean(axis=0).tolist() for name in classes]))
    (job.model_dir / "loader.py").write_text(LOADER)
    job.describe(inputs=["height", "wind"], requirements=["numpy", "pandas"], classes=classes)
'''
GATE = {
    "primary": {"metric": "accuracy", "margin": 0.2},
    "slices": [{"by": "station", "metric": "macro_f1", "margin": 0.9, "min_rows": 20}],
}
DRIFT = {"drift": {"window": "3d", "violated": "1 of 1"}}
KINDS = {
    "texts": ["dry", "wet", "flood", "ice"],
    "texts like numbers": ["1", "01", "True", "1.0"],
    "integers": [2**53 + 1, -1, 999, 7],
}
PLACES = np.array([[-2.0, 0.0], [2.0, 0.0], [0.0, 2.0], [0.0, -2.0]])


def tide(names, few=None):
    """Turns a day's rows into those of classes: `names`, or of them the first `few`."""

    def turn(rows: pl.DataFrame) -> pl.DataFrame:
        chance = np.random.default_rng(int(rows["seen_at"][0].timestamp()))
        code = chance.integers(0, few or len(names), rows.height)
        height, wind = (PLACES[code] + chance.normal(size=(rows.height, 2))).T
        truth = [names[place] for place in code.tolist()]
        return rows.with_columns(height=pl.Series(height), wind=pl.Series(wind), flooded=pl.Series(truth))

    return turn


def made(root, names, model=MODEL, **more) -> Home:
    home = Home.make(root, days=())
    home.write(data={"task": "multiclass"}, gate=GATE, triggers=DRIFT, **more)
    (home.folder / "model.py").write_text(model)
    return home


def fill(home, names, few, days) -> None:
    for number in days:
        home.write_day(number, tide(names, few))


def by_sklearn(home, values, model) -> dict[str, float]:
    """scikit-learn's figures of a model's stored predictions, its columns named by its own folder's `model.json`."""
    store = Store(home.settings)
    described = store.read_json(store.listing(Ref(hash=model.model, size=0))["model.json"])
    own = described["classes"]
    snapshot = values["snapshot"]
    parts = manifest_of(store, snapshot.manifest).within(snapshot.windows.holdout)
    truth = pl.concat([pl.read_parquet(store.path(part.object)) for part in parts])["flooded"].to_list()
    predicted = pl.read_parquet(store.path(model.predictions)).to_numpy()
    assert predicted.shape == (len(truth), len(own))
    labels = list(dict.fromkeys([*own, *truth]))
    spread = np.zeros((len(truth), len(labels)))
    spread[:, : len(own)] = predicted
    code = [labels.index(each) for each in truth]
    return {
        "accuracy": reference.accuracy_score(code, spread.argmax(axis=1)),
        "macro_f1": reference.f1_score(code, spread.argmax(axis=1), average="macro"),
        "log_loss": reference.log_loss(code, spread, labels=range(len(labels))),
    }


def holds(home, run_id, as_of) -> Evaluated:
    """A run to its end; what it found of both models, which an independent computation finds, too, and so does rejudge."""
    values = home.perform(run_id, as_of=as_of)
    evaluated = values["evaluate"]
    for model in filter(None, (evaluated.challenger, evaluated.champion)):
        for metric, wanted in by_sklearn(home, values, model).items():
            assert model.metrics[metric].value == pytest.approx(wanted, abs=1e-10), metric
    for difference in evaluated.differences:
        if difference.by is None:
            both = (evaluated.challenger.metrics, evaluated.champion.metrics)
            mine, its = (each[difference.metric].value for each in both)
            assert difference.estimate.value == pytest.approx(mine - its, abs=1e-10)
    [event] = home.events("verdict", run_id)
    assert rejudge(home.settings, event).wrong == ()
    return evaluated


@dataclass(frozen=True)
class Story:
    """A home in which a fourth class comes after the first champion, and the first one is retired later."""

    home: Home
    names: list[Any]
    """The four."""
    runs: dict[str, Evaluated]
    looks: dict[str, Watched]


@pytest.fixture(scope="module", params=["texts like numbers", "integers"])
def story(request, tmp_path_factory) -> Story:
    names = KINDS[request.param]
    home = made(tmp_path_factory.mktemp("root"), names)
    fill(home, names, 3, range(DAYS))
    fill(home, names, 4, range(DAYS, DAYS + 12))
    fill(home, names[1:], 3, range(DAYS + 12, DAYS + 24))
    runs, looks = {}, {}
    runs["three"] = holds(home, "three", AS_OF)
    runs["only in the hold-out"] = holds(home, "only in the hold-out", AS_OF + 2 * DAY)
    looks["new"] = watch(home, "new", AS_OF + 3 * DAY)
    runs["four"] = holds(home, "four", AS_OF + 10 * DAY)
    looks["retired"] = watch(home, "retired", AS_OF + 15 * DAY)
    runs["three again"] = holds(home, "three again", AS_OF + 24 * DAY)
    return Story(home, names, runs, looks)


def test_a_model_keeps_its_classes(story):
    """In its event, its lineage and its report: typed, and in the order of its predictions."""
    [event] = [each for each in story.home.events("stage", "three") if each.body["stage"] == "train"]
    stated = event.body["value"]["classes"]
    assert set(stated) == set(story.names[:3])
    assert {type(each) for each in stated} == {type(each) for each in story.names}
    assert tuple(stated) == story.runs["three"].challenger.classes
    assert story.home.registry.lineage(NAME, 1)["training"]["classes"] == stated
    report = of_version(story.home.settings, NAME, 1, "")
    assert report.made_by["classes"] == f"3: {', '.join(map(repr, stated))}"


def test_a_class_only_in_the_holdout_is_an_error_of_both(story):
    """It is in no training window yet: both are wrong on it, and the run comes to a verdict."""
    evaluated = story.runs["only in the hold-out"]
    for model in (evaluated.challenger, evaluated.champion):
        assert story.names[3] not in model.classes
        assert model.metrics["accuracy"].value < 0.9
        assert model.metrics["log_loss"].value > 0.1 * -np.log(np.finfo(float).eps)


def test_a_new_class_is_drift_that_retrains(story):
    """The monitor names it in a shift, and an alert follows; no fault of the data is called."""
    found = story.looks["new"]
    assert found.kind == "shift", found.reasons
    known = [reason for reason in found.reasons if "classes that the champion does not know in 2" in reason]
    assert any(f": {story.names[3]!r} in 2" in reason for reason in known), found.reasons
    assert alert_of(found) is not None


def test_a_challenger_that_knows_more_is_judged_on_the_same_rows(story):
    """Four classes beside three: the one that knows the new class is right on more rows, and says what it leans on."""
    evaluated = story.runs["four"]
    assert (len(evaluated.challenger.classes), len(evaluated.champion.classes)) == (4, 3)
    assert evaluated.challenger.metrics["accuracy"].value > evaluated.champion.metrics["accuracy"].value + 0.1
    assert {each.column for each in evaluated.importance} == {"height", "wind"}


def test_a_class_that_is_retired_is_drift_and_no_refusal(story):
    """The champion knows it and the newest rows lack it: a shift, and then a training with a shorter list."""
    found, evaluated = story.looks["retired"], story.runs["three again"]
    assert found.kind == "shift", found.reasons
    sentence = f"flooded is {story.names[0]!r} in none of 300 rows, and was in "
    assert any(reason.startswith(sentence) for reason in found.reasons), found.reasons
    assert set(evaluated.challenger.classes) == set(story.names[1:])
    assert len(evaluated.champion.classes) == 4


def test_the_command_line_names_the_classes(story, monkeypatch):
    """`evergreen drift` says which classes the champion does not know."""
    monkeypatch.setenv("EVERGREEN_HOME", str(story.home.settings.home))
    monkeypatch.setenv("EVERGREEN_PACKS", str(story.home.settings.packs))
    story.home.registry.set_alias(NAME, "champion", 1)
    try:
        shown = CliRunner().invoke(app, ["drift", NAME, "--as-of", f"{AS_OF + 3 * DAY:%Y-%m-%d}"])
    finally:
        story.home.registry.set_alias(NAME, "champion", 4)
    text = " ".join(shown.output.split())
    assert "of 300 rows are of classes that the champion does not know" in text, text
    assert "new class" in text


def test_a_rollback_across_classes_is_verified(story):
    """A version of three classes gets the predictions that it got, beside a champion of four."""
    assert drill(story.home.settings, NAME, by="a test").drill


def test_probation_judges_both_by_their_own_classes(story):
    """A champion of four beside the one before it, of three: on rows since, each is read by its own list."""
    home = story.home
    home.write(data={"task": "multiclass"}, gate=GATE, triggers=DRIFT, rollback={"probation": "9d", "drop": 0.05})
    run = home.begin("probation", as_of=AS_OF + 12 * DAY)
    store = Store(home.settings)
    champion, before = (Champion.of(home.registry, home.registry.version(NAME, version)) for version in (3, 2))
    standing = Standing(
        champion=3, since=AS_OF + 10 * DAY, until=AS_OF + 19 * DAY, before=2, model=before.model.hash, excused=None
    )
    manifest = manifest_of(store, home.perform("rows", as_of=AS_OF + 12 * DAY, until="ingest")["ingest"].manifest)
    seen = judge(run, store, manifest, standing, champion, before, None).seen
    assert seen.excused is None
    rows = manifest.within(seen.window)
    truth = pl.concat([pl.read_parquet(store.path(part.object)) for part in rows])["flooded"].to_list()
    right = []
    for model in (champion, before):
        predicted, _ = looks.predictions(run, store, model.model, rows)
        own = model.reference.classes
        chosen = [own[place] for part in rows for place in predicted[part.identity].argmax(axis=1)]
        right.append(np.mean([one == other for one, other in zip(chosen, truth, strict=True)]))
    assert (seen.figure.value, seen.figure_before.value) == pytest.approx(right, abs=1e-10)
    assert seen.difference.value == pytest.approx(right[0] - right[1], abs=1e-10)
    assert right[0] > right[1] + 0.1


def test_a_folder_that_states_no_classes_is_read_by_what_was_registered_with_it(story):
    """An older Evergreen made it: its reference has the classes, in the order of its predictions."""
    home = story.home
    store, champion = Store(home.settings), home.champion
    folder = home.settings.home / "older"
    home.registry.folder(NAME, champion.version, folder)
    described = json.loads((folder / "model.json").read_text())
    stated = described.pop("classes")
    (folder / "model.json").write_text(json.dumps(described))
    older = store.put(folder)
    home.registry.tag(NAME, champion.version, {"evergreen.model_hash": older.hash})
    try:
        found = scoring.classes_of(home.begin("older"), store, home.registry, home.champion)
    finally:
        home.registry.tag(NAME, champion.version, {"evergreen.model_hash": champion.model_hash})
    assert found == tuple(stated)
    assert list(map(type, found)) == list(map(type, stated))


def test_a_verdict_of_before_the_models_kept_their_classes_is_made_again(tmp_path):
    """Then both were read by the sorted classes of the challenger's training window."""
    names = sorted(KINDS["texts"])
    home = made(tmp_path, names, MODEL.replace("list(dict.fromkeys(target.tolist()))", "sorted(set(target.tolist()))"))
    fill(home, names, 4, range(DAYS + 1))
    home.perform("first")
    home.perform("second", as_of=AS_OF + DAY)
    [event] = home.events("verdict", "second")
    body = copy.deepcopy(event.body)
    for model in ("challenger", "champion"):
        del body["saw"]["evaluated"][model]["classes"]
    older = type(event)(**{**vars(event), "body": body})
    wrong = rejudge(home.settings, older).wrong
    assert [each for each in wrong if "is not what `evaluate` found" not in each] == []


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_word_the_classes_are_the_sorted_ones_of_the_training_window(kind, tmp_path):
    """The pack's function states none; those of the validation and the hold-out window are not among them."""
    names = KINDS[kind]
    model = MODEL.replace("list(dict.fromkeys(target.tolist()))", "sorted(set(target.tolist()))")
    home = made(tmp_path, names, model.replace(", classes=classes)", ")"))
    fill(home, names, 3, range(7))
    fill(home, names, 4, range(7, DAYS))
    assert holds(home, "first", AS_OF).challenger.classes == tuple(sorted(names[:3]))


def test_predictions_of_another_number_of_columns_are_refused_by_the_models_own_number(tmp_path):
    """The message has both numbers; stating the classes, as its advice says, mends it."""
    names = KINDS["texts"]
    wrong = MODEL.replace("list(dict.fromkeys(target.tolist()))", "sorted(set(target.tolist()))[:2]")
    home = made(tmp_path, names, wrong.replace(", classes=classes)", ")"))
    fill(home, names, 3, range(DAYS))
    says = r"the model of tide returned 2 columns, and it has 3 classes(.|\n)*job\.describe\(classes=…\) states which"
    with pytest.raises(EvaluationError, match=says):
        home.perform("wrong")
    (home.folder / "model.py").write_text(wrong)
    assert len(holds(home, "right", AS_OF).challenger.classes) == 2
