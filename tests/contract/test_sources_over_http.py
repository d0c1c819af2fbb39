"""Sources read over HTTP from a real server: well, unwell, and replaced behind the reader's back."""

import dataclasses
import gzip
import re
import subprocess
import sys
from datetime import UTC, datetime, timedelta

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.http import HTTPFileSystem
from tests.web import serving

from evergreen import pack
from evergreen.data import sources
from evergreen.errors import SourceError, UnreachableError
from evergreen.run import Connection, Window

START = datetime(2013, 1, 1, tzinfo=UTC)
WEEK = Window(start=START, end=START + timedelta(days=7))
SAVE = {
    "parquet": lambda frame, file: frame.write_parquet(file, row_group_size=500),
    "csv": lambda frame, file: frame.write_csv(file, datetime_format="%Y-%m-%dT%H:%M:%S%.fZ"),
}
every_kind = pytest.mark.parametrize("kind", SAVE)


@pytest.fixture
def web(tmp_path):
    (tmp_path / "web").mkdir()
    with serving(tmp_path / "web") as server:
        yield server
    HTTPFileSystem.clear_instance_cache()


def rows(day, many=2000):
    """Some rows of one day."""
    return pl.DataFrame(
        {
            "t": pl.datetime_range(
                START + timedelta(days=day),
                interval="1s",
                end=START + timedelta(days=day, seconds=many - 1),
                eager=True,
            ),
            "x": np.random.default_rng(day).normal(size=many),
            "name": [f'"{n}", or so' for n in range(many)],
        }
    )


def save(web, kind, days=range(3)):
    for day in days:
        SAVE[kind](rows(day), web.folder / f"{day}.{kind}")


def read(kind, path, folder=".", connection=None):
    said = {"kind": kind, "path": path, **({"connection": connection.name} if connection else {})}
    source = sources.open_source(pack.SOURCES[kind].model_validate(said), folder, lambda _name: connection)
    return pl.concat(source.read(WEEK, "t"))


def refusal(kind, path, connection=None):
    with pytest.raises(SourceError) as caught:
        read(kind, path, connection=connection)
    return caught.value


@pytest.mark.parametrize("ranges", [True, False], ids=["parts", "whole"])
@every_kind
def test_the_files_of_a_page_of_links_are_read_whole(kind, ranges, web):
    """As from disk, whether the server sends parts of files or only all of them; other links are left alone."""
    save(web, kind)
    (web.folder / "read me.txt").write_text("not a row")
    web.ranges = ranges
    local = read(kind, f"*.{kind}", web.folder)
    assert local.height == 6000
    assert read(kind, f"{web.url}/*.{kind}").equals(local)


@every_kind
def test_a_file_url_is_a_path(kind, tmp_path):
    """file:// with a pattern, one file, and a folder, which is told from a file."""
    SAVE[kind](rows(0), tmp_path / f"a.{kind}")
    url = tmp_path.as_uri()
    assert read(kind, f"{url}/*.{kind}").equals(read(kind, f"{url}/a.{kind}"))
    assert "is a folder" in refusal(kind, url).what


@pytest.mark.parametrize("content_type", ["text/html", "application/json"])
def test_a_pattern_without_a_page_of_links_is_refused(content_type, web):
    """A folder that lists nothing, or answers with something else than a page, is said to match nothing, and why."""
    web.listing = content_type
    (web.folder / "a.csv").write_text("t\n2013-01-01\n")
    error = refusal("csv", f"{web.url}/{'*.csv' if content_type != 'text/html' else 'b*.csv'}")
    assert "matches no file" in error.what
    assert "a page that links to its files" in error.fix


@pytest.mark.parametrize("pattern", ["**/*.csv", "*/a.csv"])
def test_folders_are_not_looked_through(pattern, web):
    """A page of links to folders may be anything: what could be missed in silence is not tried."""
    error = refusal("csv", f"{web.url}/{pattern}")
    assert f"{web.url}/{pattern}: HTTP has no folders" in error.what


def test_a_folder_that_may_not_be_listed_is_not_left_out(web):
    """The page of links itself may fail."""
    web.ills["/"] = 503
    error = refusal("csv", f"{web.url}/*.csv")
    assert "answers 503" in error.what


@pytest.mark.parametrize(
    ("ill", "says", "fix"),
    [
        (404, "the server answers 404", "check the address"),
        (403, "the server answers 403", "credentials"),
        (500, "the server answers 500", "when the server is well"),
        ("cut", "cannot be read", "again"),
        ("cut chunks", "cannot be read", "again"),
        ("still", "cannot be read", "again"),
    ],
)
@pytest.mark.parametrize("ranges", [True, False], ids=["parts", "whole"])
@every_kind
def test_a_server_that_is_unwell_is_an_error(kind, ranges, ill, says, fix, web, monkeypatch):
    """The URL, what the server did, and the fix: not the rows of the files before, not the half that came."""
    if ill == "still":  # the others are not silent, however slowly they come
        monkeypatch.setattr(sources, "SILENCE_S", 0.5)
    HTTPFileSystem.clear_instance_cache()
    save(web, kind)
    web.ranges = ranges
    web.ills[f"/1.{kind}"] = ill
    error = refusal(kind, f"{web.url}/*.{kind}")
    assert error.what.startswith(f"{web.url}/1.{kind} ")
    assert says in error.what
    assert fix in error.fix
    del web.ills[f"/1.{kind}"]
    monkeypatch.undo()
    HTTPFileSystem.clear_instance_cache()
    assert read(kind, f"{web.url}/*.{kind}").height == 6000


def test_a_file_replaced_while_it_is_read_is_refused(web):
    """What was read of it may be of both; read again, it is the new one."""
    save(web, "parquet", [0])
    reading = sources.Parquet(f"{web.url}/0.parquet", web.folder).read(WEEK, "t")
    next(reading)
    SAVE["parquet"](rows(0).with_columns(pl.lit(0.5).alias("x")), web.folder / "0.parquet")
    with pytest.raises(SourceError, match=r"0\.parquet (was replaced while it was read|cannot be read)"):
        list(reading)
    assert read("parquet", f"{web.url}/0.parquet")["x"].unique().to_list() == [0.5]


def test_a_signature_is_sent_and_not_shown(web):
    """The query goes to the server, tells nothing of how the file is packed, and is in no message."""
    (web.folder / "a.csv.gz").write_bytes(gzip.compress(b"t,x\n2013-01-01,1\n"))
    assert read("csv", f"{web.url}/a.csv.gz?signature=s3cret")["x"].to_list() == [1]
    assert "/a.csv.gz?signature=s3cret" in web.asked
    for path, status in (("a.csv.gz", 403), ("b.csv", 404)):
        web.ills[f"/{path}"] = status
        error = refusal("csv", f"{web.url}/{path}?signature=s3cret")
        assert f"127.0.0.1:{web.server_port}/{path}?…" in error.what
        assert "s3cret" not in str(error)


@every_kind
def test_a_connection_signs_in(kind, web):
    """Login and password of an Airflow connection, and its extra as headers, go with every request, and into no message."""
    save(web, kind)
    web.needs = {"Authorization": "Basic bWU6aHVzaA==", "X-Team": "flights"}
    shop = Connection(name="shop", kind="http", login="me", password="hush", extra={"X-Team": "flights"})
    assert read(kind, f"{web.url}/*.{kind}", connection=shop).height == 6000
    error = refusal(kind, f"{web.url}/0.{kind}", connection=dataclasses.replace(shop, password="shush"))
    assert "the server answers 401" in error.what
    assert "credentials" in error.fix
    assert not re.search("hush|flights", str(error))


@every_kind
@pytest.mark.parametrize(("ill", "again"), [(404, False), (403, False), (429, True), (503, True), ("cut", True)])
def test_what_may_pass_is_told_from_what_will_not(kind, ill, again, web):
    """A task tries again where the server is unwell, and not where the address or the credentials are wrong."""
    save(web, kind)
    web.ills[f"/1.{kind}"] = ill
    assert isinstance(refusal(kind, f"{web.url}/*.{kind}"), UnreachableError) == again


@every_kind
def test_a_server_that_is_away_may_come_back(kind):
    """Nobody listens: an error that a task tries again."""
    assert isinstance(refusal(kind, f"http://127.0.0.1:9/a.{kind}"), UnreachableError)


def test_only_the_row_groups_of_the_window_are_fetched(web):
    """A week of a hundred days costs a week of requests, and reading all of it costs little more than its size."""
    days = pl.concat([rows(day, 5000) for day in range(100)])
    days.write_parquet(web.folder / "a.parquet", row_group_size=5000)
    size = (web.folder / "a.parquet").stat().st_size
    assert read("parquet", f"{web.url}/a.parquet").height == 35_000
    assert web.sent < size / 5
    web.sent = 0
    table = sources.Parquet(f"{web.url}/a.parquet", web.folder)
    assert sum(frame.height for frame in table.read(Window(start=START, end=START + timedelta(days=100)), "t")) > 0
    assert web.sent < size * 1.2


MEASURE = """
import resource, sys
from datetime import UTC, datetime
from pathlib import Path
from evergreen import pack
from evergreen.data import sources
from evergreen.run import Window
kind, small, large = sys.argv[1:]
known = {"parquet": pack.ParquetSource, "csv": pack.CsvSource}[kind]
window = Window(start=datetime(2013, 1, 1, tzinfo=UTC), end=datetime(2014, 1, 1, tzinfo=UTC))
def read(url):
    frames = sources.open_source(known(kind=kind, path=url), Path()).read(window, "t")
    return sum(frame.height for frame in frames), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(read(small)[1], *read(large))
"""


@pytest.mark.slow
@every_kind
def test_a_large_file_is_never_in_memory(kind, web):
    """Of a hundred megabytes, one row group of a Parquet file, a process holds a third at most."""
    many = 1_200_000
    chance = np.random.default_rng(7)
    time = pa.array(np.datetime64("2013-01-01", "us") + np.arange(many) * np.timedelta64(1, "s"))
    columns = {"t": time} | {f"x{n}": chance.normal(size=many) for n in range(10 if kind == "parquet" else 4)}
    table = pa.table(columns)
    for name, part in (("small", table[:1000]), ("large", table)):
        if kind == "parquet":
            pq.write_table(part, web.folder / f"{name}.parquet", row_group_size=many)
        else:
            pl.from_arrow(part).write_csv(web.folder / f"{name}.csv")
    size = (web.folder / f"large.{kind}").stat().st_size
    assert size > 95e6
    urls = [f"{web.url}/{name}.{kind}" for name in ("small", "large")]
    command = [sys.executable, "-c", MEASURE, kind, *urls]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    before, found, after = map(int, done.stdout.split())
    assert found == many
    assert (after - before) * 1024 < size / 3
