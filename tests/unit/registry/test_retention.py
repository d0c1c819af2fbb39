"""What goes and what stays: of values alone."""

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from evergreen.registry.retention import SEASON, Claim, Needed, decide

NOW = datetime(2026, 1, 1, tzinfo=UTC)
DAY = timedelta(days=1)
AGE = 90 * DAY


def claim(run_id="old", days=100, names=("a",), **more):
    given = {"pack": "tide", "kind": "run", "ended_at": NOW - days * DAY, **more}
    return Claim(run_id=run_id, names=frozenset(names), **given)


def plan(*claims, contents=None, **needed):
    newest = claim("newest", 0, ())
    return decide([*claims, newest], contents or {}, pack="tide", age=AGE, needed=Needed(**needed), now=NOW)


def reason(found, run_id="old"):
    """Why a run stays; None where it goes."""
    [fate] = [fate for fate in found.fates if fate.claim.run_id == run_id]
    return fate.reason if fate.stays else None


def test_what_is_old_and_made_no_champion_goes():
    """With all that it alone names, followed through folders and manifests, and its version."""
    found = plan(claim(names=("manifest", "tide@4"), version=4), contents={"manifest": ("rows", "more rows")})
    assert [fate.claim.run_id for fate in found.goes] == ["old"]
    assert found.things == {"manifest", "rows", "more rows", "tide@4"}
    assert found.holders == {"manifest"}
    assert found.goes[0].reason == "its last event is 100 days old, and nothing needs it"


@pytest.mark.parametrize(
    ("needed", "why"),
    [
        ({"champions": {4}}, "version 4 is champion, or was"),
        ({"waiting": {4}}, "version 4 waits for what was decided, or is to be decided"),
        ({"aliases": {4: "shadow"}}, "version 4 is called shadow"),
    ],
)
def test_what_somebody_needs_stays(needed, why):
    """Whatever its age: champions past and present, what is decided and not done, what a person gave a name."""
    found = plan(claim(version=4, names=("a", "tide@4")), **needed)
    assert reason(found) == why
    assert found.things == frozenset()


def test_what_is_young_stays():
    """To the day: a run's age is that of its last event."""
    found = plan(claim("young", 89), claim("due", 90, ("b",)))
    assert reason(found, "young") == "its last event is 89 days old"
    assert reason(found, "due") is None
    assert found.things == {"b"}


def test_the_newest_stays_whatever_its_age():
    """The newest run, look and snapshot are what the next one reads on from."""
    old = claim("snapshot", 400, has_snapshot=True), claim("look", 300, kind="look"), claim("failed", 200)
    found = decide(old, {}, pack="tide", age=AGE, needed=Needed(), now=NOW)
    assert [fate.reason.partition(":")[0] for fate in found.fates] == [
        "the newest snapshot",
        "the newest look",
        "the newest run",
    ]


def test_a_profile_outlives_its_look_until_the_season_comes_again():
    """By as-of, which a clock may have run ahead of the days."""
    looks = [
        claim(f"{number}", 200 - number, (f"profile {number}",), kind="profile", as_of=NOW - back)
        for number, back in enumerate([SEASON + DAY, SEASON - DAY, timedelta()])
    ]
    assert plan(*looks).things == {"profile 0"}


def test_what_another_pack_names_stays():
    """Packs share objects: one lets go of what the other holds."""
    found = plan(claim(names=("a", "b")), claim("theirs", 400, ("b",), pack="ebb"))
    assert found.things == {"a"}
    assert [fate.claim.pack for fate in found.fates] == ["tide", "tide"]


def test_what_no_run_said_stays():
    """Events of no run, a rollback say, hold on to what they name, for ever."""
    assert plan(claim(names=("a", "b")), claim(None, 400, ("b",), kind="record")).things == {"a"}


def test_what_was_decided_before_goes_still():
    """A claim whose removal was cut short is not decided again, and what it alone names is still to go."""
    found = plan(claim(names=("a", "b"), pruned=True), claim("other", 1, ("b",)))
    assert found.things == {"a"}
    assert found.goes == ()


NAMES = [f"{number}" for number in range(12)]
CLAIMS = st.lists(
    st.builds(
        Claim,
        pack=st.sampled_from(["tide", "tide", "ebb"]),
        run_id=st.integers(0, 10**6).map(str),
        kind=st.sampled_from(["run", "look", "profile", "record"]),
        ended_at=st.sampled_from([200, 120, 95, 89, 0]).map(lambda days: NOW - days * DAY),
        names=st.frozensets(st.sampled_from(NAMES), max_size=4),
        as_of=st.none() | st.integers(0, 900).map(lambda days: NOW - days * DAY),
        version=st.none() | st.integers(1, 4),
        has_snapshot=st.booleans(),
        pruned=st.sampled_from([False, False, True]),
    ),
    min_size=3,
    max_size=12,
    unique_by=lambda claim: claim.run_id,
)
CONTENTS = st.dictionaries(st.sampled_from(NAMES), st.frozensets(st.sampled_from(NAMES), max_size=3))
TRIED = settings(
    max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], database=None
)
VERSIONS = st.frozensets(st.integers(1, 4), max_size=2)


@TRIED
@given(CLAIMS, CONTENTS, VERSIONS, VERSIONS)
def test_nothing_that_something_kept_reaches_is_ever_removed(claims, contents, champions, waiting):
    """Whatever there is: step by step from each claim that stays, one meets nothing that goes; and no champion's goes."""
    needed = Needed(champions=champions, waiting=waiting)
    found = decide(claims, contents, pack="tide", age=AGE, needed=needed, now=NOW)
    goes = [fate.claim for fate in found.goes]
    for kept in claims:
        if kept in goes or kept.pruned:
            continue
        seen, edge = set(kept.names), set(kept.names)
        while edge:
            edge = {name for one in edge for name in contents.get(one, ())} - seen
            seen |= edge
        assert not seen & found.things
    assert not [gone for gone in goes if gone.version in champions | waiting]
    assert not [gone for gone in goes if gone.pack != "tide" or gone.kind == "record" or NOW - gone.ended_at < AGE]


@TRIED
@given(CLAIMS, CONTENTS)
def test_all_that_goes_was_named_by_what_goes(claims, contents):
    """Nothing is removed that no claim of the pack, going or gone, reaches; and decided again without them, nothing is."""
    found = decide(claims, contents, pack="tide", age=AGE, needed=Needed(), now=NOW)
    goes = [fate.claim for fate in found.goes]
    named = {name for claim in claims if claim in goes or claim.pruned for name in claim.names}
    reached = named | {name for names in contents.values() for name in names}
    assert found.things <= reached
    left = [claim for claim in claims if claim not in goes and not claim.pruned]
    again = decide(left, contents, pack="tide", age=AGE, needed=Needed(), now=NOW)
    assert (again.things, again.goes) == (frozenset(), ())
