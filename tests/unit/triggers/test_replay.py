"""The inbox replayed: history comes out again, and another policy says what it would have done."""

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.triggers.admissions import DAY, HOUR, MINUTE, NOON, SECOND, World

from evergreen import loop
from evergreen.database import connect
from evergreen.keys import begin as begin_run
from evergreen.pack import AdmissionPolicy, Budget, Clock, Confirm, load
from evergreen.settings import Settings
from evergreen.triggers import inbox
from evergreen.triggers.admission import Calendar, Past, again, alert_of, decision_of, run_id_of
from evergreen.triggers.inbox import NewAlert
from evergreen.triggers.replay import simulate

PACK = """
description: Is it more?
owner: tests@example.com
source: {kind: csv, path: rows.csv}
data: {target: more, event_time: at}
training: {call: "model:train"}
gate: {primary: {metric: roc_auc}}
triggers: {admission: {dedupe: 10s, cooldown: 5m, budget: {runs: 3, per: 1h}}}
"""

POLICIES = [
    AdmissionPolicy(),
    AdmissionPolicy(dedupe=timedelta(0), cooldown=timedelta(0)),
    AdmissionPolicy(dedupe=10 * MINUTE, cooldown=HOUR, brake=2),
    AdmissionPolicy(dedupe=HOUR, cooldown=timedelta(0), confirm=Confirm(windows="2 of 3", each=HOUR)),
    AdmissionPolicy(dedupe=MINUTE, cooldown=MINUTE, confirm=Confirm(windows="2 of 4", each=10 * MINUTE)),
    AdmissionPolicy(dedupe=timedelta(0), cooldown=MINUTE, budget=Budget(runs=2, per=DAY), brake=3),
    AdmissionPolicy(cooldown=timedelta(0), budget=Budget(runs=3, device_hours=1.5, per=2 * DAY)),
]
CALENDARS = [
    Calendar(),
    Calendar(partition="hour"),
    Calendar(clock=Clock(start=NOON - 1000 * DAY, speed=1440), made_at=NOON - DAY),
]
EXAMPLES = settings(max_examples=60, deadline=None, derandomize=True)

SPANS = [
    timedelta(milliseconds=1),
    SECOND,
    20 * SECOND,
    MINUTE,
    10 * MINUTE,
    30 * MINUTE,
    HOUR,
    5 * HOUR,
    DAY,
    31 * DAY,
]


def live(seed: int, steps: int, policies: list[AdmissionPolicy], calendar: Calendar) -> Iterator[World]:
    """A history of `steps` random happenings under `policies`, some of them crashes; it stops after each of them."""
    rng = random.Random(seed)
    world = World(rng.choice(policies), calendar)
    for happening in rng.choices(list(HAPPENINGS), HAPPENINGS.values(), k=steps):
        happening(world, rng, policies)
        yield world
        world.decided = []


def lived(*how) -> World:
    """The world at the end of such a history."""
    return list(live(*how))[-1]


def complain(world, rng, _):
    day_before, any_before = world.now - DAY, world.now - rng.choice(SPANS)
    world.alert(rng.choice("abc"), as_of=rng.choice([None, None, None, day_before, any_before, world.now + HOUR]))


def storm(world, rng, _):
    for _ in range(rng.randrange(2, 7)):
        world.alert(rng.choice("abcdef"))


def begin(world, rng, _):
    if asked := world.asked():
        run_id = rng.choice(sorted(asked))
        world.run(run_id, as_of=asked[run_id])


def by_cron(world, rng, _):
    world.run(f"scheduled__{len(world.events)}", as_of=rng.choice([None, None, world.now - 3 * DAY]))


def repeat(world, rng, _):
    """A few alerts are heard again, each decided or not."""
    firing = [alert for alert, event in world.alerts.items() if event.body["status"] == "firing"]
    for alert in rng.sample(firing[-6:], min(2, len(firing))):
        if world.alerts[alert].body["sender"] != "data":
            world.hear(alert)


def go_on(world, rng, _):
    if world.begun:
        run_id = rng.choice(sorted(world.begun)[-3:])
        rng.choice([lambda: world.train(run_id, rng.choice([0.1, 1.0])), lambda: world.promote(run_id)])()


def fail(world, rng, _):
    if world.begun:
        world.fail(rng.choice(sorted(world.begun)[-3:]))


def change_policy(world, rng, policies):
    world.policy = rng.choice(policies)


HAPPENINGS = {
    complain: 8,
    storm: 1,
    lambda world, rng, _: world.alert(rng.choice("abc"), status="resolved"): 1,
    lambda world, *_: world.alert("data/p", sender="data"): 1,
    repeat: 4,
    lambda world, *_: world.drain(): 8,
    lambda world, *_: world.drain(dies=True): 1,
    lambda world, rng, _: setattr(world, "now", world.now + rng.choice(SPANS) * rng.random()): 6,
    begin: 3,
    by_cron: 1,
    go_on: 4,
    fail: 1,
    lambda world, rng, _: world.confirm(None if rng.random() < 0.7 else [*world.asked()][:1]): 3,
    lambda world, rng, _: setattr(world, "paused", rng.choice([True, False, False, False, None])): 1,
    lambda world, rng, _: setattr(world, "broken", rng.choice(["pack.yaml:3: unknown key", None, None, None])): 1,
    lambda world, rng, _: world.snooze(rng.choice([None, world.now + rng.choice(SPANS)])): 1,
    change_policy: 1,
}
"""What may happen, and how often beside the others."""


def differences(replay):
    return [(course.alert.id, course.was, course.would) for course in replay.differences]


@EXAMPLES
@given(seed=st.integers(0, 2**32), steps=st.integers(1, 120), calendar=st.sampled_from(CALENDARS))
def test_history_is_replayed_to_every_hold_sentence_and_run(seed, steps, calendar):
    world = lived(seed, steps, POLICIES, calendar)
    replay = simulate(world.events)
    assert differences(replay) == []
    assert replay.was == replay.would
    assert replay.guessed == 0


@EXAMPLES
@given(
    seed=st.integers(0, 2**32),
    steps=st.integers(1, 120),
    policy=st.sampled_from(POLICIES),
    calendar=st.sampled_from(CALENDARS),
)
def test_the_policy_in_force_simulated_is_what_happened(seed, steps, policy, calendar):
    world = lived(seed, steps, [policy], calendar)
    assert differences(simulate(world.events, policy)) == []


@EXAMPLES
@given(seed=st.integers(0, 2**32), steps=st.integers(1, 120), calendar=st.sampled_from(CALENDARS))
def test_every_decision_is_made_again_from_its_row_alone(seed, steps, calendar):
    world = lived(seed, steps, POLICIES, calendar)
    for event in world.events:
        if event.kind in ("intent", "decision"):
            assert again(event) == decision_of(event)


@EXAMPLES
@given(seed=st.integers(0, 2**32), steps=st.integers(1, 120), calendar=st.sampled_from(CALENDARS))
def test_events_beyond_the_horizon_change_nothing_that_is_seen(seed, steps, calendar):
    for world in live(seed, steps, POLICIES, calendar):
        past = Past(world.events[: world.known])
        for decision, seen in world.decided:
            kinds = ("heard",) if seen.alert.reopened else ("alert",)
            alert = next(
                alert_of(event)
                for event in world.events
                if event.key == decision.alert and event.kind in kinds and seen.alert.reopened in (None, event.position)
            )
            outside = {"paused": world.paused, "broken": world.broken, "calendar": world.calendar}
            outside["earlier"] = seen.earlier
            full = past.see(alert, world.policy, world.looked_at, **outside)
            assert full.model_copy(update={"upto": 0}) == seen.model_copy(update={"upto": 0})
            past.note(decision)


@EXAMPLES
@given(
    seed=st.integers(0, 2**32),
    steps=st.integers(1, 120),
    policy=st.sampled_from(POLICIES),
    calendar=st.sampled_from(CALENDARS),
)
def test_under_any_policy_each_alert_gets_at_most_one_final_decision(seed, steps, policy, calendar):
    world = lived(seed, steps, POLICIES, calendar)
    replay = simulate(world.events, policy)
    for course in replay.courses:
        finals = [look for look in course.would if look.decision.outcome != "hold"]
        heard = sum(event.kind == "heard" and event.key == course.alert.id for event in world.events)
        assert len(finals) <= 1 + heard
        assert len({look.decision.run_id for look in finals if look.decision.outcome == "retrain"}) == sum(
            look.decision.outcome == "retrain" for look in finals
        )
        assert [look.now for look in course.would] == sorted(look.now for look in course.would)
    for totals in (replay.was, replay.would):
        assert totals.alerts == len(replay.courses)
        assert totals.alerts <= totals.runs + totals.merged + totals.dropped + totals.dead + totals.waiting
    runs = Counter(
        look.decision.run_id for c in replay.courses for look in c.would if look.decision.outcome == "retrain"
    )
    assert all(number == 1 for number in runs.values())


# Under another policy.


def a_day(*, promoted: bool = False) -> World:
    """Cron ran at noon and trained for two hours; an alert then waited until six, and its run trained for one.

    Another complaint, of five o'clock, was merged into that run.
    """
    world = World(AdmissionPolicy(cooldown=6 * HOUR))
    world.run("cron")
    world.now += 2 * HOUR
    world.train("cron", 2)
    world.alert("drift")
    world.drain()
    world.now = NOON + 5 * HOUR
    world.alert("lateness")
    world.drain()
    world.now = NOON + 6 * HOUR
    world.drain()
    (run_id,) = world.asked()
    world.now += 10 * MINUTE
    world.run(run_id)
    world.confirm()
    world.now += HOUR
    world.train(run_id, 1)
    if promoted:
        world.promote(run_id)
    return world


def outcomes_of(looks) -> list[str]:
    return [f"{look.now:%H:%M} {look.decision.outcome} {look.decision.rule}" for look in looks]


def test_a_run_that_would_have_started_earlier_costs_what_it_cost():
    replay = simulate(a_day().events, AdmissionPolicy(cooldown=4 * HOUR))
    drift, lateness = replay.courses
    assert outcomes_of(drift.was) == ["14:00 hold cooldown", "18:00 retrain retrain"]
    assert outcomes_of(drift.would) == ["14:00 hold cooldown", "16:00 retrain retrain"]
    assert outcomes_of(lateness.was) == ["17:00 hold cooldown", "18:00 merge merge"]
    assert (replay.was.runs, replay.was.merged, replay.was.device_hours) == (1, 1, 1)
    assert (replay.would.runs, replay.would.device_hours, replay.guessed) == (1, 1, 0)


def test_a_run_that_would_have_started_earlier_does_what_it_did_as_much_earlier():
    """It begins at 14:10 rather than 18:10, and its promotion, at 15:10, comes before the other complaint."""
    would = [
        simulate(a_day(promoted=promoted).events, AdmissionPolicy(cooldown=HOUR)).courses[1].would
        for promoted in (False, True)
    ]
    assert [outcomes_of(looks) for looks in would] == [["17:00 retrain retrain"], ["17:00 hold loop_guard"]]


def test_a_run_that_never_was_is_taken_to_cost_the_median_of_the_known():
    """Cron's training took two hours and the alert's one: an hour and a half."""
    replay = simulate(a_day().events, AdmissionPolicy(cooldown=HOUR))
    assert (replay.was.runs, replay.would.runs, replay.guessed) == (1, 2, 1)
    assert (replay.median_hours, replay.would.device_hours) == (1.5, 2.5)


def test_a_run_that_never_was_begins_and_trains_as_late_as_the_packs_runs_do():
    """The one of 17:00 begins at 17:10, which is when the cooldown counts from, and has not trained by 18:10."""
    world = a_day()
    events = [event for event in world.events if event.at < NOON + 6 * HOUR]
    rest = world.events[len(events) :]
    world = World(world.policy)
    for event in [*events, None, *rest]:
        if event is None:
            world.now = NOON + 5 * HOUR + 30 * MINUTE
            third = world.alert("a third")
            world.drain()
        else:
            world.now = max(world.now, event.at - timedelta(microseconds=1))
            world.append(event.kind, event.body, key=event.key, run_id=event.run_id)
    policy = AdmissionPolicy(cooldown=HOUR, budget=Budget(device_hours=4, per=DAY))
    replay = simulate(world.events, policy)
    looks = next(course.would for course in replay.courses if course.alert.id == third)
    assert outcomes_of(looks) == ["17:30 hold cooldown", "18:10 retrain retrain"]


def test_where_no_training_is_known_a_run_that_never_was_costs_nothing():
    world = World()
    world.run("cron")
    world.alert()
    world.drain()
    replay = simulate(world.events, AdmissionPolicy(cooldown=timedelta(0)))
    assert (replay.would.runs, replay.guessed, replay.median_hours, replay.would.device_hours) == (1, 1, None, 0)


def test_a_run_that_would_not_have_been_asked_for_does_nothing():
    """Without it there is no cooldown for the next alert, and no cost."""
    world = World(AdmissionPolicy(dedupe=timedelta(0)))
    first = world.alert()
    world.drain()
    run_id = first.replace("alert-", "alert__")
    world.run(run_id)
    world.train(run_id, 1)
    world.now += 6 * HOUR
    second = world.one(world.alert())
    world.run(second.run_id)
    world.train(second.run_id, 1)
    world.now += 10 * MINUTE
    third = world.alert("lateness")
    assert world.one(third).rule == "cooldown"
    replay = simulate(world.events, AdmissionPolicy(dedupe=DAY))
    assert [course.would[-1].decision.rule for course in replay.courses] == ["retrain", "dedupe", "retrain"]
    assert (replay.was.device_hours, replay.would.device_hours, replay.guessed) == (2, 2, 1)


def test_alerts_that_go_another_way_wait_while_the_pack_is_known_to_be_paused():
    """The pause begins after their first look, which was their last, and is known to end when another alert is seen."""
    world = World(AdmissionPolicy(cooldown=timedelta(0)))
    world.run("cron")
    alert = world.alert("drift")
    world.drain()
    world.now += 30 * MINUTE
    world.paused = True
    other = world.alert("lateness")
    world.drain()
    world.now += 5 * HOUR
    world.paused = False
    world.drain()
    ended = world.now
    replay = simulate(world.events, AdmissionPolicy(cooldown=HOUR))
    looks = next(course.would for course in replay.courses if course.alert.id == alert)
    assert [look.decision.rule for look in looks] == ["cooldown", "paused", "merge"]
    assert looks[-1].now <= ended < looks[-1].now + SECOND
    assert looks[-1].decision.run_id == run_id_of(other)


def test_a_hold_that_would_say_the_same_again_is_not_counted_again():
    world = World(AdmissionPolicy(cooldown=timedelta(0)))
    world.run("cron")
    world.alert("drift")
    world.drain()
    world.now = NOON + 30 * MINUTE
    world.paused = True
    world.alert("lateness")
    world.drain()
    world.now = NOON + 2 * HOUR
    world.snooze(None)
    world.now = NOON + 3 * HOUR
    world.run("cron 2")
    looks = simulate(world.events, AdmissionPolicy(cooldown=HOUR)).courses[0].would
    assert outcomes_of(looks) == ["12:00 hold cooldown", "13:00 hold paused"]


def test_alerts_that_go_another_way_are_looked_at_when_they_are_resolved():
    world = World(AdmissionPolicy(cooldown=timedelta(0)))
    world.run("cron")
    world.alert("drift")
    world.drain()
    world.now += HOUR
    world.alert("drift", status="resolved")
    world.drain()
    looks = simulate(world.events, AdmissionPolicy(cooldown=12 * HOUR)).courses[0].would
    assert outcomes_of(looks) == ["12:00 hold cooldown", "13:00 drop resolved"]


def test_alerts_that_go_another_way_are_looked_at_when_a_snooze_is_set_or_ended():
    world = World(AdmissionPolicy(cooldown=timedelta(0)))
    world.run("cron")
    world.alert("drift")
    world.drain()
    world.now = NOON + 30 * MINUTE
    world.snooze(NOON + 8 * HOUR)
    world.now = NOON + 2 * HOUR
    world.snooze(None)
    world.now = NOON + 9 * HOUR
    world.run("cron 2")
    looks = simulate(world.events, AdmissionPolicy(cooldown=HOUR)).courses[0].would
    assert outcomes_of(looks) == ["12:00 hold cooldown", "12:30 hold snooze", "14:00 retrain retrain"]


def test_a_run_asked_for_at_one_look_is_not_changed_at_a_later_one():
    """The run of the first alert waits from one to four; the other alert wants newer data than that was asked to see."""
    world = World(AdmissionPolicy(dedupe=timedelta(0), cooldown=timedelta(0)))
    world.run("cron")
    first = world.one(world.alert("data/p", sender="data", as_of=NOON - DAY))
    world.now = NOON + MINUTE
    assert world.one(world.alert("drift", as_of=NOON)).outcome == "retrain"
    world.now = NOON + 3 * HOUR
    world.run(first.run_id, as_of=NOON - DAY)
    policy = AdmissionPolicy(cooldown=HOUR, confirm=Confirm(windows="2 of 2", each=45 * MINUTE))
    data, drift = simulate(world.events, policy).courses
    assert outcomes_of(data.would) == ["12:00 hold cooldown", "13:00 retrain retrain"]
    assert outcomes_of(drift.would) == ["12:01 hold confirm", "13:31 drop confirm"]


def test_an_alert_that_nobody_looked_at_is_not_looked_at():
    world = World()
    world.alert()
    replay = simulate(world.events, AdmissionPolicy(cooldown=timedelta(0)))
    assert (replay.was.waiting, replay.would.waiting, replay.differences) == (1, 1, ())


def test_a_report_begins_where_it_is_asked_to():
    replay = simulate(a_day().events, since=NOON + 3 * HOUR)
    assert [course.alert.fingerprint for course in replay.courses] == ["lateness"]
    assert (replay.was.alerts, replay.was.runs, replay.was.merged) == (1, 0, 1)


def test_a_pack_without_alerts_is_replayed_to_nothing():
    replay = simulate([])
    assert (replay.courses, replay.was.alerts, replay.was.device_hours) == ((), 0, 0)


def test_a_decision_that_was_made_otherwise_is_reported_against_the_policy_in_force():
    """An edited sentence is found, without any other policy."""
    world = a_day()
    events = [
        replace(event, body=event.body | {"reason": "because"}) if event.body.get("rule") == "retrain" else event
        for event in world.events
    ]
    (course,) = simulate(events).differences
    assert course.was[-1].decision.reason == "because"
    assert course.would[-1].decision.reason == "no run answers it yet, and no rule holds it back"


def test_three_thousand_alerts_are_replayed_exactly():
    """And under a brake, they are one run."""
    world = World(AdmissionPolicy())
    for number in range(3000):
        world.alert(str(number))
    world.drain()
    world.confirm()
    assert differences(simulate(world.events)) == []
    assert simulate(world.events, AdmissionPolicy(brake=9)).would.runs == 1


@pytest.mark.prove
def test_a_thousand_long_histories_are_replayed_exactly():
    for seed in range(1000):
        policy, calendar = POLICIES[seed % len(POLICIES)], CALENDARS[seed % len(CALENDARS)]
        assert differences(simulate(lived(seed, 300, POLICIES, calendar).events)) == []
        assert differences(simulate(lived(seed, 300, [policy], calendar).events, policy)) == []


# With the inbox and the loop that there are.


class Airflow:
    """Runs exist as soon as they are made."""

    def __init__(self):
        self.there, self.paused = set(), False

    def is_paused(self, _pack):
        return self.paused

    def run_exists(self, _pack, run_id):
        return run_id in self.there

    def run_failed(self, _pack, _run_id):
        return False


def test_what_a_real_inbox_holds_is_replayed_exactly(tmp_path):
    folder = tmp_path / "packs" / "more"
    folder.mkdir(parents=True)
    (folder / "pack.yaml").write_text(PACK)
    (folder / "model.py").touch()
    home = Settings.from_env({"EVERGREEN_HOME": str(tmp_path / "home")}).model_copy(update={"packs": folder.parent})
    database, pack, airflow = connect(home.database_url), load(folder.parent, "more"), Airflow()
    rng, now = random.Random(7), datetime.now(UTC)
    for step in range(60):
        now = max(now + rng.choice(SPANS[:6]), datetime.now(UTC))
        fingerprint, status = rng.choice("abc"), rng.choice(["firing"] * 6 + ["resolved"])
        as_of = rng.choice([None, None, now - DAY])
        inbox.keep(database, "more", [NewAlert("me", str(step), "it drifts", fingerprint, as_of, status=status)])
        airflow.paused = rng.random() < 0.1
        for start in loop.admit(home, airflow, now):
            if rng.random() < 0.8:
                airflow.there.add(start.run_id)
                begin_run(
                    home, pack, start.run_id, as_of=None, scheduled=datetime.now(UTC), reason=start.conf["reason"]
                )
        if rng.random() < 0.5:
            loop.confirm(home, airflow)
    events = database.events("more")
    replay = simulate(events)
    assert len(replay.courses) == 60
    assert replay.was.runs > 0
    assert replay.was.held > 0
    assert replay.was.dropped > 0
    assert differences(replay) == []
    assert differences(simulate(events, pack.triggers.admission)) == []
    assert all(again(event) == decision_of(event) for event in events if event.kind in ("intent", "decision"))
