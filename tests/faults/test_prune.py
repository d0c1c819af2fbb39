"""Retention on a small real pack: what goes is gone from store and MLflow, and all that a champion needs is there."""

import json
import os
import subprocess
import sys
from collections import Counter
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
from tests.faults.conftest import AS_OF, NAME, Home, reject
from tests.faults.test_killed_stages import tried

from evergreen import work
from evergreen.data.store import Store
from evergreen.errors import LeaseHeldError, PackError, StoreError
from evergreen.history import values_of
from evergreen.loop import prune as pruning
from evergreen.loop import rollback
from evergreen.loop.prune import prune
from evergreen.registry import ledger, promotion
from evergreen.run import Ref, Verdict
from evergreen.stages.judging import rejudge

pytestmark = [pytest.mark.fault, pytest.mark.slow]

DAY = timedelta(days=1)
EVERGREEN = Path(sys.executable).parent / "evergreen"
STEPS = [
    "set_model_version_tag/1",
    "delete_model_version_tag/1",
    "delete_artifacts/2",
    "delete/12",
    "append retention/1",
]
"""The version marked or not, found by its key or not, some of its files gone, some objects gone, all gone and not said."""


def named_by(home, run_id):
    """The objects that the values of a run name, and those that these name."""
    found = set()

    def look(value):
        if isinstance(value, dict) and value.keys() == {"hash", "size"}:
            found.add(Ref(**value))
        for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            look(each)

    values = values_of(home.database, run_id, NAME)
    look(values)
    found.add(Ref(hash=values["snapshot"]["hash"], size=0))
    store = Store(home.settings)
    for value in (values["ingest"], values["validate"]):
        found |= {part.object for part in work.manifest_of(store, Ref(**value["manifest"])).partitions}
    found |= {file for ref in found.copy() if ref.is_folder for file in store.listing(ref).values()}
    return {ref.hash for ref in found}


def lying(home):
    """The objects in the cache and in the remote."""
    roots = [home.settings.cache / "files" / "md5", Path(home.settings.data_remote) / "files" / "md5"]
    return [{file.parent.name + file.name for file in root.rglob("*") if file.is_file()} for root in roots]


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """A champion, a rejected version, a champion: looked at, refused, then pruned a hundred days later, twice."""
    home = Home.make(tmp_path_factory.mktemp("root"))
    reject(home)
    now = home.database.latest(NAME).at + 100 * DAY
    named = {run_id: named_by(home, run_id) for run_id in ("one", "two", "three")}
    before = lying(home), home.visible(), len(home.database.events(NAME))
    planned = prune(home.settings, NAME, dry_run=True, now=now)
    after_plan = lying(home), home.visible(), len(home.database.events(NAME))
    with pytest.MonkeyPatch.context() as patch, home.database.lease(f"stage:{NAME}", "a run of another pack"):
        patch.setattr(pruning, "WAIT_S", 0)
        with pytest.raises(LeaseHeldError, match="a run of another pack is acting"):
            prune(home.settings, NAME, now=now)
    held = lying(home), home.visible(), len(home.database.events(NAME))
    went = prune(home.settings, NAME, now=now)
    left = lying(home)
    again = prune(home.settings, NAME, now=now)
    return SimpleNamespace(**{name: value for name, value in locals().items() if name != "tmp_path_factory"})


def evergreen(home, *words):
    env = {**os.environ, "EVERGREEN_HOME": str(home.settings.home), "EVERGREEN_PACKS": str(home.settings.packs)}
    return subprocess.run([EVERGREEN, *words], env=env, capture_output=True, text=True, check=False)


def test_what_the_rejected_run_alone_named_is_gone(story):
    """From the cache and from the remote, to the object: neither more nor less than the two champions let go of."""
    alone = story.named["two"] - story.named["one"] - story.named["three"]
    assert story.went.objects == len(alone) > 5
    assert [there & alone for there in story.left] == [set(), set()]
    assert story.before[0][1] - story.left[1] == alone


def test_all_that_the_champions_name_is_there(story):
    """Past or present: partitions, models, predictions, plots, logs, intact in the store; the files in MLflow too."""
    store = Store(story.home.settings)
    kept = story.named["one"] | story.named["three"]
    assert kept <= story.left[1]
    assert [name for name in kept if not store.verify(Ref(hash=name, size=0))] == []
    for run_id in ("one", "three"):
        verdict = story.home.events("verdict", run_id)[-1]
        assert rejudge(story.home.settings, verdict).wrong == ()
    assert [story.home.registry.artifact(NAME, version, "profile.bin") is None for version in (1, 2, 3)] == [0, 1, 0]


def test_looking_changes_nothing_and_a_pack_that_acts_is_waited_for(story):
    """The dry run says what then goes; while anybody acts, nothing does."""
    assert story.planned.model_copy(update={"dry_run": False}) == story.went
    assert story.before == story.after_plan == story.held
    assert [(each["run_id"], each["version"]) for each in story.went.goes] == [("two", 2)]
    assert story.again.goes == ()


def test_each_removal_is_an_event_and_the_ledger_holds(story):
    """Which run, by which rule and why; how many objects and bytes; nothing of the chain is shortened."""
    home = story.home
    [pruned] = home.events("pruned", "two")
    assert (pruned.body["version"], pruned.body["age"]) == (2, "90d")
    assert pruned.body["reason"] == "its last event is 100 days old, and nothing needs it"
    told = [event.body for event in home.events("retention")]
    assert [(each["status"], each["objects"], each["bytes"]) for each in told] == [
        (status, story.went.objects, story.went.bytes) for status in ("intended", "done")
    ]
    assert home.events("stage", "two")
    assert ledger.verify(home.database, NAME, work.checkpoints(home.settings, NAME)).holds


def test_lineage_says_what_was_pruned_when_and_by_which_rule(story):
    """What made it is told as before; whoever wants its files is told that they are gone, and why."""
    told = json.loads(evergreen(story.home, "lineage", f"{NAME}@2", "--json").stdout)
    assert told["run_id"] == "two"
    assert told["pruned"].endswith(f"by retention: 90d of {NAME}; no champion ever came of it")
    assert json.loads(evergreen(story.home, "lineage", f"{NAME}@3", "--json").stdout)["pruned"] is None
    refused = evergreen(story.home, "predict", f"{NAME}@2", str(story.home.file(0)))
    assert refused.returncode == 1
    assert "version 2 has no files any more" in refused.stderr


def test_a_pruned_version_is_never_promoted(story):
    """A task that is cleared a year later would do so: a void event says why nothing moves."""
    home = story.home
    champion = home.champion.version
    verdict = Verdict(decision="promote", reasons=("a test",))
    run = home.begin("two")
    given = {"run": run, "version": 2, "judged_against": champion, "verdict": verdict}
    assert promotion.promote(home.database, home.registry, **given) == champion == home.champion.version
    assert "version 2 has no files any more" in home.events("promotion", "two")[-1].body["why"]
    stays = prune(home.settings, NAME, dry_run=True).stays
    assert [each["version"] for each in stays if each["run_id"] == "two"] == [None]


def test_a_past_champion_can_come_back(story):
    """Verified from its bytes and its predictions of then; and there again."""
    home = story.home
    for version in (1, 3):
        found = rollback.rollback(home.settings, NAME, to=version, why=f"back to {version}", by="ada")
        assert home.champion.version == found.version == version


def test_what_is_gone_is_made_again(story):
    """A run that would have been all receipts does the stages again whose outputs went, and registers a new version."""
    home = story.home
    values = home.perform("two again", as_of=AS_OF + DAY)
    assert Counter(home.stages("stage", "two again"))["train"] == 1
    assert (values["register"].version, values["register"].new) == (4, True)
    assert values["train"].model.hash == values_of(home.database, "two", NAME)["train"]["model"]["hash"]


def test_nothing_goes_where_it_cannot_be_told_what_something_needs(story):
    """A champion's manifest is nowhere to be had: what it names cannot be told from garbage."""
    home = story.home
    manifest = values_of(home.database, "one", NAME)["validate"]["manifest"]["hash"]
    places = [root / manifest[:2] / manifest[2:] for root in [home.settings.cache / "files" / "md5"]]
    places.append(Path(home.settings.data_remote) / "files" / "md5" / manifest[:2] / manifest[2:])
    kept = [place.rename(f"{place}.away") for place in places]
    with pytest.raises(StoreError, match=rf"the run one stays, and {manifest}, which says what else it needs"):
        prune(home.settings, NAME, dry_run=True)
    for place, away in zip(places, kept, strict=True):
        away.rename(place)


def test_a_pack_that_says_nothing_keeps_everything(story):
    home = story.home
    home.write()
    with pytest.raises(PackError, match="everything is kept for ever"):
        prune(home.settings, NAME)
    shown = evergreen(home, "prune")
    home.write(retention="90d")
    assert shown.stdout == "no pack says `retention`: everything is kept for ever\n"
    assert "keeps 90d" in evergreen(home, "prune", NAME, "--dry-run").stdout


def test_a_removal_killed_at_every_turn_ends_as_an_undisturbed_one(tmp_path):
    """Killed five times, each call going on from what the one before left: the same files, tags and events."""
    (found,) = tried([str(tmp_path / "prune"), "rejected", "prune", *(f"prune/{step}" for step in STEPS)])
    [trial] = found["trials"]
    assert trial["deaths"] == ["killed"] * len(STEPS)
    assert trial["state"] == found["undisturbed"]
    assert len(found["before"]) > len([file for file in found["undisturbed"]["files"] if "/remote/" in file])
    assert [kind for kind, *_ in found["undisturbed"]["events"]] == ["pruned", "retention", "retention"]


@pytest.mark.prove
@pytest.mark.timeout(3600)
def test_a_removal_killed_at_any_call_ends_as_an_undisturbed_one(tmp_path, capsys):
    """Before every tag, file, object and event: one trial each."""
    (found,) = tried([str(tmp_path / "prune"), "rejected", "prune"])
    assert len(found["trials"]) > 20
    differing = {
        trial["points"][0]: trial["deaths"] for trial in found["trials"] if trial["state"] != found["undisturbed"]
    }
    with capsys.disabled():
        sys.stdout.write(f"\n{len(found['trials'])} points of a removal, {len(differing)} end otherwise\n")
    assert differing == {}
