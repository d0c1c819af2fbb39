"""Probation: the new champion beside the one before it, on rows that came since and that neither has learned from. Pure.

With Δ = champion - the one before, turned so that more is better, and [low, high] its interval as the gate takes it:

    roll back    Δ < -drop and high < 0        else keep

It is what `drop` means to the monitor: past the pack's figure, and past chance. But the same two are looked at again with
every partition that comes, and chance has a try each time. So the interval is of confidence

    1 - (1 - c) / n        c: the gate's, n: the partitions that a probation lasts

by which the chance that a champion which is as good is ever taken back is (1 - c) / 2 at most (Bonferroni's inequality;
`tests/unit/evaluation/test_probation.py` prints it, and what it costs in power). Not covered: labels of one partition
that come by and by give it more than one try.
"""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from evergreen.evaluation.gate import change_of, gain_of
from evergreen.evaluation.metrics import direction
from evergreen.run import Estimate, Value, Window, count


class Seen(Value):
    """All that the decision is made from."""

    champion: int
    before: int | None
    """The version that was champion before it."""
    since: datetime
    until: datetime
    """Of the probation, on the pack's clock."""
    as_of: datetime
    metric: str
    drop: float
    confidence: float
    """Of the interval."""
    independent: bool
    excused: str | None = None
    """Why the two were not compared."""
    window: Window | None = None
    rows: int = 0
    """With labels."""
    figure: Estimate | None = None
    figure_before: Estimate | None = None
    difference: Estimate | None = None
    """The champion's less the other's, as it is: of a loss, more is worse."""


def confidence_over(partitions: int, confidence: float) -> float:
    """The confidence of each of `partitions` looks by which all of them together have `confidence`."""
    return 1 - (1 - confidence) / max(partitions, 1)


class Ruling(Value):
    """What follows, and why, in one sentence."""

    seen: Seen
    decision: Literal["keep", "roll back"]
    why: str


def decide(seen: Seen) -> Ruling:
    """Whether the champion stays."""
    champion = f"version {seen.champion}"
    if seen.excused is not None or seen.figure is None or seen.figure_before is None or seen.difference is None:
        why = seen.excused or "nothing was compared"
        return Ruling(seen=seen, decision="keep", why=f"{champion} is on probation, and was not judged: {why}")
    change, reach = seen.difference.value * direction(seen.metric), gain_of(seen.difference, seen.metric)
    told = (
        f"{seen.metric} {seen.figure.value:.3f} beside {seen.figure_before.value:.3f} of version {seen.before}, "
        f"{change_of(seen.difference, seen.figure.value)}, on {count(seen.rows, 'row')} of {seen.window}"
    )
    if reach is not None and change < -seen.drop and reach[1] < 0:
        return Ruling(seen=seen, decision="roll back", why=f"{champion} is worse by more than {seen.drop:g}: {told}")
    return Ruling(seen=seen, decision="keep", why=f"{champion} is not shown worse by more than {seen.drop:g}: {told}")
