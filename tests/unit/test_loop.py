"""Claims about admission where its rooms meet: the inbox, the rules, and whoever runs the training."""

import json
from datetime import UTC, datetime, timedelta

import pytest
import sqlalchemy as sa

from evergreen import database as db
from evergreen import loop
from evergreen.errors import DatabaseError, StageError
from evergreen.history import history_of, runs_of
from evergreen.keys import begin
from evergreen.loop import Start, admit, confirm, data_arrived
from evergreen.loop.monitor import Watched, alert_of
from evergreen.pack import load
from evergreen.run import Window
from evergreen.settings import Settings
from evergreen.triggers import inbox
from evergreen.triggers.admission import again, decision_of
from evergreen.triggers.inbox import NewAlert
from evergreen.triggers.messages import BODY_BYTES

PACK = """
description: Is it more?
owner: tests@example.com
source: {kind: csv, path: rows.csv}
data: {target: more, event_time: at, train: 62d, validation: 31d, holdout: 31d}
training: {call: "model:train"}
gate: {primary: {metric: roc_auc}}
triggers: {admission: {dedupe: 0s, cooldown: 0s}}
"""
MINUTE = timedelta(minutes=1)


class Runs:
    """The runs there are, as Airflow would answer for them."""

    def __init__(self):
        self.there = set()
        self.failed = set()
        self.paused = {}
        self.asked = []
        self.meanwhile = None
        """What happens while it is asked."""

    def is_paused(self, pack):
        self._ask(pack)
        return self.paused.get(pack, False)

    def run_exists(self, pack, run_id):
        self._ask(pack)
        return (pack, run_id) in self.there

    def run_failed(self, pack, run_id):
        self._ask(pack)
        return (pack, run_id) in self.failed

    def _ask(self, pack):
        self.asked.append(pack)
        if self.meanwhile:
            self.meanwhile(pack)

    def make(self, starts):
        self.there |= {(start.pack, start.run_id) for start in starts}


@pytest.fixture
def runs():
    return Runs()


@pytest.fixture
def settings(tmp_path):
    made = Settings.from_env({"EVERGREEN_HOME": str(tmp_path / "home")})
    return made.model_copy(update={"packs": tmp_path / "packs"})


@pytest.fixture
def database(settings):
    for pack in ("less", "more"):
        write(settings, pack)
    return db.connect(settings.database_url)


def write(settings, pack, text=PACK):
    folder = settings.packs / pack
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pack.yaml").write_text(text)
    (folder / "model.py").touch()


def keep(database, *reasons, pack="more", **more):
    alerts = [NewAlert("me", reason, reason, more.get("fingerprint", reason), more.get("as_of")) for reason in reasons]
    return inbox.keep(database, pack, alerts)


def soon(after=timedelta(0)):
    return datetime.now(UTC) + after


def last_of(database, key):
    """Kind and outcome of the last that was decided of an alert."""
    event = database.latest(key=key, kind=("intent", "decision"))
    return event and (event.kind, event.body["outcome"])


def finals(database):
    return [event.key for event in database.events(kind="decision") if event.body["outcome"] != "hold"]


def test_an_alert_asks_for_one_run_and_is_final_once_that_exists(settings, database, runs):
    """The run has the alert's as-of and its reason, and an id that says which alert it answers."""
    [key] = keep(database, "it drifts", as_of=datetime(2024, 5, 1, tzinfo=UTC))
    [start] = admit(settings, runs)
    conf = {"as_of": "2024-05-01T00:00:00+00:00", "reason": "me: it drifts", "force": False}
    assert start == Start("more", f"alert__{key.removeprefix('alert-')}", conf)
    confirm(settings, runs)
    assert last_of(database, key) == ("intent", "retrain")
    runs.make([start])
    confirm(settings, runs)
    confirm(settings, runs)
    assert (last_of(database, key), finals(database)) == (("decision", "retrain"), [key])
    assert admit(settings, runs, soon(10 * MINUTE)) == []


def test_alerts_of_one_pass_are_one_run(settings, database, runs):
    """The others merge into it, and its reason says how many there are."""
    keys = keep(database, "a", "b", "c")
    [start] = admit(settings, runs)
    assert start.conf["reason"] == "me: a (and 2 more alerts)"
    assert [last_of(database, key)[1] for key in keys] == ["retrain", "merge", "merge"]
    runs.make([start])
    confirm(settings, runs)
    assert finals(database) == keys


def test_every_decision_can_be_made_again_from_its_row(settings, database, runs):
    """Also those that are intents first, and holds."""
    keep(database, "a", "b", "c")
    keep(database, "d", pack="less")
    runs.paused = {"less": True}
    runs.make(admit(settings, runs))
    confirm(settings, runs)
    decided = database.events(kind=("intent", "decision"))
    assert len(decided) == 7
    assert [again(event) for event in decided] == [decision_of(event) for event in decided]


def test_packs_with_nothing_due_cost_nothing(settings, database, runs):
    """Whether they are paused is not asked."""
    keep(database, "a")
    admit(settings, runs)
    assert set(runs.asked) == {"more"}
    runs.asked.clear()
    assert (admit(settings, runs), runs.asked) == ([], [])


def test_a_paused_pack_holds_its_alerts_until_it_is_not(settings, database, runs):
    """Nothing is lost meanwhile, and the table does not grow by a row a minute."""
    [key] = keep(database, "a")
    runs.paused = {"more": True}
    for minutes in range(3):
        assert admit(settings, runs, soon(minutes * 1.1 * MINUTE)) == []
    assert [event.body["rule"] for event in database.events(kind="decision")] == ["paused"]
    runs.paused = {}
    [start] = admit(settings, runs, soon(4 * MINUTE))
    assert start.run_id.removeprefix("alert__") == key.removeprefix("alert-")


def test_a_broken_pack_holds_its_own_alerts_only(settings, database, runs):
    """The hold says what is wrong with it; the other packs' alerts are decided; mended, it goes on."""
    [broken] = keep(database, "a", pack="less")
    keep(database, "b")
    write(settings, "less", PACK + "colour: red\n")
    [other] = admit(settings, runs)
    runs.make([other])
    assert other.pack == "more"
    held = database.latest(key=broken, kind="decision")
    assert (held.body["rule"], "colour: unknown key" in held.body["reason"]) == ("broken", True)
    write(settings, "less")
    assert [start.pack for start in admit(settings, runs, soon(1.1 * MINUTE))] == ["less"]


def test_a_pack_that_fails_stops_no_other(settings, database, runs, caplog):
    """It is logged and put off, not tried again at once, and decided when what failed works again."""
    [key] = keep(database, "a", pack="less")
    keep(database, "b")

    def fail(pack):
        if pack == "less":
            raise ConnectionError("Airflow is away")

    runs.meanwhile = fail
    [other] = admit(settings, runs)
    runs.make([other])
    assert other.pack == "more"
    assert "admission of less failed" in caplog.text
    assert inbox.packs_due(database, soon()) == []
    runs.meanwhile = None
    [start] = admit(settings, runs, soon(1.1 * MINUTE))
    assert (start.pack, last_of(database, key)) == ("less", ("intent", "retrain"))


def test_a_pack_whose_runs_cannot_be_read_back_stops_no_other(settings, database, runs, caplog):
    """Neither when runs are asked for again nor when they are confirmed."""
    keep(database, "a", pack="less")
    [key] = keep(database, "b")
    runs.make(admit(settings, runs))

    def fail(pack):
        if pack == "less":
            raise ConnectionError("Airflow is away")

    runs.meanwhile = fail
    confirm(settings, runs)
    assert finals(database) == [key]
    assert admit(settings, runs, soon(MINUTE)) == []
    assert "admission of less failed" in caplog.text
    assert inbox.packs_due(database, soon(1.5 * MINUTE)) == []
    runs.meanwhile = None
    admit(settings, runs, soon(2.1 * MINUTE))
    assert len(finals(database)) == 2


def test_a_run_that_nobody_started_is_asked_for_again(settings, database, runs):
    """By the same id and with the same words, after some time and not before: its start may be on its way."""
    keep(database, "a", "b")
    first = admit(settings, runs)
    assert admit(settings, runs, soon(inbox.ASK_AGAIN / 2)) == []
    for minutes in (1, 2):
        assert admit(settings, runs, soon(minutes * MINUTE)) == first
    assert finals(database) == []


def test_a_run_in_vain_is_asked_for_ever_more_seldom(settings, database, runs):
    """A pack that is gone for good costs next to nothing after a month, and nothing is asked of a DAG that is gone."""
    keep(database, "a")
    [start] = admit(settings, runs)
    month = timedelta(days=30)
    assert admit(settings, runs, soon(month)) == [start]
    assert admit(settings, runs, soon(month + timedelta(days=2))) == []
    runs.paused = {"more": None}
    assert admit(settings, runs, soon(2 * month)) == []
    assert inbox.packs_due(database, soon(2 * month)) == []


def test_a_run_that_exists_unconfirmed_becomes_final(settings, database, runs):
    """Killed between starting the run and confirming it, the next pass does the rest and starts nothing."""
    [key] = keep(database, "a")
    runs.make(admit(settings, runs))
    assert admit(settings, runs, soon(MINUTE)) == []
    assert last_of(database, key) == ("decision", "retrain")


def test_two_passes_at_once_decide_once(settings, database, runs):
    """What another pass wrote while this one was deciding is seen before anything is written."""
    keys = keep(database, "a", "b")
    others = []

    def meanwhile(pack):
        runs.meanwhile = None
        others.append(admit(settings, runs))

    runs.meanwhile = meanwhile
    assert admit(settings, runs) == []
    assert len(others[0]) == 1
    assert len(database.events(kind="intent")) == len(keys)


def test_a_run_that_begins_while_its_alerts_are_decided_is_seen(settings, database, runs):
    """What is written down was decided on all that had happened."""
    write(settings, "more", PACK.replace("cooldown: 0s", "cooldown: 6h"))
    [key] = keep(database, "a", as_of=datetime(2099, 1, 1, tzinfo=UTC))

    def meanwhile(pack):
        runs.meanwhile = None
        body = {"as_of": "2024-01-01T00:00:00+00:00", "reason": "the schedule", "force": False}
        database.append("more", "run", body, run_id="scheduled__1")

    runs.meanwhile = meanwhile
    assert admit(settings, runs) == []
    event = database.latest(key=key, kind="decision")
    assert (event.body["rule"], "scheduled__1" in event.body["reason"]) == ("cooldown", True)


def test_a_past_that_never_rests_is_left_to_the_next_pass(settings, database, runs, caplog, monkeypatch):
    """It is tried a few times, then logged; the alert stays due."""
    keep(database, "a")
    read = inbox.history

    def read_and_write(*asked, **more):
        inbox.snooze(database, "more", until=None, why="a test", by="me")
        return read(*asked, **more)

    monkeypatch.setattr(inbox, "history", read_and_write)
    assert admit(settings, runs) == []
    assert (len(database.events(kind="snooze")), "its past changed 5 times" in caplog.text) == (loop.TRIES, True)
    assert inbox.packs_due(database, soon()) == ["more"]


def test_an_alert_that_a_run_answers_already_is_final_at_once(settings, database, runs):
    """The run began after it was written down: there is nothing to start and nothing to wait for."""
    [key] = keep(database, "a", as_of=datetime(2024, 1, 1, tzinfo=UTC))
    body = {"as_of": "2024-05-01T00:00:00+00:00", "reason": "a person asked", "force": False}
    database.append("more", "run", body, run_id="manual__1")
    assert admit(settings, runs) == []
    final = database.latest(key=key, kind="decision")
    assert (final.body["outcome"], final.run_id) == ("merge", "manual__1")


def test_a_waiting_run_that_was_deleted_is_asked_for_again(settings, database, runs):
    """An alert merges into it; as it does not exist, it is made again with what it was to be told."""
    keep(database, "a")
    [start] = admit(settings, runs)
    runs.make([start])
    confirm(settings, runs)
    [late] = keep(database, "b")
    assert admit(settings, runs) == []
    assert last_of(database, late) == ("decision", "merge")
    runs.there.clear()
    [later] = keep(database, "c")
    assert admit(settings, runs) == [start]
    assert last_of(database, later) == ("intent", "merge")


def test_new_data_is_an_alert_once(settings, database, runs):
    """However often its event is heard of; another event is another alert."""
    at = datetime(2024, 5, 1, tzinfo=UTC)
    first = data_arrived(settings, "more", "event 1", at, "a loading DAG")
    assert data_arrived(settings, "more", "event 1", at, "a loading DAG") == first
    assert data_arrived(settings, "more", "event 2", at, "a loading DAG") != first
    evidence = {"event": "event 1", "at": at.isoformat(), "by": "a loading DAG"}
    assert inbox.due(database, "more", soon())[0].evidence == evidence
    [start] = admit(settings, runs)
    assert start.conf["reason"] == "data: new data in data/more (and 1 more alert)"


def hear_again(database, reason="a"):
    """An hour passes, and the message of an alert comes again."""
    with database.writing() as connection:
        for event in database.events("more", kind=("alert", "heard")):
            earlier = (event.at - 60 * MINUTE).isoformat()
            chosen = (db.events.c.pack == "more") & (db.events.c.position == event.position)
            connection.execute(sa.update(db.events).where(chosen).values(at=earlier))
    keep(database, reason)


def answered(settings, database, runs):
    """An alert, and the run that it started, begun."""
    [key] = keep(database, "a")
    [start] = admit(settings, runs)
    runs.make([start])
    confirm(settings, runs)
    body = {"as_of": "2024-05-01T00:00:00+00:00", "reason": "me: a", "force": False}
    database.append("more", "run", body, run_id=start.run_id)
    return key, start.run_id


@pytest.mark.parametrize("outcome", ["failed in Airflow", "failed outside of it", "deleted before it began"])
def test_an_alert_that_still_fires_is_tried_again_where_its_run_came_to_nothing(settings, database, runs, outcome):
    """By another run, once; the earlier one stays as it is."""
    if outcome == "deleted before it began":
        [key] = keep(database, "a")
        [start] = admit(settings, runs)
        runs.make([start])
        confirm(settings, runs)
        first = start.run_id
        runs.there.clear()
    else:
        key, first = answered(settings, database, runs)
        if outcome == "failed in Airflow":
            runs.failed.add(("more", first))  # killed: no event says so
        else:
            runs.there.clear()
            database.append("more", "failure", {"stage": "ingest", "what": "…"}, run_id=first)
    assert admit(settings, runs, soon(60 * MINUTE)) == []
    hear_again(database)
    [start] = admit(settings, runs)
    assert start.run_id.startswith(f"{first}__")
    assert start.conf["reason"] == "me: a"
    runs.make([start])
    confirm(settings, runs)
    assert finals(database) == [key, key]
    assert [again(event) for event in database.events(kind="decision")] == [
        decision_of(event) for event in database.events(kind="decision")
    ]
    assert admit(settings, runs) == []


@pytest.mark.parametrize("outcome", ["on its way", "waits for its retry", "ended well"])
def test_an_alert_that_still_fires_keeps_a_run_that_has_not_failed(settings, database, runs, outcome):
    """Nothing is asked for and nothing is written about it, however often it is heard."""
    key, first = answered(settings, database, runs)
    if outcome == "waits for its retry":
        database.append("more", "failure", {"stage": "ingest", "what": "…"}, run_id=first)
    elif outcome == "ended well":
        database.append("more", "stage", {"stage": "promote"}, run_id=first, key="promoted")
        runs.failed.add(("more", first))  # a task after the last stage failed
    before = len(database.events("more", kind=("intent", "decision")))
    for _ in range(3):
        hear_again(database)
        assert admit(settings, runs) == []
        assert inbox.packs_due(database, soon(60 * MINUTE)) == []
    assert len(database.events("more", kind=("intent", "decision"))) == before
    assert (last_of(database, key), len(database.events("more", kind="heard"))) == (("decision", "retrain"), 3)


def test_a_database_that_is_away_ends_the_pass(settings, database, runs):
    """Nothing else can be done, and whoever asked is told."""
    keep(database, "a")

    def away(pack):
        raise DatabaseError("gone", fix="start it")

    runs.meanwhile = away
    with pytest.raises(DatabaseError):
        admit(settings, runs)


def test_a_run_that_is_only_intended_is_no_run_yet(settings, database, runs):
    """The history of runs knows those that began, with the alert's reason, and none of the decisions about them."""
    keep(database, "a", as_of=datetime(2024, 5, 1, tzinfo=UTC))
    [start] = admit(settings, runs)
    runs.make([start])
    confirm(settings, runs)
    with pytest.raises(StageError, match="there is no run"):
        history_of(database, start.run_id)
    assert runs_of(database, "more") == []
    begin(
        settings,
        load(settings.packs, "more"),
        start.run_id,
        as_of=datetime.fromisoformat(start.conf["as_of"]),
        scheduled=soon(),
        reason=start.conf["reason"],
    )
    [run] = runs_of(database, "more")
    assert (run["run_id"], run["reason"], run["outcome"]) == (start.run_id, "me: a", "running")
    assert history_of(database, start.run_id)["stages"] == []


def test_the_evidence_of_a_shift_fits_into_an_inbox(tmp_path):
    """However long the names of columns are, in whatever script: the gravest violations go along, the rest is counted."""
    names = [f"{place:02d}{'温' * 60}" for place in range(50)]
    violated = [{"kind": "feature", "column": name, "measure": "psi", "value": 1.0, "limit": 0.2} for name in names]
    windows = [{"end": "2013-04-01", "violated": names}] * 12
    watched = Watched(
        pack="tide",
        as_of=datetime(2013, 4, 1, tzinfo=UTC),
        champion=1,
        kind="shift",
        reasons=("it moved",),
        evidence={"violations": 50, "violated": violated, "windows": windows},
        windows=(Window(start=datetime(2013, 3, 1, tzinfo=UTC), end=datetime(2013, 4, 1, tzinfo=UTC)),),
        columns=tuple(names),
    )
    _, message = alert_of(watched)
    assert len(json.dumps(message)) < BODY_BYTES
    kept = message["evidence"]
    assert kept["violations"] == 50
    assert 1 <= len(kept["violated"]) < 50
    assert kept["violated"] == violated[: len(kept["violated"])]
    short = watched.model_copy(update={"evidence": {"violations": 1, "violated": violated[:1], "windows": windows[:0]}})
    assert alert_of(short)[1]["evidence"] == short.evidence
