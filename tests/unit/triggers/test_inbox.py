"""Claims about the inbox, on SQLite and on PostgreSQL: what comes in is kept once, and decided once."""

from datetime import UTC, datetime, timedelta

import pytest
import sqlalchemy as sa

from evergreen.database import Database, events, undecided
from evergreen.errors import DatabaseError
from evergreen.triggers import inbox
from evergreen.triggers.admission import Decision
from evergreen.triggers.inbox import NewAlert, Ruling

POLICY = {"dedupe": "1h"}
SEEN = {"paused": False}
CONF = {"as_of": None, "reason": "me: r", "force": False}
LATER = timedelta(hours=1)


@pytest.fixture
def database(url):
    made = Database(url)
    yield made
    made.engine.dispose()


def alert(number, sender="me", **more):
    return NewAlert(**{"sender": sender, "sender_id": f"{number}", "reason": "r", "fingerprint": f"f{number}", **more})


def keep(database, count, pack="digits"):
    return inbox.keep(database, pack, [alert(number) for number in range(count)])


def now():
    return datetime.now(UTC)


def record(database, decisions, *, pack="digits", after=None, conf=None, at=None):
    rulings = [Ruling(decision, SEEN, conf) for decision in decisions]
    head = database.latest(pack).position if after is None else after
    return inbox.record(database, pack, rulings, policy=POLICY, now=at or now(), after=head)


def hold(key, until, reason="it waits"):
    return Decision(key, "hold", "cooldown", reason, until=until)


def retrain(key, run_id="alert__1"):
    return Decision(key, "retrain", "retrain", "nothing speaks against it", run_id=run_id)


def drop(key, reason="the same complaint"):
    return Decision(key, "drop", "dedupe", reason)


def finals(database, key):
    return [event for event in database.events(key=key, kind="decision") if event.body["outcome"] != "hold"]


def due_ids(database, at=None, pack="digits"):
    return [found.id for found in inbox.due(database, pack, at or now())]


def test_an_alert_comes_back_as_it_was_kept(database):
    """All that a sender said is in the inbox, and when it was written down."""
    as_of = datetime(2024, 5, 1, 6, tzinfo=UTC)
    said = alert(1, reason="ü \ud83d\0", as_of=as_of, evidence={"psi": 0.3}, status="resolved", fingerprint="x" * 5000)
    [key] = inbox.keep(database, "digits", [said])
    [found] = inbox.due(database, "digits", now())
    assert (found.id, found.pack, found.sender, found.reason) == (key, "digits", "me", said.reason)
    assert (found.fingerprint, found.as_of, found.evidence, found.status) == (
        "x" * 5000,
        as_of,
        {"psi": 0.3},
        "resolved",
    )
    assert found.at == database.latest("digits", kind="alert").at


def test_a_repeat_gets_the_first_answer_and_is_not_kept(database):
    """The same sender's same id is the same alert, beside it in one call or later, whatever else it says."""
    first = inbox.keep(database, "digits", [alert(1), alert(2), alert(1, reason="another")])
    assert first[0] == first[2] != first[1]
    assert inbox.keep(database, "digits", [alert(2, fingerprint="g"), alert(3)])[0] == first[1]
    assert len(database.events("digits", kind="alert")) == 3
    record(database, [drop(first[0])])
    assert inbox.keep(database, "digits", [alert(1)]) == first[:1]
    assert first[0] not in due_ids(database)


def pass_silence(database):
    """Let everything so far be an hour old."""
    with database.writing() as connection:
        for table, column in ((events, events.c.at), (undecided, undecided.c.due_at)):
            for row in connection.execute(sa.select(table)).mappings().all():
                earlier = (datetime.fromisoformat(row[column.name]) - LATER).isoformat(timespec="microseconds")
                key = next(iter(table.primary_key.columns))
                change = sa.update(table).where(key == row[key.name]).values({column.name: earlier})
                connection.execute(change)


def heard(database, key):
    return [event.position for event in database.events(key=key, kind="heard")]


def test_a_repeat_later_is_heard_and_its_alert_considered_again(database):
    """It keeps its id and its first message; the last that the sender said is in the event."""
    [key] = keep(database, 1)
    record(database, [drop(key)])
    pass_silence(database)
    assert inbox.keep(database, "digits", [alert(0, reason="worse")]) == [key]
    [again] = inbox.due(database, "digits", now())
    assert (again.id, again.reason, again.reopened) == (key, "worse", database.latest("digits").position)
    assert inbox.heard_of(database, [key])[key][0] == 1
    [(listed, last)] = inbox.alerts_of(database)
    assert (listed.reason, last.body["outcome"]) == ("r", "drop")


def test_a_storm_of_repeats_is_written_down_once_in_thirty_seconds(database):
    """A thousand at once, and a thousand a little later."""
    [key] = keep(database, 1)
    for _ in range(3):
        pass_silence(database)
        for _ in range(3):
            assert inbox.keep(database, "digits", [alert(0)] * 300) == [key] * 300
    assert len(heard(database, key)) == 3


def test_repeats_are_written_down_twice_in_a_window_that_is_shorter(database):
    """By the policy of the newest decision: else they could not confirm."""
    [key] = keep(database, 1)
    policy = {"confirm": {"windows": "2 of 3", "each": "1s"}}
    ruling = Ruling(hold(key, now() + LATER), SEEN)
    inbox.record(database, "digits", [ruling], policy=policy, now=now(), after=database.latest("digits").position)
    began = now()
    while not heard(database, key):
        assert now() - began < timedelta(seconds=20)
        keep(database, 1)
    assert now() - began >= timedelta(seconds=0.4)


def test_a_repeat_of_a_held_alert_lets_it_be_looked_at(database):
    """It may confirm now; its place in the order and what it was held for stay."""
    [key] = keep(database, 1)
    record(database, [hold(key, now() + 3 * LATER)])
    pass_silence(database)
    before = rows(database)
    keep(database, 1)
    assert rows(database) == before
    [found] = inbox.due(database, "digits", now())
    assert (found.id, found.reopened) == (key, None)


def test_a_repeat_of_an_alert_whose_run_is_asked_for_leaves_it_alone(database):
    """The run is on its way."""
    [key] = keep(database, 1)
    record(database, [retrain(key)], conf=CONF)
    pass_silence(database)
    keep(database, 1)
    assert len(heard(database, key)) == 1
    assert due_ids(database) == []
    assert [event.key for event in inbox.intended(database)] == [key]


def test_a_repeat_that_comes_while_its_alert_is_decided_is_not_lost(database):
    """The decision stands; the alert is looked at again."""
    [key] = keep(database, 1)
    head = database.latest("digits").position
    pass_silence(database)
    keep(database, 1)
    assert record(database, [drop(key)], after=head)
    [again] = inbox.due(database, "digits", now())
    assert (again.id, again.reopened) == (key, heard(database, key)[0])


def test_an_alert_that_keeps_its_decision_leaves_no_trace(database):
    """Unless it was held in between: then the hold has an end."""
    [key] = keep(database, 1)
    record(database, [drop(key)])
    for holds in (False, True):
        pass_silence(database)
        keep(database, 1)
        if holds:
            record(database, [hold(key, now())])
        number = len(database.events("digits"))
        ruling = Ruling(drop(key), SEEN, stays=True)
        after = database.latest("digits").position
        assert inbox.record(database, "digits", [ruling], policy=POLICY, now=now(), after=after)
        assert len(database.events("digits")) == number + holds
        assert due_ids(database) == []


@pytest.mark.parametrize(
    ("first", "again"),
    [
        ({"sender": "data"}, {"sender": "data"}),
        ({"status": "resolved"}, {"status": "resolved"}),
    ],
    ids=["new data", "resolved"],
)
def test_what_is_no_complaint_is_not_heard_again(database, first, again):
    """New data is read again every minute; a complaint is over once."""
    [key] = inbox.keep(database, "digits", [alert(1, **first)])
    pass_silence(database)
    assert inbox.keep(database, "digits", [alert(1, **again)]) == [key]
    assert heard(database, key) == []


def test_a_complaint_that_is_over_is_not_heard_again(database):
    """A message of the same firing that comes late, as from another of several Alertmanagers."""
    firing, over = alert("a firing", ended_by="a resolved"), alert("a resolved", status="resolved")
    [key] = inbox.keep(database, "digits", [firing])
    inbox.keep(database, "digits", [over])
    pass_silence(database)
    assert inbox.keep(database, "digits", [firing]) == [key]
    assert heard(database, key) == []


def test_the_index_made_again_holds_what_was_heard_again(database):
    """As it was."""
    keys = keep(database, 2)
    record(database, [drop(keys[0]), hold(keys[1], now() + LATER)])
    pass_silence(database)
    keep(database, 2)
    before = rows(database)
    inbox.rebuild(database, "digits")
    assert rows(database) == before
    assert due_ids(database) == [keys[1], keys[0]]


def test_ids_tell_packs_senders_and_messages_apart(database):
    """One sender's id of a message means nothing in another pack or from another sender."""
    ids = {inbox.alert_id(*told) for told in [("a", "b", "c"), ("a", "b", "d"), ("a", "c", "c"), ("b", "b", "c")]}
    assert len(ids) == 4
    assert all(len(key) == len("alert-") + 20 for key in ids)


def test_due_alerts_come_in_the_order_in_which_they_were_kept(database):
    """Position decides, not the alert's id."""
    assert due_ids(database) == []
    ids = keep(database, 20)
    assert due_ids(database) == ids
    assert ids != sorted(ids)


def test_packs_with_something_due_are_named(database):
    """A pack whose alerts are all held until later is not due, and one whose are decided neither."""
    for pack in ("a", "b", "c"):
        keep(database, 1, pack)
    until = now() + LATER
    record(database, [hold(inbox.alert_id("a", "me", "0"), until)], pack="a")
    record(database, [drop(inbox.alert_id("c", "me", "0"))], pack="c")
    assert inbox.packs_due(database, now()) == ["b"]
    assert inbox.packs_due(database, until) == ["a", "b"]


def test_a_final_decision_is_kept_with_all_it_was_made_from(database):
    """The event has the outcome, the sentence, the policy, the instant and what was seen."""
    [key] = keep(database, 1)
    at = now()
    record(database, [drop(key)], at=at)
    event = database.latest("digits")
    assert (event.kind, event.key, event.run_id) == ("decision", key, None)
    assert event.body == {
        "outcome": "drop",
        "rule": "dedupe",
        "reason": "the same complaint",
        "until": None,
        "policy": POLICY,
        "now": at.isoformat(),
        "seen": SEEN,
    }


def test_an_alert_is_decided_finally_once(database):
    """A later decision of it is not written, nor what was decided with it."""
    [key, other] = keep(database, 2)
    assert record(database, [drop(key)])
    for later in (drop(key), hold(key, now() + LATER), retrain(key)):
        assert not record(database, [drop(other), later])
        assert not record(database, [later], conf=CONF)
    assert [(event.key, event.body["outcome"]) for event in database.events(kind="decision")] == [(key, "drop")]
    assert (due_ids(database), database.events(kind="intent")) == ([other], [])


def test_a_held_alert_is_due_again_when_its_hold_says(database):
    """Not before, and from that instant on."""
    [key] = keep(database, 1)
    until = now() + LATER
    record(database, [hold(key, until)])
    assert due_ids(database, until - timedelta(microseconds=1)) == []
    assert due_ids(database, until) == [key]
    assert database.latest("digits").body["until"] == until.isoformat()


def test_a_hold_that_says_the_same_again_is_not_written_again(database):
    """A pack that is paused for a month does not fill the table with one sentence; another sentence is written."""
    [key] = keep(database, 1)
    until = now()
    for _ in range(3):
        until += LATER
        record(database, [hold(key, until, "the pack is paused")])
    assert len(database.events(kind="decision")) == 1
    assert due_ids(database, until - timedelta(seconds=1)) == []
    record(database, [hold(key, until, "its cool-down lasts")])
    assert len(database.events(kind="decision")) == 2


def test_a_run_that_is_asked_for_is_an_intent_until_it_exists(database):
    """Only then is the decision final, and it repeats what the intent said."""
    keys = keep(database, 3)
    merged = Decision(keys[1], "merge", "merge", "that run has not begun", run_id="alert__1")
    record(database, [retrain(keys[0]), merged, retrain(keys[2], "alert__2")], conf=CONF)
    assert due_ids(database, now() + 10 * LATER) == []
    assert [intent.key for intent in inbox.intended(database, "digits")] == keys
    inbox.finish(database, "digits", {"alert__1", "of another"})
    assert [intent.key for intent in inbox.intended(database)] == keys[2:]
    for key in keys[:2]:
        [intent], [final] = database.events(key=key, kind="intent"), finals(database, key)
        assert intent.body.pop("conf") == CONF
        assert (final.body, final.run_id) == (intent.body | {"until": None}, "alert__1")
    inbox.finish(database, "digits", {"alert__1"})
    assert [len(finals(database, key)) for key in keys] == [1, 1, 0]


def test_a_run_that_was_asked_for_in_vain_is_looked_at_again(database):
    """An intent is due some time after it was written, and when it was put off."""
    [key] = keep(database, 1)
    at = now()
    record(database, [retrain(key)], conf=CONF, at=at)
    assert inbox.intended(database, "digits", due_at=at) == []
    assert [event.key for event in inbox.intended(database, "digits", due_at=at + inbox.ASK_AGAIN)] == [key]
    inbox.put_off(database, "digits", {key: at + LATER})
    assert inbox.packs_due(database, at + LATER - timedelta(seconds=1)) == []
    assert inbox.packs_due(database, at + LATER) == ["digits"]


@pytest.mark.parametrize("kind", inbox.MATTERS)
def test_what_was_decided_on_a_past_that_is_gone_is_not_written(database, kind):
    """Whatever happened after the last event seen, and could matter, is seen first."""
    [key] = keep(database, 1)
    head = database.latest("digits").position
    database.append("digits", kind, {})
    assert not record(database, [drop(key)], after=head)
    assert due_ids(database) == [key]
    assert record(database, [drop(key)])


def test_alerts_that_come_while_others_are_decided_change_nothing(database):
    """A storm must not keep admission from ending; another pack's events are another pack's."""
    [key] = keep(database, 1)
    head = database.latest("digits").position
    keep(database, 2)
    database.append("other", "run", {})
    assert record(database, [drop(key)], after=head)


def test_a_resolved_alert_brings_the_ones_it_ends(database):
    """Held alerts of its fingerprint are looked at with it, others stay where they are."""
    held = inbox.keep(database, "digits", [alert(1, fingerprint="cpu"), alert(2, fingerprint="disk")])
    record(database, [hold(key, now() + LATER) for key in held])
    [resolved] = inbox.keep(database, "digits", [alert(3, fingerprint="cpu", status="resolved")])
    assert due_ids(database) == [held[0], resolved]


def test_only_the_history_that_can_matter_is_read(database):
    """Of each kind what is recent enough for it, in order; of some the newest only; the rest is left where it is."""
    begun = now()
    for number in range(2):
        for kind in ("snooze", "run", "alert", "verdict", "stage"):
            database.append("digits", kind, {"n": number})
        database.append("other", "run", {})
        if number == 0:
            with database.writing() as connection:
                connection.execute(sa.update(events).values(at=(begun - LATER).isoformat()))
    reach = {"snooze": None, "promotion": None, "run": LATER, "alert": LATER / 2, "stage": 2 * LATER}
    found = inbox.history(database, "digits", reach, before=begun)
    assert [(event.kind, event.body["n"]) for event in found] == [
        ("run", 0),
        ("stage", 0),
        ("snooze", 1),
        ("run", 1),
        ("alert", 1),
        ("stage", 1),
    ]


def test_a_snooze_is_kept_and_held_alerts_are_looked_at_again(database):
    """Its end by hand as well: what waits for its old end must not wait on."""
    [key] = keep(database, 1)
    record(database, [hold(key, now() + LATER)])
    until = now() + LATER
    event = inbox.snooze(database, "digits", until=until, why="a holiday", by="ada")
    assert event.body == {"until": until.isoformat(), "why": "a holiday", "by": "ada"}
    assert due_ids(database) == [key]
    record(database, [hold(key, until)])
    assert inbox.snooze(database, "digits", until=None, why="back", by="ada").body["until"] is None
    assert due_ids(database) == [key]


def rows(database):
    with database.reading() as connection:
        found = connection.execute(sa.select(undecided).order_by(undecided.c.pack, undecided.c.position))
        return [(row.alert, row.pack, row.position, row.run_id, row.held) for row in found]


def test_the_index_can_be_made_again_from_the_events(database):
    """Altered or emptied, it says after that what it said before; what is final stays final."""
    keys = keep(database, 5)
    until = now() + LATER
    record(database, [hold(keys[1], until)])
    record(database, [drop(keys[2])])
    record(database, [retrain(keys[3]), retrain(keys[4], "alert__2")], conf=CONF)
    inbox.finish(database, "digits", {"alert__2"})
    keep(database, 1, "other")
    before, soon = rows(database), now()
    assert len(before) == 4
    with database.writing() as connection:
        connection.execute(sa.delete(undecided).where(undecided.c.alert.in_(keys[:2])))
        connection.execute(sa.insert(undecided).values(alert=keys[2], pack="digits", position=3, due_at="2"))
    assert inbox.rebuild(database, "digits") == 3
    assert rows(database) == before
    assert (due_ids(database, soon), due_ids(database, until)) == (keys[:1], keys[:2])


def test_a_row_that_is_gone_lets_nobody_decide(database):
    """The row is what a final decision takes: without it none is written, and the index is made again first."""
    [key] = keep(database, 1)
    with database.writing() as connection:
        connection.execute(sa.delete(undecided))
    assert not record(database, [drop(key)])
    inbox.rebuild(database, "digits")
    record(database, [drop(key)])
    assert len(finals(database, key)) == 1


def test_a_failure_in_the_middle_keeps_nothing(database):
    """Alerts that come together are kept together or not at all."""
    database.append("digits", "run", {})
    with database.writing() as connection:
        connection.exec_driver_sql("ALTER TABLE undecided RENAME TO gone")
    with pytest.raises(DatabaseError, match="undecided"):
        keep(database, 3)
    assert database.events(kind="alert") == []
    with database.writing() as connection:
        connection.exec_driver_sql("ALTER TABLE gone RENAME TO undecided")
    assert len(keep(database, 3)) == 3


def test_alerts_are_listed_with_what_became_of_them(database):
    """Newest first: undecided, held, intended, final."""
    keys = keep(database, 4)
    record(database, [hold(keys[1], now() + LATER)])
    record(database, [retrain(keys[2]), retrain(keys[3], "alert__2")], conf=CONF)
    inbox.finish(database, "digits", {"alert__2"})
    listed = [(found.id, last and (last.kind, last.body["outcome"])) for found, last in inbox.alerts_of(database)]
    assert listed == [
        (keys[3], ("decision", "retrain")),
        (keys[2], ("intent", "retrain")),
        (keys[1], ("decision", "hold")),
        (keys[0], None),
    ]
    keep(database, 1, "other")
    assert len(inbox.alerts_of(database)) == 5
    assert [found.id for found, _ in inbox.alerts_of(database, "digits", limit=1)] == keys[3:]
    assert inbox.alerts_of(database, since=now()) == []


def test_decisions_are_listed_newest_first(database):
    """Holds among them; of one pack or of all, since an instant or all."""
    keys = keep(database, 2)
    record(database, [hold(keys[0], now() + LATER), drop(keys[1])])
    between = now()
    record(database, [drop(keys[0])])
    outcomes = [event.body["outcome"] for event in inbox.decisions_of(database, "digits")]
    assert outcomes == ["drop", "drop", "hold"]
    assert [event.key for event in inbox.decisions_of(database, since=between)] == keys[:1]
    assert inbox.decisions_of(database, "other") == []


def test_the_chain_holds_after_all_of_this(database):
    """Many events in one transaction are chained as single ones are."""
    keys = keep(database, 50)
    record(database, [drop(key) for key in keys[:25]])
    record(database, [retrain(key) for key in keys[25:]], conf=CONF)
    inbox.finish(database, "digits", {"alert__1"})
    assert [event.position for event in database.events("digits")] == list(range(1, 126))
    assert database.first_bad("digits") is None
