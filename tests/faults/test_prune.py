"""Retention on a small real pack: what goes is gone from store and MLflow, and all that a champion needs is there."""

import json
from datetime import timedelta
from pathlib import Path

import pytest
from tests.faults.conftest import AS_OF, NAME, Home

from evergreen import work
from evergreen.data.store import Store
from evergreen.errors import EvergreenError, LeaseHeldError, PackError, RegistryError, StoreError
from evergreen.history import values_of
from evergreen.loop import rollback
from evergreen.loop.prune import prune
from evergreen.registry import ledger
from evergreen.run import Ref
from evergreen.stages.judging import rejudge

DAY = timedelta(days=1)
WORSE = ("1.5 * height", "0.0 * height")


def later(home, days=100):
    """So long after everything that has happened."""
    return home.database.latest(NAME).at + timedelta(days=days)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Champions 1 and 3; between them version 2, which the gate rejected, and a run that failed; then a rejected 4."""
    home = Home.make(tmp_path_factory.mktemp("root"), days=range(16))
    home.write(retention="90d")
    home.perform("one")
    home.write(
        retention="90d", training={"params": {"steps": 41}}, gate={"limits": [{"metric": "roc_auc", "min": 0.999}]}
    )
    assert home.perform("two", as_of=AS_OF + DAY)["promote"].verdict.decision == "reject"
    home.write(retention="90d")
    assert home.perform("three", as_of=AS_OF + 2 * DAY)["promote"].champion == 3
    home.write(retention="90d", gate={"limits": [{"metric": "roc_auc", "min": 0.999}]})
    assert home.perform("four", as_of=AS_OF + 3 * DAY)["promote"].verdict.decision == "reject"
    home.write(retention="90d")
    return home


def test_it(made):
    found = prune(made.settings, NAME, dry_run=True, now=later(made))
    print(json.dumps(found.model_dump(mode="json"), indent=1))
    found = prune(made.settings, NAME, now=later(made))
    print(found.objects, found.bytes, found.versions)
    print(prune(made.settings, NAME, now=later(made)).goes)
