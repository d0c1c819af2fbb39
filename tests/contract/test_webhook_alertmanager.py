"""A real Alertmanager, over loopback: what it fires, repeats and resolves arrives as it should."""

import json
import shutil
import subprocess
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
from tests.served import Served
from tests.servers import free_port

BINARY = shutil.which("prometheus-alertmanager") or shutil.which("alertmanager")

CONFIG = """
route:
  receiver: evergreen
  group_by: [alertname]
  group_wait: 10ms
  group_interval: 100ms
  repeat_interval: 200ms
receivers:
  - name: evergreen
    webhook_configs:
      - url: {url}/alerts/digits
        max_alerts: 100
        http_config:
          authorization: {{credentials: {token}}}
"""

pytestmark = pytest.mark.skipif(
    BINARY is None, reason="Alertmanager is not installed: apt-get install prometheus-alertmanager"
)


def until(condition):
    """What the condition gives as soon as it is true."""
    deadline = time.monotonic() + 60
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not become true in time"
        time.sleep(0.02)
    return found


class Alertmanager:
    """Alertmanager with one receiver."""

    def __init__(self, folder: Path, config: str) -> None:
        self.url = f"http://127.0.0.1:{free_port()}"
        (folder / "alertmanager.yml").write_text(config, encoding="utf-8")
        self.log = folder / "alertmanager.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [
                    BINARY,
                    f"--config.file={folder / 'alertmanager.yml'}",
                    f"--storage.path={folder / 'storage'}",
                    f"--web.listen-address={self.url.removeprefix('http://')}",
                    "--cluster.listen-address=",
                ],
                stdout=log,
                stderr=log,
            )
        until(self.is_ready)

    def is_ready(self) -> bool:
        assert self.process.poll() is None, self.log.read_text(encoding="utf-8")
        try:
            return httpx.get(f"{self.url}/-/ready", trust_env=False).is_success
        except httpx.TransportError:
            return False

    def tell(self, name: str, since: datetime, until: datetime, summary: str) -> None:
        """What Prometheus posts while an alert fires, and once when it has ended."""
        alert = {
            "labels": {"alertname": name, "carrier": "UA"},
            "annotations": {"summary": summary},
            "startsAt": since.isoformat(),
            "endsAt": until.isoformat(),
            "generatorURL": "http://prometheus.example/graph",
        }
        httpx.post(f"{self.url}/api/v2/alerts", json=[alert], trust_env=False).raise_for_status()


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """An alert fires, is repeated, is resolved; a second one fires. What was kept, and what was answered."""
    folder = tmp_path_factory.mktemp("alertmanager")
    now = datetime.now(UTC)
    with Served(folder / "home").running() as server:
        alertmanager = Alertmanager(folder, CONFIG.format(url=server.url, token=server.token))
        try:
            alertmanager.tell("Drift", now, now + timedelta(hours=1), "PSI is 0.31")
            until(lambda: len(server.statuses) >= 3)  # the first, and two repeats
            repeated = len(server.kept())
            alertmanager.tell("Drift", now, datetime.now(UTC), "PSI is 0.31")
            until(lambda: len(server.kept()) == 2)
            alertmanager.tell("Latency", now, now + timedelta(hours=1), "p95 is 40 ms")
            until(lambda: len(server.kept()) == 3)
        finally:
            alertmanager.process.terminate()
            alertmanager.process.wait()
        return {
            "repeated": repeated,
            "kept": [json.loads(json.dumps(alert.body)) for alert in server.kept()],
            "statuses": list(server.statuses),
        }


def test_every_notification_is_taken(story):
    """By its token, at the first attempt."""
    assert set(story["statuses"]) == {202}


def test_what_fires_is_kept_and_can_be_read(story):
    """Name and summary are the reason; labels are evidence; the sender is known."""
    first = story["kept"][0]
    assert (first["sender"], first["reason"], first["status"]) == ("alertmanager", "Drift: PSI is 0.31", "firing")
    assert first["evidence"]["labels"] == {"alertname": "Drift", "carrier": "UA"}


def test_a_repeated_notification_is_no_new_alert(story):
    """Three notifications, one alert."""
    assert story["repeated"] == 1


def test_what_is_resolved_is_kept_as_resolved(story):
    """With the fingerprint of what fired."""
    fired, resolved, other = story["kept"]
    assert (resolved["status"], resolved["fingerprint"]) == ("resolved", fired["fingerprint"])
    assert (other["reason"], other["fingerprint"] == fired["fingerprint"]) == ("Latency: p95 is 40 ms", False)
