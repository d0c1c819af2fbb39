"""A new champion on probation: seen to fail by the monitor, it is taken back, once, and by the same door."""

import dataclasses
import json
import sys
from datetime import timedelta
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import polars as pl
import pytest
from tests.faults.conftest import AS_OF, DAYS, LATER, LENIENT, MORE, NAME, PROBATION, RULES, Home, fallen
from tests.faults.test_killed_stages import tried
from tests.faults.test_monitor import TASKS, nulls, turn, watch
from typer.testing import CliRunner

from evergreen import keys, work
from evergreen.cli import app
from evergreen.errors import AlertError, RegistryError
from evergreen.evaluation.probation import Seen, decide
from evergreen.history import last_look, values_of
from evergreen.loop import probation, rollback
from evergreen.loop.monitor import Champion
from evergreen.loop.probation import standing, withdraw
from evergreen.registry import ledger, promotion
from evergreen.run import Ref, Verdict, Window

pytestmark = pytest.mark.fault

DAY = timedelta(days=1)
CLOCK = {"start": f"{AS_OF:%Y-%m-%d}", "speed": 0.001}
"""On which the promotion was at `AS_OF`."""
NUMBERS = count()


@pytest.fixture(scope="module")
def fell(tmp_path_factory) -> Home:
    """A home whose second champion is worse than the first, and whose source has nine days that neither knows."""
    home = Home.make(tmp_path_factory.mktemp("root"), days=range(DAYS + MORE))
    fallen(home)
    return home


@pytest.fixture
def home(fell):
    """The same, its second version promoted anew where a test took it back, its pack and its rows as they were."""
    before = {file: file.read_bytes() for file in fell.folder.rglob("*") if file.is_file()}
    if [reign.version for reign in ledger.reigns(fell.database, NAME)[-2:]] != [1, 2]:
        fell.registry.set_alias(NAME, "champion", 1)
        promotion.settle(fell.database, fell.registry, NAME)
        promote(fell, 2)
    yield fell
    for file, content in before.items():
        file.write_bytes(content)


def promote(home, version):
    """Another promotion by the gate."""
    promotion.promote(
        home.database,
        home.registry,
        run=home.begin(f"anew {next(NUMBERS)}"),
        version=version,
        judged_against=home.champion.version,
        verdict=Verdict(decision="promote", reasons=("a test says so",)),
    )


def looked(home, as_of=LATER):
    """The run of a look, and what it says of the champion on probation."""
    name = f"look {next(NUMBERS)}"
    found = watch(home, name, as_of)
    run = keys.begin(home.settings, home.pack, name, as_of=as_of, scheduled=as_of, reason="a test", kind="watch")
    return run, found.probation


def excused(home, as_of=LATER):
    """Why the champion was not judged; it stays."""
    run, ruling = looked(home, as_of)
    withdraw(run, ruling)
    assert (ruling.decision, home.champion.version) == ("keep", 2)
    return ruling.seen.excused


def test_a_champion_that_fails_is_taken_back(home):
    """By the door that a person uses, the monitor named and the figures said; decided again from the event it is the same."""
    run, ruling = looked(home)
    withdraw(run, ruling)
    assert (ruling.decision, home.champion.version) == ("roll back", 1)
    assert (ruling.seen.rows, ruling.seen.difference.partitions) == (900, 9)
    last = ledger.reigns(home.database, NAME)[-1]
    assert (last.version, last.by, last.who, last.why) == (1, "rollback", "the monitor", ruling.why)
    assert ruling.why.startswith("version 2 is worse by more than 0.05: roc_auc 0.")
    assert "of version 1, -0." in ruling.why
    noted = work.checkpoints(home.settings, NAME)
    assert (noted[-1].position, ledger.verify(home.database, NAME, noted).holds) == (last.position, True)
    written = home.events("drift", run.id)[-1].body["value"]["probation"]
    assert decide(Seen.model_validate(written["seen"])).model_dump(mode="json") == written


def test_it_is_taken_back_once(home):
    """A task that is tried again keeps its look, and moves nothing; not even when somebody has promoted the version anew."""
    run, ruling = looked(home)
    withdraw(run, ruling)
    moves = len(home.events("rollback"))
    name = run.id.removeprefix("watch__")
    assert watch(home, name).probation == ruling
    withdraw(run, ruling)
    assert standing(run, home.registry, home.champion) is None, "what was gone back to is on no probation"
    promote(home, 2)
    withdraw(run, watch(home, name).probation)
    assert (len(home.events("rollback")), home.champion.version) == (moves, 2)


def test_a_champion_that_came_since_is_left_alone(home):
    """A person was first: the look's rollback is void, and says why; the task does not fail for it."""
    run, ruling = looked(home)
    rollback.rollback(home.settings, NAME, why="I was first", by="ada")
    withdraw(run, ruling)
    last = home.events("rollback", run.id)[-1].body
    assert (last["status"], last["why"]) == ("void", "the champion is version 1 now; the rollback was from version 2")
    assert ledger.reigns(home.database, NAME)[-1].who == "ada"


def test_a_version_that_is_not_what_it_was_is_not_gone_back_to(home):
    """Its bytes in MLflow were altered: the champion stays, and the failure is there for a person to find."""
    run, ruling = looked(home)
    source = home.registry._client.get_model_version_download_uri(NAME, "1")
    file = Path(urlsplit(source).path) / "artifacts" / "model" / "weights.json"
    whole = file.read_bytes()
    file.write_text(json.dumps([0.0, 0.0, 9.0]))
    try:
        with pytest.raises(RegistryError, match=r"version 1: its model folder in MLflow is .* when it was registered"):
            withdraw(run, ruling)
    finally:
        file.write_bytes(whole)
    assert home.champion.version == 2
    found = last_look(home.database, NAME)
    assert (found["kind"], found["run_id"]) == ("not rolled back", run.id)
    assert "its model folder in MLflow is" in found["reasons"][0]


def test_the_monitors_task_goes_back(home, monkeypatch):
    """What Airflow runs does it, before the alert is posted, which may fail and be tried again."""
    from airflow.sdk.execution_time.context import set_current_context

    from evergreen.orchestration.dags import monitoring_dag

    for name, value in {"HOME": home.settings.home, "PACKS": home.settings.packs, "URL": "http://127.0.0.1:9"}.items():
        monkeypatch.setenv(f"EVERGREEN_{name}", str(value))
    dag_run = SimpleNamespace(run_id="by Airflow", run_type="manual", logical_date=None, run_after=LATER)
    with set_current_context({"dag_run": dag_run, "params": {"as_of": LATER.isoformat(), "force": True}}):
        ingest, validate, look = (monitoring_dag(home.pack).get_task(name).python_callable for name in TASKS)
        ingested = ingest()
        try:
            found = look(ingested=ingested, validated=validate(ingested=ingested))
        except AlertError:
            found = home.events("drift", "watch__by Airflow")[-1].body["value"]
    assert (found["probation"]["decision"], home.champion.version) == ("roll back", 1)


def test_a_pack_that_does_not_say_never_goes_back_by_itself(home):
    home.write(gate=LENIENT, triggers=RULES)
    assert looked(home)[1] is None


def test_a_champion_is_on_probation_for_as_long_as_the_pack_says(home):
    """Since its promotion, on the pack's clock, which here goes on from where the home was made."""
    home.write(gate=LENIENT, rollback=PROBATION | {"probation": "8d"}, triggers=RULES, clock=CLOCK)
    run = home.begin("on the clock", as_of=LATER)
    ends = standing(dataclasses.replace(run, as_of=LATER - 2 * DAY), home.registry, home.champion).until
    assert AS_OF + 8 * DAY <= ends < AS_OF + 9 * DAY
    assert standing(dataclasses.replace(run, as_of=ends), home.registry, home.champion) is None


def test_a_champion_that_is_as_good_stays(home):
    """The same model is not worse than itself by more than the rule, and the figures are said."""
    home.write(gate=LENIENT, rollback=PROBATION | {"drop": 0.9}, triggers=RULES)
    run, ruling = looked(home)
    withdraw(run, ruling)
    assert (ruling.decision, home.champion.version) == ("keep", 2)
    assert ruling.why.startswith("version 2 is not shown worse by more than 0.9: roc_auc 0.")


def test_the_terminal_shows_it_and_changes_nothing(home):
    """`drift` says what the monitor would go by; only the monitor's task goes back."""
    places = {"HOME": home.settings.home, "PACKS": home.settings.packs, "PROJECT": home.settings.project}
    env = {f"EVERGREEN_{name}": str(place) for name, place in places.items()}
    shown = CliRunner().invoke(app, ["drift", NAME, "--as-of", f"{LATER:%Y-%m-%d}"], env=env).stdout
    assert "probation: version 2 is worse by more than 0.05: roc_auc 0." in " ".join(shown.split())
    assert home.champion.version == 2


def test_without_labels_nothing_is_judged(home):
    turn(home, lambda rows: rows.with_columns(flooded=pl.lit(None, pl.Int64)), range(DAYS, DAYS + MORE))
    assert excused(home) == "no labels have come since its hold-out, which ended 2024-01-13 00:00"


def test_on_faulty_data_nothing_is_judged(home):
    turn(home, nulls)
    assert excused(home).startswith("the data have a fault: wind has no value in ")


def test_a_champion_that_was_rolled_back_from_is_not_gone_back_to(home):
    """Version 1 was left for version 2 by a rollback of a person's, and put back by hand; version 2 came again."""
    third = home.perform("third", as_of=AS_OF + DAY)["promote"]
    assert (third.champion, third.previous) == (3, 2)
    rollback.rollback(home.settings, NAME, to=1, why="it drowns", by="ada")
    home.registry.set_alias(NAME, "champion", 3)
    promotion.settle(home.database, home.registry, NAME)
    promote(home, 2)
    assert excused(home) == "version 3, the champion before it, was rolled back from"


def test_a_champion_before_that_knows_the_rows_is_no_measure(home):
    """It learned from some of them: that is said, and nothing is compared."""
    run, ruling = looked(home)
    store = probation.Store(home.settings)
    manifest = work.manifest_of(
        store, Ref.model_validate(values_of(home.database, run.id, NAME)["validate"]["manifest"])
    )
    champion, before = (Champion.of(home.registry, home.registry.version(NAME, version)) for version in (2, 1))
    knows = dataclasses.replace(before, seen=Window(start=AS_OF, end=AS_OF + DAY))
    at = standing(run, home.registry, home.champion)
    again = probation.judge(run, store, manifest, at, champion, knows, None)
    assert again.decision == "keep"
    assert again.seen.excused.startswith("version 1, the champion before it, has learned from rows of 2024-01-13 00:00")
    assert probation.judge(run, store, manifest, at, champion, before, None) == ruling


POINTS = ["withdraw/append rollback/1", "withdraw/set_registered_model_alias/1", "withdraw/append rollback/1"]
"""Before the intent, the alias, and the end, each found by the attempt after the one before."""


def test_a_killed_look_that_goes_back_ends_as_an_undisturbed_one(tmp_path):
    """SIGKILL before the intent, the alias, and the end; tried again each time, it has gone back once."""
    ((found),) = tried([str(tmp_path / "fall"), "fall", "row", "monitor/append drift/1", *POINTS])
    assert found["deaths"] == ["killed"] * 4
    assert found["state"] == found["undisturbed"]
    assert (found["state"]["reigns"], found["state"]["left"], found["state"]["holds"]) == ([1, 2, 1], [2], True)


@pytest.mark.prove
@pytest.mark.timeout(3600)
def test_a_way_back_killed_at_any_call_ends_as_an_undisturbed_one(tmp_path, capsys):
    """Before every append, job and write to MLflow from the look's event on; what comes before is as in any look.

    What may be left is the folder of the job that predicted the golden batch, which nobody adopts: jobs are swept.
    """
    ((found),) = tried([str(tmp_path / "fall"), "fall", "points", "monitor/append", "withdraw/"])
    whole = found["undisturbed"]
    differing = {
        trial["point"]: [name for name in whole if name != "left in jobs" and trial["state"][name] != whole[name]]
        for trial in found["trials"]
    }
    with capsys.disabled():
        sys.stdout.write("".join(f"\n{point:45} {', '.join(names) or 'same'}" for point, names in differing.items()))
    assert len(differing) > 8
    assert {trial["death"] for trial in found["trials"]} == {"killed"}
    assert {point: names for point, names in differing.items() if names} == {}
