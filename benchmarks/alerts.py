"""How long an alert takes to a decision, and to the first task of the training run that answers it.

Goals, 95th percentiles on an embedded home (SQLite): decided within 2 s, first task within 4 s. Twenty packs get five
alerts each, within one second; a pack every PACE_S, so that two cores get through the runs, real ones, that follow.
Peers in the same Airflow, in between: a DAG of one task that does nothing, asked for by cron, by an asset's update and
by `POST dagRuns`, from that instant to its task.

    python benchmarks/alerts.py
"""

from __future__ import annotations

import functools
import os
import shutil
import socket
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from evergreen import database as db
from evergreen.orchestration import embedded, watchers
from evergreen.settings import Settings
from evergreen.triggers import inbox
from evergreen.triggers.inbox import NewAlert

PACKS, ALERTS, PACE_S = 20, 5, 12.0
DECIDED_S, FIRST_TASK_S = 2.0, 4.0
HERE = Path(__file__).resolve().parents[1]
TODAY = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)

PACK = """
description: Is it more?
owner: bench@example.com
source: {kind: parquet, path: "rows/*.parquet"}
data: {target: more, event_time: at, train: 10d, validation: 2d, holdout: 3d}
training: {call: "model:train"}
gate: {primary: {metric: roc_auc, min: 0.5}}
triggers: {admission: {cooldown: 0s, dedupe: 0s}}
"""
MODEL = '''
import json

LOADER = """
import json
from pathlib import Path
import numpy as np

class Model:
    def __init__(self, mean):
        self.mean = mean

    def predict(self, frame):
        return 1 / (1 + np.exp(self.mean - frame["x"].to_numpy()))

def load(folder):
    return Model(json.loads((Path(folder) / "mean.json").read_text()))
"""


def train(data, job):
    (job.model_dir / "mean.json").write_text(json.dumps(float(data.train["x"].to_numpy().mean())))
    (job.model_dir / "loader.py").write_text(LOADER)
    job.describe(inputs=["x"], requirements=["numpy"])
'''
PEERS = '''
"""Airflow dags of one task that does nothing, one for each way to ask for a run."""
from datetime import UTC, datetime
from airflow.sdk import DAG, Asset, task

for name, schedule in {"cron": "* * * * *", "asset": [Asset("peer/asset")], "post": None}.items():
    with DAG(f"peer_{name}", schedule=schedule, start_date=datetime(2000, 1, 1, tzinfo=UTC), catchup=False) as dag:
        @task
        def first():
            pass
        first()
    globals()[dag.dag_id] = dag
'''


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        for number in range(PACKS + 1):
            write_pack(home / "packs" / f"pack{number:02}")
        shutil.copytree(HERE / "dags", home / "dags", ignore=shutil.ignore_patterns("__pycache__"))
        (home / "dags" / "peers.py").write_text(PEERS, encoding="utf-8")
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
            ours, parts, peers = measure(settings, address)
        finally:
            embedded.down(settings)
    show(settings, ours, parts, peers)


def measure(
    settings: Settings, address: str
) -> tuple[dict[str, list[float]], dict[str, list[float]], dict[str, list[float]]]:
    """Seconds from each alert on; of the way's parts; of the peers."""
    database = db.connect(settings.database_url)
    peers: dict[str, list[float]] = {"asset": [], "post": []}
    with (
        embedded.client(address) as airflow,
        sqlite3.connect(f"file:{settings.home}/airflow/airflow.db?mode=ro", uri=True, timeout=60) as rows,
    ):
        wanted = {f"pack{number:02}__train" for number in range(PACKS + 1)} | {"evergreen__admission", "peer_cron"}
        until(lambda: wanted <= {dag["dag_id"] for dag in airflow.get("/api/v2/dags?limit=100").json()["dags"]})
        asset = next(a["id"] for a in airflow.get("/api/v2/assets").json()["assets"] if a["name"] == "peer/asset")
        for number in range(-1, PACKS):  # the first, to a pack of its own, is not counted: it makes databases
            pack, began = f"pack{number % (PACKS + 1):02}", time.monotonic()
            for n in range(ALERTS if number >= 0 else 1):
                inbox.keep(database, pack, [NewAlert("benchmark", f"{number}-{n}", f"complaint {n}", f"{number}-{n}")])
                time.sleep(1 / ALERTS)
            time.sleep(PACE_S / 2 - 1)
            if number >= 0:
                for way, path, body in (
                    ("asset", "/api/v2/assets/events", {"asset_id": asset, "extra": {}}),
                    ("post", "/api/v2/dags/peer_post/dagRuns", {"logical_date": None}),
                ):
                    asked = datetime.now(UTC)
                    airflow.post(path, json=body).raise_for_status()
                    peers[way].append(until(functools.partial(first_task_after, rows, way, asked)))
            time.sleep(max(0.0, began + PACE_S - time.monotonic()))
        until(lambda: not inbox.intended(database))
        time.sleep(PACE_S)
        cron = "SELECT r.run_after, t.start_date FROM dag_run r JOIN task_instance t USING (dag_id, run_id)"
        cron += " WHERE dag_id = 'peer_cron' AND t.start_date IS NOT NULL ORDER BY r.run_after"
        peers["cron"] = [(at(start) - at(due)).total_seconds() for due, start in rows.execute(cron).fetchall()[1:]]
        return *read(database, rows), peers


def read(database: db.Database, rows: sqlite3.Connection) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    ours: dict[str, list[float]] = {"decided": [], "final": [], "first task": []}
    parts: dict[str, list[float]] = {
        name: [] for name in ("bell", "run of admission", "decide", "run asked for", "first task")
    }
    tasks = "SELECT min(start_date) FROM task_instance WHERE run_id = ? AND task_id = 'ingest'"
    made = "SELECT queued_at FROM dag_run WHERE run_id = ?"
    rang = "SELECT min(timestamp) FROM asset_event WHERE timestamp >= ?"
    deciding = "SELECT max(start_date) FROM task_instance WHERE task_id = 'decide' AND start_date <= ?"
    for alert in database.events(kind="alert"):
        about = [event for event in database.events(alert.pack, key=alert.key) if event.kind != "alert"]
        if alert.body["fingerprint"].startswith("-1"):
            continue
        (final,) = (event for event in about if event.kind == "decision" and event.body["outcome"] != "hold")
        began = at(rows.execute(tasks, (final.run_id,)).fetchone()[0])
        marks = [
            alert.at,
            at(rows.execute(rang, (text(alert.at),)).fetchone()[0]),
            at(rows.execute(deciding, (text(about[0].at),)).fetchone()[0]),
            about[0].at,
            at(rows.execute(made, (final.run_id,)).fetchone()[0]),
            began,
        ]
        ours["decided"].append((about[0].at - alert.at).total_seconds())
        ours["final"].append((final.at - alert.at).total_seconds())
        ours["first task"].append((began - alert.at).total_seconds())
        if about[0].body["outcome"] == "retrain":  # those merged into it came on the way
            for name, before, after in zip(parts, marks[:-1], marks[1:], strict=True):
                parts[name].append((after - before).total_seconds())
    return ours, parts


def first_task_after(rows: sqlite3.Connection, way: str, asked: datetime) -> float | None:
    query = "SELECT max(start_date) FROM task_instance WHERE dag_id = ? AND start_date > ?"
    (start,) = rows.execute(query, (f"peer_{way}", text(asked))).fetchone()
    return (at(start) - asked).total_seconds() if start else None


def show(
    settings: Settings, ours: dict[str, list[float]], parts: dict[str, list[float]], peers: dict[str, list[float]]
) -> None:
    env = embedded.environment(settings)
    idle, slots = env["AIRFLOW__SCHEDULER__SCHEDULER_IDLE_SLEEP_TIME"], env["AIRFLOW__CORE__PARALLELISM"]
    print(
        f"{PACKS} packs, {ALERTS} alerts each within 1 s, a pack every {PACE_S:.0f} s, every run a whole chain; SQLite"
    )
    print(
        f"  bell polls every {watchers.POLL_S} s, scheduler sleeps {idle} s, {slots} task processes; cooldown 0, dedupe 0"
    )
    print(f"  {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the end; seconds      median    p95    max")
    for name, values in {**ours, **{f"peer: {way} to first task": found for way, found in peers.items()}}.items():
        line = f"{statistics.median(values):6.2f} {p95(values):6.2f} {max(values):6.2f}   of {len(values)}"
        print(f"  {('alert to ' if name in ours else '') + name:52}{line}")
    print("  where it goes, for the alerts that started a run, medians:")
    print("    " + ", ".join(f"{name} {statistics.median(values):.2f}" for name, values in parts.items()))
    print(f"alert to decision, p95: {p95(ours['decided']):.2f} s (goal {DECIDED_S}), final {p95(ours['final']):.2f} s")
    print(f"alert to first task, p95: {p95(ours['first task']):.2f} s (goal {FIRST_TASK_S})")


def p95(values: list[float]) -> float:
    return float(np.quantile(values, 0.95))


def at(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def text(instant: datetime) -> str:
    return instant.strftime("%Y-%m-%d %H:%M:%S.%f")


def until(condition: Callable[[], Any], timeout_s: float = 120.0) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not become true in time"
        time.sleep(0.1)
    return found


def write_pack(folder: Path) -> None:
    (folder / "rows").mkdir(parents=True)
    (folder / "pack.yaml").write_text(PACK, encoding="utf-8")
    (folder / "model.py").write_text(MODEL, encoding="utf-8")
    rng = np.random.default_rng(7)
    x = rng.normal(size=1600)
    days = [TODAY - timedelta(days=40) + n * timedelta(days=1) / 40 for n in range(x.size)]
    frame = pl.DataFrame({"at": days, "x": x, "more": x + rng.normal(size=x.size) > 0})
    frame.write_parquet(folder / "rows" / "rows.parquet")


def free_port() -> int:
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        return int(trial.getsockname()[1])


if __name__ == "__main__":
    main()
