"""The same figures within groups of rows: a model may be better on the whole and worse for one carrier.

Every group is reported. One that has fewer than `min_rows` rows, or on which the metric is undefined, has an estimate
of None: not judged, and said so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from evergreen.errors import EvaluationError, nearest
from evergreen.evaluation.metrics import Array, Rows, figures
from evergreen.evaluation.significance import estimate, paired
from evergreen.pack import GateRules, SliceRule
from evergreen.run import Difference, SliceEstimate


def estimates(
    rules: GateRules,
    rows: Rows,
    *,
    columns: Mapping[str, Array],
    confidence: float,
    independent: bool = False,
) -> tuple[SliceEstimate, ...]:
    """Each slice rule's metric in each group of its column, in order of the rules, then of the groups.

    `columns`: slice column → (n,) group of each row. Raises EvaluationError for a column that is not there.
    """
    return tuple(
        SliceEstimate(
            by=rule.by,
            group=group,
            rows=int(chosen.sum()),
            metric=rule.metric,
            estimate=estimate(rows.within(chosen), rule.metric, confidence, independent)
            if _judged(rows, rule, chosen)
            else None,
        )
        for rule in rules.slices
        for group, chosen in _groups(columns, rule.by)
    )


def differences(
    rules: GateRules,
    challenger: Rows,
    champion: Rows,
    *,
    columns: Mapping[str, Array],
    confidence: float,
    independent: bool = False,
) -> tuple[Difference, ...]:
    """Challenger minus champion in each group that `estimates` judges; the others are named there, with None.

    Both are of the same rows; each has its own classes.
    """
    return tuple(
        Difference(
            metric=rule.metric,
            by=rule.by,
            group=group,
            rows=int(chosen.sum()),
            estimate=paired(challenger.within(chosen), champion.within(chosen), rule.metric, confidence, independent),
        )
        for rule in rules.slices
        for group, chosen in _groups(columns, rule.by)
        if _judged(challenger, rule, chosen)
    )


def _groups(columns: Mapping[str, Array], by: str) -> Iterator[tuple[str, Array]]:
    """The groups of a column in sorted order, each with the (n,) mask of its rows; nulls are the group `null`."""
    if by not in columns:
        raise EvaluationError(f"gate.slices: the hold-out rows have no column {by!r}", fix=nearest(by, columns))
    names = np.array(["null" if each is None else str(each) for each in columns[by].tolist()])
    for group in np.unique(names).tolist():
        yield group, names == group


def _judged(rows: Rows, rule: SliceRule, chosen: Array) -> bool:
    """Whether the group has rows enough, and the metric is defined on them; that hangs on the truth alone."""
    if chosen.sum() < rule.min_rows:
        return False
    group = rows.within(chosen)
    return not np.isnan(figures(group, rule.metric, np.ones((1, group.partitions)))).any()
