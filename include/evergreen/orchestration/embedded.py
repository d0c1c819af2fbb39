"""The embedded home: Airflow and MLflow on this machine, on SQLite, for loopback only.

A run goes through a real DAG run: in this process when no scheduler runs here, else through that scheduler.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import importlib.metadata
import json
import logging
import netrc
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import psutil

from evergreen import database as db
from evergreen import home
from evergreen.data import validation
from evergreen.errors import EvergreenError, SettingsError
from evergreen.keys import Note
from evergreen.orchestration.keeper import READY_WITHIN_S
from evergreen.pack import Pack, load
from evergreen.settings import Settings
from evergreen.training import jobs
from evergreen.training.checkpoints import write_whole
from evergreen.triggers import senders

if TYPE_CHECKING:
    import httpx


def environment(settings: Settings, given: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Airflow's variables for this home; what is given already, in this process's environment, wins."""
    folder = settings.home / "airflow"
    found = {
        "AIRFLOW_HOME": str(folder),
        "AIRFLOW__CORE__DAGS_FOLDER": str(settings.project / "dags"),
        "AIRFLOW__CORE__PLUGINS_FOLDER": str(settings.project / "plugins"),
        # SQLite's writers queue: on a busy machine the default five seconds end in "database is locked".
        "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{folder / 'airflow.db'}?timeout=60",
        "EVERGREEN_HOME": str(settings.home),
        "EVERGREEN_PROJECT": str(settings.project),
        "EVERGREEN_PACKS": str(settings.packs),
        "EVERGREEN_MLFLOW_PORT": "5000",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # eight processes for features that nobody asked of it here
    }
    for line in (settings.project / "config" / "airflow.env").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            name, value = line.split("=", 1)
            found[name] = value
    found |= {name: given[name] for name in found if name in given}
    if found["AIRFLOW__DATABASE__SQL_ALCHEMY_CONN"].startswith("sqlite"):
        found["AIRFLOW__DATABASE__SQL_ALCHEMY_CONNECT_ARGS"] = "evergreen.orchestration.sqlite.CONNECT_ARGS"
    # Where tasks reach the API server: Airflow assumes port 8080 whatever the port is.
    base_url = given.get("AIRFLOW__API__BASE_URL") or f"http://127.0.0.1:{found['AIRFLOW__API__PORT']}"
    return {**found, "AIRFLOW__API__BASE_URL": base_url}


def prepare(settings: Settings) -> None:
    """Point this process at the embedded Airflow, and make its database when there is none. Before `import airflow`."""
    home.adopt(settings)
    os.environ.update(environment(settings))
    folder = settings.home / "airflow"
    folder.mkdir(parents=True, exist_ok=True)
    done = folder / "database-ready"
    version = f"{importlib.metadata.version('apache-airflow-core')} with pools"
    with locked(folder / "database-lock"):  # two first runs at once
        ready = done.is_file() and done.read_text(encoding="ascii") == version
        if not ready or not (folder / "airflow.cfg").is_file():
            from airflow.configuration import write_default_airflow_configuration_if_needed
            from airflow.utils.db import upgradedb

            write_default_airflow_configuration_if_needed()  # with the secrets that its processes share
            upgradedb()
            make_pool()
            done.write_text(version, encoding="ascii")


@contextlib.contextmanager
def locked(file: Path, how: int = fcntl.LOCK_EX, waits: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold a lock on `file`, made where it is missing; `waits` is called once where another process holds it.

    The system frees the lock when its process ends, however it ends.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as lock:
        try:
            fcntl.flock(lock, how | fcntl.LOCK_NB)
        except BlockingIOError:
            waits()
            fcntl.flock(lock, how)
        yield


@contextlib.contextmanager
def turn(settings: Settings, say: Callable[[str], None]) -> Iterator[bool]:
    """Yield whether Airflow runs on this home; while the block lasts, no `up` starts it.

    Where an `up` is at it, wait until it has ended, and `say` so. A scheduler that starts beside a run of this process
    would perform the same tasks once more.
    """
    starting = functools.partial(say, "waiting: `evergreen up` is starting Airflow on this home")
    with locked(_turn_file(settings), fcntl.LOCK_SH, starting):
        yield "airflow" in services(settings)


def _turn_file(settings: Settings) -> Path:
    """The lock that runs share and that `up` has alone."""
    return settings.home / "airflow" / "turn-lock"


def make_pool() -> None:
    """The pool of admission's tasks, which Airflow would never start without it."""
    from airflow.models.pool import Pool
    from airflow.utils.session import create_session

    from evergreen.orchestration.admission import POOL

    with create_session() as session:
        Pool.create_or_update_pool(POOL, 3, "Decides alerts, whatever trains.", include_deferred=False, session=session)


@dataclass(frozen=True)
class Finished:
    """How a DAG run ended."""

    run_id: str
    success: bool


def run_in_process(settings: Settings, pack: str, conf: Mapping[str, Any]) -> Finished:
    """One DAG run of `<pack>__train` in this process, task after task; Airflow's log goes to where logging goes.

    Processes may do so at once. They begin one after the other: each writes the DAGs of all packs into Airflow's
    database first, which is not made for several writers of the same rows.
    """
    prepare(settings)
    from airflow.sdk import DagRunState

    from evergreen.orchestration.dags import training_dag

    loaded = load(settings.packs, pack)
    dag = training_dag(loaded, asks=False)
    dag.fileloc = str(settings.project / "dags" / "training.py")
    db.connect(settings.database_url).made_at()  # the home is older than its first run
    log = logging.getLogger("evergreen")
    with contextlib.ExitStack() as beginning:
        beginning.enter_context(locked(settings.home / "airflow" / "begin-lock"))
        handlers = [_Ahead(settings, loaded), _Begun(beginning.close)]
        for handler in handlers:
            log.addHandler(handler)
        try:
            # A date of its own: Airflow's dag.test() deletes the run of the DAG that has the same date, or none as well.
            dag_run = dag.test(logical_date=datetime.now(UTC), run_conf=dict(conf))
        finally:
            for handler in handlers:
                log.removeHandler(handler)
    return Finished(run_id=dag_run.run_id, success=dag_run.state == DagRunState.SUCCESS)


class _Begun(logging.Handler):
    """Calls `begun` as soon as a stage of the run begins."""

    def __init__(self, begun: Callable[[], None]) -> None:
        super().__init__()
        self.begun = begun

    def emit(self, record: logging.LogRecord) -> None:
        if isinstance(getattr(record, "evergreen_note", None), Note):
            self.begun()


class _Ahead(logging.Handler):
    """While a job runs in its own process, imports in this one what the stages after it will need: seconds."""

    def __init__(self, settings: Settings, pack: Pack) -> None:
        super().__init__()
        self.settings = settings
        self.pack = pack

    def emit(self, record: logging.LogRecord) -> None:
        said = getattr(record, "evergreen_note", None)
        doing = (said.stage, said.state) if isinstance(said, Note) else None
        if doing == ("ingest", "progress") and self.pack.expectations:  # there is something new to validate
            threading.Thread(target=validation.import_ahead, daemon=True).start()
        if doing == ("train", "running"):
            threading.Thread(target=self._for_evaluation, daemon=True).start()

    def _for_evaluation(self) -> None:
        import matplotlib.figure  # noqa: F401

        from evergreen.registry.models import Registry

        with contextlib.suppress(EvergreenError):  # the stage will meet it, and say so
            Registry(self.settings).champion(self.pack.name)


def run_through_scheduler(
    settings: Settings,
    pack: str,
    conf: Mapping[str, Any],
    while_waiting: Callable[[str], None],
    queued_behind: Callable[[str], None] = lambda _run_id: None,
) -> Finished:
    """One DAG run of `<pack>__train` by the scheduler that runs on this home; `while_waiting(run_id)` is called often.

    `queued_behind` is called once, with the run that goes on, where that keeps this one in Airflow's queue.
    """
    runs = f"/api/v2/dags/{pack}__train/dagRuns"
    with client(services(settings)["airflow"]) as airflow:
        run_id = _ask_for_run(airflow, runs, conf)
        asked, said = time.monotonic(), False
        while True:
            state = _json(airflow.get(f"{runs}/{quote(run_id, safe='')}"))["state"]
            while_waiting(run_id)
            if state == "queued" and not said and time.monotonic() - asked > db.PATIENCE_S:
                for other in _json(airflow.get(runs, params={"state": "running", "limit": 1}))["dag_runs"]:
                    queued_behind(other["dag_run_id"])
                    said = True
            if state in ("success", "failed"):
                return Finished(run_id=run_id, success=state == "success")
            time.sleep(0.3)


def _ask_for_run(airflow: httpx.Client, runs: str, conf: Mapping[str, Any]) -> str:
    """Ask for a run; a DAG that Airflow does not know yet, of a pack just made, is given a minute to appear."""
    deadline = time.monotonic() + 60
    while True:
        answer = airflow.post(runs, json={"logical_date": None, "conf": dict(conf)})
        if answer.status_code != 404 or time.monotonic() > deadline:
            return str(_json(answer)["dag_run_id"])
        time.sleep(1.0)


def update_asset(address: str, name: str) -> str:
    """Tell the Airflow at `address` that an asset is new, which wakes what waits for it; → when, ISO 8601."""
    with client(address) as airflow:
        known = _json(airflow.get("/api/v2/assets", params={"name_pattern": name, "limit": 100}))["assets"]
        asset = next((asset["id"] for asset in known if asset["name"] == name), None)
        if asset is None:
            raise SettingsError(
                f"Airflow knows no asset {name!r} that a DAG waits for",
                fix="look at the import errors in the Airflow UI; a pack that was changed is read again within a minute",
            )
        return str(_json(airflow.post("/api/v2/assets/events", json={"asset_id": asset}))["timestamp"])


def client(address: str) -> httpx.Client:
    """Airflow's REST API at `address`. Raises SettingsError where nobody answers, or lets us in."""
    import httpx

    # No proxy: the address is this machine's or this network's. A CA of one's own: SSL_CERT_FILE.
    airflow = functools.partial(
        httpx.Client, base_url=address.rstrip("/"), verify=httpx.create_ssl_context(), timeout=60, trust_env=False
    )
    try:
        with airflow() as nobody:
            token = _token(nobody)
    except httpx.TransportError as error:
        raise SettingsError(f"nobody answers at {address}: {error}", fix="start it: make up") from error
    return airflow(headers={"Authorization": f"Bearer {token}"})


ASKS_WHO = (401, 403, 404, 405)
"""What an Airflow that has accounts answers to whoever asks for a token without one; FAB's: 404. A port that wants TLS
answers 400 to plain HTTP: no password is sent there."""


def _token(nobody: httpx.Client) -> str:
    """Airflow's, for whoever asks, as on an embedded home's loopback; else for the account that `.netrc` has."""
    answer = nobody.get("/auth/token")
    if answer.status_code == HTTPStatus.BAD_REQUEST and nobody.base_url.scheme == "http":
        raise SettingsError(
            f"{nobody.base_url} does not take plain HTTP: {answer.text[:300]}",
            fix=f"ask {nobody.base_url.copy_with(scheme='https')}; SSL_CERT_FILE names an authority of one's own",
        )
    if answer.status_code in ASKS_WHO:
        answer = nobody.post("/auth/token", json=_account(nobody.base_url))
        if answer.status_code == 401:
            raise SettingsError(
                f"{_netrc()}: Airflow at {nobody.base_url} refuses the account for {nobody.base_url.host}",
                fix="correct that entry; in the stack: remove secrets/airflow_loader and secrets/netrc, then make stack",
            )
    return str(_json(answer)["access_token"])


def _account(address: httpx.URL) -> dict[str, str]:
    """The name and the password that `.netrc` has for this host, as Airflow asks for them."""
    file = _netrc()
    try:
        found = netrc.netrc(file).authenticators(address.host) if file.is_file() else None
    except netrc.NetrcParseError as error:
        raise SettingsError(f"{file}: it cannot be read: {error}", fix="write it as git and curl read it") from error
    if found is None:
        raise SettingsError(
            f"{file}: there is no account for {address.host}, and Airflow at {address} asks who comes",
            fix=f"write in it: machine {address.host} login NAME password PASSWORD; in the stack, a secrets/netrc that an "
            "earlier version made is made anew: remove it, then make stack",
        )
    return {"username": found[0], "password": found[2]}


def _netrc() -> Path:
    """Where stock tools look for it."""
    return Path(os.environ.get("NETRC") or Path.home() / ".netrc")


def _json(answer: httpx.Response) -> Any:
    if answer.is_error:
        raise SettingsError(
            f"Airflow refused {answer.request.method} {answer.request.url}: {answer.status_code} {answer.text[:300]}",
            fix="give the account a role that may: Loader says that data arrived, User starts runs, too"
            if answer.status_code == 403
            else "look at the DAG and at the import errors in the Airflow UI, `evergreen airflow dags list-import-errors`",
        )
    return answer.json()


@dataclass(frozen=True)
class Service:
    """What `up` starts under one name: its processes by name, where it answers, and the path that says it is well."""

    commands: Mapping[str, list[str]]
    port: int
    health: str

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"


def _services(settings: Settings, env: Mapping[str, str]) -> dict[str, Service]:
    python, home_only = sys.executable, "--skip-serve-logs"  # a log server would listen on every interface
    airflow = {
        "airflow-scheduler": [python, "-m", "airflow", "scheduler", home_only],
        "airflow-dag-processor": [python, "-m", "airflow", "dag-processor"],
        "airflow-api-server": [python, "-m", "airflow", "api-server"],
        "airflow-triggerer": [python, "-m", "airflow", "triggerer", home_only],
    }
    found = {"airflow": Service(airflow, int(env["AIRFLOW__API__PORT"]), "/api/v2/monitor/health")}
    if not settings.mlflow_tracking_uri.startswith("http"):  # else it is a server's, which runs elsewhere
        port = env["EVERGREEN_MLFLOW_PORT"]
        mlflow = [
            *(python, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", port, "--workers", "1"),
            *("--backend-store-uri", settings.mlflow_tracking_uri),
            *("--default-artifact-root", settings.mlflow_artifacts),
            "--no-serve-artifacts",  # else anybody on loopback may put files into the folder it was started in
        ]
        found["mlflow"] = Service({"mlflow": mlflow}, int(port), "/health")
    return found


def services(settings: Settings) -> dict[str, str]:
    """The addresses of what `up` started on this home and is still alive: `airflow`, `mlflow`."""
    home.adopt(settings)
    recorded = _recorded(settings)
    return {
        name: entry["address"]
        for name, entry in recorded.items()
        if all(_leader(process) for process in entry["processes"])
    }


def up(settings: Settings, say: Callable[[str], None] = lambda _text: None) -> Iterator[tuple[str, str]]:
    """Start Airflow (UI, scheduler, DAG processor, triggerer) and the MLflow UI; → (name, address) as each is ready.

    It waits, and `say`s so, until no `evergreen run` performs tasks on this home and no other `up` starts anything.
    Raises SettingsError where a port is taken or a service does not get ready; what was started then is stopped. And
    SendersError where the senders file, which is made where there is none, cannot be used.
    """
    busy = functools.partial(say, "waiting: an `evergreen run`, or another `evergreen up`, is at work on this home")
    with locked(_turn_file(settings), waits=busy):
        yield from _up(settings)


def _up(settings: Settings) -> Iterator[tuple[str, str]]:
    env = {**os.environ, **environment(settings)}
    wanted = _services(settings, env)
    running = services(settings)
    missing = {name: service for name, service in wanted.items() if name not in running}
    _stop(settings, missing)  # what a crash has left of them
    for name, service in missing.items():
        _require_free(name, service.port)
    logs = settings.home / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    try:
        if "airflow" in missing:
            senders.ensure(settings)
            _prepare_apart(settings, logs / "airflow-database.log")
        for name, service in missing.items():
            _start(settings, name, service, env, logs)
        for name, service in wanted.items():
            _wait_until_ready(settings, name, service, logs)
            if name in missing:
                for entry in _recorded(settings)[name]["processes"]:
                    os.kill(entry["pid"], signal.SIGUSR1)  # from now on the keeper starts it again
            yield name, service.address
    except SettingsError:
        _stop(settings, missing)
        raise


def down(settings: Settings) -> list[str]:
    """Stop what `up` started, and the jobs it was at, which go on from their checkpoints; → the names of what ran."""
    stopped = _stop(settings, _recorded(settings))
    if "airflow" in stopped:
        jobs.cancel_all(settings)
    return stopped


def _prepare_apart(settings: Settings, log: Path) -> None:
    """Make the database in a process of its own, so that this one imports no Airflow."""
    code = "from evergreen.orchestration import embedded; from evergreen.settings import Settings; "
    code += "embedded.prepare(Settings.from_env())"
    env = {**os.environ, **environment(settings)}
    with log.open("ab") as output:
        done = subprocess.run(
            [sys.executable, "-c", code], env=env, stdout=output, stderr=output, stdin=subprocess.DEVNULL, check=False
        )
    if done.returncode:
        raise SettingsError(f"Airflow's database could not be made; the log is {log}", fix="look at the end of the log")


def _start(settings: Settings, name: str, service: Service, env: Mapping[str, str], logs: Path) -> None:
    entry: dict[str, Any] = {"address": service.address, "processes": []}
    for process_name, command in service.commands.items():
        with (logs / f"{process_name}.log").open("ab") as log:
            # Each in a session of its own, so that it outlives this terminal and is stopped with all it started.
            process = subprocess.Popen(
                [sys.executable, "-m", "evergreen.orchestration.keeper", *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=env,
                start_new_session=True,
            )
        process.returncode = 0  # it outlives this object, which would warn of it otherwise
        entry["processes"].append({"pid": process.pid, "started": psutil.Process(process.pid).create_time()})
        _record(settings, {**_recorded(settings), name: entry})


def _stop(settings: Settings, names: Mapping[str, Any], grace_s: float = 5.0) -> list[str]:
    """End the sessions of these services: SIGTERM, then SIGKILL after the grace; → the names of those that ran."""
    recorded = _recorded(settings)
    found = {name: list(recorded[name]["processes"]) for name in names if name in recorded}
    stopped = [name for name, entries in found.items() if _members(entries)]
    entries = [entry for those in found.values() for entry in those]
    leaders = [leader for entry in entries if (leader := _leader(entry))]
    for process in leaders:  # they end their children in good order
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    psutil.wait_procs(leaders, timeout=grace_s)
    while left := _members(entries):
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=5)
    if recorded:
        _record(settings, {name: entry for name, entry in recorded.items() if name not in found})
    return stopped


def _wait_until_ready(settings: Settings, name: str, service: Service, logs: Path) -> None:
    import httpx

    deadline = time.monotonic() + READY_WITHIN_S
    while time.monotonic() < deadline and name in services(settings):
        with contextlib.suppress(httpx.TransportError, ValueError, KeyError):
            answer = httpx.get(service.address + service.health, timeout=10, trust_env=False)
            if answer.is_success and (name != "airflow" or _is_well(answer.json())):
                return
        time.sleep(0.2)
    raise SettingsError(
        f"{name} did not get ready at {service.address}",
        fix=f"look at the end of {' or '.join(str(logs / f'{process}.log') for process in service.commands)}",
    )


def _is_well(health: Mapping[str, Any]) -> bool:
    return all(health[part]["status"] == "healthy" for part in ("scheduler", "dag_processor", "triggerer"))


def _require_free(name: str, port: int) -> None:
    variable = {"airflow": "AIRFLOW__API__PORT", "mlflow": "EVERGREEN_MLFLOW_PORT"}[name]
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind(("127.0.0.1", port))
        except OSError as error:
            raise SettingsError(
                f"port {port}, where {name} would answer, cannot be had: {error.strerror}",
                fix=f"stop what listens there, or choose another: {variable}={port + 1}",
            ) from error


def _recorded(settings: Settings) -> dict[str, Any]:
    """Read `services.json`: name → address and processes. Those in a copy of a home are the original's."""
    file = settings.home / home.SERVICES
    if home.whereabouts(settings).kind == "copied":
        return {}
    return dict(json.loads(file.read_bytes())) if file.is_file() else {}


def _record(settings: Settings, entries: Mapping[str, Any]) -> None:
    write_whole(settings.home / home.SERVICES, json.dumps(entries, indent=1).encode())


def _leader(entry: Mapping[str, Any]) -> psutil.Process | None:
    """The process, if it lives and is not a later one with the same pid."""
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(entry["pid"])
        same = abs(process.create_time() - entry["started"]) < 2.0  # a clock that is set moves it a little
        if same and process.status() != psutil.STATUS_ZOMBIE:
            return process
    return None


def _members(entries: list[Any]) -> list[psutil.Process]:
    """All living processes of these processes' sessions, whether or not their leaders live."""
    sessions = {entry["pid"] for entry in entries if _leader(entry) or not psutil.pid_exists(entry["pid"])}
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if os.getsid(process.pid) in sessions and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found
