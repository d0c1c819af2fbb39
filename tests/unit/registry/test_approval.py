"""A question to a person is asked once, ended once, and then carried out, whoever dies or comes late."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest

from evergreen.database import Database
from evergreen.errors import RegistryError
from evergreen.registry import approval, promotion
from evergreen.registry.approval import Answer
from evergreen.run import Verdict

REVIEW = Verdict(decision="review", reasons=("not shown to be within 0.01",))
YES = Answer(choice="promote", person="ada", comment="fresher", through="terminal")
NO = Answer(choice="reject", person="ada", comment="not on a Friday", through="terminal")


@pytest.fixture(scope="module")
def model(registry, given, tmp_path_factory) -> str:
    """A model with three versions."""
    folder = given.model_folder(tmp_path_factory.mktemp("model") / "trained")
    for key in ("first", "second", "third"):
        given.register(registry, "approved", folder, key=key)
    return "approved"


class Door:
    """What the tests do to `model` by its numbers; a version's run is `run of <version>`."""

    def __init__(self, database, registry, given, home, model) -> None:
        self.database, self.registry, self.model = database, registry, model
        self.run = lambda version: given.run_of(model, f"run of {version}", given.settings_at(home))

    def ask(self, version: int, judged_against: int | None = None, older: timedelta = timedelta(0)) -> int | None:
        """`older`: how much earlier than the others' the as-of of its run is."""
        run = self.run(version)
        run = replace(run, as_of=run.as_of - older)
        if self.database.latest(self.model, kind="run", run_id=run.id) is None:
            with self.database.chain(self.model) as chain:
                chain.append("run", {"as_of": run.as_of.isoformat()}, run_id=run.id)
        return approval.ask(
            self.database,
            self.registry,
            run=run,
            version=version,
            judged_against=judged_against,
            verdict=REVIEW,
        )

    def answer(self, version: int, answer: Answer | None) -> str:
        of = self.run(version)
        ended = approval.answer(self.database, self.registry, run=of, answer=answer, holder="the answer")
        return approval.said(ended)

    def promote(self, version: int, judged_against: int | None) -> None:
        promotion.promote(
            self.database,
            self.registry,
            run=self.run(version),
            version=version,
            judged_against=judged_against,
            verdict=Verdict(decision="promote", reasons=("better",)),
        )

    def aliases(self) -> dict[str, int]:
        return {alias: one.version for one in self.registry.versions(self.model) for alias in one.aliases}

    def statuses(self, kind: str = approval.KIND) -> list[tuple[str, int]]:
        return [(event.body["status"], event.body["version"]) for event in self.database.events(self.model, kind=kind)]

    def overtaken(self, version: int) -> str | None:
        return approval.overtaken(self.database, self.model, f"run of {version}")


@pytest.fixture
def door(tmp_path, registry, given, home, model):
    door = Door(Database(f"sqlite:///{tmp_path / 'events.db'}"), registry, given, home, model)
    yield door
    for alias, version in door.aliases().items():
        registry.drop_alias(model, alias, version)


def test_who_waits_is_the_challenger(door):
    """The version that waits has the alias, and the gate's verdict stands on it; nobody is champion."""
    assert door.ask(1) is None
    assert (door.aliases(), door.statuses()) == ({"challenger": 1}, [("asked", 1)])
    assert door.registry.lineage(door.model, 1)["verdict"]["decision"] == "review"


def test_a_question_is_asked_once(door):
    """A retry of the run that asks changes nothing."""
    door.ask(1)
    door.ask(1)
    assert door.statuses() == [("asked", 1)]


def test_yes_promotes_by_intent(door):
    """The alias moves through the one door; who said so and why is the verdict's first reason."""
    door.ask(1)
    assert door.answer(1, YES) == "promoted by ada: fresher"
    assert door.aliases() == {"champion": 1}
    assert [status for status, _ in door.statuses(promotion.KIND)] == ["intended", "done"]
    assert door.registry.lineage(door.model, 1)["verdict"] == {
        "decision": "promote",
        "reasons": ["promoted by ada: fresher", *REVIEW.reasons],
    }


def test_no_leaves_the_champion(door):
    """The version asks no longer; nothing moved."""
    door.promote(1, None)
    door.ask(2, 1)
    assert door.answer(2, NO) == "rejected by ada: not on a Friday"
    assert door.aliases() == {"champion": 1}


def test_the_first_answer_counts(door):
    """Whoever comes second is told what was said, and changes nothing."""
    door.ask(1)
    door.answer(1, NO)
    assert door.answer(1, YES) == "rejected by ada: not on a Friday"
    assert (door.aliases(), door.statuses()) == ({}, [("asked", 1), ("answered", 1)])


def test_no_answer_ends_nothing(door):
    """A question whose task died goes on waiting."""
    door.ask(1)
    assert (door.answer(1, None), door.aliases()) == ("waits for approval", {"challenger": 1})


def test_a_challenger_of_older_data_supersedes_nobody(door):
    """A backfill that comes to a question while a fresher one is open: the fresher goes on waiting, and is the challenger."""
    door.ask(1)
    door.ask(2, older=timedelta(days=30))
    assert door.overtaken(1) is None
    assert door.overtaken(2) == "superseded: version 1 was made as of later, and waits for approval"
    assert (door.aliases(), door.answer(1, YES)) == ({"challenger": 1}, "promoted by ada: fresher")
    assert door.aliases() == {"champion": 1}


def test_a_newer_challenger_supersedes(door):
    """One version waits at a time; the older one's question ends with the reason, and a late yes moves nothing."""
    door.ask(1)
    door.ask(2)
    assert door.overtaken(1) == "superseded: version 2 is newer, and waits for approval"
    assert door.answer(1, YES) == door.overtaken(1)
    assert (door.aliases(), door.overtaken(2)) == ({"challenger": 2}, None)


def test_a_promotion_meanwhile_ends_the_question(door):
    """What a version was judged against is champion no more: said so, and the alias challenger is gone."""
    door.ask(1)
    door.promote(2, None)
    assert door.overtaken(1) == "the champion is version 2 now; the verdict was against no version"
    approval.retire(door.database, door.registry, door.run(2), 2)
    assert (door.aliases(), door.overtaken(1)) == ({"champion": 2}, "superseded: version 2 was promoted meanwhile")


def test_a_rollback_meanwhile_ends_the_question(door):
    """What a version was judged against was rolled back: its champion is no more, and a yes moves nothing."""
    door.promote(1, None)
    door.promote(2, 1)
    door.ask(3, 2)
    asked = {"to": 1, "why": "worse", "by": "ada"}
    promotion.roll_back(door.database, door.registry, door.model, version=1, leave=2, asked=asked)
    assert door.overtaken(3) == "the champion is version 1 now; the verdict was against version 2"
    door.answer(3, YES)
    assert door.aliases()["champion"] == 1


def test_a_yes_against_an_old_champion_moves_nothing(door):
    """By compare-and-swap: the answer is kept, the promotion is void and says why; once, however often it is tried."""
    door.ask(1)
    door.promote(2, None)
    for _ in range(2):
        assert door.answer(1, YES) == "promoted by ada: fresher"
    assert door.aliases() == {"champion": 2}
    assert door.statuses(promotion.KIND) == [("intended", 2), ("done", 2), ("void", 1)]


def test_what_was_void_stays_void(door):
    """A retry after the old champion has come back does not promote what was not promoted then."""
    door.promote(1, None)
    door.ask(2, 1)
    door.promote(3, 1)
    door.answer(2, YES)
    door.promote(1, 3)
    door.answer(2, YES)
    assert door.aliases() == {"champion": 1}


def test_the_same_version_may_be_asked_about_again(door, given, home):
    """A later run that learned the same asks anew; the alias stays with the version."""
    door.ask(1)
    again = given.run_of(door.model, "later", given.settings_at(home))
    asked = {"run": again, "version": 1, "judged_against": None, "verdict": REVIEW}
    approval.ask(door.database, door.registry, **asked)
    assert door.answer(1, None) == "superseded: the same version was judged again, and waits for approval"
    assert door.aliases() == {"challenger": 1}


def test_a_run_may_ask_about_another_version(door):
    """Cleared after its first was promoted, it comes to a second: the answer to that is carried out as well."""
    door.ask(1)
    door.answer(1, YES)
    first = door.run(1)
    verdict = Verdict(decision="review", reasons=("the second",))
    approval.ask(door.database, door.registry, run=first, version=2, judged_against=1, verdict=verdict)
    approval.answer(door.database, door.registry, run=first, version=2, answer=YES, holder="the answer")
    assert door.aliases() == {"champion": 2}
    assert door.registry.lineage(door.model, 2)["verdict"]["reasons"][1:] == ["the second"]
    assert approval.overtaken(door.database, door.model, first.id, 1) == "promoted by ada: fresher"


def test_nobody_in_time_is_nobody(door):
    """The time-out rejects without a person."""
    door.ask(1)
    nobody = Answer(choice="reject", person=None, through="Airflow")
    assert door.answer(1, nobody) == "rejected: nobody answered in time"


def test_a_run_that_asked_nothing_is_named(door):
    """An answer to nothing is an error that says where to look."""
    with pytest.raises(RegistryError, match="has not asked for approval"):
        door.answer(3, YES)


def held(found, steps):
    """Killed there each time; then alias, verdict and events are those of an undisturbed answer, and nobody waits."""
    right = {"killed": True, "champion": True, "waits": False, "as undisturbed": True}
    assert [each["step"] for each in found] == steps
    assert [{**each, "step": None} for each in found] == [{**right, "step": None}] * len(steps)


@pytest.mark.slow
@pytest.mark.fault
def test_a_killed_answer_ends_as_an_undisturbed_one(run_approvals, tmp_path):
    """SIGKILL after the answer was written down, and after the alias was moved; then the retry."""
    steps = ["promote 1", "promote 3"]
    held(run_approvals(tmp_path, *steps), steps)


@pytest.mark.prove
def test_an_answer_killed_at_any_step_ends_as_an_undisturbed_one(run_approvals, tmp_path):
    """SIGKILL after every write of the question, of a yes and of a no."""
    found = run_approvals(tmp_path)
    held(found, [each["step"] for each in found])
    assert len(found) > 12
    assert len({each["step"] for each in found}) > 9
