"""The gate, held to pairs of models whose true difference is known because it was made.

Days differ in how hard they are, for both models alike, and each model has better and worse days of its own: rows of one
day are not independent. In A/A both models come from the same hat, so that whoever promotes for a gain, or rejects for a
loss, is wrong; then the challenger is truly worse, or better, by the margin, or worse by two. Each pair goes the real way,
predictions → paired difference → gate, under `superior`, and under `non_inferior` with both answers to what is unclear;
and beside it what most gates do: two point values compared.

Then twenty slices, all of them equal (at a margin of 0, where a false rejection is likeliest), and with a regression
planted in one of them; beside it each slice tested by itself.

Goals, at a nominal one-sided level of 2.5 %, each within three standard errors of its trials: false promotions in A/A under
`superior`; false rejections under `non_inferior`, in A/A and at a loss of exactly the margin; false rejections among twenty
equal slices; and the planted regression found in 90 % of trials.

With `--real`, thirty retrainings of flight_delay that differ in the seed alone, each the challenger of the one before.

    python benchmarks/gate.py [--pairs 1000] [--days 14] [--real]
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path

import numpy as np

from evergreen import keys, looks, stages
from evergreen.data.store import Store
from evergreen.evaluation import gate, significance, slices
from evergreen.evaluation.metrics import Rows, value
from evergreen.pack import GateRules, Pack, PrimaryRule, SliceRule
from evergreen.run import Difference, Estimate, Evaluated, Evaluation, SliceEstimate, Window
from evergreen.settings import Settings
from evergreen.stages import scoring
from evergreen.stages.scoring import HeldOut
from evergreen.work import manifest_of

AS_OF = datetime(2024, 4, 1, tzinfo=UTC)
MARGIN = 0.01
LEVEL = 0.025
A_DAY = 300
"""Rows."""
SLICES = 20
KNOWS = 0.1
"""What both models take from the hidden half, of the 0.5 that is in it: either could be better."""
PLANTED = 1.3
"""The challenger's `loss` in the slice with the regression."""
RULES = {
    "superior": PrimaryRule(metric="roc_auc", test="superior", margin=MARGIN),
    "non_inferior": PrimaryRule(metric="roc_auc", margin=MARGIN),
    "non_inferior, unclear: review": PrimaryRule(metric="roc_auc", margin=MARGIN, unclear="review"),
}
POINTS = "two point values"


def pair(
    rng: np.random.Generator, days: int, loss: float | np.ndarray = 0.0, a_day: int = A_DAY
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Truth, challenger's and champion's predictions, day. `loss`: how much less the challenger takes; for all, or by row."""
    day = np.repeat(np.arange(days), a_day)
    known, hidden = rng.normal(size=(2, len(day)))
    rate, skill = rng.normal(-1.2, 0.6, days)[day], rng.normal(0.8, 0.35, days)[day]
    truth = rng.random(len(day)) < 1 / (1 + np.exp(-(rate + skill * known + 0.5 * hidden)))
    own, noise = rng.normal(0, 0.08, (2, days)), rng.normal(0, 0.3, (2, len(day)))
    challenger, champion = (
        1 / (1 + np.exp(-(-1.2 + 0.8 * known + (KNOWS + own[model][day] - less) * hidden + noise[model])))
        for model, less in enumerate((loss, 0.0))
    )
    return truth, challenger, champion, day


def loss_of(difference: float) -> float:
    """The `loss` at which the challenger's ROC-AUC is `difference` from the champion's, over endlessly many days."""

    def apart(loss: float) -> float:
        truth, challenger, champion, day = pair(np.random.default_rng(1), 1000, loss)
        new, old = (value(Rows.of("binary", truth, each, day), "roc_auc") for each in (challenger, champion))
        return new - old

    chance = apart(0.0)  # what a thousand days still hold of luck
    low, high = -0.4, 0.6
    for _ in range(10):
        middle = (low + high) / 2
        low, high = (middle, high) if apart(middle) - chance > difference else (low, middle)
    return (low + high) / 2


def judged(rules: GateRules, differences: tuple[Difference, ...]) -> str:
    """The gate's decision on a challenger about which nothing but these differences is known."""
    of_slices = tuple(
        SliceEstimate(by=each.by, group=each.group, rows=each.rows, metric=each.metric, estimate=Estimate(value=0.7))
        for each in differences
        if each.by is not None and each.group is not None
    )
    figures = {"rows": differences[0].rows, "metrics": {"roc_auc": Estimate(value=0.7)}, "size_bytes": 1}
    evaluated = Evaluated(
        challenger=Evaluation(model="challenger", slices=of_slices, **figures),
        champion=Evaluation(model="champion", version=1, **figures),
        differences=differences,
        confidence=rules.primary.confidence,
        primary="roc_auc",
        holdout=Window(start=AS_OF - timedelta(days=14), end=AS_OF),
    )
    return gate.decide(evaluated, rules, challenger_as_of=AS_OF, champion_as_of=AS_OF).decision


def overall(truth: np.ndarray, challenger: np.ndarray, champion: np.ndarray, day: np.ndarray) -> Difference:
    new, old = (Rows.of("binary", truth, predicted, day) for predicted in (challenger, champion))
    estimate = significance.paired(new, old, "roc_auc", 0.95)
    return Difference(metric="roc_auc", rows=len(truth), estimate=estimate)


def trials(pairs: int, days: int, loss: float, seed: int = 20240401) -> dict[str, Counter[str]]:
    """By rule, how often each decision was taken."""
    rng = np.random.default_rng(seed)
    said: dict[str, Counter[str]] = {name: Counter() for name in (*RULES, POINTS)}
    for _ in range(pairs):
        difference = overall(*pair(rng, days, loss))
        for name, rule in RULES.items():
            said[name][judged(GateRules(primary=rule), (difference,))] += 1
        said[POINTS]["promote" if difference.estimate.value > 0 else "reject"] += 1
    return said


def slice_trials(pairs: int, days: int, *, planted: bool, seed: int = 20240402) -> dict[str, float]:
    """Share of pairs rejected for a slice, by Holm over all of them and by each for itself; the first slice's true loss."""
    rng = np.random.default_rng(seed)
    margin = 0.03 if planted else 0.0
    lax = PrimaryRule(metric="roc_auc", margin=1.0)
    rules = GateRules(primary=lax, slices=(SliceRule(by="group", metric="roc_auc", margin=margin, min_rows=100),))
    rejected, alone, lost = 0, 0, []
    for _ in range(pairs):
        group = np.array([f"{place:02}" for place in range(SLICES)])[rng.integers(0, SLICES, days * 4 * A_DAY)]
        loss = np.where(group == "00", PLANTED, 0.0) if planted else 0.0
        truth, challenger, champion, day = pair(rng, days, loss, a_day=4 * A_DAY)
        new, old = (Rows.of("binary", truth, predicted, day) for predicted in (challenger, champion))
        found = slices.differences(rules, new, old, columns={"group": group}, confidence=0.95)
        everywhere = overall(truth, challenger, champion, day)
        rejected += judged(rules, (everywhere, *found)) == "reject"
        alone += any(each.estimate.high is not None and each.estimate.high < -margin for each in found)
        lost.append(found[0].estimate.value)
    return {"rejected": rejected / pairs, "alone": alone / pairs, "difference": float(np.mean(lost))}


def within(level: float, trials: int) -> float:
    """The largest share that a true share of `level` leaves likely: three standard errors more."""
    return level + 3 * math.sqrt(level * (1 - level) / trials)


def retrained(seeds: int) -> Iterator[tuple[GateRules, HeldOut, Rows]]:
    """The pack's rules, its hold-out rows, and the rows as a model predicts them; models differ in the seed alone."""
    packs = Path(__file__).resolve().parents[1] / "include" / "packs"
    with tempfile.TemporaryDirectory(prefix="evergreen-gate-") as folder:
        settings = Settings.from_env({"EVERGREEN_HOME": folder, "EVERGREEN_PACKS": str(packs)})
        store, written = Store(settings), Pack.load(packs / "flight_delay")
        as_of = datetime(2013, 5, 1, tzinfo=UTC)
        for seed in range(seeds):
            pack = written.model_copy(update={"training": written.training.model_copy(update={"seed": seed})})
            run = keys.begin(settings, pack, f"seed-{seed}", as_of=as_of, scheduled=as_of, reason="another seed")
            ingested = stages.ingest(run)
            snapshot = stages.snapshot(run, ingested, stages.validate(run, ingested))
            trained = stages.train(run, snapshot)
            parts = manifest_of(store, snapshot.manifest).within(snapshot.windows.holdout)
            rows = scoring.holdout_rows(store, parts, [pack.data.target, *pack.gate.columns])
            heldout = scoring.HeldOut.of(pack.gate, pack.data.task, pack.data.target, rows)
            scored = looks.score(run, store, parts, {"challenger": trained.model}, {})["challenger"]
            yield pack.gate, heldout, heldout.rows(scored.predicted, trained.classes)


def real(seeds: int) -> bool:
    """Each seed challenges the one before it: nothing was learned, so that nobody should win or lose."""
    said: dict[str, Counter[str]] = {name: Counter() for name in (*RULES, POINTS)}
    found = []
    for (_, _, champion), (rules, heldout, challenger) in pairwise(retrained(seeds)):
        differences = heldout.differences(challenger, champion)
        estimate = next(each.estimate for each in differences if (each.metric, each.by) == ("roc_auc", None))
        found.append(estimate)
        for name, rule in RULES.items():
            # How fast they answer is another question, and was not measured: what a rule names and nobody measured rejects.
            asked = rules.model_copy(update={"primary": rule, "latency_p95_ms": None})
            said[name][judged(asked, differences)] += 1
        said[POINTS]["promote" if estimate.value > 0 else "reject"] += 1
    values, reach = (
        np.array(each)
        for each in zip(*((of.value, of.high - of.value) for of in found if of.high is not None), strict=True)
    )
    print(f"flight_delay as of 2013-05-01, {seeds} seeds: {len(found)} challengers that differ in nothing but the seed")
    print(f"  differences of ROC-AUC: standard deviation {values.std(ddof=1):.4f}, largest {np.abs(values).max():.4f}")
    print(f"  half-width of the interval: median {np.median(reach):.4f}")
    show(said, len(found))
    wrong = max(said["superior"]["promote"], said["non_inferior"]["reject"]) / len(found)
    print(f"wrong at most {wrong:.1%} (goal ≤ {LEVEL:.1%}, {within(LEVEL, len(found)):.1%} with chance)")
    return wrong <= within(LEVEL, len(found))


def show(said: dict[str, Counter[str]], pairs: int) -> None:
    for name, decisions in said.items():
        shares = "   ".join(f"{each} {decisions[each] / pairs:6.1%}" for each in ("promote", "review", "reject"))
        print(f"  {name:<30} {shares}")


def main() -> int:
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    asked.add_argument("--pairs", type=int, default=1000)
    asked.add_argument("--days", type=int, default=14)
    asked.add_argument("--seeds", type=int, default=30)
    asked.add_argument("--real", action="store_true", help="flight_delay, trained again with other seeds")
    options = asked.parse_args()
    began = time.monotonic()
    if options.real:
        return 0 if real(options.seeds) else 1
    pairs, days = options.pairs, options.days
    results = {}
    for what, difference in (("A/A", 0.0), ("gain of m", MARGIN), ("loss of m", -MARGIN), ("loss of 2 m", -2 * MARGIN)):
        results[what] = trials(pairs, days, loss_of(difference) if difference else 0.0)
        print(f"{what} ({difference:+.3f} ROC-AUC; {pairs} pairs, {days} days of {A_DAY} rows, m = {MARGIN})")
        show(results[what], pairs)
    equal, regressed = (slice_trials(pairs, days, planted=planted) for planted in (False, True))
    print(f"{SLICES} equal slices: rejected {equal['rejected']:.1%}; each tested by itself {equal['alone']:.1%}")
    print(
        f"one slice worse by {-regressed['difference']:.3f}, margin 0.03: found {regressed['rejected']:.1%}; "
        f"tested by itself {regressed['alone']:.1%}"
    )
    allowed = within(LEVEL, pairs)
    goals = {
        "A/A, superior: false promotions": results["A/A"]["superior"]["promote"] / pairs,
        "A/A, non_inferior: false rejections": results["A/A"]["non_inferior"]["reject"] / pairs,
        "loss of m, non_inferior: false rejections": results["loss of m"]["non_inferior"]["reject"] / pairs,
        "loss of m, unclear to review: promotions": results["loss of m"]["non_inferior, unclear: review"]["promote"]
        / pairs,
        f"{SLICES} equal slices: false rejections": equal["rejected"],
    }
    for what, share in goals.items():
        print(
            f"{what}: {share:.1%} (goal ≤ {LEVEL:.1%}, {allowed:.1%} with chance){'' if share <= allowed else ' MISSED'}"
        )
    print(f"{time.monotonic() - began:.0f} s")
    return 0 if max(goals.values()) <= allowed and regressed["rejected"] >= 0.9 else 1


if __name__ == "__main__":
    sys.exit(main())
