"""Several `evergreen` commands at once on a home that nobody has opened before: all end well, and no event is lost."""

import contextlib
import json
import os
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from urllib.parse import quote

import httpx
import polars as pl
import pytest
import yaml
from tests.faults.conftest import AS_OF, MODEL, PACK, day
from tests.servers import free_port

pytestmark = [pytest.mark.slow, pytest.mark.fault]
EVERGREEN = Path(sys.executable).with_name("evergreen")
PORTS = ("AIRFLOW__API__PORT", "EVERGREEN_MLFLOW_PORT")
PROJECT = Path(__file__).parents[2]


class Home:
    """An empty home beside a folder of packs."""

    def __init__(self, root: Path, *packs: str) -> None:
        self.packs, self.home = root / "packs", root / "home"
        for pack in packs:
            rows = self.packs / pack / "rows"
            rows.mkdir(parents=True)
            (self.packs / pack / "pack.yaml").write_text(yaml.safe_dump(PACK))
            (self.packs / pack / "model.py").write_text(MODEL)
            for number in range(14):
                day(number).write_parquet(rows / f"{number:03}.parquet")

    def start(self, *words: str) -> subprocess.Popen:
        env = {
            name: value for name, value in os.environ.items() if not name.startswith(("AIRFLOW", "EVERGREEN", "MLFLOW"))
        }
        env |= {name: os.environ[name] for name in PORTS if name in os.environ}
        env |= {"EVERGREEN_HOME": str(self.home), "EVERGREEN_PACKS": str(self.packs), "EVERGREEN_PROJECT": str(PROJECT)}
        return subprocess.Popen(
            [EVERGREEN, *words],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            stdin=subprocess.DEVNULL,
        )

    def ask(self, *words: str) -> list | dict:
        out, err = self.start(*words, "--json").communicate(timeout=300)
        assert out, err
        return json.loads(out)

    def airflow_runs(self, pack: str) -> Counter:
        """How Airflow's own record says that its runs of the pack ended."""
        with contextlib.closing(sqlite3.connect(self.home / "airflow" / "airflow.db")) as airflow:
            query = "SELECT state FROM dag_run WHERE dag_id = ?"
            return Counter(state for (state,) in airflow.execute(query, [f"{pack}__train"]))


@pytest.mark.parametrize("packs", ["a a", "a b", "a a a", "a a b b"])
def test_first_runs_at_once_all_end_well(tmp_path: Path, packs: str) -> None:
    """Whether of one pack or of several: each has its outcome, its stages in the events and its run in Airflow."""
    names = packs.split()
    home = Home(tmp_path, *sorted(set(names)))
    instants = [f"{AS_OF:%Y-%m}-{AS_OF.day + number:02}" for number in range(2)]
    started = [home.start("run", name, "--as-of", instants[number % 2]) for number, name in enumerate(names)]
    for process in started:
        out, err = process.communicate(timeout=500)
        assert process.returncode == 0, out + err
    for name, number in Counter(names).items():
        outcomes = [run["outcome"] for run in home.ask("runs", name)]
        assert len(outcomes) == number
        assert set(outcomes) <= {"promoted", "unchanged", "superseded", "rejected"}
        assert outcomes.count("promoted") >= 1
        assert home.airflow_runs(name) == {"success": number}
        verified = home.start("ledger", "verify", name)
        assert verified.wait(timeout=300) == 0, verified.communicate()


PATIENCE_S = 600.0


class Airflow:
    """The REST API of the Airflow that runs on a home."""

    def __init__(self, address: str, pack: str) -> None:
        token = httpx.get(f"{address}/auth/token", timeout=60).json()["access_token"]
        self.client = httpx.Client(base_url=address, headers={"Authorization": f"Bearer {token}"}, timeout=60)
        self.runs = f"/api/v2/dags/{pack}__train/dagRuns"

    def state(self, run_id: str) -> str:
        return self.client.get(f"{self.runs}/{quote(run_id, safe='')}").json()["state"]

    def clear(self, run_id: str) -> str:
        """Clear all tasks of a run, and return how it ended then."""
        answer = self.client.post(
            f"{self.runs}/{quote(run_id, safe='')}/clear", json={"dry_run": False, "only_failed": False}
        )
        assert answer.is_success, answer.text
        deadline = time.monotonic() + PATIENCE_S
        while (state := self.state(run_id)) not in ("success", "failed"):
            assert time.monotonic() < deadline, state
            time.sleep(0.5)
        return state


def test_airflow_is_started_beside_a_run_and_a_run_is_cleared_in_it(tmp_path: Path, monkeypatch) -> None:
    """`up` waits for the run; runs through Airflow wait for one another; one that was refused looks again when cleared."""
    for name in PORTS:
        monkeypatch.setenv(name, str(free_port()))
    home = Home(tmp_path, "a")
    file = home.packs / "a" / "pack.yaml"
    expectations = [{"expect_column_values_to_not_be_null": {"column": "wind"}}]
    file.write_text(yaml.safe_dump({**PACK, "expectations": expectations}))
    first = home.start("run", "a", "--as-of", f"{AS_OF:%Y-%m-%d}")
    while not (home.home / "airflow" / "turn-lock").exists():
        time.sleep(0.05)
    up = home.start("up", "--json")
    try:
        assert first.wait(timeout=PATIENCE_S) == 0, first.communicate()
        out, err = up.communicate(timeout=PATIENCE_S)
        assert up.returncode == 0, out + err
        assert "waiting: an `evergreen run`" in err
        airflow = Airflow(json.loads(out)["airflow"], "a")
        # Two through Airflow at once.
        both = [home.start("run", "a", "--as-of", f"{AS_OF:%Y-%m-%d}", "--force") for _ in range(2)]
        said = [process.communicate(timeout=PATIENCE_S)[0] for process in both]
        assert [process.returncode for process in both] == [0, 0], said
        assert sum("waits for manual__" in text for text in said) == 1, said
        # One that is refused, mended, and cleared.
        newest = home.packs / "a" / "rows" / "011.parquet"
        whole = newest.read_bytes()
        day(11).with_columns(wind=pl.lit(None).cast(pl.Float64)).write_parquet(newest)
        refused = home.start("run", "a", "--as-of", f"{AS_OF:%Y-%m-%d}", "--force")
        assert refused.wait(timeout=PATIENCE_S) == 1, refused.communicate()
        run_id = home.ask("runs", "a")[0]["run_id"]
        newest.write_bytes(whole)
        assert airflow.clear(run_id) == "success"
        assert home.ask("runs", "a")[0]["outcome"] in ("promoted", "unchanged", "rejected")
        assert airflow.clear(run_id) == "success"
        log = "".join(file.read_text() for file in (home.home / "airflow" / "logs").rglob("*ingest*/**/*.log"))
        assert "to look at the source again, start a new run: evergreen run a" in log
        assert home.airflow_runs("a") == {"success": 4}
    finally:
        home.start("down").communicate(timeout=PATIENCE_S)
