"""The embedded home: Airflow and MLflow on this machine, on SQLite, for loopback only.

A run goes through a real DAG run: in this process when no scheduler runs here, else through that scheduler.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from evergreen.errors import SettingsError
from evergreen.settings import Settings

READY_WITHIN_S = 120.0


def environment(settings: Settings) -> dict[str, str]:
    """Airflow's variables for this home; what the environment says already wins."""
    home = settings.home / "airflow"
    found = {
        "AIRFLOW_HOME": str(home),
        "AIRFLOW__CORE__DAGS_FOLDER": str(settings.project / "dags"),
        "AIRFLOW__CORE__PLUGINS_FOLDER": str(settings.project / "plugins"),
        "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{home / 'airflow.db'}",
        "EVERGREEN_HOME": str(settings.home),
        "EVERGREEN_PROJECT": str(settings.project),
        "EVERGREEN_PACKS": str(settings.packs),
    }
    for line in (settings.project / "config" / "airflow.env").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            name, value = line.split("=", 1)
            found[name] = value
    return {**found, **{name: os.environ[name] for name in found if name in os.environ}}


def prepare(settings: Settings) -> None:
    """Point this process at the embedded Airflow, and make its database when there is none. Before `import airflow`."""
    os.environ.update(environment(settings))
    (settings.home / "airflow").mkdir(parents=True, exist_ok=True)
    done = settings.home / "airflow" / "database-ready"
    from airflow import __version__

    if not done.is_file() or done.read_text() != __version__:
        from airflow.utils.db import upgradedb

        upgradedb()
        done.write_text(__version__)


@dataclass(frozen=True)
class Finished:
    """How a DAG run ended."""

    run_id: str
    success: bool


def run_in_process(settings: Settings, pack: str, conf: Mapping[str, Any]) -> Finished:
    """One DAG run of `<pack>__train` in this process, task after task; Airflow's log goes to where logging goes."""
    prepare(settings)
    from airflow.sdk import DagRunState

    from evergreen.orchestration.dags import training_dag
    from evergreen.pack import load

    dag = training_dag(load(settings.packs, pack))
    dag.fileloc = str(settings.project / "dags" / "training.py")
    dag_run = dag.test(logical_date=None, run_conf=dict(conf))
    return Finished(run_id=dag_run.run_id, success=dag_run.state == DagRunState.SUCCESS)


def run_through_scheduler(
    settings: Settings, pack: str, conf: Mapping[str, Any], while_waiting: Callable[[str], None]
) -> Finished:
    """One DAG run of `<pack>__train` by the scheduler that runs on this home; `while_waiting(run_id)` is called often."""
    address = services(settings)["airflow"]
    body = {"logical_date": None, "conf": dict(conf)}
    dag_id = f"{pack}__train"
    run_id = _call(address, "POST", f"/api/v2/dags/{dag_id}/dagRuns", body)["dag_run_id"]
    while True:
        while_waiting(run_id)
        state = _call(address, "GET", f"/api/v2/dags/{dag_id}/dagRuns/{run_id.replace('+', '%2B')}")["state"]
        if state in ("success", "failed"):
            while_waiting(run_id)
            return Finished(run_id=run_id, success=state == "success")
        time.sleep(0.3)


def services(settings: Settings) -> dict[str, str]:
    """The addresses of what `up` started on this home and is still alive: `airflow`, `mlflow`."""
    file = settings.home / "services.json"
    if not file.is_file():
        return {}
    recorded = json.loads(file.read_text(encoding="utf-8"))
    return {name: entry["address"] for name, entry in recorded.items() if _alive(entry)}


def up(settings: Settings) -> Iterator[tuple[str, str]]:
    """Start Airflow (UI, scheduler, DAG processor, triggerer) and the MLflow UI; → (name, address) as each is ready."""
    env = {**os.environ, **environment(settings)}
    airflow_port = env["AIRFLOW__API__PORT"]
    mlflow_port = env.get("EVERGREEN_MLFLOW_PORT", "5000")
    logs = settings.home / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    (settings.home / "airflow").mkdir(parents=True, exist_ok=True)
    tools = Path(sys.executable).parent
    commands = {
        "airflow": (
            [str(tools / "airflow"), "standalone"],
            f"http://127.0.0.1:{airflow_port}",
            "/api/v2/monitor/health",
        ),
        "mlflow": (
            [
                *(str(tools / "mlflow"), "server", "--host", "127.0.0.1", "--port", mlflow_port, "--workers", "1"),
                *("--backend-store-uri", settings.mlflow_tracking_uri),
                *("--default-artifact-root", settings.mlflow_artifacts),
            ],
            f"http://127.0.0.1:{mlflow_port}",
            "/health",
        ),
    }
    running = services(settings)
    entries: dict[str, dict[str, Any]] = {}
    file = settings.home / "services.json"
    if file.is_file():
        entries = json.loads(file.read_text(encoding="utf-8"))
    for name, (command, address, _) in commands.items():
        if name in running:
            continue
        with (logs / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env, start_new_session=True
            )
        entries[name] = {"pid": process.pid, "started": _started(process.pid), "address": address}
        file.write_text(json.dumps(entries), encoding="utf-8")
    for name, (_, address, health) in commands.items():
        _wait_until_ready(name, entries[name], address + health, logs / f"{name}.log")
        yield name, address


def down(settings: Settings, grace_s: float = 20.0) -> list[str]:
    """Stop what `up` started; → the names of what was running."""
    file = settings.home / "services.json"
    if not file.is_file():
        return []
    entries = json.loads(file.read_text(encoding="utf-8"))
    stopped = []
    for name, entry in entries.items():
        if not _alive(entry):
            continue
        stopped.append(name)
        os.killpg(entry["pid"], signal.SIGTERM)
    deadline = time.monotonic() + grace_s
    for entry in entries.values():
        while _alive(entry) and time.monotonic() < deadline:
            time.sleep(0.1)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(entry["pid"], signal.SIGKILL)
    file.unlink()
    return stopped


def _wait_until_ready(name: str, entry: Mapping[str, Any], url: str, log: Path) -> None:
    deadline = time.monotonic() + READY_WITHIN_S
    while time.monotonic() < deadline:
        if not _alive(entry):
            break
        with contextlib.suppress(OSError, urllib.error.URLError, ValueError):
            with urllib.request.urlopen(url, timeout=5) as answer:
                body = answer.read()
            if name != "airflow" or json.loads(body)["scheduler"]["status"] == "healthy":
                return
        time.sleep(0.3)
    raise SettingsError(
        f"{name} did not get ready at {url}; its log is {log}",
        fix="look at the end of the log; another program may hold the port (AIRFLOW__API__PORT, EVERGREEN_MLFLOW_PORT)",
    )


def _call(address: str, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
    """One request to Airflow's REST API. On loopback every caller is an admin, and still needs a token."""
    with urllib.request.urlopen(f"{address}/auth/token", timeout=10) as answer:
        token = json.loads(answer.read())["access_token"]
    request = urllib.request.Request(
        address + path,
        method=method,
        data=json.dumps(body).encode() if body is not None else None,
        headers={"Authorization": f"Bearer {token}", "Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.loads(answer.read())
    except urllib.error.HTTPError as error:
        text = error.read().decode(errors="replace")[:300]
        raise SettingsError(
            f"Airflow at {address} refused {method} {path}: {error.code} {text}",
            fix="a new pack shows up within 15 seconds of being written; see import errors in the Airflow UI",
        ) from error


def _started(pid: int) -> float | None:
    """The start time of a process, which tells it from a later one with the same pid."""
    try:
        return float(psutil.Process(pid).create_time())
    except psutil.Error:
        return None


def _alive(entry: Mapping[str, Any]) -> bool:
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(entry["pid"])
        return bool(process.create_time() == entry["started"] and process.status() != psutil.STATUS_ZOMBIE)
    return False
