"""The gate: two evaluations and the pack's rules in, a verdict with its reasons out. Pure.

A challenger is promoted when nothing rejects it, nothing waits for a person, and the comparison speaks for it. With
Δ = challenger - champion, turned so that more is better, [low, high] its interval and m the margin:

    non_inferior    promote: low ≥ -m, or Δ ≥ -m ≤ high    reject: high < -m    else review
    superior        promote: low > 0                       reject: high ≤ 0     else review
    each slice      reject: high < -m                      else no objection

An interval that straddles the margin shows nothing; then the figure itself decides, for the challenger knows fresher
data and staying has its own risk: within the margin it is promoted, beyond it a person is asked.

(Non-inferiority by the confidence interval: Piaggio et al., "Reporting of noninferiority and equivalence randomized
trials", JAMA 308(24), 2012.) It blocks by default: what a rule names and the evaluation did not produce, NaN
included, rejects; what cannot be told waits for a person.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from datetime import datetime
from typing import Literal, NamedTuple

from evergreen.pack import GateRules, SliceRule
from evergreen.run import Difference, Estimate, Evaluated, Evaluation, SliceEstimate, Verdict, count, digest


class Finding(NamedTuple):
    """What one rule says: a decision with its sentence, or a note that decides nothing."""

    decision: Literal["reject", "review", "promote", "note"]
    sentence: str


GRAVITY = ("reject", "review", "promote", "note")
"""The gravest finding decides, and its sentences come first."""


def decide(
    evaluated: Evaluated,
    rules: GateRules,
    *,
    challenger_as_of: datetime,
    champion_as_of: datetime | None,
    rolled_back: str | None = None,
) -> Verdict:
    """The verdict on the challenger; its first reason is the headline.

    `champion_as_of` is None when there is no champion. `rolled_back` says why a person took this very model back. The gravest finding wins: reject, then review, then promote.
    """
    findings = [
        *_rolled_back(rolled_back),
        *_time(evaluated, challenger_as_of, champion_as_of),
        *_limits(evaluated.challenger, rules),
        *_latency(evaluated.challenger, rules),
        *_comparison(evaluated, rules),
        *(finding for rule in rules.slices for finding in _slice(evaluated, rule)),
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
    """The primary metric is there, and on the right side of its floor and ceiling."""
    primary = rules.primary
    figure = _figure(challenger, primary.metric)
    if figure is None:
        why = f": {challenger.withheld}" if challenger.withheld else ""
        yield Finding("reject", f"{primary.metric}, the primary metric, was not produced by the evaluation{why}")
        return
    if primary.min is not None:
        below = figure < primary.min
        words = "is below" if below else "is at least"
        yield Finding(
            "reject" if below else "note", f"{primary.metric} {_beside(figure, primary.min)} {words} {primary.min:g}"
        )
    if primary.max is not None:
        above = figure > primary.max
        words = "is above" if above else "is at most"
        yield Finding(
            "reject" if above else "note", f"{primary.metric} {_beside(figure, primary.max)} {words} {primary.max:g}"
        )


def _latency(challenger: Evaluation, rules: GateRules) -> Iterator[Finding]:
    """Predicting one row is quick enough for 95 rows of 100."""
    limit = rules.latency_p95_ms
    if limit is None:
        return
    measured = challenger.latency_p95_ms
    if measured is None or not math.isfinite(measured):
        yield Finding("reject", "latency_p95_ms was not produced by the evaluation")
        return
    over = measured > limit
    yield Finding(
        "reject" if over else "note",
        f"one row takes {measured:.1f} ms at the 95th percentile, {'over' if over else 'within'} {limit:g} ms",
    )


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
    change = _change(difference.estimate, figure)
    gain = _gain(difference.estimate, primary.metric)
    if gain is None:
        yield Finding("review", f"{shown}, not comparable with {name} ({change}): the hold-out has too few partitions")
        return
    low, high = gain
    if primary.test == "superior":
        decision, words = _superior(low, high)
    else:
        value = difference.estimate.value * _direction(primary.metric)
        decision, words = _non_inferior(value, low, high, primary.margin)
    yield Finding(decision, f"{shown}, {words.format(name)} ({change})")


def _non_inferior(
    value: float, low: float, high: float, margin: float
) -> tuple[Literal["promote", "reject", "review"], str]:
    if low >= -margin:
        return "promote", "not worse than {}"
    if high < -margin:
        return "reject", f"worse than {{}} by more than {margin:g}"
    if value >= -margin:
        return "promote", f"not shown worse than {{}} by {margin:g}"
    return "review", f"not shown to be within {margin:g} of {{}}"


def _superior(low: float, high: float) -> tuple[Literal["promote", "reject", "review"], str]:
    if low > 0:
        return "promote", "better than {}"
    if high <= 0:
        return "reject", "no better than {}"
    return "review", "not shown to be better than {}"


def _slice(evaluated: Evaluated, rule: SliceRule) -> Iterator[Finding]:
    """One finding for each group that is shown worse or was not compared, then one for each kind of the rest."""
    groups = [each for each in evaluated.challenger.slices if (each.by, each.metric) == (rule.by, rule.metric)]
    if not groups:
        yield Finding("reject", f"{rule.metric} by {rule.by} was not produced by the evaluation")
        return
    if evaluated.champion is None or evaluated.champion.withheld is not None:
        return  # said once, by _comparison
    rest: dict[str, list[str]] = {"better": [], "unclear": [], "unjudged": []}
    for each in groups:
        outcome = _outcome(evaluated, rule, each)
        if isinstance(outcome, Finding):
            yield outcome
        else:
            rest[outcome].append(each.group)
    name = _champion(evaluated)
    for kind, words in (
        ("better", f"{rule.metric} within {rule.margin:g} of {name}, or better"),
        ("unclear", f"{rule.metric} neither shown within {rule.margin:g} of {name} nor shown worse"),
        ("unjudged", f"{rule.metric} not compared, too few rows or one class only"),
    ):
        if rest[kind]:
            yield Finding("note", f"{rule.by}: {words}: {_some(rest[kind])}")


def _outcome(
    evaluated: Evaluated, rule: SliceRule, of: SliceEstimate
) -> Finding | Literal["better", "unclear", "unjudged"]:
    """What a group says: a reason to reject, or which kind of the rest it is."""
    if of.estimate is None:
        return "unjudged"
    name = _champion(evaluated)
    difference = _difference(evaluated, rule.metric, rule.by, of.group)
    if difference is None:
        what = f"the difference in {rule.metric} to {name} for {rule.by} {of.group}"
        return Finding("reject", f"{what} was not produced by the evaluation")
    gain = _gain(difference.estimate, rule.metric)
    if gain is not None and gain[1] < -rule.margin:
        change = _change(difference.estimate, of.estimate.value)
        return Finding(
            "reject", f"{rule.by} {of.group}: {rule.metric} worse than {name} by more than {rule.margin:g} ({change})"
        )
    return "better" if gain is not None and gain[0] >= -rule.margin else "unclear"


def _figure(evaluation: Evaluation, metric: str) -> float | None:
    """The metric's value; None where it was not produced, or is no number."""
    found = evaluation.metrics.get(metric)
    return None if found is None or not math.isfinite(found.value) else found.value


def _difference(evaluated: Evaluated, metric: str, by: str | None, group: str | None) -> Difference | None:
    for each in evaluated.differences:
        if (each.metric, each.by, each.group) == (metric, by, group) and math.isfinite(each.estimate.value):
            return each
    return None


def _gain(difference: Estimate, metric: str) -> tuple[float, float] | None:
    """The interval turned so that more is better; None where there is none."""
    if difference.low is None or difference.high is None or not math.isfinite(difference.low + difference.high):
        return None
    if _direction(metric) > 0:
        return difference.low, difference.high
    return -difference.high, -difference.low


def _champion(evaluated: Evaluated) -> str:
    champion = evaluated.champion
    return "the champion" if champion is None or champion.version is None else f"version {champion.version}"


def _change(difference: Estimate, of: float) -> str:
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
