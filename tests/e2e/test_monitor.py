"""The monitor on real flights: a quiet week, one that moved and is alerted, and one that is broken; from a terminal, too."""

import json
import os
import re
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
from fastapi import FastAPI
from tests.served import Served

from evergreen import database as db
from evergreen import keys, stages
from evergreen.loop.monitor import alert_of, monitor, tell
from evergreen.pack import Pack, load
from evergreen.run import Promoted, Window
from evergreen.settings import Settings
from evergreen.triggers import senders

pytestmark = [pytest.mark.slow, pytest.mark.fault]

EVERGREEN = Path(sys.executable).parent / "evergreen"
NAME = "flight_delay"


def instant(day):
    return datetime.fromisoformat(day).replace(tzinfo=UTC)


def begin(settings, run_id, day, kind="watch"):
    pack = load(settings.packs, NAME)
    return keys.begin(settings, pack, run_id, as_of=instant(day), scheduled=instant(day), reason="a test", kind=kind)


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """A home whose champion was made as of 2013-04-01."""
    found = Settings.from_env({**os.environ, "EVERGREEN_HOME": str(tmp_path_factory.mktemp("home"))})
    run = begin(found, "first", "2013-04-01", kind="run")
    ingested = stages.ingest(run)
    validated = stages.validate(run, ingested)
    snapshot = stages.snapshot(run, ingested, validated)
    trained = stages.train(run, snapshot)
    evaluated = stages.evaluate(run, snapshot, trained)
    promoted = stages.promote(run, evaluated, stages.register(run, validated, snapshot, trained, evaluated))
    assert isinstance(promoted, Promoted)
    assert promoted.champion == 1
    return found


def watch(settings, day):
    run = begin(settings, f"look-{day}", day)
    ingested = stages.ingest(run)
    return monitor(run, ingested, stages.validate(run, ingested))


def evergreen(settings, *words):
    env = {**os.environ, "EVERGREEN_HOME": str(settings.home)}
    done = subprocess.run([EVERGREEN, *words], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_week_after_its_making_the_champion_is_left_alone(settings):
    found = watch(settings, "2013-04-08")
    assert (found.champion, found.kind, alert_of(found)) == (1, "quiet", None)
    assert found.freshness is not None
    assert found.freshness.judged == Window(start=instant("2013-03-18"), end=instant("2013-04-08"))
    assert any("enough to train for" in reason for reason in found.reasons)


def test_a_spring_that_the_champion_has_not_seen_is_alerted(settings):
    """By 2013-07-01 newer rows would make a better model: an alert, signed, with as-of and evidence.

    Eight weeks before, when its predictions had moved, they would not have: that look starts nothing.
    """
    early = watch(settings, "2013-05-06")
    assert early.kind == "withstood", early.reasons
    assert "prediction" in early.model
    found = watch(settings, "2013-07-01")
    assert found.kind == "shift", found.reasons
    assert found.freshness is not None
    assert found.freshness.gain.low > 0
    assert "freshness" in found.model
    served = Served(settings.home)
    senders.ensure(settings)
    outer = FastAPI()
    outer.mount("/evergreen", served.app)
    served.app = outer
    with served.running():
        tell(settings, found, served.url)
        tell(settings, found, served.url)
    [alert] = db.connect(settings.database_url).events(NAME, kind="alert")
    assert (alert.body["sender"], alert.body["as_of"]) == ("monitor", "2013-07-01T00:00:00+00:00")
    assert alert.body["evidence"]["freshness"]["gain"]["value"] > 0.01
    assert {each["column"] for each in alert.body["evidence"]["violated"]} >= {"temperature"}


def test_the_terminal_shows_a_look(settings):
    """`evergreen drift` shows each column and why; its page lies in the home; it sends nothing and is no run."""
    alerts = len(db.connect(settings.database_url).events(NAME, kind="alert"))
    found = json.loads(evergreen(settings, "drift", NAME, "--as-of", "2013-04-08", "--json"))
    assert found["kind"] == "quiet"
    assert {each["name"] for each in found["measured"]["windows"][-1]["columns"]} >= {"late", "carrier"}
    scored = {each["name"]: each["psi"] for each in found["measured"]["windows"][-1]["columns"]}
    assert {name: round(psi, 4) for name, psi in scored.items() if psi is not None} == found["scores"]
    assert Path(found["file"]).read_bytes().startswith(b"<!doctype html>")
    shown = evergreen(settings, "drift", NAME, "--as-of", "2013-04-08")
    assert "quiet: " in shown
    assert "temperature" in shown
    assert len(db.connect(settings.database_url).events(NAME, kind="alert")) == alerts
    assert [run["run_id"] for run in json.loads(evergreen(settings, "runs", NAME, "--json"))] == ["first"]


@pytest.mark.fault  # README's own look back is part of make test
def test_the_terminal_looks_backwards(settings):
    """Every look of a history, with today's champion and rules: which kinds, and how often each rule would have fired."""
    words = ("drift", NAME, "--since", "2013-04-08", "--as-of", "2013-07-01", "--every", "84d")
    found = json.loads(evergreen(settings, *words, "--json"))
    assert [(each["as_of"][:10], each["kind"]) for each in found] == [("2013-04-08", "quiet"), ("2013-07-01", "shift")]
    rehearsed = [each["freshness"] for each in found]
    assert [each["judged"]["start"][:10] for each in rehearsed] == ["2013-03-18", "2013-06-10"]
    assert rehearsed[0]["gain"]["low"] < 0 < rehearsed[1]["gain"]["low"]
    shown = evergreen(settings, "drift", NAME, "--since", "2013-07-01", "--as-of", "2013-07-01")
    assert "1 look," in shown
    assert "temperature" in shown
    assert re.search(r"\(newer rows\) +gain +1 ", shown)


def test_a_champion_that_is_missing_is_said_to_be(settings, tmp_path):
    """Backwards there is nothing to compare with: an error with its fix."""
    env = {**os.environ, "EVERGREEN_HOME": str(tmp_path)}
    words = [EVERGREEN, "drift", NAME, "--since", "2013-04-01", "--as-of", "2013-04-01"]
    done = subprocess.run(words, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "no champion yet" in done.stderr
    assert f"evergreen run {NAME}" in done.stderr


def test_the_examples_are_monitored():
    """Both packs say so."""
    packs = Path(__file__).parents[2] / "include" / "packs"
    assert all(Pack.load(packs / name).triggers.drift for name in (NAME, "digits"))
