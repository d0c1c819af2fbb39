"""A version waits for a person beyond its run: until the terminal answers, or another version overtakes it."""

from pathlib import Path
from typing import Any

import pytest
from tests.faults.conftest import NAME, Home
from typer.testing import CliRunner

from evergreen import reports
from evergreen.cli import app
from evergreen.errors import RegistryError
from evergreen.history import history_of
from evergreen.loop import approval
from evergreen.registry import ledger


@pytest.fixture
def asking(tmp_path: Path) -> Home:
    """A home whose pack wants approval, with a version that waits."""
    home = Home.make(tmp_path)
    home.write(gate={"promotion": "approval"})
    home.perform("first")
    return home


def evergreen(home: Home, *words: str) -> Any:
    """A command in this process, on this home."""
    places = {"HOME": home.settings.home, "PACKS": home.settings.packs, "PROJECT": home.settings.project}
    env = {f"EVERGREEN_{name}": str(place) for name, place in places.items()}
    return CliRunner().invoke(app, list(words), env=env)


@pytest.mark.slow
def test_a_version_waits_until_a_person_answers(asking: Home) -> None:
    """The run ends as waiting and has no champion; `approve` makes it champion, and says by whom, everywhere."""
    assert (history_of(asking.database, "first")["outcome"], asking.champion) == ("waiting", None)
    shown = evergreen(asking, "report", f"{NAME}@challenger").stdout
    assert shown.startswith(f"## {NAME} version 1: promote")
    assert "waits for approval" in shown

    done = evergreen(asking, "approve", NAME, "--why", "it is the first", "--json")
    assert done.exit_code == 0, done.output
    assert '"champion": 1' in done.stdout
    ended = history_of(asking.database, "first")
    assert (ended["outcome"], ended["champion"], asking.champion.version) == ("promoted", 1, 1)
    told = asking.registry._client.get_model_version(NAME, "1").description
    assert told.startswith("Will the water reach the road?")
    assert ": it is the first" in told
    assert ": it is the first" in reports.of_version(asking.settings, NAME, 1, "").answer

    again = evergreen(asking, "reject", f"{NAME}@1", "--why", "too late")
    assert isinstance(again.exception, RegistryError)
    assert "it is the first" in again.exception.what
    assert asking.perform("first")["promote"].waits
    assert history_of(asking.database, "first")["outcome"] == "promoted"


@pytest.mark.slow
def test_what_waits_is_overtaken_by_an_automatic_promotion(asking: Home) -> None:
    """The pack stops asking while a version waits: the next run's promotion ends the question, and says so."""
    asking.write(gate={"promotion": "approval"}, training={"params": {"steps": 41}})
    assert asking.perform("second")["promote"].waits
    asking.write(training={"params": {"steps": 42}})
    promoted = asking.perform("third")["promote"]
    assert promoted.champion == promoted.version
    assert history_of(asking.database, "second")["outcome"] == "superseded"
    assert "challenger" not in {alias for one in asking.registry.versions(NAME) for alias in one.aliases}
    assert asking.database.first_bad(NAME) is None


@pytest.mark.fault
@pytest.mark.slow
def test_what_waits_is_ended_by_a_verdict_that_asks_nobody(asking: Home) -> None:
    """The rules become stricter while a version waits, and the next run comes to it again: nobody can promote it any more."""
    strict = {"promotion": "approval", "primary": {"metric": "roc_auc", "min": 0.999}}
    asking.write(gate=strict)
    assert asking.perform("second")["promote"].verdict.decision == "reject"
    assert approval.overtaken(asking.settings, NAME, "first") == "superseded: the same version was judged again: reject"
    assert asking.champion is None


@pytest.mark.fault
@pytest.mark.slow
def test_a_run_that_changes_no_champion_ends_no_question(tmp_path: Path) -> None:
    """The run of an earlier promotion cleared under other rules, and a run that makes the champion again: both leave it.

    Nor is anybody asked about what was promoted without a question.
    """
    home = Home.make(tmp_path)
    home.perform("first")
    home.write(gate={"promotion": "approval"}, training={"params": {"steps": 41}})
    assert home.perform("second")["promote"].waits
    home.write(gate={"promotion": "approval"})
    cleared = home.perform("first")["promote"]
    assert (cleared.champion, cleared.waits) == (1, False)
    assert home.perform("third")["promote"].champion == 1
    assert history_of(home.database, "second")["outcome"] == "waiting"

    evergreen(home, "approve", f"{NAME}@2", "--why", "go on")
    home.write(gate={"promotion": "approval"}, training={"params": {"steps": 42}})
    assert home.perform("fourth")["promote"].waits
    home.write(gate={"promotion": "approval", "latency_p95_ms": 1000})
    home.perform("first")
    assert (home.champion.version, history_of(home.database, "fourth")["outcome"]) == (2, "waiting")


@pytest.mark.fault
@pytest.mark.slow
def test_a_cleared_run_asks_about_the_version_that_it_makes_now(asking: Home) -> None:
    """Cleared after the pack was mended, it makes another version: that one waits, in place of the first."""
    asking.write(gate={"promotion": "approval"}, training={"params": {"steps": 41}})
    promoted = asking.perform("first")["promote"]
    assert (promoted.version, promoted.waits) == (2, True)
    first = reports.of_version(asking.settings, NAME, 1, "").answer
    assert first == "superseded: version 2 is newer, and waits for approval"
    assert approval.overtaken(asking.settings, NAME, "first", 1) == first
    assert approval.overtaken(asking.settings, NAME, "first", 2) is None
    done = evergreen(asking, "approve", NAME, "--why", "mended", "--json")
    assert done.exit_code == 0, done.output
    assert asking.champion.version == 2
    last = ledger.reigns(asking.database, NAME)[-1]
    assert (last.version, last.by, last.verdict["reasons"][1:]) == (2, "person", list(promoted.verdict.reasons))
    assert reports.of_version(asking.settings, NAME, 1, "").answer == first
