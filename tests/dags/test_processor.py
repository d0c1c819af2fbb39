"""Airflow's real DAG processor over good packs and broken ones: what its database says afterwards."""

import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from evergreen.laws import scaffold

pytestmark = pytest.mark.slow

EVERGREEN = str(Path(sys.executable).with_name("evergreen"))

DAGS = sorted(
    [
        "evergreen__admission",
        *(f"{pack}__{what}" for pack in ("apple", "pear", "plum") for what in ("train", "approval", "rollback")),
    ]
)


class Home:
    """An embedded home of its own, whose packs are parsed by `airflow dag-processor`."""

    def __init__(self, folder):
        self.packs = folder / "packs"
        self.folder = folder / "home"
        self.env = {
            **{name: value for name, value in os.environ.items() if not name.startswith("AIRFLOW")},
            "EVERGREEN_HOME": str(self.folder),
            "EVERGREEN_PACKS": str(self.packs),
        }

    def airflow(self, *words):
        command = [EVERGREEN, "airflow", *words]
        subprocess.run(command, env=self.env, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)

    def rows(self, query):
        with sqlite3.connect(self.folder / "airflow" / "airflow.db") as connection:
            return connection.execute(query).fetchall()

    def break_pack(self, name):
        file = self.packs / name / "pack.yaml"
        file.write_text(file.read_text(encoding="utf-8").replace("seed: 7", "sead: 7"), encoding="utf-8")

    def mend_pack(self, name):
        file = self.packs / name / "pack.yaml"
        file.write_text(file.read_text(encoding="utf-8").replace("sead: 7", "seed: 7"), encoding="utf-8")


IN_FORCE = "SELECT dag_id FROM dag WHERE NOT is_stale AND NOT has_import_errors AND NOT is_paused ORDER BY dag_id"
VERSIONS = "SELECT dag_id, max(version_number) FROM dag_version GROUP BY dag_id ORDER BY dag_id"


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """What the database says after each parse: of good packs, of the same again, of one broken, and of it mended."""
    home = Home(tmp_path_factory.mktemp("processor"))
    for name in ("apple", "pear", "plum"):
        scaffold(home.packs, name)
    told = {}
    for chapter, before in (
        ("good", lambda: None),
        ("again", lambda: None),
        ("broken", lambda: home.break_pack("pear")),
        ("mended", lambda: home.mend_pack("pear")),
    ):
        before()
        home.airflow("dag-processor", "--num-runs", "1")
        told[chapter] = {
            "in force": [dag for (dag,) in home.rows(IN_FORCE)],
            "errors": dict(home.rows("SELECT filename, stacktrace FROM import_error")),
            "versions": dict(home.rows(VERSIONS)),
        }
    return told


def test_every_pack_is_in_force(story):
    """Serialised, not stale, unpaused: the scheduler may run them."""
    assert story["good"]["in force"] == DAGS


def test_parsing_again_makes_no_new_version(story):
    """An unchanged pack keeps its first DAG version through every parse, also while another is broken."""
    assert [chapter["versions"] for chapter in story.values()] == [dict.fromkeys(DAGS, 1)] * 4


def test_a_broken_pack_keeps_the_others_in_force(story):
    """The other packs' DAGs are neither stale nor marked as broken: their schedules go on."""
    assert {"apple__train", "plum__train"} <= set(story["broken"]["in force"])


def test_a_broken_pack_shows_as_an_import_error(story):
    """One import error, with the pack's file, line, and what to write instead."""
    ((file, text),) = story["broken"]["errors"].items()
    assert file == "broken_packs.py"
    assert "pear/pack.yaml:21: training.sead" in text
    assert "did you mean 'seed'?" in text


def test_a_mended_pack_is_in_force_again(story):
    """Without a trace of the error."""
    assert (story["mended"]["in force"], story["mended"]["errors"]) == (story["good"]["in force"], {})
