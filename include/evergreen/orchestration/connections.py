"""Connections of sources are Airflow's: from its environment, its secrets backend or its database, never from a pack."""

from __future__ import annotations

from typing import Any

from evergreen.errors import SourceError
from evergreen.run import Connection
from evergreen.settings import Settings


def connection(name: str) -> Connection:
    """The connection `name`, asked for by a task. Raises SourceError where Airflow knows none."""
    from airflow.sdk import Connection as Asked  # here and below: the command line would pay for the import

    return _found(name, Asked.get)


def connection_of(settings: Settings, name: str) -> Connection:
    """The connection `name` of the Airflow of this home, asked for by a command."""
    from evergreen.orchestration import embedded

    embedded.prepare(settings)
    from airflow.models.connection import Connection as Asked

    return _found(name, Asked.get_connection_from_secrets)


def _found(name: str, ask: Any) -> Connection:
    from airflow.sdk.exceptions import AirflowNotFoundException

    try:
        found = ask(name)
    except AirflowNotFoundException:
        raise SourceError(
            f"Airflow has no connection {name!r}, which source.connection in pack.yaml names",
            fix=f"add it in the UI (Admin, Connections), by `evergreen airflow connections add {name} …`, or as the "
            f"variable AIRFLOW_CONN_{name.upper()}",
        ) from None
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
