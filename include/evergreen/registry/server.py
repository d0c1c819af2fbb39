"""What an MLflow server of a team's needs before it starts: its tables, and accounts to sign in with."""

from __future__ import annotations

from collections.abc import Mapping


def prepare(database_url: str, accounts: Mapping[str, str]) -> None:
    """Bring the tables at `database_url` up to date, and make the accounts (name → password) that are not there.

    `admin` may do anything, and keeps the password that it has; everybody else reads all, manages what is theirs, and is
    a machine's account, whose password is always the one given.
    """
    from mlflow.server.auth.sqlalchemy_store import SqlAlchemyStore
    from mlflow.store.db.utils import (
        _all_tables_exist,
        _initialize_tables,
        _upgrade_db,
        create_sqlalchemy_engine_with_retry,
    )

    engine = create_sqlalchemy_engine_with_retry(database_url)
    if _all_tables_exist(engine):
        _upgrade_db(engine)
    else:
        _initialize_tables(engine)
    engine.dispose()
    store = SqlAlchemyStore()
    store.init_db(database_url)
    for name, password in accounts.items():
        if not store.has_user(name):
            store.create_user(name, password, is_admin=name == "admin")
        elif name != "admin":
            store.update_user(name, password)
