"""A home brought up for real: scheduler, UI, MLflow; runs through them, a killed task, a backfill, and all down again."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cached_property
from pathlib import Path

import httpx
import numpy as np
import polars as pl
import psutil
import pytest

pytestmark = pytest.mark.slow

EVERGREEN = str(Path(sys.executable).with_name("evergreen"))
TODAY = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
DAYS = 40
PATIENCE_S = 600.0
"""For a whole training on a machine that has much else to do; nothing is judged by it."""

PACK = """
description: Is it more?
owner: tests@example.com
source: {{kind: parquet, path: "rows/*.parquet"}}
data: {{target: more, event_time: at, train: 10d, validation: 2d, holdout: 3d}}
training: {{call: "model:train", params: {{wait: {wait}}}}}
gate:
  primary: {{metric: roc_auc, min: 0.5}}
triggers: {{schedule: {schedule}}}
"""

MODEL = '''
"""A model of one number, which waits to be let go on where the test says so."""

import json
import time
from pathlib import Path

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
    wait = job.params["wait"]
    while wait and not Path(wait).exists():
        time.sleep(0.02)
    mean = float(data.train["x"].to_numpy().mean())
    job.progress(1, 1, mean=mean)
    (job.model_dir / "mean.json").write_text(json.dumps(mean))
    (job.model_dir / "loader.py").write_text(LOADER)
    job.describe(inputs=["x"], requirements=["numpy"])
'''


def write_pack(folder, *, schedule="null", wait="null"):
    """A pack whose rows end yesterday; its training waits for the file `wait`, where there is one."""
    (folder / "rows").mkdir(parents=True)
    (folder / "pack.yaml").write_text(PACK.format(schedule=schedule, wait=wait), encoding="utf-8")
    (folder / "model.py").write_text(MODEL, encoding="utf-8")
    rng = np.random.default_rng(7)
    x = rng.normal(size=DAYS * 40)
    at = [TODAY - timedelta(days=DAYS) + n * timedelta(days=1) / 40 for n in range(x.size)]
    frame = pl.DataFrame({"at": at, "x": x, "more": x + rng.normal(size=x.size) > 0})
    frame.write_parquet(folder / "rows" / "rows.parquet")


def free_port():
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        return trial.getsockname()[1]


def until(condition):
    """What the condition gives as soon as it is true."""
    deadline = time.monotonic() + PATIENCE_S
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not become true in time"
        time.sleep(0.1)
    return found


@dataclass
class Home:
    """An embedded home with its packs, and the ways in: command line and REST API."""

    folder: Path
    ports: tuple[int, int] = field(default_factory=lambda: (free_port(), free_port()))

    @property
    def packs(self):
        return self.folder / "packs"

    @cached_property
    def env(self):
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("AIRFLOW", "_AIRFLOW"))}
        return inherited | {
            "EVERGREEN_HOME": str(self.folder / "home"),
            "EVERGREEN_PACKS": str(self.packs),
            "AIRFLOW__API__PORT": str(self.ports[0]),
            "EVERGREEN_MLFLOW_PORT": str(self.ports[1]),
        }

    def evergreen(self, *words):
        """What a command prints; as JSON when it was asked for that."""
        done = subprocess.run([EVERGREEN, *words], env=self.env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout) if "--json" in words else done.stdout

    def begin(self, *words):
        """The same, without waiting for its end."""
        return subprocess.Popen(
            [EVERGREEN, *words], env=self.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    @cached_property
    def airflow(self):
        address = f"http://127.0.0.1:{self.ports[0]}"
        token = httpx.get(f"{address}/auth/token", timeout=60).json()["access_token"]
        return httpx.Client(base_url=address, headers={"Authorization": f"Bearer {token}"}, timeout=60)

    def get(self, path):
        answer = self.airflow.get(path)
        assert answer.is_success, answer.text
        return answer.json()

    def dag_runs(self, pack):
        return self.get(f"/api/v2/dags/{pack}__train/dagRuns")["dag_runs"]

    def task(self, pack, stage):
        """The task of the pack's newest run, or None."""
        for run in self.dag_runs(pack):
            return self.get(
                f"/api/v2/dags/{pack}__train/dagRuns/{run['dag_run_id'].replace('+', '%2B')}/taskInstances/{stage}"
            )
        return None

    def job(self, pack):
        """The process of the pack's training job, where one runs."""
        for file in (self.folder / "home" / "jobs").glob(f"train-{pack}-*/pid.json"):
            with contextlib.suppress(psutil.Error, ValueError, FileNotFoundError):
                process = psutil.Process(json.loads(file.read_text())["pid"])
                if process.status() != psutil.STATUS_ZOMBIE:
                    return process
        return None

    def processes(self):
        """Every process that has to do with this home."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                told = [*process.cmdline(), process.environ().get("EVERGREEN_HOME", "")]
                if process.status() != psutil.STATUS_ZOMBIE and any(str(self.folder) in word for word in told):
                    found.append(process)
        return found

    def scheduler(self):
        """Airflow's scheduler, where it runs."""
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                if process.cmdline()[1:4] == ["-m", "airflow", "scheduler"]:
                    return process
        return None

    def listening(self):
        """The addresses on which they listen."""
        ours = {process.pid for process in self.processes()}
        return {
            connection.laddr.ip
            for connection in psutil.net_connections("inet")
            if connection.status == psutil.CONN_LISTEN and connection.pid in ours
        }


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """All that happens, once; the tests below say what came of it."""
    home = Home(tmp_path_factory.mktemp("scheduler"))
    go = home.folder / "go"
    write_pack(home.packs / "waits", wait=json.dumps(str(go)))
    write_pack(home.packs / "daily", schedule='"0 0 * * *"')
    told = {}
    try:
        told["up"] = home.evergreen("up", "--json")
        told["up again"] = home.evergreen("up", "--json")
        upload = f"{told['up']['mlflow']}/api/2.0/mlflow-artifacts/artifacts/planted.txt"
        told["upload"] = httpx.put(upload, content=b"planted", timeout=60).status_code
        told["listening"] = home.listening()
        told["waits"] = killed_while_training(home, go)
        told["shown"] = read_through_the_api(home, told["waits"]["runs"][0]["run_id"])
        killed = home.scheduler()
        killed.kill()
        told["backfill"] = backfilled(home)
        told["schedulers"] = (killed.pid, home.scheduler().pid)
        go.unlink()
        last = home.begin("run", "waits", "--force")
        until(lambda: home.job("waits"))
        last.kill()  # it only looks on
        last.communicate()
        told["down"] = home.evergreen("down", "--json")
        told["left"] = [process.cmdline() for process in home.processes()]
    finally:
        go.touch()
        subprocess.run([EVERGREEN, "down"], env=home.env, check=False, capture_output=True)
    return told


def read_through_the_api(home, run_id):
    """What the UI shows of a run: its tasks, the graph, the log of the training task."""
    run = f"/api/v2/dags/waits__train/dagRuns/{run_id.replace('+', '%2B')}"
    log = home.get(f"{run}/taskInstances/train/logs/2")
    return {
        "run type": home.get(run)["run_type"],
        "tasks": {task["task_id"]: task["state"] for task in home.get(f"{run}/taskInstances")["task_instances"]},
        "edges": [
            (edge["source_id"], edge["target_id"])
            for edge in home.get("/ui/structure/structure_data?dag_id=waits__train")["edges"]
        ],
        "log": [line["event"] for line in log["content"]],
        "paused": [dag["dag_id"] for dag in home.get("/api/v2/dags")["dags"] if dag["is_paused"]],
    }


def killed_while_training(home, go):
    """A run whose training task is killed with SIGKILL while its job waits; then the job is let go on."""
    asked = home.begin("run", "waits", "--as-of", f"{TODAY - timedelta(days=1):%Y-%m-%d}", "--reason", "a test")
    job = until(lambda: home.job("waits"))
    task = until(lambda: (found := home.task("waits", "train")) and found["state"] == "running" and found)
    os.kill(task["pid"], signal.SIGKILL)
    retried = until(
        lambda: (
            (found := home.task("waits", "train"))
            and found["try_number"] == 2
            and found["state"] == "running"
            and found
        )
    )
    still = home.job("waits")
    go.touch()
    output, _ = asked.communicate(timeout=PATIENCE_S)
    return {
        "status": asked.returncode,
        "output": output,
        "tries": home.task("waits", "train")["try_number"],
        "same job": job == still,
        "another task": retried["pid"] != task["pid"],
        "runs": home.evergreen("runs", "waits", "--json"),
    }


def backfilled(home):
    """Three past intervals of the daily pack, after the schedule has made a champion as of today."""
    until(lambda: [run for run in home.dag_runs("daily") if run["state"] == "success"])
    first, last = (f"{TODAY - timedelta(days=days):%Y-%m-%d}" for days in (12, 10))
    words = ("airflow", "backfill", "create", "--dag-id", "daily__train", "--from-date", first, "--to-date", last)
    home.evergreen(*words)
    until(
        lambda: len(past := of_type(home, "backfill")) == 3 and {run["state"] for run in past} <= {"success", "failed"}
    )
    runs = [run for run in home.evergreen("runs", "daily", "--json") if run["reason"] == "a backfill"]
    return {
        "dag runs": of_type(home, "backfill"),
        "runs": runs,
        "lineage": {run["run_id"]: home.evergreen("lineage", f"daily@{run['version']}", "--json") for run in runs},
        "champion": home.evergreen("lineage", "daily@champion", "--json"),
    }


def of_type(home, kind):
    return [run for run in home.dag_runs("daily") if run["run_type"] == kind]


def test_up_gives_the_addresses_of_airflow_and_mlflow(story):
    """And a second `up` finds them running."""
    assert sorted(story["up"]) == ["airflow", "mlflow"]
    assert story["up again"] == story["up"]


def test_mlflow_takes_no_uploads(story):
    """The MLflow UI shows artifacts; nobody can put files anywhere through it."""
    assert story["upload"] >= 400
    assert not Path("mlartifacts").exists()


def test_everything_listens_on_loopback_only(story):
    """No server of the home answers to another machine."""
    assert story["listening"] == {"127.0.0.1"}


def test_no_dag_is_paused(story):
    """Packs run from the start."""
    assert story["shown"]["paused"] == []


def test_a_scheduler_that_dies_is_started_again(story):
    """By whoever keeps it: what is asked of the home afterwards is done, with nobody's help."""
    killed, now = story["schedulers"]
    assert killed != now
    assert {run["state"] for run in story["backfill"]["dag runs"]} == {"success"}


def test_a_run_goes_through_the_scheduler(story):
    """`evergreen run` beside a scheduler is a manual DAG run, every stage of which ends well; nobody needs to be asked."""
    shown = story["shown"]
    stages = ["ingest", "validate", "snapshot", "train", "evaluate", "register", "promote"]
    ends = {**dict.fromkeys(stages, "success"), "approval": "skipped"}
    assert (shown["run type"], shown["tasks"]) == ("manual", ends)


def test_the_graph_can_be_read(story):
    """The structure that the UI draws has the chain's edges."""
    assert {("ingest", "validate"), ("snapshot", "train"), ("register", "promote")} <= set(story["shown"]["edges"])


def test_a_tasks_log_holds_the_stages_lines(story):
    """What a stage says of itself is in Airflow's log of the task."""
    said = [line for line in story["shown"]["log"] if line.startswith("train ")]
    assert said[0] == "train running"
    assert said[-1].startswith("train done: ")


def test_a_killed_task_is_tried_again_and_adopts_its_job(story):
    """SIGKILL of the training task's process: the retry is another process, at the same job."""
    waits = story["waits"]
    assert (waits["tries"], waits["another task"], waits["same job"]) == (2, True, True)


def test_a_killed_task_leaves_one_version(story):
    """The run ends as an undisturbed one: one version, promoted."""
    waits = story["waits"]
    assert waits["status"] == 0, waits["output"]
    assert [(run["outcome"], run["version"]) for run in waits["runs"]] == [("promoted", 1)]


def test_what_is_asked_for_reaches_the_run(story):
    """The as-of and the reason given on the command line are the run's."""
    (run,) = story["waits"]["runs"]
    assert (run["as_of"][:10], run["reason"]) == (f"{TODAY - timedelta(days=1):%Y-%m-%d}", "a test")


def test_the_live_view_follows_the_events(story):
    """Without a terminal: a line for each stage as it ends, in order."""
    lines = story["waits"]["output"].splitlines()
    shown = [line.split()[1] for line in lines if line.startswith(("✓", "≡"))]
    assert shown == ["ingest", "validate", "snapshot", "train", "evaluate", "register", "promote"]


def test_a_backfill_makes_a_run_for_each_interval(story):
    """Three days asked for: three runs, all of which end well."""
    assert [run["state"] for run in story["backfill"]["dag runs"]] == ["success"] * 3


def test_a_backfilled_run_sees_its_own_past_only(story):
    """The data of each ends at its own as-of, which is its interval's."""
    days = sorted(f"{TODAY - timedelta(days=days):%Y-%m-%d}" for days in (12, 11, 10))
    lineage = story["backfill"]["lineage"]
    seen = {run["as_of"][:10]: lineage[run["run_id"]]["data_until"][:10] for run in story["backfill"]["runs"]}
    assert seen == {day: day for day in days}


def test_a_backfill_deposes_no_newer_champion(story):
    """The champion stays one that was made as of today, or of tomorrow where midnight came in between."""
    champion = story["backfill"]["champion"]
    assert champion["version"] not in {run["version"] for run in story["backfill"]["runs"]}
    assert champion["as_of"][:10] >= f"{TODAY:%Y-%m-%d}"


def test_a_backfilled_version_says_why_it_is_no_champion(story):
    """Registered and evaluated, and rejected for its as-of."""
    verdicts = [story["backfill"]["lineage"][run["run_id"]]["verdict"] for run in story["backfill"]["runs"]]
    assert [verdict["decision"] for verdict in verdicts] == ["reject"] * 3
    assert all("time only moves forward" in " ".join(verdict["reasons"]) for verdict in verdicts)


def test_down_leaves_no_process(story):
    """Neither servers nor tasks nor the job that a run was at."""
    assert (sorted(story["down"]["stopped"]), story["left"]) == (["airflow", "mlflow"], [])
