"""What `init` does before a deployment starts, and the secrets that it is given."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import netrc
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import psycopg
import pytest
import yaml

from evergreen.errors import SettingsError
from evergreen.orchestration.deployment import Login, logins, make_database, refuse_known

MAKE = Path(__file__).parents[3] / "config" / "make_secrets.py"


@pytest.fixture(scope="module")
def secrets(tmp_path_factory) -> Path:
    """A folder of secrets as `make stack` makes it."""
    folder = tmp_path_factory.mktemp("stack") / "secrets"
    subprocess.run([sys.executable, MAKE, folder], check=True, capture_output=True)
    return folder


@pytest.mark.parametrize(
    "text",
    [
        "admin:Admin:admin",
        "admin:password1234",
        "postgres:5432:evergreen:evergreen:evergreen",
        "redis://evergreen:changeme@redis:6379/0",
        "machine store login evergreen password secret",
        "0123456789",
    ],
)
def test_a_secret_that_can_be_guessed_is_refused(tmp_path, text):
    """A password of the examples, or a short one, stops the start; the error names the file."""
    path = tmp_path / "some_secret"
    path.write_text(f"fine:{'f' * 48}\n{text}\n")
    with pytest.raises(SettingsError, match="secrets/some_secret: a secret in it can be guessed"):
        refuse_known(path)


def test_a_secret_that_is_made_is_taken(secrets):
    """`init` takes whatever `make stack` makes."""
    given = yaml.safe_load((MAKE.parents[1] / "docker-compose.yaml").read_text())["services"]["init"]["secrets"]
    checked = [secrets / secret for secret in given if isinstance(secret, str)]
    for path in checked:
        refuse_known(path)
    assert {"databases", "airflow_users", "mlflow_users", "broker_url"} <= {path.name for path in checked}


def test_secrets_are_their_owners_and_stay(secrets):
    """Nobody else gets into the folder, no two folders have one in common, and making them again changes none."""
    before = {path.name: path.read_text() for path in secrets.iterdir() if path.is_file()}
    open_to_all = {path.name for path in (secrets, *secrets.iterdir()) if path.stat().st_mode & 0o077}
    assert open_to_all == {"redis_users", "metrics_token", "alertmanager_token", "grafana_password"}
    subprocess.run([sys.executable, MAKE, secrets], check=True, capture_output=True)
    assert {path.name: path.read_text() for path in secrets.iterdir() if path.is_file()} == before
    other = secrets.parent / "other"
    subprocess.run([sys.executable, MAKE, other], check=True, capture_output=True)
    assert [name for name, text in before.items() if (other / name).read_text() == text] == []


@pytest.mark.parametrize("name", ["databases", "broker_url", "airflow_loader", "mlflow_users", "store_password"])
def test_a_secret_made_anew_is_made_anew_wherever_it_stands(secrets, tmp_path, name):
    """No password of a removed file is left in any other: who still had one would be kept out."""
    folder = shutil.copytree(secrets, tmp_path / "secrets")
    old = re.findall("[0-9a-f]{48}", (folder / name).read_text())
    salted = (folder / "store_users").read_text(), (folder / "redis_users").read_text()
    (folder / name).unlink()
    subprocess.run([sys.executable, MAKE, folder], check=True, capture_output=True)
    said = {path.name: path.read_text() for path in folder.iterdir() if path.is_file()}
    assert old
    assert [found for found, text in said.items() if any(password in text for password in old)] == []
    hashed = {"store_password": said["store_users"] != salted[0], "broker_url": said["redis_users"] != salted[1]}
    assert hashed.get(name, True)


@pytest.mark.fault
def test_mlflows_machine_has_the_password_of_the_file_and_its_admin_keeps_its_own(tmp_path):
    """Made anew, a secret lets the workers in; what the administrator may have changed is left."""
    prepare = (
        "import sys\nfrom evergreen.registry import server\n"
        "from mlflow.server.auth.sqlalchemy_store import SqlAlchemyStore\n"
        "url, store = sys.argv[1], SqlAlchemyStore()\n"
        "for word in ('old', 'new'): server.prepare(url, {'admin': word * 8, 'evergreen': word * 8})\n"
        "store.init_db(url)\n"
        "print([store.authenticate_user(*each) for each in (('admin', 'old' * 8), ('evergreen', 'new' * 8))])\n"
    )
    url = f"sqlite:///{tmp_path}/mlflow.db"
    ini = MAKE.with_name("mlflow-auth.ini").read_text()
    (tmp_path / "auth.ini").write_text(re.sub("(?m)^database_uri = .*$", f"database_uri = {url}", ini))
    auth = {"MLFLOW_AUTH_CONFIG_PATH": str(tmp_path / "auth.ini"), "MLFLOW_FLASK_SERVER_SECRET_KEY": "x"}
    told = subprocess.run(
        [sys.executable, "-c", prepare, url],
        env={**os.environ, **auth},
        capture_output=True,
        text=True,
        check=False,
    )
    assert told.stdout.splitlines()[-1:] == ["[True, True]"], told.stderr[-2000:]


def test_a_worker_knows_no_password_of_airflows_database(secrets):
    """Of the databases that `init` makes, a worker is told the events' alone."""
    made = {login.database: login for login in logins(secrets / "databases")}
    assert made.keys() == {"airflow", "evergreen", "mlflow"}
    assert logins(secrets / "databases_worker") == [made["evergreen"]]
    assert logins(secrets / "databases_control") == [made["airflow"], made["evergreen"]]


def test_machines_sign_in_by_the_account_that_is_made_for_them(secrets):
    """A worker finds in .netrc what `init` makes in Airflow: a name and a password, for the host of EVERGREEN_URL."""
    name, password = (secrets / "airflow_loader").read_text().strip().split(":")
    assert netrc.netrc(secrets / "netrc").authenticators("airflow-api") == (name, "", password)


def test_a_first_certificate_is_for_its_host_and_a_teams_own_stays(tmp_path):
    """What `--tls` makes proves itself for the host that was named and for no other; what is there is left."""
    subprocess.run([sys.executable, MAKE, tmp_path, "--tls", "ml.example.com"], check=True, capture_output=True)
    pair = [tmp_path / "tls" / name for name in ("cert.pem", "key.pem")]
    before = [path.read_text() for path in pair]
    assert [path.stat().st_mode & 0o077 for path in (*pair, tmp_path / "tls")] == [0, 0, 0]
    verify = ["openssl", "verify", "-x509_strict", "-CAfile", pair[0], "-purpose", "sslserver", "-verify_hostname"]
    proved = [
        subprocess.run([*verify, host, pair[0]], capture_output=True, check=False).returncode == 0
        for host in ("ml.example.com", "localhost", "example.com")
    ]
    assert proved == [True, True, False]
    for host, unknown in (
        ("ml.example.com", False),
        ("127.0.0.1", False),
        ("ml.example.org", True),
        ("10.0.0.1", True),
    ):
        again = subprocess.run(
            [sys.executable, MAKE, tmp_path, "--tls", host], check=True, capture_output=True, text=True
        )
        assert (f"cert.pem: no certificate for {host}, " in again.stderr, bool(again.stderr)) == (unknown, unknown)
        assert again.stdout.strip().isdigit()
    assert [path.read_text() for path in pair] == before


def test_a_role_enters_its_own_database_alone(postgres):
    """Each role owns its database and may not connect to the other; asked again, only the password changes."""
    made = [Login("server", "5432", name, name, "f" * 48) for name in ("one", "two")]
    with psycopg.connect(postgres.database().replace("+psycopg", ""), autocommit=True) as server:
        for login in (*made, *made):
            make_database(server, login)
        may = "SELECT has_database_privilege(%s, %s, 'CONNECT')"
        assert [server.execute(may, [role, name]).fetchone() for role in ("one", "two") for name in ("one", "two")] == [
            (role == name,) for role in ("one", "two") for name in ("one", "two")
        ]
        kept = server.execute("SELECT rolpassword FROM pg_authid WHERE rolname = 'one'").fetchone()
    assert kept[0].startswith("SCRAM-SHA-256$")


def test_a_backup_of_a_stack_that_does_not_run_is_refused(tmp_path):
    """It says what does not run and what to do, and leaves nothing behind."""
    told = subprocess.run(
        [sys.executable, MAKE.with_name("backup.py"), "make", tmp_path / "backups"],
        env={"PATH": "/usr/bin:/bin", "EVERGREEN_SECRETS": str(tmp_path / "secrets")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert told.returncode == 1
    assert "not running: metrics, mlflow, postgres" in told.stderr
    assert "make stack" in told.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_written_to_is_copied(tmp_path):
    """An object that arrives while the store is read, and one that is gone, end no backup; a folder that is not there does."""
    objects, incoming = tmp_path / "objects", tmp_path / "incoming"
    for folder in (objects, incoming):
        folder.mkdir()
    (objects / "large").write_bytes(b"x" * 2_000_000)
    (incoming / "arriving").write_bytes(b"half")
    spec = importlib.util.spec_from_file_location("backup", MAKE.with_name("backup.py"))
    backup = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(backup)
    with subprocess.Popen(backup._going_on(str(tmp_path)), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as tar:
        read = tar.stdout.read(10_240)  # tar waits in the midst of the large one: a pipe holds less
        (incoming / "arriving").rename(objects / "small")
        read += tar.stdout.read()
    assert tar.returncode == 0
    with tarfile.open(fileobj=io.BytesIO(read)) as archive:
        assert {"./objects", "./objects/large"} <= set(archive.getnames()) <= {".", "./objects", "./objects/large"}
    assert subprocess.run(backup._going_on(str(tmp_path / "none")), capture_output=True, check=False).returncode


DOCKER = """#!/bin/sh
echo "$EVERGREEN_SECRETS $EVERGREEN_UID $*" >> "$TOLD"
case "$*" in
  *"config --format json") echo '{"name": "evergreen"}' ;;
  "image inspect"*) echo sha256:0 ;;
esac
case "$*" in *" run "*) cat > /dev/null ;; esac
"""
"""An engine with nothing on it that does whatever it is told, and writes down what that was."""


FULL = """#!/bin/sh
case "$*" in
  "compose ps"*) echo metrics mlflow postgres postgres-airflow store ;;
  *" exec "*) echo "no space left" >&2; exit 1 ;;
esac
"""
"""An engine whose stack runs, and whose disk is full."""


def test_a_backup_that_fails_leaves_nothing(tmp_path, secrets):
    """Half of one is none, and a disk that is full would be fuller with each try."""
    (tmp_path / "docker").write_text(FULL)
    (tmp_path / "docker").chmod(0o755)
    given = shutil.copytree(secrets, tmp_path / "secrets")
    (given / "image.env").touch()
    told = subprocess.run(
        [sys.executable, MAKE.with_name("backup.py"), "make", tmp_path / "backups"],
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "EVERGREEN_SECRETS": str(given)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (told.returncode, "no space left" in told.stderr) == (1, True)
    assert list((tmp_path / "backups").iterdir()) == []


def test_a_backup_goes_to_no_other_fernet_key(tmp_path, secrets):
    """What Airflow keeps encrypted could not be read: it says so before anything is filled."""
    backup = tmp_path / "backup"
    backup.mkdir()
    (tmp_path / "fernet_key").write_text("another\n")
    with tarfile.open(backup / "secrets.tar", "w") as archive:
        archive.add(tmp_path / "fernet_key", "./fernet_key")
    files = {"secrets.tar": {"sha256": hashlib.sha256((backup / "secrets.tar").read_bytes()).hexdigest()}}
    (backup / "manifest.json").write_text(json.dumps({"made": "then", "files": files}))
    told = subprocess.run(
        [sys.executable, MAKE.with_name("backup.py"), "restore", backup],
        env={"PATH": "", "EVERGREEN_SECRETS": str(secrets)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert told.returncode == 1
    assert f"{secrets}/fernet_key: another key than the backup's" in told.stderr


def test_a_restore_on_a_bare_machine_builds_before_it_fills(tmp_path):
    """The images are made, for the owner of the backup's secrets, before a volume is; Compose gets no name for a path."""
    project, backup = tmp_path / "project", tmp_path / "backup"
    (project / "config").mkdir(parents=True)
    for name in ("Makefile", ".env", "config/backup.py", "config/make_secrets.py"):
        shutil.copy(MAKE.parents[1] / name, project / name)
    (tmp_path / "docker").write_text(DOCKER)
    (tmp_path / "docker").chmod(0o755)
    backup.mkdir()
    for name in ("postgres.tar.gz", "postgres-airflow.tar.gz", "store.tar", "mlflow.tar", "snapshots.bundle"):
        (backup / name).write_text(name)
    (tmp_path / "fernet_key").write_text("kept\n")
    with tarfile.open(backup / "secrets.tar", "w") as archive:
        archive.add(tmp_path / "fernet_key", "fernet_key")
    files = {file.name: {"sha256": hashlib.sha256(file.read_bytes()).hexdigest()} for file in backup.iterdir()}
    (backup / "manifest.json").write_text(json.dumps({"made": "then", "files": files}))
    done = subprocess.run(
        ["make", "restore", f"FROM={backup}", f"PYTHON={sys.executable}"],
        cwd=project,
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "TOLD": str(tmp_path / "told")},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    secrets = project / "secrets"
    assert (secrets / "fernet_key").read_text() == "kept\n"
    told = [line.split(" ", 2) for line in (tmp_path / "told").read_text().splitlines()]
    built, filled = (
        [place for place, (_, _, words) in enumerate(told) if words.startswith(start)]
        for start in ("compose build init store", "compose run ")
    )
    assert (len(filled), built[0] < filled[0]) == (5, True)
    assert {told[place][1] for place in built} == {str(secrets.stat().st_uid)}
    assert {told[place][0] for place in filled} == {str(secrets)}
