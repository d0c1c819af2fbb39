"""Sources: where rows come from. One small class per kind; each streams the rows of a window, and never drops one.

`open_source(source, folder).read(window, event_time)` yields polars frames with the rows of
`window.start <= event_time < window.end`, in bounded memory, in whatever order and chunks the files give. Rows whose
event time is null come along too, so that `partitions.write` can refuse them. Paths may be local (relative ones are
under the pack's folder) or any fsspec URL, with `*` and `**`.

A `python` source is not here: it runs as a job, and leaves Arrow files that `frames` reads.

Every failure is a SourceError that names the file.
"""

from __future__ import annotations

import csv
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from evergreen import pack
from evergreen.data import partitions
from evergreen.errors import SourceError
from evergreen.run import Window

if TYPE_CHECKING:
    import polars as pl
    import pyarrow as pa

BLOCK_BYTES = 8 * 2**20
"""A CSV is read in blocks of this size; no row may be longer."""
BATCH_ROWS = 65_536
COMPRESSED = (".gz", ".bz2", ".xz", ".lzma")
"""CSV files with these endings are unpacked."""


class Source(Protocol):
    """Something that holds rows with a time each."""

    def read(self, window: Window, event_time: str) -> Iterator[pl.DataFrame]:
        """The rows of `window`, in chunks. Raises SourceError."""


def open_source(source: pack.Source, folder: Path) -> Source:
    """The source that a pack in `folder` describes. Opens nothing yet."""
    if isinstance(source, pack.ParquetSource):
        return Parquet(source.path, folder)
    if isinstance(source, pack.CsvSource):
        return Csv(source.path, folder, separator=source.separator, null_values=source.null_values)
    raise TypeError(f"a {source.kind} source is read by a job")


def frames(folder: Path) -> Iterator[pl.DataFrame]:
    """The frames that a read job left in `folder`, as Arrow IPC files `*.arrow`, in the order of their names."""
    import polars as pl

    for file in sorted(folder.glob("*.arrow")):
        with _reading(str(file), "run it again; the job's log says what it wrote"):
            frame = pl.read_ipc(file)
        yield frame


@dataclass(frozen=True)
class Parquet:
    """Rows from Parquet files. Row groups outside the window are not read where the file has statistics."""

    path: str
    folder: Path

    def read(self, window: Window, event_time: str) -> Iterator[pl.DataFrame]:
        columns: list[str] = []
        for file in _files(self.path, self.folder):
            with _reading(file.name, "write the file again: it is not a whole Parquet file"):
                fragment = self._fragment(file)
                schema = fragment.physical_schema
            columns = _check_columns(columns, schema.names, event_time, file.name)
            batches = fragment.to_batches(
                filter=_pushed_down(schema.field(event_time), window),
                batch_size=BATCH_ROWS,
                batch_readahead=1,
                fragment_readahead=1,
            )
            while True:
                with _reading(file.name, "write the file again: it is damaged"):
                    batch = next(batches, None)
                if batch is None:
                    break
                if batch.num_rows:
                    yield _in_window(batch, window, event_time, file.name)

    def _fragment(self, file: _File) -> Any:
        import pyarrow.dataset as ds
        from pyarrow import fs as arrow_fs

        # Without pre-buffering, a batch holds a page of each column, not the whole row group.
        scan = ds.ParquetFragmentScanOptions(
            use_buffered_stream=True, pre_buffer=False, page_checksum_verification=True
        )
        filesystem = (
            arrow_fs.LocalFileSystem() if file.is_local else arrow_fs.PyFileSystem(arrow_fs.FSSpecHandler(file.system))
        )
        file_format = ds.ParquetFileFormat(default_fragment_scan_options=scan)
        return file_format.make_fragment(file.path, filesystem=filesystem)


@dataclass(frozen=True)
class Csv:
    """Rows from CSV files with a header line, compressed or not; quoted fields may hold line breaks.

    Each file is read twice: first for its types, over all of its rows, then for its rows. A column is the first that
    all its values can be: int, float, bool (true and false), date, time (ISO 8601, all with an offset or all without),
    else text.
    """

    path: str
    folder: Path
    separator: str = ","
    null_values: tuple[str, ...] = ("", "NA")

    def read(self, window: Window, event_time: str) -> Iterator[pl.DataFrame]:
        import pyarrow as pa

        columns: list[str] = []
        for file in _files(self.path, self.folder):
            with _on_disk(file) as path:
                names = self._header(path, file.name)
                columns = _check_columns(columns, names, event_time, file.name)
                types = self._types(path, names, file.name)
                for batch in self._batches(path, names, file.name):
                    typed = [_cast(column, kind) for column, kind in zip(batch.columns, types, strict=True)]
                    yield _in_window(pa.record_batch(typed, names=names), window, event_time, file.name)

    def _header(self, path: Path, name: str) -> list[str]:
        with _reading(name, "save it as UTF-8, whole"), path.open(encoding="utf-8-sig", newline="") as file:
            names = next((row for row in csv.reader(file, delimiter=self.separator) if row), None)
        if names is None:
            raise SourceError(f"{name} is empty", fix="write a header line, or leave the file out of the path")
        twice = sorted({column for column in names if names.count(column) > 1})
        if twice:
            raise SourceError(
                f"{name}:1: column {twice[0]!r} is there twice", fix="give every column a name of its own"
            )
        return names

    def _types(self, path: Path, names: list[str], name: str) -> list[pa.DataType]:
        """The type of each column over the whole file; null for a column without values."""
        import pyarrow as pa

        types = [pa.null()] * len(names)
        for batch in self._batches(path, names, name):
            types = [_both(kind, _type_of(column)) for kind, column in zip(types, batch.columns, strict=True)]
        _require_closed_quotes(path, self.separator, name)
        return types

    def _batches(self, path: Path, names: list[str], name: str) -> Iterator[pa.RecordBatch]:
        """The file's rows, all as text, nulls as such."""
        import pyarrow as pa
        from pyarrow import csv as arrow_csv

        fix = "mend the row: it has too many or too few fields, an unclosed quote or bytes that are not UTF-8"
        with _reading(name, fix):
            reader = arrow_csv.open_csv(
                path,
                read_options=arrow_csv.ReadOptions(block_size=BLOCK_BYTES),
                parse_options=arrow_csv.ParseOptions(delimiter=self.separator, newlines_in_values=True),
                convert_options=arrow_csv.ConvertOptions(
                    column_types=dict.fromkeys(names, pa.string()),
                    strings_can_be_null=True,
                    null_values=list(self.null_values),
                ),
            )
        while True:
            with _reading(name, fix):
                batch = next(reader, None)
            if batch is None:
                return
            yield batch


# Files.


@dataclass(frozen=True)
class _File:
    """A file of an fsspec file system."""

    system: Any
    path: str
    name: str
    """As messages call it: the local path, or the URL."""

    @property
    def is_local(self) -> bool:
        from fsspec.implementations.local import LocalFileSystem

        return isinstance(self.system, LocalFileSystem)


def _files(path: str, folder: Path) -> list[_File]:
    """The files that `path` means, in the order of their names. Raises SourceError when there is none."""
    import fsspec

    url = path if "://" in path or "::" in path else str(folder / path)
    with _reading(url, "check the address, the network and the credentials"):
        system, inside = fsspec.core.url_to_fs(url)
        if not set("*?[") & set(inside):
            if "://" not in url and Path(inside).is_dir():
                raise SourceError(f"{url} is a folder", fix="end source.path in /*.parquet, /**/*.csv or the like")
            return [_File(system, inside, url)]
        found = system.glob(inside, detail=True)
    files = [
        _File(system, name, system.unstrip_protocol(name) if "://" in url else name)
        for name, info in sorted(found.items())
        if info["type"] != "directory"
    ]
    if not files:
        raise SourceError(f"{url} matches no file", fix="check source.path in pack.yaml")
    return files


@contextmanager
def _on_disk(file: _File) -> Iterator[Path]:
    """The file as plain bytes on this machine's disk: itself, or a copy that is fetched, unpacked, and removed after."""
    if file.path.endswith(".zip"):
        raise SourceError(f"{file.name} is an archive", fix="unpack it, or compress each file with gzip, bzip2 or xz")
    if file.is_local and not file.path.endswith(COMPRESSED):
        yield Path(file.path)
        return
    with tempfile.NamedTemporaryFile(suffix=".csv") as copy:
        with (
            _reading(file.name, "write the file again, or check the network; it cannot be fetched and unpacked whole"),
            file.system.open(file.path, "rb", compression="infer") as packed,
        ):
            shutil.copyfileobj(packed, copy)
        copy.flush()
        yield Path(copy.name)


@contextmanager
def _reading(name: str, fix: str) -> Iterator[None]:
    """Turn what a library raises while it reads `name` into a SourceError."""
    try:
        yield
    except SourceError:
        raise
    except FileNotFoundError as error:
        if "://" in name:  # an HTTP file system says this of a refused connection too
            fix = "check the address, the network and the credentials"
            raise SourceError(f"{name} does not exist or cannot be reached", fix=fix) from error
        raise SourceError(f"{name} does not exist", fix="check source.path in pack.yaml") from error
    except PermissionError as error:
        raise SourceError(f"{name} may not be read by this user", fix="grant read access to it") from error
    except Exception as error:
        what = " ".join(str(error).split())[:300] or type(error).__name__
        raise SourceError(f"{name} cannot be read: {what}", fix=fix) from error


# Rows.


def _check_columns(columns: list[str], found: list[str], event_time: str, name: str) -> list[str]:
    """The columns every file must have: those of the first one, event time among them."""
    partitions.require_columns(found, (event_time,), name)
    partitions.same_columns(columns or found, found, name)
    return columns or found


def _in_window(batch: pa.RecordBatch, window: Window, event_time: str, name: str) -> pl.DataFrame:
    """The batch's rows of the window, and those without a time."""
    import polars as pl

    frame = pl.from_arrow(batch)
    assert isinstance(frame, pl.DataFrame)
    frame = partitions.with_event_time(frame, event_time, name)
    time = pl.col(event_time)
    return frame.filter(time.is_null() | ((time >= window.start) & (time < window.end)))


def _pushed_down(field: pa.Field, window: Window) -> Any:
    """The window as a filter for row groups and rows, where the event time is a timestamp; else none."""
    import pyarrow as pa
    import pyarrow.dataset as ds

    if not pa.types.is_timestamp(field.type):
        return None
    bounds = [
        pa.scalar(
            bound if field.type.tz else bound.astimezone(UTC).replace(tzinfo=None), pa.timestamp("us", field.type.tz)
        )
        for bound in (window.start, window.end)
    ]
    time = ds.field(field.name)
    return time.is_null() | ((time >= bounds[0]) & (time < bounds[1]))


def _type_of(column: pa.Array) -> pa.DataType:
    """The narrowest type that all of a text column's values have; null when there is none."""
    import pyarrow as pa

    if column.null_count == len(column):
        return pa.null()
    for kind in (pa.int64(), pa.float64(), pa.bool_(), pa.date32(), pa.timestamp("us"), pa.timestamp("us", "UTC")):
        # A few values first: Arrow is slow at failing on many.
        if _fits(column[:64], kind) and _fits(column, kind):
            return kind
    return pa.string()


def _both(left: pa.DataType, right: pa.DataType) -> pa.DataType:
    """The narrowest type that holds the values of two."""
    import pyarrow as pa

    if left == right or pa.types.is_null(right):
        return left
    if pa.types.is_null(left):
        return right
    for wide, narrow in ((pa.float64(), pa.int64()), (pa.timestamp("us"), pa.date32())):
        if {left, right} == {wide, narrow}:
            return wide
    return pa.string()


def _fits(column: pa.Array, kind: pa.DataType) -> bool:
    import pyarrow as pa

    try:
        _cast(column, kind)
    except pa.ArrowInvalid:
        return False
    return True


def _cast(column: pa.Array, kind: pa.DataType) -> pa.Array:
    import pyarrow as pa
    import pyarrow.compute as pc

    return pa.nulls(len(column)) if pa.types.is_null(kind) else pc.cast(column, kind)


def _require_closed_quotes(path: Path, separator: str, name: str) -> None:
    """Raise SourceError when the file ends within a quoted field, which the Arrow reader takes for the field's end.

    An even number of quotes is closed; only otherwise are the rows read once more, by a reader that counts lines.
    """
    with path.open("rb") as file:
        quotes = sum(block.count(b'"') for block in iter(lambda: file.read(BLOCK_BYTES), b""))
    if quotes % 2 == 0:
        return
    with path.open(encoding="utf-8", newline="") as file:
        rows = csv.reader(file, delimiter=separator, strict=True)
        start = 1
        try:
            for _ in rows:
                start = rows.line_num + 1
        except csv.Error as error:
            raise SourceError(
                f"{name}:{start}: a quoted field is not closed: {error}",
                fix="the file may have been cut: copy it again, or close the quote",
            ) from error
