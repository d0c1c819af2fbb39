"""Forged, altered and replayed messages over HTTP: none is wrongly accepted, and none wrongly refused."""

import random
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from tests.served import Served

from evergreen.triggers import senders, webhook
from evergreen.triggers.signatures import sign

NOW = 1_700_000_000
VISIBLE = range(0x21, 0x7F)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Its clock stands still, so that a second is a second."""
    monkeypatch.setattr(webhook, "time", SimpleNamespace(time=lambda: NOW))
    with Served(tmp_path / "home", DATABASE_URL=f"sqlite:///{tmp_path / 'events.db'}").running() as served:
        yield served


def flipped(rng, text):
    """One bit of a header's text, so that it stays a header."""
    while True:
        content = bytearray(text.encode())
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        if all(char in VISIBLE for char in content):
            return content.decode()


def altered(rng, server, earlier):  # noqa: C901  one kind a line
    """One request: (headers, body, whether it is to be accepted)."""
    number = rng.randrange(10**12)
    body = f'{{"reason": "drift {number}"}}'.encode()
    ids = f"msg_{number}"
    good = server.signed(body, at=NOW, id=ids)
    kind = rng.choice(KINDS)
    if kind == "as it is":
        return good, body, True
    if kind == "replayed" and earlier:
        headers, content = rng.choice(earlier)
        return headers, content, True  # the first answer again
    if kind == "at ±299 s":
        return server.signed(body, at=NOW + rng.choice((-299, 299)), id=ids), body, True
    if kind == "at ±301 s":
        return server.signed(body, at=NOW + rng.choice((-301, 301)), id=ids), body, False
    if kind == "by another secret":
        return server.signed(body, at=NOW, id=ids, secret="whsec_" + "A" * 43 + "="), body, False
    if kind == "a bit of the body":
        content = bytearray(body)
        content[rng.randrange(len(body))] ^= 1 << rng.randrange(8)
        return good, bytes(content), False
    if kind == "cut short":
        return good, body[: rng.randrange(len(body))], False
    if kind == "by an older version":
        return (
            good | {"webhook-signature": good["webhook-signature"].replace("v1,", rng.choice(("v0,", "v1a,", "")))},
            body,
            False,
        )
    header = rng.choice(("webhook-id", "webhook-timestamp", "webhook-signature"))
    if kind == "a header removed":
        return {name: value for name, value in good.items() if name != header}, body, False
    if kind == "a header of another message" and earlier:
        headers, _ = rng.choice(earlier)
        if headers[header] != good[header]:
            return good | {header: headers[header]}, body, False
    return good | {header: flipped(rng, good[header])}, body, False


KINDS = (
    *("as it is", "replayed", "at ±299 s", "at ±301 s", "by another secret", "a bit of the body", "cut short"),
    *("by an older version", "a header removed", "a header of another message", "a bit of a header"),
)


def trials(server, count, seed):
    """What was wrongly accepted or refused, and whether the inbox holds exactly what was accepted."""
    rng = random.Random(seed)
    earlier, cases = [], []
    for _ in range(count):
        headers, body, fine = altered(rng, server, earlier)
        cases.append((headers, body, fine))
        if fine and len(earlier) < 500:
            earlier.append((headers, body))
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda case: server.post(case[1], case[0]), cases))
    wrong = [
        (case, answer.status_code)
        for case, answer in zip(cases, answers, strict=True)
        if answer.status_code != (202 if case[2] else 401)
    ]
    accepted = {case[0]["webhook-id"] for case in cases if case[2]}
    return wrong, accepted, {alert.body["sender_id"] for alert in server.kept()}, len(server.kept())


def test_no_forged_message_is_accepted_and_no_true_one_refused(server):
    """Bits flipped, headers removed, secrets and ids swapped, clocks off by a second too much: a sample."""
    wrong, accepted, kept, count = trials(server, 300, seed=7)
    assert wrong == []
    assert (kept, count) == (accepted, len(accepted))


@pytest.mark.prove
def test_of_ten_thousand_messages_none_is_wrongly_taken(server):
    """The same, ten thousand times."""
    wrong, accepted, kept, count = trials(server, 10_000, seed=11)
    assert wrong == []
    assert (kept, count) == (accepted, len(accepted))


def test_rotations_under_load_lose_no_message(server):
    """Senders that take each new secret when they have it post on through ten rotations; nobody is refused."""
    path, secrets = server.settings.senders, [server.secret]
    stop, statuses, with_newest = threading.Event(), [], threading.Semaphore(0)

    def post_on():
        while not stop.is_set():
            secret = secrets[-1]
            body, ids = b'{"reason": "drift"}', uuid.uuid4().hex
            headers = server.signed(body, at=NOW, id=ids) | {"webhook-signature": sign(secret, ids, NOW, body)}
            statuses.append(server.post(body, headers).status_code)
            if secret == secrets[-1]:
                with_newest.release()

    with ThreadPoolExecutor(4) as pool:
        posting = [pool.submit(post_on) for _ in range(4)]
        try:
            for _ in range(10):
                secrets.append(senders.add(path, "evergreen", "signing", rotate=True))
                for _ in range(16):  # until all four have surely left the secret before the last
                    assert with_newest.acquire(timeout=30)
        finally:
            stop.set()
        for poster in posting:
            poster.result()
    assert set(statuses) == {202}
    assert len(server.kept()) == len(statuses)
    first = server.signed(b"{}", at=NOW)
    assert server.post(b"{}", first).status_code == 401
