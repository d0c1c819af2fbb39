"""The embedded home's bookkeeping: its environment, its ports, and which processes are its own."""

import contextlib
import fcntl
import json
import os
import queue
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import psutil
import pytest

from evergreen.errors import SettingsError
from evergreen.orchestration import embedded
from evergreen.settings import Settings


@pytest.fixture
def settings(tmp_path, monkeypatch):
    """A home of its own, and no word of Airflow in the environment."""
    for name in list(os.environ):
        if name.startswith(("AIRFLOW", "EVERGREEN", "MLFLOW")):
            monkeypatch.delenv(name)
    return Settings.from_env({"EVERGREEN_HOME": str(tmp_path / "home")})


@pytest.fixture
def stranger():
    """A process that has nothing to do with any home, in a session of its own."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, start_new_session=True)
    yield process
    process.kill()
    process.communicate()


def record(settings, pid, started):
    """Write down that this process is Airflow."""
    settings.home.mkdir(parents=True)
    entry = {"address": "http://127.0.0.1:1", "processes": [{"pid": pid, "started": started}]}
    (settings.home / "services.json").write_text(json.dumps({"airflow": entry}), encoding="utf-8")


def test_the_environment_wins_over_the_file(settings, monkeypatch):
    """What the environment says of Airflow is not changed."""
    monkeypatch.setenv("AIRFLOW__CORE__PARALLELISM", "16")
    assert embedded.environment(settings)["AIRFLOW__CORE__PARALLELISM"] == "16"


def test_tasks_reach_the_api_server_at_its_port(settings, monkeypatch):
    """Airflow assumes port 8080 for its tasks; the base URL follows the port that was chosen."""
    monkeypatch.setenv("AIRFLOW__API__PORT", "18123")
    assert embedded.environment(settings)["AIRFLOW__API__BASE_URL"] == "http://127.0.0.1:18123"


def test_two_homes_share_nothing(settings, tmp_path):
    """Each home has an Airflow home and a database of its own."""
    one, other = (embedded.environment(Settings.from_env({"EVERGREEN_HOME": str(tmp_path / n)})) for n in "ab")
    own = ("AIRFLOW_HOME", "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN", "EVERGREEN_HOME")
    assert [name for name in own if one[name] == other[name]] == []


def test_a_taken_port_is_named_before_anything_starts(settings, monkeypatch):
    """`up` says which port, and which variable chooses another; it has started and made nothing."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        monkeypatch.setenv("AIRFLOW__API__PORT", str(port))
        with pytest.raises(SettingsError, match=f"(?s)port {port}.*AIRFLOW__API__PORT={port + 1}"):
            list(embedded.up(settings))
    locks = {"turn-lock", ".home.lock", "home.json"}
    assert {file.name for file in settings.home.rglob("*") if file.is_file()} <= locks


def test_a_living_process_of_the_home_is_a_service(settings, stranger):
    """By pid and start time."""
    record(settings, stranger.pid, psutil.Process(stranger.pid).create_time())
    assert embedded.services(settings) == {"airflow": "http://127.0.0.1:1"}


def test_a_later_process_with_the_same_pid_is_no_service(settings, stranger):
    """After a restart of the machine, another program may have the pid."""
    record(settings, stranger.pid, psutil.Process(stranger.pid).create_time() - 3600)
    assert embedded.services(settings) == {}


def test_down_does_not_touch_a_later_process_with_the_same_pid(settings, stranger):
    """It is another's; the record is dropped."""
    record(settings, stranger.pid, psutil.Process(stranger.pid).create_time() - 3600)
    assert (embedded.down(settings), stranger.poll(), embedded.down(settings)) == ([], None, [])


def test_down_ends_what_a_dead_service_left_in_its_session(settings):
    """A scheduler that was killed leaves workers; `down` finds them by their session."""
    code = "import os, time; os.fork() or time.sleep(600)"
    leader = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True)
    started = psutil.Process(leader.pid).create_time()
    leader.wait(timeout=60)
    (left,) = [process for process in psutil.process_iter() if _session(process.pid) == leader.pid]
    record(settings, leader.pid, started)
    assert embedded.down(settings) == ["airflow"]
    assert not left.is_running() or left.status() == psutil.STATUS_ZOMBIE
    leader.stdout.close()


def _session(pid):
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None


class Guarded(BaseHTTPRequestHandler):
    """Airflow behind FAB's login, which knows no GET of a token. What it was told lies in `seen`."""

    seen: ClassVar[list[bytes]] = []

    def do_GET(self):
        known = self.headers["authorization"] == "Bearer t"
        self._answer(404 if self.path == "/auth/token" else 200 if known else 401, {})

    def do_POST(self):
        self.seen.append(self.rfile.read(int(self.headers["content-length"])))
        known = json.loads(self.seen[-1]) == {"username": "loader", "password": "right"}
        self._answer(*((201, {"access_token": "t"}) if known else (401, {"detail": "Invalid credentials"})))

    def _answer(self, status, body):
        said = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)

    def log_message(self, *_):
        pass


class Open(Guarded):
    """Airflow as it runs on loopback: a token for everybody."""

    def do_GET(self):
        self._answer(201, {"access_token": "t"})


class Encrypted(Guarded):
    """A port that wants TLS, as nginx answers who speaks plain HTTP there."""

    def do_GET(self):
        self._answer(400, "The plain HTTP request was sent to HTTPS port")


@pytest.fixture
def serve(tmp_path, monkeypatch):
    """Starts a server of a kind on 127.0.0.1; → its address. The account that .netrc has for it is (name, password)."""
    stack = contextlib.ExitStack()
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    Guarded.seen.clear()

    def start(kind, *account, host="127.0.0.1"):
        if account:
            (tmp_path / "netrc").write_text("machine {} login {} password {}\n".format(host, *account))
        server = stack.enter_context(ThreadingHTTPServer(("127.0.0.1", 0), kind))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        stack.callback(server.shutdown)
        return f"http://127.0.0.1:{server.server_port}"

    with stack:
        yield start


def test_where_airflow_asks_the_account_of_netrc_is_said(serve):
    """An Airflow that knows nobody without a name is told the account that .netrc has for its host."""
    with embedded.client(serve(Guarded, "loader", "right")) as airflow:
        assert airflow.get("/api/v2/assets").status_code == 200


def test_where_airflow_lets_everybody_in_no_password_is_told(serve):
    """On loopback a token is given for nothing, and what .netrc holds stays there."""
    with embedded.client(serve(Open, "loader", "right")) as airflow:
        assert airflow.headers["authorization"] == "Bearer t"
    assert Guarded.seen == []


def test_a_port_that_wants_tls_is_told_no_password(serve):
    """Who forgot the s of https has not sent the account over the network; the error says what is wrong."""
    with pytest.raises(SettingsError, match=r"(?s)does not take plain HTTP.*fix: .*https://127.0.0.1"):
        embedded.client(serve(Encrypted, "loader", "right"))
    assert Guarded.seen == []


@pytest.mark.parametrize(
    ("account", "host", "says"),
    [
        ((), "127.0.0.1", r"netrc: there is no account for 127.0.0.1.*\n  fix: write in it: machine 127.0.0.1 login"),
        (("loader", "right"), "elsewhere", r"netrc: there is no account for 127.0.0.1"),
        (
            ("loader", "wrong"),
            "127.0.0.1",
            r"netrc: Airflow at http://127.0.0.1:\d+.* refuses the account for 127.0.0.1",
        ),
    ],
)
def test_an_account_that_is_missing_or_wrong_is_named(serve, account, host, says):
    """The error says in which file, for which host, and what to write there."""
    with pytest.raises(SettingsError, match=says):
        embedded.client(serve(Guarded, *account, host=host))


@pytest.mark.parametrize(
    ("held", "waits_for"), [(fcntl.LOCK_EX, "`evergreen up` is starting Airflow"), (fcntl.LOCK_SH, None)]
)
def test_a_run_waits_while_airflow_is_being_started_and_says_so(settings, held, waits_for):
    """Beside an `up` it waits, beside another run it does not; then it is told whether Airflow runs here."""
    said, free = queue.Queue(), queue.Queue()

    def run():
        with embedded.turn(settings, said.put) as through_airflow:
            free.put(through_airflow)

    with embedded.locked(settings.home / "airflow" / "turn-lock", held):
        beside = threading.Thread(target=run)
        beside.start()
        if waits_for is None:
            assert free.get(timeout=60) is False
        else:
            assert waits_for in said.get(timeout=60)
            assert free.empty()
    beside.join(timeout=60)
    assert waits_for is None or free.get(timeout=60) is False


def test_up_waits_for_a_run_of_another_process_and_says_so(settings, monkeypatch):
    """A scheduler beside it would perform the same tasks; nothing is started before the run has ended."""
    said, ended = queue.Queue(), queue.Queue()

    def up(port):
        monkeypatch.setenv("AIRFLOW__API__PORT", str(port))
        try:
            list(embedded.up(settings, said.put))
        except SettingsError as error:
            ended.put(str(error))

    with socket.socket() as other:  # so that `up` ends at once, when its turn has come
        other.bind(("127.0.0.1", 0))
        other.listen()
        with embedded.turn(settings, said.put):
            beside = threading.Thread(target=up, args=[other.getsockname()[1]])
            beside.start()
            assert "waiting: an `evergreen run`" in said.get(timeout=60)
            assert ended.empty()
        assert "cannot be had" in ended.get(timeout=60)
        beside.join(timeout=60)
