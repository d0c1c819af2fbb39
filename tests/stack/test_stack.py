"""The compose stack, brought up from nothing, used as a team uses it, and broken. In order: each test goes on from the last."""

from __future__ import annotations

import json
import os
import re
import shutil
import ssl
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.contract.test_observed import SELECTOR, rules, shown
from tests.stack.stack import PROJECT, Stack, until

from evergreen.orchestration.deployment import LOADER

pytestmark = pytest.mark.stack

OURS = {"init", "airflow-api", "airflow-scheduler", "airflow-dag-processor", "airflow-triggerer", "worker"}
OTHERS = ("redis_users", "metrics_token", "alertmanager_token")
"""Secrets that are read by the users of others' images."""

RESTARTED = (
    *("postgres", "redis", "store", "postgres-airflow", "mlflow", "worker", "airflow-scheduler"),
    *("airflow-dag-processor", "airflow-triggerer", "airflow-api", "metrics", "prometheus", "alertmanager", "tls"),
)


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    if not shutil.which("docker") or subprocess.run(["docker", "info"], capture_output=True, check=False).returncode:
        pytest.skip("no container engine answers here: the stack is not tested")
    made = Stack()
    try:
        made.down()
        ui_s, all_s = made.up()
        print(f"\nmake stack: the UI answers after {ui_s:.0f} s, everything is healthy after {all_s:.0f} s")
        made.compose("up", "--detach", "--wait", "--no-recreate", "--scale", "worker=2")
        yield made
    finally:
        made.down()


def secrets_of(stack: Stack) -> set[str]:
    """Every password and key of the stack."""
    texts = [file.read_text() for file in stack.secrets.rglob("*") if file.is_file() and file.name != "image.env"]
    found = set(re.findall(r"[0-9a-f]{48}|[A-Za-z0-9_-]{43}=|whsec_\S{30,}", "\n".join(texts)))
    assert len(found) > 10
    return {secret.rstrip("]',\"") for secret in found}


def test_containers_are_confined(stack: Stack):
    """Each runs as somebody but root, without capabilities, on a read-only root, within limits, published on loopback."""
    containers = stack.containers()
    assert {"postgres", "postgres-airflow", "redis", "store", "mlflow", "worker-gpu", *OURS} <= containers.keys()
    assert {"metrics", "prometheus", "alertmanager", "tls"} <= containers.keys()
    for service, told in ((service, each) for service, found in containers.items() for each in found):
        host, config = told["HostConfig"], told["Config"]
        assert config["User"] not in ("", "0", "root", "0:0"), service
        assert (host["CapDrop"], host["CapAdd"], host["Privileged"]) == (["ALL"], None, False), service
        assert host["SecurityOpt"] == ["no-new-privileges:true"], service
        assert host["ReadonlyRootfs"], service
        assert min(host["Memory"], host["NanoCpus"], host["PidsLimit"]) > 0, service
        assert host["NetworkMode"] != "host", service
        assert host["PidMode"] == "", service
        published = [binding for bindings in (host["PortBindings"] or {}).values() for binding in bindings]
        assert {binding["HostIp"] for binding in published} <= {"127.0.0.1"}, service
        assert not [mount for mount in told["Mounts"] if mount["Source"].endswith("docker.sock")], service
        written = {mount["Destination"] for mount in told["Mounts"] if mount["RW"] and mount["Type"] == "bind"}
        assert written <= ({"/run/senders"} if service in ("init", "airflow-api") else set()), service


def test_processes_are_not_roots(stack: Stack):
    """What runs in the containers has no root's number: the images' own start scripts have not changed that."""
    for service in stack.compose("ps", "--services").split():
        users = set(
            stack.compose("exec", "--no-TTY", service, "sh", "-c", "cat /proc/[0-9]*/status 2>/dev/null || true").split(
                "\n"
            )
        )
        numbers = {line.split()[1] for line in users if line.startswith("Uid:")}
        assert numbers, service
        assert "0" not in numbers, service


def test_files_of_secrets_are_the_owners(stack: Stack):
    """Nobody else gets into the folder; in it, only what others' images read is open to more than its owner."""
    for path in (stack.secrets, *stack.secrets.rglob("*")):
        if path.name not in (*OTHERS, "grafana_password", "image.env"):
            assert path.stat().st_mode & 0o077 == 0, path


def test_workers_share_no_disk_and_cannot_reach_airflows_database(stack: Stack):
    """No volume is two containers', of workers nor of anybody; the database's name means nothing to a worker."""
    containers = stack.containers()
    mine = {"init": {"postgres-airflow-socket", "postgres-socket"}}
    seen: dict[str, str] = {}
    for service, told in ((service, each) for service, found in containers.items() for each in found):
        for mount in told["Mounts"]:
            if mount["Type"] == "volume" and mount["Name"].partition("_")[2] not in mine.get(service, ()):
                assert mount["Name"] not in seen, f"{service} and {seen[mount['Name']]} share {mount['Destination']}"
                seen[mount["Name"]] = service
    assert len(containers["worker"]) == 2
    for service in ("worker", "worker-gpu", "mlflow", "store"):
        told = containers[service][0]["NetworkSettings"]["Networks"]
        assert not [name for name in told if name.endswith("_control")], service
    looked = "import socket\ntry: print(socket.create_connection(('postgres-airflow', 5432), 3))\nexcept OSError as e: print('no way:', e)"
    assert "no way" in stack.run_in("worker", "python", "-c", looked)


def test_a_secret_that_is_known_is_refused(stack: Stack):
    """`init`, which everything waits for, fails on a password of the examples, and names the file."""
    kept = (stack.secrets / "mlflow_users").read_text()
    try:
        (stack.secrets / "mlflow_users").write_text("admin:password1234\nevergreen:x\n")
        done = subprocess.run(
            ["docker", "compose", "run", "--rm", "--no-deps", "init"],
            cwd=PROJECT,
            env=stack.environment,
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        (stack.secrets / "mlflow_users").write_text(kept)
    assert done.returncode != 0
    assert "secrets/mlflow_users: a secret in it can be guessed" in done.stdout + done.stderr


def test_a_run_through_the_rest_api_on_two_workers(stack: Stack):
    """An operator asks for a run; its stages land on workers without a common disk, and its model is champion."""
    tasks = stack.finish("flight_delay__train", stack.start("flight_delay__train", {"as_of": "2013-04-01"}))
    hosts = {name: task["hostname"] for name, task in tasks.items() if task["hostname"]}
    print("\n", hosts)
    assert tasks["train"]["queue"] == "gpu"
    assert len(set(hosts.values())) >= 2
    [reign] = stack.evergreen("history", "flight_delay")
    assert (reign["version"], reign["until"]) == (1, None)


def test_stock_clients_get_the_model_and_the_snapshot(stack: Stack, tmp_path: Path):
    """MLflow's own client loads the champion and predicts; `dvc get` fetches the rows that it was made from."""
    predict = (
        "import mlflow, sys\n"
        "model = mlflow.pyfunc.load_model('models:/flight_delay@champion')\n"
        "print(len(model.predict(model.input_example)))\n"
        "print(mlflow.MlflowClient().get_model_version_by_alias('flight_delay', 'champion').tags['evergreen.snapshot.tag'])\n"
    )
    account = {
        "MLFLOW_TRACKING_URI": stack.mlflow,
        "MLFLOW_TRACKING_USERNAME": "evergreen",
        "MLFLOW_TRACKING_PASSWORD": stack.password("mlflow_users", "evergreen"),
    }
    told = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", predict],
        env={**os.environ, **account},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert told.returncode == 0, told.stderr[-3000:]
    rows, tag = told.stdout.split()[-2:]
    assert int(rows) > 0
    password = stack.password("store_password", "evergreen")
    place = stack.store.replace("http://", f"http://evergreen:{password}@")
    options = [f"url={stack.store}/objects", "auth=basic", "user=evergreen", f"password={password}"]
    got = subprocess.run(
        [
            str(Path(sys.executable).parent / "dvc"),
            *("get", f"{place}/snapshots.git", "flight_delay", "--rev", tag, "--out", str(tmp_path / "rows")),
            *("--remote-config", *options),
        ],
        env={**os.environ, "HOME": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert got.returncode == 0, got.stderr[-3000:]
    assert len(list((tmp_path / "rows").iterdir())) == 81


def test_people_do_what_their_role_allows(stack: Stack):
    """A viewer sees, and starts, promotes and rolls back nothing; nobody gets in without a name."""
    conf = {"logical_date": None, "conf": {"why": "to see"}}
    assert stack.ask("GET", "/api/v2/dags/flight_delay__train", user="viewer")[0] == 200
    for dag in ("flight_delay__train", "flight_delay__rollback", "flight_delay__approval"):
        assert stack.ask("POST", f"/api/v2/dags/{dag}/dagRuns", conf, "viewer")[0] == 403
    assert stack.ask("GET", "/api/v2/dags", user=None)[0] == 401
    assert stack.ask("GET", "/evergreen/metrics", user=None)[0] == 401
    variable = {"key": "policy", "value": "x"}
    assert [stack.ask("POST", "/api/v2/variables", variable, user)[0] for user in ("operator", "admin")] == [403, 201]


def test_a_worker_killed_in_the_middle_of_training(stack: Stack):
    """The job goes on where it was when its container comes back, and the run ends with one new version."""
    run_id = stack.start("flight_delay__train", {"as_of": "2013-05-01"})
    [gpu] = stack.containers()["worker-gpu"]
    jobs = ["docker", "exec", gpu["Id"], "sh", "-c", "cat /var/lib/evergreen/jobs/*/progress.jsonl"]
    seen = len(subprocess.run(jobs, capture_output=True, check=False).stdout)
    until(lambda: len(subprocess.run(jobs, capture_output=True, check=False).stdout) > seen)
    stack.docker("kill", "--signal", "KILL", gpu["Id"])
    stack.docker("start", gpu["Id"])
    tasks = stack.finish("flight_delay__train", run_id)
    assert tasks["train"]["try_number"] > 1
    versions = stack.run_in("worker", "evergreen", "runs", "flight_delay", "--json")
    assert {row["version"] for row in json.loads(versions)} == {1, 2}


def test_a_person_decides(stack: Stack):
    """The version that cannot be told from the champion waits: a viewer's answer is refused, the operator's is kept."""
    dag = "flight_delay__approval"
    asked = until(lambda: stack.ask("GET", f"/api/v2/dags/{dag}/dagRuns/~/hitlDetails")[1].get("hitl_details"))
    run_id = asked[0]["task_instance"]["dag_run_id"]
    place = f"/api/v2/dags/{dag}/dagRuns/{run_id}/taskInstances/ask/-1/hitlDetails"
    answer = {"chosen_options": ["promote"], "params_input": {"comment": "fresher"}}
    assert stack.ask("PATCH", place, answer, "viewer")[0] == 403
    status, said = stack.ask("PATCH", place, answer, "operator")
    assert status == 200, said
    stack.finish(dag, run_id)
    newest, *_ = stack.evergreen("history", "flight_delay")
    assert (newest["version"], newest["by"], newest["who"]) == (2, "person", "operator")


def test_a_rollback_names_the_person(stack: Stack):
    """The operator's rollback makes version 1 champion again, and the ledger says who asked."""
    stack.finish("flight_delay__rollback", stack.start("flight_delay__rollback", {"why": "a rehearsal"}))
    newest, *_ = stack.evergreen("history", "flight_delay")
    assert (newest["version"], newest["by"], newest["who"]) == (1, "rollback", "operator")


def test_an_alert_of_alertmanager_ends_in_a_run(stack: Stack):
    """What Prometheus posts when a rule fires comes to the webhook of the pack that it names, and starts a run."""
    alert = {
        "labels": {"alertname": "PredictionsMoved", "pack": "digits", "retrain": "digits"},
        "annotations": {"summary": "the predictions have moved"},
        "endsAt": (datetime.now(UTC) + timedelta(hours=1)).isoformat(),  # or it would be resolved in five minutes
    }
    with stack.scheduling("evergreen__admission", "digits__train"):
        stack.post(f"{stack.alertmanager}/api/v2/alerts", [alert])

        def decided() -> Any:
            alerts = stack.evergreen("alerts", "digits")
            kept = next((each for each in alerts if each["sender"] == "alertmanager"), None)
            return kept and kept["final"] and kept

        kept = until(decided)
        stack.finish("digits__train", kept["run_id"])
    print(f"\n{kept['reason']}: {kept['outcome']}, {kept['run_id']}")
    assert kept["outcome"] in ("retrain", "merge")


def test_people_and_machines_come_by_https(stack: Stack):
    """An operator signs in to links and cookies of https and a sender's alert is kept; unproven, plain or old is refused."""
    login = {"username": "operator", "password": stack.password("airflow_users", "operator")}
    known = ssl.create_default_context(cafile=stack.authority)
    with httpx.Client(base_url=stack.https("AIRFLOW"), verify=known, timeout=120, trust_env=False) as airflow:
        token = airflow.post("/auth/token", json=login).json()["access_token"]
        assert airflow.get("/api/v2/dags", headers={"Authorization": f"Bearer {token}"}).is_success
        assert airflow.get("/execution/health").status_code == 404
        for path in ("/execution/..%2fhealth", "/execution/%2E%2e/api/v2/version", "/x%2F.%2Fexecution/health"):
            assert airflow.get(path).status_code == 400, path
        assert airflow.get("/api/v2/version?of=../x").status_code == 200
        assert airflow.post("/auth/token", content=b"x" * 5_000_000).status_code == 413
        page = airflow.get("/api/v2/auth/login", follow_redirects=True)
        assert str(page.url).startswith(stack.https("AIRFLOW"))
        csrf = re.search(r'name="csrf_token"[^>]* value="([^"]+)"', page.text)[1]
        signed_in = airflow.post(page.url, data={**login, "csrf_token": csrf}, headers={"Referer": str(page.url)})
        assert "_token" in signed_in.cookies
        assert all("; secure" in cookie.lower() for cookie in signed_in.headers.get_list("set-cookie"))
        sender = {"Authorization": f"Bearer {(stack.secrets / 'alertmanager_token').read_text().strip()}"}
        over = {"status": "resolved", "labels": {"alertname": "ByHttps"}, "fingerprint": "by https"}
        alert = {"version": "4", "alerts": [{**over, "startsAt": datetime.now(UTC).isoformat()}]}
        kept = airflow.post("/evergreen/alerts/digits", json=alert, headers=sender)
        assert kept.status_code == 202, kept.text
    with pytest.raises(httpx.ConnectError, match="certificate verify failed"):
        httpx.get(stack.https("AIRFLOW"), trust_env=False)
    plain = httpx.get(stack.https("AIRFLOW").replace("https", "http"), trust_env=False)
    assert (plain.status_code, "plain HTTP request" in plain.text) == (400, True)
    old = ssl.create_default_context(cafile=stack.authority)
    old.set_ciphers("ALL:@SECLEVEL=0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_1
    with pytest.raises(httpx.ConnectError, match="ALERT_PROTOCOL_VERSION"):
        httpx.get(stack.https("AIRFLOW"), verify=old, trust_env=False)


def test_stock_clients_come_by_https(stack: Stack):
    """MLflow's client lists models, git the snapshots; a large object passes whole; a renewed certificate is seen."""
    ask = "import mlflow\nprint('models', len(mlflow.MlflowClient().search_registered_models()))"
    account = {
        "MLFLOW_TRACKING_URI": stack.https("MLFLOW"),
        "MLFLOW_TRACKING_USERNAME": "evergreen",
        "MLFLOW_TRACKING_PASSWORD": stack.password("mlflow_users", "evergreen"),
        "MLFLOW_TRACKING_SERVER_CERT_PATH": str(stack.authority),
    }
    told = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ask],
        env={**os.environ, **account},
        capture_output=True,
        text=True,
        check=False,
    )
    assert told.stdout.startswith("models "), told.stderr[-3000:]
    me = ("evergreen", stack.password("store_password", "evergreen"))
    place = stack.https("STORE").replace("https://", "https://{}:{}@".format(*me))
    listed = subprocess.run(
        ["git", "ls-remote", f"{place}/snapshots.git"],
        env={**os.environ, "GIT_SSL_CAINFO": str(stack.authority)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert listed.returncode == 0, listed.stderr
    known = ssl.create_default_context(cafile=stack.authority)
    with httpx.Client(base_url=stack.https("STORE"), auth=me, verify=known, timeout=300, trust_env=False) as store:
        much = os.urandom(1 << 26)  # four times what `tls` could put down
        put, got, gone = (
            store.put("/objects/large", content=much),
            store.get("/objects/large"),
            store.delete("/objects/large"),
        )
        assert (put.status_code, got.content == much, gone.status_code) == (201, True, 204)
    with httpx.Client(base_url=stack.https("MLFLOW"), verify=known, timeout=300, trust_env=False) as mlflow:
        nobodys = b"x" * 5_000_000
        assert mlflow.post("/api/2.0/mlflow/runs/create", content=nobodys).status_code == 413
        assert mlflow.put("/api/2.0/mlflow-artifacts/artifacts/x", content=nobodys).status_code == 401
    before = stack.authority.read_text()
    for file in stack.authority.parent.iterdir():
        file.unlink()
    stack.certify()
    stack.compose("kill", "--signal", "HUP", "tls")
    port = stack.ports["AIRFLOW_TLS_PORT"]
    until(lambda: ssl.get_server_certificate(("127.0.0.1", port)).split() == stack.authority.read_text().split())
    assert stack.authority.read_text() != before


def test_a_worker_says_that_data_arrived(stack: Stack):
    """`evergreen data-arrived` signs in by the account of the worker's .netrc, which may do that and nothing else."""
    path = "/api/v2/assets?name_pattern=data/flight_delay"
    [asset] = until(lambda: stack.ask("GET", path)[1].get("assets"))
    events = f"/api/v2/assets/events?asset_id={asset['id']}"
    before = stack.ask("GET", events)[1]["total_entries"]
    assert stack.evergreen("data-arrived", "flight_delay")["asset"] == asset["name"]
    assert stack.ask("GET", events)[1]["total_entries"] == before + 1
    role = stack.ask("GET", "/auth/fab/v1/roles/Loader", user="admin")[1]
    assert {(may["action"]["name"], may["resource"]["name"]) for may in role["actions"]} == {*LOADER}
    login = {"username": "loader", "password": stack.password("airflow_loader", "loader")}
    token = stack.ask("POST", "/auth/token", login, None)[1]["access_token"]
    for method, path in (("GET", "/api/v2/variables"), ("POST", "/api/v2/dags/flight_delay__train/dagRuns")):
        assert stack.ask(method, path, {"logical_date": None} if method == "POST" else None, token=token)[0] == 403


def test_prometheus_has_data_for_every_figure(stack: Stack):
    """Each query of each dashboard, and all that a rule looks at, but for what has not happened here."""
    stack.start("flight_delay__monitor", {"as_of": "2013-05-15"})
    never = {"evergreen_days_since_backup", "evergreen_budget", "evergreen_stage_failures_total", 'sender="monitor"'}
    asked = [query for _, query in shown()] + [
        each for rule in rules().values() for each in SELECTOR.findall(rule["expr"])
    ]
    asked = [query for query in asked if not any(name in query for name in never)]

    def missing() -> list[str]:
        return [query for query in asked if not stack.query(query)]

    until(lambda: not missing())
    assert stack.query('up{job="evergreen"} == 1')


def test_each_service_restarted_under_load(stack: Stack):
    """Runs that are under way while one service after the other is restarted, databases at once, end in success."""
    dag, conf = "flight_delay__train", {"as_of": "2013-05-08", "force": True}
    run_id = stack.start(dag, conf)
    for service in RESTARTED:
        if stack.state(dag, run_id) not in ("running", "queued"):
            stack.finish(dag, run_id)
            run_id = stack.start(dag, conf)
        until(lambda run_id=run_id: "running" in {task["state"] for task in stack.tasks(dag, run_id).values()})
        begun = time.monotonic()
        before = stack.started(service)
        if service.startswith("postgres"):
            stack.run_in(service, "sh", "-c", "kill -QUIT $(head -1 $PGDATA/postmaster.pid)")  # `immediate`
        else:
            stack.compose("restart", "--timeout", "10", service)
        until(lambda service=service, before=before: not stack.started(service) & before and stack.is_well(service))
        print(f"\n{service}: restarted and healthy after {time.monotonic() - begun:.0f} s", end="")
    stack.finish(dag, run_id)


def test_nothing_was_lost_and_nothing_was_told(stack: Stack):
    """The ledger is whole after all that; no log, no inspection and no tag holds a secret."""
    assert all(row["holds"] for row in stack.evergreen("ledger", "verify"))
    secrets = secrets_of(stack)
    told = json.dumps(stack.containers()) + stack.compose("logs", "--no-color", "--no-log-prefix")
    told += stack.compose("exec", "--no-TTY", "worker", "sh", "-c", "cat $(find $AIRFLOW_HOME/logs -type f)")
    told += stack.run_in(
        "postgres", "psql", "--username=postgres", "--host=/var/run/postgresql", "evergreen", "-c", "TABLE events"
    )
    every = r"echo 'SELECT format($$TABLE %I$$, tablename) FROM pg_tables WHERE schemaname = $$public$$ \gexec'"
    for service, database in (("postgres", "mlflow"), ("postgres-airflow", "airflow")):
        ask = f"{every} | psql --username=postgres --host=/var/run/postgresql {database}"
        tables = stack.run_in(service, "sh", "-c", ask)
        assert tables.count(" rows)") > 20
        told += tables
    assert [secret[:6] for secret in secrets if secret in told] == []


def test_a_backup_goes_into_an_empty_stack(stack: Stack, tmp_path: Path):
    """All is as it was: champion, ledger, lineage, objects, people; what was backed up is not overwritten by accident."""
    before = stack.evergreen("history", "flight_delay"), stack.evergreen("lineage", "flight_delay@champion")
    print("\n" + stack.make("upgrade", f"TO={tmp_path}"))  # which is a backup, and a stack made anew
    [folder] = tmp_path.iterdir()
    refused = subprocess.run(
        ["make", "restore", f"FROM={folder}"],
        cwd=PROJECT,
        env=stack.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert refused.returncode != 0
    assert "a backup goes into an empty one" in refused.stderr
    stack.forget_images()
    stack.down()
    stack.make("restore", f"FROM={folder}")
    assert (stack.evergreen("history", "flight_delay"), stack.evergreen("lineage", "flight_delay@champion")) == before
    assert all(row["holds"] for row in stack.evergreen("ledger", "verify"))
    stack.evergreen("drill", "flight_delay")
    assert stack.ask("GET", "/api/v2/dags/flight_delay__train", user="viewer")[0] == 200


def test_what_an_idle_stack_takes(stack: Stack):
    """Four GiB at most; memory and CPU of each service are printed."""
    time.sleep(30)
    ids = stack.compose("ps", "--quiet").split()
    before = {each: _cpu_s(stack, each) for each in ids}
    time.sleep(60)
    rows = json.loads(
        "[" + ",".join(stack.docker("stats", "--no-stream", "--format", "{{json .}}", *ids).split("\n")[:-1]) + "]"
    )
    total_mib = total_cpu = 0.0
    print()
    for row in sorted(rows, key=lambda row: row["Name"]):
        number, unit = re.fullmatch(r"([\d.]+)([KMG]iB)", row["MemUsage"].split(" / ")[0]).groups()
        mib = float(number) * {"KiB": 1 / 1024, "MiB": 1, "GiB": 1024}[unit]
        cpu = (_cpu_s(stack, row["ID"]) - next(s for i, s in before.items() if i.startswith(row["ID"]))) / 60 * 100
        total_mib, total_cpu = total_mib + mib, total_cpu + cpu
        print(f"{row['Name']:<50} {mib:7.0f} MiB {cpu:6.1f} % of a core")
    print(f"{'all':<50} {total_mib:7.0f} MiB {total_cpu:6.1f} % of a core")
    assert total_mib <= 4096


def _cpu_s(stack: Stack, container: str) -> float:
    """Seconds of computing of all its processes, ended ones included, by its control group."""
    paths = "/sys/fs/cgroup/cpu.stat /sys/fs/cgroup/cpuacct/cpuacct.usage /sys/fs/cgroup/cpu,cpuacct/cpuacct.usage"
    text = stack.docker("exec", container, "sh", "-c", f"cat {paths} 2>/dev/null || true")
    if found := re.search(r"usage_usec (\d+)", text):
        return int(found.group(1)) / 1e6
    return int(text.split()[-1]) / 1e9
