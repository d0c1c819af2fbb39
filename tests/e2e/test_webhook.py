"""The webhook where it lives: on Airflow's real API server, which asks for a token everywhere else."""

import contextlib
import json
import socket
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from tests.api_server import ApiServer
from tests.browser import CHROMIUM, Browser

from evergreen import database as db
from evergreen.errors import AlertError
from evergreen.triggers import senders, signatures

pytestmark = pytest.mark.slow

ROUTES = """
import json, sys
from airflow.api_fastapi.app import create_app
from starlette.routing import Mount

def routes(app, prefix):
    for route in app.routes:
        if isinstance(route, Mount) and route.routes:
            yield from routes(route, prefix + route.path)
        else:
            for method in sorted(getattr(route, "methods", None) or ["GET"]):
                yield [method, prefix + route.path]

every = list(routes(create_app(), ""))
found = [route for route in every if route[1].startswith("/evergreen")]
heavy = {"torch", "mlflow", "great_expectations", "dvc", "polars", "pandas"} & set(sys.modules)
print("\\n" + json.dumps({"routes": found, "every": every, "heavy": sorted(heavy)}))
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Airflow asks for users and passwords here, as where it is not on loopback."""
    home = tmp_path_factory.mktemp("webhook") / "home"
    with ApiServer(home, AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_ALL_ADMINS="False").running() as running:
        yield running


@pytest.fixture(scope="module")
def mounted(server):
    """What Airflow's app has mounted under /evergreen, and which heavy modules the making of it imported."""
    return json.loads(server.python(ROUTES).splitlines()[-1])


@pytest.fixture(scope="module")
def token(server):
    """A token of Airflow's own."""
    file = server.settings.home / "airflow" / "simple_auth_manager_passwords.json.generated"
    (user, password), *_ = json.loads(file.read_text(encoding="utf-8")).items()
    account = {"username": user, "password": password}
    answer = httpx.post(f"{server.url}/auth/token", json=account, timeout=60, trust_env=False)
    return answer.json()["access_token"]


def asked(server, method, path, token=None):
    headers = {"authorization": f"Bearer {token}"} if token else {}
    address = server.url + path.replace("{pack}", "digits")
    return httpx.request(method, address, headers=headers, timeout=60, trust_env=False)


def kept(server):
    return db.connect(server.settings.database_url).events("digits", kind="alert")


def test_no_page_of_another_site_changes_anything(server, mounted, token):
    """Every route of Airflow's and ours that may change something refuses it, whatever cookie or token comes along."""
    routes = {tuple(route) for route in mounted["every"] if route[0] not in ("GET", "HEAD", "OPTIONS")}
    assert len(routes) >= 50
    evil = {"origin": "https://evil.example", "sec-fetch-site": "cross-site", "authorization": f"Bearer {token}"}
    with httpx.Client(base_url=server.url, timeout=60, trust_env=False) as client:
        answers = {route: client.request(*route, headers=evil) for route in sorted(routes)}
    passed = [route for route, answer in answers.items() if "page of another site" not in answer.text]
    assert passed == []
    assert {answer.status_code for answer in answers.values()} == {403}


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed: apt-get install chromium")
def test_a_name_that_is_rebound_to_this_server_reads_nothing(server, tmp_path):
    """A real browser whose resolver says that another site's name is loopback is shown a refusal, not Airflow."""
    port = server.url.rpartition(":")[2]
    browser = Browser(tmp_path / "chromium", "--host-resolver-rules=MAP rebound.example 127.0.0.1")
    try:
        browser.open(f"http://rebound.example:{port}/", width=800)
        assert "'rebound.example" in browser.value("document.body.innerText")
        token = "fetch('/auth/token', {method: 'POST'}).then(answer => { window.status_of = answer.status })"
        browser.value(token)
        assert browser.until("window.status_of") == 403
        browser.open(f"{server.url}/api/v2/version", width=800)
        assert "3.3" in browser.value("document.body.innerText")
    finally:
        browser.close()


def test_every_route_but_the_webhook_asks_for_airflows_token(server, mounted, token):
    """All that is mounted is tried; with the token it answers."""
    others = [route for route in mounted["routes"] if route != ["POST", "/evergreen/alerts/{pack}"]]
    assert ["GET", "/evergreen/metrics"] in others
    assert len(others) == len(mounted["routes"]) - 1
    assert {asked(server, *route).status_code for route in others} <= {401, 403}
    assert asked(server, "GET", "/evergreen/metrics", token).status_code == 200


def test_the_webhook_takes_no_token_of_airflows(server, token):
    """Nor nothing at all: who may use Airflow is no sender for that."""
    assert asked(server, "POST", "/evergreen/alerts/digits", token).status_code == 401
    assert asked(server, "POST", "/evergreen/alerts/digits").status_code == 401


@pytest.mark.parametrize("path", ["/evergreen/docs", "/evergreen/redoc", "/evergreen/openapi.json"])
def test_no_page_describes_it(server, path):
    """To nobody."""
    assert asked(server, "GET", path).status_code == 404


def test_the_api_server_imports_none_of_the_heavy_libraries(mounted):
    """It has better things to do with its memory."""
    assert mounted["heavy"] == []


def test_a_signed_alert_is_kept(server):
    """By the client that `evergreen alert` uses; the same id again is the same alert."""
    answer = signatures.post(server.url, "digits", server.secret, {"reason": "drift"}, id="one")
    assert signatures.post(server.url, "digits", server.secret, {"reason": "drift"}, id="one") == answer
    assert [alert.key for alert in kept(server) if alert.body["sender_id"] == "one"] == [answer["alert"]]


def test_a_sender_made_while_it_runs_is_known_at_once(server):
    """By its token, and no longer when that was rotated out."""
    path = server.settings.senders
    first = senders.add(path, "grafana", "bearer")

    def status(secret):
        headers = {"authorization": f"Bearer {secret}", "content-type": "application/json"}
        address = f"{server.url}/evergreen/alerts/digits"
        body = b'{"reason": "x"}'
        return httpx.post(address, content=body, headers=headers, timeout=60, trust_env=False).status_code

    assert status(first) == 202
    for _ in range(2):
        senders.add(path, "grafana", "bearer", rotate=True)
    assert status(first) == 401


def test_a_refusal_is_in_the_servers_log(server):
    """With its reason, without the secret."""
    with pytest.raises(AlertError, match="422: reason: is missing"):
        signatures.post(server.url, "digits", server.secret, {})
    log = server.log.read_text(encoding="utf-8")
    assert "refused an alert for digits from evergreen: 422: reason: is missing" in log
    assert server.secret not in log


def test_bodies_are_bounded_behind_airflows_own_layers(server):
    """Too large is cut off while it comes; too slow is given up after ten seconds."""
    where = ("127.0.0.1", int(server.url.rsplit(":", 1)[1]))
    head = b"POST /evergreen/alerts/digits HTTP/1.1\r\nhost: localhost\r\n"
    with socket.create_connection(where, timeout=60) as large, socket.create_connection(where, timeout=60) as slow:
        began = time.monotonic()
        slow.sendall(head + b'content-length: 20\r\n\r\n{"reason"')
        large.sendall(head + b"transfer-encoding: chunked\r\n\r\n" + (b"8000\r\n" + b"x" * 0x8000 + b"\r\n") * 3)
        assert large.recv(100).startswith(b"HTTP/1.1 413")
        assert slow.recv(100).startswith(b"HTTP/1.1 408")
        assert time.monotonic() - began > 9


def test_the_server_answers_while_somebodys_action_waits_for_sqlite(server, token):
    """Airflow logs actions on its event loop; here a pause waits for the database's writer, and the rest goes on."""
    pause = f"{server.url}/api/v2/dags/evergreen__admission"
    headers = {"authorization": f"Bearer {token}"}
    with (
        contextlib.closing(
            sqlite3.connect(server.settings.home / "airflow" / "airflow.db", isolation_level=None)
        ) as db_,
        ThreadPoolExecutor(1) as beside,
    ):
        db_.execute("BEGIN IMMEDIATE")
        asked = beside.submit(
            httpx.patch, pause, json={"is_paused": False}, headers=headers, timeout=60, trust_env=False
        )
        try:
            answers = [httpx.get(f"{server.url}/api/v2/version", timeout=20, trust_env=False) for _ in range(50)]
            assert not asked.done()
        finally:
            db_.execute("ROLLBACK")
        assert {answer.status_code for answer in answers} == {200}
        assert asked.result().status_code in (200, 404)  # nobody parses DAGs here
