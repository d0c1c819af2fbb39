"""Every secret of the stack, each in a file of secrets/ that only its owner can read: `python3 config/make_secrets.py`.

What is there already stays; remove a file to have it made anew, with those that repeat what it says, and `make stack`
carries it into the services; people keep the passwords that they have. Passwords stand where stock tools look for them
(libpq's .pgpass, git's .netrc, MLflow's credentials, DVC's config), so that no service needs one in its environment. The
last line printed is the number of the user that owns them, whom the containers run as.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import os
import re
import secrets
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

SOMEBODY = 10001
"""Who owns the files when root makes them: no container runs as root."""

REPEATED = {
    "databases": ("databases_control", "databases_worker", "databases_mlflow"),
    "broker_url": ("redis_users",),
    "airflow_loader": ("netrc",),
    "mlflow_users": ("mlflow_credentials",),
    "store_password": ("store_users", "netrc", "dvc_config"),
}
"""Files, and those that hold the same secrets once more: made anew with them, for one old password keeps all out."""

PEOPLE = {"admin": "Admin", "operator": "User", "viewer": "Viewer"}
"""Airflow's users, and their roles there."""

OTHERS = ("redis_users", "metrics_token", "alertmanager_token", "grafana_password")
"""What Redis, Prometheus, Alertmanager and Grafana read as their images' own users; on the host, the folder's mode keeps
everybody else out. The first holds a hash."""


def main() -> None:
    """Make what is missing in the folder given, or in secrets/ beside this project; with `--tls HOST`, a first pair, too."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=Path(__file__).resolve().parents[1] / "secrets")
    parser.add_argument("--tls", metavar="HOST", help="what a certificate that it signs itself is for")
    asked = parser.parse_args()
    folder: Path = asked.folder
    folder.mkdir(mode=0o700, exist_ok=True)
    for name in [name for name in REPEATED if not (folder / name).exists()]:
        for repeats in REPEATED[name]:
            (folder / repeats).unlink(missing_ok=True)
    for path, make in _files(folder).items():
        if not path.exists():
            _write(path, make())
    senders = folder / "senders"  # `init` and `evergreen sender` write the file in it
    senders.mkdir(mode=0o700, exist_ok=True)
    if asked.tls:
        _certify(folder / "tls", asked.tls)
    owner = os.getuid() or SOMEBODY
    if os.getuid() == 0:
        for path in (folder, *folder.rglob("*")):
            os.chown(path, owner, owner)
    print(owner)  # noqa: T201


def _files(folder: Path) -> dict[Path, Callable[[], str]]:
    """Each file, and what makes its text; one that holds what another says comes after it."""

    def line_of(name: str, start: str) -> str:
        found = [line for line in (folder / name).read_text().splitlines() if line.startswith(start)]
        return found[0]

    def user(name: str, account: str = "evergreen") -> str:
        """The password of the account that the platform itself uses there."""
        _, password = line_of(name, account + ":").split(":")
        return password

    airflow, events, mlflow = "postgres-airflow:5432:airflow", "postgres:5432:evergreen", "postgres:5432:mlflow"
    makers: dict[str, Callable[[], str]] = {
        # Airflow's own keys.
        "fernet_key": lambda: base64.urlsafe_b64encode(secrets.token_bytes(32)).decode(),
        "jwt_secret": _password,
        "api_secret_key": _password,
        "mlflow_secret_key": _password,
        # host:port:database:user:password; `init` makes the roles and the databases that it says.
        "databases": lambda: "\n".join(
            f"{place}:{place.rpartition(':')[2]}:{_password()}" for place in (airflow, events, mlflow)
        ),
        "databases_control": lambda: f"{line_of('databases', airflow)}\n{line_of('databases', events)}",
        "databases_worker": lambda: line_of("databases", events),
        "databases_mlflow": lambda: line_of("databases", mlflow),
        # Celery's broker, and the same account for Redis itself, by the hash of its password.
        "broker_url": lambda: f"redis://evergreen:{_password()}@redis:6379/0",
        # Accounts: name:role:password, name:password.
        "airflow_users": lambda: "\n".join(f"{name}:{role}:{_password()}" for name, role in PEOPLE.items()),
        "airflow_loader": lambda: f"loader:{_password()}",
        "mlflow_users": lambda: f"admin:{_password()}\nevergreen:{_password()}",
        "mlflow_credentials": lambda: (
            f"[mlflow]\nmlflow_tracking_username = evergreen\nmlflow_tracking_password = {user('mlflow_users')}"
        ),
        "store_password": lambda: f"evergreen:{_password()}",
        "store_users": lambda: f"evergreen:{_salted(user('store_password'))}",
        "netrc": lambda: (
            f"machine store login evergreen password {user('store_password')}\n"
            f"machine airflow-api login loader password {user('airflow_loader', 'loader')}"
        ),
        "dvc_config": lambda: (
            "['remote \"store\"']\n    auth = basic\n    method = PUT\n    user = evergreen\n"
            f"    password = {user('store_password')}"
        ),
        # Who may read the metrics; who Alertmanager is to the webhook; Grafana's admin.
        "metrics_token": _password,
        "alertmanager_token": _password,
        "grafana_password": _password,
        "redis_users": lambda: (
            f"user default off\nuser evergreen on #{_sha256(folder / 'broker_url')} ~* &* +@all -@dangerous +info +keys"
        ),
    }
    return {folder / name: make for name, make in makers.items()}


def _password() -> str:
    return secrets.token_hex(24)


def _salted(password: str) -> str:
    """As nginx reads it. A password of 192 random bits needs no slow hash."""
    salt = secrets.token_bytes(8)
    digest = hashlib.sha1(password.encode() + salt, usedforsecurity=False).digest()
    return "{SSHA}" + base64.b64encode(digest + salt).decode()


def _sha256(broker_url: Path) -> str:
    password = broker_url.read_text().partition("//evergreen:")[2].partition("@")[0]
    return hashlib.sha256(password.encode()).hexdigest()


def _certify(folder: Path, host: str) -> None:
    """A key, and a certificate that is its own authority, for this host and for loopback, unless one of them is there."""
    folder.mkdir(mode=0o700, exist_ok=True)
    key, certificate = folder / "key.pem", folder / "cert.pem"
    kind = "IP" if re.fullmatch(r"[0-9.]+|[0-9a-f:]*:[0-9a-f:]*", host) else "DNS"
    if key.exists() or certificate.exists():  # a team's own pair
        _compare(certificate, kind, host)
        return
    names = ",".join(dict.fromkeys([f"{kind}:{host}", "DNS:localhost", "IP:127.0.0.1"]))
    config = f"""
[req]
distinguished_name = name
x509_extensions = extensions
prompt = no
[name]
CN = Evergreen
[extensions]
subjectAltName = {names}
basicConstraints = critical, CA:FALSE
keyUsage = critical, digitalSignature
extendedKeyUsage = serverAuth
subjectKeyIdentifier = hash
"""
    command = [
        *("openssl", "req", "-x509", "-config", "/dev/stdin", "-days", "365", "-sha256", "-nodes", "-newkey", "ec"),
        *("-pkeyopt", "ec_paramgen_curve:prime256v1", "-keyout", str(key), "-out", str(certificate)),
    ]
    try:
        subprocess.run(command, input=config, text=True, check=True, capture_output=True, umask=0o077)
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", "") or error
        sys.exit(f"{folder}: openssl made no certificate: {said}; put your own there: cert.pem and key.pem")


def _compare(certificate: Path, kind: str, host: str) -> None:
    """Say so where a certificate is not for this host: it may be meant, or be left of another name."""
    check = "-checkip" if kind == "IP" else "-checkhost"
    command = ["openssl", "x509", "-in", str(certificate), "-noout", check, host]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    except OSError:  # whoever brings a pair needs no openssl here
        return
    if "does match certificate" not in said:
        print(  # noqa: T201
            f"{certificate}: no certificate for {host}, so clients will refuse it; put one there that is, or remove "
            "cert.pem and key.pem and say make stack TLS=1 again: a pair is made anew",
            file=sys.stderr,
        )


def _write(path: Path, text: str) -> None:
    mode = 0o644 if path.name in OTHERS else 0o600
    path.touch(mode, exist_ok=False)
    path.chmod(mode)
    path.write_text(f"{text}\n", encoding="ascii")


if __name__ == "__main__":
    main()
