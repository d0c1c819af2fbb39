"""Connections as a task asks Airflow for them."""

import pytest

from evergreen.errors import SourceError
from evergreen.orchestration.connections import connection


def test_a_connection_is_airflows(monkeypatch):
    """What Airflow reads from its variable is what a source gets, extra and all; its words for itself hold no secret."""
    monkeypatch.setenv(
        "AIRFLOW_CONN_LAKE", "aws://key:hush@/?region_name=eu-west-1&endpoint_url=http%3A%2F%2F127.0.0.1"
    )
    found = connection("lake")
    assert (found.kind, found.login, found.password) == ("aws", "key", "hush")
    assert found.extra == {"region_name": "eu-west-1", "endpoint_url": "http://127.0.0.1"}
    assert "hush" not in repr(found) + found.place


def test_a_connection_that_airflow_lacks_is_named():
    """The id, and the three ways to bring one in."""
    with pytest.raises(SourceError, match="no connection 'lakes', which") as caught:
        connection("lakes")
    assert "AIRFLOW_CONN_LAKES" in caught.value.fix
