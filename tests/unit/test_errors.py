"""Messages fit on one screen and hold nothing that a terminal obeys, whatever the values that they quote."""

import json
import pickle
import re
from datetime import UTC, datetime

import polars as pl
import pytest
import typer
from rich.text import Text

from evergreen import errors
from evergreen.cli import alerts, metrics, terminal
from evergreen.data.sources import open_source
from evergreen.database import Database
from evergreen.errors import LINES, SCREEN, VALUE, EvergreenError, nearest, one_screen, quoted, visible
from evergreen.history import history_of
from evergreen.pack import CsvSource, Pack, ParquetSource, load_policy, parse_duration, parse_instant
from evergreen.run import Window
from evergreen.triggers import messages, senders, signatures

LONG = "x" * 1_000_000
HOSTILE = "\x1b[2J\x1b]0;title\x07\x9b31m\u202egnp.exe\u2066\r\x00\ud800"
RAW = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
WEEK = Window(start=datetime(2024, 1, 1, tzinfo=UTC), end=datetime(2024, 1, 8, tzinfo=UTC))

PACK = """
description: Is it more?
owner: tests@example.com
source: {kind: csv, path: rows.csv}
data: {target: more, event_time: at, train: 62d, validation: 31d, holdout: 31d}
training: {call: "model:train"}
gate: {primary: {metric: roc_auc}}
"""


def read_pack(value, tmp_path, old):
    """Load a pack in which `value` stands instead of `old`."""
    (tmp_path / "model.py").touch()
    assert old in PACK
    text = PACK.replace(old, json.dumps(value))
    (tmp_path / "pack.yaml").write_text(text, encoding="utf-8", errors="surrogatepass")
    Pack.load(tmp_path)


def read_policy(value, tmp_path):
    (tmp_path / "policy.yaml").write_text(f"cooldown: {json.dumps(value)}\n{json.dumps(value[:5000])}: 1\n")
    load_policy(tmp_path / "policy.yaml")


def read_files(value, tmp_path, columns):
    """Read a Parquet file with such columns."""
    pl.DataFrame({name.replace("\ud800", ""): ["x"] for name in columns}).write_parquet(tmp_path / "rows.parquet")
    source = open_source(ParquetSource(kind="parquet", path="rows.parquet"), tmp_path)
    list(source.read(WEEK, "at"))


def read_csv(value, tmp_path):
    text = value.replace("\ud800", "").replace("\r", "").replace("\x00", "")
    (tmp_path / "rows.csv").write_text(f'at,more\n2024-01-02,1\n"{text}",1\n', encoding="utf-8")
    source = open_source(CsvSource(kind="csv", path="rows.csv"), tmp_path)
    list(source.read(WEEK, "at"))


def read_senders(value, tmp_path):
    file = tmp_path / "senders.yaml"
    file.write_text(f"{json.dumps(value)}: {{signing: [x]}}\n")
    file.chmod(0o600)
    senders.Senders(file).now()


def connect(value, tmp_path):
    assert Database(value).engine


def show_run(value, tmp_path):
    history_of(Database(f"sqlite:///{tmp_path}/events.db"), value)


def post(body, headers=None):
    content = json.dumps(body).encode()
    messages.read("me", "more", {"content-type": "application/json", **(headers or {})}, content, datetime.now(UTC))


PATHS = {
    **{
        f"pack.yaml: {old}": lambda value, tmp_path, old=old: read_pack(value, tmp_path, old)
        for old in ("description", "csv", "62d", '"model:train"', "roc_auc")
    },
    "policy": read_policy,
    "a column instead of the event time": lambda value, tmp_path: read_files(value, tmp_path, [value[:10_000]]),
    "many long columns": lambda value, tmp_path: read_files(
        value, tmp_path, [f"{n}{value[:10_000]}" for n in range(50)]
    ),
    "a cell that is no time": read_csv,
    "senders": read_senders,
    "database": connect,
    "run": show_run,
    "webhook: pack": lambda value, _: post({"reason": "r", "pack": value[:60_000]}),
    "webhook: as_of": lambda value, _: post({"reason": "r", "as_of": value[:40]}),
    "webhook: unknown field": lambda value, _: post({"reason": "r", value[:60_000]: 1}),
    "webhook: content type": lambda value, _: post({}, {"content-type": value}),
    "webhook: version": lambda value, _: post({"version": value, "alerts": []}),
    "id": lambda value, _: signatures.post("http://127.0.0.1:1", "p", "whsec_", {}, id=value),
    "--evidence": lambda value, _: alerts._evidence(value),
    "--since": lambda value, _: terminal._since(value),
    "--for": lambda value, _: terminal.duration(value),
    "--as-of": lambda value, _: terminal._instant(value),
    "--serve": lambda value, _: metrics._address(value),
    "as-of": lambda value, _: parse_instant(value),
    "duration": lambda value, _: parse_duration(f"{'9' * len(value)}d"),
}


@pytest.mark.parametrize("value", [LONG, HOSTILE, HOSTILE + LONG], ids=["long", "hostile", "both"])
@pytest.mark.parametrize("path", PATHS)
def test_a_refusal_fits_on_a_screen_and_is_safe_to_print(path, value, tmp_path):
    """A megabyte in any place is named with its beginning and its end; escapes reach no terminal."""
    with pytest.raises(
        (EvergreenError, typer.BadParameter, messages.MessageError, messages.ContentTypeError, ValueError)
    ) as caught:
        PATHS[path](value, tmp_path)
    message = str(caught.value)
    assert len(message) <= 2 * SCREEN + len("\n  fix: ")
    assert len(message.splitlines()) <= 2 * LINES
    assert RAW.search(message) is None
    message.encode("utf-8")


@pytest.mark.parametrize(
    "error", [cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, EvergreenError)]
)
def test_both_parts_of_every_error_are_bounded(error):
    """Whoever makes it, and when it is handed from one process to another."""
    made = error(f"{HOSTILE} {LONG} is wrong", fix="do this\n" * 1000)
    for part in (made.what, made.fix):
        assert len(part) <= SCREEN
        assert len(part.splitlines()) <= LINES
        assert RAW.search(part) is None
    assert made.what.endswith("is wrong")
    copy = pickle.loads(pickle.dumps(made))
    assert (copy.what, copy.fix) == (made.what, made.fix)


def test_a_message_that_fits_is_left_as_it_is():
    """Several lines, tabs and every script that a terminal shows."""
    text = "pack.yaml:3: 'größe': 温度 🌲\n\tis wrong"
    assert one_screen(text) == text
    error = EvergreenError(text, fix="mend it")
    assert str(error) == f"{text}\n  fix: mend it"


def test_a_quoted_value_says_how_much_of_it_is_left_out():
    """Its beginning and its end stay, so that it can be found."""
    text = quoted(f"begin{LONG}end")
    assert text.startswith("'beginxx")
    assert text.endswith("xend'")
    assert "characters left out" in text
    assert len(text) <= VALUE
    assert quoted("short") == "'short'"
    assert quoted(HOSTILE) == visible(quoted(HOSTILE))


def test_a_long_value_is_not_compared_with_every_name():
    """A megabyte beside names of a megabyte costs nothing; the names that are shown are bounded."""
    assert nearest(LONG, [LONG + "a", LONG + "b"]).startswith("known: xxx")
    assert len(nearest("a", [f"{n}{LONG}" for n in range(20)])) < 12 * (VALUE + 2) + 20


def test_what_others_wrote_cannot_move_the_cursor(capsys):
    """A table and a line of the CLI show escapes as text."""
    table = terminal.plain_table("because")
    table.add_row(Text(HOSTILE.replace("\ud800", "")))
    terminal.out().print(table)
    terminal.out().print(Text("\x1b[31mred\u202e"))
    printed = capsys.readouterr().out
    assert RAW.search(printed) is None
    assert "\\x1b[2J" in printed
