"""Alerts through a real Airflow: woken by the bell, by data and by the minute; processes killed; one run, one decision."""

import contextlib
import os
import re
import signal
import sqlite3
import subprocess
import sys
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property
from pathlib import Path

import psutil
import pytest
from tests.e2e.test_scheduler import PACK, TODAY, Home, until, write_pack

from evergreen import database as db
from evergreen.orchestration import embedded
from evergreen.settings import Settings
from evergreen.triggers import inbox
from evergreen.triggers.inbox import NewAlert

pytestmark = [pytest.mark.slow, pytest.mark.fault]

DAGS = Path(__file__).parents[2] / "dags"
TRIGGERS = "triggers: {on_new_data: true, admission: {cooldown: 0s}}"
PRODUCER = '''
"""An airflow dag of somebody else, whose task makes the rows of a dataset."""
from datetime import UTC, datetime
from airflow.sdk import DAG, Asset, task

with DAG("producer", schedule=None, start_date=datetime(2000, 1, 1, tzinfo=UTC)):
    @task(outlets=[Asset("data/outlet")])
    def produce():
        pass
    produce()
'''
DYING = '''
"""The airflow dag of admission, whose tasks die at an instruction: once for each file that the test has put there."""
import os, signal
from pathlib import Path
from evergreen import loop
from evergreen.orchestration import admission

def die(where, pack):
    file = Path(os.environ["EVERGREEN_PACKS"]) / pack / f"die-{where}"
    if file.exists():
        file.unlink()
        os.kill(os.getpid(), signal.SIGKILL)

def admit(*words, real=loop.admit):
    starts = real(*words)
    for start in starts:
        die("decided", start.pack)
    return starts

def execute(self, context, real=admission.StartRun.execute):
    die("starting", self.trigger_dag_id.removesuffix("__train"))
    return real(self, context)

def confirm(settings, scheduler, pack, real=loop.confirm):
    die("confirming", pack)
    return real(settings, scheduler, pack)

loop.admit, loop.confirm, admission.StartRun.execute = admit, confirm, execute
dag = admission.admission_dag()
'''
KILLED = {
    "decided": "after the intent was written down",
    "starting": "before the run was asked for",
    "confirming": "after the run was made, before the decision was final",
}


@dataclass
class Admitting(Home):
    """A home with DAGs of its own, and the way in by its inbox."""

    started: list = field(default_factory=list)

    @cached_property
    def env(self):
        dags = self.folder / "dags"
        dags.mkdir()
        (dags / "training.py").write_text((DAGS / "training.py").read_text("utf-8"), "utf-8")
        (dags / "admission.py").write_text(DYING, "utf-8")
        (dags / "producer.py").write_text(PRODUCER, "utf-8")
        return super().env | {"AIRFLOW__CORE__DAGS_FOLDER": str(dags), "EVERGREEN_PROJECT": str(DAGS.parent)}

    @cached_property
    def database(self):
        return db.connect(Settings.from_env(self.env).database_url)

    def pack(self, name):
        """A pack without rows: its runs end with their first task."""
        folder = self.packs / name
        write_pack(folder)
        assert "triggers: {schedule: null}" in PACK.format(schedule="null", wait="null")
        file = folder / "pack.yaml"
        file.write_text(file.read_text("utf-8").replace("triggers: {schedule: null}", TRIGGERS), "utf-8")
        (folder / "rows" / "rows.parquet").unlink()

    def alert(self, pack, number=1, reason="the world has changed", as_of=None):
        alert = NewAlert(sender="tests", sender_id=str(number), reason=reason, fingerprint="it", as_of=as_of)
        return inbox.keep(self.database, pack, [alert])[0]

    def finals(self, pack):
        """(outcome, rule) of each final decision, in order."""
        found = [event.body for event in self.database.events(pack, kind="decision")]
        return [(body["outcome"], body["rule"]) for body in found if body["outcome"] != "hold"]

    def holds(self, pack):
        found = [event.body for event in self.database.events(pack, kind="decision")]
        return [body["rule"] for body in found if body["outcome"] == "hold"]

    def begun(self, pack):
        """The runs that began: their events."""
        return self.database.events(pack, kind="run")

    def pause(self, pack, paused):
        path = f"/api/v2/dags/{pack}__train"
        assert self.airflow.patch(path, json={"is_paused": paused}).is_success

    def data_comes(self, dataset):
        """Somebody says so by Airflow's API."""
        asset = assets(self)[f"data/{dataset}"]
        answer = self.airflow.post("/api/v2/assets/events", json={"asset_id": asset, "extra": {}})
        assert answer.is_success, answer.text

    def kill(self, *names, keepers=True):
        """SIGKILL these processes of Airflow, and all that they started; without their keepers they come again."""
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                words = " ".join(process.cmdline())
                kept = not keepers and "orchestration.keeper" in words
                if not kept and any(re.search(rf"airflow {name}\b", words) for name in names):
                    for each in [process, *process.children(recursive=True)]:  # a keeper before it starts another
                        with contextlib.suppress(psutil.NoSuchProcess):
                            each.kill()
                    psutil.wait_procs([process], timeout=20)

    def start(self, name):
        """One process of Airflow, alone: a scheduler without a triggerer has no bell."""
        found = embedded.environment(Settings.from_env(self.env), self.env)
        env = found | self.env | {"AIRFLOW__API__BASE_URL": f"http://127.0.0.1:{self.ports[0]}"}
        command = [sys.executable, "-m", "airflow", name, *([] if name == "api-server" else ["--skip-serve-logs"])]
        with (self.folder / f"{name}.log").open("ab") as log:
            started = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
        self.started.append(started)

    def down(self):
        for process in self.started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self.evergreen("down")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """All that happens, once; the tests below say what came of it."""
    home = Admitting(tmp_path_factory.mktemp("admission"))
    packs = ["good", "copies", "paused", "fresh", "outlet", "swept", "lost", *KILLED]
    for pack in packs:
        home.pack(pack)
    for where in KILLED:
        (home.packs / where / f"die-{where}").touch()
    try:
        home.evergreen("up")
        until(lambda: {f"{pack}__train" for pack in packs} <= known(home))
        until(lambda: "data/outlet" in assets(home))
        home.pause("paused", paused=True)
        home.alert("good", reason="{{ 1 + 1 }} is not 3", as_of=TODAY - timedelta(days=1, hours=-3))
        for pack in ("paused", "starting", "confirming"):
            home.alert(pack)
        for number in (1, 1, 1, 2, 3):
            home.alert("copies", number)
        home.data_comes("fresh")
        assert home.airflow.post("/api/v2/dags/producer/dagRuns", json={"logical_date": None}).is_success
        for pack in ("good", "fresh", "outlet"):
            until(lambda pack=pack: home.finals(pack) and home.begun(pack))
        until(lambda: len(home.finals("copies")) == 3)
        until(lambda: home.holds("paused"))
        home.alert("decided")
        until(lambda: not any((home.packs / where / f"die-{where}").exists() for where in KILLED))
        home.kill("triggerer", "scheduler")
        home.alert("swept")
        home.data_comes("lost")
        with sqlite3.connect(home.folder / "home" / "airflow" / "airflow.db", timeout=60) as airflow:
            assert airflow.execute("DELETE FROM asset_dag_run_queue").rowcount
        home.pause("paused", paused=False)
        home.start("scheduler")
        for pack in ("swept", "lost", "paused", *KILLED):
            until(lambda pack=pack: home.finals(pack) and home.begun(pack))
        yield home
    finally:
        home.down()


def known(home):
    return {dag["dag_id"] for dag in home.get("/api/v2/dags?limit=100")["dags"]}


def assets(home):
    return {asset["name"]: asset["id"] for asset in home.get("/api/v2/assets?limit=100")["assets"]}


def test_an_alert_starts_one_run(home):
    """Whose id is the alert's, and which began."""
    (run,) = home.begun("good")
    (alert,) = home.database.events("good", kind="alert")
    assert run.run_id == alert.key.replace("alert-", "alert__")
    assert [each["dag_run_id"] for each in home.dag_runs("good")] == [run.run_id]
    assert home.finals("good") == [("retrain", "retrain")]


def test_the_run_says_why_and_sees_no_more_than_was_asked(home):
    """Its reason is the sender's, to the letter, and its as-of the alert's, at the end of the last whole day."""
    (run,) = home.begun("good")
    assert run.body["reason"] == "tests: {{ 1 + 1 }} is not 3"
    assert run.body["as_of"] == (TODAY - timedelta(days=1)).isoformat()
    assert home.evergreen("runs", "good", "--json")[0]["reason"] == run.body["reason"]


@pytest.mark.parametrize("conf", [{"as_of": "2015-13-99"}, {"force": "yes"}, {"reason": 5}])
def test_a_run_that_is_asked_for_wrongly_is_refused_and_not_made(home, conf):
    """By Airflow itself, over its REST interface, which its form uses as well."""
    before = home.dag_runs("good")
    answer = home.airflow.post("/api/v2/dags/good__train/dagRuns", json={"logical_date": None, "conf": conf})
    assert (answer.status_code, next(iter(conf)) in answer.text) == (400, True)
    assert home.dag_runs("good") == before


def test_copies_of_an_alert_start_nothing_more(home):
    """Three times the same message is one alert; the same complaint twice more is merged or dropped."""
    assert len(home.database.events("copies", kind="alert")) == 3
    assert len(home.dag_runs("copies")) == len(home.begun("copies")) == 1
    outcomes = [outcome for outcome, _ in home.finals("copies")]
    assert outcomes.count("retrain") == 1
    assert set(outcomes) <= {"retrain", "drop", "merge"}


def test_a_paused_pack_holds_its_alerts_until_it_goes_on(home):
    """Held as long as it is paused, decided after."""
    assert set(home.holds("paused")) == {"paused"}
    assert home.finals("paused") == [("retrain", "retrain")]
    assert len(home.dag_runs("paused")) == 1


@pytest.mark.parametrize("pack", ["fresh", "outlet", "lost"])
def test_new_data_starts_a_run_that_says_so(home, pack):
    """Said by Airflow's API, by a task that has the dataset among its outlets, or by an event that Airflow forgot."""
    (alert,) = home.database.events(pack, kind="alert")
    (run,) = home.begun(pack)
    assert (alert.body["sender"], run.body["reason"]) == ("data", f"data: new data in data/{pack}")
    assert [each["dag_run_id"] for each in home.dag_runs(pack)] == [run.run_id]


def test_without_the_bell_the_minute_decides(home):
    """Triggerer and scheduler killed, the scheduler alone started again."""
    assert home.finals("swept") == [("retrain", "retrain")]
    assert len(home.dag_runs("swept")) == 1


@pytest.mark.parametrize("where", KILLED)
def test_killed_on_the_way_it_is_still_one_run_and_one_decision(home, where):
    """The task was killed at that instruction; the next run of the DAG went on from there."""
    assert len(home.database.events(where, kind="intent")) == 1
    assert home.finals(where) == [("retrain", "retrain")]
    assert len(home.dag_runs(where)) == len(home.begun(where)) == 1


def test_nothing_is_left_undecided_and_every_chain_holds(home):
    assert inbox.intended(home.database) == []
    for pack in sorted(path.name for path in home.packs.iterdir()):
        alerts = {event.key for event in home.database.events(pack, kind="alert")}
        decided = [e.key for e in home.database.events(pack, kind="decision") if e.body["outcome"] != "hold"]
        assert sorted(decided) == sorted(alerts)
        assert home.database.first_bad(pack) is None
