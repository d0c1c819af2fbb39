"""The monitor on a small real pack: what it takes a change for, what follows from it, and what it leaves."""

import json
import shutil
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
from fastapi import FastAPI
from tests.faults.conftest import (
    AS_OF,
    DAYS,
    LATER,
    MORE,
    NAME,
    RULES,
    SCHEDULED,
    Home,
    new_truth,
    perform_stage,
)
from tests.served import Served

from evergreen import keys
from evergreen.errors import EvergreenError
from evergreen.history import last_look, runs_of
from evergreen.looks import PROFILE, REFERENCE, Reference
from evergreen.loop import monitor as watching
from evergreen.loop.monitor import Watched, alert_of, monitor, page_of
from evergreen.monitoring.profiles import Profile
from evergreen.run import Ingested
from evergreen.triggers import senders

TASKS = ("ingest", "validate", "monitor")

pytestmark = pytest.mark.fault


def make(root) -> Home:
    home = Home.make(root, days=range(DAYS + MORE))
    home.write(triggers=RULES)
    home.perform("first")
    return home


@pytest.fixture(scope="module")
def grown(tmp_path_factory) -> Home:
    """A home whose champion is as of `AS_OF`, and whose source has nine more days like those."""
    return make(tmp_path_factory.mktemp("root"))


@pytest.fixture
def home(grown) -> Iterator[Home]:
    """The same, with its source and its pack after the test as they were before."""
    before = {file: file.read_bytes() for file in grown.folder.rglob("*") if file.is_file()}
    yield grown
    for file in grown.folder.rglob("*"):
        if file.is_file() and file not in before:
            file.unlink()
    for file, content in before.items():
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(content)


def watch(home, run_id, as_of=LATER, force=True) -> Watched:
    """A look, as the DAG's three tasks take it, whatever the first two raise; at the whole source, if by force."""
    run = keys.begin(
        home.settings, home.pack, run_id, as_of=as_of, scheduled=SCHEDULED, reason="a test", kind="watch", force=force
    )
    values = {}
    try:
        for stage in ("ingest", "validate"):
            perform_stage(run, stage, values)
    except EvergreenError:
        pass
    return monitor(run, values.get("ingest"), values.get("validate"))


def turn(home, change, days=range(DAYS + MORE - 6, DAYS + MORE)):
    """Turn the rows of the newest two windows into what the test is about."""
    for number in days:
        home.write_day(number, change)


def nulls(rows):
    there = np.random.default_rng(1).random(rows.height) < 0.4
    return rows.with_columns(wind=pl.when(pl.Series(there)).then(None).otherwise("wind"))


def northern(rows):
    """Another mix of stations, which the champion does not look at."""
    there = np.random.default_rng(7).random(rows.height) < 0.9
    return rows.with_columns(station=pl.when(pl.Series(there)).then(pl.lit("north")).otherwise("station"))


def test_a_version_is_registered_with_what_it_was_made_from(home):
    """The profile has all rows of the snapshot, and predictions for the hold-out's alone; its windows are beside it."""
    profile = Profile.from_bytes(home.registry.artifact(NAME, 1, PROFILE))
    about = Reference.model_validate_json(home.registry.artifact(NAME, 1, REFERENCE))
    assert (profile.rows, profile.columns["height"].rows) == (1100, 1100)
    assert (profile.predictions.rows, profile.columns["flooded"].missing) == (300, 0)
    assert (about.metric, about.classes) == ("roc_auc", None)
    assert [each.column for each in about.importance] == ["height", "wind"]
    told = json.loads(home.registry.artifact(NAME, 1, "importance.json"))
    assert [each["column"] for each in told["columns"]] == ["height", "wind"]
    assert home.registry.artifact(NAME, 1, "plots/importance.png").startswith(b"\x89PNG")
    assert [each.end for each in about.usual] == [AS_OF - timedelta(days=back) for back in (0, 3, 6)]


def test_days_like_those_before_are_quiet(home):
    """Nothing is alerted; the look is an event, with a report, a page and a profile in the store."""
    found = watch(home, "quiet")
    assert (found.kind, alert_of(found)) == ("quiet", None)
    assert [each.end for each in found.windows][-1] == LATER
    assert home.events("drift")[-1].body["value"]["kind"] == "quiet"
    assert b"<!doctype html>" in page_of(home.settings, NAME, "watch__quiet")
    report = json.loads(watching.Store(home.settings).read_bytes(found.report))
    assert {each["name"] for each in report["windows"][-1]["columns"]} >= {"height", "wind", "flooded"}
    assert report["windows"][-1]["predictions"]["psi"] is not None
    assert report["windows"][-1]["performance"]["metric"] == "roc_auc"
    assert home.registry.artifact(NAME, 1, f"drift/{LATER:%Y-%m-%d}.html") is not None


def test_a_look_is_no_run(home):
    """Neither `evergreen runs` nor admission's count of runs takes it for a training."""
    before = runs_of(home.database, NAME)
    watch(home, "no-run")
    assert runs_of(home.database, NAME) == before
    assert home.events("run", "watch__no-run") == []


def test_a_look_and_a_run_of_one_id_are_two(home):
    """Airflow's run ids are unique within a DAG only: the monitor's cron runs are called as the training's are."""
    watch(home, "first")
    assert home.events("watch", "watch__first")
    assert home.stages("stage", "first")[-1] == "promote"


def test_the_same_look_is_taken_once(home):
    """Again, by its own run or another, it is looked up: one event, and a receipt for the other run."""
    found = watch(home, "once", force=False)
    before = len(home.events("drift"))
    assert watch(home, "once", force=False) == watch(home, "once-more", force=False) == found
    assert len(home.events("drift")) == before
    assert home.events("receipt", "watch__once-more")[-1].body["stage"] == "monitor"
    assert page_of(home.settings, NAME, "watch__once-more") == page_of(home.settings, NAME, "watch__once")


def test_what_a_machine_keeps_may_vanish(home):
    """Profiles and predictions of partitions are made again, and the look finds the same."""
    found = watch(home, "kept")
    for name in ("profiles", "predictions"):
        assert list((home.settings.cache / name).rglob("*"))
        shutil.rmtree(home.settings.cache / name)
    again = watch(home, "vanished")
    assert again.model_dump(exclude={"page", "report"}) == found.model_dump(exclude={"page", "report"})


def test_a_new_day_costs_a_day(home):
    """Only partitions that were not looked at before are scored: one job for one day."""
    watch(home, "before", LATER - timedelta(days=1), force=False)
    known = set((home.settings.cache / "predictions").rglob("*.npy"))
    home.write_day(DAYS + MORE)
    watch(home, "day", LATER + timedelta(days=1), force=False)
    new = set((home.settings.cache / "predictions").rglob("*.npy")) - known
    assert 1 <= len(new) <= 2


def test_nulls_are_a_fault_and_nothing_is_alerted(home):
    turn(home, nulls)
    found = watch(home, "nulls")
    assert (found.kind, alert_of(found)) == ("data fault", None)
    assert found.reasons[0].startswith("wind has no value in ")
    assert "cannot predict these rows: the model of tide returned nan" in found.reasons[-1]


def test_labels_that_the_model_does_not_know_are_a_fault(home):
    """A third value of a target that is 0 or 1: the look says so, and what else it sees, instead of failing itself."""
    turn(home, lambda rows: rows.with_columns(flooded=pl.col("flooded") + 1))
    found = watch(home, "strange labels")
    assert (found.kind, alert_of(found)) == ("data fault", None)
    assert found.reasons[-1].endswith("the binary target holds 1, 2")
    assert found.page is not None


def test_a_refused_suite_is_a_fault(home):
    """What validate says comes first; the rows that it refused are on the page."""
    home.write(
        triggers=RULES,
        expectations=[{"expect_column_mean_to_be_between": {"column": "wind", "min_value": 5, "max_value": 6}}],
    )
    found = watch(home, "refused")
    assert (found.kind, alert_of(found)) == ("data fault", None)
    assert "expect_column_mean_to_be_between" in found.reasons[0]
    assert found.page is not None


def test_a_fault_fails_its_task_for_good(home, monkeypatch):
    """Whoever is told of failed tasks is told of it, once: nothing is tried again. A quiet look's task ends well."""
    from airflow.sdk.exceptions import AirflowFailException
    from airflow.sdk.execution_time.context import set_current_context

    from evergreen.orchestration.dags import monitoring_dag

    monkeypatch.setenv("EVERGREEN_HOME", str(home.settings.home))
    monkeypatch.setenv("EVERGREEN_PACKS", str(home.settings.packs))
    monkeypatch.setenv("EVERGREEN_URL", "http://127.0.0.1:9")

    def look(run_id):
        dag_run = SimpleNamespace(run_id=run_id, run_type="manual", logical_date=None, run_after=LATER)
        with set_current_context({"dag_run": dag_run, "params": {"as_of": LATER.isoformat(), "force": True}}):
            ingest, validate, looks = (monitoring_dag(home.pack).get_task(name).python_callable for name in TASKS)
            ingested = ingest()
            return looks(ingested=ingested, validated=validate(ingested=ingested))

    assert look("as-it-was")["kind"] == "quiet"
    turn(home, nulls)
    with pytest.raises(AirflowFailException, match=r"data fault: wind has no value in .*; a person looks"):
        look("with-nulls")
    seen = last_look(home.database, NAME)
    assert (seen["run_id"], seen["kind"], seen["champion"]) == ("watch__with-nulls", "data fault", 1)
    assert seen["reasons"][0].startswith("wind has no value in ")


def test_a_look_during_a_training_is_skipped_and_said_to_be(home, monkeypatch):
    """Whichever stage meets it: its slot is free, nothing is alerted, and `packs` names the run; the next look looks."""
    from airflow.sdk.exceptions import AirflowSkipException
    from airflow.sdk.execution_time.context import set_current_context

    from evergreen.orchestration.dags import monitoring_dag

    monkeypatch.setenv("EVERGREEN_HOME", str(home.settings.home))
    monkeypatch.setenv("EVERGREEN_PACKS", str(home.settings.packs))
    monkeypatch.setenv("EVERGREEN_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(keys, "LOOK_WAIT_S", 0)
    ingest, validate, looks = (monitoring_dag(home.pack).get_task(name).python_callable for name in TASKS)
    dag_run = SimpleNamespace(run_id="busy", run_type="manual", logical_date=None, run_after=LATER)
    training, alerts = home.begin("a-training"), home.events("alert")
    said = "not looked: pack tide: a-training is acting, .*; the next look comes by its own schedule"
    with set_current_context({"dag_run": dag_run, "params": {"as_of": LATER.isoformat(), "force": True}}):
        with keys._alone_here(training, 0), home.database.lease(f"stage:{NAME}", training.id):
            with pytest.raises(AirflowSkipException, match=said):
                ingest()
            with pytest.raises(AirflowSkipException, match=said):
                looks(ingested=None, validated=None)
            seen = last_look(home.database, NAME)
            assert (seen["run_id"], seen["kind"]) == ("watch__busy", None)
            assert seen["reasons"][0].startswith("pack tide: a-training is acting")
        ingested = ingest()
        with home.database.lease(f"stage:{NAME}", training.id), pytest.raises(AirflowSkipException, match="a-training"):
            validate(ingested=ingested)
        assert home.events("alert") == alerts
        assert looks(ingested=ingested, validated=validate(ingested=ingested))["kind"] == "quiet"


def test_a_source_that_is_gone_is_a_fault(home):
    """There is nothing to draw; what ingest said is recorded."""
    for file in home.rows.glob("*"):
        file.unlink()
    found = watch(home, "gone")
    assert (found.kind, found.page, alert_of(found)) == ("data fault", None, None)
    assert home.events("failure", "watch__gone")[-1].body["what"] == found.reasons[0]


def test_a_stage_that_fails_for_another_reason_is_no_fault_of_the_data(home):
    """A store that is away, say: nothing is compared, and nobody is told of bad data."""
    run = keys.begin(home.settings, home.pack, "away", as_of=LATER, scheduled=SCHEDULED, reason="a test", kind="watch")
    body = {"stage": "ingest", "error": "StoreError", "what": "the remote is away", "fix": None}
    home.database.append(NAME, "failure", body, run_id=run.id)
    found = monitor(run, None, None)
    assert (found.kind, found.reasons) == (None, ("ingest failed: the remote is away",))
    killed = keys.begin(
        home.settings, home.pack, "killed", as_of=LATER, scheduled=SCHEDULED, reason="a test", kind="watch"
    )
    assert monitor(killed, None, None).reasons == ("ingest did not come to an end",)


def test_rows_that_stopped_are_a_fault(home):
    """No new rows for a whole window, though the source is there."""
    for number in range(DAYS + MORE - 3, DAYS + MORE):
        home.file(number).unlink()
    found = watch(home, "stopped")
    assert found.kind == "data fault"
    assert found.reasons[0].startswith("0 rows")


def test_a_model_that_knows_nothing_any_more_is_alerted_once(home, tmp_path):
    """The alert is signed and posted like anybody's; told twice it is one; it has the look's as-of and its evidence."""
    turn(home, new_truth)
    found = watch(home, "shift")
    assert found.kind == "shift", found.reasons
    served = Served(home.settings.home, PACKS=str(home.settings.packs))
    senders.ensure(home.settings)
    outer = FastAPI()
    outer.mount("/evergreen", served.app)
    served.app = outer
    with served.running():
        watching.tell(home.settings, found, served.url)
        watching.tell(home.settings, watch(home, "shift-again", force=False), served.url)
    [alert] = home.events("alert")
    assert alert.body["sender"] == "monitor"
    assert alert.body["as_of"] == LATER.isoformat()
    assert alert.body["reason"].startswith("roc_auc is ")
    assert alert.body["fingerprint"].startswith("drift ")
    assert "performance" in alert.body["fingerprint"]
    assert alert.body["evidence"]["window"]["end"] in (LATER.isoformat(), f"{LATER:%Y-%m-%dT%H:%M:%S}Z")


def test_what_the_model_withstands_is_watched(home):
    turn(home, northern)
    found = watch(home, "northern")
    assert (found.kind, alert_of(found)) == ("withstood", None), found.reasons
    assert found.columns == ("station",)


def swapped_truth(rows):
    """Wind counts and height does not, so that the champion is as good as before only by what it leaned on less."""
    chance = np.random.default_rng(int(rows["seen_at"][0].timestamp()))
    truth = 3 * rows["wind"].to_numpy() + 0.5 * chance.normal(size=rows.height) > 0.5
    return rows.with_columns(flooded=pl.Series(truth.astype("int64")))


def test_what_the_champion_leans_on_is_seen_to_move(home):
    """Another column matters than when it was made, which a drop within the rule withstands: it is watched, and said."""
    home.write(triggers={"drift": RULES["drift"] | {"performance": {"drop": 0.9}}})
    turn(home, swapped_truth)
    found = watch(home, "leans")
    assert (found.kind, found.columns, found.model) == ("withstood", (), ("importance",)), found.reasons
    report = json.loads(watching.Store(home.settings).read_bytes(found.report))
    shift = report["windows"][-1]["importance"]
    assert shift["shift"] > shift["noise"]
    told = {each["column"]: each for each in shift["columns"]}
    assert told["height"]["before"] > told["wind"]["before"]
    assert told["height"]["now"] < told["wind"]["now"]
    assert any(reason.startswith("what the champion leans on moved by ") for reason in found.reasons)


def test_what_a_window_leans_on_is_asked_once(home):
    """A second look at the same windows starts no job: the machine has kept it, and finds the same without."""
    first = watch(home, "asked")
    kept = {file: file.stat().st_mtime_ns for file in (home.settings.cache / "importance").rglob("*.json")}
    again = watch(home, "asked-again")
    assert kept == {file: file.stat().st_mtime_ns for file in (home.settings.cache / "importance").rglob("*.json")}
    shutil.rmtree(home.settings.cache / "importance")
    assert watch(home, "asked-anew").report == again.report == first.report


def test_a_version_without_importance_is_watched_as_before(home):
    """One that was registered before there was any: everything else is compared."""
    [file] = Path(home.settings.mlflow_artifacts).rglob(REFERENCE)
    content = file.read_bytes()
    about = json.loads(content)
    del about["importance"]
    file.write_text(json.dumps(about))
    try:
        found = watch(home, "no-importance")
    finally:
        file.write_bytes(content)
    report = json.loads(watching.Store(home.settings).read_bytes(found.report))
    assert found.kind == "quiet"
    assert {each["importance"] for each in report["windows"]} == {None}


def test_the_same_season_before_holds(tmp_path):
    """A look of a year ago saw the like: so it is the season, and no alert."""
    home = make(tmp_path)
    turn(home, northern)
    found = watch(home, "season-before")
    assert found.kind == "withstood"
    value = json.loads(found.model_dump_json()) | {"as_of": (LATER - timedelta(days=364)).isoformat()}
    home.database.append(
        NAME, "drift", {"stage": "monitor", "value": value}, run_id="watch__last-year", key="last-year"
    )
    again = watch(home, "season-now")
    assert again.kind == "seasonal", again.reasons
    assert "season" in again.evidence


def test_without_a_champion_nothing_is_compared(tmp_path):
    """It says so, fails nothing and alerts nothing."""
    home = Home.make(tmp_path)
    home.write(triggers=RULES)
    found = watch(home, "none", AS_OF)
    assert (found.kind, found.page, alert_of(found)) == (None, None, None)
    assert "no champion yet" in found.reasons[0]


def test_a_champion_from_before_there_were_profiles_is_left_alone(home):
    """It says so, and the next version will have one."""
    [file] = Path(home.settings.mlflow_artifacts).rglob(PROFILE)
    content = file.read_bytes()
    file.unlink()
    try:
        found = watch(home, "no-profile", LATER - timedelta(days=2))
    finally:
        file.write_bytes(content)
    assert (found.kind, alert_of(found)) == (None, None)
    assert "has no profile" in found.reasons[0]


def test_what_the_monitor_has_read_a_run_need_not_read_again(home):
    """A sound look counts as known; one with labels still to come does not, for they may come late."""
    watch(home, "known-look", force=False)
    known = home.perform("known-run", as_of=LATER, until="ingest")["ingest"]
    assert isinstance(known, Ingested)
    assert known.known == known.partitions
    turn(home, lambda rows: rows.with_columns(flooded=pl.lit(None, pl.Int64)), [DAYS + MORE - 1])
    watch(home, "unlabelled")
    home.write_day(DAYS + MORE - 1)
    later = LATER + timedelta(days=4)
    for number in range(DAYS + MORE, DAYS + MORE + 4):
        home.write_day(number)
    values = home.perform("labelled", as_of=later, until="snapshot")
    assert values["snapshot"].rows == 1100
