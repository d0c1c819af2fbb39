"""Periods, windows and digests: arithmetic that keys and file names rest on."""

import itertools
from datetime import UTC, datetime, timedelta, timezone
from pathlib import PurePosixPath

import pytest

from evergreen.pack import Data, load
from evergreen.run import (
    Ref,
    Run,
    Window,
    Windows,
    canonical_json,
    count,
    digest,
    floor,
    period_name,
    periods,
    step,
)
from evergreen.settings import Settings


def at(text):
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


@pytest.mark.parametrize(
    ("instant", "partition", "expected"),
    [
        ("2024-02-29T13:59:59.999999", "hour", "2024-02-29T13:00"),
        ("2024-02-29T13:59:59.999999", "day", "2024-02-29"),
        ("2024-02-29T13:59", "week", "2024-02-26"),
        ("2024-02-26T00:00", "week", "2024-02-26"),
        ("2024-03-03T23:59", "week", "2024-02-26"),
        ("2024-02-29T13:59", "month", "2024-02-01"),
        ("2024-12-31T23:59", "month", "2024-12-01"),
        ("2024-01-01T00:00", "day", "2024-01-01"),
    ],
)
def test_floor_is_the_start_of_the_period(instant, partition, expected):
    """The period that holds an instant starts at or before it; weeks start on Monday."""
    assert floor(at(instant), partition) == at(expected)


def test_floor_counts_in_utc():
    """An instant written elsewhere is floored to the day it has in UTC."""
    evening_in_new_york = datetime(2013, 3, 31, 21, tzinfo=timezone(timedelta(hours=-4)))
    assert floor(evening_in_new_york, "day") == at("2013-04-01")


@pytest.mark.parametrize(
    ("start", "partition", "count", "expected"),
    [
        ("2013-03-10T01:00", "hour", 2, "2013-03-10T03:00"),  # New York's clocks jump in between, UTC's do not
        ("2013-03-31", "day", 1, "2013-04-01"),
        ("2023-02-28", "day", 1, "2023-03-01"),
        ("2024-02-28", "day", 1, "2024-02-29"),
        ("2024-02-26", "week", 1, "2024-03-04"),
        ("2024-01-01", "month", 1, "2024-02-01"),
        ("2024-12-01", "month", 1, "2025-01-01"),
        ("2024-01-01", "month", -1, "2023-12-01"),
        ("2024-03-01", "month", -25, "2022-02-01"),
    ],
)
def test_step_goes_by_whole_periods(start, partition, count, expected):
    """Forwards and backwards over the ends of months and years, and over no daylight saving."""
    assert step(at(start), partition, count) == at(expected)


@pytest.mark.parametrize(
    ("partition", "expected"),
    [
        ("hour", 24 * 40),
        ("day", 40),
        ("week", 7),  # from the Monday before, to the one within
        ("month", 2),
    ],
)
def test_periods_cover_a_window(partition, expected):
    """From the period that holds the start up to, not including, the end: each begins where the one before ends."""
    window = Window(start=at("2024-01-20"), end=at("2024-02-29"))
    found = list(periods(window, partition))
    assert found[0] == floor(window.start, partition)
    assert all(step(one, partition) == other for one, other in itertools.pairwise(found))
    assert found[-1] < window.end <= step(found[-1], partition)
    assert len(found) == expected


@pytest.mark.parametrize(
    ("partition", "expected"),
    [("hour", "2024-12-30T05"), ("day", "2024-12-30"), ("week", "2025-W01"), ("month", "2024-12")],
)
def test_period_names(partition, expected):
    """Names as in file names and messages; weeks by ISO, whose year may be the next one."""
    assert period_name(at("2024-12-30T05:00"), partition) == expected


def data(**given):
    return Data(target="y", event_time="at", **given)


def test_windows_touch_and_end_at_as_of():
    """Training, validation, hold-out: without gap or overlap, as long as the pack says."""
    windows = Windows.ending(at("2013-04-01"), data(train="60d", validation="7d", holdout="14d"))
    assert windows.train == Window(start=at("2013-01-10"), end=at("2013-03-11"))
    assert windows.validation == Window(start=at("2013-03-11"), end=at("2013-03-18"))
    assert windows.holdout == Window(start=at("2013-03-18"), end=at("2013-04-01"))
    assert windows.whole == Window(start=at("2013-01-10"), end=at("2013-04-01"))


@pytest.mark.parametrize(
    ("partition", "lengths", "starts"),
    [
        ("hour", {"train": "61m", "validation": "90m", "holdout": "36h"}, ["02-28T08", "02-28T10", "02-28T12"]),
        ("week", {"train": "8d", "validation": "8d", "holdout": "10d"}, ["01-22", "02-05", "02-19"]),
        ("month", {"train": "32d", "validation": "40d", "holdout": "60d"}, ["09-01", "11-01", "01-01"]),
    ],
)
def test_windows_hold_whole_partitions(partition, lengths, starts):
    """A window that would begin within a period begins with it."""
    windows = Windows.ending(at("2024-03-01"), data(partition=partition, **lengths))
    found = [window.start for window in (windows.train, windows.validation, windows.holdout)]
    assert [f"{start:%m-%dT%H}" for start in found] == [text if "T" in text else f"{text}T00" for text in starts]


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [("2024-01-01", "2024-01-02", False), ("2024-01-01", "2024-01-03", True), ("2024-01-04", "2024-01-05", False)],
)
def test_windows_are_half_open(start, end, expected):
    """Windows that touch do not overlap, whichever is first."""
    window, other = Window(start=at("2024-01-02"), end=at("2024-01-04")), Window(start=at(start), end=at(end))
    assert (window.overlaps(other), other.overlaps(window)) == (expected, expected)


def test_slug_follows_from_the_id(tmp_path):
    """12 hex digits of the id's sha256: the same for ever, since folders and tags are found by it."""
    settings = Settings.from_env({"EVERGREEN_HOME": str(tmp_path)})
    run = Run(
        pack=load(settings.packs, "digits"),
        id="manual__2026-01-01T00:00:00+00:00",
        as_of=at("2020-03-01"),
        reason="a test asked",
        settings=settings,
    )
    assert run.slug == "1e8dc70c2b69"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({}, "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"),
        ({"b": [1, 2.5, None, True], "a": "ü"}, "016a42b8cab958d1ab0e8d320efe7edf0046f9615095ae25f338ee8b24ef2296"),
    ],
)
def test_digests_are_the_same_for_ever(content, expected):
    """A digest that changed would make every known stage new."""
    assert digest(content) == expected


def test_canonical_json_does_not_depend_on_who_wrote_it():
    """Sorted keys, no spaces, ASCII; instants, paths and values as their text."""
    content = {"z": at("2024-01-01"), "b": PurePosixPath("a/b"), "a": Ref(hash="ü", size=1)}
    expected = r'{"a":{"hash":"\u00fc","size":1},"b":"a/b","z":"2024-01-01T00:00:00+00:00"}'
    assert canonical_json(content) == expected


def test_a_number_that_is_none_has_no_digest():
    """NaN equals nothing, itself included: nothing may be known by it."""
    with pytest.raises(ValueError, match="JSON compliant"):
        digest({"loss": float("nan")})


def test_a_thing_without_canonical_json_has_no_digest():
    """An object whose text may hold an address is refused, not guessed at."""
    with pytest.raises(TypeError, match="object has no canonical JSON"):
        digest(object())


@pytest.mark.parametrize(("number", "expected"), [(0, "0 rows"), (1, "1 row"), (28834, "28 834 rows")])
def test_counts_are_readable(number, expected):
    """One is singular, thousands are set apart."""
    assert count(number, "row") == expected
