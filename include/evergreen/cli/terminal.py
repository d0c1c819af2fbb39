"""What all commands share: how they take packs and instants, and how they answer a person or a program."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

import typer
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Table

from evergreen.errors import quoted, visible
from evergreen.pack import UNITS_S, parse_duration, parse_instant

ZULU = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z")


def _instant(value: str | None) -> str | None:
    """`value` as it is, where it says an instant."""
    if value is not None:
        try:
            parse_instant(value)
        except ValueError as error:
            raise typer.BadParameter(f"{quoted(value)} {error}") from None
    return value


def duration(value: str) -> timedelta:
    try:
        return parse_duration(value)
    except ValueError as error:
        raise typer.BadParameter(f"{quoted(value)} {error}") from None


def _since(value: str) -> datetime:
    """`2d`: so long ago; else an instant."""
    if value[-1:] in UNITS_S:
        return datetime.now(UTC) - duration(value)
    return parse_instant(str(_instant(value)))


AsJson = Annotated[bool, typer.Option("--json", help="One JSON document instead of text.")]
AsOf = Annotated[str | None, typer.Option(callback=_instant, help="See no data at or after this: 2013-04-01.")]
Since = Annotated[
    datetime | None,
    typer.Option(parser=_since, metavar="WHEN", help="Since when: 2d for the last two days, or a time, 2013-04-01."),
]
For = Annotated[timedelta | None, typer.Option("--for", parser=duration, metavar="DURATION", help="For how long: 6h.")]
PackName = Annotated[str, typer.Argument(help="The pack's name: its folder under include/packs.")]


class Terminal(Console):
    """A console that shows control and direction characters escaped: names and reasons are what others wrote."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(visible(segment.text), segment.style)


def out() -> Console:
    """Standard output; as wide as the terminal, or as it must be when there is none."""
    return Terminal(highlight=False, width=None if sys.stdout.isatty() else 160)


def show_json(content: Any) -> None:
    """One JSON document, its instants as 2013-04-01T00:00:00+00:00 whoever wrote them down."""
    print(json.dumps(_alike(content), indent=2, default=str))  # noqa: T201


def _alike(content: Any) -> Any:
    """`content`, instants that end in Z with an offset instead: values are kept in the one form, events in the other."""
    if isinstance(content, dict):
        return {key: _alike(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_alike(value) for value in content]
    if isinstance(content, datetime):
        return content.isoformat()
    if isinstance(content, str) and ZULU.fullmatch(content):
        return f"{content[:-1]}+00:00"
    return content


def minute(instant: datetime) -> str:
    """An instant to the minute, in UTC."""
    return instant.astimezone(UTC).strftime("%Y-%m-%d %H:%M")


def plain_table(*titles: str) -> Table:
    return Table(*titles, box=None, pad_edge=False)
