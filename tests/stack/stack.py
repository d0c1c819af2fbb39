"""A stack of its own for tests: `make stack` under another name, on free ports, with secrets of its own."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from tests.servers import free_port

PROJECT = Path(__file__).resolve().parents[2]
NAME = "evergreen-stack-test"
PATIENCE_S = 1200
"""For what may take long on a machine that has much else to do; nothing is judged by it."""


class Stack:
    """The services, from outside: Docker's word on them, and what they publish on loopback."""

    def __init__(self) -> None:
        self.secrets = PROJECT / "var" / NAME / "secrets"
        self.ports = {
            name: free_port()
            for name in (
                *("AIRFLOW_PORT", "MLFLOW_PORT", "STORE_PORT", "PROMETHEUS_PORT", "ALERTMANAGER_PORT"),
                *("AIRFLOW_TLS_PORT", "MLFLOW_TLS_PORT", "STORE_TLS_PORT"),
            )
        }
        self.environment = {
            **os.environ,
            **{name: str(port) for name, port in self.ports.items()},
            "COMPOSE_PROJECT_NAME": NAME,
            "COMPOSE_FILE": ":".join(
                str(PROJECT / file)
                for file in ("docker-compose.yaml", "docker-compose.tls.yaml", "tests/stack/compose.yaml")
            ),
            "EVERGREEN_SECRETS": f"./{self.secrets.relative_to(PROJECT)}",  # as the Makefile has it: Compose can misread it
            "EVERGREEN_PUBLIC_URL": self.https("AIRFLOW"),
        }
        self._tokens: dict[str, str] = {}

    def up(self) -> tuple[float, float]:
        """`make stack`; → seconds until Airflow's UI answered, and until everything was healthy."""
        begun, answered = time.monotonic(), threading.Event()
        seconds: list[float] = []

        def look() -> None:
            while not answered.wait(0.5):
                try:
                    urllib.request.urlopen(self.airflow + "/api/v2/version", timeout=2).read()
                except OSError:
                    continue
                seconds.append(time.monotonic() - begun)
                return

        self.certify()
        looking = threading.Thread(target=look, daemon=True)
        looking.start()
        try:
            self._run("make", "stack")
        finally:
            answered.set()
            looking.join()
        return seconds[0], time.monotonic() - begun

    def down(self) -> None:
        """Stop it, and remove all that it kept."""
        self.compose("down", "--volumes", "--timeout", "5")
        shutil.rmtree(self.secrets.parent, ignore_errors=True)

    def forget_images(self) -> None:
        """Untag what was built, as on a machine that has built nothing."""
        services = json.loads(self.compose("config", "--format", "json"))["services"]
        built = {told["image"] for told in services.values() if "build" in told}
        self.docker("image", "rm", "--force", *built)

    def compose(self, *arguments: str) -> str:
        """What `docker compose` prints."""
        return self._run("docker", "compose", *arguments)

    def make(self, *arguments: str) -> str:
        """What `make` prints."""
        return self._run("make", *arguments)

    def run_in(self, service: str, *command: str) -> str:
        return self.compose("exec", "--no-TTY", service, *command)

    def _run(self, *command: str) -> str:
        done = subprocess.run(command, cwd=PROJECT, env=self.environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{' '.join(command)}: {done.returncode}\n{(done.stdout + done.stderr)[-4000:]}"
        return done.stdout

    def containers(self) -> dict[str, list[dict[str, Any]]]:
        """What `docker inspect` says of each service's containers, those included that have ended."""
        ids = self.compose("ps", "--all", "--quiet").split()
        found: dict[str, list[dict[str, Any]]] = {}
        for told in json.loads(self._run("docker", "inspect", *ids)):
            found.setdefault(told["Config"]["Labels"]["com.docker.compose.service"], []).append(told)
        return found

    def started(self, service: str) -> set[str]:
        """When each container of the service was started."""
        return {told["State"]["StartedAt"] for told in self.containers()[service]}

    def is_well(self, service: str) -> bool:
        """Whether each container of the service is healthy."""
        return all(told["State"].get("Health", {}).get("Status") == "healthy" for told in self.containers()[service])

    def docker(self, *arguments: str) -> str:
        return self._run("docker", *arguments)

    @property
    def airflow(self) -> str:
        return f"http://127.0.0.1:{self.ports['AIRFLOW_PORT']}"

    @property
    def mlflow(self) -> str:
        return f"http://127.0.0.1:{self.ports['MLFLOW_PORT']}"

    @property
    def store(self) -> str:
        return f"http://127.0.0.1:{self.ports['STORE_PORT']}"

    @property
    def alertmanager(self) -> str:
        return f"http://127.0.0.1:{self.ports['ALERTMANAGER_PORT']}"

    def https(self, service: str) -> str:
        """The service behind `tls`."""
        return f"https://127.0.0.1:{self.ports[f'{service}_TLS_PORT']}"

    @property
    def authority(self) -> Path:
        """What signed the certificate that `tls` shows."""
        return self.secrets / "tls" / "cert.pem"

    def certify(self) -> None:
        """The secrets, as `make stack TLS=1` makes them: with a pair for `tls`, where there is none."""
        self.secrets.parent.mkdir(parents=True, exist_ok=True)
        self._run("python3", "config/make_secrets.py", str(self.secrets), "--tls", "127.0.0.1")

    @contextlib.contextmanager
    def scheduling(self, *wanted: str) -> Iterator[None]:
        """While inside, Airflow begins runs of these DAGs by itself; else it begins what is asked for alone."""
        until(lambda: self.ask("GET", "/api/v2/dags?limit=100")[1].get("total_entries", 0) >= len(wanted))
        others = {dag["dag_id"] for dag in self.ask("GET", "/api/v2/dags?limit=100")[1]["dags"]} - {*wanted}
        try:
            self._pause(others, True)
            self._schedule(True)
            yield
        finally:
            self._schedule(False)
            self._pause(others, False)

    def _pause(self, dags: set[str], paused: bool) -> None:
        for dag in dags:
            assert self.ask("PATCH", f"/api/v2/dags/{dag}", {"is_paused": paused}, "admin")[0] == 200, dag

    def _schedule(self, schedules: bool) -> None:
        self.environment["SCHEDULES"] = str(schedules)
        self.compose("up", "--detach", "--wait", "--no-deps", "airflow-scheduler")

    def post(self, url: str, body: Any) -> None:
        """Post JSON to a service that asks nobody who they are."""
        request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
        urllib.request.urlopen(request, timeout=60).read()

    def query(self, expression: str) -> list[Any]:
        """What Prometheus answers."""
        url = f"http://127.0.0.1:{self.ports['PROMETHEUS_PORT']}/api/v1/query?query={quote(expression, safe='')}"
        with urllib.request.urlopen(url, timeout=60) as answer:
            return list(json.loads(answer.read())["data"]["result"])

    def password(self, file: str, name: str) -> str:
        """The password of the account `name` in a file of secrets."""
        lines = (self.secrets / file).read_text().splitlines()
        return next(line.rpartition(":")[2] for line in lines if line.startswith(f"{name}:"))

    def ask(
        self, method: str, path: str, body: Any = None, user: str | None = "operator", token: str | None = None
    ) -> tuple[int, Any]:
        """Airflow's answer to a person, or to whoever has the token: status and JSON, or text; to nobody for None."""
        headers = {"content-type": "application/json"}
        if token:
            headers["authorization"] = f"Bearer {token}"
        elif user:
            if user not in self._tokens:
                login = {"username": user, "password": self.password("airflow_users", user)}
                self._tokens[user] = self.ask("POST", "/auth/token", login, None)[1]["access_token"]
            headers["authorization"] = f"Bearer {self._tokens[user]}"
        request = urllib.request.Request(
            self.airflow + path, None if body is None else json.dumps(body).encode(), headers, method=method
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                status, said = answer.status, answer.read()
        except urllib.error.HTTPError as error:
            status, said = error.code, error.read()
        try:
            return status, json.loads(said)
        except ValueError:
            return status, said.decode(errors="replace")

    def start(self, dag: str, conf: dict[str, Any], user: str = "operator") -> str:
        """Ask for a run, as soon as Airflow has read the DAG; → its id."""
        until(lambda: self.ask("GET", f"/api/v2/dags/{dag}")[0] == 200)
        status, run = self.ask("POST", f"/api/v2/dags/{dag}/dagRuns", {"logical_date": None, "conf": conf}, user)
        assert status == 200, run
        return str(run["dag_run_id"])

    def tasks(self, dag: str, run_id: str) -> dict[str, dict[str, Any]]:
        """The run's task instances by task."""
        path = f"/api/v2/dags/{dag}/dagRuns/{quote(run_id, safe='')}/taskInstances"
        return {task["task_id"]: task for task in self.ask("GET", path)[1]["task_instances"]}

    def finish(self, dag: str, run_id: str) -> dict[str, dict[str, Any]]:
        """Wait for the run's success; → its task instances."""
        until(lambda: self.state(dag, run_id) in ("success", "failed"))
        state, tasks = self.state(dag, run_id), self.tasks(dag, run_id)
        assert state == "success", {name: task["state"] for name, task in tasks.items()}
        return tasks

    def state(self, dag: str, run_id: str) -> str | None:
        """The run's; None while the API server does not answer."""
        try:
            status, run = self.ask("GET", f"/api/v2/dags/{dag}/dagRuns/{quote(run_id, safe='')}")
        except OSError:
            return None
        return run["state"] if status == 200 else None

    def evergreen(self, *command: str) -> Any:
        """What a command of `evergreen` says as JSON, in a worker."""
        return json.loads(self.run_in("worker", "evergreen", *command, "--json"))


def until(condition: Any) -> Any:
    """What the condition gives as soon as it gives something."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.5)
    raise AssertionError(f"not within {PATIENCE_S} s")
