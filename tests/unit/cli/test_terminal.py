"""How commands answer a program."""

import json
from datetime import UTC, datetime

from evergreen.cli.terminal import show_json


def test_instants_are_written_in_one_form(capsys):
    """However deep, and whether they come as text of either form or as values; other text that holds one is left."""
    instant = datetime(2024, 1, 13, tzinfo=UTC)
    show_json(
        {
            "as_of": "2024-01-13T00:00:00Z",
            "windows": [{"start": "2024-01-13T00:00:00+00:00"}, (instant,)],
            "at": "2024-01-13T00:00:00.250000Z",
            "tag": "gauge/20240113T000000Z-0a1b2c3d",
            "reason": "since 2024-01-13T00:00:00Z",
            "version": 1,
        }
    )
    assert json.loads(capsys.readouterr().out) == {
        "as_of": "2024-01-13T00:00:00+00:00",
        "windows": [{"start": "2024-01-13T00:00:00+00:00"}, ["2024-01-13T00:00:00+00:00"]],
        "at": "2024-01-13T00:00:00.250000+00:00",
        "tag": "gauge/20240113T000000Z-0a1b2c3d",
        "reason": "since 2024-01-13T00:00:00Z",
        "version": 1,
    }
