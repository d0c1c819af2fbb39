"""Every rule of the gate on a real chain; and its verdict made again from the events and the predictions alone."""

import copy
import hashlib
import json
from datetime import timedelta
from pathlib import Path

import polars as pl
import pytest
from tests.faults.conftest import AS_OF, DAYS, NAME, Home
from typer.testing import CliRunner

from evergreen import database as db
from evergreen.cli import app
from evergreen.errors import StageError
from evergreen.run import Evaluated, Ref
from evergreen.stages.judging import rejudge

pytestmark = [pytest.mark.slow, pytest.mark.fault]

GATE = {
    "primary": {"metric": "roc_auc", "min": 0.6, "margin": 0.2},
    "limits": [{"metric": "precision_at_recall_0.8", "min": 0.3}, {"metric": "calibration_error", "max": 0.5}],
    "slices": [{"by": "station", "metric": "roc_auc", "margin": 0.2, "min_rows": 50}],
    "fairness": [{"by": "station", "measure": "demographic_parity", "max": 0.9, "min_rows": 50}],
    "latency_ratio": 100,
    "size_ratio": 2,
}


ARTIFACTS = ("groups.csv", "gate_inputs.json", "evaluation.json", "importance.json", "model_card.md")


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """A home with two runs, the second beside a champion, under a gate with every kind of rule."""
    home = Home.make(tmp_path_factory.mktemp("judged"))
    home.write(gate=GATE)
    home.perform("first")
    home.write_day(DAYS)
    home.perform("second", as_of=AS_OF + timedelta(days=1))
    return home


def verdict_of(home, run_id):
    (event,) = home.events("verdict", run_id)
    return event


def test_every_rule_speaks(judged):
    """Limits, slices, fairness, latency and size are produced by a real evaluation, and each has its sentence."""
    reasons = verdict_of(judged, "second").body["verdict"]["reasons"]
    for words in ("precision_at_recall_0.8", "calibration_error", "station: ", "demographic_parity", "ms, ", " MB, "):
        assert any(words in reason for reason in reasons), (words, reasons)
    assert not any("not produced" in reason for reason in reasons)


@pytest.mark.parametrize("run_id", ["first", "second"])
def test_the_same_verdict_again(judged, run_id):
    """From the events, the predictions and the rows alone come the same figures and the same verdict, champion or none."""
    event = verdict_of(judged, run_id)
    again = rejudge(judged.settings, event)
    assert again.wrong == ()
    assert again.verdict.model_dump(mode="json") == event.body["verdict"]
    assert again.evaluated == Evaluated.model_validate(event.body["saw"]["evaluated"])


def altered(event, change):
    """The event with another body; the one in the database stays."""
    body = copy.deepcopy(event.body)
    change(body)
    return type(event)(**{**vars(event), "body": body})


def change_a_rule(body):
    body["saw"]["rules"]["primary"]["margin"] = 0.21


def change_a_figure(body):
    body["saw"]["evaluated"]["challenger"]["metrics"]["brier"]["value"] += 0.001


def change_the_verdict(body):
    body["verdict"]["decision"] = "reject"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (change_a_rule, "the rules are not those whose hash was written with them"),
        (change_a_figure, "the evaluation.challenger.metrics.brier.value is not what `evaluate` found"),
        (change_the_verdict, "written was reject"),
    ],
)
def test_an_altered_verdict_is_noticed(judged, change, says):
    """A rule, a figure or the decision itself, changed in the event, is named."""
    again = rejudge(judged.settings, altered(verdict_of(judged, "second"), change))
    assert any(says in sentence for sentence in again.wrong), again.wrong


def test_predictions_that_were_exchanged_are_noticed(judged):
    """The champion's predictions in place of the challenger's, sound as they are, give other figures."""

    def exchange(body):
        evaluated = body["saw"]["evaluated"]
        evaluated["challenger"]["predictions"] = evaluated["champion"]["predictions"]

    again = rejudge(judged.settings, altered(verdict_of(judged, "second"), exchange))
    assert any("roc_auc.value, made again from the predictions, is not" in sentence for sentence in again.wrong)


def test_an_altered_prediction_is_noticed(judged):
    """One byte of the predictions, changed here and in the remote: nothing is judged from them, and they are named."""
    event = verdict_of(judged, "second")
    ref = Ref.model_validate(event.body["saw"]["evaluated"]["challenger"]["predictions"])
    places = [path for path in judged.objects(ref) if path.exists()]
    before = {path: path.read_bytes() for path in places}
    try:
        for path, content in before.items():
            path.chmod(0o644)
            path.write_bytes(content[:-20] + bytes([content[-20] ^ 1]) + content[-19:])
        again = rejudge(judged.settings, event)
    finally:
        for path, content in before.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    assert (again.verdict, again.wrong) == (None, ("the predictions of the challenger are missing or altered",))


def test_a_version_has_what_an_auditor_needs_beside_it(judged):
    """In MLflow: the table of groups, where the predictions of both lie, importance, and the card as it was then."""
    evaluated = Evaluated.model_validate(verdict_of(judged, "second").body["saw"]["evaluated"])
    found = {name: judged.registry.artifact(NAME, 2, name) for name in ARTIFACTS}
    assert [name for name, content in found.items() if not content] == []
    groups = pl.read_csv(found["groups.csv"])
    assert groups["group"].to_list() == ["north", "south"]
    assert groups["challenger_value"].to_list() == [each.estimate.value for each in evaluated.challenger.slices]
    assert groups["difference_low"].to_list() == [each.estimate.low for each in evaluated.differences if each.by]
    inputs = json.loads(found["gate_inputs.json"])
    for name, model in (("challenger", evaluated.challenger), ("champion", evaluated.champion)):
        file = Path(judged.settings.data_remote) / inputs[name]["predictions"]["object"]
        assert hashlib.md5(file.read_bytes()).hexdigest() == model.predictions.hash
        assert pl.read_parquet(file).height == model.rows
    assert found["model_card.md"].decode() == judged.pack.card


def evergreen(home, *words):
    """A command in this process, on this home."""
    places = {"HOME": home.settings.home, "PACKS": home.settings.packs, "PROJECT": home.settings.project}
    env = {f"EVERGREEN_{name}": str(place) for name, place in places.items()}
    return CliRunner().invoke(app, list(words), env=env)


def test_an_auditor_asks_from_a_terminal(judged):
    """`rejudge` makes every verdict on the version again and says that it is the same; with what differs, and 1, if not."""
    done = evergreen(judged, "rejudge", f"{NAME}@2")
    assert (done.exit_code, done.stdout) == (
        0,
        f"✓ {NAME} version 2  promote in run second: made again, and the same\n",
    )
    event = verdict_of(judged, "second")
    body = copy.deepcopy(event.body)
    change_the_verdict(body)
    judged.database.append(NAME, "verdict", body, run_id="second")
    done = evergreen(judged, "rejudge", f"{NAME}@2", "--json")
    first, forged = json.loads(done.stdout)["verdicts"]
    assert (done.exit_code, first["wrong"], forged["run_id"]) == (1, [], "second")
    assert (forged["written"]["decision"], forged["made_again"]["decision"]) == ("reject", "promote")
    assert any("written was reject" in sentence for sentence in forged["wrong"])
    assert (
        "✗ tide version 2  reject in run second: 1 thing not as written"
        in evergreen(judged, "rejudge", f"{NAME}@2").stdout
    )
    with judged.database.engine.begin() as connection:
        connection.execute(
            db.events.delete().where(db.events.c.kind == "verdict", db.events.c.position > event.position)
        )


def test_a_verdict_without_its_run_is_refused(judged):
    """An event whose run left no stages cannot be judged again, and says of which run."""
    event = verdict_of(judged, "second")
    stranger = type(event)(**{**vars(event), "run_id": "nobody"})
    with pytest.raises(StageError, match=f"run nobody of {NAME} has a verdict, and no event of snapshot"):
        rejudge(judged.settings, stranger)
