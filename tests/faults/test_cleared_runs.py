"""A run that is cleared: what it looks at again, what it keeps, and what it says. Clearing performs the stages again."""

import logging
from pathlib import Path

import polars as pl
import pytest
from tests.faults.conftest import AS_OF, DAYS, SCHEDULED, Home, perform_stage

from evergreen import keys
from evergreen.data.store import Store
from evergreen.errors import SourceError, StaleDataError, StoreError, TrainingError, ValidationError
from evergreen.history import history_of, why_run

pytestmark = pytest.mark.slow
COMPLETE = {"expectations": [{"expect_column_values_to_not_be_null": {"column": "wind"}}]}
PYTHON = """
from pathlib import Path
import polars as pl

def read(window):
    for file in sorted(Path({folder!r}).glob("*.parquet")):
        yield pl.read_parquet(file).filter(pl.col("seen_at").is_between(window.start, window.end, closed="left") | pl.col("seen_at").is_null())
"""


@pytest.fixture
def home(tmp_path: Path) -> Home:
    """A home without a run, whose pack wants `wind` to be complete."""
    made = Home.make(tmp_path)
    made.write(**COMPLETE)
    return made


def empty(column: str):
    return lambda rows: rows.with_columns(pl.lit(None).cast(rows.schema[column]).alias(column))


def values_in(home: Home, values: dict, column: str) -> int:
    """The number of values of a column in what `ingest` gave."""
    store = Store(home.settings)
    manifest = store.read_json(values["ingest"].manifest)
    return sum(
        pl.read_parquet(home.objects(type(values["ingest"].manifest)(**part["object"]))[0])[column].count()
        for part in manifest["partitions"]
    )


def looks(home: Home, run_id: str) -> int:
    return home.stages("stage", run_id).count("ingest")


def test_a_run_whose_rows_validate_refused_looks_again(home: Home) -> None:
    """The source is mended and the run is cleared: it sees the mended rows, under the as-of that it has."""
    home.write_day(8, empty("wind"))
    with pytest.raises(ValidationError, match="clear the run, ingest included"):
        home.perform("r", until="snapshot")
    home.write_day(8)
    values = home.perform("r", until="snapshot", as_of=None)
    assert values_in(home, values, "wind") == values["snapshot"].rows == 100 * 11
    assert [answer["because"] for answer in why_run(home.database, "r") if answer["stage"] == "ingest"][-1] == (
        "the run was cleared after the rows that it had read were refused, so it looked at the source again"
    )
    assert home.database.first_bad("tide") is None


def test_a_run_may_look_as_often_as_its_rows_are_refused(home: Home) -> None:
    """A mending that was not enough does not end it."""
    for number in (7, 8):
        home.write_day(number, empty("wind"))
    for mended in (7, 8):
        with pytest.raises(ValidationError):
            home.perform("r", until="snapshot")
        home.write_day(mended)
    assert home.perform("r", until="snapshot")["snapshot"].rows == 1100
    assert looks(home, "r") == 3


def test_a_run_whose_rows_snapshot_refused_looks_again(home: Home) -> None:
    """Rows without a target pass `validate`; nothing was accepted from them either."""
    home.write_day(8, empty("flooded"))
    with pytest.raises(SourceError, match="clear the run, ingest included"):
        home.perform("r", until="snapshot")
    home.write_day(8)
    assert values_in(home, home.perform("r", until="snapshot"), "flooded") == 1100


def test_a_run_keeps_the_rows_that_it_accepted_and_says_so(home: Home, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever the source holds by now: the log says that a new run would look."""
    before = home.perform("r", until="snapshot")
    home.write_day(8, lambda rows: rows.head(10))
    with caplog.at_level(logging.INFO, "evergreen"):
        after = home.perform("r", until="snapshot")
    assert after == before
    assert looks(home, "r") == 1
    assert "to look at the source again, start a new run: evergreen run tide" in caplog.text


def test_a_run_that_failed_for_a_while_keeps_the_rows_that_it_then_accepted(home: Home, tmp_path: Path) -> None:
    """`snapshot` is retried, the remote being there again, and succeeds: what it named stays the run's."""
    remote = Path(home.settings.data_remote)
    values = home.perform("r", until="validate")
    remote.rename(tmp_path / "away")
    remote.write_text("no folder")
    with pytest.raises(StoreError):
        home.perform("r", until="snapshot", after=values)
    remote.unlink()
    (tmp_path / "away").rename(remote)
    before = home.perform("r", until="snapshot", after=values)
    home.write_day(8, lambda rows: rows.head(10))
    assert home.perform("r", until="snapshot")["snapshot"] == before["snapshot"]
    assert looks(home, "r") == 1


def test_a_run_that_was_killed_keeps_its_look(home: Home) -> None:
    """A kill says nothing about the rows: the retry goes on with those that were read."""
    before = home.perform("r", until="ingest")
    home.write_day(8, lambda rows: rows.head(10))
    assert home.perform("r", until="snapshot")["ingest"] == before["ingest"]


def test_a_refusal_by_ingest_is_not_kept(home: Home) -> None:
    """Data that was too old, or absent, is looked for again."""
    late = AS_OF.replace(day=20)
    with pytest.raises(StaleDataError):
        home.perform("r", until="snapshot", as_of=late)
    for number in range(DAYS, 19):
        home.write_day(number)
    assert home.perform("r", until="snapshot")["snapshot"].rows == 1100


def test_a_refusal_of_what_a_python_source_gave_is_not_kept(home: Home) -> None:
    """The job that read the rows is not adopted by the attempt after the refusal, which reads anew."""
    (home.folder / "source.py").write_text(PYTHON.format(folder=str(home.rows)))
    home.write(source={"kind": "python", "call": "source:read"}, **COMPLETE)
    home.write_day(8, empty("seen_at"))
    with pytest.raises(SourceError):
        home.perform("r", until="snapshot")
    assert home.leftovers() == []
    home.write_day(8)
    assert home.perform("r", until="snapshot")["snapshot"].rows == 1100


def test_a_run_that_comes_later_does_not_take_over_rows_that_were_refused(home: Home) -> None:
    """Of a run that looked twice, the rows of the second look are known, those of the first are not."""
    home.write_day(4, empty("wind"))
    with pytest.raises(ValidationError):
        home.perform("r", until="snapshot")
    home.write_day(4)
    home.perform("r", until="snapshot")
    values = home.perform("next", until="snapshot")
    assert (values["ingest"].known, values_in(home, values, "wind")) == (11, 1100)


def test_a_look_of_the_monitor_looks_again_until_validate_accepts(home: Home) -> None:
    """It makes no snapshot; what `validate` accepted is kept."""

    def look() -> dict:
        values: dict = {}
        run = keys.begin(home.settings, home.pack, "w", as_of=AS_OF, scheduled=SCHEDULED, reason="test", kind="watch")
        for stage in ("ingest", "validate"):
            perform_stage(run, stage, values)
        return values

    home.write_day(8, empty("wind"))
    with pytest.raises(ValidationError):
        look()
    home.write_day(8)
    accepted = look()
    home.write_day(8, lambda rows: rows.head(10))
    assert look() == accepted
    assert looks(home, "watch__w") == 2


def test_a_mended_training_function_is_taken_and_the_rows_are_kept(home: Home) -> None:
    """The run that failed in `train` is cleared as a whole: the new code trains on the rows that were accepted."""
    home.write_model("print(", "raise RuntimeError(")
    with pytest.raises(TrainingError):
        home.perform("r", until="train")
    home.write_model()
    home.write_day(8, lambda rows: rows.head(10))
    assert home.perform("r", until="train")["snapshot"].rows == 1100
    assert (looks(home, "r"), history_of(home.database, "r")["outcome"]) == (1, "running")


def test_an_expectation_that_was_changed_is_judged_anew(home: Home) -> None:
    """The rows are as they were; the run is cleared after the pack let a column be incomplete."""
    home.write_day(8, empty("wind"))
    with pytest.raises(ValidationError):
        home.perform("r", until="snapshot")
    home.write(expectations=[])
    assert home.perform("r", until="snapshot")["snapshot"].rows == 1100
