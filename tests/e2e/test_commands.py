"""The command line as its user meets it: real processes, a home and a pack of their own, real DAG runs in process."""

import csv
import fcntl
import json
import os
import pty
import re
import subprocess
import sys
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from evergreen.pack import TASK_METRICS

pytestmark = pytest.mark.slow

BIN = Path(sys.executable).parent
FIRST = datetime(2024, 1, 1, tzinfo=UTC)
STAGES = ["ingest", "validate", "snapshot", "train", "evaluate", "register", "promote"]

PACK = """
description: Will the water reach the road?
owner: gauge@example.com
source: {kind: csv, path: "rows/*.csv"}
data: {target: flooded, event_time: seen_at, train: 6d, validation: 2d, holdout: 3d, max_staleness: 5d}
expectations:
  - expect_column_values_to_not_be_null: {column: height}
training: {call: "model:train", params: {steps: 40}, gpus: 0, timeout: 2m}
gate:
  primary: {metric: roc_auc, min: 0.6, margin: 0.2}
triggers: {schedule: "0 3 * * *"}
"""
BROKEN = PACK.replace("train: 6d", "trian: 6d")
MODEL = '''
"""Logistic regression by gradient descent in plain numpy: the same rows give the same weights, to the byte."""
import json

import numpy as np

LOADER = """
import json
from pathlib import Path
import numpy as np

class Model:
    def __init__(self, weights):
        self.weights = np.array(weights)

    def predict(self, frame):
        x = np.column_stack([np.ones(len(frame)), frame["height"], frame["station"] == "north"]).astype("float64")
        return 1 / (1 + np.exp(-x @ self.weights))

def load(folder):
    return Model(json.loads((Path(folder) / "weights.json").read_text()))
"""


def train(data, job):
    rows, steps = data.train, job.params["steps"]
    x = np.column_stack([np.ones(rows.height), rows["height"], rows["station"] == "north"]).astype("float64")
    y = rows[data.target].to_numpy()
    weights = np.zeros(3)
    for step in range(1, steps + 1):
        p = 1 / (1 + np.exp(-x @ weights))
        weights -= x.T @ (p - y) / len(y)
        job.progress(step, steps, loss=float(np.mean((p - y) ** 2)))
    (job.model_dir / "weights.json").write_text(json.dumps([round(w, 6) for w in weights.tolist()]))
    (job.model_dir / "loader.py").write_text(LOADER)
    job.describe(inputs=["height", "station"], requirements=["numpy", "pandas"])
'''
STOCK = """
import json, sys
sys.modules["evergreen"] = None  # any import of it fails from here on
import mlflow, pandas as pd
model = mlflow.pyfunc.load_model("models:/gauge@champion")
print(json.dumps(list(model.predict(pd.read_csv(sys.argv[1])))))
"""


def day(number: int) -> pl.DataFrame:
    """60 rows of day `number`, the first being 0."""
    chance = np.random.default_rng(number)
    height, station = chance.normal(size=60).round(4), chance.choice(["north", "south"], size=60)
    return pl.DataFrame(
        {
            "seen_at": [FIRST + timedelta(days=number, minutes=24 * n) for n in range(60)],
            "height": height,
            "station": station,
            "flooded": (2 * height + (station == "north") + chance.normal(size=60) > 0.5).astype("int64"),
        }
    )


def write(rows: pl.DataFrame, file: Path) -> None:
    rows.write_csv(file, datetime_format="%Y-%m-%dT%H:%M:%SZ")


@dataclass(frozen=True)
class House:
    """A home with packs in it, what four runs said when they ended, and a way to ask."""

    root: Path
    said: dict[str, subprocess.CompletedProcess[str]] = field(default_factory=dict)

    @property
    def home(self) -> Path:
        return self.root / "home"

    @property
    def packs(self) -> Path:
        return self.root / "packs"

    @property
    def env(self) -> dict[str, str]:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("AIRFLOW", "EVERGREEN"))}
        return inherited | {"EVERGREEN_HOME": str(self.home), "EVERGREEN_PACKS": str(self.packs)}

    def ask(self, *words: str) -> subprocess.CompletedProcess[str]:
        """What a command says, and its exit status."""
        command = [str(BIN / "evergreen"), *words]
        return subprocess.run(command, env=self.env, cwd=self.root, capture_output=True, text=True, check=False)

    def on_terminal(self, *words: str) -> str:
        """What a command that goes well writes to a terminal, escape sequences included."""
        leader, follower = pty.openpty()
        env = self.env | {"TERM": "xterm-256color", "COLUMNS": "160", "LINES": "40"}
        with subprocess.Popen(
            [str(BIN / "evergreen"), *words], env=env, cwd=self.root, stdout=follower, stderr=follower
        ) as process:
            os.close(follower)
            said = b""
            while chunk := _read(leader):
                said += chunk
        os.close(leader)
        assert process.returncode == 0, said.decode()
        return said.decode()


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # Linux's way to say that nobody is at the other end any more
        return b""


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """The house of this session: made by whichever worker is first. The tests only look."""
    own = tmp_path_factory.getbasetemp()
    base = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    said = base / "house.json"
    with (base / "house.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not said.exists():
            made = make_house(base / "house")
            said.write_text(json.dumps({name: vars(done) for name, done in made.said.items()}))
    known = {name: subprocess.CompletedProcess(**done) for name, done in json.loads(said.read_text()).items()}
    return House(base / "house", known)


def make_house(root: Path) -> House:
    """A pack that was run, run again twice, and run on bad rows; a broken pack beside it; and raw rows to predict."""
    house = House(root)
    for name, text in (("gauge", PACK), ("broken", BROKEN)):
        (house.packs / name / "rows").mkdir(parents=True)
        (house.packs / name / "pack.yaml").write_text(text)
        (house.packs / name / "model.py").write_text(MODEL)
    rows = house.packs / "gauge" / "rows"
    write(pl.concat([day(number) for number in range(12)]), rows / "rows.csv")
    words = ("run", "gauge", "--as-of")
    house.said["first"] = house.ask(*words, "2024-01-13")
    house.said["second"] = house.ask(*words, "2024-01-13", "--reason", "to see it", "--json")
    house.said["terminal"] = subprocess.CompletedProcess([], 0, house.on_terminal(*words, "2024-01-13"))
    write(day(12).with_columns(height=None), rows / "bad.csv")
    house.said["failed"] = house.ask(*words, "2024-01-14")
    (rows / "bad.csv").unlink()
    raw = pl.concat([day(number) for number in range(20, 22)]).drop("flooded", "seen_at")
    write(raw, house.root / "raw.csv")
    raw.write_parquet(house.root / "raw.parquet")
    write(raw.drop("station"), house.root / "without.csv")
    return house


@pytest.fixture(scope="module")
def ask(house):
    """The answer of a command that only looks; commands that were asked before are not run again."""
    return cache(house.ask)


@pytest.fixture(scope="module")
def told(ask):
    """The JSON document of a command that only looks."""

    def document(*words):
        done = ask(*words, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return document


@pytest.fixture(scope="module")
def run_ids(told):
    """The ids of the runs, in the order in which they began."""
    return [row["run_id"] for row in reversed(told("runs", "gauge"))]


def keys(content, at=""):
    """The names in a JSON document down to its leaves, `a.b.c`; figures by metric are `metrics.*`."""
    if isinstance(content, list) and any(isinstance(item, dict) for item in content):
        assert len({frozenset(item) for item in content}) == 1, "every row has the same keys"
        return set().union(*(keys(item, at) for item in content))
    if isinstance(content, dict) and content:
        return set().union(
            *(
                keys(value, f"{at}.*" if at == "metrics" else f"{at}.{name}".strip("."))
                for name, value in content.items()
            )
        )
    return {at}


# evergreen run


def test_a_run_that_goes_well_exits_with_0(house):
    """The status of `evergreen run` is 0 when a version became champion."""
    assert house.said["first"].returncode == 0, house.said["first"].stdout + house.said["first"].stderr


def test_a_run_says_what_each_stage_did(house):
    """Plain lines when standard output is no terminal: what is run and why, then one line a stage, in order."""
    lines = house.said["first"].stdout.splitlines()
    assert lines[0] == "gauge  as of 2024-01-13  because a person asked"
    assert [line.split()[:2] for line in lines[1:8]] == [["✓", stage] for stage in STAGES]
    assert re.fullmatch(r"✓ ingest    660 rows in 11 partitions, 0 known  \d+\.\d s", lines[1])
    assert "\x1b" not in house.said["first"].stdout


def test_a_run_ends_with_a_table(house, run_ids):
    """Verdict, version, snapshot, seconds of each stage, figures with intervals, the log, and where to look further."""
    end = house.said["first"].stdout.split("\n\n", 1)[1]
    lines = {line.split()[0]: " ".join(line.split()[1:]) for line in end.splitlines()}
    assert lines["run"] == f"{run_ids[0]}, as of 2024-01-13T00:00"
    assert re.fullmatch(
        r"promote: roc_auc 0\.\d{3}, no champion .*; roc_auc 0\.\d{3} is at least 0\.6", lines["verdict"]
    )
    assert lines["version"] == "1; version 1 is champion"
    assert re.fullmatch(r"gauge/20240113T000000Z-[0-9a-f]{8}", lines["snapshot"])
    assert re.findall(r"([a-z]+) \d+\.\d", lines["seconds"]) == STAGES
    assert lines["metric"] == "this version interval"
    assert set(TASK_METRICS["binary"]) <= lines.keys()
    assert all(re.fullmatch(r"\d\.\d{4} \d\.\d{4} … \d\.\d{4}", lines[name]) for name in TASK_METRICS["binary"])
    assert Path(lines["log"]).is_file()
    assert lines["look"] == f"further: evergreen lineage gauge@1 · evergreen why '{run_ids[0]}' · make up"


def test_a_second_run_learns_nothing_new(house, run_ids):
    """The same data again end as `unchanged`: five receipts, and the stages that look at the world."""
    ended = json.loads(house.said["second"].stdout)
    assert (ended["run_id"], ended["outcome"], ended["success"]) == (run_ids[1], "unchanged", True)
    assert (ended["version"], ended["champion"], ended["reason"]) == (1, 1, "to see it")
    states = {stage["stage"]: stage["state"] for stage in ended["stages"]}
    assert states == {name: "done" if name in ("ingest", "promote") else "skipped" for name in STAGES}


def test_a_terminal_sees_stages_as_they_go_on(house):
    """On a terminal the running stage has a spinner, and what was skipped names the run that did the work."""
    said = house.said["terminal"].stdout
    assert re.search(r"[⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏]", said)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", said)
    assert re.search(r"≡ train .* \(as in manual__", plain)


def test_a_run_on_bad_rows_says_what_and_how_to_mend_it(house):
    """A failing run exits with 1, and shows the error's class, its stage, what is wrong, and the fix; no traceback."""
    done = house.said["failed"]
    assert done.returncode == 1
    assert re.search(r"^✗ validate  pack gauge: ", done.stdout, re.MULTILINE)
    assert re.search(r"^ValidationError in validate: pack gauge: ", done.stdout, re.MULTILINE)
    assert re.search(r"expect_column_values_to_not_be_null.*height", done.stdout)
    assert re.search(r"^  fix: \S", done.stdout, re.MULTILINE)
    assert "Traceback" not in done.stdout + done.stderr


def test_a_failed_run_leaves_the_champion(told, run_ids):
    """After the run on bad rows, version 1 is champion, and there is no other."""
    assert told("runs", "gauge")[0]["outcome"] == "failed"
    champion = told("lineage", "gauge@champion")
    assert (champion["version"], champion["run_id"]) == (1, run_ids[0])


# what one can ask

LINEAGE = """
    model version run_id as_of data_until reason
    snapshot.repository snapshot.revision snapshot.tag snapshot.hash snapshot.rows snapshot.bytes snapshot.partitions
    validation.success validation.suite_hash validation.rows_checked validation.rows_quarantined
    code.revision code.dirty code.evergreen environment.python environment.lock_hash environment.image
    hardware.device hardware.name hardware.driver training.params.steps training.seed training.classes training.duration_s
    metrics.*.value metrics.*.low metrics.*.high verdict.decision verdict.reasons
    windows.train.start windows.train.end windows.validation.start windows.validation.end
    windows.holdout.start windows.holdout.end pruned
"""
REJUDGED = """
    model version verdicts.run_id verdicts.at verdicts.position verdicts.wrong verdicts.written.decision
    verdicts.written.reasons verdicts.made_again.decision verdicts.made_again.reasons
"""
ROW = "run_id pack at as_of reason alerts outcome version champion"
ENDED = f"""
    {ROW} stages.stage stages.state stages.summary stages.seconds failure verdict.decision verdict.reasons
    metrics.*.value metrics.*.low metrics.*.high metrics.*.champion metrics.*.difference metrics.*.difference_low
    metrics.*.difference_high judged_against snapshot success log
"""


def test_the_keys_of_a_run_are_stable(house):
    """`evergreen run --json` prints one document, with these keys."""
    assert keys(json.loads(house.said["second"].stdout)) == set(ENDED.split())


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("runs gauge", ROW),
        ("why LAST", "stage what because changed"),
        ("lineage gauge@champion", LINEAGE),
        ("predict gauge@1 raw.csv", "model version rows prediction"),
        ("docs gauge", "pack page"),
        (
            "packs",
            "pack description owner schedule error last_look last_run "
            + " ".join(f"last_run.{name}" for name in ROW.split()),
        ),
        ("down", "stopped"),
        ("sender ci --signing", "sender kind secret"),
        ("snooze gauge --off", "pack at until why by"),
        ("check gauge --as-of 2024-01-13", "law holds detail seconds"),
        ("drill gauge", "model version previous why by at drill steps.name steps.said steps.seconds seconds"),
        ("rejudge gauge@1", REJUDGED),
    ],
    ids=["runs", "why", "lineage", "predict", "docs", "packs", "down", "sender", "snooze", "check", "drill", "rejudge"],
)
def test_the_keys_of_an_answer_are_stable(told, run_ids, words, expected):
    """Each command's `--json` prints one document, with these keys."""
    assert keys(told(*words.replace("LAST", run_ids[-1]).split())) == set(expected.split())


def test_runs_are_listed_newest_first(ask, run_ids):
    """`evergreen runs` shows when, why and how each run ended."""
    lines = ask("runs", "gauge").stdout.splitlines()[1:]
    assert [line.split()[0] for line in lines] == run_ids[::-1]
    outcomes = [re.search(r"(promoted|unchanged|failed)", line)[1] for line in lines]
    assert outcomes == ["failed", "unchanged", "unchanged", "promoted"]
    assert ["to see it" in line for line in lines] == [False, False, True, False]


def test_runs_can_be_limited(told, run_ids):
    """`--limit 1` shows the newest run alone."""
    assert [row["run_id"] for row in told("runs", "gauge", "--limit", "1")] == run_ids[-1:]


def test_why_says_for_the_first_time(told, run_ids):
    """Every stage of the first run ran, for the first time."""
    answers = [(answer["stage"], answer["what"], answer["because"]) for answer in told("why", run_ids[0])]
    assert answers == [(stage, "ran", "for the first time") for stage in STAGES]


def test_why_names_the_run_whose_work_was_reused(told, run_ids):
    """A skipped stage has a receipt: the first run did the same work, and its outputs were verified."""
    because = {answer["stage"]: answer["because"] for answer in told("why", run_ids[1]) if answer["what"] == "skipped"}
    receipt = f"{run_ids[0]} did the same work, and its outputs were verified again"
    assert because == dict.fromkeys(STAGES[1:-1], receipt)


def test_why_tells_a_failure(told, run_ids):
    """The failed run's last stage failed, because of what the error said."""
    last = told("why", run_ids[-1])[-1]
    assert (last["stage"], last["what"]) == ("validate", "failed")
    assert "height" in last["because"]


def test_lineage_tells_what_made_the_version(told, run_ids):
    """Data, code, packages and the verdict are those of the run."""
    made = told("lineage", "gauge@champion")
    assert (made["model"], made["version"], made["run_id"], made["reason"]) == (
        "gauge",
        1,
        run_ids[0],
        "a person asked",
    )
    assert (made["as_of"], made["data_until"]) == ("2024-01-13T00:00:00+00:00",) * 2
    snapshot = made["snapshot"]
    assert (snapshot["rows"], snapshot["partitions"]) == (660, 11)
    assert snapshot["tag"] == f"gauge/20240113T000000Z-{snapshot['hash'][:8]}"
    assert (made["validation"]["success"], made["validation"]["rows_checked"]) == (True, 660)
    assert (made["hardware"]["device"], made["training"]["params"]) == ("cpu", {"steps": 40})
    assert made["metrics"].keys() == set(TASK_METRICS["binary"])
    assert made["verdict"]["decision"] == "promote"


def test_lineage_is_readable_as_text(ask):
    """Without `--json`, a line for each part."""
    lines = dict(line.split(maxsplit=1) for line in ask("lineage", "gauge").stdout.splitlines())
    assert (lines["version"], lines["training.seed"], lines["verdict.decision"]) == ("1", "7", "promote")


def test_packs_lists_broken_ones_too(told, run_ids):
    """A broken pack is listed with what is wrong, file and line; the others with their last run."""
    broken, gauge = told("packs")
    assert (broken["pack"], gauge["pack"], gauge["error"]) == ("broken", "gauge", None)
    assert "broken/pack.yaml:5: data.trian: unknown key" in broken["error"]
    assert (gauge["last_run"]["run_id"], gauge["last_run"]["outcome"]) == (run_ids[-1], "failed")


def test_packs_is_readable_as_text(ask):
    """Without `--json`, a table; a broken pack does not change the exit status."""
    done = ask("packs")
    assert done.returncode == 0
    assert re.search(
        r"^gauge +Will the water reach the road\? +0 3 \* \* \* +failed, as of 2024-01-14", done.stdout, re.MULTILINE
    )
    assert "did you mean 'train'?" in done.stdout


def test_docs_are_a_site(told):
    """`evergreen docs` builds Data Docs with the expectation of the pack in them."""
    page = Path(told("docs", "gauge")["page"])
    assert page.name == "index.html"
    pages = [file.read_text() for file in page.parent.rglob("*.html")]
    assert any("height" in text for text in pages)


# evergreen predict


def test_predictions_are_those_of_a_stock_client(told, stock):
    """The same rows get the same probabilities from `evergreen predict` and through MLflow without Evergreen."""
    answer = told("predict", "gauge@1", "raw.csv")
    assert (answer["model"], answer["version"], answer["rows"]) == ("gauge", 1, 120)
    assert answer["prediction"] == pytest.approx(stock)


@pytest.fixture(scope="module")
def stock(house):
    """What a stock `mlflow.pyfunc.load_model` predicts for the raw rows in a process where Evergreen cannot be imported."""
    env = house.env | {
        "MLFLOW_TRACKING_URI": f"sqlite:///{house.home / 'mlflow.db'}",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    command = [sys.executable, "-I", "-c", STOCK, str(house.root / "raw.csv")]
    done = subprocess.run(command, env=env, cwd=house.root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_stock_client_tells_rows_apart(stock):
    """Predictions from raw rows, text included, are probabilities that differ by row."""
    assert len(stock) == 120
    assert 0 < min(stock) < max(stock) < 1


def test_predictions_are_written_where_asked(house, stock, tmp_path):
    """`--output` writes Parquet or CSV by the file's name, and says so; the champion predicts where no version is named."""
    done = house.ask("predict", "gauge", "raw.csv", "--output", str(tmp_path / "out.parquet"))
    assert done.stdout.startswith("120 predictions of gauge version 1 in ")
    assert pl.read_parquet(tmp_path / "out.parquet")["prediction"].to_list() == pytest.approx(stock)


def test_predictions_are_csv_by_default(ask, stock):
    """Rows may be Parquet; without `--output` or `--json`, standard output is CSV that can be piped on."""
    rows = list(csv.DictReader(ask("predict", "gauge@champion", "raw.parquet").stdout.splitlines()))
    assert [float(row["prediction"]) for row in rows] == pytest.approx(stock)


# evergreen new, evergreen check


def test_new_makes_a_pack(tmp_path):
    """`evergreen new` writes a folder that `packs` lists as sound, and prints what to do next."""
    house = House(tmp_path)
    assert json.loads(house.ask("new", "churn", "--json").stdout) == {
        "pack": "churn",
        "folder": str(house.packs / "churn"),
        "files": ["README.md", "model.py", "pack.yaml"],
    }
    assert "evergreen check parcels" in house.ask("new", "parcels").stdout
    listed = json.loads(house.ask("packs", "--json").stdout)
    assert [(row["pack"], row["error"], row["last_run"]) for row in listed] == [
        ("churn", None, None),
        ("parcels", None, None),
    ]


def test_check_tells_every_law(told, run_ids):
    """`evergreen check` says law by law that they hold, and adds no run."""
    laws = told("check", "gauge", "--as-of", "2024-01-13")
    assert [law["law"] for law in laws if not law["holds"]] == []
    assert len(laws) == 6
    assert len(run_ids) == 4


def test_check_of_a_pack_that_breaks_a_law_exits_with_1(house):
    """The law that is broken is marked, with what was seen and how to mend it; those after it are not judged."""
    done = house.ask("check", "gauge", "--as-of", "2020-01-01")
    assert done.returncode == 1
    assert re.match(r"✗ its source has rows for every window: .*no rows in 2019-12-21", done.stdout)
    assert "fix: " in done.stdout
    assert done.stdout.count("✗") + done.stdout.count("✓") == 1


# what is wrong


@pytest.mark.parametrize(
    ("words", "error", "what", "fix"),
    [
        ("run guage", "PackError", "there is no pack 'guage'", "did you mean 'gauge'?"),
        ("run broken", "PackError", "data.trian: unknown key", "did you mean 'train'?"),
        ("runs nothing_like_it", "PackError", "there is no pack", "known: broken, gauge"),
        ("new gauge", "PackError", "is there already", "choose another name"),
        ("new Gauge", "PackError", "'Gauge' cannot name a pack", "lower-case letters"),
        ("why manual", "StageError", "there is no run 'manual'", "known: manual__"),
        ("rollback gauge --why late", "RegistryError", "no champion before version 1", "evergreen history gauge"),
        ("lineage guage@champion", "RegistryError", "there is no model 'guage'", "did you mean 'gauge'?"),
        ("lineage gauge@7", "RegistryError", "gauge has no version or alias '7'", "versions: 1"),
        ("lineage @champion", "RegistryError", "names no model", "MODEL@champion"),
        ("predict gauge without.csv", "EvaluationError", "lacks 1 column that gauge takes: station", "height, station"),
        ("alerts guage", "PackError", "there is no pack 'guage'", "did you mean 'gauge'?"),
        ("alert gauge --reason x", "SettingsError", "no Airflow runs on", "make up"),
        ("data-arrived gauge", "PackError", "triggers.on_new_data is off", "on_new_data: true"),
        ("simulate gauge --policy raw.csv", "PackError", "raw.csv:1: holds no mapping", "start from"),
        ("sender Grafana --bearer", "SendersError", "'Grafana' cannot name a sender", "lower-case letters"),
        ("predict gauge absent.parquet", "EvaluationError", "absent.parquet cannot be read", "give a Parquet file"),
    ],
)
def test_an_error_is_one_document_too(ask, words, error, what, fix):
    """With `--json` an error prints its class, what is wrong and the fix, and exits with 1; for people on standard error."""
    done = ask(*words.split(), "--json")
    assert done.returncode == 1
    document = json.loads(done.stdout)
    assert document.keys() == {"error", "what", "fix"}
    assert (document["error"], what in document["what"], fix in document["fix"]) == (error, True, True), document
    assert done.stderr == f"{error}: {document['what']}\n  fix: {document['fix']}\n"


@pytest.mark.parametrize("command", ["run", "check"])
def test_a_word_that_is_wrong_exits_with_2(ask, command):
    """An `--as-of` that is no time ends before anything runs, with what to write instead."""
    done = ask(command, "gauge", "--as-of", "soon")
    assert (done.returncode, done.stdout) == (2, "")
    assert "'soon' is not a time: write 2013-04-01" in done.stderr


# stock tools


def test_dvc_gets_the_snapshot(house, told, tmp_path):
    """A stock `dvc get` from the home's repository, by the tag in the lineage, brings the snapshot's Parquet files."""
    snapshot = told("lineage", "gauge@champion")["snapshot"]
    env = house.env | {"DVC_SITE_CACHE_DIR": str(tmp_path / "site"), "DVC_NO_ANALYTICS": "1"}
    command = [str(BIN / "dvc"), "get", snapshot["repository"], "gauge", "--rev", snapshot["tag"]]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    files = sorted((tmp_path / "gauge").iterdir())
    assert [file.name for file in files] == [f"2024-01-{number:02}.parquet" for number in range(2, 13)]
    assert sum(pl.read_parquet(file).height for file in files) == snapshot["rows"]
