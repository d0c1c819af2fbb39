"""What the monitor found: as JSON for machines, and as one page for people that asks nothing of the network.

The same values give the same bytes. The page holds no script and its policy forbids every request; every name and value
of the data is escaped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from html import escape
from typing import TYPE_CHECKING

import numpy as np

from evergreen.monitoring.drift import CLASS, ColumnDrift, Drift, Finding, Kind, Triage, triage
from evergreen.pack import DriftRules
from evergreen.page import head
from evergreen.run import canonical_json, count

if TYPE_CHECKING:
    from evergreen.monitoring.profiles import ColumnProfile, Floats, Profile

FORMAT = 1
"""Of the JSON."""
WINDOWS = 60
"""Most windows on the page; the JSON has all."""
BINS = 40
"""Steps of a number's histogram."""
NAMES = 8
"""Most categories that are drawn by name."""
CARDS = 120
"""Most columns on the page, those that violate a rule first, then by PSI; the JSON has all."""
LEANINGS = 12
"""Most columns of which importance is drawn."""
COLOURS: Mapping[Kind, str] = {
    "data fault": "fault",
    "shift": "shift",
    "seasonal": "season",
    "withstood": "calm",
    "quiet": "quiet",
}


def to_json(pack: str, found: Triage, history: Sequence[Drift]) -> str:
    """Everything that was measured and decided, oldest window first; one line, keys sorted."""
    return canonical_json(
        {"format": FORMAT, "pack": pack, "action": found.action, **dict(found), "windows": list(history)}
    )


def page(
    pack: str, found: Triage, history: Sequence[Drift], rules: DriftRules, reference: Profile, window: Profile
) -> str:
    """One HTML page: what was decided and why, the windows over time, and each column beside the reference.

    `history` ends with the drift of `window`, and is not empty.
    """
    shown = history[-WINDOWS:]
    newest = shown[-1]
    moved, unmoved, left_out = _cards(shown, rules, reference, window)
    return "".join(
        [
            head(f"{pack}: {found.kind}", _STYLE),
            f'<header class="{COLOURS[found.kind]}"><p class="pack">{escape(pack)} <span>drift</span></p>',
            f"<h1>{escape(found.kind)} <small>{escape(found.action)}</small></h1>",
            f"<p>{_day(newest.start)} … {_day(newest.end)}, {count(newest.rows, 'row')}, beside what the champion ",
            f"was trained on: {_day(newest.reference_start)} … {_day(newest.reference_end)}, ",
            f"{count(newest.reference_rows, 'row')}</p></header>",
            "<section><h2>Why</h2><ul class=why>",
            *(f"<li>{escape(reason)}</li>" for reason in found.reasons),
            "</ul></section>",
            f"<section class=over><h2>Windows</h2>{_timeline(shown, history, found, rules)}{_performances(shown, rules)}",
            "</section>",
            _leanings(shown, rules),
            _classes(shown),
            _LEGEND,
            f"<section><h2>Violated</h2><div class=cards>{moved}</div></section>" if moved else "",
            f"<section><h2>Not moved</h2><div class=cards>{unmoved}</div></section>" if unmoved else "",
            f"<p class=note>{count(left_out, 'more column')} of the least PSI: the JSON report has them all.</p>"
            if left_out
            else "",
            f"<footer><p>{escape(_rules(rules, classes=newest.classes is not None))}</p>",
            f"<p>New columns, not compared: {escape(', '.join(newest.added[:CARDS]))}"
            f"{f' and {len(newest.added) - CARDS} more' if len(newest.added) > CARDS else ''}.</p>"
            if newest.added
            else "",
            "</footer></main></body></html>\n",
        ]
    )


def _rules(rules: DriftRules, *, classes: bool) -> str:
    return (
        f"A column has moved past a PSI of {rules.features.psi:g} (the target {rules.target.psi:g}, predictions "
        f"{rules.prediction.psi:g}), past chance, and past what was usual; a drop counts past {rules.performance.drop:g}, and a move of what the champion "
        f"leans on past {rules.importance.shift:g} and past chance. "
        f"{_class_rule(classes)}"
        f"{_freshness(rules)}Each must be seen in {rules.violated} windows, the newest among them. A fault counts at once."
    )


def _class_rule(classes: bool) -> str:
    if not classes:
        return ""
    return (
        f"Classes that the champion does not know count from {CLASS:.0%} of rows on, and a class that had as many and has "
        "none, both past chance. "
    )


def _freshness(rules: DriftRules) -> str:
    if rules.freshness is None:
        return ""
    return (
        f"Newer rows count where a stand-in gains more than {rules.freshness.gain:g} by them, not by chance, and in "
        f"{rules.violated} parts of the time since. "
    )


def _timeline(shown: Sequence[Drift], history: Sequence[Drift], found: Triage, rules: DriftRules) -> str:
    """One square a window: what triage said then."""
    first = len(history) - len(shown)
    kinds = [triage(history[: first + place], rules).kind for place in range(1, len(shown))] + [found.kind]
    squares = "".join(
        f'<li class="{COLOURS[kind]}" title="{_day(each.start)} … {_day(each.end)}: {kind}"></li>'
        for each, kind in zip(shown, kinds, strict=True)
    )
    told = "".join(f'<span><i class="{COLOURS[kind]}"></i>{kind}</span>' for kind in COLOURS if kind in kinds)
    ends = f"<span>{_day(shown[0].start)}</span><span>{_day(shown[-1].end)}</span>"
    return f"<ol class=timeline>{squares}</ol><p class=ends>{ends}</p><p class=key>{told}</p>"


def _performances(shown: Sequence[Drift], rules: DriftRules) -> str:
    """The champion's figure in each window whose labels have arrived, with its interval and what the pack allows."""
    figures = [(place, each.performance) for place, each in enumerate(shown) if each.performance is not None]
    if not figures:
        return "<p class=note>No labels have arrived for these windows.</p>"
    last = figures[-1][1]
    sign = 1 if last.less_is_better else -1
    allowed = last.reference.value + sign * rules.performance.drop
    told = [last.reference.value, allowed]
    for _, each in figures:
        told += [bound for bound in (each.window.low, each.window.value, each.window.high) if bound is not None]
    low, high = min(told), max(told)
    low, high = low - (high - low) * 0.08, high + (high - low) * 0.08
    wide, tall = 640, 150

    def x(place: int) -> float:
        return 60 + (place + 0.5) * (wide - 116) / len(shown)

    def y(value: float) -> float:
        return 8 + (high - value) / ((high - low) or 1) * (tall - 16)

    bad = [any(found.kind == "performance" for found in shown[place].violated) for place, _ in figures]
    marks = "".join(
        (
            f'<path class=whisker d="M{x(place):.1f} {y(each.window.low):.1f}V{y(each.window.high):.1f}"/>'
            if each.window.low is not None and each.window.high is not None
            else ""
        )
        + f'<circle class="{"bad" if off else "point"}" cx="{x(place):.1f}" cy="{y(each.window.value):.1f}" r="4"/>'
        for (place, each), off in zip(figures, bad, strict=True)
    )
    lines = "".join(
        f'<path class="{name}" d="M60 {y(value):.1f}H{wide - 56}"/>'
        for name, value in (("level", last.reference.value), ("limit", allowed))
    )
    for value, at in ((last.reference.value, "x=54 text-anchor=end"), (last.window.value, f"x={wide - 50}")):
        lines += f'<text {at} y="{y(value) + 4:.1f}">{value:.3f}</text>'
    what = f"{last.metric} of the champion: at promotion {last.reference.value:.3f}, the pack allows {allowed:.3f}"
    return f"<h3>{escape(what)}</h3>{_svg(wide, tall, lines + marks, what, 'wide')}"


def _leanings(shown: Sequence[Drift], rules: DriftRules) -> str:
    """Importance when the champion was made, and in the newest window whose labels have arrived; or why it is not known."""
    told = [(each, each.importance) for each in shown if each.importance is not None]
    labelled = [each for each in shown if each.performance is not None]
    note = "".join(
        f"<p class=note>{escape(each.importance_note)}.</p>" for each in labelled[-1:] if each.importance_note
    )
    if not told:
        return f"<section class=over><h2>What the champion leans on</h2>{note}</section>" if note else ""
    window, shift = told[-1]
    off = any(found.kind == "importance" for found in window.violated)
    head = f"moved by {shift.shift:.2f} of 1, the pack allows {rules.importance.shift:g}"
    if shift.noise is not None:
        head += f", chance leaves up to {shift.noise:.2f}"
    order = sorted(shift.columns, key=lambda each: (-max(each.before, each.now), each.column))
    rows = [(each.column, each.before, each.now) for each in order[:LEANINGS]]
    rest = f" The other {len(order) - LEANINGS} columns matter less." if len(order) > LEANINGS else ""
    return (
        f"<section class=over><h2>What the champion leans on</h2><p{' class=finding' if off else ''}>{escape(head)}.</p>"
        f"<div class=leans>{_pairs(rows, 'shares of importance, as they were and as they are')}</div>"
        f"<p class=note>{_day(window.start)} … {_day(window.end)} beside the hold-out of its making: each column's share of "
        f"what all lose when shuffled; below zero, the champion would do better without.{rest}</p>{note}</section>"
    )


def _classes(shown: Sequence[Drift]) -> str:
    """The classes of the newest window whose labels have arrived, beside those that the champion knows."""
    named = [(each, each.classes) for each in shown if each.classes is not None]
    if not named:
        return ""
    window, classes = named[-1]
    off = any(found.kind == "classes" for found in window.violated)
    return (
        f"<section class=over><h2>Classes</h2><p{' class=finding' if off else ''}>{escape(str(classes))}.</p>"
        f"<p class=note>{_day(window.start)} … {_day(window.end)}. The champion is wrong on every row of a class that it "
        "does not know.</p></section>"
    )


def _cards(shown: Sequence[Drift], rules: DriftRules, reference: Profile, window: Profile) -> tuple[str, str, int]:
    """The cards of what violates a rule, those of the rest, and how many columns are left out."""
    newest = shown[-1]
    violated = {each.column for each in newest.violated}
    order = sorted(
        newest.columns,
        key=lambda each: (each.name not in violated, each.role == "feature", 1 if each.psi is None else -each.psi),
    )
    cards = {True: "", False: ""}
    if newest.predictions is not None and reference.predictions is not None and window.predictions is not None:
        findings = [each for each in newest.violated if each.kind == "prediction"]
        psis = [each.predictions.psi if each.predictions else None for each in shown]
        bad = [any(each.kind == "prediction" for each in drift.violated) for drift in shown]
        sides = reference.predictions, window.predictions
        cards[bool(findings)] += _card(newest.predictions, findings, psis, bad, rules.prediction.psi, *sides)
    for column in order[:CARDS]:
        name = column.name
        findings = [each for each in newest.violated if each.column == name]
        psis = [drift.by_name[name].psi if name in drift.by_name else None for drift in shown]
        bad = [any((each.column, each.measure) == (name, "psi") for each in drift.violated) for drift in shown]
        limit = (rules.target if column.role == "target" else rules.features).psi
        sides = reference.columns[name], window.columns[name]
        cards[name in violated] += _card(column, findings, psis, bad, limit, *sides)
    return cards[True], cards[False], max(0, len(order) - CARDS)


def _card(
    column: ColumnDrift,
    findings: Sequence[Finding],
    psis: Sequence[float | None],
    bad: Sequence[bool],
    limit: float,
    reference: ColumnProfile,
    window: ColumnProfile,
) -> str:
    """One column: how it lay and lies, its PSI over the windows and in which it is `bad`, its figures, what it violates."""
    role = f" <span>{column.role}</span>" if column.role == "target" else ""
    name = "Predictions" if column.role == "prediction" else column.name
    figures = dict(_figures(column))
    return "".join(
        [
            f'<article class="{"fault" if any(each.kind == "fault" for each in findings) else "shift" if findings else ""}">',
            f"<h3>{escape(name)}{role}</h3>",
            *(f"<p class=finding>{escape(each.sentence)}</p>" for each in findings),
            _overlay(reference, window),
            _psis(name, psis, bad, limit),
            "<dl>",
            *(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in figures.items()),
            "</dl></article>",
        ]
    )


def _figures(column: ColumnDrift) -> Iterator[tuple[str, str]]:
    if column.psi is not None:
        yield "PSI", f"{column.psi:.3f}"
    if column.usual is not None:
        yield "usual, at most", f"{column.usual:.3f}"
    if column.js is not None:
        yield "Jensen-Shannon", f"{column.js:.3f}"
    if column.wasserstein is not None:
        yield "Wasserstein", f"{column.wasserstein:.3f} sd"
    if column.new:
        yield "never seen", f"{column.new:.1%}"
    if column.outside is not None and column.outside >= 0.0005:
        yield "out of range", f"{column.outside:.1%}"
    if column.missing or column.missing_before:
        yield "missing", f"{column.missing:.1%}, was {column.missing_before:.1%}"


def _psis(name: str, psis: Sequence[float | None], bad: Sequence[bool], limit: float) -> str:
    """PSI in each window as bars, with the pack's threshold."""
    if len(psis) < 2 or not any(psi is not None for psi in psis):
        return ""
    top = max(limit * 1.6, *(psi for psi in psis if psi is not None))
    wide, tall = 320, 34
    step = wide / len(psis)
    bars = "".join(
        f'<rect class="{"bad" if off else "good"}" x="{place * step + step * 0.1:.1f}" '
        f'y="{tall - max(1.0, psi / top * tall):.1f}" width="{step * 0.8:.1f}" height="{max(1.0, psi / top * tall):.1f}"/>'
        for place, (psi, off) in enumerate(zip(psis, bad, strict=True))
        if psi is not None
    )
    line = f'<path class=limit d="M0 {tall - limit / top * tall:.1f}H{wide}"/>'
    return _svg(wide, tall, bars + line, f"PSI of {name} over {len(psis)} windows, the pack allows {limit:g}", "psis")


def _overlay(reference: ColumnProfile, window: ColumnProfile) -> str:
    """The column as it was, filled, and as it is, a line; nothing where there is nothing to draw."""
    what = f"{window.name}: as it was and as it is"
    if not reference.seen and not window.seen:
        return ""
    if "time" in (reference.kind, window.kind):
        spans = [each for each in (reference, window) if each.kind == "time" and each.seen]
        return f"<p class=note>{' → '.join(_times(each) for each in spans)}</p>"
    if {reference.kind, window.kind} <= {"number", "null"}:
        distinct = np.union1d(reference.values, window.values)
        if reference.slack or window.slack or len(distinct) > NAMES:
            return _svg(320, 132, _histogram(reference, window), what)
        names = [f"{value:g}" for value in distinct]
        return _bars(names, _shares(reference), _shares(window), what)
    was, now = _shares(reference), _shares(window)
    names = sorted({*was, *now}, key=lambda name: (-max(was.get(name, 0.0), now.get(name, 0.0)), name))
    return _bars(names[:NAMES], was, now, what)


def _shares(column: ColumnProfile) -> dict[str, float]:
    if column.kind == "number":
        return {
            f"{value:g}": int(each) / column.seen for value, each in zip(column.values, column.weights, strict=True)
        }
    return column.shares() if column.seen else {}


def _bars(names: Sequence[str], before: Mapping[str, float], now: Mapping[str, float], what: str) -> str:
    """Two bars a name, and the rest of both together."""
    rows = [(name or "(empty)", before.get(name, 0.0), now.get(name, 0.0)) for name in names]
    rest = [max(0.0, sum(each.values()) and 1 - sum(each.get(name, 0.0) for name in names)) for each in (before, now)]
    if max(rest) > 0.0005:
        rows.append(("all others", rest[0], rest[1]))
    return _pairs(rows, what)


def _pairs(rows: Sequence[tuple[str, float, float]], what: str) -> str:
    """Name, share before and share now, as two bars; a share below zero is told by its figure alone."""
    top = max((max(p, q) for _, p, q in rows), default=0) or 1
    drawn = []
    for place, (name, p, q) in enumerate(rows):
        y = 20 * place
        short = name if len(name) <= 19 else name[:18] + "…"
        figure = round(q, 3) + 0.0  # no share is -0.0 %
        drawn.append(
            f'<text x=112 y="{y + 13}" text-anchor=end>{escape(short)}<title>{escape(name)}</title></text>'
            f'<rect class=was x=118 y="{y + 2}" width="{max(p, 0) / top * 150:.1f}" height=8 />'
            f'<rect class=is x=118 y="{y + 11}" width="{max(q, 0) / top * 150:.1f}" height=4 />'
            f'<text x="{124 + max(p, q, 0) / top * 150:.1f}" y="{y + 13}">{figure:.1%}</text>'
        )
    return _svg(320, 20 * len(rows), "".join(drawn), what)


def _histogram(reference: ColumnProfile, window: ColumnProfile) -> str:
    """Shares of equal steps between the 0.5th and the 99.5th percentile of both; of whole numbers, one step each."""
    sides = [each for each in (reference, window) if each.seen]
    ends = np.concatenate([each.quantiles([0.005, 0.995]) for each in sides])
    low, high = float(ends.min()), float(ends.max())
    many, ends_at = BINS, (low, high)
    if high - low < BINS and all(np.array_equal(each.values, np.round(each.values)) for each in sides):
        low, high, many = low - 0.5, high + 0.5, round(high - low) + 1
    elif low == high:
        low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, many + 1)
    edges[0] = np.nextafter(low, -np.inf)
    was, now = (np.diff(each.cdf(edges)) if each.seen else np.zeros(many) for each in (reference, window))
    top = max(was.max(), now.max()) or 1.0
    left, wide, floor = 4, 312, 112

    def steps(heights: Floats) -> str:
        tops = [
            f"V{floor - height / top * 104:.1f}H{left + (bar + 1) * wide / many:.1f}"
            for bar, height in enumerate(heights)
        ]
        return f"M{left} {floor}{''.join(tops)}V{floor}"

    labels = "".join(
        f'<text x="{at}" y=128 text-anchor={anchor}>{escape(_plain(value))}</text>'
        for at, anchor, value in ((left, "start", ends_at[0]), (316, "end", ends_at[1]))
    )
    return (
        f'<path class=axis d="M{left} {floor}H{left + wide}"/><path class=was d="{steps(was)}Z"/>'
        f'<path class=line d="{steps(now)}"/>{labels}'
    )


def _svg(wide: int, tall: int, inner: str, what: str, kind: str = "plot") -> str:
    return f'<svg class={kind} viewBox="0 0 {wide} {tall}" role=img aria-label="{escape(what)}">{inner}</svg>'


def _times(column: ColumnProfile) -> str:
    """By numpy, whose years go on where Python's end."""
    first, last = (str(np.datetime64(int((end or 0.0) // 60), "m")) for end in (column.minimum, column.maximum))
    return f"{first} … {last}".replace("T", " ")


def _plain(value: float) -> str:
    return f"{value:,.0f}".replace(",", " ") if 1000 <= abs(value) < 1e7 else f"{value:.3g}"


def _day(instant: datetime) -> str:
    return f"{instant:%Y-%m-%d}" if (instant.hour, instant.minute) == (0, 0) else f"{instant:%Y-%m-%d %H:%M}"


_LEGEND = (
    "<p class='key legend'><span><i class=was></i>what the champion was trained on</span>"
    "<span><i class=is></i>the newest window</span>"
    "<span><i class=dash></i>what the pack allows</span></p>"
)

_STYLE = """.over{max-width:760px}.timeline{display:flex;gap:2px;list-style:none;margin:0;padding:0}
.timeline li{flex:1;height:22px;border-radius:3px;background:var(--tone)}.timeline .quiet{opacity:.35}
.ends{display:flex;justify-content:space-between;margin:2px 0 0;color:var(--soft);font-size:13px}
.key{display:flex;flex-wrap:wrap;gap:4px 18px;margin:8px 0 0;font-size:13px;color:var(--soft)}
.key i{display:inline-block;width:12px;height:12px;border-radius:2px;margin-right:6px;vertical-align:-1px;
background:var(--tone)}.key i.was{background:var(--was)}.key i.is{background:var(--is)}.key i.quiet{opacity:.35}
.key i.dash{height:0;border-top:2px dashed var(--bad);border-radius:0;vertical-align:4px;background:none}
.legend{margin-top:28px}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(320px,100%),1fr));gap:16px;align-items:start}
article{background:var(--card);border:1px solid var(--edge);border-radius:10px;padding:14px 16px;min-width:0}
article.fault,article.shift{border-top:3px solid var(--tone)}
.finding{margin:0 0 6px;color:var(--tone);font-size:14px;overflow-wrap:anywhere}
.leans{max-width:420px}
svg{display:block;width:100%;height:auto;overflow:visible}svg.psis{margin:8px 0 2px}
svg text{font-size:11px;fill:var(--soft);font-family:inherit}
.was{fill:var(--was)}.is{fill:var(--is)}.good{fill:var(--was)}.bad{fill:var(--bad)}.point{fill:var(--is)}
.line{fill:none;stroke:var(--is);stroke-width:1.8;stroke-linejoin:round}.axis{stroke:var(--edge)}
.level{stroke:var(--soft)}.limit{stroke:var(--bad);stroke-dasharray:4 3}.whisker{stroke:var(--soft);stroke-width:1.5}
@media (max-width:480px){.timeline{gap:1px}svg.wide text{font-size:18px}}
"""
