"""What `init` does before a deployment starts, and the secrets that it is given."""

from __future__ import annotations

import netrc
import subprocess
import sys
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
    subprocess.run([sys.executable, MAKE, tmp_path, "--tls", "other.example.com"], check=True, capture_output=True)
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
