"""How far apart a model treats groups of rows: rates by group, and the largest less the smallest, by fairlearn.

A row counts as predicted 1 from the rule's threshold on. By measure, the rates that are compared between groups:

    demographic_parity   share predicted 1
    equal_opportunity    share predicted 1 of those that are 1 (true positive rate)
    equalized_odds       that, and the share predicted 1 of those that are 0 (false positive rate): the wider gap counts

(Agarwal et al., "A reductions approach to fair classification", ICML 2018; Hardt, Price, Srebro, "Equality of
opportunity in supervised learning", NeurIPS 2016.) Groups with fewer than `min_rows` rows, or without a row of a class
that a rate is of, are named and not compared: the largest of many noisy rates less the smallest is never small.

Not covered: intervals. The gap of few rows leans upwards, so a limit close to what chance alone makes rejects by luck;
and which measure is fair is for the pack's owner to say.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from evergreen.evaluation.metrics import Array
from evergreen.pack import Fairness, FairnessRule, GateRules
from evergreen.run import Gap

RATES: Mapping[Fairness, tuple[str, ...]] = {
    "demographic_parity": ("selection_rate",),
    "equal_opportunity": ("true_positive_rate",),
    "equalized_odds": ("true_positive_rate", "false_positive_rate"),
}
"""Measure → fairlearn's names of the rates it compares."""
OF = {"selection_rate": (0, 1), "true_positive_rate": (1,), "false_positive_rate": (0,)}
"""Rate → the classes of which at least one row must be there for it to be defined."""


def gaps(rules: GateRules, truth: Array, predicted: Array, *, columns: Mapping[str, Array]) -> tuple[Gap, ...]:
    """One gap for each fairness rule. `truth` (n,) 0 and 1, `predicted` (n,) probabilities of 1, `columns`: column → (n,)."""
    return tuple(_gap(rule, truth, predicted, columns[rule.by]) for rule in rules.fairness)


def _gap(rule: FairnessRule, truth: Array, predicted: Array, groups: Array) -> Gap:
    names, counts = np.unique(groups, return_counts=True)
    judged = {
        str(name): rows >= rule.min_rows and _defined(rule.measure, truth[groups == name])
        for name, rows in zip(names, counts.tolist(), strict=True)
    }
    unjudged = {str(name): rows for name, rows in zip(names, counts.tolist(), strict=True) if not judged[str(name)]}
    kept = np.isin(groups, [name for name, fine in judged.items() if fine])
    of = {"by": rule.by, "measure": rule.measure, "threshold": rule.threshold}
    if sum(judged.values()) < 2:
        return Gap(**of, value=None, groups={}, unjudged=unjudged)
    from fairlearn import metrics  # it brings scikit-learn and pandas, which only packs with such a rule pay for

    frame = metrics.MetricFrame(
        metrics={name: getattr(metrics, name) for name in RATES[rule.measure]},
        y_true=truth[kept].astype(int),
        y_pred=(predicted[kept] >= rule.threshold).astype(int),
        sensitive_features=groups[kept],
    )
    rates = {str(name): {rate: float(of) for rate, of in row.items()} for name, row in frame.by_group.iterrows()}
    value = float(frame.difference(method="between_groups").max())
    return Gap(**of, value=value, groups=rates, unjudged=unjudged)


def _defined(measure: Fairness, truth: Array) -> bool:
    return all(np.isin(truth, OF[rate]).any() for rate in RATES[measure])
