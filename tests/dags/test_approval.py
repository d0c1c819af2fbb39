"""The approval DAG as Airflow gets it: one for each pack, whose question holds no slot and whose end is always told."""

from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pytest
from airflow.sdk.exceptions import AirflowSkipException, DagRunTriggerException
from tests.dags.test_dags import PROJECT, change, parse

APPROVAL = PROJECT / "dags" / "approval.py"


def test_every_pack_may_ask(packs):
    """A verdict can be for a person to give whatever the pack says, so each pack has the DAG; nothing schedules it."""
    found = parse(APPROVAL)
    assert (sorted(found.dags), found.import_errors) == (["apple__approval", "pear__approval"], {})
    assert {type(dag.timetable).__name__ for dag in found.dags.values()} == {"NullTimetable"}


def test_the_answer_is_taken_whatever_came_of_the_question(packs):
    """Ask → answer, of which the second runs when all is done."""
    dag = parse(APPROVAL).dags["apple__approval"]
    assert {task.task_id: task.upstream_task_ids for task in dag.tasks} == {"ask": set(), "answer": {"ask"}}
    assert dag.get_task("answer").trigger_rule == "all_done"


def test_a_newer_question_need_not_wait_for_an_older_one(packs):
    """Several runs at once: the older one ends because the newer one has begun."""
    assert parse(APPROVAL).dags["apple__approval"].max_active_runs > 1


@pytest.mark.parametrize(
    ("said", "timeout"), [("", timedelta(days=7)), ("\n  approval_timeout: 36h", timedelta(hours=36))]
)
def test_nobody_in_time_means_no(packs, said, timeout):
    """The pack's time-out, a week where it says nothing; then the answer is reject."""
    change(packs, "apple", "gate:", f"gate:{said}")
    ask = parse(APPROVAL).dags["apple__approval"].get_task("ask")
    assert (ask.options, ask.defaults, ask.response_timeout) == (["promote", "reject"], ["reject"], timeout)


def test_nothing_of_a_report_is_a_template(packs):
    """What strangers wrote is shown, never rendered."""
    assert tuple(parse(APPROVAL).dags["apple__approval"].get_task("ask").template_fields) == ()


@pytest.mark.parametrize(
    ("sent", "comment"),
    [
        ({}, ""),
        ({"comment": None}, ""),
        ({"comment": "fresher"}, "fresher"),
        ({"comment": "a null \0"}, "a null ?"),
        ({"comment": 5}, '{"comment": 5}'),
        ({"reason": "fresher", "ticket": 7}, '{"reason": "fresher", "ticket": 7}'),
    ],
)
def test_a_choice_counts_whatever_was_sent_with_it(packs, sent, comment):
    """Airflow's API takes any body beside an option, and its own operator would fail over it: it is kept as it came."""
    ask = parse(APPROVAL).dags["apple__approval"].get_task("ask")
    person = {"id": "7", "name": "ada"}
    answered = {"chosen_options": ["promote"], "responded_at": datetime.now(UTC), "responded_by_user": person}
    heard = ask.execute_complete({}, {**answered, "params_input": sent})
    assert heard == {"choice": "promote", "person": "ada", "comment": comment}


class Finished:
    """A training run as its last task meets it: whether the version waits for a person."""

    def __init__(self, waits):
        self.waits = waits

    def xcom_pull(self, task_ids):
        return {"promote": {"waits": self.waits, "version": 4}}[task_ids]


def started(task, waits, run_id="manual__2013-04-01"):
    return task.execute({"ti": Finished(waits), "dag_run": SimpleNamespace(run_id=run_id)})


def test_the_training_dag_starts_one_run_by_a_derived_id(packs):
    """Asked for twice it is one run, of the pack's own approval DAG, on no date of its own."""
    task = parse().dags["apple__train"].get_task("approval")
    asked = []
    for _ in range(2):
        with pytest.raises(DagRunTriggerException) as asks:
            started(task, waits=True)
        asked.append(asks.value.dag_run_id)
    assert (asks.value.trigger_dag_id, asks.value.skip_when_already_exists) == ("apple__approval", True)
    assert (asks.value.logical_date, asks.value.conf) == (None, {"run": "manual__2013-04-01", "version": 4})
    assert len(set(asked)) == 1
    with pytest.raises(DagRunTriggerException) as other:
        started(task, waits=True, run_id="manual__2013-05-01")
    assert other.value.dag_run_id not in asked


def test_the_training_dag_asks_nobody_where_the_gate_has_decided(packs):
    """The task is skipped, and links to no question."""
    task = parse().dags["apple__train"].get_task("approval")
    with pytest.raises(AirflowSkipException):
        started(task, waits=False)
    assert task.operator_extra_links[0].get_link(task, ti_key=None) == ""


def test_a_run_in_process_has_nobody_to_ask(packs):
    """Without a scheduler the outcome says how to decide; the DAG has the stages alone."""
    from evergreen.orchestration.dags import training_dag
    from evergreen.pack import load

    assert "approval" not in training_dag(load(packs, "apple"), asks=False).task_ids
