"""The gate: two evaluations and the pack's rules in, a verdict with its reasons out. Pure.

A challenger is promoted when nothing rejects it, nothing waits for a person, and the comparison speaks for it. With
Δ = challenger - champion, turned so that more is better, [low, high] its interval and m the margin:

    non_inferior    promote: low ≥ -m    reject: high < -m    else unclear
    superior        promote: low > 0     reject: high ≤ 0     else review
    each slice      reject: shown worse by more than m among all slices    else no objection

Unclear is an interval that straddles the margin: it shows neither. By the pack's `unclear`, a person is asked
(`review`), or the figure itself decides (`fresher`): Δ ≥ -m promotes, for the challenger knows fresher data and
staying has its own risk, and Δ < -m asks a person. `fresher` makes no promise about a loss of m: hidden by chance, it
is promoted half of the time. Whichever it is, a note says how many more rows would tell.

(Non-inferiority by the confidence interval: Piaggio et al., "Reporting of noninferiority and equivalence randomized
trials", JAMA 308(24), 2012.) Each test is one-sided, at the level (1 - confidence) / 2. Slices are tested together, all
groups of all rules that can be, by Holm's correction: the chance that a challenger which is worse by more than m in no
slice is rejected for one is at most that level, however many there are.

It blocks by default: what a rule names and the evaluation did not produce, NaN included, rejects; what cannot be told
waits for a person.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from datetime import datetime
from typing import Literal, NamedTuple

from evergreen.pack import FairnessRule, GateRules, LimitRule, PrimaryRule, SliceRule
from evergreen.run import Difference, Estimate, Evaluated, Evaluation, SliceEstimate, Verdict, count, digest


class Finding(NamedTuple):
    """What one rule says: a decision with its sentence, or a note that decides nothing."""

    decision: Literal["reject", "review", "promote", "note"]
    sentence: str


GRAVITY = ("reject", "review", "promote", "note")
"""The gravest finding decides, and its sentences come first."""
LONGEST = 20
"""Hold-outs so many times as long are not worth naming."""


def decide(
    evaluated: Evaluated,
    rules: GateRules,
    *,
    challenger_as_of: datetime,
    champion_as_of: datetime | None,
    rolled_back: str | None = None,
) -> Verdict:
    """The verdict on the challenger; its first reason is the headline.

    `champion_as_of` is None when there is no champion. `rolled_back` says why a person took this very model back. The
    gravest finding wins: reject, then review, then promote.
    """
    findings = [
        *_rolled_back(rolled_back),
        *_time(evaluated, challenger_as_of, champion_as_of),
        *_limits(evaluated.challenger, rules),
        *_cost(evaluated, rules),
        *(finding for rule in rules.fairness for finding in _fairness(evaluated.challenger, rule)),
        *_comparison(evaluated, rules),
        *_slices(evaluated, rules),
    ]
    findings.sort(key=lambda finding: GRAVITY.index(finding.decision))
    decision = findings[0].decision
    assert decision != "note"  # _comparison decides, or _limits has rejected
    return Verdict(decision=decision, reasons=tuple(finding.sentence for finding in findings))


def _rolled_back(why: str | None) -> Iterator[Finding]:
    """What a person took back is not promoted again without one."""
    if why is not None:
        yield Finding("review", f"{why}; it is for a person to make it champion again")


def policy_hash(rules: GateRules) -> str:
    """sha256 of the rules as a verdict's record keeps it."""
    return digest(rules)


def _time(evaluated: Evaluated, challenger_as_of: datetime, champion_as_of: datetime | None) -> Iterator[Finding]:
    """Time only moves forward: fresher knowledge is never replaced by older."""
    if champion_as_of is None:
        if evaluated.champion is not None:
            yield Finding(
                "review", f"the as-of of {_champion(evaluated)} is unknown, and so is which of the two is fresher"
            )
        return
    if challenger_as_of < champion_as_of:
        yield Finding(
            "reject",
            f"as of {_instant(challenger_as_of)}, earlier than {_champion(evaluated)} "
            f"({_instant(champion_as_of)}): time only moves forward",
        )
    if evaluated.champion is None:
        yield Finding("reject", f"the champion as of {_instant(champion_as_of)} was not evaluated")


def _limits(challenger: Evaluation, rules: GateRules) -> Iterator[Finding]:
    """Every metric with a floor or a ceiling is there, the primary one first, and on the right side of it."""
    every: tuple[PrimaryRule | LimitRule, ...] = (rules.primary, *rules.limits)
    for rule in every:
        figure = _figure(challenger, rule.metric)
        if figure is None:
            why = f": {challenger.withheld}" if challenger.withheld else ""
            role = ", the primary metric," if rule is rules.primary else ""
            yield Finding("reject", f"{rule.metric}{role} was not produced by the evaluation{why}")
            continue
        shown = f"{rule.metric} {{}}"
        if rule.min is not None:
            below = figure < rule.min
            words = f"{shown.format(_beside(figure, rule.min))} {'is below' if below else 'is at least'} {rule.min:g}"
            yield Finding("reject" if below else "note", words)
        if rule.max is not None:
            above = figure > rule.max
            words = f"{shown.format(_beside(figure, rule.max))} {'is above' if above else 'is at most'} {rule.max:g}"
            yield Finding("reject" if above else "note", words)


def _cost(evaluated: Evaluated, rules: GateRules) -> Iterator[Finding]:
    """Predicting one row is quick enough for 95 rows of 100, and neither time nor size grew too far past the champion's."""
    challenger, champion = evaluated.challenger, evaluated.champion
    measured = challenger.latency_p95_ms
    if measured is None or not math.isfinite(measured):
        measured = None
        if rules.latency_p95_ms is not None or rules.latency_ratio is not None:
            yield Finding("reject", "latency_p95_ms was not produced by the evaluation")
    if rules.latency_p95_ms is not None and measured is not None:
        over = measured > rules.latency_p95_ms
        yield Finding(
            "reject" if over else "note",
            f"one row takes {measured:.1f} ms at the 95th percentile, "
            f"{'over' if over else 'within'} {rules.latency_p95_ms:g} ms",
        )
    if champion is None or champion.withheld is not None:
        return  # said once, by _comparison
    if rules.latency_ratio is not None and measured is not None:
        yield _beside_champion(
            evaluated,
            "latency_p95_ms",
            measured,
            champion.latency_p95_ms,
            rules.latency_ratio,
            "one row takes {:.2f} ms",
        )
    if rules.size_ratio is not None:
        megabytes = challenger.size_bytes / 1e6, champion.size_bytes / 1e6
        yield _beside_champion(evaluated, "size_bytes", *megabytes, rules.size_ratio, "the model folder has {:.3g} MB")


def _beside_champion(
    evaluated: Evaluated, what: str, ours: float, theirs: float | None, most: float, sentence: str
) -> Finding:
    """Whether something grew by no more than a factor."""
    name = _champion(evaluated)
    if theirs is None or not math.isfinite(theirs) or theirs <= 0:
        return Finding("reject", f"{what} of {name} was not produced by the evaluation")
    ratio = ours / theirs
    over = ratio > most
    return Finding(
        "reject" if over else "note",
        f"{sentence.format(ours)}, {ratio:.3g} times {name}'s, {'over' if over else 'within'} {most:g}",
    )


def _fairness(challenger: Evaluation, rule: FairnessRule) -> Iterator[Finding]:
    """The gap between groups is there, and within its limit; groups too small to compare are named."""
    what = f"{rule.measure} by {rule.by}"
    asked = (rule.by, rule.measure, rule.threshold)
    gap = next((each for each in challenger.gaps if (each.by, each.measure, each.threshold) == asked), None)
    if gap is None:
        yield Finding("reject", f"{what} was not produced by the evaluation")
        return
    few = f"fewer than {rule.min_rows} rows, or one class only"
    if gap.value is None or not math.isfinite(gap.value):
        yield Finding("reject", f"{what} was not produced by the evaluation: {few} in all groups but one at most")
        return
    over = gap.value > rule.max
    yield Finding(
        "reject" if over else "note",
        f"{what}: {count(len(gap.groups), 'group')} at most {_beside(gap.value, rule.max)} apart, "
        f"{'over' if over else 'within'} {rule.max:g}",
    )
    if gap.unjudged:
        yield Finding("note", f"{what}: not compared, {few}: {_some(_with_rows(gap.unjudged.items()))}")


def _comparison(evaluated: Evaluated, rules: GateRules) -> Iterator[Finding]:
    """The primary test against the champion, or why there is none: one finding, unless `_limits` missed the figure."""
    primary = rules.primary
    figure = _figure(evaluated.challenger, primary.metric)
    if figure is None:
        return
    shown = f"{primary.metric} {_number(figure, figure)}"
    champion = evaluated.champion
    if champion is None:
        yield Finding("promote", f"{shown}, no champion to compare with")
        return
    name = _champion(evaluated)
    if champion.withheld is not None:
        absolute = primary.min is not None or primary.max is not None
        yield Finding(
            "promote" if absolute else "review",
            f"{shown}, not compared with {name}: {champion.withheld}"
            + ("" if absolute else "; the pack has no floor or ceiling to judge it by alone"),
        )
        return
    difference = _difference(evaluated, primary.metric, None, None)
    if difference is None:
        yield Finding("reject", f"the difference in {primary.metric} to {name} was not produced by the evaluation")
        return
    if evaluated.confidence != primary.confidence:
        yield Finding(
            "reject", f"intervals are of confidence {evaluated.confidence:g}, the rule asks for {primary.confidence:g}"
        )
        return
    change = change_of(difference.estimate, figure)
    gain = gain_of(difference.estimate, primary.metric)
    if gain is None:
        yield Finding("review", f"{shown}, not comparable with {name} ({change}): the hold-out has too few partitions")
        return
    low, high = gain
    value = difference.estimate.value * _direction(primary.metric)
    if primary.test == "superior":
        decision, words = _superior(low, high)
        straddled = 0.0 if decision == "review" else None
    else:
        decision, words = _non_inferior(value, low, high, primary)
        straddled = -primary.margin if low < -primary.margin <= high else None
    yield Finding(decision, f"{shown}, {words.format(name)} ({change})")
    if straddled is not None and (more := _more(difference, abs(value - straddled), primary)) is not None:
        yield Finding("note", f"{primary.metric}: {more} would tell, were the figures to stay")


def _non_inferior(
    value: float, low: float, high: float, rule: PrimaryRule
) -> tuple[Literal["promote", "reject", "review"], str]:
    margin = rule.margin
    if low >= -margin:
        return "promote", "not worse than {}"
    if high < -margin:
        return "reject", f"worse than {{}} by more than {margin:g}"
    if value >= -margin and rule.unclear == "fresher":
        return "promote", f"not shown worse than {{}} by {margin:g}"
    return "review", f"not shown to be within {margin:g} of {{}}"


def _superior(low: float, high: float) -> tuple[Literal["promote", "reject", "review"], str]:
    if low > 0:
        return "promote", "better than {}"
    if high <= 0:
        return "reject", "no better than {}"
    return "review", "not shown to be better than {}"


def _slices(evaluated: Evaluated, rules: GateRules) -> Iterator[Finding]:
    """What all groups of all slice rules say, tested together."""
    for rule in rules.slices:
        if not _groups(evaluated, rule):
            yield Finding("reject", f"{rule.metric} by {rule.by} was not produced by the evaluation")
    if evaluated.champion is None or evaluated.champion.withheld is not None:
        return  # said once, by _comparison
    tested: list[tuple[SliceRule, Difference, float]] = []
    for rule in rules.slices:
        for each in _groups(evaluated, rule):
            found = _tested(evaluated, rule, each)
            if isinstance(found, Finding):
                yield found
            elif found is not None:
                tested.append((rule, *found))
    shown_worse = _holm([p for _, _, p in tested], (1 - rules.primary.confidence) / 2)
    worse = [one for one, shown in zip(tested, shown_worse, strict=True) if shown]
    for rule, difference, p in worse:
        of = next(each.estimate for each in _groups(evaluated, rule) if each.group == difference.group)
        change = change_of(difference.estimate, of.value if of else 0.0)
        among = f", p {p:.2g} among {len(tested)} slices" if len(tested) > 1 else ""
        yield Finding(
            "reject",
            f"{rule.by} {difference.group}: {rule.metric} worse than {_champion(evaluated)} by more than "
            f"{rule.margin:g} ({change}{among})",
        )
    for rule in rules.slices:
        yield from _rest(evaluated, rules, rule, [each.group for of, each, _ in worse if of is rule])


def _tested(evaluated: Evaluated, rule: SliceRule, of: SliceEstimate) -> Finding | tuple[Difference, float] | None:
    """The difference within a group with its p-value; a reason to reject; None where it cannot be tested."""
    if of.estimate is None:
        return None
    difference = _difference(evaluated, rule.metric, rule.by, of.group)
    if difference is None:
        what = f"the difference in {rule.metric} to {_champion(evaluated)} for {rule.by} {of.group}"
        return Finding("reject", f"{what} was not produced by the evaluation")
    p = _p_worse(difference, rule)
    if p is None and difference.estimate.low is not None:
        what = f"the standard error of the difference in {rule.metric} for {rule.by} {of.group}"
        return Finding("reject", f"{what} was not produced by the evaluation")
    return None if p is None else (difference, p)


def _rest(evaluated: Evaluated, rules: GateRules, rule: SliceRule, worse: Iterable[str | None]) -> Iterator[Finding]:
    """One finding for each kind of group that does not reject: within the margin, unclear, not judged."""
    within: list[str] = []
    unclear: list[str] = []
    small: list[tuple[str, int]] = []
    undefined: list[tuple[str, int]] = []
    for each in _groups(evaluated, rule):
        difference = _difference(evaluated, rule.metric, rule.by, each.group)
        if each.estimate is None:
            (small if each.rows < rule.min_rows else undefined).append((each.group, each.rows))
        elif difference is not None and each.group not in worse:
            gain = gain_of(difference.estimate, rule.metric)
            if gain is not None and gain[0] >= -rule.margin:
                within.append(each.group)
            else:
                value = difference.estimate.value * _direction(rule.metric)
                more = _more(difference, abs(value + rule.margin), rules.primary)
                unclear.append(f"{each.group}: {more} would tell" if more else each.group)
    name = _champion(evaluated)
    for groups, words in (
        (within, f"{rule.metric} within {rule.margin:g} of {name}, or better"),
        (unclear, f"{rule.metric} neither shown within {rule.margin:g} of {name} nor shown worse"),
        (_with_rows(small), f"{rule.metric} not judged, fewer than {rule.min_rows} rows"),
        (_with_rows(undefined), f"{rule.metric} not judged, undefined where all rows are of one class"),
    ):
        if groups:
            yield Finding("note", f"{rule.by}: {words}: {_some(groups)}")


def _groups(evaluated: Evaluated, rule: SliceRule) -> list[SliceEstimate]:
    return [each for each in evaluated.challenger.slices if (each.by, each.metric) == (rule.by, rule.metric)]


def _p_worse(difference: Difference, rule: SliceRule) -> float | None:
    """The p-value against "worse by the margin at most"; None where the difference cannot be resampled."""
    from evergreen.evaluation.significance import p_worse  # numpy, see _direction

    return p_worse(difference.estimate.value * _direction(rule.metric), difference.estimate, rule.margin)


def _holm(p_values: list[float], level: float) -> list[bool]:
    from evergreen.evaluation.significance import holm  # numpy, see _direction

    return holm(p_values, level)


def _more(difference: Difference, distance: float, rule: PrimaryRule) -> str | None:
    """How much more hold-out would move the interval off a bound that is `distance` from the figure, in words."""
    from evergreen.evaluation.significance import settling  # numpy, see _direction

    times = settling(difference.estimate, distance, rule.confidence)
    if times is None:
        return None
    if times > LONGEST:
        return f"not even {LONGEST} times the hold-out"
    rows = count(_rounded((times - 1) * difference.rows), "row")
    partitions = difference.estimate.partitions
    if partitions is None:
        return f"about {rows} more"
    return f"about {count(math.ceil((times - 1) * partitions), 'more partition')} ({rows})"


def _figure(evaluation: Evaluation, metric: str) -> float | None:
    """The metric's value; None where it was not produced, or is no number."""
    found = evaluation.metrics.get(metric)
    return None if found is None or not math.isfinite(found.value) else found.value


def _difference(evaluated: Evaluated, metric: str, by: str | None, group: str | None) -> Difference | None:
    for each in evaluated.differences:
        if (each.metric, each.by, each.group) == (metric, by, group) and math.isfinite(each.estimate.value):
            return each
    return None


def gain_of(difference: Estimate, metric: str) -> tuple[float, float] | None:
    """The interval turned so that more is better; None where there is none."""
    if difference.low is None or difference.high is None or not math.isfinite(difference.low + difference.high):
        return None
    if _direction(metric) > 0:
        return difference.low, difference.high
    return -difference.high, -difference.low


def _champion(evaluated: Evaluated) -> str:
    champion = evaluated.champion
    return "the champion" if champion is None or champion.version is None else f"version {champion.version}"


def change_of(difference: Estimate, of: float) -> str:
    """`+0.011, interval +0.003 … +0.019`, as fine as the figure it is a change of."""
    change = _number(difference.value, of, "+")
    if difference.low is None or difference.high is None:
        return f"{change}, no interval"
    return f"{change}, interval {_number(difference.low, of, '+')} … {_number(difference.high, of, '+')}"


def _number(number: float, of: float, sign: str = "") -> str:
    """Three decimals; more for a figure `of` so small that three significant digits need them."""
    decimals = max(3, 2 - math.floor(math.log10(abs(of)))) if of else 3
    return f"{number:{sign}.{decimals}f}"


def _beside(figure: float, limit: float) -> str:
    """The figure, with as many digits as it takes to differ from the limit that it does not meet."""
    shown = _number(figure, figure)
    return f"{figure:.6g}" if float(shown) == limit else shown


def _rounded(number: float) -> int:
    """Two significant digits: more would promise what an extrapolation cannot keep."""
    place = 10 ** max(0, math.floor(math.log10(number)) - 1) if number >= 1 else 1
    return max(1, round(number / place) * place)


def _with_rows(groups: Iterable[tuple[str, int]]) -> list[str]:
    return [f"{group}: {count(rows, 'row')}" for group, rows in groups]


def _instant(instant: datetime) -> str:
    """A date, with the time when it is not midnight."""
    return f"{instant:%Y-%m-%d}" if (instant.hour, instant.minute) == (0, 0) else f"{instant:%Y-%m-%d %H:%M}"


def _some(groups: list[str]) -> str:
    """How many groups, and the first five by name."""
    return f"{count(len(groups), 'group')} ({', '.join(groups[:5])}{' …' if len(groups) > 5 else ''})"


def _direction(metric: str) -> int:
    """+1 where greater is better, -1 where less is."""
    from evergreen.evaluation.metrics import direction  # it needs numpy, which every parse of a DAG would pay for

    return direction(metric)
