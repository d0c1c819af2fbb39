"""The champion changes through one door, by intent, whoever dies or races."""

from __future__ import annotations

import pytest

from evergreen.database import Database
from evergreen.errors import RegistryError
from evergreen.registry import promotion
from evergreen.run import Verdict

PROMOTE = Verdict(decision="promote", reasons=("better",))


def statuses(database: Database) -> list[str]:
    return [event.body["status"] for event in database.events(kind=promotion.KIND)]


def test_promotion_moves_the_alias_between_two_events(promote, database, registry, model):
    """A promotion is written down as intended, done to the alias, and written down as done."""
    assert (promote(1, None), registry.champion(model).version, statuses(database)) == (1, 1, ["intended", "done"])


def test_done_names_the_champion_before(promote, database):
    """The done event tells which version was champion before, for the ledger and the way back."""
    promote(1, None)
    promote(2, 1)
    assert database.latest(kind=promotion.KIND).body["previous"] == 1


def test_promotion_takes_the_challenger_alias_off(promote, registry, model):
    """A challenger that became champion asks no longer."""
    registry.set_alias(model, "challenger", 2)
    promote(2, None)
    assert registry.version(model, 2).aliases == ("champion",)


def test_verdict_stands_in_the_lineage_afterwards(promote, registry, model):
    """The version's lineage tells the gate's verdict once it has spoken."""
    promote(3, None, Verdict(decision="reject", reasons=("worse by 0.02",)))
    assert registry.lineage(model, 3)["verdict"] == {"decision": "reject", "reasons": ["worse by 0.02"]}


def test_verdict_stands_in_the_tags_afterwards(promote, registry, model):
    """The verdict can be searched for in MLflow."""
    promote(3, None, Verdict(decision="review", reasons=("a person must look",)))
    assert registry.version(model, 3).tags["evergreen.verdict.decision"] == "review"


def test_rejected_challenger_leaves_the_champion(promote, registry, model):
    """A verdict other than promote moves nothing."""
    promote(1, None)
    assert (promote(2, 1, Verdict(decision="reject", reasons=("worse",))), registry.champion(model).version) == (1, 1)


def test_rejected_challenger_asks_no_longer(promote, registry, model):
    """A rejected version loses the alias challenger."""
    registry.set_alias(model, "challenger", 2)
    promote(2, None, Verdict(decision="reject", reasons=("worse",)))
    assert registry.version(model, 2).aliases == ()


def test_version_under_review_goes_on_asking(promote, registry, model):
    """A version that a person must look at keeps the alias challenger."""
    registry.set_alias(model, "challenger", 2)
    promote(2, None, Verdict(decision="review", reasons=("a person must look",)))
    aliases = registry.version(model, 2).aliases
    registry.drop_alias(model, "challenger", 2)
    assert aliases == ("challenger",)


def test_verdict_against_an_old_champion_moves_nothing(promote, registry, model):
    """The alias moves only if the champion is still the one that the challenger was judged against."""
    promote(1, None)
    assert (promote(2, None), registry.champion(model).version) == (1, 1)


def test_verdict_against_an_old_champion_is_void_with_the_reason(promote, database):
    """A promotion that did not happen is recorded, and says why."""
    promote(1, None)
    promote(2, None)
    assert database.latest(kind=promotion.KIND).body == {
        "status": "void",
        "version": 2,
        "judged_against": None,
        "champion": 1,
        "why": "the champion is version 1 now; the verdict was against no version",
    }


def test_void_is_recorded_once(promote, database):
    """A retry of a voided promotion adds no second record of it."""
    promote(1, None)
    promote(2, None)
    promote(2, None)
    assert statuses(database) == ["intended", "done", "void"]


def test_promotion_again_changes_nothing(promote, database):
    """A retry of a promotion that was done adds no events."""
    promote(1, None)
    assert (promote(1, None), statuses(database)) == (1, ["intended", "done"])


def test_alias_moved_by_others_is_recorded_as_foreign(promote, database, registry, model):
    """A champion set by hand is found by whoever comes next, and recorded once."""
    promote(1, None)
    registry.set_alias(model, "champion", 3)
    promotion.settle(database, registry, model)
    promotion.settle(database, registry, model)
    foreign = [event.body for event in database.events(kind=promotion.KIND) if event.body["status"] == "foreign"]
    assert [(body["expected"], body["champion"]) for body in foreign] == [(1, 3)]


def test_alias_taken_off_by_others_is_recorded_as_foreign(promote, database, registry, model):
    """A champion that is gone is a foreign move too."""
    promote(1, None)
    registry.drop_alias(model, "champion", 1)
    assert (promotion.settle(database, registry, model), database.latest(kind=promotion.KIND).body["expected"]) == (
        None,
        1,
    )


def test_open_intent_is_void_when_others_moved_the_alias(promote, database, registry, model):
    """An intent left open is not finished over a champion that somebody else chose meanwhile."""
    promote(1, None)
    intent = {"status": "intended", "version": 2, "judged_against": 1, "champion": 1}
    database.append(model, promotion.KIND, {**intent, "verdict": PROMOTE.model_dump(mode="json")}, run_id="dead")
    registry.set_alias(model, "champion", 3)
    assert (promotion.settle(database, registry, model), statuses(database)[-2:]) == (3, ["void", "foreign"])


def test_open_intent_for_a_deleted_version_is_void(promote, database, registry, model):
    """A version that was deleted in MLflow while its promotion lay open cannot block the pack for ever."""
    promote(1, None)
    intent = {"status": "intended", "version": 99, "judged_against": 1, "champion": 1}
    database.append(model, promotion.KIND, {**intent, "verdict": PROMOTE.model_dump(mode="json")}, run_id="dead")
    assert (promotion.settle(database, registry, model), statuses(database)[-1]) == (1, "void")


def back(database, registry, model, *, version: int, leave: int | None, drill: bool = False):
    asked = {"to": version, "why": "it is worse", "by": "ada"}
    return promotion.roll_back(database, registry, model, version=version, leave=leave, asked=asked, drill=drill)


def test_rollback_moves_the_alias_between_two_events(promote, database, registry, model):
    """The same door backwards: intended, moved, done; who asked and why is on the events and on the version it left."""
    promote(1, None)
    promote(2, 1)
    done = back(database, registry, model, version=1, leave=2)
    assert (done.body["previous"], done.body["champion"], done.body["asked"]["why"]) == (2, 1, "it is worse")
    told = [(event.kind, event.body["status"]) for event in database.events(kind=promotion.MOVES)[-2:]]
    assert told == [("rollback", "intended"), ("rollback", "done")]
    assert registry.champion(model).version == 1
    assert "by ada: it is worse" in registry.version(model, 2).tags["evergreen.rolled_back"]


def test_no_text_keeps_an_intent_from_being_done(promote, database, registry, model):
    """What a terminal of another encoding sent, and a null: kept in the events, and written as `?` where MLflow cannot."""
    why = "caf\udce9 \0"
    promote(1, None)
    promote(2, 1)
    asked = {"to": 1, "why": why, "by": "ada"}
    done = promotion.roll_back(database, registry, model, version=1, leave=2, asked=asked)
    assert (done.body["status"], done.body["asked"]["why"]) == ("done", why)
    assert registry.version(model, 2).tags["evergreen.rolled_back"].endswith("by ada: caf? ?")
    registry.describe(model, 2, why)


def test_rollback_from_an_old_champion_moves_nothing(promote, database, registry, model):
    """The alias moves only if the champion is still the one that was to be left; a void event says why."""
    promote(1, None)
    promote(2, 1)
    with pytest.raises(RegistryError, match="the champion is version 2 now; the rollback was from version 3"):
        back(database, registry, model, version=1, leave=3)
    last = database.latest(kind=promotion.ROLLBACK)
    assert (registry.champion(model).version, last.body["status"]) == (2, "void")


def test_what_was_rolled_back_is_known_until_a_person_chooses_it_again(promote, database, registry, model):
    """The version that was left, and any other with the same model folder; no more when it is gone back to."""
    promote(1, None)
    promote(2, 1)
    back(database, registry, model, version=1, leave=2)
    same = registry.version(model, 2).model_hash
    assert "by ada: it is worse" in promotion.rolled_back(database, model, 2, same)
    assert "version 2, the same model, was rolled back" in promotion.rolled_back(database, model, 3, same)
    assert promotion.rolled_back(database, model, 3, "another") is None
    back(database, registry, model, version=2, leave=1)
    assert (promotion.rolled_back(database, model, 2, same), promotion.left(database, model)) == (None, {})


def test_drill_leaves_the_champion(promote, database, registry, model):
    """It goes through the same door with the alias drill, and no promotion sees it."""
    promote(1, None)
    promote(2, 1)
    back(database, registry, model, version=1, leave=2, drill=True)
    aliases = (registry.champion(model).version, registry.version(model, "drill").version)
    registry.drop_alias(model, "drill", 1)
    assert (aliases, promotion.settle(database, registry, model), promotion.left(database, model)) == ((2, 1), 2, {})


KILLS = [
    {"writes": writes, "killed": True, "champion": True, "verdict": "promote", "events": ["intended", "done"]}
    for writes in (1, 2, 3, 4)
]


@pytest.mark.slow
@pytest.mark.fault
def test_killed_promotion_ends_as_an_undisturbed_one(trials):
    """SIGKILL after the intent, the alias, the verdict or the end, then a retry: alias and events agree."""
    assert trials["promote"] == [{**kill, "others": []} for kill in KILLS]


@pytest.mark.slow
@pytest.mark.fault
def test_whoever_comes_next_finishes_what_a_killed_promotion_left(trials):
    """Another run's promotion first finishes the dead one's intent, then is void: its champion is no more."""
    assert trials["next"] == [{**kill, "others": ["void"]} for kill in KILLS[:2]]


@pytest.mark.slow
@pytest.mark.fault
def test_two_promotions_at_once_make_one_champion(trials):
    """Of two processes judged against the same champion one is done and one void, twenty times in twenty."""
    race = trials["race"]
    assert (race["races"], race["odd"], race["on_alias"], race["first_bad"]) == (20, [], race["last_done"], None)


BACK = [
    {"writes": writes, "killed": True, "champion": True, "agrees": True, "left": True, "events": ["intended", "done"]}
    for writes in (1, 2, 3, 4)
]


@pytest.mark.slow
@pytest.mark.fault
def test_killed_rollback_ends_as_an_undisturbed_one(trials):
    """SIGKILL after the intent, the alias, the tag or the end, then asked again: it went back once, and all agree."""
    assert trials["rollback"] == [{**kill, "others": []} for kill in BACK]


@pytest.mark.slow
@pytest.mark.fault
def test_whoever_comes_next_finishes_what_a_killed_rollback_left(trials):
    """A promotion first finishes the dead rollback, then is void: its champion is no more."""
    assert trials["overtaken"] == [{**kill, "others": ["void"]} for kill in BACK[:2]]


@pytest.mark.slow
@pytest.mark.fault
def test_a_promotion_and_a_rollback_at_once_make_one_champion(trials):
    """Of the two, from the same champion, one is done and one void, twenty times in twenty; the ledger verifies."""
    race = trials["back"]
    assert (race["races"], race["odd"], race["on_alias"], race["first_bad"]) == (20, [], race["last_done"], None)


@pytest.mark.prove
@pytest.mark.timeout(3600)
def test_five_hundred_races_make_one_champion_each(run_trials, tmp_path):
    """The same races 500 times each."""
    answer = run_trials(tmp_path, 500, "create_run#1")
    for race in (answer["race"], answer["back"]):
        assert (race["races"], race["odd"], race["first_bad"]) == (500, [], None)
