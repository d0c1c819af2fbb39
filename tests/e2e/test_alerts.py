"""The commands about alerts on a home that is up: what a person says becomes a run that says why; Prometheus can look."""

import os
import re
import signal
import subprocess
import urllib.request
from datetime import timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from tests.e2e.test_scheduler import DAYS, EVERGREEN, PACK, TODAY, Home, until, write_pack

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
TRIGGERS = "triggers: {on_new_data: true, admission: {cooldown: 0s}}"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A home that is up, with packs whose runs end with their first task: there are no rows."""
    found = Home(tmp_path_factory.mktemp("alerts"))
    for name in ("gauge", "meter", "flight_delay"):
        write_pack(found.packs / name)
        (found.packs / name / "rows" / "rows.parquet").unlink()
        file = found.packs / name / "pack.yaml"
        assert "triggers: {schedule: null}" in PACK.format(schedule="null", wait="null")
        file.write_text(file.read_text("utf-8").replace("triggers: {schedule: null}", TRIGGERS), "utf-8")
    write_pack(found.packs / "turned")
    turn(found.packs / "turned")
    found.evergreen("up")
    yield found
    found.evergreen("down")


def turn(folder):
    """A monitored pack, 100 rows a day; in its last six days the target has nothing to do with the rows any more."""
    file = folder / "pack.yaml"
    rules = "triggers: {drift: {schedule: '@yearly', window: 3d}, admission: {cooldown: 0s}}"
    file.write_text(file.read_text("utf-8").replace("triggers: {schedule: null}", rules), "utf-8")
    rng = np.random.default_rng(7)
    x = rng.normal(size=DAYS * 100)
    at = [TODAY - timedelta(days=DAYS) + n * timedelta(days=1) / 100 for n in range(x.size)]
    more = np.where(np.arange(x.size) < (DAYS - 6) * 100, x, rng.normal(size=x.size)) + rng.normal(size=x.size) / 2 > 0
    pl.DataFrame({"at": at, "x": x, "more": more}).write_parquet(folder / "rows" / "rows.parquet")


def final(home, pack):
    """The newest alert of a pack, once it is decided for good."""

    def newest():
        rows = home.evergreen("alerts", pack, "--json")
        return rows[0] if rows and rows[0]["final"] else None

    return until(newest)


def run_of(home, pack, alert):
    """The run that answers an alert, once it has begun."""
    return until(lambda: next((run for run in home.evergreen("runs", pack, "--json") if alert in run["alerts"]), None))


def test_an_alert_by_hand_becomes_a_run(home):
    """`evergreen alert` is kept, decided to retrain, and starts the run that has its reason and its as-of."""
    words = ("--reason", "the gauge was moved", "--as-of", "2026-01-05", "--json")
    alert = home.evergreen("alert", "gauge", *words)["alert"]
    found = final(home, "gauge")
    assert (found["alert"], found["sender"], found["outcome"]) == (alert, "evergreen", "retrain")
    run = run_of(home, "gauge", alert)
    assert (run["run_id"], run["reason"]) == (found["run_id"], "evergreen: the gauge was moved")
    assert run["as_of"] == "2026-01-05T00:00:00+00:00"


def test_new_data_become_a_run(home):
    """`evergreen data-arrived` updates the asset of the dataset; admission makes an alert of it, and that a run."""
    until(lambda: any(row["name"] == "data/meter" for row in home.airflow.get("/api/v2/assets").json()["assets"]))
    answer = home.evergreen("data-arrived", "meter", "--json")
    assert (answer["pack"], answer["asset"]) == ("meter", "data/meter")
    found = final(home, "meter")
    assert (found["sender"], found["reason"], found["outcome"]) == ("data", "new data in data/meter", "retrain")
    assert run_of(home, "meter", found["alert"])["reason"] == "data: new data in data/meter"


@pytest.mark.fault
def test_what_the_monitor_sees_becomes_a_training(home):
    """A shift in the data → the monitor's run → its alert → admission → a training that ends, and says who asked for it."""
    before = home.evergreen("run", "turned", "--as-of", f"{TODAY - timedelta(days=9):%Y-%m-%d}", "--json")
    assert (before["outcome"], before["version"]) == ("promoted", 1)
    conf = {"as_of": TODAY.isoformat()}
    asked = home.airflow.post("/api/v2/dags/turned__monitor/dagRuns", json={"logical_date": None, "conf": conf})
    assert asked.is_success, asked.text
    found = until(lambda: home.evergreen("alerts", "turned", "--json"))
    assert [(each["sender"], each["as_of"]) for each in found] == [("monitor", TODAY.isoformat())]
    decided = final(home, "turned")
    assert (decided["outcome"], decided["rule"]) == ("retrain", "retrain")
    until(lambda: run_of(home, "turned", decided["alert"])["outcome"] != "running")
    run = run_of(home, "turned", decided["alert"])
    assert re.match(r"monitor: roc_auc is 0\.\d+, 0\.\d+ at promotion: worse by ", run["reason"]), run["reason"]
    assert (run["outcome"] == "failed", run["version"], run["as_of"]) == (False, 2, TODAY.isoformat())

    def ended():
        runs = {each["dag_run_id"]: each for each in home.dag_runs("turned")}
        return runs[run["run_id"]] if runs[run["run_id"]]["state"] in ("success", "failed") else None

    asked_for = until(ended)
    assert (asked_for["state"], asked_for["conf"]["reason"]) == ("success", run["reason"])


def test_what_readme_says_of_the_webhook_works(home):
    """The commands that README shows for a script's alert, typed as they stand there but for the port."""
    (block,) = re.findall(r"^```bash\n(.*?)^```$", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE | re.DOTALL)
    script = block.replace("127.0.0.1:8080", f"127.0.0.1:{home.ports[0]}").replace(".venv/bin/evergreen", EVERGREEN)
    assert script.count(str(home.ports[0])) == 1
    command = ["/bin/bash", "-ec", script.replace("curl", "curl -sS --noproxy '*' -w ' %{http_code}'")]
    done = subprocess.run(command, env=home.env, capture_output=True, text=True, check=False)
    assert re.fullmatch(r'\{"alert":"(alert-[0-9a-f]{20})","alerts":\["\1"\]\} 202', done.stdout), done.stderr
    found = final(home, "flight_delay")
    assert (found["sender"], found["reason"]) == ("ci", "the summer timetable begins")


def test_prometheus_can_look(home):
    """`evergreen metrics --serve` tells where it serves, answers there, and ends well when it is interrupted."""
    counted = home.evergreen("metrics")
    command = [EVERGREEN, "metrics", "--serve", "127.0.0.1:0"]
    with subprocess.Popen(command, env=home.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        address = server.stdout.readline().split()[0]
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(address, timeout=30) as answer:
            assert series(answer.read().decode()) >= series(counted)
        os.kill(server.pid, signal.SIGINT)
        assert (server.wait(timeout=30), server.stderr.read()) == (0, "")
    assert {f'evergreen_undecided_alerts{{pack="{name}"}}' for name in ("gauge", "meter")} <= series(counted)


def series(text):
    """What is measured, without the figures."""
    return {line.rsplit(" ", 1)[0] for line in text.splitlines() if not line.startswith("#")}
