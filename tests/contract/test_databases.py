"""Claims about the events database and admission on it, wherever it lies: SQLite, and a real PostgreSQL.

Whatever happens at once, and whatever is killed when: what was acknowledged is kept, each alert gets one final
decision, each decision to retrain gets one run, and the chain holds.
"""

import multiprocessing
import os
import random
import signal
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import pytest
import sqlalchemy as sa

from evergreen import database as db
from evergreen.errors import DatabaseError, LeaseHeldError
from evergreen.loop import admit, confirm
from evergreen.settings import Settings
from evergreen.triggers import inbox
from evergreen.triggers.inbox import NewAlert

PACK = """
description: Is it more?
owner: tests@example.com
source: {kind: csv, path: rows.csv}
data: {target: more, event_time: at, train: 62d, validation: 31d, holdout: 31d}
training: {call: "model:train"}
gate: {primary: {metric: roc_auc}}
triggers: {admission: {dedupe: 0s, cooldown: 0s, brake: 1000}}
"""
FORK = multiprocessing.get_context("fork")


class Runs:
    """The runs there are, as files of a folder: each can be made once, by whatever process."""

    def __init__(self, folder):
        self.folder = folder
        folder.mkdir(exist_ok=True)

    def is_paused(self, _pack):
        return False

    def run_exists(self, pack, run_id):
        return (self.folder / f"{pack}.{run_id}").exists()

    def run_failed(self, _pack, _run_id):
        return False

    def make(self, starts):
        for start in starts:
            (self.folder / f"{start.pack}.{start.run_id}").touch()

    def of(self, pack):
        return len(list(self.folder.glob(f"{pack}.*")))


@pytest.fixture
def settings(tmp_path, url):
    made = Settings.from_env({"EVERGREEN_HOME": str(tmp_path / "home"), "EVERGREEN_DATABASE_URL": url})
    yield made.model_copy(update={"packs": tmp_path / "packs"})
    if "engine" in vars(db.connect(url)):
        db.connect(url).engine.dispose()


@pytest.fixture
def runs(tmp_path):
    return Runs(tmp_path / "runs")


def write(settings, pack):
    folder = settings.packs / pack
    folder.mkdir(parents=True)
    (folder / "pack.yaml").write_text(PACK)
    (folder / "model.py").touch()


def alerts(first, last):
    return [NewAlert("me", str(number), "it drifts", f"f{number}") for number in range(first, last)]


def together(count, act):
    """Do `act(number)` in so many processes at once; all must end well."""
    start = FORK.Barrier(count)

    def work(number):
        start.wait(30)
        act(number)

    workers = [FORK.Process(target=work, args=(number,)) for number in range(count)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0] * count


def drain(settings, runs, at=None):
    runs.make(admit(settings, runs, at))
    confirm(settings, runs)


def assert_decided_once(settings, runs, pack, kept):
    """Each alert of `pack` has one final decision, together they have one run, and the chain holds."""
    database = db.connect(settings.database_url)
    decided = database.events(pack, kind="decision")
    finals = Counter(event.key for event in decided if event.body["outcome"] != "hold")
    assert (sorted(finals), set(finals.values())) == (sorted(kept), {1})
    assert len({event.run_id for event in decided if event.run_id}) == runs.of(pack) == 1
    assert len(database.events(pack, kind="alert")) == len(kept)
    assert database.first_bad(pack) is None
    assert inbox.rebuild(database, pack) == 0


def test_processes_that_append_at_once_lose_nothing(settings):
    """One unbroken chain with every event, of each pack."""
    together(4, lambda _: [db.connect(settings.database_url).append(f"p{n % 2}", "run", {}) for n in range(20)])
    database = db.connect(settings.database_url)
    for pack in ("p0", "p1"):
        assert [event.position for event in database.events(pack)] == list(range(1, 41))
        assert database.first_bad(pack) is None


def test_processes_that_make_the_database_at_once_make_it_once(settings):
    """The first use by several at the same moment fails for none."""
    together(4, lambda _: db.connect(settings.database_url).append("a", "run", {}))
    assert len(db.connect(settings.database_url).events("a")) == 4


def test_a_lease_has_one_holder(settings):
    """Of many that want it at the same moment; a dead one's is free after its time."""
    database = db.connect(settings.database_url)
    held = []

    def hold(number):
        try:
            with database.lease("a", f"run {number}"):
                held.append(number)
                wanted.wait(30)
        except LeaseHeldError:
            wanted.wait(30)

    wanted = threading.Barrier(4)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(hold, range(4)))
    assert len(held) == 1

    def die():
        with db.connect(settings.database_url).lease("b", "dead", ttl_s=0.5):
            os._exit(9)

    dead = FORK.Process(target=die)
    dead.start()
    dead.join()
    with database.lease("b", "alive", ttl_s=0.5, wait_s=30):
        pass


def test_the_same_alert_from_everywhere_at_once_is_kept_once(settings):
    """Threads of processes, each with copies of all alerts in an order of its own: all get the same answers."""
    said = alerts(0, 30)

    def keep(number):
        database = db.connect(settings.database_url)

        def send(thread):
            mine = random.Random(10 * number + thread).sample(said, len(said))
            for alert in mine:
                assert inbox.keep(database, "more", [alert]) == [inbox.alert_id("more", "me", alert.sender_id)]

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(send, range(4)))

    together(3, keep)
    database = db.connect(settings.database_url)
    assert len(database.events("more", kind="alert")) == len(inbox.due(database, "more", datetime.now(UTC))) == 30
    assert database.first_bad("more") is None


def test_drains_at_once_decide_once(settings, runs):
    """While alerts still come: one final decision each, and no alert starts a second run."""
    write(settings, "more")

    def work(number):
        if number == 0:
            for first in range(0, 200, 5):
                inbox.keep(db.connect(settings.database_url), "more", alerts(first, first + 5))
        else:
            for _ in range(5):
                drain(settings, runs)

    together(4, work)
    drain(settings, runs, datetime.now(UTC) + timedelta(minutes=10))
    kept = [inbox.alert_id("more", "me", str(number)) for number in range(200)]
    assert_decided_once(settings, runs, "more", kept)


def lived(settings, runs, pack, killed_at=None):
    """Keep alerts of `pack` and decide them, in a process that is killed at its `killed_at`th step; → its steps."""
    steps = FORK.Value("i", 0)

    def step(*_):
        steps.value += 1
        if steps.value == killed_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def live():
        engine = db.connect(settings.database_url).engine
        for name in ("before_cursor_execute", "commit"):
            sa.event.listen(engine, name, step)
        inbox.keep(db.connect(settings.database_url), pack, alerts(0, 3))
        starts = admit(settings, runs)
        step()
        runs.make(starts)
        step()
        confirm(settings, runs)

    process = FORK.Process(target=live)
    process.start()
    process.join(60)
    assert process.exitcode == (0 if killed_at is None else -signal.SIGKILL)
    return steps.value


def killed_anywhere(settings, runs, share):
    """Kill at so many of all points; the sender sends again, and the next minutes' drains do the rest."""
    database = db.connect(settings.database_url)
    write(settings, "whole")
    database.made_at()
    points = range(1, lived(settings, runs, "whole") + 1)
    assert len(points) > 20
    for point in sorted(random.Random(7).sample(points, int(share * len(points)))):
        pack = f"at_{point}"
        write(settings, pack)
        lived(settings, runs, pack, killed_at=point)
        kept = inbox.keep(database, pack, alerts(0, 3))
        for minutes in (1, 2):
            drain(settings, runs, datetime.now(UTC) + timedelta(minutes=minutes))
        assert_decided_once(settings, runs, pack, kept)


def test_killed_anywhere_nothing_is_lost_or_done_twice(settings, runs):
    """A process killed between any two steps of keeping, deciding, starting and confirming."""
    killed_anywhere(settings, runs, share=0.3)


@pytest.mark.prove
def test_killed_everywhere_nothing_is_lost_or_done_twice(settings, runs):
    """At every one of those points."""
    killed_anywhere(settings, runs, share=1)


def test_a_database_that_dies_keeps_what_it_acknowledged(postgres, tmp_path):
    """While it is away each sender is told; afterwards every batch is there whole or not at all, and goes on."""
    settings = Settings.from_env({"EVERGREEN_HOME": str(tmp_path), "EVERGREEN_DATABASE_URL": postgres.database()})
    settings = settings.model_copy(update={"packs": tmp_path / "packs"})
    write(settings, "more")
    database, runs = db.connect(settings.database_url), Runs(tmp_path / "runs")
    database.made_at()
    batch, senders = 4, 6
    acknowledged, some = [], threading.Semaphore(0)

    def send(sender):
        for first in range(sender * 10_000, (sender + 1) * 10_000, batch):
            acknowledged.extend(inbox.keep(database, "more", alerts(first, first + batch)))
            some.release()

    with ThreadPoolExecutor(senders) as pool:
        sent = [pool.submit(send, number) for number in range(senders)]
        for _ in range(20):
            assert some.acquire(timeout=30)
        postgres.kill()
        assert {type(done.exception(60)) for done in sent} == {DatabaseError}
        with pytest.raises(DatabaseError):
            admit(settings, runs)
        postgres.start()
    kept = [event.key for event in database.events("more", kind="alert")]
    assert set(acknowledged) <= set(kept)
    assert len(acknowledged) >= 20 * batch
    assert len(kept) % batch == 0
    for minutes in (1, 2):
        drain(settings, runs, datetime.now(UTC) + timedelta(minutes=minutes))
    assert_decided_once(settings, runs, "more", kept)
    database.engine.dispose()


def test_a_lease_outlives_a_database_that_is_away_for_a_moment(postgres):
    """The work under it goes on; the lease is renewed when the database is back."""
    database = db.Database(postgres.database())
    with database.lease("a", "me", ttl_s=30):
        postgres.kill()
        postgres.start()
        with pytest.raises(LeaseHeldError), database.lease("a", "you"):
            pass
    with database.lease("a", "you"):
        pass
    database.engine.dispose()
