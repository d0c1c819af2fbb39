"""What a look at a source is known by: the pack's words and where its connection leads."""

from datetime import UTC, datetime

import polars as pl
import pytest
import sqlalchemy as sa

from evergreen import keys, stages
from evergreen.errors import SourceError
from evergreen.pack import load
from evergreen.run import Connection
from evergreen.settings import Settings

PACK = """
description: Will the water reach the road?
owner: gauge@example.com
source: {kind: sql, connection: gauges, table: heights}
data: {target: flooded, event_time: seen_at, train: 1d, validation: 1d, holdout: 1d}
training: {call: "model:train"}
gate: {primary: {metric: roc_auc}}
"""


@pytest.fixture
def look(tmp_path):
    """A function that looks at the rows behind a connection, in a run of its own."""
    (tmp_path / "packs" / "flood").mkdir(parents=True)
    (tmp_path / "packs" / "flood" / "pack.yaml").write_text(PACK)
    (tmp_path / "packs" / "flood" / "model.py").write_text("")
    for name in ("one.db", "two.db"):
        engine = sa.create_engine(f"sqlite:///{tmp_path / name}", poolclass=sa.NullPool)
        table = sa.Table("heights", sa.MetaData(), sa.Column("seen_at", sa.DateTime), sa.Column("flooded", sa.Integer))
        table.create(engine)
        with engine.begin() as connection:
            rows = [{"seen_at": datetime(2024, 1, day, n), "flooded": n} for day in (1, 2, 3) for n in (0, 1)]  # noqa: DTZ001
            connection.execute(table.insert(), rows)
    settings = Settings.from_env({"EVERGREEN_HOME": str(tmp_path / "home"), "EVERGREEN_PACKS": str(tmp_path / "packs")})
    at = datetime(2024, 1, 4, tzinfo=UTC)

    def known(run_id, **told):
        connection = Connection(name="gauges", kind="sqlite", **told)
        run = keys.begin(
            settings,
            load(settings.packs, "flood"),
            run_id,
            as_of=at,
            scheduled=at,
            reason="a test",
            connect=lambda _name: connection,
        )
        value = stages.ingest(run)
        event = keys.db.connect(settings.database_url).latest("flood", kind="stage", run_id=run_id)
        stages.snapshot(run, value, stages.validate(run, value))
        return event.body["parts"]["inputs"]["source"], value.known

    return known, tmp_path


def test_a_source_is_known_by_the_place_and_not_by_the_password(look):
    """A secret that was rotated reads no row again; a connection that leads elsewhere reads all of them."""
    known, folder = look
    place = {"schema": str(folder / "one.db")}
    first, _ = known("first", **place, extra={"timeout": "5"})
    assert known("rotated", **place, extra={"timeout": "6"}) == (first, 3)
    elsewhere, again = known("elsewhere", schema=str(folder / "two.db"))
    assert (elsewhere != first, again) == (True, 0)


def test_a_run_without_airflow_says_so(look, tmp_path):
    """Nobody to ask for the connection: the error names it and the command that can."""
    settings = Settings.from_env({"EVERGREEN_HOME": str(tmp_path / "home"), "EVERGREEN_PACKS": str(tmp_path / "packs")})
    at = datetime(2024, 1, 4, tzinfo=UTC)
    run = keys.begin(settings, load(settings.packs, "flood"), "alone", as_of=at, scheduled=at, reason="a test")
    with pytest.raises(SourceError, match="connection 'gauges' is not known here") as caught:
        stages.ingest(run)
    assert "evergreen run" in caught.value.fix


def test_a_column_that_becomes_a_float_does_not_round_the_whole_numbers_known(tmp_path):
    """Rows that an earlier run accepted as whole numbers stay as they are: fractions that come later are refused."""
    folder = tmp_path / "packs" / "flood"
    folder.mkdir(parents=True)
    source = "source: {kind: parquet, path: 'rows/*.parquet'}"
    (folder / "pack.yaml").write_text(PACK.replace("source: {kind: sql, connection: gauges, table: heights}", source))
    (folder / "model.py").write_text("")
    (folder / "rows").mkdir()
    settings = Settings.from_env({"EVERGREEN_HOME": str(tmp_path / "home"), "EVERGREEN_PACKS": str(tmp_path / "packs")})

    def write(day, ids):
        times = [datetime(2024, 1, day, hour, tzinfo=UTC) for hour in range(2)]
        rows = pl.DataFrame({"seen_at": times, "flooded": [0, 1], "id": ids})
        rows.write_parquet(folder / "rows" / f"{day}.parquet")

    def ingest(run_id, day):
        at = datetime(2024, 1, day, tzinfo=UTC)
        run = keys.begin(settings, load(settings.packs, "flood"), run_id, as_of=at, scheduled=at, reason="a test")
        return run, stages.ingest(run)

    for day in (1, 2, 3):
        write(day, [2**53 + day, None])
    run, value = ingest("first", 4)
    stages.snapshot(run, value, stages.validate(run, value))
    write(4, [0.5, None])
    with pytest.raises(SourceError, match=rf"2024-01-03: column 'id' has the whole number {2**53 + 3}"):
        ingest("second", 5)
    write(4, [4, None])  # what the fix says
    _, value = ingest("third", 5)
    assert value.rows == 6
