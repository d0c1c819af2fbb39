"""The admission DAG as Airflow reads it: what wakes it, what it may do, and how little of it a parse loads."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).parents[2] / "dags" / "admission.py"
ID = "evergreen__admission"
HEAVY = ["fastapi", "torch", "mlflow", "great_expectations", "dvc", "pandas", "polars", "numpy"]


def parse():
    """The file as Airflow's DAG processor reads it."""
    from airflow.dag_processing.dagbag import BundleDagBag

    bag = BundleDagBag(dag_folder=FILE, bundle_path=FILE.parent, bundle_name="dags-folder", load_op_links=False)
    assert bag.import_errors == {}
    return bag.dags[ID]


def serialised():
    from airflow.serialization.serialized_objects import DagSerialization

    return json.dumps(DagSerialization.to_dict(parse()), sort_keys=True)


def want_new_data(packs, name):
    file = packs / name / "pack.yaml"
    text = file.read_text(encoding="utf-8")
    file.write_text(text.replace('  schedule: "0 3 * * *"', '  schedule: "0 3 * * *"\n  on_new_data: true'), "utf-8")


def assets(dag):
    return sorted(asset.name for asset in dag.timetable.asset_condition.objects)


def test_it_runs_every_minute_whatever_else_wakes_it(packs):
    """The guarantee that no alert waits for a bell that does not ring."""
    assert parse().timetable.timetable.expression == "* * * * *"


def test_data_wakes_it_where_a_pack_wants_that(packs):
    """Of apple, which wants to know of new data, and pear, which does not: one asset, beside the inbox."""
    want_new_data(packs, "apple")
    assert assets(parse()) == ["data/apple", "evergreen/inbox"]


def test_the_inbox_is_watched(packs):
    """By the bell, which the triggerer can make again from its path."""
    inbox = next(asset for asset in parse().timetable.asset_condition.objects if asset.name == "evergreen/inbox")
    (watcher,) = inbox.watchers
    path, kwargs = watcher.trigger.serialize()
    module, _, name = path.rpartition(".")
    assert type(getattr(importlib.import_module(module), name)(**kwargs)) is type(watcher.trigger)


def test_it_is_in_force_from_the_start_and_makes_up_for_nothing(packs):
    dag = parse()
    assert (dag.is_paused_upon_creation, dag.catchup) == (False, False)


def test_a_training_dag_is_not_woken_by_data_itself(packs):
    """All that data does goes through admission, where the policy is asked."""
    from evergreen.orchestration.dags import dags_to_parse, training_dag

    want_new_data(packs, "apple")
    assert {type(dag.timetable).__name__ for dag in dags_to_parse(training_dag)} == {"CronTriggerTimetable"}


def test_its_tasks_do_not_wait_behind_trainings(packs):
    """A pool of their own, and first in line."""
    found = {(task.pool, task.priority_weight, str(task.weight_rule)) for task in parse().tasks}
    assert found == {("admission", 1000, "absolute")}


def test_every_task_says_what_it_does(packs):
    assert [task.task_id for task in parse().tasks if not task.doc_md] == []


def test_nothing_a_sender_writes_is_taken_for_a_template(packs):
    """An alert's reason goes into the run as it is: {{ … }} in it is never rendered."""
    start = parse().get_task("start")
    assert list(start.operator_class.template_fields) == []


def test_a_pack_that_cannot_be_loaded_takes_nothing_from_the_others(packs):
    want_new_data(packs, "apple")
    (packs / "pear" / "pack.yaml").write_text("not: [yaml", encoding="utf-8")
    assert assets(parse()) == ["data/apple", "evergreen/inbox"]


def test_a_task_process_loads_no_packs(packs, monkeypatch):
    """It has no use for the schedule."""
    from airflow.sdk.definitions.context import _AIRFLOW_PARSING_CONTEXT_DAG_ID

    want_new_data(packs, "apple")
    monkeypatch.setenv(_AIRFLOW_PARSING_CONTEXT_DAG_ID, ID)
    assert assets(parse()) == ["evergreen/inbox"]


def test_parsing_it_twice_gives_the_same_bytes(packs):
    """In this process and another: no new DAG versions."""
    want_new_data(packs, "apple")
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_admission as t; "
    code += "print('PARSED' + t.serialised())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert serialised() == serialised() == done.stdout.rpartition("PARSED")[2].strip()


def test_parsing_it_imports_nothing_heavy(packs):
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_admission as t; t.parse(); "
    code += f"print('HEAVY', *[name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "HEAVY"


@pytest.mark.parametrize("status", [404, 500])
def test_a_dag_that_airflow_does_not_know_is_no_failure(status):
    """404 is an answer; any other error is not."""
    from airflow.sdk.exceptions import AirflowRuntimeError, ErrorType
    from airflow.sdk.execution_time.comms import ErrorResponse

    from evergreen.orchestration.admission import AirflowRuns

    class Refusing:
        def get_dag(self, _dag_id):
            raise AirflowRuntimeError(ErrorResponse(error=ErrorType.API_SERVER_ERROR, detail={"status_code": status}))

    if status == 404:
        assert AirflowRuns(Refusing()).is_paused("apple") is None
    else:
        with pytest.raises(AirflowRuntimeError):
            AirflowRuns(Refusing()).is_paused("apple")


def test_data_that_cannot_be_read_keeps_no_alert_waiting(packs, monkeypatch):
    """Airflow does not answer about assets: what is in the inbox is decided all the same."""
    from evergreen import loop
    from evergreen.orchestration import admission

    monkeypatch.setattr(admission, "get_current_context", lambda: {"ti": None})  # and nothing of assets
    monkeypatch.setattr(loop, "admit", lambda *_: [loop.Start("apple", "alert__1", {"reason": "it drifts"})])
    assert parse().get_task("decide").python_callable() == [
        {"trigger_dag_id": "apple__train", "trigger_run_id": "alert__1", "conf": {"reason": "it drifts"}}
    ]
