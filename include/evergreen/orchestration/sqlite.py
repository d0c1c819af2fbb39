"""How Airflow's processes of an embedded home come to its SQLite. Imported while Airflow itself is: no Airflow here."""

from __future__ import annotations

import sqlite3
from typing import Any, Self


class Cursor(sqlite3.Cursor):
    """Takes the writer's turn before a savepoint, where none is held."""

    def execute(self, sql: str, *parameters: Any) -> Self:
        """SQLite begins a transaction at a savepoint as if nothing was to be written.

        Whoever reads in it and writes then is refused, whatever the time-out, if another has written meanwhile:
        "database is locked". On a busy machine another always has, and releasing the savepoint commits a part.
        """
        if sql.startswith("SAVEPOINT ") and not self.connection.in_transaction:
            super().execute("BEGIN IMMEDIATE")
        return super().execute(sql, *parameters)


class Connection(sqlite3.Connection):
    """A connection with such cursors."""

    def cursor(self, factory: Any = Cursor) -> Any:
        return super().cursor(factory)


CONNECT_ARGS = {"factory": Connection}
"""For Airflow's `[database] sql_alchemy_connect_args`."""
