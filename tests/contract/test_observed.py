"""What watches the platform: a real Prometheus scrapes it, finds data for every figure on the dashboards, and alerts."""

import contextlib
import json
import re
import shutil
import sqlite3
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import urlsplit
from uuid import uuid4

import httpx
import pytest
import yaml
from tests.servers import free_port

from evergreen import database as db
from evergreen.laws import scaffold
from evergreen.pack import find
from evergreen.triggers import inbox
from evergreen.triggers.admission import Decision
from evergreen.triggers.inbox import NewAlert, Ruling

PROJECT = Path(__file__).parents[2]
CONFIG = PROJECT / "config"
RULES = yaml.safe_load((CONFIG / "prometheus" / "rules.yml").read_text(encoding="utf-8"))["groups"]
DASHBOARDS = sorted((CONFIG / "grafana" / "dashboards").glob("*.json"))
SELECTOR = re.compile(r"evergreen_\w+(?:\{[^}]*\})?")
TOKEN = "t" * 32

needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None, reason="Prometheus is not installed: apt-get install prometheus"
)


def until(condition):
    """Wait for a condition, a minute at most."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it did not become true in time"
        time.sleep(0.1)


def rules():
    return {rule["alert"]: rule for group in RULES for rule in group["rules"]}


def shown():
    """Every query of every dashboard, for all packs."""
    for file in DASHBOARDS:
        for panel in json.loads(file.read_text(encoding="utf-8"))["panels"]:
            for target in panel["targets"]:
                yield f"{file.stem}: {panel['title']}", target["expr"].replace("$pack", ".*")


def live(database, pack):
    """All that there is to count: a run that trains, fails once and is promoted, a look, decided alerts, a backup."""
    database.append(pack, "run", {"as_of": "2013-04-01"}, run_id="one")
    trained = {"duration_s": 9, "hardware": {"device": "cpu"}, "metrics": {"samples_per_s": 100.0}}
    database.append(pack, "stage", {"stage": "train", "value": trained}, run_id="one")
    failure = {"stage": "register", "error": "RegistryError", "what": "no", "fix": ""}
    database.append(pack, "failure", failure, run_id="one")
    database.append(pack, "promotion", {"status": "done", "champion": 4, "version": 4}, run_id="one")
    promoted = {"verdict": {"decision": "promote"}, "champion": 4}
    database.append(pack, "stage", {"stage": "promote", "value": promoted}, run_id="one")
    look = {"kind": "quiet", "scores": {"seats": 0.25}, "prediction_score": 0.3}
    database.append(pack, "drift", {"stage": "monitor", "value": look}, run_id="watch__one")
    for alert in inbox.keep(database, pack, [NewAlert("monitor", "1", "it drifts", "it")]):
        ruling = Ruling(Decision(alert, "drop", "rule", "because", None, None), {"alert": {}}, None)
        assert inbox.record(
            database, pack, [ruling], policy={}, now=datetime.now(UTC), after=database.latest(pack).position
        )
    database.append(db.HOME, "backup", {})


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory, postgres):
    """A Prometheus that has scraped `evergreen metrics --airflow` a few times; how to ask it."""
    folder = tmp_path_factory.mktemp("observed")
    pack = scaffold(folder / "packs", "churn") / "pack.yaml"
    budget = "  admission: {budget: {runs: 4, device_hours: 2}}\n"
    pack.write_text(f"{pack.read_text(encoding='utf-8').rstrip()}\n{budget}", encoding="utf-8")
    (folder / "token").write_text(TOKEN, encoding="utf-8")
    url = str(postgres.database())
    live(db.connect(url), "churn")
    env = {
        "EVERGREEN_HOME": str(folder / "home"),
        "EVERGREEN_PACKS": str(folder / "packs"),
        "EVERGREEN_DATABASE_URL": url,
    }
    command = [Path(sys.executable).with_name("evergreen"), "metrics", "--airflow", "--json"]
    with subprocess.Popen(
        [*command, "--serve", "127.0.0.1:0", "--token-file", folder / "token"],
        env=env | {"PATH": str(Path(sys.executable).parent)}, stdout=subprocess.PIPE, text=True,
    ) as exporter:  # fmt: skip
        try:
            address = json.loads("".join(iter(exporter.stdout.readline, "}\n")) + "}")["address"]
            alive(folder / "home" / "airflow" / "airflow.db")
            with scraping(folder, address) as ask:
                yield address, ask
        finally:
            exporter.terminate()


def alive(airflow):
    """What a scheduler writes into Airflow's own database: its sign of life, and a task that waits for a worker."""
    now = str(datetime.now(UTC).replace(tzinfo=None))
    with sqlite3.connect(airflow) as connection:
        connection.execute(
            "INSERT INTO job (state, job_type, latest_heartbeat) VALUES ('running', 'SchedulerJob', ?)", (now,)
        )
        columns = [row[1] for row in connection.execute("PRAGMA table_info(task_instance)") if row[3]]
        row = dict.fromkeys(columns, 0) | {"id": uuid4().hex, "state": "queued", "queue": "gpu", "queued_dttm": now}
        connection.execute(
            f"INSERT INTO task_instance ({', '.join(row)}) VALUES ({', '.join('?' * len(row))})", (*row.values(),)
        )


@contextlib.contextmanager
def scraping(folder, address):
    """A Prometheus with the project's own configuration, but for where things are and how often they are asked."""
    config = yaml.safe_load((CONFIG / "prometheus" / "prometheus.yml").read_text(encoding="utf-8"))
    config["global"] = {"scrape_interval": "2s", "evaluation_interval": "2s"}  # a scrape has no longer than that
    config["rule_files"] = [str(CONFIG / "prometheus" / "rules.yml")]
    config["alerting"] = {}
    [job] = [each for each in config["scrape_configs"] if each["job_name"] == "evergreen"]
    job["authorization"]["credentials_file"] = str(folder / "token")
    job["static_configs"] = [{"targets": [urlsplit(address).netloc]}]
    config["scrape_configs"] = [job]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
    url = f"http://127.0.0.1:{free_port()}"
    command = ["prometheus", f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'tsdb'}"]
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(
            [*command, f"--web.listen-address={url.removeprefix('http://')}"], stdout=log, stderr=log
        )

    def ask(query):
        answer = httpx.get(f"{url}/api/v1/query", params={"query": query}, timeout=60, trust_env=False).json()
        assert answer["status"] == "success", (query, answer)
        return answer["data"]["result"]

    def scraped():
        assert process.poll() is None, (folder / "prometheus.log").read_text(encoding="utf-8")
        try:
            return httpx.get(f"{url}/-/ready", trust_env=False).is_success and any(
                float(each["value"][1]) >= 2 for each in ask('sum_over_time(up{job="evergreen"}[1m])')
            )
        except httpx.TransportError:
            return False

    try:
        until(scraped)
        yield ask
    finally:
        process.terminate()
        process.wait()


@needs_prometheus
def test_every_figure_on_the_dashboards_has_data(prometheus):
    """Each query of each panel, as Grafana would ask it."""
    _, ask = prometheus
    assert [where for where, query in shown() if not ask(query)] == []


@needs_prometheus
def test_a_state_without_tasks_is_a_zero(prometheus):
    """What nothing waits for is said, and not left out: a graph of an idle platform is a line at 0."""
    _, ask = prometheus
    [idle] = ask('evergreen_airflow_tasks{queue="default",state="queued"}')
    [waiting] = ask('evergreen_airflow_tasks{queue="gpu",state="queued"}')
    assert (idle["value"][1], waiting["value"][1]) == ("0", "1")


@needs_prometheus
def test_everything_that_a_rule_looks_at_is_measured(prometheus):
    """A rule on a metric that nobody gives would be quiet for ever."""
    _, ask = prometheus
    looked = {selector for rule in rules().values() for selector in SELECTOR.findall(rule["expr"])}
    assert [selector for selector in sorted(looked) if not ask(selector)] == []


@needs_prometheus
def test_without_the_token_there_are_no_metrics(prometheus):
    """Off loopback they name packs, columns and senders: not for everybody."""
    address, _ = prometheus
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": TOKEN}, {"Authorization": b"Bearer \xff"}):
        answer = httpx.get(address, headers=headers, timeout=60, trust_env=False)
        assert (answer.status_code, "evergreen_" in answer.text) == (401, False)
    answer = httpx.get(address, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=60, trust_env=False)
    assert (answer.status_code, "evergreen_" in answer.text) == (200, True)


@needs_prometheus
def test_rules_fire_when_they_should(tmp_path):
    """By Prometheus' own unit tests of rules: what fires, after how long, with which labels; and what stays quiet."""

    def case(series, at, alert, **labels):
        expected = [{"exp_labels": {**labels, "severity": rules()[alert]["labels"]["severity"]}}] if labels else []
        tests = {"eval_time": at, "alertname": alert, "exp_alerts": expected}
        for each in expected:
            each["exp_annotations"] = {"summary": labels.pop("says"), **annotations(alert)}
            each["exp_labels"].pop("says")
        given = [{"series": name, "values": values} for name, values in series.items()]
        return {"interval": "1m", "input_series": given, "alert_rule_test": [tests]}

    def annotations(alert):
        return {name: text for name, text in rules()[alert]["annotations"].items() if name == "runbook"}

    failing, psi = 'evergreen_failing{pack="a",what="training"}', 'evergreen_prediction_psi{pack="a"}'
    waits, beat = (
        'evergreen_airflow_queued_seconds{queue="gpu"}',
        'evergreen_airflow_heartbeat_seconds{job="Scheduler"}',
    )
    disk = {"evergreen_disk_bytes": "100x999"}
    failed = "a: its training failed, and did not come to an end since"
    moved = "the predictions of a have moved: PSI 0.30"
    full = "the disk is full, or will be within a day"
    cases = [
        case({failing: "1x20"}, "6m", "RunFailed", pack="a", what="training", says=failed),
        case({failing: "1x20"}, "4m", "RunFailed"),
        case({failing: "1x3 0x20"}, "9m", "RunFailed"),
        case({psi: "0.3x60"}, "40m", "PredictionsMoved", pack="a", retrain="a", says=moved),
        case({psi: "0.2x60"}, "40m", "PredictionsMoved"),
        *(
            case({psi: "0.3x60", f'evergreen_newest_look{{pack="a",kind="{kind}"}}': "1x60"}, "40m", "PredictionsMoved")
            for kind in ("data fault", "seasonal", "withstood")
        ),
        case({'evergreen_days_since_training{pack="a"}': "9x9"}, "5m", "ChampionStale", pack="a",
             says="a was last trained 9 days ago"),
        case({waits: "700x9"}, "5m", "QueueStuck", queue="gpu", says="a task has waited 11m 40s in the queue gpu"),
        case({waits: "0+60x10 0+60x10 0+60x10"}, "27m", "QueueStuck", queue="gpu",
             says="a task has waited 10m 0s in the queue gpu"),
        case({waits: "0+60x5 0x20"}, "20m", "QueueStuck"),
        case({beat: "300x9"}, "5m", "PlatformDown", job="Scheduler", says="no sign of life of Scheduler"),
        case({'up{job="evergreen"}': "0x9"}, "5m", "PlatformDown", job="evergreen", says="no sign of life of evergreen"),
        case({beat: "3x9", 'up{job="evergreen"}': "1x9"}, "5m", "PlatformDown"),
        case({"evergreen_disk_free_bytes": "50-1x45", **disk}, "40m", "DiskFilling", says=full),
        case({"evergreen_disk_free_bytes": "50x45", **disk}, "40m", "DiskFilling"),
        case({'up{job="evergreen"}': "1x99"}, "70m", "BackupOld", says="no backup ended within two days"),
        case({"evergreen_days_since_backup": "1x99", 'up{job="evergreen"}': "1x99"}, "70m", "BackupOld"),
        case({'evergreen_alerts_total{pack="a",sender="s",decision="drop"}': "0+5x60",
              'evergreen_undecided_alerts{pack="a"}': "0x60"}, "60m", "DriftStorm", pack="a",
             says="a: 300 alerts within an hour"),
        case({'evergreen_undecided_alerts{pack="a"}': "0 500x60"}, "60m", "DriftStorm", pack="a",
             says="a: 500 alerts within an hour"),
    ]  # fmt: skip
    file = tmp_path / "tests.yml"
    file.write_text(yaml.safe_dump({"rule_files": [str(CONFIG / "prometheus" / "rules.yml")], "tests": cases}))
    done = subprocess.run(["promtool", "test", "rules", file], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_rule_for_people_has_a_runbook_and_every_runbook_a_rule():
    named = {rule["annotations"]["runbook"] for group in RULES if group["name"] == "people" for rule in group["rules"]}
    assert named == {str(file.relative_to(PROJECT)) for file in (PROJECT / "docs" / "runbooks").glob("*.md")}


def test_a_rule_can_retrain_each_of_the_packs():
    """Alertmanager has a way to the webhook of every pack of the project."""
    config = yaml.safe_load((CONFIG / "alertmanager" / "alertmanager.yml").read_text(encoding="utf-8"))
    receivers = {each["name"]: each for each in config["receivers"]}
    for pack in find(PROJECT / "include" / "packs"):
        [route] = [route for route in config["route"]["routes"] if f'retrain="{pack.name}"' in route["matchers"]]
        [webhook] = receivers[route["receiver"]]["webhook_configs"]
        assert webhook["url"].endswith(f"/evergreen/alerts/{pack.name}")
    if shutil.which("amtool"):
        file = CONFIG / "alertmanager" / "alertmanager.yml"
        subprocess.run(["amtool", "check-config", file], check=True, capture_output=True)
