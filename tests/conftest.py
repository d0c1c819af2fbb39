"""What every test may ask for."""

import contextlib
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from tests import containers
from tests.remotes import Bucket, Remote, Site
from tests.servers import S3, MissingError, Postgres
from tests.web import serving
from xdist.scheduler import LoadFileScheduling

# A busy machine fails no test, and every run tries the same examples.
hypothesis.settings.register_profile("evergreen", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("evergreen")

AIRFLOWS = {
    f"tests/{file}.py" for file in ("e2e/test_admission", "e2e/test_alerts", "e2e/test_approval", "e2e/test_monitor")
} | {
    f"tests/{file}.py"
    for file in (
        "e2e/test_scheduler",
        "e2e/test_webhook",
        "faults/test_storm",
        "faults/test_at_once",
        "dags/test_processor",
    )
}
"""The files whose tests bring up an Airflow of their own."""
APART = {"tests/faults/test_any_pack.py"}
"""The files whose tests share nothing: each goes where there is room."""
LONG = ("tests/e2e/", "tests/faults/")


class OneAirflowAtATime(LoadFileScheduling):
    """A file's tests go to one process, but those of APART; and so do all AIRFLOWS: two at once starve a small machine."""

    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        if file in APART:
            return nodeid
        return "airflow" if file in AIRFLOWS else file


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest lots begin first, or one process would wait for them at the end."""
    items.sort(key=lambda item: (item.nodeid.split("::")[0] not in AIRFLOWS, not item.nodeid.startswith(LONG)))


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> OneAirflowAtATime:
    return OneAirflowAtATime(config, log)


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Count the skipped tests by the reason of each, so that nobody takes a skipped test for a passed one."""
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = Counter(report.longrepr[2].removeprefix("Skipped: ") for report in skipped)
    for reason, number in reasons.most_common():
        terminalreporter.write_line(f"skipped {number}: {reason}")


@pytest.fixture(scope="session")
def compose() -> None:
    """Skip the test where Docker has no Compose; a client without the plugin answers each `docker compose` with an error."""
    command = ["docker", "compose", "version"]
    if not shutil.which("docker") or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("Docker's Compose plugin is not installed (of Docker's packages: docker-compose-plugin)")


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A real PostgreSQL, made once for all tests of this process that ask for it; a test that kills it starts it again."""
    try:
        server = Postgres()
    except MissingError as missing:
        pytest.skip(str(missing))
    try:
        server.start()
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="session")
def s3() -> Iterator[S3]:
    """An S3 service, made once for all tests of this process that ask for it."""
    server = S3()
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="session")
def image() -> Iterator[str]:
    """Evergreen's image, with the package as it is here."""
    with contextlib.ExitStack() as held:
        try:
            made = held.enter_context(containers.image())
        except MissingError as missing:
            pytest.skip(str(missing))
        yield made


@pytest.fixture(scope="session")
def door(image: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The socket of a door to the engine, for jobs in that image and in any test's folder."""
    with containers.door(tmp_path_factory.getbasetemp(), image) as path:
        yield path


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path) -> str:
    """The URL of a new, empty events database, of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'events.db'}"
    return str(request.getfixturevalue("postgres").database())


@pytest.fixture
def remote(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Remote]:
    """The remote of `store`: a folder, or what a test's parameter says."""
    kind = getattr(request, "param", "folder")
    if kind == "s3":
        yield Bucket(request.getfixturevalue("s3"), monkeypatch)
    elif kind == "http":
        (tmp_path / "home" / "remote").mkdir(parents=True)
        with serving(tmp_path / "home" / "remote") as web:
            yield Site(web, monkeypatch, tmp_path)
    else:
        yield Remote(tmp_path / "home" / "remote")
