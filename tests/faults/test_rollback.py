"""The way back: verified first, by intent, and not undone by the next run."""

import json
import shutil
import sys
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from tests.faults.conftest import day
from tests.faults.test_killed_stages import tried

from evergreen import work
from evergreen.errors import RegistryError
from evergreen.loop import rollback
from evergreen.registry import ledger
from evergreen.stages import scoring
from evergreen.stages.judging import rejudge

NAME = "tide"
NEXT = datetime(2024, 1, 14, tzinfo=UTC)
SHIFTS = "return 1 / (1 + np.exp(-x @ self.weights))\n\ndef load"
SHIFTED = (
    'import os\n        return 1 / (1 + np.exp(-x @ self.weights)) * float(os.environ.get("OMP_TIDE", "1"))\n\ndef load'
)


@pytest.fixture(scope="module")
def two(home):
    """The home with a second champion, a day later, whose predictions follow the environment that it runs in."""
    home.write_model(SHIFTS, SHIFTED)
    home.write_day(12)
    values = home.perform("second", as_of=NEXT)
    assert (values["promote"].champion, values["promote"].previous) == (2, 1)
    return home


def back(home, **asked):
    return rollback.rollback(home.settings, NAME, **{"why": "it drowns", "by": "ada", **asked})


@pytest.fixture
def forth(two):
    """Version 2 is champion before the test and after it."""
    if two.champion.version != 2:
        back(two, to=2, why="the next test")
    yield two
    if two.champion.version != 2:
        back(two, to=2, why="the next test")


@pytest.mark.slow
def test_rollback_restores_the_champion_before(forth):
    """Verified, moved, written down, and noted outside of the database; asked again in the same words, it stays there."""
    found = back(forth)
    assert (found.version, found.previous, forth.champion.version) == (1, 2, 1)
    assert [step.name for step in found.steps] == ["find", "bytes", "predictions", "alias", "checkpoint"]
    last = ledger.reigns(forth.database, NAME)[-1]
    assert (last.version, last.by, last.who, last.why) == (1, "rollback", "ada", "it drowns")
    assert work.checkpoints(forth.settings, NAME)[-1].position == last.position
    assert (back(forth).version, back(forth).steps) == (1, ())
    with pytest.raises(RegistryError, match="nothing to go back to"):
        back(forth, why="it drowns as well")
    assert ledger.verify(forth.database, NAME, work.checkpoints(forth.settings, NAME)).holds


@pytest.mark.slow
def test_a_run_goes_back_once(forth):
    """Cleared in Airflow long after, it leaves the champion that somebody has chosen since; so does a retry."""
    asked = {"run_id": "manual__2024-02-01"}
    assert (back(forth, **asked).version, forth.champion.version) == (1, 1)
    back(forth, to=2, why="it swims after all")
    again = back(forth, **asked)
    assert (again.version, again.previous, again.steps) == (1, 2, ())
    assert forth.champion.version == 2


@pytest.mark.slow
def test_what_was_rolled_back_is_not_promoted_again_by_the_gate(forth):
    """The next run on the same data makes the same version: it waits for a person, and is told who took it back."""
    back(forth)
    promoted = forth.perform("second again", as_of=NEXT)["promote"]
    assert (promoted.version, promoted.verdict.decision, promoted.champion) == (2, "review", 1)
    assert "rolled back from" in promoted.verdict.reasons[0]
    assert "by ada: it drowns" in promoted.verdict.reasons[0]
    assert forth.champion.version == 1
    assert rejudge(forth.settings, forth.events("verdict", "second again")[-1]).wrong == ()


@pytest.mark.fault
@pytest.mark.slow
def test_a_version_that_does_not_predict_what_it_did_stays_out(forth, monkeypatch):
    """Its bytes are right and its world is not: the golden batch shows it, and the champion stays."""
    back(forth)
    monkeypatch.setenv("OMP_TIDE", "0.5")
    with pytest.raises(
        RegistryError, match="version 2 does not predict what it did: 100 rows of its hold-out, up to 0"
    ):
        back(forth, to=2)
    assert forth.champion.version == 1


def test_a_version_whose_artifacts_were_altered_stays_out(forth):
    """The model folder in MLflow is held to the hash in the ledger, not to a tag that its forger may write."""
    source = forth.registry._client.get_model_version_download_uri(NAME, "1")
    file = Path(urlsplit(source).path) / "artifacts" / "model" / "weights.json"
    whole = file.read_bytes()
    file.write_text(json.dumps([0.0, 0.0, 9.0]))
    with pytest.raises(RegistryError, match=r"version 1: its model folder in MLflow is .* when it was registered"):
        back(forth)
    file.write_bytes(whole)
    assert forth.champion.version == 2


def test_no_altered_code_of_a_model_is_run(forth, tmp_path):
    """`predict` compares the whole model folder with the ledger before its loader runs."""
    source = forth.registry._client.get_model_version_download_uri(NAME, "1")
    loader = Path(urlsplit(source).path) / "artifacts" / "model" / "loader.py"
    whole, marker, rows = loader.read_bytes(), tmp_path / "marker", tmp_path / "rows.parquet"
    day(0).drop("flooded").write_parquet(rows)
    loader.chmod(0o644)
    loader.write_bytes(whole + f"\nopen({str(marker)!r}, 'w').close()\n".encode())
    with pytest.raises(RegistryError, match=r"version 1: its model folder in MLflow is .* when it was registered"):
        scoring.predict(forth.settings, forth.registry.version(NAME, "1"), rows)
    assert not marker.exists()
    loader.write_bytes(whole)
    assert scoring.predict(forth.settings, forth.registry.version(NAME, "1"), rows).height == 100


def test_a_version_that_the_store_lost_stays_out(forth):
    """Runs to come are compared with the champion's folder in the store: without it there is no way back."""
    sha, _ = ledger.registered(forth.database, NAME, 1)
    places = [
        place / "files" / "md5" / sha[:2] / sha[2:]
        for place in (forth.settings.cache, Path(forth.settings.data_remote))
    ]
    kept = [place.rename(f"{place}.away") for place in places]
    with pytest.raises(RegistryError, match=r"version 1: its model folder .* is not to be had intact from the store"):
        back(forth)
    for away, place in zip(kept, places, strict=True):
        shutil.move(away, place)
    assert forth.champion.version == 2


@pytest.mark.parametrize(
    ("to", "says"),
    [(2, "version 2 is champion already"), (7, "version 7 has never been champion: a rollback goes back")],
)
def test_a_rollback_goes_back(forth, to, says):
    """To a version that was champion, and is not: a new one comes in by the gate."""
    with pytest.raises(RegistryError, match=says):
        back(forth, to=to)


@pytest.mark.fault
@pytest.mark.slow
def test_a_drill_changes_nothing(forth):
    """All the steps, timed, under the alias drill; the champion, its history and its aliases stay."""
    before = ledger.reigns(forth.database, NAME), forth.registry.versions(NAME)
    found = rollback.drill(forth.settings, NAME, by="ada")
    assert (found.version, found.drill, len(found.steps)) == (1, True, 5)
    assert found.seconds > 0
    assert (ledger.reigns(forth.database, NAME), forth.registry.versions(NAME)) == before
    assert [event.body["status"] for event in forth.events("drill")] == ["intended", "done"]


def agreed(trial):
    """What a killed and repeated rollback leaves, beside an undisturbed one."""
    return trial["death"], trial["state"]


POINTS = ["rollback/set_registered_model_alias/1", "rollback/append rollback/2"]


@pytest.mark.fault
@pytest.mark.slow
def test_a_killed_rollback_ends_as_an_undisturbed_one(tmp_path):
    """SIGKILL between intent and alias, and between alias and end; asked again, alias and ledger agree."""
    ((found),) = tried([str(tmp_path / "back"), "two", "back", *POINTS])
    assert found["undisturbed"]["champion"] == 1
    assert [agreed(trial) for trial in found["trials"]] == [("killed", found["undisturbed"])] * len(POINTS)


@pytest.mark.prove
def test_a_rollback_killed_at_any_call_ends_as_an_undisturbed_one(tmp_path, capsys):
    """Before every append, git command, job and write to MLflow."""
    ((found),) = tried([str(tmp_path / "back"), "two", "back"])
    with capsys.disabled():
        sys.stdout.write("".join(f"\n{trial['point']:45} {trial['death']}" for trial in found["trials"]) + "\n")
    assert len(found["trials"]) > 8
    assert {trial["point"]: agreed(trial) for trial in found["trials"]} == {
        trial["point"]: ("killed", found["undisturbed"]) for trial in found["trials"]
    }
