"""The gate says what the rules say, in plain words, and blocks where it was not told."""

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evergreen.evaluation.gate import decide, policy_hash
from evergreen.pack import FairnessRule, GateRules, LimitRule, PrimaryRule, SliceRule
from evergreen.run import Difference, Estimate, Evaluated, Evaluation, Gap, SliceEstimate, Verdict, Window

APRIL = datetime(2013, 4, 1, tzinfo=UTC)
MARCH = datetime(2013, 3, 1, tzinfo=UTC)


def evaluation(value: float | None = 0.690, *, metric: str = "roc_auc", **fields) -> Evaluation:
    metrics = {} if value is None else {metric: Estimate(value=value)}
    return Evaluation(
        **{"model": "m", "rows": 12_000, "metrics": metrics, "size_bytes": 1, "latency_p95_ms": 1.2} | fields
    )


T_13 = 2.1603686564610127
"""Student's t with 13 degrees of freedom, 97.5 %: a hold-out of fourteen days."""


def change(value: float, low: float | None, high: float | None, metric: str = "roc_auc", group: str | None = None):
    by = None if group is None else "carrier"
    known = {} if low is None or high is None else {"error": abs(high - low) / 2 / T_13, "freedom": 13}
    estimate = Estimate(value=value, low=low, high=high, partitions=14, **known)
    return Difference(metric=metric, by=by, group=group, rows=900, estimate=estimate)


def group(name: str, value: float | None) -> SliceEstimate:
    estimate = None if value is None else Estimate(value=value)
    return SliceEstimate(by="carrier", group=name, rows=900, metric="roc_auc", estimate=estimate)


def rules(metric: str = "roc_auc", *, slices: tuple[SliceRule, ...] = (), latency: float | None = None, **primary):
    return GateRules(primary=PrimaryRule(metric=metric, **primary), slices=slices, latency_p95_ms=latency)


def judge(
    gate: GateRules,
    *differences: Difference,
    challenger: Evaluation | None = None,
    champion: Evaluation | None = evaluation(0.679, version=3),  # noqa: B008 - frozen
    as_of: datetime = APRIL,
    champion_as_of: datetime | None = MARCH,
    confidence: float = 0.95,
) -> Verdict:
    evaluated = Evaluated(
        primary="roc_auc",
        challenger=challenger or evaluation(),
        champion=champion,
        differences=differences,
        confidence=confidence,
        holdout=Window(start=APRIL - timedelta(days=14), end=APRIL),
    )
    return decide(evaluated, gate, challenger_as_of=as_of, champion_as_of=champion_as_of)


def alone(gate: GateRules, challenger: Evaluation | None = None) -> Verdict:
    """The verdict where there is no champion yet."""
    return judge(gate, challenger=challenger, champion=None, champion_as_of=None)


GAIN = change(0.011, 0.003, 0.019)


# The primary test


@pytest.mark.parametrize(
    ("test", "value", "low", "high", "decision", "headline"),
    [
        ("non_inferior", 0.011, 0.003, 0.019, "promote", "roc_auc 0.690, not worse than version 3 (+0.011, interval +0.003 … +0.019)"),
        ("non_inferior", 0.011, -0.008, 0.030, "promote", "roc_auc 0.690, not worse than version 3 (+0.011, interval -0.008 … +0.030)"),
        ("non_inferior", 0.011, -0.010, 0.030, "promote", "roc_auc 0.690, not worse than version 3 (+0.011, interval -0.010 … +0.030)"),
        ("non_inferior", 0.011, -0.012, 0.034, "promote", "roc_auc 0.690, not shown worse than version 3 by 0.01 (+0.011, interval -0.012 … +0.034)"),
        ("non_inferior", -0.010, -0.030, 0.010, "promote", "roc_auc 0.690, not shown worse than version 3 by 0.01 (-0.010, interval -0.030 … +0.010)"),
        ("non_inferior", -0.011, -0.030, 0.008, "review", "roc_auc 0.690, not shown to be within 0.01 of version 3 (-0.011, interval -0.030 … +0.008)"),
        ("non_inferior", -0.020, -0.030, -0.010, "review", "roc_auc 0.690, not shown to be within 0.01 of version 3 (-0.020, interval -0.030 … -0.010)"),
        ("non_inferior", -0.020, -0.030, -0.011, "reject", "roc_auc 0.690, worse than version 3 by more than 0.01 (-0.020, interval -0.030 … -0.011)"),
        ("superior", 0.011, 0.003, 0.019, "promote", "roc_auc 0.690, better than version 3 (+0.011, interval +0.003 … +0.019)"),
        ("superior", 0.011, 0.0, 0.019, "review", "roc_auc 0.690, not shown to be better than version 3 (+0.011, interval +0.000 … +0.019)"),
        ("superior", 0.011, -0.019, 0.0, "reject", "roc_auc 0.690, no better than version 3 (+0.011, interval -0.019 … +0.000)"),
    ],
)  # fmt: skip
def test_the_interval_decides_against_the_champion(test, value, low, high, decision, headline):
    """By where the interval lies, by the figure where it straddles the margin; all three in one line."""
    verdict = judge(rules(test=test), change(value, low, high))
    assert (verdict.decision, verdict.reasons[0]) == (decision, headline)


@pytest.mark.parametrize(
    ("value", "low", "high", "decision"),
    [
        (-0.1, -0.3, 0.05, "promote"),
        (-0.1, -0.3, 0.2, "promote"),
        (0.3, 0.2, 0.5, "reject"),
        (0.15, 0.05, 0.2, "review"),
    ],
)
def test_for_a_loss_less_is_better(value, low, high, decision):
    """Rmse may rise by the margin of 0.1 and no further; the sentence shows the difference as it was measured."""
    verdict = judge(
        rules("rmse", margin=0.1),
        change(value, low, high, metric="rmse"),
        challenger=evaluation(3.2, metric="rmse"),
        champion=evaluation(3.3, metric="rmse", version=3),
    )
    assert verdict.decision == decision
    assert verdict.reasons[0].endswith(f" ({value:+.3f}, interval {low:+.3f} … {high:+.3f})")


def test_small_figures_keep_three_significant_digits():
    """An error of 0.0005 and its changes are not all written 0.000."""
    verdict = judge(
        rules("mae", margin=0.0001),
        change(-0.00012, -0.0002, -0.00004, metric="mae"),
        challenger=evaluation(0.0005, metric="mae"),
        champion=evaluation(0.00062, metric="mae", version=3),
    )
    assert verdict.reasons == ("mae 0.000500, not worse than version 3 (-0.000120, interval -0.000200 … -0.000040)",)


def test_an_equal_model_with_fresher_data_wins_even_without_margin():
    """A difference of exactly 0 is not worse."""
    verdict = judge(rules(margin=0), change(0.0, 0.0, 0.0))
    assert verdict.reasons == ("roc_auc 0.690, not worse than version 3 (+0.000, interval +0.000 … +0.000)",)
    assert verdict.decision == "promote"


@pytest.mark.parametrize(("value", "decision"), [(0.011, "review"), (-0.011, "review")])
def test_a_pack_may_ask_a_person_wherever_nothing_is_shown(value, decision):
    """`unclear: review`: an interval across the margin is no promotion, whatever the figure."""
    verdict = judge(rules(unclear="review"), change(value, value - 0.03, value + 0.03))
    assert verdict.decision == decision
    assert verdict.reasons[0].startswith("roc_auc 0.690, not shown to be within 0.01 of version 3 (")


def test_what_is_shown_needs_no_person():
    """`unclear: review` changes nothing where the interval lies on one side of the margin."""
    gate = rules(unclear="review")
    assert [judge(gate, change(value, value - 0.005, value + 0.005)).decision for value in (0.0, -0.02)] == [
        "promote",
        "reject",
    ]


def test_an_unclear_comparison_says_how_much_more_would_tell():
    """A figure 0.005 from the bound and 0.03 wide needs (t · 0.03 / (t(13) · 0.005))² times the rows: t falls to 1.98."""
    verdict = judge(rules(), change(-0.005, -0.035, 0.025))
    assert verdict.reasons[1] == "roc_auc: not even 20 times the hold-out would tell, were the figures to stay"
    verdict = judge(rules(), change(0.0, -0.02, 0.02))
    assert verdict.reasons[1] == ("roc_auc: about 35 more partitions (2 200 rows) would tell, were the figures to stay")


def test_superior_says_how_much_more_would_show_the_gain():
    """Its bound is 0, not the margin."""
    verdict = judge(rules(test="superior"), change(0.01, -0.01, 0.03))
    assert (verdict.decision, len(verdict.reasons)) == ("review", 2)
    assert verdict.reasons[1] == "roc_auc: about 35 more partitions (2 200 rows) would tell, were the figures to stay"


@pytest.mark.parametrize("interval", [(-0.005, 0.03), (-0.05, -0.02)])
def test_what_is_shown_needs_no_more_rows(interval):
    """An interval on one side of the margin has no such note."""
    verdict = judge(rules(), change(sum(interval) / 2, *interval))
    assert len(verdict.reasons) == 1


def test_without_an_interval_a_person_decides():
    """One partition of hold-out shows nothing either way."""
    assert judge(rules(), change(0.011, None, None)) == Verdict(
        decision="review",
        reasons=(
            "roc_auc 0.690, not comparable with version 3 (+0.011, no interval): the hold-out has too few partitions",
        ),
    )


# No champion, or one without figures


def test_the_first_model_is_judged_by_absolute_rules_only():
    """No champion yet: floor and latency decide."""
    assert alone(rules(min=0.55, latency=20)) == Verdict(
        decision="promote",
        reasons=(
            "roc_auc 0.690, no champion to compare with",
            "roc_auc 0.690 is at least 0.55",
            "one row takes 1.2 ms at the 95th percentile, within 20 ms",
        ),
    )


def test_a_withheld_champion_leaves_the_absolute_rules():
    """The headline says why there is no comparison."""
    withheld = evaluation(None, version=3, withheld="it was trained on 3 days of the hold-out")
    assert judge(rules(min=0.55), champion=withheld) == Verdict(
        decision="promote",
        reasons=(
            "roc_auc 0.690, not compared with version 3: it was trained on 3 days of the hold-out",
            "roc_auc 0.690 is at least 0.55",
        ),
    )


def test_a_withheld_champion_and_no_absolute_rule_wait_for_a_person():
    """Nothing was shown, so nothing is promoted."""
    withheld = evaluation(None, version=3, withheld="it was trained on 3 days of the hold-out")
    assert judge(rules(), champion=withheld) == Verdict(
        decision="review",
        reasons=(
            (
                "roc_auc 0.690, not compared with version 3: it was trained on 3 days of the hold-out; "
                "the pack has no floor or ceiling to judge it by alone"
            ),
        ),
    )


# Law 5: time only moves forward


def test_an_earlier_challenger_is_never_promoted():
    """However good it is, and the headline says both instants."""
    verdict = judge(rules(), change(0.2, 0.19, 0.21), as_of=MARCH, champion_as_of=APRIL)
    assert verdict.decision == "reject"
    assert verdict.reasons[0] == "as of 2013-03-01, earlier than version 3 (2013-04-01): time only moves forward"


def test_the_same_as_of_may_be_trained_again():
    """Time has not moved backwards."""
    assert judge(rules(), GAIN, as_of=APRIL, champion_as_of=APRIL).decision == "promote"


def test_hours_are_shown_where_they_matter():
    """Instants within a day can be told apart."""
    verdict = judge(rules(), GAIN, as_of=MARCH + timedelta(hours=5), champion_as_of=MARCH + timedelta(hours=6))
    assert verdict.reasons[0] == (
        "as of 2013-03-01 05:00, earlier than version 3 (2013-03-01 06:00): time only moves forward"
    )


def test_a_champion_of_unknown_as_of_waits_for_a_person():
    """Which of the two is fresher cannot be shown."""
    verdict = judge(rules(), GAIN, champion_as_of=None)
    assert verdict.decision == "review"
    assert verdict.reasons[0] == "the as-of of version 3 is unknown, and so is which of the two is fresher"


# Law 7: the gate blocks by default

BY_CARRIER = SliceRule(by="carrier", metric="roc_auc")
UNMEASURED = {
    "primary metric": (
        lambda: alone(rules(), evaluation(None)),
        "roc_auc, the primary metric, was not produced by the evaluation",
    ),
    "primary metric withheld": (
        lambda: alone(rules(), evaluation(None, withheld="it has seen the hold-out")),
        "roc_auc, the primary metric, was not produced by the evaluation: it has seen the hold-out",
    ),
    "primary metric is NaN": (
        lambda: alone(rules(), evaluation(float("nan"))),
        "roc_auc, the primary metric, was not produced by the evaluation",
    ),
    "difference": (
        lambda: judge(rules()),
        "the difference in roc_auc to version 3 was not produced by the evaluation",
    ),
    "difference of another metric": (
        lambda: judge(rules(), change(0.1, 0.1, 0.1, metric="brier")),
        "the difference in roc_auc to version 3 was not produced by the evaluation",
    ),
    "difference is NaN": (
        lambda: judge(rules(), change(float("nan"), 0.1, 0.1)),
        "the difference in roc_auc to version 3 was not produced by the evaluation",
    ),
    "latency": (
        lambda: alone(rules(latency=20), evaluation(latency_p95_ms=None)),
        "latency_p95_ms was not produced by the evaluation",
    ),
    "latency is NaN": (
        lambda: alone(rules(latency=20), evaluation(latency_p95_ms=float("nan"))),
        "latency_p95_ms was not produced by the evaluation",
    ),
    "slice": (
        lambda: alone(rules(slices=(BY_CARRIER,))),
        "roc_auc by carrier was not produced by the evaluation",
    ),
    "slice of another metric": (
        lambda: alone(
            rules(slices=(SliceRule(by="carrier", metric="brier"),)), evaluation(slices=(group("AA", 0.7),))
        ),
        "brier by carrier was not produced by the evaluation",
    ),
    "difference of a slice": (
        lambda: judge(rules(slices=(BY_CARRIER,)), GAIN, challenger=evaluation(slices=(group("AA", 0.7),))),
        "the difference in roc_auc to version 3 for carrier AA was not produced by the evaluation",
    ),
    "confidence": (
        lambda: judge(rules(), GAIN, confidence=0.8),
        "intervals are of confidence 0.8, the rule asks for 0.95",
    ),
    "champion": (
        lambda: judge(rules(), champion=None, champion_as_of=MARCH),
        "the champion as of 2013-03-01 was not evaluated",
    ),
}  # fmt: skip


@pytest.mark.parametrize("missing", UNMEASURED)
def test_what_was_not_produced_rejects(missing):
    """Each thing that a rule needs and the evaluation does not hold is a failure, never a skip."""
    verdict, headline = UNMEASURED[missing][0](), UNMEASURED[missing][1]
    assert (verdict.decision, verdict.reasons[0]) == ("reject", headline)


# Absolute rules


@pytest.mark.parametrize(
    ("metric", "value", "limits", "headline"),
    [
        ("roc_auc", 0.540, {"min": 0.55}, "roc_auc 0.540 is below 0.55"),
        ("roc_auc", 0.54996, {"min": 0.55}, "roc_auc 0.54996 is below 0.55"),
        ("log_loss", 0.710, {"max": 0.7}, "log_loss 0.710 is above 0.7"),
    ],
)
def test_a_figure_past_its_limit_rejects(metric, value, limits, headline):
    """Floor and ceiling hold whatever the champion is worth; a near miss is written so that it reads as one."""
    verdict = judge(
        rules(metric, **limits), change(0.0, 0.0, 0.0, metric=metric), challenger=evaluation(value, metric=metric)
    )
    assert (verdict.decision, verdict.reasons[0]) == ("reject", headline)


@pytest.mark.parametrize(("metric", "limits"), [("roc_auc", {"min": 0.69}), ("log_loss", {"max": 0.69})])
def test_a_figure_on_its_limit_passes(metric, limits):
    """The limit itself is allowed."""
    assert alone(rules(metric, **limits), evaluation(0.69, metric=metric)).decision == "promote"


def test_a_slow_model_is_rejected():
    """One row must be predicted within the pack's limit."""
    verdict = judge(rules(latency=20), GAIN, challenger=evaluation(latency_p95_ms=25.31))
    assert verdict == Verdict(
        decision="reject",
        reasons=(
            "one row takes 25.3 ms at the 95th percentile, over 20 ms",
            "roc_auc 0.690, not worse than version 3 (+0.011, interval +0.003 … +0.019)",
        ),
    )


@pytest.mark.parametrize(
    ("limit", "headline"),
    [
        (LimitRule(metric="brier", max=0.2), "brier 0.210 is above 0.2"),
        (LimitRule(metric="precision_at_recall_0.8", min=0.5), "precision_at_recall_0.8 0.400 is below 0.5"),
        (LimitRule(metric="accuracy", min=0.5), "accuracy was not produced by the evaluation"),
    ],
)
def test_any_metric_may_have_a_limit(limit, headline):
    """Past it, or not produced, the challenger is rejected, however it compares."""
    figures = {"roc_auc": 0.69, "brier": 0.21, "precision_at_recall_0.8": 0.4}
    challenger = evaluation(metrics={name: Estimate(value=value) for name, value in figures.items()})
    verdict = judge(GateRules(primary=PrimaryRule(metric="roc_auc"), limits=(limit,)), GAIN, challenger=challenger)
    assert (verdict.decision, verdict.reasons[0]) == ("reject", headline)


def beside(*, challenger: Evaluation, champion: Evaluation, **ratios: float) -> Verdict:
    gate = GateRules(primary=PrimaryRule(metric="roc_auc"), **ratios)
    return judge(gate, GAIN, challenger=challenger, champion=champion)


@pytest.mark.parametrize(
    ("ratio", "decision", "reason"),
    [
        ({"latency_ratio": 1.5}, "reject", "one row takes 2.00 ms, 1.67 times version 3's, over 1.5"),
        ({"latency_ratio": 2}, "promote", "one row takes 2.00 ms, 1.67 times version 3's, within 2"),
        ({"size_ratio": 2}, "reject", "the model folder has 3 MB, 3 times version 3's, over 2"),
        ({"size_ratio": 3}, "promote", "the model folder has 3 MB, 3 times version 3's, within 3"),
    ],
)
def test_a_model_may_cost_so_many_times_what_the_champion_does(ratio, decision, reason):
    """Latency and size are held against the champion's of the same evaluation."""
    verdict = beside(
        challenger=evaluation(latency_p95_ms=2.0, size_bytes=3_000_000),
        champion=evaluation(version=3, latency_p95_ms=1.2, size_bytes=1_000_000),
        **ratio,
    )
    assert (verdict.decision, reason in verdict.reasons) == (decision, True)


def test_a_cost_that_was_not_measured_rejects():
    """Without the champion's latency the ratio is unknown, and without the challenger's too."""
    known, unknown = evaluation(version=3), evaluation(version=3, latency_p95_ms=None)
    assert [beside(challenger=one, champion=other, latency_ratio=9).reasons[0] for one, other in
            ((known, unknown), (unknown, known))] == [
        "latency_p95_ms of version 3 was not produced by the evaluation",
        "latency_p95_ms was not produced by the evaluation",
    ]  # fmt: skip


ODDS = FairnessRule(by="origin", max=0.1)


def treated(value: float | None, **fields) -> Evaluation:
    rates = {group: {"true_positive_rate": 0.5} for group in ("EWR", "JFK")}
    gap = {"by": "origin", "measure": "equalized_odds", "threshold": 0.5, "value": value, "groups": rates}
    return evaluation(gaps=(Gap(**gap | fields),))


@pytest.mark.parametrize(
    ("challenger", "decision", "reason"),
    [
        (treated(0.2), "reject", "equalized_odds by origin: 2 groups at most 0.200 apart, over 0.1"),
        (treated(0.1), "promote", "equalized_odds by origin: 2 groups at most 0.1 apart, within 0.1"),
        (treated(0.0, unjudged={"LGA": 40}), "promote", "equalized_odds by origin: not compared, fewer than 500 rows, or one class only: 1 group (LGA: 40 rows)"),
        (evaluation(), "reject", "equalized_odds by origin was not produced by the evaluation"),
        (treated(0.0, threshold=0.3), "reject", "equalized_odds by origin was not produced by the evaluation"),
        (treated(None), "reject", "equalized_odds by origin was not produced by the evaluation: fewer than 500 rows, or one class only in all groups but one at most"),
    ],
)  # fmt: skip
def test_groups_are_treated_alike_within_a_limit(challenger, decision, reason):
    """A gap past its limit, or one that was not produced, rejects; groups that were not compared are named."""
    verdict = judge(GateRules(primary=PrimaryRule(metric="roc_auc"), fairness=(ODDS,)), GAIN, challenger=challenger)
    assert (verdict.decision, reason in verdict.reasons) == (decision, True), verdict.reasons


# Slices


def sliced(*differences: Difference, groups: tuple[SliceEstimate, ...]) -> Verdict:
    return judge(rules(slices=(BY_CARRIER,)), GAIN, *differences, challenger=evaluation(slices=groups))


def test_a_group_shown_worse_rejects_a_model_that_is_better_on_the_whole():
    """Its sentence names the group and the numbers, and comes first."""
    verdict = sliced(
        change(-0.06, -0.08, -0.04, group="HA"), change(0.02, 0.0, 0.04, group="UA"),
        groups=(group("HA", 0.61), group("UA", 0.7)),
    )  # fmt: skip
    assert verdict == Verdict(
        decision="reject",
        reasons=(
            (
                "carrier HA: roc_auc worse than version 3 by more than 0.03 "
                "(-0.060, interval -0.080 … -0.040, p 0.0032 among 2 slices)"
            ),
            "roc_auc 0.690, not worse than version 3 (+0.011, interval +0.003 … +0.019)",
            "carrier: roc_auc within 0.03 of version 3, or better: 1 group (UA)",
        ),
    )


def test_unclear_and_unjudged_groups_are_named_and_do_not_block():
    """A group too small to tell does not stop a model, nor is it passed over in silence; some say what would tell."""
    small = SliceEstimate(by="carrier", group="YV", rows=38, metric="roc_auc", estimate=None)
    verdict = sliced(
        change(-0.01, -0.04, 0.02, group="HA"), change(0.02, None, None, group="OO"), change(0.02, 0.0, 0.04, group="UA"),
        groups=(group("HA", 0.61), group("OO", 0.6), group("UA", 0.7), small, group("ZZ", None)),
    )  # fmt: skip
    assert verdict == Verdict(
        decision="promote",
        reasons=(
            "roc_auc 0.690, not worse than version 3 (+0.011, interval +0.003 … +0.019)",
            "carrier: roc_auc within 0.03 of version 3, or better: 1 group (UA)",
            (
                "carrier: roc_auc neither shown within 0.03 of version 3 nor shown worse: 2 groups "
                "(HA: about 15 more partitions (920 rows) would tell, OO)"
            ),
            "carrier: roc_auc not judged, fewer than 500 rows: 1 group (YV: 38 rows)",
            "carrier: roc_auc not judged, undefined where all rows are of one class: 1 group (ZZ: 900 rows)",
        ),
    )


def test_many_groups_are_counted_and_five_named():
    """A sentence stays a sentence."""
    names = [f"C{number}" for number in range(7)]
    verdict = sliced(groups=tuple(group(name, None) for name in names))
    assert verdict.reasons[-1].startswith("carrier: roc_auc not judged")
    assert verdict.reasons[-1].endswith("C4: 900 rows …)")


def test_one_of_many_groups_must_be_shown_worse_by_more():
    """A loss that rejects where it is the only slice (p 0.02) is no surprise among five."""
    loss = change(-0.081, -0.131, -0.031, group="C0")
    others = [change(0.0, -0.01, 0.01, group=f"C{place}") for place in range(1, 5)]
    alone = sliced(loss, groups=(group("C0", 0.6),))
    among = sliced(loss, *others, groups=tuple(group(f"C{place}", 0.6) for place in range(5)))
    assert (alone.decision, among.decision) == ("reject", "promote")
    assert "nor shown worse: 1 group (C0" in among.reasons[-1]


def test_groups_of_all_rules_are_tested_together():
    """Two rules of one group each halve the level for the first: the family is the gate, not the rule."""
    by = {name: SliceRule(by=name, metric="roc_auc") for name in ("carrier", "origin")}
    found = [
        change(-0.081, -0.131, -0.031, group="A"),
        change(0.0, -0.01, 0.01, group="A").model_copy(update={"by": "origin"}),
    ]
    groups = [group("A", 0.6), group("A", 0.6).model_copy(update={"by": "origin"})]
    challenger = evaluation(slices=tuple(groups))
    one = judge(rules(slices=(by["carrier"],)), GAIN, found[0], challenger=challenger)
    both = judge(rules(slices=(by["carrier"], by["origin"])), GAIN, *found, challenger=challenger)
    assert (one.decision, both.decision) == ("reject", "promote")


def test_a_slice_without_its_standard_error_rejects():
    """What the correction needs was not produced."""
    bare = change(0.0, -0.01, 0.01, group="AA")
    bare = bare.model_copy(update={"estimate": bare.estimate.model_copy(update={"error": None})})
    verdict = sliced(bare, groups=(group("AA", 0.7),))
    assert (
        verdict.reasons[0]
        == "the standard error of the difference in roc_auc for carrier AA was not produced by the evaluation"
    )


def test_slices_need_no_champion_but_must_be_there():
    """The first model's groups are compared with nothing, which is said once, of the whole."""
    verdict = alone(rules(slices=(BY_CARRIER,)), evaluation(slices=(group("AA", 0.7),)))
    assert verdict == Verdict(decision="promote", reasons=("roc_auc 0.690, no champion to compare with",))


# The verdict as a whole


def test_the_gravest_finding_decides_and_comes_first():
    """All objections are given, the oldest law first, then what would have waited, then what spoke for it."""
    verdict = judge(
        rules(min=0.7, latency=1), change(-0.1, -0.2, 0.1), as_of=MARCH, champion_as_of=APRIL
    )  # fmt: skip
    assert verdict.reasons == (
        "as of 2013-03-01, earlier than version 3 (2013-04-01): time only moves forward",
        "roc_auc 0.690 is below 0.7",
        "one row takes 1.2 ms at the 95th percentile, over 1 ms",
        "roc_auc 0.690, not shown to be within 0.01 of version 3 (-0.100, interval -0.200 … +0.100)",
        "roc_auc: about 21 more partitions (1 300 rows) would tell, were the figures to stay",
    )


def test_a_champion_without_version_is_called_the_champion():
    """No `version None` in a sentence."""
    verdict = judge(rules(), GAIN, champion=evaluation(0.679))
    assert verdict.reasons == ("roc_auc 0.690, not worse than the champion (+0.011, interval +0.003 … +0.019)",)


BOUND = st.one_of(st.none(), st.floats(-1, 1, allow_nan=False))


@settings(max_examples=150)
@given(
    figure=st.one_of(st.none(), st.floats()),
    floor=st.one_of(st.none(), st.floats(0, 1)),
    difference=st.one_of(st.none(), st.builds(change, st.floats(), BOUND, BOUND)),
    champion=st.booleans(),
    earlier=st.booleans(),
    test=st.sampled_from(["non_inferior", "superior"]),
    margin=st.floats(0, 0.1),
)
def test_promotion_needs_every_law(*, figure, floor, difference, champion, earlier, test, margin):
    """Whatever is handed in: a verdict with a headline; the same again; and `promote` only where every rule was met."""
    gate = rules(min=floor, test=test, margin=margin)
    challenger = evaluation(figure)
    asked = {
        "challenger": challenger,
        "champion": evaluation(0.68, version=3) if champion else None,
        "champion_as_of": (APRIL + timedelta(days=1) if earlier else MARCH) if champion else None,
    }
    differences = () if difference is None else (difference,)
    before = gate.model_dump_json(), challenger.model_dump_json()
    verdict = judge(gate, *differences, **asked)
    assert verdict.reasons[0]
    assert verdict == judge(gate, *differences, **asked)
    assert before == (gate.model_dump_json(), challenger.model_dump_json())
    if verdict.decision == "promote":
        assert figure is not None
        assert floor is None or figure >= floor
        if champion:
            assert not earlier
            floor = 0 if test == "superior" else -margin
            assert difference.estimate.low >= floor or (test != "superior" and difference.estimate.value >= floor)


def test_the_policy_hash_changes_with_the_rules():
    """Equal rules, equal hash; another margin, another hash."""
    assert policy_hash(rules()) == policy_hash(rules())
    assert policy_hash(rules()) != policy_hash(rules(margin=0.02))
