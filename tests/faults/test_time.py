"""Time only moves forward: what a backfill may do, and what a champion is not scored on."""

from datetime import UTC, datetime, timedelta

import pytest

AS_OF = datetime(2024, 1, 13, tzinfo=UTC)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def backfill(home):
    """The champion before a run as of the day before its own, the values of that run, and the champion after it."""
    before = home.champion
    values = home.perform("backfill", as_of=AS_OF - timedelta(days=1))
    return before, values, home.champion


def test_a_backfill_is_registered_and_evaluated(home, backfill):
    """It has a complete version and figures of its own."""
    before, values, _ = backfill
    version = home.registry.version("tide", values["register"].version)
    assert version.complete
    assert version.version > before.version
    assert values["evaluate"].challenger.metrics["roc_auc"].value > 0.6


def test_a_backfill_never_deposes_a_newer_champion(home, backfill):
    """The verdict says why, on the version too, and the alias stays where it was."""
    before, values, after = backfill
    promoted = values["promote"]
    assert (promoted.verdict.decision, promoted.champion) == ("reject", before.version)
    assert "as of 2024-01-12, earlier than version 1 (2024-01-13): time only moves forward" in promoted.verdict.reasons
    tags = home.registry.version("tide", promoted.version).tags
    assert tags["evergreen.verdict.decision"] == "reject"
    assert after == before


def test_a_backfill_sees_no_row_after_its_as_of(backfill):
    """Every window, and the data, ends by its as-of."""
    _, values, _ = backfill
    assert values["ingest"].data_until == values["snapshot"].windows.holdout.end == AS_OF - timedelta(days=1)


def test_a_champion_is_not_scored_on_rows_it_has_seen(backfill):
    """Its figures are withheld, with the windows that overlap, and the comparison is not made."""
    before, values, _ = backfill
    evaluated = values["evaluate"]
    assert evaluated.champion.withheld == (
        f"version {before.version} was made with rows of 2024-01-02 00:00 … 2024-01-10 00:00, "
        "which overlaps the hold-out 2024-01-09 00:00 … 2024-01-12 00:00"
    )
    assert (evaluated.champion.metrics, evaluated.champion.predictions, evaluated.differences) == ({}, None, ())


def test_a_champion_is_scored_where_the_hold_out_is_new_to_it(home, backfill):
    """A day later nothing overlaps: both have figures on the same rows, and the difference has an interval."""
    home.write_day(12)
    evaluated = home.perform("next", as_of=AS_OF + timedelta(days=1))["evaluate"]
    assert evaluated.champion.withheld is None
    assert evaluated.champion.rows == evaluated.challenger.rows == 300
    (difference,) = (found for found in evaluated.differences if found.metric == "roc_auc")
    assert difference.estimate.low <= difference.estimate.value <= difference.estimate.high


def test_the_as_of_of_a_run_is_fixed_by_whoever_came_first(home):
    """Two processes that begin one run at once may both write it down; the first stands, for both and for ever."""
    first = home.begin("begun", as_of=AS_OF)
    home.database.append(
        "tide", "run", {"as_of": "2024-01-20T00:00:00+00:00", "reason": "", "force": True}, run_id="begun"
    )
    again = home.begin("begun", as_of=AS_OF + timedelta(days=9))
    assert (again.as_of, again.force) == (first.as_of, False)
