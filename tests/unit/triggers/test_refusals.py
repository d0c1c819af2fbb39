"""What the webhook refused can be found, and nobody can fill the events with it."""

import asyncio
import time
from collections import Counter

import pytest
from tests.served import Served

from evergreen import database as db
from evergreen.database import HOME
from evergreen.triggers import refusals
from evergreen.triggers.refusals import KNOWN, UNKNOWN, Refusals, Refused, refused_of


@pytest.fixture
def database(tmp_path):
    return db.connect(f"sqlite:///{tmp_path / 'events.db'}")


def told(database, *refused):
    """Note refusals one after another, and let them be written."""

    async def note():
        found = Refusals(database.url)
        for each in refused:
            found.note(each)
        await found._writing

    asyncio.run(note())


def test_a_flood_is_one_event_with_all_of_it_counted(database):
    """Ten thousand at once from a thousand places: a few lines that are told apart, the others by their number."""
    flood = [Refused(401, "no signature", None, None, f"10.0.{n % 1000 // 250}.{n % 250}") for n in range(10_000)]
    ours = [Refused(422, f"field {n}: is missing", "digits", "ci", None) for n in range(100)]
    told(database, *flood, *ours)
    [event] = database.events(HOME, kind="refused")
    found = event.body["refused"]
    assert sum(each["times"] for each in found) == 10_100
    assert len(found) == UNKNOWN + KNOWN + 2
    assert Counter(each["sender"] for each in found) == {None: UNKNOWN + 1, "ci": KNOWN, "others": 1}
    assert database.first_bad(HOME) is None


def test_what_comes_within_the_minute_waits_for_its_end(database, monkeypatch):
    """The first is written at once, what comes after it together when the time is over."""
    monkeypatch.setattr(refusals, "EVERY_S", 0.1)
    one = Refused(404, "there is no pack 'digit'", None, "ci", None)

    async def note():
        found = Refusals(database.url)
        found.note(one)
        while found._tally:  # noqa: ASYNC110 -- until it is taken to be written
            await asyncio.sleep(0)
        for _ in range(20):
            found.note(one)
        await found._writing

    asyncio.run(note())
    assert [event.body["refused"][0]["times"] for event in database.events(HOME, kind="refused")] == [1, 20]


def test_every_kind_of_refusal_is_found(tmp_path):
    """Over HTTP: by status, pack and sender; of no pack that is not there, and without what was posted."""
    with Served(tmp_path / "home").running() as served:
        served.post(b'{"reason": "drift"}', {"authorization": "Bearer not-the-t0ken"})
        database = db.connect(served.settings.database_url)
        while not (found := refused_of(database)):
            time.sleep(0.01)
    [row] = found
    assert (row["status"], row["pack"], row["sender"], row["address"]) == (401, "digits", None, "127.0.0.1")
    assert "t0ken" not in str(found)
    assert refused_of(database, "digits") == found
    assert refused_of(database, "flight_delay") == []
