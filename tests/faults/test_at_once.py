"""Several `evergreen` commands at once on a home that nobody has opened before: all end well, and no event is lost."""

import contextlib
import json
import os
import sqlite3
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml
from tests.faults.conftest import AS_OF, MODEL, PACK, day

pytestmark = [pytest.mark.slow, pytest.mark.fault]
EVERGREEN = Path(sys.executable).with_name("evergreen")
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
