"""The guard of the API server: what a page of another site can make a browser send is refused."""

import itertools

import pytest
from fastapi import FastAPI, WebSocket
from fastapi.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from evergreen.orchestration.guard import Guard, own_names, refused

NAMES = own_names(
    ["https://ml.example.com:8443/", "http://airflow-api:8080/execution/", None], "proxy.example.com, two"
)


@pytest.mark.parametrize(
    "host",
    [
        *("127.0.0.1:8080", "[::1]:8080", "localhost", "LOCALHOST:1", "10.1.2.3:8080", "ml.example.com:8443"),
        *("airflow-api:8080", "proxy.example.com", "two"),
    ],
)
def test_the_servers_own_names_and_every_address_are_answered(host):
    """Loopback, names from Airflow's settings and EVERGREEN_HOSTS; Kubernetes' probes ask by the pod's address."""
    assert refused(NAMES, "GET", {"host": host}) is None


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example", "127.0.0.1.nip.io:8080", "", "[", "ml.example.com.", "a@b:1"]
)
def test_another_name_is_refused_whatever_is_asked(host):
    """A name that was made to lead here reads nothing, either."""
    for method in ("GET", "POST"):
        assert "is not a name of this server" in refused(NAMES, method, {"host": host})


SITES = [None, "same-origin", "none", "same-site", "cross-site"]
ORIGINS = [None, "http://127.0.0.1:8080", "http://127.0.0.1:9090", "https://evil.example", "null", ""]


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE", "WEBSOCKET"])
def test_only_the_servers_own_pages_and_programs_change_anything(method):
    """A request that may change something needs no header of a browser, or those of this very server's pages."""
    for site, origin in itertools.product(SITES, ORIGINS):
        headers = {"host": "127.0.0.1:8080"}
        headers |= {"sec-fetch-site": site} if site is not None else {}
        headers |= {"origin": origin} if origin is not None else {}
        harmless = method in ("GET", "HEAD", "OPTIONS")
        own = site in (None, "same-origin", "none") and origin in (None, "http://127.0.0.1:8080")
        assert (refused(NAMES, method, headers) is None) == (harmless or own), (site, origin)


@pytest.fixture
def client():
    app = FastAPI()
    app.add_middleware(Guard, names=NAMES)

    @app.get("/page")
    def page() -> str:
        return "a page"

    @app.post("/act")
    def act() -> str:
        return "done"

    @app.websocket("/socket")
    async def socket(socket: WebSocket) -> None:
        await socket.accept()
        await socket.close()

    return TestClient(app, base_url="http://127.0.0.1:8080")


def test_no_answer_may_be_framed(client):
    """Every answer forbids frames, a refusal too."""
    for host in ("127.0.0.1:8080", "evil.example"):
        answer = client.get("/page", headers={"host": host})
        assert answer.headers["content-security-policy"] == "frame-ancestors 'none'"
        assert answer.headers["x-frame-options"] == "DENY"


def test_a_refusal_is_403_with_a_sentence(client):
    """The application is not asked, and the text says who can mend it."""
    assert client.post("/act").status_code == 200
    answer = client.post("/act", headers={"sec-fetch-site": "cross-site"})
    assert (answer.status_code, answer.text[:26]) == (403, "A page of another site sen")
    assert "EVERGREEN_HOSTS" in client.get("/page", headers={"host": "evil.example"}).text


def test_a_websocket_of_another_site_is_closed(client):
    """Browsers send `Origin` with a WebSocket, and no rule of theirs keeps a page from opening one elsewhere."""
    with client.websocket_connect("/socket", headers={"origin": "http://127.0.0.1:8080", "host": "127.0.0.1:8080"}):
        pass
    with pytest.raises(WebSocketDisconnect):
        with client.websocket_connect("/socket", headers={"origin": "https://evil.example"}):
            pass
