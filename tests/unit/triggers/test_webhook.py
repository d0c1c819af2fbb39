"""Claims about the webhook, made over HTTP to a real server on loopback."""

import base64
import json
import logging
import os
import socket
import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from tests.served import Served

from evergreen import database as db
from evergreen.errors import AlertError
from evergreen.triggers import senders, signatures, webhook
from evergreen.triggers.refusals import refused_of

DRIFT = b'{"reason": "drift"}'


@pytest.fixture
def server(tmp_path):
    with Served(tmp_path / "home").running() as served:
        yield served


def raw(server, *parts):
    """Send bytes, and read what comes until the server closes."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        for part in parts:
            try:
                connection.sendall(part)
            except (BrokenPipeError, ConnectionResetError):
                break
        answer = b""
        while block := received(connection):
            answer += block
    return answer


def received(connection):
    try:
        return connection.recv(65536)
    except ConnectionResetError:
        return b""


def head(server, *lines):
    lines = ("POST /alerts/digits HTTP/1.1", "host: x", f"authorization: Bearer {server.token}", *lines)
    return "\r\n".join((*lines, "content-type: application/json", "", "")).encode()


def test_the_answer_is_the_id_of_a_kept_alert(server):
    """It is in the inbox by then, with the sender's name."""
    answer = server.post(b'{"reason": "drift", "evidence": {"psi": 0.3}}')
    (kept,) = server.kept()
    assert (answer.status_code, answer.json()) == (202, {"alert": kept.key, "alerts": [kept.key]})
    assert (kept.body["sender"], kept.body["reason"], kept.body["evidence"]) == (
        "alertmanager",
        "drift",
        {"psi": 0.3},
    )


def test_a_signed_post_is_its_senders(server):
    """The client that `evergreen alert` uses, through the path Airflow mounts the app at."""
    headers = server.signed(DRIFT, at=int(time.time()))
    assert server.post(DRIFT, headers).status_code == 202
    assert [alert.body["sender"] for alert in server.kept()] == ["evergreen"]


def test_a_repeat_gets_the_first_answer(server):
    """By the sender's id, whatever else the repeat says; another id is another alert."""
    at = int(time.time())
    first = server.post(DRIFT, server.signed(DRIFT, at=at, id="one"))
    other = b'{"reason": "drift again"}'
    again = server.post(other, server.signed(other, at=at, id="one"))
    new = server.post(DRIFT, server.signed(DRIFT, at=at, id="two"))
    assert (again.json() == first.json(), new.json() == first.json()) == (True, False)
    assert [alert.body["reason"] for alert in server.kept()] == ["drift", "drift"]


def test_repeats_at_the_same_moment_are_one_alert(server):
    """Fifty at once of one id: one kept, one answer."""
    at = int(time.time())
    headers = server.signed(DRIFT, at=at, id="one")
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda _: server.post(DRIFT, headers).json()["alert"], range(50)))
    assert (len(set(answers)), len(server.kept())) == (1, 1)


def test_posts_at_the_same_moment_share_a_transaction(server, monkeypatch):
    """What comes while one is being written down goes together into the next."""
    going, go = threading.Event(), threading.Event()
    keep, wait, sizes, waiting = webhook.inbox.keep, webhook.Keeper.keep, [], []

    def slowly(database, pack, alerts):
        sizes.append(len(alerts))
        going.set()
        assert go.wait(30)
        return keep(database, pack, alerts)

    def counted(keeper, pack, alerts):
        waiting.append(pack)
        return wait(keeper, pack, alerts)

    monkeypatch.setattr(webhook.inbox, "keep", slowly)
    monkeypatch.setattr(webhook.Keeper, "keep", counted)
    with ThreadPoolExecutor(20) as pool:
        first = pool.submit(server.post, DRIFT)
        assert going.wait(30)
        answers = [pool.submit(server.post, json.dumps({"reason": f"drift {n}"}).encode()) for n in range(19)]
        while len(waiting) < 20:
            time.sleep(0.01)
        go.set()
        ids = {answer.result().json()["alert"] for answer in [first, *answers]}
    assert (sizes, ids) == ([1, 19], {alert.key for alert in server.kept()})


def test_each_alert_of_a_notification_has_an_id(server):
    """In their order."""
    alert = {"labels": {"alertname": "Drift"}, "startsAt": "2026-05-04T11:58:00Z"}
    alerts = [alert | {"status": "firing", "fingerprint": name} for name in ("a", "b", "a")]
    answer = server.post(json.dumps({"version": "4", "alerts": alerts})).json()
    first, second = (alert.key for alert in server.kept())
    assert answer == {"alert": first, "alerts": [first, second, first]}


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer"},
        {"authorization": "Bearer wrong-wrong-wrong-wrong-wrong-wrong"},
        {"authorization": "Basic dXNlcjp0b2tlbg=="},
        {"webhook-signature": "v1,AAAA"},
    ],
)
def test_who_has_no_secret_is_refused(server, headers):
    """401, and nothing is kept."""
    assert server.post(DRIFT, headers | {"content-type": "application/json"}).status_code == 401
    assert server.kept() == []


def test_a_signing_secret_is_no_token_and_a_token_signs_nothing(server):
    """Each kind has its own door."""
    assert server.post(DRIFT, {"authorization": f"Bearer {server.secret}"}).status_code == 401
    token_as_key = "whsec_" + base64.b64encode(server.token.encode()).decode()
    headers = server.signed(DRIFT, at=int(time.time()), secret=token_as_key)
    assert server.post(DRIFT, headers).status_code == 401


def test_a_bad_signature_is_not_saved_by_a_good_token(server):
    """A message that says it is signed must be."""
    headers = {"authorization": f"Bearer {server.token}", "webhook-signature": "v1,AAAA"}
    assert server.post(DRIFT, headers).status_code == 401


def test_who_has_no_secret_learns_nothing_of_packs(server):
    """401 for a pack that is none as well; 404 only for senders."""
    assert server.post(DRIFT, {}, pack="nix").status_code == 401
    assert server.post(DRIFT, pack="nix").status_code == 404


@pytest.mark.parametrize("pack", ["nix", "..%2Fdigits", "Digits", "digits%00", "d" * 300])
def test_what_is_no_pack_is_not_found(server, pack):
    """By any name."""
    assert server.post(DRIFT, pack=pack).status_code == 404


@pytest.mark.parametrize(
    ("body", "headers", "status", "why"),
    [
        (DRIFT, {"content-type": "text/plain"}, 415, "application/json"),
        (b'{"reason": 1}', {"content-type": "application/json"}, 422, "reason: is no text"),
        (b"[" * 60_000, {"content-type": "application/json"}, 422, "recursion limit"),
        (b'{"reason": "' + b"x" * 64 * 1024 + b'"}', {"content-type": "application/json"}, 413, "64 KiB"),
        (b"x" * (1024 * 1024 + 1), {"content-type": "application/json"}, 413, "1024 KiB"),
    ],
)
def test_a_refusal_says_why_and_is_logged_without_secrets(server, caplog, body, headers, status, why):
    """The sender can mend it; whoever looks after the server can find it."""
    answer = server.post(body, headers | {"authorization": f"Bearer {server.token}"})
    assert (answer.status_code, server.kept()) == (status, [])
    assert why in answer.json()["detail"]
    (line,) = [record.getMessage() for record in caplog.records if record.name == "evergreen.webhook"]
    assert why in line
    assert server.token not in line


def test_a_body_of_64_kib_is_taken(server):
    """To the byte."""
    filler = "x" * (64 * 1024 - len(b'{"reason": "drift", "evidence": {"x": ""}}'))
    assert server.post(f'{{"reason": "drift", "evidence": {{"x": "{filler}"}}}}').status_code == 202


def test_a_body_in_chunks_is_cut_off_at_its_bound(server):
    """No length said, and no end: refused as soon as there is too much, and the connection closed."""
    chunk = b"4000\r\n" + b"x" * 0x4000 + b"\r\n"
    answer = raw(server, head(server, "transfer-encoding: chunked"), *[chunk] * 128)
    assert answer.startswith(b"HTTP/1.1 413")


@pytest.mark.parametrize("signed", [False, True])
def test_only_a_token_lets_a_body_be_as_large_as_a_notification(server, signed):
    """Whoever has none, or signs, posts a single alert: 64 KiB are read and no more."""
    body = b'{"version": "4", "alerts": ["' + b"x" * 80_000 + b'"]}'
    headers = server.signed(body, at=int(time.time())) if signed else {"authorization": "Bearer wrong"}
    answer = server.post(body, headers)
    assert (answer.status_code, answer.json()["detail"]) == (413, "the body is larger than 64 KiB")


def test_a_notification_of_a_hundred_and_twenty_alerts_is_kept(server):
    """Of 81 KB; the one of them that cannot be kept is named in the answer, counted and written down."""
    alert = {"status": "firing", "startsAt": "2026-05-04T11:58:00Z", "annotations": {"description": "x" * 550}}
    alerts = [alert | {"labels": {"alertname": "Drift"}, "fingerprint": f"{n:016x}"} for n in range(121)]
    alerts[3] = alerts[3] | {"labels": {"alertname": 5}}
    body = json.dumps({"version": "4", "alerts": alerts})
    assert len(body) > 81_000
    answer = server.post(body)
    assert answer.status_code == 202
    assert len(answer.json()["alerts"]) == len(server.kept()) == 120
    assert answer.json()["refused"] == ["alerts.3.labels.alertname: is no text"]
    database = db.connect(server.settings.database_url)
    while not (rows := refused_of(database, "digits")):
        time.sleep(0.01)
    why = "one of several: alert.labels.alertname: is no text"
    assert [(row["status"], row["reason"], row["sender"], row["times"]) for row in rows] == [
        (422, why, "alertmanager", 1)
    ]


def test_a_body_that_dawdles_is_given_up(server, monkeypatch):
    """It has a time in all, however steadily it drips; and the connection is closed."""
    monkeypatch.setattr(webhook, "READ_WITHIN_S", 0.3)
    answer = raw(server, head(server, "content-length: 19"), b'{"reason"')
    assert answer.startswith(b"HTTP/1.1 408")


def test_a_body_that_breaks_off_is_no_error_of_the_server(server, caplog):
    """The client went away: nobody is answered, nothing is kept, nothing is raised."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(head(server, "content-length: 19") + b'{"reason"')
    while not any("ended early" in record.getMessage() for record in caplog.records):
        time.sleep(0.01)
    assert server.kept() == []
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


def test_a_sender_has_a_rate(server):
    """More within a minute is refused with when to come again; another sender is not held back."""
    path = server.settings.senders
    path.write_text(path.read_text().replace("alertmanager:", "alertmanager:\n  per_minute: 3"))
    answers = [
        server.post(DRIFT) for _ in range(8)
    ]  # two minutes' worth, and two more: a new minute may begin on the way
    assert [answer.status_code for answer in answers[:3]] == [202] * 3
    refused = [answer for answer in answers if answer.status_code == 429]
    assert len(refused) >= 2
    assert all(1 <= int(answer.headers["retry-after"]) <= 61 for answer in refused)
    assert {answer.status_code for answer in answers} == {202, 429}
    assert server.post(DRIFT, server.signed(DRIFT, at=int(time.time()))).status_code == 202


def test_a_secret_counts_from_its_making_to_its_end(server):
    """Without a restart: made, rotated, rotated out."""
    settings = server.settings
    first = senders.add(settings.senders, "grafana", "bearer")
    second = senders.add(settings.senders, "grafana", "bearer", rotate=True)

    def status(token):
        headers = {"authorization": f"Bearer {token}", "content-type": "application/json"}
        return server.post(DRIFT, headers).status_code

    assert (status(first), status(second)) == (202, 202)
    third = senders.add(settings.senders, "grafana", "bearer", rotate=True)
    assert (status(first), status(second), status(third)) == (401, 202, 202)


@pytest.mark.parametrize("harm", ["missing", "open", "broken"])
def test_without_the_senders_file_senders_are_asked_to_try_again(server, caplog, harm):
    """503 with a time, not 401: what is wrong is here. It comes back by itself."""
    path = server.settings.senders
    good = path.read_text()
    if harm == "missing":
        path.unlink()
    elif harm == "open":
        path.chmod(0o644)
    else:
        path.write_text("evergreen: [")
    answer = server.post(DRIFT)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
    assert str(path) not in answer.text
    assert any(str(path) in record.getMessage() for record in caplog.records)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:  # noqa: PTH123
        file.write(good)
    path.chmod(0o600)
    assert server.post(DRIFT).status_code == 202


def test_without_the_database_senders_are_asked_to_try_again(server, monkeypatch):
    """503 while another process holds it for too long; 202 after."""
    assert server.post(DRIFT).status_code == 202
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("evergreen.database.WAIT_S", 0.1)
        holder = sqlite3.connect(server.settings.home / "evergreen.db", isolation_level=None)
        engine = webhook.db.connect(server.settings.database_url).engine
        with engine.connect().execution_options(reads=True) as connection:
            connection.exec_driver_sql("PRAGMA busy_timeout = 100")
        holder.execute("BEGIN IMMEDIATE")
        answer = server.post(b'{"reason": "while it was away"}')
        holder.execute("ROLLBACK")
        holder.close()
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
    assert "evergreen.db" not in answer.text
    assert server.post(b'{"reason": "after"}').status_code == 202
    assert [alert.body["reason"] for alert in server.kept()] == ["drift", "after"]


def test_a_queue_that_is_full_sends_senders_away(server, monkeypatch):
    """Memory is bounded while nothing can be written."""
    monkeypatch.setattr(webhook, "WAITING", 0)
    answer = server.post(DRIFT)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/metrics", 401),
        ("GET", "/alerts/digits", 405),
        ("GET", "/docs", 404),
        ("GET", "/redoc", 404),
        ("GET", "/openapi.json", 404),
    ],
)
def test_nothing_else_is_open(server, method, path, status):
    """No route but the webhook answers to who has no token of Airflow's."""
    assert server.client.request(method, path).status_code == status


def test_the_client_gets_the_answer_or_the_reason(server):
    """`signatures.post` against the app where Airflow mounts it."""
    from fastapi import FastAPI

    mounted = FastAPI()
    mounted.mount("/evergreen", server.app)
    server.app = mounted
    answer = signatures.post(server.url, "digits", server.secret, {"reason": "drift"}, id="one")
    assert answer["alert"] == server.kept()[0].key
    assert signatures.post(server.url, "digits", server.secret, {"reason": "drift"}, id="one") == answer
    with pytest.raises(AlertError, match=r"404: there is no pack 'nix'\n.*evergreen packs"):
        signatures.post(server.url, "nix", server.secret, {"reason": "drift"})
    with pytest.raises(AlertError, match=r"401: no signature is that of an active secret"):
        signatures.post(server.url, "digits", "whsec_" + "A" * 44, {"reason": "drift"})
    with pytest.raises(AlertError, match=r"422: reason: is missing"):
        signatures.post(server.url, "digits", server.secret, {})


def test_a_captured_message_is_of_no_use_for_another_pack(server):
    """Our own client says the pack within what is signed."""
    body = json.dumps({"pack": "flight_delay", "reason": "drift"}).encode()
    assert server.post(body, server.signed(body, at=int(time.time()))).status_code == 422


def test_what_the_door_answers_is_in_its_schema(server):
    """Every status that these tests saw is documented."""
    documented = server.app.openapi()["paths"]["/alerts/{pack}"]["post"]["responses"]
    assert set(documented) == {"202", "401", "404", "408", "413", "415", "422", "429", "503"}


def test_a_given_up_request_is_kept_all_the_same(server, monkeypatch):
    """The sender went away while its alert was being written: no error, and the alert is there for its repeat."""
    going, go = threading.Event(), threading.Event()
    keep = webhook.inbox.keep

    def slowly(database, pack, alerts):
        going.set()
        assert go.wait(30)
        return keep(database, pack, alerts)

    monkeypatch.setattr(webhook.inbox, "keep", slowly)
    with ThreadPoolExecutor(1) as pool:
        lost = pool.submit(httpx.post, f"{server.url}/alerts/digits", content=DRIFT, headers=bearer(server), timeout=1)
        assert going.wait(30)
        with pytest.raises(httpx.ReadTimeout):
            lost.result()
    go.set()
    assert server.post(DRIFT).json()["alert"] == server.kept()[0].key
    assert len(server.kept()) == 1


def bearer(server):
    return {"authorization": f"Bearer {server.token}", "content-type": "application/json"}
