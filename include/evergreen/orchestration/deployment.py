"""What a deployment of several services needs before they start; run to its end, each time, by the service `init`.

Roles and databases, the tables of Airflow, of the events and of MLflow, people and their roles, the pool of admission,
the senders file, the snapshots' repository. What is there is left as it is. Nothing starts on a secret that is known.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
from psycopg import sql

from evergreen import database as db
from evergreen.data.store import Store
from evergreen.errors import SettingsError
from evergreen.orchestration import embedded
from evergreen.registry import server
from evergreen.settings import Settings
from evergreen.triggers import senders

SECRETS = Path("/run/secrets")
SOCKETS = Path("/run")
"""`<host>/` in it is where the server of that name has its socket, for `init` alone."""

SHORTEST = 24
"""A secret that is made has 32 characters and more."""

KNOWN = frozenset(
    [
        "admin",
        "airflow",
        "changeme",
        "default",
        "evergreen",
        "guest",
        "minioadmin",
        "mlflow",
        "password",
        "postgres",
        "redis",
        "root",
        "secret",
        "temporary_key",
        "test",
        "user",
        "viewer",
    ]
)
"""What stands in other projects' examples; a secret made of nothing but such words and digits is refused."""


@dataclass(frozen=True)
class Login:
    """A line of a `.pgpass` file: a role, its password, and its database on a server."""

    host: str
    port: str
    database: str
    role: str
    password: str


def main() -> None:
    """Prepare everything, saying what. Raises SettingsError where a secret must not be used."""
    settings = Settings.from_env()
    for path in sorted(SECRETS.glob("*")):
        refuse_known(path)
    for login in logins(SECRETS / "databases"):
        _say(f"database {login.database} on {login.host}")
        with psycopg.connect(host=str(SOCKETS / login.host), user="postgres", autocommit=True) as database_server:
            make_database(database_server, login)
    for name, prepare in _PREPARE.items():
        _say(name)
        prepare(settings)
    _say("ready")


def note_backup(name: str, size: int) -> None:
    """Write down that a backup ended: rules look at how long ago."""
    db.connect(Settings.from_env().database_url).append(db.HOME, "backup", {"name": name, "bytes": size})


def refuse_known(path: Path) -> None:
    """Raise SettingsError where a secret of this file is short, or one that everybody knows."""
    for secret in _secrets_of(path.read_text(encoding="ascii")):
        words = secret.lower().strip("0123456789-_!.")
        if len(secret) < SHORTEST or words in KNOWN:
            raise SettingsError(
                f"secrets/{path.name}: a secret in it can be guessed: it is "
                + (f"shorter than {SHORTEST} characters" if len(secret) < SHORTEST else "one that everybody knows"),
                fix=f"remove that file, and make stack makes another ({path} in this container)",
            )


def _secrets_of(text: str) -> Iterator[str]:
    """What follows the last colon of each line; of a URL, its password; of netrc, the last word."""
    for line in text.splitlines():
        if not line.strip() or line.startswith(("[", "#")):
            continue
        secret = line.partition("://")[2].partition("@")[0] or line.split()[-1]
        yield secret.rpartition(":")[2]


def logins(path: Path) -> list[Login]:
    """The lines of a `.pgpass` file."""
    return [Login(*line.split(":")) for line in path.read_text(encoding="ascii").splitlines() if line]


def make_database(database_server: psycopg.Connection[Any], login: Login) -> None:
    """The role with its password, and its database, which nobody else may enter."""
    ask = database_server.execute
    # The server, and its log, are told a verifier; the password stays here.
    verifier = database_server.pgconn.encrypt_password(login.password.encode(), login.role.encode(), b"scram-sha-256")
    role, database = sql.Identifier(login.role), sql.Identifier(login.database)
    verb = sql.SQL("ALTER" if ask("SELECT 1 FROM pg_roles WHERE rolname = %s", [login.role]).fetchone() else "CREATE")
    ask(sql.SQL("{} ROLE {} LOGIN PASSWORD {}").format(verb, role, sql.Literal(verifier.decode())))
    if not ask("SELECT 1 FROM pg_database WHERE datname = %s", [login.database]).fetchone():
        ask(sql.SQL("CREATE DATABASE {} OWNER {}").format(database, role))
    ask(sql.SQL("REVOKE ALL ON DATABASE {} FROM PUBLIC").format(database))


def _prepare_airflow(_settings: Settings) -> None:
    from airflow.utils.db import upgradedb

    upgradedb()
    embedded.make_pool()


LOADER = [
    ("can_create", "Assets"),
    ("can_read", "Assets"),
    ("can_read", "Asset Aliases"),
    ("can_read", "Website"),  # FAB gives it to every role
]
"""What the role Loader may: say that data arrived."""


def _prepare_people(_settings: Settings) -> None:
    """Airflow's roles, and the people of `airflow_users` that are not there: who changed a password keeps it.

    And the machines' account of `airflow_loader`, whose password is always the file's.
    """
    from airflow.providers.fab.auth_manager.cli_commands.utils import get_application_builder

    with get_application_builder() as builder:
        manager: Any = builder.sm
        manager.sync_roles()
        manager.bulk_sync_roles([{"role": "Loader", "perms": LOADER}])
        machine, _, secret = (SECRETS / "airflow_loader").read_text(encoding="ascii").strip().partition(":")
        if known := manager.find_user(machine):
            manager.reset_password(known.id, secret)
        else:
            _add_user(manager, machine, "Loader", secret)
        for line in (SECRETS / "airflow_users").read_text(encoding="ascii").splitlines():
            name, role, password = line.split(":")
            if not manager.find_user(name):
                _add_user(manager, name, role, password)


def _add_user(manager: Any, name: str, role: str, password: str) -> None:
    if not manager.add_user(name, name, "", f"{name}@localhost", manager.find_role(role), password):
        raise SettingsError(f"Airflow refused the user {name!r}", fix="see what it says above")


def _prepare_events(settings: Settings) -> None:
    _ = db.connect(settings.database_url).engine


def _prepare_mlflow(_settings: Settings) -> None:
    lines = (SECRETS / "mlflow_users").read_text(encoding="ascii").splitlines()
    server.prepare(os.environ["MLFLOW_BACKEND_STORE_URI"], dict(_pair(line) for line in lines))


def _pair(line: str) -> tuple[str, str]:
    name, _, password = line.partition(":")
    return name, password


def _prepare_senders(settings: Settings) -> None:
    senders.ensure(settings)
    token = (SECRETS / "alertmanager_token").read_text(encoding="ascii").strip()
    senders.accept(settings.senders, "alertmanager", "bearer", token)


def _prepare_repository(settings: Settings) -> None:
    Store(settings).open_repository()


_PREPARE: Mapping[str, Callable[[Settings], None]] = {
    "Airflow's tables": _prepare_airflow,
    "people": _prepare_people,
    "the events": _prepare_events,
    "MLflow's tables and accounts": _prepare_mlflow,
    "senders": _prepare_senders,
    "the snapshots' repository": _prepare_repository,
}


def _say(what: str) -> None:
    print(f"init: {what}", flush=True)  # noqa: T201  a service's log


if __name__ == "__main__":
    if sys.argv[1:2] == ["backup"]:
        note_backup(sys.argv[2], int(sys.argv[3]))
    else:
        main()
