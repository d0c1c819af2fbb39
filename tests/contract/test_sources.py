"""Every kind of source, against the same laws."""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import fsspec
import polars as pl
import pytest
import sqlalchemy as sa
from tests.servers import Postgres

from evergreen import pack
from evergreen.data import partitions, sources
from evergreen.errors import SourceError
from evergreen.run import Window

START = datetime(2013, 1, 1, tzinfo=UTC)
WEEK = Window(start=START, end=START + timedelta(days=7))
ROWS = 24 * 9

FILES: dict[str, Callable[[pl.DataFrame, Path], object]] = {
    "parquet": lambda frame, file: frame.write_parquet(file, row_group_size=50),
    "csv": lambda frame, file: frame.write_csv(file, datetime_format="%Y-%m-%dT%H:%M:%S%.fZ"),
}
KINDS: dict[str, Callable[[pl.DataFrame, Path], object]] = {
    **FILES,
    "sqlite": lambda frame, file: save_table(frame, f"sqlite:///{file}"),
    "postgresql": lambda frame, file: file.write_text(save_table(frame, SERVERS["postgresql"].database())),
}
"""How rows get into a file; a PostgreSQL database's holds its URL."""
every_kind = pytest.mark.parametrize("kind", KINDS)
every_kind_of_file = pytest.mark.parametrize("kind", FILES)
SERVERS: dict[str, Postgres] = {}


@pytest.fixture(autouse=True)
def _servers(request):
    """The PostgreSQL server, for a test of that kind or of all."""
    kind = request.node.callspec.params.get("kind") if hasattr(request.node, "callspec") else "all"
    if kind in ("postgresql", "all"):
        SERVERS["postgresql"] = request.getfixturevalue("postgres")


def save_table(frame: pl.DataFrame, url: str) -> str:
    """The rows as the table `rows` of a database that has none; → its URL."""
    types = {"t": sa.DateTime(timezone=True), "y": sa.Integer, "x": sa.Float, "name": sa.Text, "good": sa.Boolean}
    engine = sa.create_engine(url, poolclass=sa.NullPool)
    table = sa.Table("rows", sa.MetaData(), *(sa.Column(name, types[name]) for name in frame.columns))
    table.create(engine)
    with engine.begin() as connection:
        connection.execute(table.insert(), frame.to_dicts())
    return url


def sample(rows: int = ROWS) -> pl.DataFrame:
    """Nine days of hourly rows, the first one a day before the week."""
    return pl.DataFrame(
        {
            "t": [START + timedelta(hours=n - 24) for n in range(rows)],
            "y": [n % 2 for n in range(rows)],
            "x": [n / 4 if n % 7 else None for n in range(rows)],
            "name": [f'n"{n}", or so' if n % 5 else None for n in range(rows)],
            "good": [n % 3 == 0 for n in range(rows)],
        }
    )


def read(kind: str, path: str, folder: Path, window: Window = WEEK, event_time: str = "t") -> list[pl.DataFrame]:
    said = {"kind": kind, "path": path}
    if kind not in FILES:
        url = (folder / path).read_text() if kind == "postgresql" else f"sqlite:///{path}"
        said = {"kind": "sql", "url": url, "table": "rows"}
    source = pack.SOURCES[said["kind"]].model_validate(said)
    return list(sources.open_source(source, folder).read(window, event_time))


@every_kind
def test_rows_are_those_of_the_window_and_all_of_them(kind, tmp_path):
    """A source yields the rows with start <= event time < end, none else, none less."""
    KINDS[kind](sample(), tmp_path / f"a.{kind}")
    found = pl.concat(read(kind, f"a.{kind}", tmp_path)).sort("t")
    assert found["t"].to_list() == [START + timedelta(hours=n) for n in range(24 * 7)]


@every_kind
def test_adjacent_windows_share_no_row_and_miss_none(kind, tmp_path):
    """Two windows that touch give what one over both gives."""
    KINDS[kind](sample(), tmp_path / f"a.{kind}")
    middle = START + timedelta(days=2)
    halves = [Window(start=START, end=middle), Window(start=middle, end=WEEK.end)]
    split = [frame for half in halves for frame in read(kind, f"a.{kind}", tmp_path, half)]
    assert pl.concat(split).sort("t").equals(pl.concat(read(kind, f"a.{kind}", tmp_path)).sort("t"))


def test_the_kind_leaves_no_trace(tmp_path):
    """The same rows give the same partitions, whichever kind of source held them."""
    identities = []
    for kind, save in KINDS.items():
        save(sample(), tmp_path / f"a.{kind}")
        written = partitions.write(
            read(kind, f"a.{kind}", tmp_path),
            window=WEEK,
            partition="day",
            event_time="t",
            target="y",
            folder=tmp_path / kind,
            origin=kind,
        )
        identities.append([file.identity for file in written.files])
    assert identities[0] == identities[1]
    assert len(identities[0]) == 7


@every_kind
def test_rows_come_in_chunks(kind, tmp_path, monkeypatch):
    """No chunk holds all of a long file: memory is bounded."""
    monkeypatch.setattr(sources, "BATCH_ROWS", 50)
    monkeypatch.setattr(sources, "BLOCK_BYTES", 2000)
    monkeypatch.setattr(sources, "SQL_ROWS", 50)
    KINDS[kind](sample(), tmp_path / f"a.{kind}")
    assert max(frame.height for frame in read(kind, f"a.{kind}", tmp_path)) <= 60


@every_kind
def test_a_row_without_a_time_is_not_dropped(kind, tmp_path):
    """A null event time is handed on, so that it is refused and not lost."""
    frame = sample(30).with_columns(pl.when(pl.col("x") == 1.25).then(None).otherwise(pl.col("t")).alias("t"))
    KINDS[kind](frame, tmp_path / f"a.{kind}")
    assert pl.concat(read(kind, f"a.{kind}", tmp_path))["t"].null_count() == 1


@every_kind_of_file
def test_globs_join_files(kind, tmp_path):
    """`**` finds files in sub-folders; all of them are read."""
    (tmp_path / "2013" / "01").mkdir(parents=True)
    KINDS[kind](sample()[:100], tmp_path / "2013" / f"a.{kind}")
    KINDS[kind](sample()[100:], tmp_path / "2013" / "01" / f"b.{kind}")
    assert sum(frame.height for frame in read(kind, f"2013/**/*.{kind}", tmp_path)) == 24 * 7


NAMES = ["a[x].{}", "what?.{}", "[2013].{}", "Ærøskøbing 2013 (1).{}", "a b#c%20.{}", "läge [süd]/rows?.{}"]


@every_kind_of_file
@pytest.mark.parametrize("name", NAMES)
def test_a_file_that_is_there_is_meant_literally(kind, name, tmp_path):
    """Brackets, question marks, spaces and letters of any alphabet name the file itself, and no other."""
    file = tmp_path / name.format(kind)
    file.parent.mkdir(exist_ok=True)
    KINDS[kind](sample()[:100], file)
    for other in ("ax", "whats", "2"):  # what the name would mean as a pattern
        KINDS[kind](sample()[100:], tmp_path / f"{other}.{kind}")
    for path in (name.format(kind), str(file)):
        assert sum(frame.height for frame in read(kind, path, tmp_path)) == 100 - 24


@every_kind_of_file
def test_brackets_and_question_marks_are_patterns_where_nothing_is_called_so(kind, tmp_path):
    """`[12]` and `?` match a character each, in folders and in files."""
    for n in (1, 2, 3):
        (tmp_path / f"part{n}").mkdir()
        KINDS[kind](sample()[48 * n : 48 * n + 10 * n], tmp_path / f"part{n}" / f"a{n}.{kind}")
    rows = {
        path: sum(frame.height for frame in read(kind, f"{path}.{kind}", tmp_path))
        for path in ("part[12]/a?", "part?/a[!1]", "**/a[13]", "part3/**/a?")
    }
    assert rows == {"part[12]/a?": 30, "part?/a[!1]": 50, "**/a[13]": 40, "part3/**/a?": 30}


@every_kind_of_file
@pytest.mark.parametrize("folder", ["data [old]", "what? [1-3]"])
def test_a_folder_that_is_there_is_meant_literally_within_a_pattern(kind, folder, tmp_path):
    """`*` still stands for any name, before and after the folder."""
    (tmp_path / "shop" / folder).mkdir(parents=True)
    KINDS[kind](sample(), tmp_path / "shop" / folder / f"a.{kind}")
    for path in (f"shop/{folder}/*.{kind}", f"*/{folder}/a.{kind}", f"**/{folder}/?.{kind}"):
        assert sum(frame.height for frame in read(kind, path, tmp_path)) == 24 * 7
    assert sum(frame.height for frame in read(kind, f"**/*.{kind}", tmp_path / "shop" / folder)) == 24 * 7


@every_kind_of_file
def test_a_star_is_a_pattern_even_where_a_file_is_called_so(kind, tmp_path):
    """A shell may leave a file called `*.csv`: the others are read, too."""
    for n, name in enumerate(("*", "a", ".b")):
        KINDS[kind](sample()[24 + n : 25 + n], tmp_path / f"{name}.{kind}")
    assert sum(frame.height for frame in read(kind, f"*.{kind}", tmp_path)) == 3


@every_kind_of_file
def test_links_are_followed_and_a_link_to_a_folder_above_is_not(kind, tmp_path):
    """A folder elsewhere may be linked to; a circle gives each row once."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "rows").mkdir()
    KINDS[kind](sample(), tmp_path / "elsewhere" / f"a.{kind}")
    (tmp_path / "rows" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "rows" / "circle").symlink_to(tmp_path / "rows")
    assert sum(frame.height for frame in read(kind, f"rows/**/*.{kind}", tmp_path)) == 24 * 7
    (tmp_path / "rows" / f"b.{kind}").symlink_to(tmp_path / "nowhere")
    with pytest.raises(SourceError, match=rf"b\.{kind} does not exist"):
        read(kind, f"rows/**/*.{kind}", tmp_path)


@every_kind_of_file
def test_a_url_is_as_good_as_a_path(kind, tmp_path):
    """Any fsspec file system will do, with globs."""
    memory = fsspec.filesystem("memory")
    KINDS[kind](sample(), tmp_path / "a")
    memory.pipe_file(f"/{tmp_path.name}/a.{kind}", (tmp_path / "a").read_bytes())
    found = read(kind, f"memory://{tmp_path.name}/*.{kind}", tmp_path / "elsewhere")
    assert sum(frame.height for frame in found) == 24 * 7


@every_kind_of_file
def test_a_file_with_other_columns_is_refused(kind, tmp_path):
    """A column renamed from one file to the next is found, with its new name."""
    KINDS[kind](sample()[:100], tmp_path / f"a.{kind}")
    KINDS[kind](sample()[100:].rename({"name": "names"}), tmp_path / f"b.{kind}")
    with pytest.raises(SourceError, match=rf"b\.{kind} has no column 'name'") as caught:
        read(kind, f"*.{kind}", tmp_path)
    assert "did you mean 'names'?" in caught.value.fix


@every_kind_of_file
@pytest.mark.parametrize("other", ["columns", "types"])
def test_a_file_of_other_days_decides_nothing(kind, other, tmp_path):
    """A file without a row of the window may have columns and types of its own, whether it is read before or after."""
    KINDS[kind](sample(), tmp_path / f"m.{kind}")
    alone = pl.concat(read(kind, "*", tmp_path))
    strange = sample(10).with_columns(pl.lit("n/a").alias("x")) if other == "types" else sample(10).rename({"x": "z"})
    KINDS[kind](strange, tmp_path / f"a.{kind}")
    KINDS[kind](strange.with_columns(t=pl.col("t") + timedelta(days=30)), tmp_path / f"z.{kind}")
    assert pl.concat(read(kind, "*", tmp_path)).equals(alone)


@every_kind
def test_rows_of_other_days_change_no_type(kind, tmp_path):
    """The same rows of the window come out, whatever numbers lie before and after it."""
    KINDS[kind](sample(), tmp_path / f"a.{kind}")
    within = sample().filter((pl.col("t") >= WEEK.start) & (pl.col("t") < WEEK.end))
    KINDS[kind](within, tmp_path / f"b.{kind}")
    whole, alone = (pl.concat(read(kind, f"{name}.{kind}", tmp_path)) for name in ("a", "b"))
    assert (whole.schema, whole.sort("t").to_dicts()) == (alone.schema, alone.sort("t").to_dicts())


@every_kind
def test_a_missing_event_time_is_refused(kind, tmp_path):
    """The pack's event time must be a column of the file or the table."""
    KINDS[kind](sample(), tmp_path / f"a.{kind}")
    with pytest.raises(SourceError, match=r"(a\.(csv|parquet)|table rows of \S+) has no column 'tt'"):
        read(kind, f"a.{kind}", tmp_path, event_time="tt")


@every_kind_of_file
def test_a_file_cut_in_the_middle_is_refused(kind, tmp_path):
    """Half a file gives an error, not half of the rows."""
    file = tmp_path / f"a.{kind}"
    KINDS[kind](sample(), file)
    content = file.read_bytes()
    file.write_bytes(
        content[: content.index(b'n""', len(content) // 2) + 2] if kind == "csv" else content[: len(content) // 2]
    )
    with pytest.raises(SourceError, match=rf"a\.{kind}"):
        read(kind, f"a.{kind}", tmp_path)


@every_kind_of_file
@pytest.mark.parametrize(
    "path", ["nothing.{}", "*/*.{}", "http://127.0.0.1:9/a.{}", "http://127.0.0.1:9/*.{}", "no://a.{}"]
)
def test_what_is_not_there_is_named(kind, path, tmp_path):
    """No such file, no match, nobody listening, no such protocol: the address and the fix."""
    path = path.format(kind)
    with pytest.raises(SourceError) as caught:
        read(kind, path, tmp_path)
    assert path.removeprefix("no:") in caught.value.what
    assert "check" in caught.value.fix


@every_kind_of_file
def test_a_folder_is_told_from_files(kind, tmp_path):
    """A folder without a pattern is refused, not taken for an empty source."""
    with pytest.raises(SourceError, match="is a folder"):
        read(kind, ".", tmp_path)


@every_kind_of_file
def test_a_file_that_may_not_be_read_is_named(kind, tmp_path):
    """No permission: the file, and what to grant."""
    KINDS[kind](sample(), tmp_path / f"a.{kind}")
    with unprivileged(tmp_path / f"a.{kind}"), pytest.raises(SourceError, match="may not be read") as caught:
        read(kind, f"a.{kind}", tmp_path)
    assert "grant read access" in caught.value.fix


@pytest.mark.parametrize("pattern", ["**/*.csv", "*/a.csv"])
def test_a_folder_that_may_not_be_read_is_not_left_out(pattern):
    """One station's folder without permission is an error, not a dataset without that station."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        for station in ("north", "south"):
            (folder / station).mkdir()
            KINDS["csv"](sample(), folder / station / "a.csv")
        with unprivileged(folder / "south"), pytest.raises(SourceError, match="south may not be read"):
            read("csv", pattern, folder)
        (folder / "south").chmod(0o755)
        assert sum(frame.height for frame in read("csv", pattern, folder)) == 2 * 24 * 7


@contextmanager
def unprivileged(file: Path) -> Iterator[None]:
    """Take the right to read away, from root too."""
    file.chmod(0)
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)
