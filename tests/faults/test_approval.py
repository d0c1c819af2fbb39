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
