"""Connections of sources are Airflow's: from its environment, its secrets backend or its database, never from a pack."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from evergreen.errors import SourceError
from evergreen.run import Connection


def connection(name: str) -> Connection:
    """The connection `name`, asked for by a task. Raises SourceError where Airflow knows none."""
    from airflow.sdk import Connection as Asked  # a command, which needs the other one only, would pay for the import
    from airflow.sdk.exceptions import AirflowNotFoundException

    try:
        found = Asked.get(name)
    except AirflowNotFoundException:
        raise _unknown(name) from None
    return Connection(
        name=name,
        kind=found.conn_type or "",
        host=found.host or "",
        port=found.port,
        schema=found.schema or "",
        login=found.login,
        password=found.password,
        extra=found.extra_dejson,
    )


def connection_of(name: str) -> Connection:
    """The connection `name` of this home's Airflow, asked for by a command: through a process that Airflow has to itself.

    Within this one, importing Airflow would send what the command says to Airflow's log.
    """
    command = [
        str(Path(sys.executable).with_name("evergreen")),
        "airflow",
        "connections",
        "get",
        name,
        "--output",
        "json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("[{")]
    if done.returncode or not lines:
        raise _unknown(name)
    (found,) = json.loads(lines[-1])
    return Connection(
        name=name,
        kind=found["conn_type"] or "",
        host=found["host"] or "",
        port=int(found["port"]) if found["port"] else None,
        schema=found["schema"] or "",
        login=found["login"],
        password=found["password"],
        extra=found["extra_dejson"] or {},
    )


def _unknown(name: str) -> SourceError:
    return SourceError(
        f"Airflow has no connection {name!r}, which source.connection in pack.yaml names",
        fix=f"add it in the UI (Admin, Connections), by `evergreen airflow connections add {name} …`, or as the "
        f"variable AIRFLOW_CONN_{name.upper()}",
    )
