"""The inbox's bell: when it rings, and what it lives through."""

import asyncio
import itertools
import threading

import pytest
from airflow.providers.standard.triggers import hitl
from airflow.sdk.exceptions import AirflowRuntimeError, ErrorType
from airflow.sdk.execution_time.comms import ErrorResponse

from evergreen import database as db
from evergreen.orchestration import watchers
from evergreen.triggers import inbox
from evergreen.triggers.inbox import NewAlert


class Over(BaseException):
    """The script has been played to its end."""


@pytest.fixture
def rings(monkeypatch):
    """Of a script of looks, 0.2 s apart, each the packs due then or an error: at which looks the bell rang, with what."""

    def play(*looks):
        clock, script, rung = itertools.count(1), iter(looks), []
        now = {"look": 0}

        def look():
            now["look"] = next(clock)
            try:
                found = next(script)
            except StopIteration:
                raise Over from None
            if isinstance(found, Exception):
                raise found
            return found if isinstance(found, dict) else dict.fromkeys(found, 1)

        async def listen():
            async for event in watchers.InboxBell().run():
                rung.append((now["look"], event.payload["packs"]))  # noqa: PERF401 -- what rang before the end counts

        monkeypatch.setattr(watchers, "_due", look)
        monkeypatch.setattr(watchers.time, "monotonic", lambda: 100 + now["look"] * 0.2)
        monkeypatch.setattr(watchers, "POLL_S", 0)
        with pytest.raises(Over):
            asyncio.run(listen())
        return rung

    return play


def test_it_rings_at_once_for_a_pack_that_has_something_due(rings):
    assert rings([], [], ["apple"], []) == [(3, ["apple"])]


def test_it_is_silent_while_nothing_is_due(rings):
    assert rings(*[[]] * 100) == []


def test_it_rings_at_once_for_another_pack(rings):
    assert rings(["apple"], ["apple", "pear"], ["apple", "pear"]) == [(1, ["apple"]), (2, ["apple", "pear"])]


def test_it_rings_at_once_for_what_is_due_anew(rings):
    assert rings(["apple"], [], ["apple"]) == [(1, ["apple"]), (3, ["apple"])]


def test_it_rings_for_another_alert_of_the_same_pack_a_second_later(rings):
    """The first may have been read by a run that does not see the second; more than once a second it never rings."""
    looks = [{"apple": 1 + look} for look in range(11)]
    assert [look for look, _ in rings({"apple": 1}, *looks)] == [1, 6, 11]
    assert [look for look, _ in rings({"apple": 1}, *[{"apple": 2}] * 8)] == [1, 6]


def test_it_rings_ever_more_seldom_while_the_same_stays_due(rings):
    """After 2, 4, 8 … seconds, and at last once a minute: no flood of runs while admission cannot work."""
    at = [0.2 * look for look, _ in rings(*[["apple"]] * 2000)]
    gaps = [round(after - before) for before, after in itertools.pairwise(at)]
    assert gaps == [2, 4, 8, 16, 32, 60, 60, 60, 60, 60]


def test_a_database_that_is_away_ends_nothing(rings):
    """And what is due when it is back is rung for at once."""
    assert rings(OSError("away"), OSError("away"), ["apple"]) == [(3, ["apple"])]
    assert rings(["apple"], OSError("away"), ["apple"]) == [(1, ["apple"]), (3, ["apple"])]


def test_it_rings_for_an_alert_of_the_real_inbox_until_it_is_put_off(tmp_path, monkeypatch):
    """Restarted, it rings for what is due all the same: it remembers nothing."""
    monkeypatch.setenv("EVERGREEN_HOME", str(tmp_path))
    database = db.connect(f"sqlite:///{tmp_path / 'evergreen.db'}")
    inbox.keep(database, "apple", [NewAlert(sender="me", sender_id="1", reason="it drifts", fingerprint="f")])

    async def first():
        path, kwargs = watchers.InboxBell().serialize()
        assert path == "evergreen.orchestration.watchers.InboxBell"
        return await anext(aiter(watchers.InboxBell(**kwargs).run()))

    assert [asyncio.run(first()).payload for _ in range(2)] == [{"packs": ["apple"]}] * 2


def test_looking_does_not_hold_up_the_triggerer(monkeypatch):
    """While a look waits for its database, other triggers go on."""
    others_ran = threading.Event()

    def look():
        assert others_ran.wait(30), "the event loop stood still while the database was asked"
        raise Over

    async def listen():
        asyncio.get_running_loop().call_soon(others_ran.set)
        await anext(aiter(watchers.InboxBell().run()))

    monkeypatch.setattr(watchers, "_due", look)
    with pytest.raises(Over):
        asyncio.run(listen())


@pytest.mark.parametrize("status", [404, 500])
def test_where_no_question_stands_the_task_is_woken_to_ask_it(status, tmp_path, monkeypatch):
    """A try that listens first, because one before it failed, hears that there is nothing to answer; no other error is that."""
    monkeypatch.setenv("EVERGREEN_HOME", str(tmp_path))

    def look(ti_id):
        raise AirflowRuntimeError(ErrorResponse(error=ErrorType.API_SERVER_ERROR, detail={"status_code": status}))

    monkeypatch.setattr(hitl, "get_hitl_detail_content_detail", look)
    bell = watchers.AnswerBell(
        pack="apple",
        run="manual",
        version=1,
        ti_id="1",
        options=["promote", "reject"],
        params={},
        timeout_datetime=None,
    )
    if status == 404:
        assert asyncio.run(anext(aiter(bell.run()))).payload == {"unasked": True}
    else:
        with pytest.raises(AirflowRuntimeError):
            asyncio.run(anext(aiter(bell.run())))
