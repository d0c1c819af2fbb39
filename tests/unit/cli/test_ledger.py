"""What the ledger's commands say, and their exit status."""

from __future__ import annotations

import json
import sqlite3
from datetime import timedelta

import pytest
from typer.testing import CliRunner

from evergreen.cli import app
from evergreen.data.store import Store
from evergreen.database import connect
from evergreen.settings import Settings

VERDICT = {"decision": "promote", "reasons": ["better by 0.02"]}


@pytest.fixture
def settings(tmp_path, monkeypatch):
    """A home in which version 1, then version 2 became champion of `tide`, and another pack ran."""
    monkeypatch.setenv("EVERGREEN_HOME", str(tmp_path))
    settings = Settings.from_env()
    database = connect(settings.database_url)
    for version, before in ((1, None), (2, 1)):
        intent = {"status": "intended", "version": version, "judged_against": before, "champion": before}
        database.append("tide", "promotion", {**intent, "verdict": VERDICT}, run_id=f"run {version}")
        done = {"status": "done", "version": version, "champion": version, "previous": before}
        database.append("tide", "promotion", done, run_id=f"run {version}")
    database.append("wind", "run", {})
    return settings


def ask(*words: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    return done.exit_code, done.stdout


def test_history_is_told_to_programs_in_stable_keys(settings):
    """Newest first; each reign with its decision and its evidence."""
    status, said = ask("history", "tide", "--json")
    told = json.loads(said)
    assert (status, [reign["version"] for reign in told]) == (0, [2, 1])
    keys = "model version since until by who why run_id as_of alerts verdict position"
    assert list(told[0]) == keys.split()
    assert (told[0]["by"], told[0]["verdict"], told[0]["until"]) == ("gate", VERDICT, None)


def test_history_says_who_was_champion_at_an_instant(settings):
    """`--at` shows the one reign; before the first there was none, and that is said."""
    second = connect(settings.database_url).events("tide", kind="promotion")[-1].at
    _, said = ask("history", "tide", "--at", (second - timedelta(microseconds=1)).isoformat())
    assert ("version 1" in said, "version 2" in said) == (True, False)
    assert ask("history", "tide", "--at", "2013-04-01") == (0, "tide had no champion at 2013-04-01 00:00\n")


def test_a_ledger_that_holds_is_noted_for_the_next_time(settings):
    """`verify` looks at all packs, and leaves a checkpoint of each outside of the database, once."""
    status, said = ask("ledger", "verify")
    assert (status, said.splitlines()) == (
        0,
        [
            "✓ tide  4 events and 0 checkpoints agree; the last 4 events had no checkpoint until now",
            "✓ wind  1 event and 0 checkpoints agree; the last 1 event had no checkpoint until now",
        ],
    )
    ask("ledger", "verify", "tide")
    assert [len(Store(settings).notes(pack)) for pack in ("tide", "wind")] == [1, 1]


@pytest.mark.parametrize(
    ("statement", "first_bad"),
    [
        ("DELETE FROM events WHERE pack = 'tide' AND position > 2", 3),
        ("DELETE FROM events WHERE pack = 'tide'", 1),
        ("UPDATE events SET body = '{' WHERE pack = 'tide' AND position = 2", 2),
    ],
    ids=["cut", "gone", "no JSON"],
)
def test_a_ledger_that_does_not_hold_fails(settings, statement, first_bad):
    """The exit status says so, and the first bad entry is named, of a pack that has no event left as well."""
    ask("ledger", "verify")
    with sqlite3.connect(settings.database_url.removeprefix("sqlite:///")) as connection:
        connection.execute(statement)
    status, said = ask("ledger", "verify", "--json")
    found = {one["pack"]: (one["holds"], one["first_bad"]) for one in json.loads(said)}
    assert (status, found) == (1, {"tide": (False, first_bad), "wind": (True, None)})
    assert len(Store(settings).notes("tide")) == 1


def test_export_writes_every_event_as_a_line(settings):
    """JSON Lines with hashes; of one pack, or since an instant."""
    status, said = ask("ledger", "export")
    lines = [json.loads(line) for line in said.splitlines()]
    assert (status, [line["pack"] for line in lines]) == (0, ["tide"] * 4 + ["wind"])
    assert lines[1]["previous"] == lines[0]["hash"]
    assert ask("ledger", "export", "wind", "--since", "1h")[1].count("\n") == 1
    assert ask("ledger", "export", "--since", "2999-01-01") == (0, "")
