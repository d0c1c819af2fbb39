"""Probation: the new champion beside the one before it, on rows that came since and that neither has learned from. Pure.

With Δ = champion - the one before, turned so that more is better, and [low, high] the interval that the gate would take:

    roll back    Δ < -drop and high < 0        else keep

It is what `drop` means to the monitor: past the pack's figure, and past chance. The same rows are looked at again with
every partition that comes, so over a whole probation chance gets more than one try: a champion that is as good is
taken back more often than the level (1 - confidence) / 2 says, were it not for `drop` (`tests/unit/evaluation/
test_probation.py` prints how often).
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
