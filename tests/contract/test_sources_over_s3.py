"""Sources read from an S3 service: well, unwell, closed to us, and with the credentials of an Airflow connection."""

import io
import re
from datetime import UTC, datetime, timedelta

import polars as pl
import pytest
from s3fs import S3FileSystem

from evergreen import pack
from evergreen.data import sources
from evergreen.errors import SourceError, UnreachableError
from evergreen.run import Connection, Window

START = datetime(2013, 1, 1, tzinfo=UTC)
WEEK = Window(start=START, end=START + timedelta(days=7))
SAVE = {"parquet": pl.DataFrame.write_parquet, "csv": pl.DataFrame.write_csv}
every_kind = pytest.mark.parametrize("kind", SAVE)


@pytest.fixture
def bucket(s3, monkeypatch):
    """A new bucket; its credentials are in the environment, as on any machine that uses S3."""
    for name, value in s3.environment().items():
        monkeypatch.setenv(name, value)
    S3FileSystem.clear_instance_cache()
    yield s3.bucket()
    s3.ills = 0
    S3FileSystem.clear_instance_cache()


def rows(day, many=500):
    """Some rows of one day."""
    times = pl.datetime_range(
        START + timedelta(days=day), interval="1s", end=START + timedelta(days=day, seconds=many - 1), eager=True
    )
    return pl.DataFrame({"t": times, "x": range(many)})


@pytest.fixture
def save(s3, bucket, tmp_path):
    """A function that puts a day's rows under a key."""

    def put(kind, key, frame=None):
        SAVE[kind](rows(0) if frame is None else frame, tmp_path / "file")
        s3.client().upload_file(str(tmp_path / "file"), bucket, key)

    return put


def read(kind, path, connection=None, window=WEEK):
    said = {"kind": kind, "path": path, **({"connection": "lake"} if connection else {})}
    source = sources.open_source(pack.SOURCES[kind].model_validate(said), ".", lambda _name: connection)
    return pl.concat(source.read(window, "t"))


def refusal(kind, path, connection=None):
    with pytest.raises(SourceError) as caught:
        read(kind, path, connection)
    return caught.value


@every_kind
def test_globs_look_through_a_bucket(kind, save, bucket):
    """`*` and `**` find objects, and what is put there later is found by the next reading."""
    save(kind, f"2013/a.{kind}")
    save(kind, f"2013/01/b.{kind}", rows(1))
    save(kind, f"2012/c.{kind}", rows(2))
    assert read(kind, f"s3://{bucket}/2013/**/*.{kind}").height == 1000
    save(kind, f"2013/02/d.{kind}", rows(3))
    assert read(kind, f"s3://{bucket}/2013/**/*.{kind}").height == 1500
    assert read(kind, f"s3://{bucket}/2013/*.{kind}").height == 500


def test_only_the_row_groups_of_the_window_are_fetched(save, bucket, s3):
    """A week of a hundred days costs little more than a week."""
    days = pl.concat([rows(day, 5000) for day in range(100)]).with_columns(pl.col("x").hash().alias("x"))
    days.write_parquet(file := io.BytesIO(), row_group_size=5000)
    s3.client().put_object(Bucket=bucket, Key="a.parquet", Body=file.getvalue())
    s3.ranges = 0
    assert read("parquet", f"s3://{bucket}/a.parquet").height == 35_000
    assert 0 < s3.ranges < len(file.getvalue()) / 5


@every_kind
@pytest.mark.parametrize("key", ["no.{}", "no*.{}"])
def test_what_is_not_there_is_named(kind, key, bucket):
    """No such object, no object like it, no such bucket."""
    key = key.format(kind)
    for place in (bucket, "elsewhere"):
        error = refusal(kind, f"s3://{place}/{key}")
        assert f"{place}/{key}" in error.what
        assert "check" in error.fix
        assert not isinstance(error, UnreachableError)


@every_kind
def test_what_may_not_be_read_is_said(kind, save, bucket, s3):
    """A key that the service does not know: forbidden, and not tried again."""
    save(kind, f"a.{kind}")
    with s3.locked():
        for key in (f"a.{kind}", f"*.{kind}"):
            error = refusal(kind, f"s3://{bucket}/{key}")
            assert re.search("may not be read|cannot be read", error.what)
            assert not isinstance(error, UnreachableError)


@every_kind
def test_a_service_that_is_busy_is_asked_again(kind, save, bucket, s3):
    """503 and then the rows."""
    save(kind, f"a.{kind}")
    s3.ills = 1
    assert read(kind, f"s3://{bucket}/a.{kind}").height == 500
    assert s3.ills == 0


@every_kind
def test_a_service_that_is_away_may_come_back(kind, bucket, monkeypatch):
    """Nobody listens: an error that a task tries again."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(S3FileSystem, "retries", 1)
    S3FileSystem.clear_instance_cache()
    error = refusal(kind, f"s3://{bucket}/a.{kind}")
    assert isinstance(error, UnreachableError)
    assert f"{bucket}/a.{kind}" in error.what


def test_an_object_replaced_while_it_is_read_is_refused(save, bucket, monkeypatch):
    """What was read of it may be of both; read again, it is the new one."""
    monkeypatch.setattr(sources, "BATCH_ROWS", 100)
    save("parquet", "a.parquet")
    reading = sources.Parquet(f"s3://{bucket}/a.parquet", ".").read(WEEK, "t")
    next(reading)
    save("parquet", "a.parquet", rows(1))
    with pytest.raises(SourceError, match=r"a\.parquet (was replaced while it was read|cannot be read)"):
        list(reading)
    assert read("parquet", f"s3://{bucket}/a.parquet")["t"].min() == START + timedelta(days=1)


@every_kind
def test_a_connection_brings_its_own_credentials(kind, save, bucket, s3, monkeypatch):
    """Of an Airflow connection of type aws: key, secret, endpoint and region, with none in the environment."""
    save(kind, f"a.{kind}")
    for name in s3.environment():
        monkeypatch.delenv(name)
    extra = {"endpoint_url": s3.url, "region_name": "us-east-1"}
    lake = Connection(name="lake", kind="aws", login="evergreen", password="not so secret", extra=extra)
    assert read(kind, f"s3://{bucket}/*.{kind}", lake).height == 500


def test_a_connection_that_is_not_understood_is_refused():
    """What would be left out in silence is named; so is a file system that takes no connection."""
    other = Connection(name="lake", kind="aws", extra={"role_arn": "arn:aws:iam::1:role/reader"})
    assert "'lake': role_arn of its extra is not understood" in refusal("csv", "s3://bucket/a.csv", other).what
    error = refusal("csv", "gs://bucket/a.csv", Connection(name="lake", kind="google_cloud_platform"))
    assert "gs:// takes its credentials from the environment" in error.what
