"""A run on the terminal: live while it goes on, and its figures when it has ended. Plain lines where it is none."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from evergreen.keys import Note
from evergreen.pack import Pack
from evergreen.run import STAGE_VALUES


@dataclass
class RunView:
    """The live view of a run: a line for each stage, the one that runs with a spinner and its progress."""

    pack: Pack
    as_of: str | None
    reason: str
    plain: bool
    silent: bool
    lines: dict[str, Note] = field(default_factory=dict)
    began: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # The terminal as it is now: standard output goes to a log file while Airflow runs in this process.
        terminal = os.fdopen(os.dup(1), "w", encoding="utf-8")
        self.console = Console(file=terminal, highlight=False, soft_wrap=self.plain, quiet=self.silent)
        self.handler = _NoteHandler(self)
        self._live: Live | None = None

    @contextlib.contextmanager
    def live(self) -> Iterator[None]:
        """Show the run while the block lasts."""
        when = f"  as of {self.as_of}" if self.as_of else ""
        self.console.print(f"[bold]{self.pack.name}[/]{when}  because {escape(self.reason)}")
        if self.plain:
            yield
            return
        with Live(
            console=self.console,
            get_renderable=self._render,
            refresh_per_second=10,
            redirect_stdout=False,
            redirect_stderr=False,
        ) as self._live:
            yield
            self._live.refresh()
        self._live = None

    def take(self, said: Note) -> None:
        """Take in what is said of a stage."""
        self.began.setdefault(said.stage, time.monotonic())
        self.lines[said.stage] = said
        if self.plain and said.state in MARKS:
            self.console.print(_line(said))

    def follow(self, history: dict[str, Any]) -> None:
        """Take in a run's stages as the events tell them (when another process performs them)."""
        for stage in history["stages"]:
            known = self.lines.get(stage["stage"])
            if known is None or known.state != stage["state"]:
                self.take(
                    Note(history["run_id"], stage["stage"], stage["state"], stage["summary"], seconds=stage["seconds"])
                )
        ahead = [stage for stage in STAGE_VALUES if stage not in self.lines]
        if ahead and history["outcome"] == "running" and all(line.state != "running" for line in self.lines.values()):
            self.take(Note(history["run_id"], ahead[0], "running"))

    def _render(self) -> Group:
        rows: list[Any] = []
        for stage, said in list(self.lines.items()):
            if said.state in ("running", "waiting", "progress"):
                seconds = time.monotonic() - self.began[stage]
                bar = f"{said.fraction:4.0%} " if said.fraction is not None else ""
                rows.append(Spinner("dots", Text(f"{stage:<9} {bar}{said.text}  {seconds:.0f} s", style="cyan")))
            else:
                rows.append(_line(said))
        if not rows:
            rows.append(Spinner("dots", Text("starting Airflow in this process", style="cyan")))
        return Group(*rows)


MARKS = {"waiting": ("…", "yellow"), "done": ("✓", "green"), "skipped": ("≡", "blue"), "failed": ("✗", "red")}


def _line(said: Note) -> Text:
    mark, style = MARKS[said.state]
    seconds = f"  {said.seconds:.1f} s" if said.seconds is not None else ""
    return Text.assemble((f"{mark} ", style), (f"{said.stage:<9} ", "bold"), said.text, (seconds, "dim"))


class _NoteHandler(logging.Handler):
    """Hands the Notes that log records carry to the live view."""

    def __init__(self, view: RunView) -> None:
        super().__init__()
        self.view = view

    def emit(self, record: logging.LogRecord) -> None:
        said = getattr(record, "evergreen_note", None)
        if isinstance(said, Note):
            self.view.take(said)


def show_end(console: Console, ended: dict[str, Any], log_file: Path) -> None:
    """How a run ended, by its history: failure or verdict, figures, and the commands to look further."""
    console.print()
    if ended["failure"]:
        failure = ended["failure"]
        console.print(f"[bold red]{failure['error']}[/] in {failure['stage']}: {escape(failure['what'])}")
        if failure["fix"]:
            console.print(f"  fix: {escape(failure['fix'])}")
    elif ended["outcome"] == "running":
        console.print("[bold red]The run ended before its last stage.[/]")
    for key, value in _closing_lines(ended).items():
        console.print(f"[bold]{key:<9}[/] {escape(value)}")
    if ended["metrics"]:
        console.print(_metrics_table(ended["metrics"], ended["judged_against"]))
    console.print(f"[bold]{'log':<9}[/] {log_file}", style="dim")
    if ended["version"] is not None:
        name = ended["pack"]
        console.print(
            f"look further: evergreen lineage {name}@{ended['version']} · evergreen why '{ended['run_id']}' · make up"
        )
    if ended["outcome"] == "waiting":
        version = f"{ended['pack']}@{ended['version']}"
        console.print(
            f"[bold]{version} waits for approval[/]: evergreen report {version}, then, here or in the Airflow UI:"
        )
        console.print(f"  evergreen approve {version} --why …  or  evergreen reject {version} --why …")


def _closing_lines(ended: dict[str, Any]) -> dict[str, str]:
    rows = {"run": f"{ended['run_id']}, as of {ended['as_of'][:16]}"}
    if ended["verdict"]:
        rows["verdict"] = f"{ended['verdict']['decision']}: {'; '.join(ended['verdict']['reasons'])}"
    if ended["version"] is not None:
        champion = f"version {ended['champion']} is champion" if ended["champion"] else "there is no champion"
        rows["version"] = f"{ended['version']}; {champion}"
    if ended["snapshot"]:
        rows["snapshot"] = ended["snapshot"]
    if ended["stages"]:
        rows["seconds"] = "  ".join(f"{stage['stage']} {stage['seconds'] or 0:.1f}" for stage in ended["stages"])
    return rows


def _metrics_table(metrics: dict[str, dict[str, float | None]], judged_against: int | None) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("metric", style="bold", no_wrap=True)
    for title in ("this version", "interval"):
        table.add_column(title, justify="right", no_wrap=True)
    if judged_against is not None:
        for title in (f"version {judged_against}", "difference", "interval"):
            table.add_column(title, justify="right", no_wrap=True)
    for name, row in metrics.items():
        cells = [_figure(row["value"]), _interval(row["low"], row["high"])]
        if judged_against is not None:
            cells += [_figure(row["champion"]), _figure(row["difference"], signed=True)]
            cells.append(_interval(row["difference_low"], row["difference_high"], signed=True))
        table.add_row(name, *cells)
    return table


def _figure(value: float | None, *, signed: bool = False) -> str:
    return "—" if value is None else format(value, "+.4f" if signed else ".4f")


def _interval(low: float | None, high: float | None, *, signed: bool = False) -> str:
    return "" if low is None or high is None else f"{_figure(low, signed=signed)} … {_figure(high, signed=signed)}"
