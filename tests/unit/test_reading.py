"""What a look at a source is known by: the pack's words and where its connection leads."""

import re
from datetime import UTC, datetime, timedelta

import pandas as pd
import polars as pl
import pytest
import sqlalchemy as sa

from evergreen import keys, stages
from evergreen.data import partitions
from evergreen.data.store import Store
from evergreen.errors import SourceError, StageError
from evergreen.pack import load
from evergreen.run import Connection, Window
from evergreen.settings import Settings
from evergreen.work import manifest_of

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


CSV_PACK = """
description: Will the water reach the road?
owner: gauge@example.com
source: {kind: csv, path: heights.csv}
data: {target: flooded, event_time: seen_at, train: 2d, validation: 1d, holdout: 1d}
training: {call: "model:train"}
gate: {primary: {metric: roc_auc}}
"""


@pytest.fixture
def ingest(tmp_path):
    """A function that writes days with their codes into a CSV and looks at it; → the manifest's columns."""
    folder = tmp_path / "packs" / "flood"
    folder.mkdir(parents=True)
    (folder / "pack.yaml").write_text(CSV_PACK)
    (folder / "model.py").write_text("")
    settings = Settings.from_env({"EVERGREEN_HOME": str(tmp_path / "home"), "EVERGREEN_PACKS": str(tmp_path / "packs")})

    def look(run_id, as_of, days, force=False):
        lines = [f"2024-01-{day:02} 0{hour}:00,{hour},{code}" for day, code in days.items() for hour in (0, 1)]
        (folder / "heights.csv").write_text("\n".join(["seen_at,flooded,code", *lines, ""]))
        at = datetime(2024, 1, as_of, tzinfo=UTC)
        run = keys.begin(
            settings, load(settings.packs, "flood"), run_id, as_of=at, scheduled=at, reason="a test", force=force
        )
        value = stages.ingest(run)
        stages.snapshot(run, value, stages.validate(run, value))
        return manifest_of(Store(settings), value.manifest)

    return look


def test_a_csv_has_the_types_of_its_window_where_the_data_end_early(ingest):
    """The windows reach back to the days that have rows; a code of letters there makes text of all codes."""
    days = {1: "A1", 2: 7, 3: 8, 4: 9}
    assert ingest("first", 5, days).columns["code"] == "string"
    assert ingest("early", 6, days).columns["code"] == "string"


def test_a_new_day_of_a_csv_takes_the_known_types(ingest):
    """A day of digits in a column of text is text; text in a column of digits is refused, and --force reads it."""
    days = {1: "A1", 2: 7, 3: 8, 4: 9}
    ingest("first", 5, days)
    manifest = ingest("second", 6, {**days, 5: "012"})
    assert (manifest.columns["code"], len(manifest.partitions)) == ("string", 4)
    numbers = {2: 1, 3: 2, 4: 3, 5: 4, 6: 5}
    assert ingest("third", 7, numbers, force=True).columns["code"] == "int"
    with pytest.raises(SourceError, match="column 'code' is string, and int before") as caught:
        ingest("fourth", 8, {**numbers, 7: "A7"})
    assert "run once with --force" in caught.value.fix
    assert ingest("fifth", 8, {**numbers, 7: "A7"}, force=True).columns["code"] == "string"


# Windows without rows: the advice is followed, and the run goes on.


@pytest.fixture
def shop(tmp_path):
    """A pack over daily rows, and a function that ingests and snapshots them with `data` in its pack.yaml."""
    folder = tmp_path / "packs" / "flood"
    folder.mkdir(parents=True)
    (folder / "model.py").write_text("")
    settings = Settings.from_env({"EVERGREEN_HOME": str(tmp_path / "home"), "EVERGREEN_PACKS": str(tmp_path / "packs")})

    def look(run_id, days, as_of, kind="run", expectations="", source="source: {kind: csv, path: heights.csv}", **data):
        written = "".join(f", {name}: {value}" for name, value in data.items())
        text = CSV_PACK.replace(", train: 2d, validation: 1d, holdout: 1d", written) + expectations
        text = text.replace("source: {kind: csv, path: heights.csv}", source)
        (folder / "pack.yaml").write_text(text)
        lines = [f"2024-01-{day:02} 0{hour}:00,{hour},{day}" for day in days for hour in (0, 1)]
        (folder / "heights.csv").write_text("\n".join(["seen_at,flooded,day", *lines, ""]))
        at = datetime(2024, 1, as_of, tzinfo=UTC)
        run = keys.begin(
            settings, load(settings.packs, "flood"), run_id, as_of=at, scheduled=at, reason="a test", kind=kind
        )
        value = stages.ingest(run)
        validated = stages.validate(run, value)
        return stages.snapshot(run, value, validated) if kind == "run" else value

    return look


WEEKS = [day for day in range(1, 20) if day % 7]
"""Nineteen days from Monday 2024-01-01 on, without Sundays."""


def test_an_empty_sunday_is_bridged_as_advised(shop):
    """Monday's run has Sunday to choose by: the advice is the length that reaches back to Saturday."""
    windows = {"train": "3d", "validation": "1d", "holdout": "1d"}
    with pytest.raises(
        SourceError, match="the validation window 2024-01-14 00:00 … 2024-01-15 00:00 is empty"
    ) as caught:
        shop("refused", WEEKS, 16, **windows)
    advised = re.match(r"write validation: (\w+) under data in pack.yaml", caught.value.fix)[1]
    assert advised == "2d"
    snapshot = shop("mended", WEEKS, 16, **{**windows, "validation": advised})
    assert (snapshot.windows.validation.start.day, snapshot.rows) == (13, 2 * 5)


def test_the_monitor_needs_no_rows_to_train_on(shop):
    """A look reads the same source: an empty Sunday in a window of a training is no fault of the data."""
    assert shop("watched", WEEKS, 16, kind="watch", train="3d", validation="1d", holdout="1d").rows == 2 * 4


@pytest.mark.parametrize("mended", [{"validation": "1d", "holdout": "1d"}, {"train": "20d"}])
def test_windows_without_rows_to_train_on_are_mended_as_advised(shop, mended):
    """A source that began three days ago: shorter windows, or a longer one where it has older rows, leave some to train on."""
    windows = {"train": "2d", "validation": "2d", "holdout": "2d"}
    with pytest.raises(SourceError, match=r"the train window .* is empty") as caught:
        shop("refused", [1, 16, 17, 18], 19, **windows)
    assert "shorten data.validation or data.holdout, so that rows since 2024-01-16 00:00 are left" in caught.value.fix
    assert "make data.train longer" in caught.value.fix
    assert shop("mended", [1, 16, 17, 18], 19, **{**windows, **mended}).rows >= 6


def test_a_window_that_quarantine_emptied_is_refused(shop):
    """All rows of the hold-out fail an expectation: the training has nothing to be judged on, and the advice bridges it."""
    rule = "expectations: [{expect_column_values_to_be_between: {column: day, max_value: 5}}]\n"
    windows = {"train": "3d", "validation": "1d", "holdout": "1d", "quarantine": "0.5"}
    with pytest.raises(SourceError, match=r"the holdout window .* is empty") as caught:
        shop("refused", range(1, 7), 7, expectations=rule, **windows)
    advised = re.match(r"write holdout: (\w+) under data in pack.yaml", caught.value.fix)[1]
    snapshot = shop("mended", range(1, 7), 7, expectations=rule, **{**windows, "holdout": advised})
    assert (snapshot.windows.holdout.start.day, snapshot.rows) == (5, 2 * 5)


def test_pandas_empty_frame_is_a_period_without_rows(tmp_path):
    """`pandas.DataFrame()`, which a Python source returns for an empty Sunday, has no columns that could be wrong."""
    rows = pl.DataFrame({"t": [datetime(2024, 1, 1, tzinfo=UTC)], "y": [1]})
    frames = [pd.DataFrame(), rows, pd.DataFrame(), pl.DataFrame()]
    window = Window(start=datetime(2024, 1, 1, tzinfo=UTC), end=datetime(2024, 1, 2, tzinfo=UTC))
    written = partitions.write(
        frames, window=window, partition="day", event_time="t", target="y", folder=tmp_path, origin="a test"
    )
    assert [file.rows for file in written.files] == [1]


# Rows are counted at each border.


FORGETFUL = """
from datetime import timedelta
from pathlib import Path
import polars as pl

def read(window):
    for day in range((window.end - window.start).days):
        times = [window.start + timedelta(days=day, hours=hour) for hour in (0, 1)]
        yield pl.DataFrame({"seen_at": times, "flooded": [0, 1]})
        if day:
            Path("output/frames/00000.arrow").unlink(missing_ok=True)
"""


def test_frames_that_a_read_job_lost_stop_the_run(shop, tmp_path):
    """The job counts the rows that it was given; those that arrive are as many."""
    (tmp_path / "packs" / "flood" / "model.py").write_text(FORGETFUL)
    source = 'source: {kind: python, call: "model:read"}'
    with pytest.raises(StageError, match=r"the frames of read-flood-\w+: 8 rows of 10 rows arrived"):
        shop("lost", [], 16, source=source, train="3d", validation="1d", holdout="1d")


def test_rows_that_a_stage_would_lose_stop_the_run(shop, tmp_path):
    """Between validation and snapshot, and between the snapshot and its windows."""
    shop("whole", WEEKS, 13, train="3d", validation="1d", holdout="1d")
    settings = Settings.from_env({"EVERGREEN_HOME": str(tmp_path / "home"), "EVERGREEN_PACKS": str(tmp_path / "packs")})
    at = datetime(2024, 1, 13, tzinfo=UTC)
    run = keys.begin(settings, load(settings.packs, "flood"), "short", as_of=at, scheduled=at, reason="a test")
    ingested = stages.ingest(run)
    validated = stages.validate(run, ingested)
    fewer = manifest_of(Store(settings), validated.manifest)
    fewer = fewer.model_copy(update={"partitions": fewer.partitions[1:]})
    short = validated.model_copy(update={"manifest": Store(settings).put_json(fewer.model_dump(mode="json"))})
    with pytest.raises(StageError, match="the snapshot: 8 rows of 10 rows arrived"):
        stages.snapshot(run, ingested, short)
    narrow = ingested.windows.model_copy(update={"holdout": Window(start=at, end=at + timedelta(days=1))})
    late = ingested.model_copy(update={"windows": narrow})
    with pytest.raises(SourceError, match="the holdout window"):
        stages.snapshot(run, late, validated)
    early = ingested.windows.model_copy(
        update={"train": Window(start=at - timedelta(days=4), end=at - timedelta(days=2))}
    )
    with pytest.raises(StageError, match="the windows: 8 rows of 10 rows arrived"):
        stages.snapshot(run, ingested.model_copy(update={"windows": early}), validated)
