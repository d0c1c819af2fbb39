"""What there is to know about a version before it replaces the champion: the same words as markdown and as a page. Pure.

`sections` says it once; `markdown` and `page` only write it down. The page holds its plots and asks nothing of the network.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator, Mapping
from datetime import datetime
from html import escape
from typing import Literal, NamedTuple

from pydantic import Field

from evergreen.page import head
from evergreen.run import Difference, Estimate, Evaluated, SliceEstimate, Value, Verdict, Window, count

GROUPS = 12
"""Most groups of a slice that are shown, those that changed for the worse first."""
LONGEST = 5000
"""Characters of a version's description that MLflow keeps."""
MARKUP = re.compile(r"[\\`*\[\]<>|#~]|(?<!\w)_|_(?!\w)")
"""What means something to markdown; an underscore does at the end of a word only."""
TONES = {"promote": "calm", "reject": "fault", "review": "shift"}
MARKS = {"better": "▲", "worse": "▼", "": ""}


class Data(Value):
    """The snapshot of a version, and how it differs from the champion's; None where there is none to compare with."""

    tag: str
    rows: int
    partitions: int
    rows_more: int | None = None
    new: int | None = None
    """Partitions that the champion's snapshot does not have."""
    changed: int | None = None
    """Partitions of both whose rows differ."""
    gone: int | None = None
    """Partitions that only the champion's snapshot has."""


class Look(Value):
    """What the monitor last saw."""

    as_of: datetime
    kind: str
    reasons: tuple[str, ...]


class Report(Value):
    """All that is told of a version."""

    model: str
    version: int
    description: str
    """The pack's."""
    run_id: str
    as_of: datetime
    reason: str
    verdict: Verdict
    """The gate's."""
    answer: str | None = None
    """What a person made of it, where one was asked."""
    evaluated: Evaluated
    data: Data
    look: Look | None = None
    made_by: dict[str, str] = Field(default_factory=dict)
    """The gist of its lineage."""
    plots: tuple[str, ...] = ()
    """Names of the figures, `roc.png`, in their order."""


class Cell(NamedTuple):
    """One figure of a table; a change may be for the better or for the worse, past chance."""

    text: str
    change: Literal["", "better", "worse"] = ""


class Section(NamedTuple):
    """A title, sentences, and a table whose first column names its rows."""

    title: str
    sentences: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    rows: tuple[tuple[Cell, ...], ...] = ()


def headline(report: Report) -> str:
    """`flight_delay version 4: review`."""
    return f"{report.model} version {report.version}: {report.verdict.decision}"


def told(report: Report) -> str:
    """When, why, and beside whom, in one line."""
    beside = (
        f"beside version {_champion(report)}" if report.evaluated.champion else "without a champion to compare with"
    )
    return f"as of {_day(report.as_of)}, because {report.reason}; {beside}"


def sections(report: Report) -> Iterator[Section]:
    """Why, figures, slices, data, lineage: everything but the plots."""
    answered = (f"version {report.version} {report.answer}",) if report.answer else ()
    yield Section("Why", (*answered, *report.verdict.reasons))
    yield _figures(report)
    yield from _slices(report)
    yield _data(report)
    if report.made_by:
        rows = tuple((Cell(name), Cell(text)) for name, text in report.made_by.items())
        yield Section("Lineage", columns=("what", "which"), rows=rows)


def _figures(report: Report) -> Section:
    """Every metric of both, their paired difference with its interval; latency and size."""
    evaluated = report.evaluated
    mine, champion = evaluated.challenger, evaluated.champion
    judged = {} if champion is None else champion.metrics
    differences = {found.metric: found for found in evaluated.differences if found.by is None}
    names = sorted(mine.metrics, key=lambda name: (name != evaluated.primary, name))
    rows = [
        (
            Cell(name),
            Cell(_number(mine.metrics[name].value)),
            *([Cell(_number(judged[name].value) if name in judged else "—")] if champion else []),
            *(_change(differences.get(name)) if champion else []),
            Cell(_interval(mine.metrics[name])),
        )
        for name in names
    ]
    for name, value, before in (
        ("latency p95, ms", mine.latency_p95_ms, champion.latency_p95_ms if champion else None),
        ("size, kB", mine.size_bytes / 1000, champion.size_bytes / 1000 if champion else None),
    ):
        if value is not None:
            both = ("—", "—") if before is None else (f"{before:.2f}", f"{round(value - before, 2) + 0.0:+.2f}")
            more = [*(Cell(text) for text in both), Cell("")] if champion else []
            rows.append((Cell(name), Cell(f"{value:.2f}"), *more, Cell("")))
    mine_is = f"version {report.version}"
    compared = (f"version {_champion(report)}", "difference", "its interval") if champion else ()
    columns = ("metric", mine_is, *compared, f"interval of {mine_is}")
    where = f"On {count(mine.rows, 'row')}, {_window(evaluated.holdout)}, intervals of {evaluated.confidence:.0%}."
    withheld = (f"The champion's figures are withheld: {champion.withheld}.",) if champion and champion.withheld else ()
    importance = (
        (f"{evaluated.importance_note[0].upper()}{evaluated.importance_note[1:]}.",)
        if evaluated.importance_note
        else ()
    )
    return Section("Figures", (where, *withheld, *importance), columns, tuple(rows))


def _slices(report: Report) -> Iterator[Section]:
    """A table for each kind of slice, its groups from the worst change to the best."""
    evaluated = report.evaluated
    champion = {_of(each): each for each in (evaluated.champion.slices if evaluated.champion else ())}
    differences = {_of(each): each for each in evaluated.differences if each.by is not None}
    kinds = dict.fromkeys((each.by, each.metric) for each in evaluated.challenger.slices)
    for by, metric in kinds:
        found = [each for each in evaluated.challenger.slices if (each.by, each.metric) == (by, metric)]
        groups = [each for each in found if each.estimate is not None]
        groups.sort(key=lambda each: _gain(differences.get(_of(each)), -each.rows))
        rows = tuple(
            (
                Cell(each.group),
                Cell(f"{each.rows:,}".replace(",", " ")),
                Cell(_value(each)),
                *([Cell(_value(champion.get(_of(each))))] if champion else []),
                *(_change(differences.get(_of(each))) if champion else []),
            )
            for each in groups[:GROUPS]
        )
        sentences = []
        if len(groups) > GROUPS:
            sentences.append(f"{count(len(groups) - GROUPS, 'more group')} changed less for the worse.")
        if small := [each.group for each in found if each.estimate is None]:
            names = ", ".join(small[:5]) + (" …" if len(small) > 5 else "")
            sentences.append(f"Without a figure, for too few rows or one class only: {names}")
        columns: tuple[str, ...] = (by, "rows", f"version {report.version}")
        if champion:
            columns += (f"version {_champion(report)}", "difference", "its interval")
        yield Section(f"{metric} by {by}", tuple(sentences), columns, rows)


def _data(report: Report) -> Section:
    data = report.data
    sentences = [f"{count(data.rows, 'row')} in {count(data.partitions, 'partition')}, snapshot {data.tag}."]
    if data.rows_more is not None:
        more = f"{data.rows_more:+,}".replace(",", " ")
        sentences.append(f"Since the champion's snapshot: {more} rows.")
    if data.new == data.changed == data.gone == 0:
        sentences.append("The partitions are those that the champion was made from.")
    elif data.new is not None:
        sentences.append(
            f"Of its partitions {data.new} are new to the champion, {data.changed} have other rows than it was made "
            f"from; {data.gone} of the champion's are gone."
        )
    if report.look is not None:
        sentences.append(f"The monitor's newest look, as of {_day(report.look.as_of)}: {report.look.kind}.")
        sentences += report.look.reasons[:3]
    return Section("Data", tuple(sentences))


# As markdown.


def markdown(report: Report, *, level: int = 2) -> str:
    """The report as GitHub's markdown, its headings from `level` down; the plots are named, not shown."""
    parts = [f"{'#' * level} {_plain(headline(report))}", _plain(told(report))]
    for section in sections(report):
        parts.append(f"{'#' * (level + 1)} {_plain(section.title)}")
        if section.sentences:
            parts.append("\n".join(f"- {_plain(sentence)}" for sentence in section.sentences))
        if section.rows:
            parts.append(_table(section))
    if report.plots:
        parts.append(f"{'#' * (level + 1)} Plots")
        shown = ", ".join(f"`plots/{name}`" for name in report.plots)
        parts.append(f"{shown}, with the version's MLflow run and in `evergreen report {_name(report)} --html`.")
    return "\n\n".join(parts) + "\n"


def description(report: Report) -> str:
    """What stands beside the version in MLflow: as much of the report as MLflow keeps, cut at a whole part."""
    text = f"{report.description}\n\n{markdown(report, level=3)}"
    more = f"\n\n… the rest: `evergreen report {_name(report)}`"
    while len(text) > LONGEST:
        text = (text.removesuffix(more).rpartition("\n\n")[0] or text[: LONGEST - len(more)]) + more
    return text


def _table(section: Section) -> str:
    side = "---" if section.title == "Lineage" else "---:"
    lines = [
        f"| {' | '.join(_plain(column) for column in section.columns)} |",
        f"|{'|'.join(['---', *[side] * (len(section.columns) - 1)])}|",
    ]
    for row in section.rows:
        cells = [f"{_plain(cell.text)} {MARKS[cell.change]}".rstrip() for cell in row]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _plain(text: str) -> str:
    """Text that markdown and HTML within it leave alone: names and reasons are data."""
    return MARKUP.sub(r"\\\g<0>", " ".join(text.split())).replace("&", "&amp;")


# As a page.


def page(report: Report, plots: Mapping[str, bytes]) -> str:
    """The report as one HTML page, with the PNG files of `plots` in it. The same values give the same bytes."""
    decision = report.verdict.decision
    return "".join(
        [
            head(headline(report), _STYLE),
            f'<header class="{TONES[decision]}"><p class=pack>{escape(report.model)} <span>version {report.version}',
            f"</span></p><h1>{decision}</h1><p>{escape(told(report))}</p></header>",
            *(_section(section) for section in sections(report)),
            _plots(plots),
            f"<footer><p>{escape(report.description)}</p></footer></main></body></html>\n",
        ]
    )


def _section(section: Section) -> str:
    kind = "why" if section.title == "Why" else "said"
    lines = "".join(f"<li>{escape(sentence)}</li>" for sentence in section.sentences)
    said = f"<ul class={kind}>{lines}</ul>" if lines else ""
    if section.rows:
        heads = "".join(f"<th>{escape(column)}</th>" for column in section.columns)
        body = "".join(f"<tr>{''.join(_cell(cell) for cell in row)}</tr>" for row in section.rows)
        kind = "facts" if section.title == "Lineage" else "figures"
        said += (
            f"<div class=wide><table class={kind}><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>"
        )
    return f"<section><h2>{escape(section.title)}</h2>{said}</section>"


def _cell(cell: Cell) -> str:
    if not cell.change:
        return f"<td>{escape(cell.text)}</td>"
    return f"<td class={cell.change}>{escape(cell.text)} <span>{MARKS[cell.change]}</span></td>"


def _plots(plots: Mapping[str, bytes]) -> str:
    if not plots:
        return ""
    figures = "".join(
        f'<img alt="{escape(name.removesuffix(".png").replace("_", " "))}" '
        f'src="data:image/png;base64,{base64.b64encode(content).decode()}">'
        for name, content in plots.items()
    )
    return f"<section><h2>Plots</h2><div class=plots>{figures}</div></section>"


_STYLE = """main{max-width:960px}.said{margin:0 0 8px;padding:0;list-style:none;color:var(--soft)}.said li{margin:2px 0;
overflow-wrap:anywhere}.wide{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:14px;font-variant-numeric:tabular-nums}
th{font-weight:500;color:var(--soft);font-size:13px}
th,td{padding:5px 0 5px 18px;text-align:right;white-space:nowrap;border-bottom:1px solid var(--edge)}
th:first-child,td:first-child{padding-left:0;text-align:left}td:first-child{font-weight:500}
section:nth-of-type(2) tbody tr:first-child td{font-weight:600}
.facts th,.facts td{text-align:left;white-space:normal;overflow-wrap:anywhere}.facts td:first-child{white-space:nowrap}
.better{color:var(--calm)}.worse{color:var(--bad)}td span{font-size:10px}
.plots{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(270px,100%),1fr));gap:16px}
.plots img{width:100%;border-radius:10px;border:1px solid var(--edge);background:#fff}
@media (max-width:480px){table{font-size:13px}th,td{padding-left:12px}}
"""


# Figures as text.


def _name(report: Report) -> str:
    return f"{report.model}@{report.version}"


def _champion(report: Report) -> str:
    champion = report.evaluated.champion
    return "?" if champion is None or champion.version is None else str(champion.version)


def _of(each: SliceEstimate | Difference) -> tuple[str | None, str | None, str]:
    return each.by, each.group, each.metric


def _value(each: SliceEstimate | None) -> str:
    return "—" if each is None or each.estimate is None else _number(each.estimate.value)


def _gain(difference: Difference | None, otherwise: float) -> tuple[bool, float]:
    """For sorting: what is not compared comes last."""
    if difference is None:
        return True, otherwise
    return False, difference.estimate.value * _direction(difference.metric)


def _change(difference: Difference | None) -> tuple[Cell, Cell]:
    """A difference, marked where its interval leaves out zero; and the interval."""
    if difference is None:
        return Cell("—"), Cell("")
    found, change = difference.estimate, ""
    if found.low is not None and found.high is not None and (found.low > 0 or found.high < 0):
        change = "better" if found.value * _direction(difference.metric) > 0 else "worse"
    return Cell(_number(found.value, "+"), change), Cell(_interval(found, "+"))  # type: ignore[arg-type]


def _direction(metric: str) -> int:
    """0 where nobody knows which way is better."""
    from evergreen.evaluation.metrics import METRICS, direction  # numpy: every parse of a DAG would pay for it

    return direction(metric) if any(metric in metrics for metrics in METRICS.values()) else 0


def _interval(of: Estimate, sign: str = "") -> str:
    return "" if of.low is None or of.high is None else f"{_number(of.low, sign)} … {_number(of.high, sign)}"


def _number(value: float, sign: str = "") -> str:
    """Four decimals; figures of 100 and more, as errors in minutes are, with one."""
    decimals = 1 if abs(value) >= 100 else 4
    return f"{round(value, decimals) + 0.0:{sign},.{decimals}f}".replace(",", " ")  # no minus before a zero


def _window(window: Window) -> str:
    return f"{_day(window.start)} … {_day(window.end)}"


def _day(instant: datetime) -> str:
    return f"{instant:%Y-%m-%d}" if (instant.hour, instant.minute) == (0, 0) else f"{instant:%Y-%m-%d %H:%M}"
