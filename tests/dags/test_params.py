"""What a form or a REST call may say when it asks for a run: what is wrong is refused before there is a run."""

import json
from datetime import datetime
from functools import cache
from types import SimpleNamespace

import pytest
from airflow.exceptions import ParamValidationError
from airflow.sdk.exceptions import AirflowFailException
from tests.dags.test_dags import PROJECT, change, parse

from evergreen.orchestration import tasks
from evergreen.pack import load, parse_instant

WRONG = [
    ("training", {"as_of": "2015-13-99"}),
    ("training", {"as_of": "2015-02-30"}),
    ("training", {"as_of": "yesterday"}),
    ("training", {"as_of": "2015-01-01T25:00:00"}),
    ("training", {"as_of": "2015-01-01T00:00:00+99:00"}),
    ("training", {"as_of": 20150101}),
    ("training", {"as_of": ["2015-01-01"]}),
    ("training", {"as_of": "2015-01-01 " + "0" * 1000}),
    ("training", {"reason": 5}),
    ("training", {"reason": {"why": "x"}}),
    ("training", {"force": "yes"}),
    ("training", {"force": 1}),
    ("training", {"force": None}),
    ("monitoring", {"as_of": "2015-13-99"}),
    ("monitoring", {"force": "no"}),
    ("rollback", {}),
    ("rollback", {"why": ""}),
    ("rollback", {"why": "  "}),
    ("rollback", {"why": 5}),
    ("rollback", {"why": "x", "to": "1"}),
    ("rollback", {"why": "x", "to": 0}),
    ("rollback", {"why": "x", "to": -1}),
    ("rollback", {"why": "x", "to": 1.5}),
    ("rollback", {"why": "x", "to": True}),
    ("approval", {}),
    ("approval", {"run": ""}),
    ("approval", {"run": 3}),
    ("approval", {"run": "manual__1", "version": "2"}),
    ("approval", {"run": "manual__1", "version": 0}),
]
RIGHT = [
    ("training", {}),
    ("training", {"as_of": None, "reason": None}),
    ("training", {"as_of": ""}),
    *(("training", {"as_of": text, "reason": "x", "force": True}) for text in ("2013-04-01", "2013-04-01T06:00")),
    ("training", {"as_of": "2013-04-01T06:00:00"}),
    ("training", {"as_of": "2013-04-01 06:00:00"}),
    ("training", {"as_of": "2013-04-01T06:00:00Z"}),
    ("training", {"as_of": "2013-04-01T06:00:00+02:00"}),
    ("training", {"as_of": "2013-04-01T06:00:00.123456+00:00"}),
    ("monitoring", {"as_of": "2013-04-01"}),
    ("rollback", {"why": "it is worse", "to": 3}),
    ("approval", {"run": "manual__1", "version": 2}),
]
NAMES = {"training": "train", "monitoring": "monitor", "rollback": "rollback", "approval": "approval"}


@pytest.fixture
def asked(packs):
    """Hold a conf to the parameters of a DAG as Airflow's API server does: by what is stored of the DAG."""
    from airflow.serialization.serialized_objects import DagSerialization

    change(packs, "apple", "triggers:", "triggers:\n  drift: {}")

    @cache
    def stored(file):
        dag = parse(PROJECT / "dags" / f"{file}.py").dags[f"apple__{NAMES[file]}"]
        return json.dumps(DagSerialization.to_dict(dag))

    def ask(file, conf):
        DagSerialization.from_dict(json.loads(stored(file))).params.deep_merge(conf).validate()

    return ask


def test_what_is_wrong_is_refused_before_there_is_a_run(asked):
    """A time that is none, another type, an empty text: Airflow answers 400 and makes no run."""
    for file, conf in WRONG:
        with pytest.raises(ParamValidationError):
            pytest.fail(f"{file}: {conf} was taken: {asked(file, conf)}")


def test_what_is_right_is_taken(asked):
    """Dates and times, with an offset or without; each is a time for the task, too."""
    for file, conf in RIGHT:
        asked(file, conf)
        if conf.get("as_of"):
            assert isinstance(parse_instant(conf["as_of"]), datetime)


@pytest.mark.parametrize("value", ["2015-13-99", "2015-02-30T00:00", "0001-01-01T00:00:00+14:00"])
def test_a_run_that_was_made_anyway_fails_at_once(packs, value):
    """Airflow does not try it again, and the sentence says what to do."""
    dag_run = SimpleNamespace(run_type="manual", logical_date=None, run_after=parse_instant("2024-01-01"), run_id="r")
    context = {"dag_run": dag_run, "params": {"as_of": value}}
    with pytest.raises(AirflowFailException, match=rf"as_of: '{value[:10]}.* is .*\n  fix: start another run"):
        tasks.current_run("apple", context)


def test_a_reason_is_kept_on_one_screen(packs):
    """However long it is, and whatever a terminal would obey in it."""
    dag_run = SimpleNamespace(run_type="manual", logical_date=None, run_after=parse_instant("2024-01-01"), run_id="r")
    run = tasks.current_run("apple", {"dag_run": dag_run, "params": {"reason": "\x1b[2J" + "x" * 10_000}})
    assert len(run.reason) <= tasks.REASON
    assert run.reason.startswith(r"\x1b[2Jxxx")
    assert load(packs, "apple").name == run.pack.name
