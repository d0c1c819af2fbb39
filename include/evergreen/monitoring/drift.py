"""Drift: two profiles and the pack's rules in, what moved and by how much out; then what kind of change it is. Pure.

What is measured, per column, from sketches alone. p and q are the shares of reference and window in the same bins,
n and m their known rows; the bins are the reference's deciles, or its values (the rare ones together):

    PSI           Σ (q - p) ln(q / p), less its bias: Jeffreys (1946); Siddiqi, "Credit Risk Scorecards", 2006. Half a
                  row is added to each bin (Jeffreys' prior), so that an empty one is finite.
    JS            √ of the mean of KL(p ‖ h) and KL(q ‖ h) in bits, h = (p + q) / 2: 0 … 1. Endres, Schindelin, "A new
                  metric for probability distributions", IEEE Transactions on Information Theory 49(7), 2003
    Wasserstein   mean |Q(u) - P(u)| of the quantile functions, in standard deviations of the reference
    missing       share of rows without a finite value
    new           share of rows whose category the reference never saw, less what it had to expect of names not yet
                  seen: its share of names seen once. Good, "The population frequencies of species", Biometrika 40, 1953
    outside, far  share of rows beyond the reference's range; beyond it by half its width
    sentinel      share of rows that hold -1 or ±99…9 out there, with nothing near it: a mark for no value
    scale         how many times as wide the window's middle nine tenths are

Of the classes of a multiclass target, where labels have arrived: the share of rows of classes that the champion does not
know, and the known classes without a row. Both must be past chance, by the conditional test of two Poisson rates
(Przyborowski, Wilenski, "Homogeneity of results in testing samples from Poisson series", Biometrika 31, 1940): if a class
comes at the same rate among n and among m rows, and has x rows in both together, then k of them are among the m, with
k ~ Binomial(x, m / (n + m)). So, with n rows of the reference and m of the window, chance alone has the probability

    (n / (n + m))^x      of no row of a class that has x rows in the reference
    P(k ≥ u), x = u + s  of u rows of unknown classes; s is the number of classes with one row in the reference, which
                         is what Good (1953) expects of classes that were not seen

Of the champion, where labels have arrived: by how much what it leans on has moved, ½ Σ |b - a| over the columns' shares
of importance (`run.Importance`) on the hold-out, a, and on the window, b; the total variation of two profiles: 0 … 1.

Chance. Where nothing changed, PSI is about (1/n + 1/m) χ² with bins - 1 degrees of freedom: a bias of
(bins - 1)(1/n + 1/m), and a noise that small windows are full of (Yurdakul, Naranjo, "Statistical properties of the
population stability index", Journal of Risk Model Validation 14(4), 2020). The bias is subtracted, and a violation is
past the pack's threshold *and* past what chance leaves at `NOMINAL` over all that is tested in a window together
(Bonferroni). So is every share. The threshold is an effect size: in large windows it alone decides.

Each share of importance has a standard error on both sides, s² = s_a² + s_b²: of ½ Σ |b - a| chance alone makes ½ Σ s
√(2/π), the mean of half-normal distances, which is subtracted, with a variance of ¼ Σ s² (1 - 2/π); how far that
reaches is told by the gamma distribution of this mean and variance.

Rows of one hour share its weather, and days differ: chance reaches further than that. So what is usual may be handed in:
windows from the reference's own time beside the reference. A move is past the furthest of them, too, and missing values
count from the most of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from functools import cached_property
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, Literal

from pydantic import model_validator

from evergreen.pack import Data, DriftRules
from evergreen.run import Class, Estimate, Importance, Value, Window, count

if TYPE_CHECKING:
    from evergreen.monitoring.profiles import ColumnProfile, Floats, Profile

NOMINAL = 0.01
"""How often a window in which nothing changed may violate any rule on a distribution."""

BINS = 10
EXPECTED = 5
"""A bin that expects fewer rows than these is no bin of its own (Cochran, Biometrics 10(4), 1954)."""

MISSING = 0.1
"""A rise of missing values by this share of all rows is a fault, but in a column that was mostly empty: it speaks by
being empty."""
NEW = 0.05
"""This share of categories never seen before counts as a move."""
FAR = 0.05
"""This share of values far beyond the reference's range is a fault."""
SENTINEL = 0.01
"""This share of rows that hold a mark for no value is a fault."""
SENTINELS = frozenset({-1.0, *(sign * (10.0**digits - 1) for digits in range(2, 10) for sign in (1, -1))})
APART = 0.1
"""A mark is as far as this share of the reference's range from it and from all other values, or farther."""
SCALE = 1.4
"""The same shape at so many times the scale is another unit; where values lie on both sides of zero, so that the scale
alone speaks, `SCALE_AROUND_ZERO` times."""
SCALE_AROUND_ZERO = 5.0
RENAMED = 0.05
"""A category of at least this share that vanishes as another of its size appears has been renamed."""
CLASS = 0.01
"""This share of rows of unknown classes counts, and the loss of a known class that had this share. What rarer classes
cost is for the rule on performance."""
CLASSES = 5
"""Most classes that are named: those with the largest share."""
CLASS_NAME = 40
"""Most characters of a class that are quoted."""
NEW_CLASS = "new class"
"""The measure of unknown classes."""
PACE = 0.1
"""Rows arriving at less than this of the reference's pace are a source that stopped."""
PREDICTIONS = "the predictions"
"""What a sentence calls them."""
LEANINGS = 3
"""Columns that are named where what the champion leans on has moved."""
EVIDENCE = 50
"""Most violations that an alert carries, the gravest first: an inbox takes 64 KiB."""

Role = Literal["feature", "target", "prediction"]
Kind = Literal["data fault", "seasonal", "withstood", "shift", "quiet"]

ACTIONS: dict[Kind, str] = {
    "data fault": "a person looks; no retraining",
    "seasonal": "hold",
    "withstood": "watch",
    "shift": "alert",
    "quiet": "nothing",
}


class Performance(Value):
    """The champion's figure when it was promoted, and on the window whose labels have arrived."""

    metric: str
    reference: Estimate
    window: Estimate
    less_is_better: bool = False
    chance: float | None = None
    """What a model that knows nothing scores: 0.5 for ROC-AUC; None where that is no fixed figure."""

    @property
    def drop(self) -> Estimate:
        """By how much it is worse now, with the interval of a difference of two independent figures.

        Bounds by the method of variance estimates recovery (Zou, Donner, Statistics in Medicine 27(10), 2008); none
        where a figure has none.
        """
        value = self.reference.value - self.window.value
        before, now = _reach(self.reference), _reach(self.window)
        if self.less_is_better:
            value, before, now = -value, now, before
        if before is None or now is None:
            return Estimate(value=value)
        low, high = value - math.hypot(before[0], now[1]), value + math.hypot(before[1], now[0])
        return Estimate(value=value, low=low, high=high)


def _reach(estimate: Estimate) -> tuple[float, float] | None:
    """How far the interval reaches below and above the value; None where there is none."""
    if estimate.low is None or estimate.high is None:
        return None
    return estimate.value - estimate.low, estimate.high - estimate.value


class Leaning(Value):
    """One column's share of what the champion leans on: below zero where it would do better without."""

    column: str
    before: float
    """On the hold-out of its making."""
    now: float


class ImportanceShift(Value):
    """By how much what the champion leans on has moved."""

    shift: float
    """0 … 1, less its bias; never below zero."""
    noise: float | None
    """What chance alone may leave of `shift`; None where that cannot be told: then it violates nothing."""
    columns: tuple[Leaning, ...]
    """What moved furthest first."""


class ClassShare(Value):
    """A class and its share of rows."""

    name: Class
    share: float

    def __str__(self) -> str:
        return f"{_quoted(self.name)} in {self.share:.1%}"


class ClassDrift(Value):
    """The classes of the window's rows with labels, beside those that the champion knows."""

    rows: int
    """With labels."""
    unknown: float
    """Share of rows of classes that the champion does not know."""
    new: tuple[ClassShare, ...]
    """The largest of those classes, at most `CLASSES`."""
    absent: tuple[Class, ...]
    """Known classes without a row."""

    def __str__(self) -> str:
        parts = []
        if self.unknown:
            parts.append(
                f"{self.unknown:.1%} of {count(self.rows, 'row')} are of classes that the champion does not know: "
                f"{', '.join(map(str, self.new))}"
            )
        if self.absent:
            more = f" and {len(self.absent) - CLASSES} more" if len(self.absent) > CLASSES else ""
            parts.append(f"no row is of {', '.join(map(_quoted, self.absent[:CLASSES]))}{more}")
        return "; ".join(parts) or "the champion knows every class, and every class that it knows is there"


class Finding(Value):
    """A rule that a window violates."""

    kind: Literal["fault", "feature", "target", "classes", "prediction", "performance", "importance"]
    column: str | None
    """None where it is about the window as a whole, or the model, its predictions among it."""
    measure: str
    """`psi`, `new`, `drop`, `shift`; of classes `new class`, or `gone 'shipping'`; of a fault `missing`, `range`, `sentinel`, `unit`, `renamed`, `type`, `gone`, `rows`, `stale`
    or `labels`."""
    value: float
    limit: float
    sentence: str

    @property
    def rule(self) -> tuple[str, str | None, str]:
        """What it violates: the same in every window that does."""
        return self.kind, self.column, self.measure


class ColumnDrift(Value):
    """One column of the window beside the reference. None: it has no such measure, or too few rows to say."""

    name: str
    role: Role
    kind: str
    rows: int
    """With a value."""
    psi: float | None = None
    """Less its bias; never below zero."""
    noise: float | None = None
    """What chance alone may leave of `psi`."""
    usual: float | None = None
    """The largest `psi` of windows from the reference's own time; None where none was handed in."""
    js: float | None = None
    wasserstein: float | None = None
    missing: float
    missing_before: float
    """Of the reference; or of the window within its time that missed most."""
    new: float | None = None
    outside: float | None = None
    far: float | None = None
    sentinel: float | None = None
    scale: float | None = None


class Drift(Value):
    """A window beside the reference: what was measured, and what it violates."""

    start: datetime
    end: datetime
    rows: int
    reference_start: datetime
    reference_end: datetime
    reference_rows: int
    columns: tuple[ColumnDrift, ...]
    predictions: ColumnDrift | None = None
    """Of the champion; None where either side has none."""
    added: tuple[str, ...] = ()
    """Columns that the reference does not have; they are not compared."""
    model_age_days: float
    """From the end of the reference to the end of the window."""
    newest_row_days: float | None
    """How long before the end of the window its newest row is; None where that is not known."""
    performance: Performance | None = None
    classes: ClassDrift | None = None
    """Of a multiclass target, where labels have arrived."""
    importance: ImportanceShift | None = None
    importance_note: str | None = None
    """Why importance is not known here, or not of every column."""
    violated: tuple[Finding, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _predictions_among_the_columns(cls, content: Any) -> Any:
        """Read what was stored when predictions were a column that was called `prediction`: its role tells it."""
        if not isinstance(content, dict) or "predictions" in content:
            return content
        columns = list(content.get("columns", ()))
        mine = [each for each in columns if isinstance(each, dict) and each.get("role") == "prediction"]
        if not mine:
            return content
        violated = [
            {**each, "column": None} if each.get("kind") == "prediction" else each
            for each in content.get("violated", ())
        ]
        kept = [each for each in columns if each not in mine]
        return {**content, "columns": kept, "predictions": mine[0], "violated": violated}

    @cached_property
    def by_name(self) -> dict[str, ColumnDrift]:
        """The columns by their names."""
        return {each.name: each for each in self.columns}

    @cached_property
    def rules(self) -> frozenset[tuple[str, str | None, str]]:
        """The rules that this window violates."""
        return frozenset(each.rule for each in self.violated)


class Freshness(Value):
    """What newer rows are worth (`evaluation/freshness.py`)."""

    metric: str
    gain: Estimate
    """Of a stand-in, by learning from `now` in place of `before`, on the rows of `judged`."""
    parts: tuple[float | None, ...] = ()
    """The same on runs of days of `judged`, in order of time, as many as the pack looks at windows; None: it is undefined.

    Of a look that was taken before it was asked, none.
    """
    rows: int
    """Of `judged`, with labels."""
    judged: Window
    before: Window
    """The champion's."""
    now: Window

    def __str__(self) -> str:
        gain = self.gain
        interval = "" if gain.low is None else f" ({gain.low:+.3f} … {gain.high:+.3f})"
        return (
            f"a stand-in that learns from the rows until {self.now.end:%Y-%m-%d} in place of those until "
            f"{self.before.end:%Y-%m-%d} gains {gain.value:+.3f} of {self.metric}{interval} on the "
            f"{count(self.rows, 'row')} since"
        )

    def exceeds(self, rules: DriftRules) -> bool:
        """Whether it is past the pack's rule, shown not to be chance, and, like any move, seen more than once."""
        past = rules.freshness is not None and self.gain.value > rules.freshness.gain
        shown = self.gain.low is not None and self.gain.low > 0
        return past and shown and self._confirmed(rules)

    def falls_short(self, rules: DriftRules) -> bool:
        """Whether it is shown not to be past the pack's rule; else too few rows may be why it is not shown to be."""
        return rules.freshness is not None and self.gain.high is not None and self.gain.high <= rules.freshness.gain

    def seen(self, rules: DriftRules) -> list[bool]:
        """In which parts of the time it is past the rule."""
        least = math.inf if rules.freshness is None else rules.freshness.gain
        return [each is not None and each > least for each in self.parts]

    def _confirmed(self, rules: DriftRules) -> bool:
        seen = self.seen(rules)
        return bool(seen) and seen[-1] and sum(seen) >= min(rules.seen, len(seen))


class Triage(Value):
    """What kind of change the newest windows show, and why."""

    kind: Kind
    reasons: tuple[str, ...]
    """In plain words; the first is the headline."""
    evidence: dict[str, Any]
    """What an alert carries: the newest window, and what it violates."""

    @property
    def action(self) -> str:
        """What follows from the kind."""
        return ACTIONS[self.kind]


def compare(
    reference: Profile,
    window: Profile,
    rules: DriftRules,
    data: Data,
    *,
    usual: Sequence[Drift] = (),
    performance: Performance | None = None,
    classes: Sequence[Class] | None = None,
    importance: tuple[Sequence[Importance], Sequence[Importance]] = ((), ()),
    importance_note: str | None = None,
) -> Drift:
    """The window beside the reference, by the pack's rules.

    Both hold the pack's columns, the predictions, and the target where its labels have arrived. `usual`: windows of this
    length from the reference's own time, beside the reference. `performance`: the champion's figures, where labels have
    arrived; `classes`: of a multiclass target, those that the champion knows; `importance`: of its columns, on its
    hold-out and on the window, and why it is not known.
    """
    pairs = [(before, window.columns[name]) for name, before in reference.columns.items() if name in window.columns]
    predictions = None
    tested = len(pairs) + (reference.predictions is not None and window.predictions is not None)
    # Of each column psi, missing, and new or far; of the window its rows; importance; unknown classes, and each known one.
    chance = NOMINAL / (3 * tested + 2 + (1 + len(classes) if classes else 0))
    columns: list[ColumnDrift] = []
    findings = [*_arrival(reference, window, data, chance)]
    for before, now in pairs:
        role: Role = "target" if now.name == data.target else "feature"
        earlier = [each.by_name[now.name] for each in usual if now.name in each.by_name]
        column = _column(before, now, role, chance, earlier)
        columns.append(column)
        names = column.role == "target" and data.task == "multiclass"
        findings += _violations(before, now, column, rules, chance, names=names)
    if reference.predictions is not None and window.predictions is not None:
        earlier = [each.predictions for each in usual if each.predictions is not None]
        predictions = _column(reference.predictions, window.predictions, "prediction", chance, earlier)
        findings += _moved_predictions(predictions, rules.prediction.psi)
    gone = [name for name in reference.columns if name not in window.columns and name != data.target]
    findings += [_fault(name, "gone", 1, 0, f"{name} is gone: the window has no such column") for name in gone]
    if performance is not None:
        findings += _performance(performance, rules)
    target = next(((before, now) for before, now in pairs if now.name == data.target), None)
    known = _class_drift(target[1], classes) if target and classes else None
    if target and known:
        findings += _classes(known, *target, usual, chance)
    shift = _shift(*importance, chance)
    if shift is not None:
        findings += _importance(shift, rules)
    order = ("fault", "performance", "classes", "target", "prediction", "importance", "feature")
    findings.sort(key=lambda each: (order.index(each.kind), -each.value / (each.limit or 1)))
    return Drift(
        start=window.start,
        end=window.end,
        rows=window.rows,
        reference_start=reference.start,
        reference_end=reference.end,
        reference_rows=reference.rows,
        columns=tuple(columns),
        predictions=predictions,
        added=tuple(name for name in window.columns if name not in reference.columns),
        model_age_days=_days(reference.end, window.end),
        newest_row_days=_silence(window, data),
        performance=performance,
        classes=known,
        importance=shift,
        importance_note=importance_note,
        violated=tuple(findings),
    )


def triage(
    history: Sequence[Drift], rules: DriftRules, season: Drift | None = None, fresh: Freshness | None = None
) -> Triage:
    """What kind of change the newest windows show, oldest first, all against the same champion.

    `season`: the newest window beside the same season before, where the history has it; `fresh`: what newer rows are
    worth, where that is asked and can be said. A move is confirmed where the
    newest window and M of the newest N show it in the same column; a drop, a new or vanished class, or that the champion
    leans on other columns than it did (importance), where those with labels do. Of a window with a fault, only the fault
    counts. The first line that holds decides:

        data fault   the newest window has a fault: nulls, types, renamed categories, a unit, values far out of range, a
                     source that stopped, labels turned round. A unit or a range that got there by steps is a move
        shift        performance has dropped, or newer rows are worth more than the pack's rule, whatever else moved; or
                     the target has classes that the champion does not know, or has lost one of those it knows
        quiet        no move is confirmed, nor that importance moved
        seasonal     columns moved, or a class was lost, and the target and they are as in the same season before
        shift        the target moved and the predictions did not move with it, if what newer rows are worth is not said
        withstood    the windows that moved and have labels show on average no drop past the pack's rule, proven or not;
                     or newer rows are worth too little, or not shown to be worth enough
        shift        importance moved; by the line above, with a drop that is not proven
        shift        no such labels yet, and the predictions moved, or there are none
        withstood    no such labels yet, and the predictions did not move
    """
    if not history:
        return Triage(kind="quiet", reasons=("no window has been looked at yet",), evidence={})
    newest = history[-1]
    faults = _faults(history)
    sound = [each for place, each in enumerate(history, 1) if not _faults(history[:place])]
    recent = sound[-rules.of :]
    labelled = [each for each in sound if each.performance is not None][-rules.of :]
    moves = [each for each in newest.violated if each.kind in ("feature", "target", "prediction")]
    judged = labelled[-1].violated if labelled else ()
    drops = [each for each in judged if each.kind == "performance"]
    leanings = [each for each in judged if each.kind == "importance"]
    moved = [each for each in moves if _seen(recent, each) >= rules.seen]
    dropped = [each for each in drops if _seen(labelled, each) >= rules.seen]
    named = [each for each in sound if each.classes is not None][-rules.of :]
    renewed, expected, unsure = _other_classes(named, rules, season)
    leant = [each for each in leanings if _seen(labelled, each) >= rules.seen]
    names = {each.column or PREDICTIONS for each in (*moved, *expected)}
    predictions_moved = any(each.kind == "prediction" for each in moved)
    told = [
        each.performance
        for each in (labelled if leant else recent)
        if each.performance and any(move.rule in each.rules for move in (*moved, *leant))
    ]
    held = told and sum(each.drop.value for each in told) / len(told) <= rules.performance.drop
    unconfirmed = [
        *((named, each) for each in unsure),
        *((recent, each) for each in moves if _seen(recent, each) < rules.seen),
        *((labelled, each) for each in (*drops, *leanings) if _seen(labelled, each) < rules.seen),
    ]

    better, worse = _worth(fresh, rules)

    what = _named(names) or "what the champion leans on"

    kind: Kind
    if faults:
        kind, head = "data fault", [each.sentence for each in faults]
        moved, leant, expected, unconfirmed = [], [], [], []
    elif dropped or better or renewed:
        kind, head = "shift", [_in_windows(labelled, each) for each in dropped]
        head += [*(_in_windows(named, each) for each in renewed), *better]
    elif not moved and not leant and not expected:
        kind, head = "quiet", ["nothing moved further than the pack allows"] if not unconfirmed else []
    elif (moved or expected) and season is not None and not any(each.rule in season.rules for each in moved):
        kind, head = "seasonal", [f"{_named(names)} moved, as in the same season before, {_span(season)}"]
    elif any(each.kind == "target" for each in moved) and not predictions_moved and not worse:
        kind, head = "shift", ["the target moved, and the predictions did not move with it"]
    elif held or worse:
        known = fresh is not None and fresh.falls_short(rules)
        promise = "promise no better model" if known else "are not shown to make a better model"
        why = f"performance held: {_figure(told[-1])}" if held else f"newer rows {promise}"
        kind, head = "withstood", [f"{what} moved, and {why}"]
    elif leant:
        kind, head = "shift", [f"{what} moved, and performance may have dropped: {_figure(told[-1])}"]
    elif predictions_moved or newest.predictions is None:
        what = "the predictions moved" if newest.predictions else f"{what} moved, with no predictions to look at"
        labels = (
            f"performance may have dropped: {_figure(told[-1])}"
            if told
            else "no labels say that the model withstands it"
        )
        kind, head = "shift", [f"{what}, and {labels}"]
    else:
        kind, head = "withstood", [f"{what} moved, and the predictions did not"]
    reasons = [
        *head,
        *(_in_windows(recent, each) for each in moved),
        *(_in_windows(named, each) for each in expected),
        *(_in_windows(labelled, each) for each in leant),
        *(f"{_in_windows(seen, each)}: not confirmed, that takes {rules.violated}" for seen, each in unconfirmed),
        *(
            f"{each.sentence}: it got there by steps, so it is no fault"
            for each in newest.violated
            if each.kind == "fault" and each not in faults
        ),
        *(() if faults else worse),
        *(each.importance_note for each in labelled[-1:] if each.importance_note is not None),
    ]
    return Triage(kind=kind, reasons=tuple(reasons), evidence=_evidence(recent, newest, season, fresh))


def _worth(fresh: Freshness | None, rules: DriftRules) -> tuple[list[str], list[str]]:
    """What newer rows are worth, in words: enough to train for, or not."""
    if fresh is None or rules.freshness is None:
        return [], []
    seen = fresh.seen(rules)
    parts = (
        f", more than {rules.freshness.gain:g} in {sum(seen)} of {len(seen)} parts of that time"
        if len(seen) > 1
        else ""
    )
    if fresh.exceeds(rules):
        return [f"newer rows would make a better model: {fresh}{parts}"], []
    known = "not enough" if fresh.falls_short(rules) else "not shown to be enough"
    return [], [f"{fresh}{parts}: {known} to train for"]


def _faults(history: Sequence[Drift]) -> list[Finding]:
    """The faults of the newest window: what came at once. What got there by steps is a move.

    A unit that changes does so from one window to the next, and so do values that leave their range by a fault; growth
    and seasons are seen coming.
    """
    return [each for each in history[-1].violated if each.kind == "fault" and _at_once(history, each)]


def _at_once(history: Sequence[Drift], fault: Finding) -> bool:
    without = [place for place, each in enumerate(history) if fault.rule not in each.rules]
    if fault.measure not in ("unit", "range") or not without:
        return True
    readings = [_reading(each, fault.column) for each in history]
    if fault.measure == "range":
        before = [each for place in without if (each := readings[place]) is not None]
        return all((each.outside or 0.0) <= FAR for each in before)
    last, first = readings[without[-1]], readings[without[-1] + 1]
    if last is None or first is None or not last.scale or not first.scale:
        return True
    return abs(math.log(first.scale / last.scale)) >= math.log(SCALE)


def _reading(window: Drift, column: str | None) -> ColumnDrift | None:
    return None if column is None else window.by_name.get(column)


def _seen(windows: Sequence[Drift], finding: Finding) -> int:
    return sum(finding.rule in each.rules for each in windows)


def _other_classes(
    windows: Sequence[Drift], rules: DriftRules, season: Drift | None
) -> tuple[list[Finding], list[Finding], list[Finding]]:
    """New and vanished classes: confirmed; confirmed, and expected of the season; not confirmed.

    `windows`: those with labels, the oldest first. A new class is never expected: the champion is wrong on it all the same.
    """
    newest = [each for each in (windows[-1].violated if windows else ()) if each.kind == "classes"]
    confirmed = [each for each in newest if _seen(windows, each) >= rules.seen]
    expected = [each for each in confirmed if each.measure != NEW_CLASS and _has_same_target(season)]
    return (
        [each for each in confirmed if each not in expected],
        expected,
        [each for each in newest if each not in confirmed],
    )


def _has_same_target(season: Drift | None) -> bool:
    """Whether the target is known to be as it was in the same season before."""
    if season is None or not any(each.role == "target" and each.psi is not None for each in season.columns):
        return False
    return not any(each.kind == "target" for each in season.violated)


def _in_windows(windows: Sequence[Drift], finding: Finding) -> str:
    often = f", in {_seen(windows, finding)} of the newest {len(windows)} windows" if len(windows) > 1 else ""
    return finding.sentence + often


def _figure(performance: Performance) -> str:
    return f"{performance.metric} {performance.window.value:.3f}, {performance.reference.value:.3f} at promotion"


def _named(columns: set[str]) -> str:
    names = sorted(columns)
    return f"{', '.join(names[:5])} and {len(names) - 5} more" if len(names) > 5 else ", ".join(names)


def _span(season: Drift) -> str:
    return f"{season.reference_start:%Y-%m-%d} … {season.reference_end:%Y-%m-%d}"


def _evidence(recent: Sequence[Drift], newest: Drift, season: Drift | None, fresh: Freshness | None) -> dict[str, Any]:
    """What an alert carries: plain JSON."""
    evidence: dict[str, Any] = {
        "window": {"start": newest.start.isoformat(), "end": newest.end.isoformat(), "rows": newest.rows},
        "reference": {"start": newest.reference_start.isoformat(), "end": newest.reference_end.isoformat()},
        "violations": len(newest.violated),
        "violated": [each.model_dump(mode="json", exclude={"sentence"}) for each in newest.violated[:EVIDENCE]],
        "windows": [
            {
                "end": each.end.isoformat(),
                "violated": sorted({found.column or found.kind for found in each.violated[:EVIDENCE]}),
            }
            for each in recent
        ],
    }
    if fresh is not None:
        evidence["freshness"] = fresh.model_dump(mode="json")
    if newest.performance is not None:
        evidence["performance"] = newest.performance.model_dump(mode="json")
    if newest.classes is not None:
        classes = newest.classes
        cut = classes.model_copy(update={"absent": classes.absent[:CLASSES]})
        evidence["classes"] = cut.model_dump(mode="json")
    if newest.importance is not None:
        shift = newest.importance
        evidence["importance"] = shift.model_copy(update={"columns": shift.columns[:LEANINGS]}).model_dump(mode="json")
    if season is not None:
        evidence["season"] = {"start": season.reference_start.isoformat(), "end": season.reference_end.isoformat()}
    return evidence


def _column(
    reference: ColumnProfile, window: ColumnProfile, role: Role, chance: float, earlier: Sequence[ColumnDrift]
) -> ColumnDrift:
    """Every measure of one column; `earlier`: the same of windows from the reference's own time."""
    found: dict[str, float | None] = {}
    if reference.kind == window.kind and reference.seen and window.seen:
        if (bins := _bins(reference, window)) is not None:
            found["psi"], found["noise"] = _psi(*bins, reference.seen, window.seen, chance)
            found["usual"] = max((each.psi for each in earlier if each.psi is not None), default=None)
            found["js"] = _js(*bins)
        if window.kind == "number":
            found |= _numbers(reference, window)
        elif window.kind == "category":
            found["new"] = _new(reference, window)
    return ColumnDrift(
        name=window.name,
        role=role,
        kind=window.kind,
        rows=window.seen,
        missing=_missing(window),
        missing_before=max(_missing(reference), *(each.missing for each in earlier), 0.0),
        **{name: _short(value) for name, value in found.items() if value is not None and math.isfinite(value)},
    )


def _missing(column: ColumnProfile) -> float:
    return _short(1 - column.seen / column.rows) if column.rows else 0.0


def _bins(reference: ColumnProfile, window: ColumnProfile) -> tuple[Floats, Floats] | None:
    """The shares of both in the same bins, all expecting `EXPECTED` rows or more; None for times and for too few rows."""
    import numpy as np

    rows = min(reference.seen, window.seen)
    many = min(BINS, rows // EXPECTED)
    if many < 2 or window.kind == "time":  # times move on by nature
        return None
    if window.kind == "number":
        edges = np.unique(reference.quantiles(np.arange(1, many) / many))
        if edges[0] == reference.minimum:  # a value below the one that fills the first bin is another bin
            edges = np.insert(edges, 0, _below(edges[0]))
        p, q = (np.diff(each.cdf(edges), prepend=0.0, append=1.0) for each in (reference, window))
    else:
        known, now = reference.shares(), window.shares()
        names = [name for name, share in known.items() if share * rows >= EXPECTED]
        p, q = (np.array([each.get(name, 0.0) for name in names]) for each in (known, now))
        p, q = (np.append(each, max(0.0, 1 - each.sum())) for each in (p, q))
    there = p + q > 1e-9  # what adding up leaves over is no bin
    return p[there], q[there]


def _psi(p: Floats, q: Floats, n: int, m: int, chance: float) -> tuple[float, float]:
    """PSI less its bias, never below zero; and what is left of it by no more than `chance` where nothing changed."""
    import numpy as np
    from scipy.special import chdtri  # scipy.stats would cost 0.7 s of import

    free = len(p) - 1
    if not free:
        return 0.0, 0.0
    p, q = ((each * rows + 0.5) / (rows + len(p) / 2) for each, rows in ((p, n), (q, m)))
    unit = 1 / n + 1 / m
    psi = float(np.sum((q - p) * np.log(q / p)))
    return max(0.0, psi - free * unit), (float(chdtri(free, chance)) - free) * unit


def _js(p: Floats, q: Floats) -> float:
    """Jensen-Shannon distance, 0 … 1."""
    import numpy as np

    half = (p + q) / 2
    parts = [each[each > 0] * np.log2(each[each > 0] / half[each > 0]) for each in (p, q)]
    return float(np.sqrt(max(0.0, sum(part.sum() for part in parts) / 2)))


def _numbers(reference: ColumnProfile, window: ColumnProfile) -> dict[str, float | None]:
    """What only numbers have: Wasserstein, outside, far, scale."""
    import numpy as np

    low, high = reference.values[[0, -1]].tolist()
    least, most = window.values[[0, -1]].tolist()
    at = (np.arange(200) + 0.5) / 200
    with np.errstate(over="ignore"):  # values near the end of what a float holds: no measure
        moved = float(np.mean(np.abs(window.quantiles(at) - reference.quantiles(at))))
    slack = (high - low) / 2
    ends = ((least, window.values[1:2]), (most, window.values[-2:-1]))
    room = APART * (high - low)
    marks = [
        end
        for end, nearest in ends
        if end in SENTINELS and not low - room < end < high + room and np.all(abs(end - nearest) >= room)
    ]
    before, now = _width(reference), _width(window)
    return {
        "wasserstein": moved / reference.spread if reference.spread else None,
        "outside": _outside(window, low, high),
        "far": _outside(window, low - slack, high + slack),
        "sentinel": sum(_heap(window, mark) for mark in marks),
        "scale": now / before if before else None,
    }


def _below(value: float) -> float:
    """The next value below: beyond the least that a float holds, that is minus infinity."""
    import numpy as np

    with np.errstate(over="ignore"):
        return float(np.nextafter(value, -np.inf))


def _outside(column: ColumnProfile, low: float, high: float) -> float:
    """The share of values below `low` or above `high`."""
    below, within = column.cdf([_below(low), high])
    return float(below + 1 - within)


def _heap(column: ColumnProfile, value: float) -> float:
    """The share of values that are `value`."""
    below, through = column.cdf([_below(value), value])
    return float(through - below)


def _width(column: ColumnProfile) -> float:
    low, high = column.quantiles([0.05, 0.95])
    return float(high - low)


def _new(reference: ColumnProfile, window: ColumnProfile) -> float:
    """The share of the window's categories that the reference never saw, past what it had to expect."""
    known = reference.shares()
    unseen = sum(share for name, share in window.shares().items() if name not in known)
    once = sum(share for share in known.values() if share * reference.seen < 1.5)
    return max(0.0, unseen - reference.rest - once)


def _rows_by_class(column: ColumnProfile) -> dict[Class, int] | None:
    """Rows by class, of those that the profile keeps (see `_kept`); None of so many numbers that some stand for others."""
    if column.kind == "number":
        if column.slack:
            return None
        numbers = [int(each) if each.is_integer() else each for each in column.values.tolist()]
        return dict(zip(numbers, column.weights.tolist(), strict=True))
    names = zip(column.names, column.weights.tolist(), strict=False)
    return {each == "true" if column.kind == "boolean" else each: rows for each, rows in names}


def _kept(name: Class) -> Class:
    """The class as a profile keeps it: a long text is cut, and a number is a float."""
    from evergreen.monitoring.profiles import kept_name

    return kept_name(name) if isinstance(name, str) else float(name)


def _class_drift(window: ColumnProfile, classes: Sequence[Class]) -> ClassDrift | None:
    """The window's classes beside those that the champion knows; None without labels."""
    rows = _rows_by_class(window)
    if not rows:
        return None
    known = {_kept(each): each for each in classes}
    new = sorted(((each, many) for each, many in rows.items() if each not in known), key=lambda one: -one[1])
    kept_all = sum(rows.values()) == window.seen
    return ClassDrift(
        rows=window.seen,
        unknown=_short(sum(many for _, many in new) / window.seen),
        new=tuple(ClassShare(name=each, share=_short(many / window.seen)) for each, many in new[:CLASSES]),
        absent=tuple(name for each, name in known.items() if each not in rows) if kept_all else (),
    )


def _classes(
    found: ClassDrift, reference: ColumnProfile, window: ColumnProfile, usual: Sequence[Drift], chance: float
) -> Iterator[Finding]:
    """The classes that are new to the champion together, and each that has vanished, past `chance` as the module says.

    A class that had no row in a window of the reference's own time has not vanished; nor has one whose labels may still
    come.
    """
    from scipy.special import bdtrc  # scipy.stats would cost 0.7 s of import

    known = _rows_by_class(reference)
    if known is None:
        return
    n, m, target = reference.seen, window.seen, window.name
    of_window = m / (n + m)
    unknown = round(found.unknown * m)
    unseen = sum(rows == 1 for rows in known.values()) + n - sum(known.values())
    if found.unknown >= CLASS and bdtrc(unknown - 1, unknown + unseen, of_window) < chance:
        sentence = f"{target} has classes that the champion does not know in {found.unknown:.1%} of rows: "
        sentence += ", ".join(map(str, found.new))
        yield Finding(
            kind="classes", column=target, measure=NEW_CLASS, value=found.unknown, limit=CLASS, sentence=sentence
        )
    if window.missing > MISSING * window.rows:
        return
    sometimes = {name for drift in usual if drift.classes is not None for name in drift.classes.absent}
    gone = []
    for name in found.absent:
        rows = known.get(_kept(name), 0)
        if name not in sometimes and rows >= CLASS * n and (1 - of_window) ** rows < chance:
            gone.append((rows, name))
    for rows, name in sorted(gone, key=lambda one: -one[0])[:CLASSES]:
        sentence = (
            f"{target} is {_quoted(name)} in none of {count(m, 'row')}, and was in {rows / n:.1%} of {count(n, 'row')}"
        )
        yield Finding(
            kind="classes",
            column=target,
            measure=f"gone {(_kept(name) if isinstance(name, str) else name)!r}",
            value=_short(rows / n),
            limit=CLASS,
            sentence=sentence,
        )


def _quoted(name: Class) -> str:
    """The class as Python writes it, so that 1 and '1' look different; cut where it is long."""
    return repr(f"{name[: CLASS_NAME - 1]}…" if isinstance(name, str) and len(name) > CLASS_NAME else name)


def _violations(
    reference: ColumnProfile,
    window: ColumnProfile,
    column: ColumnDrift,
    rules: DriftRules,
    chance: float,
    *,
    names: bool = False,
) -> Iterator[Finding]:
    """What one column violates. Late labels of a target are no fault.

    `names`: of classes, which are names even where they are numbers: that there are others is for `_classes` to say.
    """
    name = column.name
    limit = {"feature": rules.features, "target": rules.target}[column.role].psi
    if "null" not in (reference.kind, window.kind) and reference.kind != window.kind:
        yield _fault(name, "type", 1, 0, f"{name} is a {window.kind}, and was a {reference.kind}")
    before = column.missing_before
    rise = column.missing - before
    expected = before > 0.5 or column.role == "target"
    if not expected and _rises(before, rise, MISSING, reference.rows, window.rows, chance):
        sentence = f"{name} has no value in {column.missing:.1%} of rows, at most {before:.1%} before"
        yield _fault(name, "missing", rise, MISSING, sentence)
    moved = _moved(column, limit)
    if moved and column.psi is not None:
        sentence = f"{name} moved: PSI {column.psi:.2f}, the pack allows {limit:g}"
        yield Finding(kind=column.role, column=name, measure="psi", value=column.psi, limit=limit, sentence=sentence)
    if names:
        return
    if moved and window.kind == "number" and column.scale and (unit := _unit(reference, window, column.scale)):
        yield _fault(name, "unit", column.scale, SCALE, f"{name} looks like another unit: {unit}")
    else:
        for measure, share, most in (("sentinel", column.sentinel, SENTINEL), ("range", column.far, FAR)):
            if share and _rises(0, share, most, reference.seen, window.seen, chance):
                now, then = (f"{each.minimum:g} … {each.maximum:g}" for each in (window, reference))
                sentence = f"{name} is out of its range in {share:.1%} of rows: {now}, {then} before"
                yield _fault(name, measure, share, most, sentence)
                break
    if column.new and _rises(0, column.new, NEW, reference.seen, window.seen, chance):
        sentence = f"{name} holds values never seen before in {column.new:.1%} of rows"
        yield Finding(kind=column.role, column=name, measure="new", value=column.new, limit=NEW, sentence=sentence)
        for old, now, share in _renamed(reference, window):
            sentence = f"{name} is {now!r} in {share:.1%} of rows, as many as were {old!r}, which is gone: renamed?"
            yield _fault(name, "renamed", share, RENAMED, sentence)


def _moved_predictions(column: ColumnDrift, limit: float) -> Iterator[Finding]:
    """That the predictions moved; nothing else of them is a fault of the data."""
    if _moved(column, limit) and column.psi is not None:
        sentence = f"{PREDICTIONS} moved: PSI {column.psi:.2f}, the pack allows {limit:g}"
        yield Finding(kind="prediction", column=None, measure="psi", value=column.psi, limit=limit, sentence=sentence)


def _moved(column: ColumnDrift, limit: float) -> bool:
    """Tell whether PSI is past the pack's threshold, past chance, and past what is usual."""
    return column.psi is not None and column.psi > max(limit, column.noise or 0.0, column.usual or 0.0)


def _rises(before: float, rise: float, limit: float, n: int, m: int, chance: float) -> bool:
    """Whether a share rises past its limit, and past what `chance` alone does to shares of n and of m rows.

    Of few rows, or rare ones, the normal distribution knows too little: so many are also past the binomial one, whose
    share is the one before, with half a row of doubt (Jeffreys' prior).
    """
    if not n or not m:
        return rise > limit
    pooled = (n * before + m * (before + rise)) / (n + m)
    error = math.sqrt(max(0.0, pooled * (1 - pooled)) * (1 / n + 1 / m))
    if rise <= max(limit, NormalDist().inv_cdf(1 - chance) * error):
        return False
    from scipy.special import bdtrc  # scipy.stats would cost 0.7 s of import

    return float(bdtrc(round((before + rise) * m) - 1, m, (before * n + 0.5) / (n + 1))) < chance


def _unit(reference: ColumnProfile, window: ColumnProfile, scale: float) -> str | None:
    """What other unit the window's numbers look like: the same shape, at another scale; None for none."""
    import numpy as np

    at = np.arange(1, 20) / 20
    before, now = reference.quantiles(at), window.quantiles(at)
    room = (now[-1] - now[0]) / 10

    def alike(expected: Floats) -> bool:
        return bool(np.max(np.abs(now - expected)) <= room)

    if alike((before - 32) / 1.8):
        return "as °C is to °F"
    if alike(before * 1.8 + 32):
        return "as °F is to °C"
    least = SCALE if before[0] >= 0 or before[-1] <= 0 else SCALE_AROUND_ZERO
    if abs(math.log(scale)) >= math.log(least) and alike(before * scale):
        return f"the same shape, {scale:.3g} times as large"
    return None


def _renamed(reference: ColumnProfile, window: ColumnProfile) -> Iterator[tuple[str, str, float]]:
    """Categories that vanished while another of their size, give or take a quarter, appeared: old, new, its share."""
    known, now = reference.shares(), window.shares()
    come = {name: share for name, share in now.items() if name not in known}
    for old, share in known.items():
        if not come or share < RENAMED:
            return
        new = min(come, key=lambda name: abs(come[name] - share))
        if now.get(old, 0.0) < share / 10 and abs(come[new] - share) <= share / 4:
            yield old, new, come.pop(new)


def _arrival(reference: Profile, window: Profile, data: Data, chance: float) -> Iterator[Finding]:
    """Whether the source still sends rows: at the reference's pace, and up to the window's end."""
    days, before = _days(window.start, window.end), _days(reference.start, reference.end)
    expected = reference.rows * days / before if before else 0.0
    few = window.rows < PACE * expected and math.exp(-expected) < chance
    if few or not window.rows:
        sentence = f"{count(window.rows, 'row')}, {expected:.0f} at the pace of before: did the source stop?"
        if not window.rows:
            sentence += " Where such gaps are usual, make triggers.drift.window in pack.yaml longer than they are"
        yield _fault(None, "rows", window.rows, PACE * expected, sentence)
    silence = _silence(window, data)
    most = data.max_staleness.total_seconds() / 86400
    if silence is not None and silence > most:
        sentence = f"the newest row is {silence:.1f} days older than the window's end, the pack allows {most:g}"
        yield _fault(None, "stale", silence, most, sentence)


def _silence(window: Profile, data: Data) -> float | None:
    """Days from the newest row to the end of the window."""
    times = window.columns.get(data.event_time)
    if times is None or times.kind != "time" or times.maximum is None:
        return None
    return _days(datetime.fromtimestamp(times.maximum, UTC), window.end)


def _performance(performance: Performance, rules: DriftRules) -> Iterator[Finding]:
    """A drop past the pack's rule whose interval leaves out no drop at all; or an order turned round: flipped labels.

    Halfway from what chance scores to the mirror image of the reference, no other cause is likely: a new truth makes a
    model know less, and seldom its opposite.
    """
    drop, now, before = performance.drop, performance.window, performance.reference.value
    limit, metric = rules.performance.drop, performance.metric
    if drop.value <= limit or (drop.low is not None and drop.low <= 0):
        return
    interval = "" if drop.low is None else f" (interval {drop.low:+.3f} … {drop.high:+.3f})"
    sentence = f"{metric} is {now.value:.3f}, {before:.3f} at promotion: worse by {drop.value:.3f}{interval}"
    if (chance := performance.chance) is not None:
        surely = now.value if now.high is None else now.high
        if surely < chance < before and now.value <= chance - (before - chance) / 2:
            sentence = f"{metric} is {now.value:.3f}, beyond {chance:g}, and was {before:.3f}: labels flipped?"
            yield _fault(None, "labels", now.value, chance, sentence)
            return
    yield Finding(
        kind="performance",
        column=None,
        measure="drop",
        value=drop.value,
        limit=limit,
        sentence=f"{sentence}, the pack allows {limit:g}",
    )


def _shift(reference: Sequence[Importance], window: Sequence[Importance], chance: float) -> ImportanceShift | None:
    """By how much the shares of importance have moved, as the module says; None where a side has none."""
    if not reference or not window:
        return None
    before, now = ({each.column: each for each in side} for side in (reference, window))
    columns, errors = [], []
    for name in dict.fromkeys((*before, *now)):
        sides = [side[name] for side in (before, now) if name in side]
        shares = (side[name].share if name in side else 0.0 for side in (before, now))
        columns.append(Leaning(column=name, **dict(zip(("before", "now"), map(_short, shares), strict=True))))
        errors.append([each.share_error for each in sides])
    columns.sort(key=lambda each: (-abs(each.now - each.before), each.column))
    raw = sum(abs(each.now - each.before) for each in columns) / 2
    known = [[error for error in each if error is not None] for each in errors]
    if known != errors:
        return ImportanceShift(shift=_short(raw), noise=None, columns=tuple(columns))
    from scipy.special import gammaincinv  # scipy.stats would cost 0.7 s of import

    sizes = [math.hypot(*each) for each in known]
    mean, variance = sum(sizes) / math.sqrt(2 * math.pi), math.hypot(*sizes) ** 2 / 4 * (1 - 2 / math.pi)
    most = variance / mean * float(gammaincinv(mean**2 / variance, 1 - chance)) if variance else 0.0
    return ImportanceShift(shift=_short(max(0.0, raw - mean)), noise=_short(most - mean), columns=tuple(columns))


def _importance(shift: ImportanceShift, rules: DriftRules) -> Iterator[Finding]:
    """That the champion leans on other columns than it did."""
    limit = rules.importance.shift
    if shift.noise is None or shift.shift <= max(limit, shift.noise):
        return
    named = ", ".join(f"{each.column} {each.before:.0%} → {each.now:.0%}" for each in shift.columns[:LEANINGS])
    sentence = f"what the champion leans on moved by {shift.shift:.2f} of 1, the pack allows {limit:g}: {named}"
    yield Finding(kind="importance", column=None, measure="shift", value=shift.shift, limit=limit, sentence=sentence)


def _fault(column: str | None, measure: str, value: float, limit: float, sentence: str) -> Finding:
    return Finding(kind="fault", column=column, measure=measure, value=_short(value), limit=limit, sentence=sentence)


def _days(start: datetime, end: datetime) -> float:
    return _short((end - start).total_seconds() / 86400)


def _short(value: float) -> float:
    """Six digits: more say nothing, and a row of the events keeps them all."""
    return float(f"{value:.6g}")
