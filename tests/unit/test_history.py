"""Events read as runs: outcomes and reasons, from what was written then."""

from datetime import UTC, datetime

import pytest

from evergreen.database import Database
from evergreen.errors import StageError
from evergreen.history import history_of, runs_of, why_run
from evergreen.run import Promoted, Registered, Verdict, digest

PARTS = {
    "stage": "train",
    "inputs": {"data": "a", "windows": {"end": "2024-01-01"}},
    "parameters": {"seed": 7, "params": {"epochs": 5, "layers": [64, 64]}},
    "code": "c0de",
    "environment": {"python": "3.11.7", "lock": "10c4", "image": None},
}


@pytest.fixture
def database(tmp_path):
    return Database(f"sqlite:///{tmp_path / 'events.db'}")


def begin(database, run_id, pack="more"):
    body = {"as_of": datetime(2024, 1, 1, tzinfo=UTC).isoformat(), "reason": "a test asked", "force": False}
    database.append(pack, "run", body, run_id=run_id)


def perform(database, run_id, stage, value=None, *, pack="more", **changed):
    """Append what a stage leaves; `changed` are the parts of its key that differ from PARTS."""
    parts = {**PARTS, "stage": stage, **changed}
    value = {} if value is None else value.model_dump(mode="json")
    body = {"stage": stage, "parts": parts, "value": value, "summary": f"{stage} done", "seconds": 1.5}
    database.append(pack, "stage", body, run_id=run_id, key=digest(parts))
    return digest(parts)


def fail(database, run_id, stage):
    body = {"stage": stage, "error": "SourceError", "what": "no rows", "fix": "bring some"}
    database.append("more", "failure", body, run_id=run_id)


def promoted(decision="promote", version=2, champion=2, previous=1):
    verdict = Verdict(decision=decision, reasons=("because",))
    return Promoted(model="more", version=version, verdict=verdict, champion=champion, previous=previous)


@pytest.mark.parametrize(
    ("ended", "outcome"),
    [
        (promoted(), "promoted"),
        (promoted(previous=None), "promoted"),
        (promoted(previous=2), "unchanged"),
        (promoted(champion=3), "superseded"),
        (promoted("reject", champion=1), "rejected"),
        (promoted("reject", champion=None, previous=None), "rejected"),
        (promoted("review", champion=1), "review"),
    ],
)
def test_outcomes(database, ended, outcome):
    """A run that came to its end is told by its verdict, and by who was champion before and after."""
    begin(database, "first")
    registered = Registered(model="more", version=2, mlflow_run="1", model_hash="2")
    perform(database, "first", "register", registered)
    perform(database, "first", "promote", ended)
    found = history_of(database, "first")
    assert (found["outcome"], found["version"], found["champion"]) == (outcome, 2, ended.champion)


def test_a_run_without_an_end_is_running(database):
    """What has begun and neither failed nor ended goes on."""
    begin(database, "first")
    perform(database, "first", "ingest")
    assert history_of(database, "first")["outcome"] == "running"


def test_a_run_that_failed_has_its_failure(database):
    """The stage, the error, what and fix, as they were recorded."""
    begin(database, "first")
    fail(database, "first", "ingest")
    found = history_of(database, "first")
    assert (found["outcome"], found["failure"]["stage"], found["failure"]["fix"]) == ("failed", "ingest", "bring some")
    assert found["stages"] == [{"stage": "ingest", "state": "failed", "summary": "no rows", "seconds": None}]


def test_a_failure_that_was_mended_is_no_failure(database):
    """A later attempt of the stage went well: the run goes on."""
    begin(database, "first")
    fail(database, "first", "ingest")
    perform(database, "first", "ingest")
    found = history_of(database, "first")
    assert (found["outcome"], found["failure"], found["stages"][0]["state"]) == ("running", None, "done")


def test_stages_are_in_the_chains_order(database):
    """Whatever the order of the events; a skipped one says what the work it stands on said, and its own seconds."""
    begin(database, "first")
    key = perform(database, "first", "train")
    begin(database, "second")
    body = {"stage": "train", "of": "first", "verified": True, "seconds": 0.25}
    database.append("more", "receipt", body, run_id="second", key=key)
    perform(database, "second", "ingest")
    assert history_of(database, "second")["stages"] == [
        {"stage": "ingest", "state": "done", "summary": "ingest done", "seconds": 1.5},
        {"stage": "train", "state": "skipped", "summary": "train done", "seconds": 0.25},
    ]


def test_runs_are_newest_first_and_one_packs(database):
    """At most as many as asked for; another pack's are left out."""
    for run_id in ("first", "second", "third"):
        begin(database, run_id)
    begin(database, "other", pack="less")
    assert [run["run_id"] for run in runs_of(database, "more", limit=2)] == ["third", "second"]


def test_an_unknown_run_suggests_the_nearest(database):
    """A run id that is nearly right is answered with the right one."""
    begin(database, "manual__2024-01-01")
    with pytest.raises(StageError, match="there is no run 'manual__2024-01-02'") as caught:
        why_run(database, "manual__2024-01-02")
    assert caught.value.fix == "did you mean 'manual__2024-01-01'?"


def test_a_run_of_two_packs_asks_which(database):
    """Run ids are unique within a pack: two packs' cron runs may share one, and each is told by itself."""
    for pack in ("less", "more"):
        begin(database, "scheduled__1", pack=pack)
        perform(database, "scheduled__1", "ingest", pack=pack)
    with pytest.raises(StageError, match="is a run of less, more"):
        why_run(database, "scheduled__1")
    assert len(why_run(database, "scheduled__1", "more")) == 1


def changed_by(**parts):
    """PARTS' own mappings with some of their keys changed."""
    return {
        part: {**PARTS[part], **content} if isinstance(content, dict) else content for part, content in parts.items()
    }


@pytest.mark.parametrize(
    ("parts", "names"),
    [
        (changed_by(code="other"), ["code"]),
        (changed_by(inputs={"data": "b"}), ["inputs.data"]),
        (changed_by(inputs={"windows": {"end": "2024-02-01"}}), ["inputs.windows"]),
        (changed_by(environment={"lock": "other"}), ["environment.lock"]),
        (changed_by(environment={"image": "evergreen@sha256:1"}), ["environment.image"]),
        (changed_by(parameters={"seed": 8}), ["parameters.seed"]),
        (changed_by(parameters={"params": {"epochs": 6, "layers": [64, 64]}}), ["parameters.params.epochs"]),
        (changed_by(parameters={"params": {"epochs": 5}}), ["parameters.params.layers"]),
        (changed_by(code="other", inputs={"data": "b"}), ["code", "inputs.data"]),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, list) else "",
)
def test_why_names_exactly_what_changed(database, parts, names):
    """Between the key of a stage and the one before it: the parts that differ, by their path, and no other."""
    begin(database, "first")
    perform(database, "first", "train")
    begin(database, "second")
    perform(database, "second", "train", **parts)
    (answer,) = why_run(database, "second")
    expected = {
        "stage": "train",
        "what": "ran",
        "because": f"changed since first: {', '.join(names)}",
        "changed": names,
    }
    assert answer == expected


def test_why_says_that_nothing_changed(database):
    """The same key, performed again: it was forced, or what was left could not be used."""
    for run_id in ("first", "second"):
        begin(database, run_id)
        perform(database, run_id, "train")
    (answer,) = why_run(database, "second")
    assert (answer["changed"], answer["because"]) == (
        [],
        "asked for by force, or what first left was missing or altered",
    )


@pytest.mark.parametrize(
    ("stage", "because"),
    [("ingest", "every run looks at the source once"), ("promote", "every run asks the gate once")],
)
def test_why_of_a_stage_that_looks_at_the_world(database, stage, because):
    """A key that holds the run differs in every run, which is no change."""
    for run_id in ("first", "second"):
        begin(database, run_id)
        perform(database, run_id, stage, **changed_by(inputs={"run": run_id}))
    (answer,) = why_run(database, "second")
    assert (answer["because"], answer["changed"]) == (because, [])


def test_why_compares_with_the_newest_run_before(database):
    """Of three runs, the third is compared with the second; other stages and packs do not count."""
    for run_id, data in (("first", "a"), ("second", "b"), ("third", "a")):
        begin(database, run_id)
        perform(database, run_id, "train", **changed_by(inputs={"data": data}))
        perform(database, run_id, "evaluate", **changed_by(inputs={"data": "a"}))
    because = {answer["stage"]: answer["because"] for answer in why_run(database, "third")}
    assert because["train"] == "changed since second: inputs.data"


def test_a_run_names_the_alerts_that_it_answers(database):
    """The alert that started it, then those that were merged into it, each once; whatever of them is final by now."""
    asked = {"outcome": "retrain", "rule": "retrain", "reason": "nothing held it back"}
    database.append("more", "intent", asked, run_id="alert__1", key="alert-1")
    begin(database, "alert__1")
    database.append("more", "decision", asked, run_id="alert__1", key="alert-1")
    database.append("more", "decision", {**asked, "outcome": "merge"}, run_id="alert__1", key="alert-2")
    begin(database, "by hand")
    assert history_of(database, "alert__1")["alerts"] == ["alert-1", "alert-2"]
    assert [(run["run_id"], run["alerts"]) for run in runs_of(database, "more")] == [
        ("by hand", []),
        ("alert__1", ["alert-1", "alert-2"]),
    ]


def test_a_run_that_was_only_asked_for_is_none(database):
    """An intent carries the id of a run that may never begin: there is no such run until it has."""
    database.append("more", "intent", {"outcome": "retrain"}, run_id="alert__1", key="alert-1")
    with pytest.raises(StageError, match="there is no run 'alert__1'"):
        history_of(database, "alert__1")
    assert runs_of(database, "more") == []
