"""What Airflow gets from the packs: one DAG each, quickly, the same every time, and none of another's mistakes."""

import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
from airflow.sdk.exceptions import AirflowFailException

from evergreen.laws import scaffold

PROJECT = Path(__file__).parents[2]
TRAINING = PROJECT / "dags" / "training.py"
BROKEN = PROJECT / "dags" / "broken_packs.py"
HEAVY = [
    "torch",
    "mlflow",
    "great_expectations",
    "dvc",
    "dvc_data",
    "pandas",
    "polars",
    "sklearn",
    "scipy",
    "matplotlib",
]


def parse(file=TRAINING):
    """The DAG file as Airflow's DAG processor reads it: DAGs by id, and import errors by file."""
    from airflow.dag_processing.dagbag import BundleDagBag

    return BundleDagBag(dag_folder=file, bundle_path=file.parent, bundle_name="dags-folder", load_op_links=False)


def serialised(bag):
    """What would be stored of the DAGs, as JSON."""
    from airflow.serialization.serialized_objects import DagSerialization

    return {dag_id: json.dumps(DagSerialization.to_dict(dag), sort_keys=True) for dag_id, dag in bag.dags.items()}


def for_the_task(monkeypatch, dag_id):
    """Parse as a task process of this DAG does: it finds its DAG in the environment."""
    from airflow.sdk.definitions.context import _AIRFLOW_PARSING_CONTEXT_DAG_ID

    monkeypatch.setenv(_AIRFLOW_PARSING_CONTEXT_DAG_ID, dag_id)


def change(packs, name, before, after):
    """Change words of a pack."""
    file = packs / name / "pack.yaml"
    text = file.read_text(encoding="utf-8")
    assert before in text
    file.write_text(text.replace(before, after), encoding="utf-8")


@pytest.fixture(scope="module")
def apple(tmp_path_factory):
    """The DAG of one scaffolded pack."""
    packs = tmp_path_factory.mktemp("packs")
    scaffold(packs, "apple")
    change(packs, "apple", "owner: you@example.com", "owner: you@example.com\ntags: [fruit]")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EVERGREEN_PACKS", str(packs))
        return parse().dags["apple__train"]


def test_training_waits_for_a_worker_with_a_gpu(packs):
    """`train` is in the queue gpu, unless the pack wants none; every other task is in the default queue."""
    change(packs, "pear", "training:\n", "training:\n  gpus: 0\n")
    queues = {name: {task.task_id for task in dag.tasks if task.queue == "gpu"} for name, dag in parse().dags.items()}
    assert queues == {"apple__train": {"train"}, "pear__train": set()}


def test_what_runs_containers_waits_for_a_worker_that_can(packs):
    """Where a pack's jobs are containers, whatever trains, scores or looks is in the queue of the worker with an engine."""
    change(packs, "apple", "training:\n", "training:\n  gpus: 0\n  runtime: docker\n")
    assert {task.task_id for task in parse().dags["apple__train"].tasks if task.queue == "gpu"} == {"train", "evaluate"}
    change(packs, "apple", "triggers:\n", "triggers:\n  drift: {features: {psi: 0.2}}\n")
    looked = parse(TRAINING.with_name("monitoring.py")).dags["apple__monitor"]
    assert {task.task_id for task in looked.tasks if task.queue == "gpu"} == {"monitor"}


def test_every_pack_gives_a_training_dag(packs):
    """The DAGs are <pack>__train for each pack, and no others."""
    assert sorted(parse().dags) == ["apple__train", "pear__train"]


def test_the_graph_is_the_chain(apple):
    """Each stage runs after the one before it; further edges say which earlier values it takes."""
    assert {task.task_id: sorted(task.upstream_task_ids) for task in apple.tasks} == {
        "ingest": [],
        "validate": ["ingest"],
        "snapshot": ["ingest", "validate"],
        "train": ["snapshot"],
        "evaluate": ["snapshot", "train"],
        "register": ["evaluate", "snapshot", "train", "validate"],
        "promote": ["evaluate", "register"],
        "approval": ["promote"],
    }


def test_the_stages_run_in_a_line(apple):
    """Whatever the edges, only one order of the tasks satisfies them."""
    order = [task.task_id for task in apple.topological_sort()]
    assert order == ["ingest", "validate", "snapshot", "train", "evaluate", "register", "promote", "approval"]
    assert [b for a, b in pairwise(order) if a not in apple.get_task(b).upstream_task_ids] == []


def test_owner_and_tags_come_from_the_pack(apple):
    """The owner of every task is the pack's; the pack's tags are beside Evergreen's."""
    assert ({task.owner for task in apple.tasks}, apple.tags) == (
        {"you@example.com"},
        {"evergreen", "train", "fruit"},
    )


def test_the_model_card_is_the_dags_document(apple):
    """doc_md is the README of the pack."""
    assert "What it predicts" in apple.doc_md


def test_a_card_that_ends_in_a_file_name_is_text(packs):
    """Airflow opens a doc_md that ends in .md as a file; a model card is never taken for one."""
    (packs / "apple" / "README.md").write_text(f"{'A long card. ' * 40}See also CARD.md", encoding="utf-8")
    assert parse().dags["apple__train"].doc_md.strip().endswith("See also CARD.md")


def test_params_are_a_form(apple):
    """as_of, reason and force are asked for, and may be left as they are."""
    assert apple.params.dump() == {"as_of": None, "reason": None, "force": False}


def test_the_schedule_is_the_packs_cron(apple):
    """The DAG runs when the pack says, in UTC."""
    assert apple.timetable.expression == "0 3 * * *"


def test_a_pack_without_a_schedule_waits_to_be_asked(packs):
    """No cron in the pack: no schedule."""
    change(packs, "apple", 'schedule: "0 3 * * *"', "schedule: null")
    assert type(parse().dags["apple__train"].timetable).__name__ == "NullTimetable"


def test_one_run_at_a_time_and_no_catching_up(apple):
    """Missed intervals are not made up for, and runs of a pack wait for one another."""
    assert (apple.max_active_runs, apple.catchup) == (1, False)


def test_a_killed_stage_is_tried_again_soon(apple):
    """Two retries, seconds later."""
    assert {(task.retries, task.retry_delay) for task in apple.tasks} == {(2, timedelta(seconds=5))}


def test_parsing_twice_gives_the_same_bytes(packs):
    """What Airflow stores does not change from parse to parse, in this process or another: no new DAG versions."""
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import json, test_dags as t; "
    code += "print('PARSED' + json.dumps(t.serialised(t.parse())))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    other = json.loads(done.stdout.rpartition("PARSED")[2])
    assert serialised(parse()) == serialised(parse()) == other


def test_parsing_imports_nothing_heavy(packs):
    """The DAG processor's child, which parses every few seconds, stays light; Airflow's own database models included."""
    code = f"""
import sys
from pathlib import Path
import evergreen.orchestration.dags
assert "airflow.models.dagrun" not in sys.modules
from airflow.dag_processing.dagbag import BundleDagBag
files = [Path({str(TRAINING)!r}), Path({str(BROKEN)!r})]
found = [BundleDagBag(dag_folder=f, bundle_path=f.parent, bundle_name="dags-folder", load_op_links=False) for f in files]
assert sorted(found[0].dags) == ["apple__train", "pear__train"], found[0].import_errors
print("HEAVY", *[name for name in {HEAVY!r} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "HEAVY"


def test_a_task_process_builds_its_own_packs_dag_only(packs, monkeypatch):
    """With the parsing context that Airflow sets in a task process, the other packs are not even loaded."""
    (packs / "pear" / "pack.yaml").write_text("not: [yaml", encoding="utf-8")
    for_the_task(monkeypatch, "apple__train")
    bag = parse()
    assert (list(bag.dags), bag.import_errors) == (["apple__train"], {})


def test_a_task_process_does_not_take_a_longer_name_for_its_own(packs, monkeypatch):
    """apple__late is another pack than apple, though its DAG's id begins the same."""
    scaffold(packs, "apple__late")
    for_the_task(monkeypatch, "apple__late__train")
    assert list(parse().dags) == ["apple__late__train"]


def test_a_task_of_a_broken_pack_says_what_is_wrong(packs, monkeypatch):
    """A pack that broke after its run began: the task's log names file and line, not a missing DAG."""
    change(packs, "apple", "seed: 7", "sead: 7")
    for_the_task(monkeypatch, "apple__train")
    assert "sead" in parse().import_errors["training.py"]


def test_the_file_for_broken_packs_is_silent_while_there_are_none(packs):
    """No DAG and no import error of its own."""
    bag = parse(BROKEN)
    assert (list(bag.dags), bag.import_errors) == ([], {})


BREAKS = {
    "unknown key": ("seed: 7", "sead: 7"),
    "wrong cron": ('"0 3 * * *"', '"often"'),
    "no YAML": ("description: Will", "\tdescription: Will"),
    "refused by Airflow alone": ("owner: you@example.com", f"owner: you@example.com\ntags: ['{'long ' * 30}']"),
}


@pytest.mark.parametrize("why", BREAKS)
def test_a_broken_pack_is_an_import_error_that_names_it(packs, why):
    """The import error of broken_packs.py holds the pack's file and line, and how to mend it."""
    before, after = BREAKS[why]
    change(packs, "pear", before, after)
    file = packs / "pear" / "pack.yaml"
    line = (
        file.read_text(encoding="utf-8")[: file.read_text(encoding="utf-8").index(after.splitlines()[-1])].count("\n")
        + 1
    )
    error = parse(BROKEN).import_errors["broken_packs.py"]
    assert [part for part in (f"{file}:{line}", "fix: ") if part not in error] == [], error


@pytest.mark.parametrize("why", BREAKS)
def test_a_broken_pack_leaves_the_training_file_without_an_error(packs, why):
    """Airflow takes every DAG of a file with an import error out of force, so training.py must have none."""
    change(packs, "pear", *BREAKS[why])
    bag = parse()
    assert (list(bag.dags), bag.import_errors) == (["apple__train"], {})


def test_every_broken_pack_is_named(packs):
    """Two mistakes in two packs: one import error with both."""
    change(packs, "pear", "seed: 7", "sead: 7")
    change(packs, "apple", '"0 3 * * *"', '"often"')
    error = parse(BROKEN).import_errors["broken_packs.py"]
    assert [part for part in ("apple/pack.yaml", "pear/pack.yaml", "sead", "often") if part not in error] == []


@pytest.mark.parametrize(("executor", "gpus", "asks"), [
    ("KubernetesExecutor", "1", {"nvidia.com/gpu": "1"}),
    ("KubernetesExecutor", "auto", None),
    ("CeleryExecutor", "1", None),
])  # fmt: skip
def test_on_kubernetes_a_training_asks_for_the_gpu_that_its_pack_insists_on(packs, monkeypatch, executor, gpus, asks):
    """By the pod of the one task that trains; a worker of Celery is found by its queue."""
    monkeypatch.setenv("AIRFLOW__CORE__EXECUTOR", executor)
    change(packs, "apple", "training:", f"training:\n  gpus: {gpus}")
    dag = parse().dags["apple__train"]
    config = dag.get_task("train").executor_config
    assert ((config and config["pod_override"].spec.containers[0].resources.limits) or None) == asks
    assert not dag.get_task("evaluate").executor_config
    assert dag.get_task("train").queue == "gpu"


@pytest.mark.parametrize("values", [{"ingested": None, "validated": None}, {"ingested": {}, "validated": None}])
def test_a_stage_whose_input_was_marked_as_a_success_says_so(apple, values):
    """A task that is marked by hand gives nothing: whoever needs what it would have given fails, for good."""
    with pytest.raises(AirflowFailException, match=r"snapshot needs .*validated.*clear the task"):
        apple.get_task("snapshot").python_callable(**values)


def test_who_asks_first_is_on_the_packs_clock(packs):
    """A run asked for before anybody had made the home, as right after `make up`, is as of the clock's start."""
    from evergreen.orchestration.tasks import current_run

    change(packs, "apple", "data:", "clock: {start: 2013-04-01, speed: 1440}\ndata:")
    asked = datetime.now(UTC)
    runs = {
        kind: SimpleNamespace(run_id=kind, run_type=kind, logical_date=date, run_after=asked)
        for kind, date in (("manual", None), ("scheduled", asked), ("backfill", datetime(2013, 1, 5, tzinfo=UTC)))
    }
    as_of = {kind: current_run("apple", {"dag_run": run, "params": {}}).as_of for kind, run in runs.items()}
    assert {kind: f"{at:%Y-%m-%d}" for kind, at in as_of.items()} == {
        "manual": "2013-04-01",
        "scheduled": "2013-04-01",
        "backfill": "2013-01-05",
    }
