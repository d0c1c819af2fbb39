"""What a stage costs through the running scheduler beyond its own work and its third-party imports.

Goal: at most 1.5 s a stage. Peer: seven tasks that do nothing, in sequence, in the same Airflow in the same run. Own
work is what the stage's event says of itself (imports inside it included). A third-party import outside of it (MLflow,
for a look at the champion before the work) is measured alone in a fresh process and taken off. The rest is split by
the times in Airflow's database and in the tasks' logs.

    python benchmarks/scheduler.py
"""

from __future__ import annotations

import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from evergreen import database as db
from evergreen.laws import scaffold
from evergreen.orchestration import embedded
from evergreen.run import STAGE_VALUES
from evergreen.settings import Settings

ROUNDS = 3
GOAL_S = 1.5
HERE = Path(__file__).resolve().parents[1]
STAGES = tuple(STAGE_VALUES)
LOOKS_FIRST = ("evaluate",)
"""Stages that ask MLflow for the champion before they know their key."""

PEER = '''
"""An airflow dag of seven tasks that do nothing."""
from datetime import UTC, datetime
from airflow.sdk import DAG, task

with DAG("peer__train", schedule=None, start_date=datetime(2000, 1, 1, tzinfo=UTC)):
    before = None
    for name in {stages!r}:
        @task(task_id=name)
        def nothing():
            return {{}}
        after = nothing()
        if before is not None:
            before >> after
        before = after
'''


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        scaffold(home / "packs", "pack")
        pack = home / "packs" / "pack" / "pack.yaml"
        pack.write_text(pack.read_text(encoding="utf-8").replace('"0 3 * * *"', "null"), encoding="utf-8")
        shutil.copytree(HERE / "dags", home / "dags", ignore=shutil.ignore_patterns("__pycache__"))
        (home / "dags" / "peer.py").write_text(PEER.format(stages=STAGES), encoding="utf-8")
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        os.environ |= {
            "EVERGREEN_HOME": str(home / "home"),
            "EVERGREEN_PACKS": str(home / "packs"),
            "AIRFLOW__CORE__DAGS_FOLDER": str(home / "dags"),
            "AIRFLOW__API__PORT": str(free_port()),
            "EVERGREEN_MLFLOW_PORT": str(free_port()),
        }
        settings = Settings.from_env()
        try:
            address = dict(embedded.up(settings))["airflow"]
            run(settings, address, "pack")  # makes databases and compiled modules
            run(settings, address, "peer")
            rounds = [(run(settings, address, "pack"), run(settings, address, "peer")) for _ in range(ROUNDS)]
            mlflow_s = statistics.median(imports_of_a_look() for _ in range(ROUNDS))
        finally:
            embedded.down(settings)
    ours, peer = (middle([each[column] for each in rounds]) for column in range(2))
    show(ours, peer, mlflow_s)


def run(settings: Settings, address: str, name: str) -> dict[str, dict[str, float]]:
    """Seconds of each task of one run of `<name>__train`, by part."""
    ended = embedded.run_through_scheduler(settings, name, {"force": True} if name == "pack" else {}, lambda _: None)
    assert ended.success, ended
    path = f"/api/v2/dags/{name}__train/dagRuns/{quote(ended.run_id, safe='')}"
    with embedded.client(address) as airflow:
        whole = airflow.get(path).json()
        tasks = {task["task_id"]: task for task in airflow.get(f"{path}/taskInstances").json()["task_instances"]}
        logs = {stage: airflow.get(f"{path}/taskInstances/{stage}/logs/1").json()["content"] for stage in STAGES}
    own = {
        event.body["stage"]: event.body["seconds"]
        for event in db.connect(settings.database_url).events(run_id=ended.run_id, kind="stage")
    }
    ends = [at(whole["start_date"]), *(at(tasks[stage]["end_date"]) for stage in STAGES)]
    found = {stage: parts(tasks[stage], logs[stage], own.get(stage, 0.0), ends[n]) for n, stage in enumerate(STAGES)}
    found["run"] = {"total": at(whole["end_date"]) - at(whole["start_date"])}
    return found


def parts(task: dict[str, Any], log: list[dict[str, Any]], own: float, before: float) -> dict[str, float]:
    """From the end of the task before to the end of this one, in five parts and the stage's own work."""
    started, ended = at(task["start_date"]), at(task["end_date"])
    first = next(at(line["timestamp"]) for line in log if "timestamp" in line)
    parsed = next(line for line in log if line["event"] == "Worker startup parse complete")
    begun = next(
        (at(line["timestamp"]) for line in log if line["event"] == f"{task['task_id']} running"),
        at(parsed["timestamp"]),
    )
    return {
        "schedule": at(task["queued_when"]) - before,
        "start": first - at(task["queued_when"]),
        "parse": at(parsed["timestamp"]) - first,
        "before": begun - at(parsed["timestamp"]),
        "own": own,
        "after": ended - begun - own,
        "total": ended - before,
    } | {"task": ended - started}


def show(pack: dict[str, dict[str, float]], peer: dict[str, dict[str, float]], mlflow_s: float) -> None:
    columns = ("schedule", "start", "parse", "before", "own", "after", "total")
    print(
        f"seconds through the scheduler, median of {ROUNDS} runs; {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    )
    print("  schedule: end of the task before → queued; start: → process logs; parse: evergreen and the DAG imported;")
    print("  before: → the stage's work; after: → task ended")
    print(f"  {'':10}" + "".join(f"{name:>10}" for name in columns) + f"{'imports':>10}{'beyond':>10}")
    beyond = []
    for stage in STAGES:
        imports = min(mlflow_s, pack[stage]["before"]) if stage in LOOKS_FIRST else 0.0
        beyond.append(pack[stage]["total"] - pack[stage]["own"] - imports)
        print(
            f"  {stage:10}"
            + "".join(f"{pack[stage][name]:10.2f}" for name in columns)
            + f"{imports:10.2f}{beyond[-1]:10.2f}"
        )
    for name, rows in (("ours", pack), ("peer", peer)):
        print(
            f"  {name:10}"
            + "".join(f"{statistics.mean(rows[stage][column] for stage in STAGES):10.2f}" for column in columns)
        )
    mine, theirs = statistics.mean(beyond), statistics.mean(peer[stage]["total"] for stage in STAGES)
    print(
        f"  whole runs: {pack['run']['total']:.1f} s, peer {peer['run']['total']:.1f} s; MLflow's imports alone {mlflow_s:.2f} s"
    )
    print(
        f"a stage beyond its own work: {mine:.2f} s (goal {GOAL_S:.2f}), a task that does nothing: {theirs:.2f} s: {mine / theirs:.2f} x"
    )


LOOK = """
import builtins, time
import airflow.sdk.execution_time.task_runner, evergreen.orchestration.dags
from evergreen.registry.models import Registry
from evergreen.settings import Settings
real, spent, depth = builtins.__import__, 0.0, 0
def timed(*words, **named):
    global spent, depth
    begun, depth = time.perf_counter(), depth + 1
    try:
        return real(*words, **named)
    finally:
        depth -= 1
        spent += 0.0 if depth else time.perf_counter() - begun
builtins.__import__ = timed
Registry(Settings.from_env()).champion("pack")
print(spent)
"""


def imports_of_a_look() -> float:
    """Seconds within import statements while a fresh process asks for the champion."""
    done = subprocess.run([sys.executable, "-c", LOOK], check=True, capture_output=True, text=True)
    return float(done.stdout.splitlines()[-1])


def middle(runs: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    return {
        stage: {part: statistics.median(one[stage][part] for one in runs) for part in runs[0][stage]}
        for stage in runs[0]
    }


def at(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def free_port() -> int:
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        return int(trial.getsockname()[1])


if __name__ == "__main__":
    main()
