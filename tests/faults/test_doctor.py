"""What `evergreen doctor` finds: each fault is made, found, mended as the finding says, and not found any more."""

import contextlib
import hashlib
import json
import os
import shutil
import sqlite3
import subprocess
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from tests.faults.conftest import AS_OF, DAYS, NAME, Home
from typer.testing import CliRunner

from evergreen import database as db
from evergreen.cli import app
from evergreen.loop import doctor
from evergreen.loop.doctor import Finding, examine
from evergreen.orchestration import embedded
from evergreen.settings import PREFIX, Settings

pytestmark = [pytest.mark.slow, pytest.mark.fault]


@pytest.fixture
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    """A home with two champions, one after the other: each test has its own, since it breaks it."""
    home = Home.make(tmp_path_factory.mktemp("origin"), days=range(DAYS + 1))
    home.perform("first")
    home.write(training={"params": {"steps": 60}})
    home.perform("second", as_of=AS_OF + timedelta(days=1))
    return home


def champion(home: Home) -> int:
    assert home.champion is not None
    return home.champion.version


def findings(home: Home, now: datetime | None = None, settings: Settings | None = None) -> list[Finding]:
    return [finding for check in examine(settings or home.settings, now) for finding in check.findings]


def only(found: list[Finding]) -> Finding:
    (finding,) = found
    return finding


def evergreen(home: Home, *words: str, **more: str):
    env = {f"{PREFIX}HOME": str(home.settings.home), f"{PREFIX}PACKS": str(home.settings.packs)}
    return CliRunner().invoke(app, list(words), env=env | {f"{PREFIX}PROJECT": str(home.settings.project)} | more)


def content(folder: Path) -> dict[str, str]:
    """The files of a folder by hash; without what SQLite's readers share in memory."""
    files = (file for file in folder.rglob("*") if file.is_file() and not file.name.endswith("-shm"))
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_a_sound_home_is_said_to_be_sound_and_left_as_it_is(home: Home) -> None:
    """Status 0, a line for each check, and not a byte changed."""
    before = content(home.settings.home)
    answer = evergreen(home, "doctor")
    assert (answer.exit_code, answer.output.splitlines()[-1]) == (0, "Nothing is wrong with this home.")
    told = json.loads(evergreen(home, "doctor", "--json").output)
    names = ["versions", "packs", "home", "disk", "processes", "events", "leases", "registry", "store", "snapshots"]
    assert (told["healthy"], [check["name"] for check in told["checks"]]) == (True, names)
    assert content(home.settings.home) == before


def test_an_absent_home_is_not_made(tmp_path: Path) -> None:
    """The finding says how to make one; after the first run it is sound."""
    home = Home.make(tmp_path)
    finding = only(findings(home))
    assert finding.what == f"there is no home at {home.settings.home}"
    assert "evergreen run PACK" in finding.fix
    assert not home.settings.home.exists()
    home.perform("r", until="snapshot")
    assert findings(home) == []


def test_an_alias_that_somebody_moved_is_found(home: Home) -> None:
    """The rollback that the finding names goes back; the status is 1 before and 0 after."""
    home.registry.set_alias(NAME, "champion", 1)
    assert evergreen(home, "doctor").exit_code == 1
    finding = only(findings(home))
    assert "alias champion is on version 1, and the ledger says version 2" in finding.what
    assert f'evergreen rollback {NAME} --to 2 --why "…"' in finding.fix
    assert evergreen(home, "rollback", NAME, "--to", "2", "--why", "by hand").exit_code == 0
    assert (findings(home), champion(home)) == ([], 2)


def test_an_alias_that_somebody_moved_may_stay(home: Home) -> None:
    """The next run writes it down."""
    home.registry.set_alias(NAME, "champion", 1)
    assert f"to keep version 1, let the next run write it down: evergreen run {NAME}" in only(findings(home)).fix
    home.perform("third", as_of=AS_OF)
    assert findings(home) == []


def test_a_version_whose_files_are_gone_is_found(home: Home, tmp_path: Path) -> None:
    """It is sound again with the folder back."""
    folder = next(Path(home.settings.mlflow_artifacts).glob(f"{NAME}/models/*/artifacts"))
    folder.rename(tmp_path / "away")
    finding = only(findings(home))
    assert f"are gone: there is no {folder / 'MLmodel'}" in finding.what
    assert f"bring {folder} back" in finding.fix
    (tmp_path / "away").rename(folder)
    assert findings(home) == []


def test_a_version_without_files_and_without_a_backup_is_made_again(home: Home) -> None:
    """It is deleted as in MLflow's UI, and the next run makes a champion."""
    shutil.rmtree(Path(home.settings.mlflow_artifacts) / NAME / "models")
    assert all("delete the version in MLflow's UI" in finding.fix for finding in findings(home))
    for version in home.registry.versions(NAME):
        home.registry._client.delete_model_version(NAME, str(version.version))
    assert "MLflow has no such version" in only(findings(home)).what
    home.perform("again", as_of=AS_OF + timedelta(days=1))
    assert findings(home) == []


def test_an_object_that_the_remote_lacks_is_copied_from_the_cache(home: Home) -> None:
    """The command in the finding does it."""
    value = home.database.latest(NAME, kind="stage", stage="train").body["value"]
    doctor._object(Path(home.settings.data_remote), value["model"]["hash"]).unlink()
    finding = only(findings(home))
    assert f"the store's remote lacks 1 object of {NAME}: {value['model']['hash']}" in finding.what
    subprocess.run(finding.fix.partition("copy what is not there: ")[2], shell=True, check=True)
    assert findings(home) == []


def test_an_object_that_is_nowhere_is_made_again(home: Home) -> None:
    """A forced run makes it, as the finding says."""
    md5 = home.database.latest(NAME, kind="stage", stage="snapshot").body["value"]["hash"]
    for place in (home.settings.cache, Path(home.settings.data_remote)):
        doctor._object(place, md5).unlink()
    assert f"evergreen run {NAME} --force" in only(findings(home)).fix
    home.perform("forced", as_of=AS_OF + timedelta(days=1), force=True)
    assert findings(home) == []


def test_a_repository_that_takes_no_pushes_is_found(home: Home, tmp_path: Path) -> None:
    """Broken, or gone; it is sound when it is back."""
    place = Path(home.settings.data_repository)
    (place / ".git" / "HEAD").rename(tmp_path / "HEAD")
    assert "takes no push" in only(findings(home)).what
    (tmp_path / "HEAD").rename(place / ".git" / "HEAD")
    assert findings(home) == []
    place.rename(tmp_path / "away")
    assert f"the repository of snapshots is gone: {place}" in only(findings(home)).what
    (tmp_path / "away").rename(place)
    assert findings(home) == []


def test_a_lease_of_a_process_that_died_is_found(home: Home) -> None:
    """The run that takes it over removes it; a lease that is held is none."""
    with home.database.lease(f"stage:{NAME}", "r"):
        assert findings(home) == []
    ended = (datetime.now(UTC) - timedelta(hours=2)).isoformat(timespec="microseconds")
    with home.database.writing() as connection:
        row = {"name": f"stage:{NAME}", "holder": "r", "token": "t", "expires_at": ended}
        connection.execute(sa.insert(db.leases).values(**row))
    finding = only(findings(home))
    assert finding.what == f"r died 2 hours ago while it held the lease stage:{NAME}"
    assert f"evergreen run {NAME}" in finding.fix
    home.perform("next", until="ingest")
    assert findings(home) == []


def test_an_event_from_the_future_is_found(home: Home) -> None:
    """A clock that is an hour behind; nothing is found once it is right."""
    behind = datetime.now(UTC) - timedelta(hours=1, minutes=5)
    assert {finding.what.partition(", ")[2] for finding in findings(home, behind)} == {
        "1 hour after this machine's clock"
    }
    assert findings(home) == []


def test_an_older_database_is_not_brought_up_to_date(tmp_path: Path) -> None:
    """The next command that opens it does so, as the finding says."""
    home = Home.make(tmp_path)
    home.settings.home.mkdir()
    config = Config()
    config.set_main_option("script_location", str(Path(db.__file__).parent / "migrations"))
    file = home.settings.home / "evergreen.db"
    engine = sa.create_engine(f"sqlite:///{file}")
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0002")
    engine.dispose()
    before = file.read_bytes()
    finding = only(findings(home))
    assert f"is at revision 0002, and this Evergreen works with {db.HEAD}" in finding.what
    assert file.read_bytes() == before
    assert evergreen(home, "ledger", "verify").exit_code == 0
    assert findings(home) == []


def test_a_home_that_was_moved_is_found_and_left_to_the_next_command(home: Home, tmp_path: Path) -> None:
    """`ledger verify` sets its paths right."""
    evergreen(home, "ledger", "verify")  # it knows where it lies
    place = tmp_path / "elsewhere"
    shutil.copytree(home.settings.home, place)
    there = Home(Settings.from_env({f"{PREFIX}HOME": str(place), f"{PREFIX}PACKS": str(home.settings.packs)}))
    there = Home(there.settings.model_copy(update={"project": home.settings.project}))
    before = content(place)
    found = findings(there)
    assert f"{place} was copied from {home.settings.home}" in found[0].what
    assert content(place) == before
    verified = evergreen(there, "ledger", "verify")
    assert verified.exit_code == 0, verified.output
    assert findings(there) == []


def test_services_that_have_ended_are_found(home: Home) -> None:
    """`evergreen down` forgets them."""
    dead = {"address": "http://127.0.0.1:1", "processes": [{"pid": os.getpid(), "started": 1.0}]}
    (home.settings.home / "services.json").write_text(json.dumps({"airflow": dead}))
    assert "airflow, which `evergreen up` started on this home, has ended" in only(findings(home)).what
    embedded.down(home.settings)
    assert findings(home) == []


def test_packages_that_are_not_as_locked_are_found(home: Home) -> None:
    """Of another version, or absent; a line for another system is not meant."""
    lock = home.settings.project / "requirements.txt"
    lock.write_text(
        f"polars==0.0.1 \\\n    --hash=sha256:0\nsqlalchemy=={sa.__version__}\nno-such==1.0\nwindows==1 ; sys_platform == 'win32'\n"
    )
    try:
        finding = only(findings(home))
        assert "2 packages not as" in finding.what
        assert "no-such is absent instead of 1.0, polars " in finding.what
        assert finding.fix.endswith(f"-r {lock}")
        lock.write_text(f"sqlalchemy=={sa.__version__}\n")
        assert findings(home) == []
    finally:
        lock.unlink()


def test_a_disk_that_is_almost_full_is_found(tmp_path: Path) -> None:
    """By the setting that moves the folder elsewhere."""
    full = doctor.disk({"cache": (tmp_path, 10**9), "home": (tmp_path, 10**11)})
    assert "set EVERGREEN_CACHE to a folder on a larger disk" in only(list(full.findings)).fix
    assert doctor.disk({"cache": (tmp_path, 10**10)}).findings == ()


def test_a_pack_that_cannot_be_loaded_is_found(home: Home) -> None:
    """With the words that `evergreen check` has for it."""
    text = (home.folder / "pack.yaml").read_text()
    (home.folder / "pack.yaml").write_text(text.replace("owner:", "owns:"))
    assert "owns" in only(findings(home)).what
    (home.folder / "pack.yaml").write_text(text)
    assert findings(home) == []


def test_a_year_of_runs_is_examined_within_three_seconds(home: Home) -> None:
    """2,555 stage events of 20 kB each; what was too many to look at is said."""
    rows = home.database.events(NAME, kind="stage")
    home.database.engine.dispose()
    with sqlite3.connect(home.settings.home / "evergreen.db") as connection:
        first = len(home.database.events(NAME)) + 1
        body = rows[-1].body | {"value": rows[-1].body["value"] | {"reasons": "x" * 20_000}}
        connection.executemany(
            "INSERT INTO events (pack, position, kind, run_id, key, at, body, previous, hash, stage) "
            "VALUES (?, ?, 'stage', ?, ?, ?, ?, '', '', 'promote')",
            [(NAME, first + n, f"r{n}", f"{n}", rows[-1].at.isoformat(), json.dumps(body)) for n in range(2555)],
        )
    connection.close()
    try:
        began = time.process_time()
        checks = examine(home.settings)
        assert time.process_time() - began < 3
        assert [finding for check in checks for finding in check.findings] == []
        assert any("made before" in (check.skipped or "") for check in checks)
    finally:
        with contextlib.closing(sqlite3.connect(home.settings.home / "evergreen.db")) as connection, connection:
            connection.execute("DELETE FROM events WHERE pack = ? AND position >= ?", (NAME, first))
