"""What the scheduler's process holds when it makes its workers. In a process of its own: it changes what is imported."""

import json
import os
import subprocess
import sys

import pytest

LOOK = """
import json, sys
from airflow.executors.local_executor import LocalExecutor
LocalExecutor.start = lambda self: None
from evergreen.orchestration.executor import ReadyExecutor
import sqlalchemy as sa
ReadyExecutor(parallelism=1).start()
with sa.create_engine("sqlite://").connect() as connection:
    fractions = [connection.execute(sa.select(sa.cast(sa.func.now(), sa.String))).scalar() for _ in range(20)]
    passed = connection.execute(sa.select(sa.literal("2020-01-01 00:00:00.500000") <= sa.func.now())).scalar()
from datetime import UTC, datetime
names = [name for name in sys.modules if name.partition(".")[0] == "evergreen"]
known = set(sys.modules)
from evergreen import loop
from evergreen.orchestration.dags import dags_to_parse, training_dag
from evergreen.orchestration.admission import admission_dag
admission_dag()
assert dags_to_parse(training_dag)
new = sorted(name for name in set(sys.modules) - known if name.partition(".")[0] != "evergreen")
print("SEEN" + json.dumps({"evergreen": names, "new": new, "now": fractions, "passed": passed,
                           "utc": datetime.now(UTC).isoformat(" ")}))
"""


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What is there after the executor's start."""
    folder = tmp_path_factory.mktemp("executor")
    env = {**os.environ, "AIRFLOW_HOME": str(folder / "airflow"), "EVERGREEN_HOME": str(folder / "home")}
    done = subprocess.run([sys.executable, "-c", LOOK], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.rpartition("SEEN")[2])


def test_tasks_import_nothing_of_other_packages_to_make_their_dag(seen):
    """All that both DAG files need of other packages is there before the workers are made."""
    assert seen["new"] == []


def test_tasks_read_our_own_code_as_it_is_on_disk(seen):
    """None of it is kept from the scheduler's start: a stage's key says what code it runs."""
    assert seen["evergreen"] == []


def test_now_is_not_the_last_whole_second_on_sqlite(seen):
    """A run that may start at once is not put off to the next second."""
    assert {len(now) for now in seen["now"]} == {len("2026-11-21 10:41:33.208000")}
    assert any(not now.endswith(".000000") for now in seen["now"])
    assert seen["passed"]
    assert seen["now"][0][:13] <= seen["utc"][:13]


END = """
import multiprocessing, time
from evergreen.orchestration.executor import ReadyExecutor
executor = ReadyExecutor(parallelism=1)
busy = multiprocessing.get_context("fork").Process(target=time.sleep, args=(3600,))
busy.start()
executor.workers = {busy.pid: busy}
executor.end()
"""


def test_a_scheduler_that_ends_does_not_wait_for_its_tasks(tmp_path):
    """Else an error of its own would stop all scheduling until the longest training is done."""
    env = {**os.environ, "AIRFLOW_HOME": str(tmp_path / "airflow"), "EVERGREEN_HOME": str(tmp_path / "home")}
    subprocess.run([sys.executable, "-c", END], env=env, timeout=60, check=True)


TWICE = """
import sys, time
from pathlib import Path
from types import SimpleNamespace
from airflow.executors.base_executor import BaseExecutor
from airflow.models.taskinstancekey import TaskInstanceKey
from evergreen.orchestration.executor import ReadyExecutor

folder = Path(sys.argv[1])
asleep, other = (TaskInstanceKey("dag", task, "run", 1) for task in ("asleep", "other"))

def run(workload, **_):
    while workload.until and not (folder / workload.until).exists():
        time.sleep(0.01)

def send(key, until=None):
    workload = SimpleNamespace(
        key=key, until=until, display_name="", running_state=None, success_state="success", failure_state="failed"
    )
    executor.queued_tasks[key] = workload
    executor._process_workloads([workload])

def heard(key):
    while key not in executor.event_buffer:
        executor.sync()
        time.sleep(0.01)
    return executor.event_buffer.pop(key)[0]

BaseExecutor.run_workload = staticmethod(run)
executor = ReadyExecutor(parallelism=2)
executor.start()
try:
    send(asleep, "old has left")
    send(asleep, "new is done")
    send(other)  # for the first worker that is free: what it says comes after what the old process said
    (folder / "old has left").touch()
    assert heard(other) == "success"
    assert asleep not in executor.event_buffer, "the end of the old process is taken for that of the new one"
    (folder / "new is done").touch()
    assert heard(asleep) == "success"
    send(asleep)
    assert heard(asleep) == "success"
finally:
    executor.end()
"""


def test_a_task_woken_before_its_old_process_has_left_is_not_failed(tmp_path):
    """The scheduler hears of a try that was sent out twice when the second process has ended, and of that alone."""
    env = {**os.environ, "AIRFLOW_HOME": str(tmp_path / "airflow"), "EVERGREEN_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, "-c", TWICE, str(tmp_path)], env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
