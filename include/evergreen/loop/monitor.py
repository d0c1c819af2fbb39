"""The monitor: the newest windows beside what the champion was made from; what kind of change it is, and what follows.

`ingest → validate → monitor`, by the chain's own first two stages. What a look found is an event of kind `drift`, a
function of its key like a stage's value. Only a shift follows from it into the loop: as an alert, signed and posted as
anybody's.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from evergreen import columns, errors, looks
from evergreen import database as db
from evergreen.data.store import Store
from evergreen.errors import EvaluationError, RegistryError, StageError, visible
from evergreen.evaluation import metrics, significance
from evergreen.evaluation.probation import Ruling
from evergreen.keys import perform, recorded
from evergreen.looks import PROFILE, REFERENCE, Reference
from evergreen.loop import probation
from evergreen.loop.freshness import rehearse
from evergreen.monitoring.drift import ColumnDrift, Drift, Freshness, Kind, Performance, Triage, compare, triage
from evergreen.pack import DriftRules, Pack
from evergreen.registry.models import ModelVersion, Registry
from evergreen.run import (
    Importance,
    Ingested,
    Manifest,
    Ref,
    Run,
    Validated,
    Value,
    Window,
    Windows,
    canonical_json,
    digest,
    period_name,
)
from evergreen.settings import Settings
from evergreen.triggers import senders, signatures
from evergreen.work import manifest_of

if TYPE_CHECKING:
    import numpy as np
    import polars as pl

    from evergreen.monitoring.profiles import Profile

log = logging.getLogger("evergreen")

KIND: Literal["drift"] = "drift"
"""The kind of the event that a look leaves."""
YEAR = timedelta(days=365)
WINDOWS = 12
"""Most windows of a look, where the rules do not ask for more."""
REASON, FINGERPRINT = 500, 200
"""How long an alert's reason and fingerprint may be."""
EVIDENCE_BYTES = 48 * 1024
"""Of an alert's evidence as JSON: an inbox takes 64 KiB in all, and names of columns are as long as they are."""
PACKAGE = Path(__file__).parents[1]
MEASURES = ("metrics", "significance", "importance", "gate", "probation", "freshness")


class Watched(Value):
    """What a look found, and what it rests on."""

    pack: str
    as_of: datetime
    champion: int | None
    """The version that was watched."""
    kind: Kind | None
    """None: nothing could be compared; the reasons say why."""
    reasons: tuple[str, ...]
    evidence: dict[str, Any] = Field(default_factory=dict)
    windows: tuple[Window, ...] = ()
    """The oldest first."""
    columns: tuple[str, ...] = ()
    """The columns by which the newest window violates a rule."""
    model: tuple[str, ...] = ()
    """The rules about the model or the window as a whole that it violates: `performance`, `prediction`, `freshness`, …

    Older looks have these among the columns.
    """
    scores: dict[str, float] = Field(default_factory=dict)
    """PSI of the newest window, by column, where it has one."""
    prediction_score: float | None = None
    """PSI of the predictions; older looks have it among the scores, as the column `prediction`."""
    freshness: Freshness | None = None
    """What newer rows are worth, where the pack asks and it can be said."""
    report: Ref | None = None
    """JSON: everything that was measured."""
    page: Ref | None = None
    """The same as one HTML page."""
    profile: Ref | None = None
    """Of the newest window: next year it is the season before."""
    probation: Ruling | None = None
    """None: the champion is on none."""

    def summary(self) -> str:
        return f"{self.kind or 'not compared'}: {self.reasons[0]}"


@dataclass(frozen=True)
class Champion:
    """The version in use, and what it was made from."""

    version: ModelVersion
    model: Ref
    seen: Window
    """The rows it learned from, or chose by: it is not scored on them."""
    judged: Window
    """Its hold-out, by which it was chosen."""
    train: Window
    """The rows it learned from."""
    snapshot: Ref
    """The folder that holds them all."""
    profile: Profile
    reference: Reference

    @classmethod
    def of(cls, registry: Registry, version: ModelVersion) -> Champion | None:
        """None for a version without a profile: one that was registered before there were any, or by hand."""
        from evergreen.monitoring.profiles import Profile

        files = [registry.artifact(version.name, version.version, path) for path in (PROFILE, REFERENCE)]
        if version.model_hash is None or files[0] is None or files[1] is None:
            return None
        profile = Profile.from_bytes(files[0])
        if profile.predictions is not None and profile.predictions.rows == profile.rows:
            # Only rows of the hold-out were predicted: an older Evergreen took a column called `prediction` for these.
            profile = replace(profile, predictions=None)
        lineage = registry.lineage(version.name, version.version)
        windows = Windows.model_validate(lineage["windows"])
        return cls(
            version=version,
            model=looks.model_of(version),
            seen=Window(start=windows.train.start, end=windows.validation.end),
            judged=windows.holdout,
            train=windows.train,
            snapshot=Ref(hash=lineage["snapshot"]["hash"], size=lineage["snapshot"]["bytes"]),
            profile=profile,
            reference=Reference.model_validate_json(files[1]),
        )


class Watcher:
    """Windows of a manifest beside a champion; every partition is scored and profiled once."""

    def __init__(self, run: Run, store: Store, champion: Champion, manifest: Manifest, rules: DriftRules) -> None:
        self.run, self.store, self.champion, self.manifest, self.rules = run, store, champion, manifest, rules
        self._known: dict[Window, tuple[Profile, Drift]] = {}
        self._predictions: dict[str, np.ndarray] = {}
        self._importance: dict[Window, tuple[Importance, ...]] = {}
        self._unmeasured: dict[Window, str] = {}
        """Why the importance of a window could not be measured."""
        self.strange: str | None = None
        """Why labels that have arrived are none that the champion could be held to; None: they are."""
        self._usual = [
            each for each in champion.reference.usual if abs((each.end - each.start) - rules.window) < timedelta(days=1)
        ]

    def windows(self, as_of: datetime) -> list[Window]:
        """The newest windows at `as_of`, the oldest first; at least one, whatever there is to see in it.

        Those that the rules ask for, and up to `WINDOWS` more that the champion has not seen: by them, what changed at
        once is told from what changed by steps.
        """
        start = self.manifest.covered.start if self.manifest.covered else as_of
        found = looks.windows_back(as_of, self.rules, self.run.pack.data, min(start, as_of - self.rules.window))
        more = [window for window in found[self.rules.of : WINDOWS] if window.start >= self.champion.seen.end]
        return [*reversed(more), *reversed(found[: self.rules.of])]

    def score(self, *looked: Sequence[Window]) -> None:
        """Have the champion's predictions for all rows that it has not seen, and its importance, by one job.

        Each of `looked` is what one look sees, the oldest window first; as many windows as the rules confirm by, the
        newest with labels, are asked for importance. Raises EvaluationError where the champion cannot predict the rows:
        without, they are looked at all the same.
        """
        unseen = [[window for window in windows if not window.overlaps(self.champion.seen)] for windows in looked]
        parts = {
            part.identity: part for windows in unseen for window in windows for part in self.manifest.within(window)
        }
        samples = self._samples(unseen) if self.champion.reference.importance else {}
        self._predictions, measured = looks.predictions(
            self.run, self.store, self.champion.model, list(parts.values()), list(samples.values())
        )
        for window, (importance, note) in zip(samples, measured, strict=True):
            if note is None:
                self._importance[window] = importance
                looks.keep_importance(self._kept(window), importance)
            else:  # shares of some columns are not comparable with shares of all
                self._unmeasured[window] = note

    def _samples(self, unseen: Sequence[Sequence[Window]]) -> dict[Window, looks.Sample]:
        """Rows of the windows whose importance this machine does not know yet; what it knows is taken over."""
        samples: dict[Window, looks.Sample] = {}
        unlabelled = set()
        for windows in unseen:
            left = self.rules.of
            for window in reversed(windows):
                if not left or window in unlabelled:
                    continue
                if window not in self._importance and window not in samples:
                    known = looks.kept_importance(self._kept(window))
                    sample = None if known is not None else self._sample(window)
                    if known is not None:
                        self._importance[window] = known
                    elif sample is not None:
                        samples[window] = sample
                    else:
                        unlabelled.add(window)
                        continue
                left -= 1
        return samples

    def _sample(self, window: Window) -> looks.Sample | None:
        reference = self.champion.reference
        return looks.sample(
            self.run,
            self.store,
            self.manifest.within(window),
            sorted(each.column for each in reference.importance),
            metric=reference.metric,
            classes=reference.classes,
            budget_s=2 * looks.IMPORTANCE_S,
        )

    def _kept(self, window: Window) -> Path:
        parts = self.manifest.within(window)
        return looks.importance_file(self.run, self.champion.model, parts, self.champion.reference.metric)

    def drift(self, window: Window) -> Drift:
        """The window beside what the champion was made from."""
        return self._look(window)[1]

    def profile(self, window: Window) -> Profile:
        return self._look(window)[0]

    def season(self, window: Window, before: Profile) -> Drift:
        """The window beside the same season before."""
        return compare(before, self.profile(window), self.rules, self.run.pack.data)

    def _look(self, window: Window) -> tuple[Profile, Drift]:
        if window not in self._known:
            scored = {} if window.overlaps(self.champion.seen) else self._predictions
            classes = self.champion.reference.classes
            profile = looks.profile_of(self.run, self.store, window, self.manifest, scored, classes)
            drift = compare(
                self.champion.profile,
                profile,
                self.rules,
                self.run.pack.data,
                usual=self._usual,
                performance=self._performance(window, scored),
                classes=classes,
                importance=(self.champion.reference.importance, self._importance.get(window, ())),
                importance_note=self._unmeasured.get(window, self.champion.reference.importance_note),
            )
            self._known[window] = (profile, drift)
        return self._known[window]

    def _performance(self, window: Window, scored: dict[str, np.ndarray]) -> Performance | None:
        """The champion's figure on the window's rows whose labels have arrived; None where it has none.

        Labels that its task does not know are `strange`; classes that it does not know are errors of the champion.
        """
        import numpy as np

        pack, reference = self.run.pack, self.champion.reference
        truths, predicted, clusters = [], [], []
        for place, part in enumerate(part for part in self.manifest.within(window) if part.identity in scored):
            column = self._target(part.object)
            there = looks.labelled(column)
            truths.append(column.filter(there).to_numpy())
            predicted.append(scored[part.identity][there])
            clusters.append(np.full(int(there.sum()), place))
        truth = np.concatenate(truths) if truths else np.empty(0)
        if not len(truth):
            return None
        _, partition = np.unique(np.concatenate(clusters), return_inverse=True)
        if pack.data.task != "regression" and len(np.unique(truth)) < 2:
            return None
        try:
            rows = metrics.Rows.of(pack.data.task, truth, np.concatenate(predicted), partition, reference.classes)
        except EvaluationError as error:
            self.strange = f"the labels of {window.start:%Y-%m-%d} … {window.end:%Y-%m-%d}: {error.what}"
            return None
        try:
            figure = significance.estimate(rows, reference.metric, pack.gate.primary.confidence)
        except EvaluationError:  # undefined on these rows, as r2 is where all labels are one number
            return None
        return Performance(
            metric=reference.metric,
            reference=reference.figure,
            window=figure,
            less_is_better=metrics.direction(reference.metric) < 0,
            chance=0.5 if reference.metric == "roc_auc" else None,
        )

    def _target(self, ref: Ref) -> pl.Series:
        target = self.run.pack.data.target
        return columns.series(columns.read(self.store.path(ref), [target]), target)


@recorded
def monitor(run: Run, ingested: Ingested | None, validated: Validated | None) -> Watched:
    """Look at the newest windows, say what kind of change they show, and write the report.

    What `ingest` or `validate` refused is itself a fault of the data: None stands for what they did not give. Where they
    failed for another reason, nothing is compared. Raises LeaseHeldError where a run of the pack acts, or kept them from
    acting.
    """
    pack, store, registry = run.pack, Store(run.settings), Registry(run.settings)
    rules = pack.triggers.drift or DriftRules()
    mine = watched_by(run.settings, pack.name, run.id)
    if mine is not None and mine.probation is not None and mine.probation.decision == "roll back":
        return mine  # an attempt that was killed may have gone back: the champion is another, and what was seen stands
    refused, failed = _went_wrong(run, ingested, validated)
    champion = registry.champion(pack.name)
    standing = probation.standing(run, registry, champion)
    seen = validated or ingested
    before = _year_before(run, store, rules)

    def act() -> Watched:
        plain: dict[str, Any] = {
            "pack": pack.name,
            "as_of": run.as_of,
            "champion": champion.version if champion else None,
        }
        if failed is not None:
            return Watched(**plain, kind=None, reasons=(failed,))
        known = Champion.of(registry, champion) if champion else None
        if known is None or seen is None:
            if refused is not None:
                return Watched(**plain, kind="data fault", reasons=(refused,))
            return Watched(**plain, kind=None, reasons=(_unwatched(pack, champion),))
        watcher = Watcher(run, store, known, manifest_of(store, seen.manifest), rules)
        windows = watcher.windows(run.as_of)
        try:
            watcher.score(windows)
            unscored = None
        except EvaluationError as error:
            unscored = f"version {plain['champion']} cannot predict these rows: {error.what}"
        history = [watcher.drift(window) for window in windows]
        season = watcher.season(windows[-1], before[1]) if before else None
        fresh = None
        if rules.freshness is not None and ingested is not None:
            fresh = rehearse(run, store, watcher.manifest, ingested.windows, known.snapshot, known.train, rules)
        found = triage(history, rules, season, fresh)
        faults = tuple(each for each in (refused, unscored, watcher.strange) if each is not None)
        if faults:
            reasons = found.reasons if found.kind == "data fault" else ()
            found = Triage(kind="data fault", reasons=(*reasons, *faults), evidence=found.evidence)
        ruling = None
        if standing is not None:
            fault = f"the data have a fault: {found.reasons[0]}" if found.kind == "data fault" else None
            one = registry.version(pack.name, standing.before) if standing.model and standing.before else None
            rival = Champion.of(registry, one) if one is not None else None
            ruling = probation.judge(run, store, watcher.manifest, standing, known, rival, fault)
        return Watched(
            **plain,
            probation=ruling,
            kind=found.kind,
            reasons=found.reasons,
            evidence=found.evidence,
            windows=tuple(windows),
            columns=tuple(sorted({each.column for each in history[-1].violated if each.column is not None})),
            model=tuple(
                sorted(
                    {each.kind for each in history[-1].violated if each.column is None}
                    | ({"freshness"} if fresh is not None and fresh.exceeds(rules) else set())
                )
            ),
            freshness=fresh,
            scores={each.name: round(each.psi, 4) for each in history[-1].columns if each.psi is not None},
            prediction_score=_psi(history[-1].predictions),
            **_report(run, store, registry, known, rules, found, history, watcher.profile(windows[-1])),
        )

    return perform(
        run,
        "monitor",
        kind=KIND,
        result=Watched,
        inputs={
            "data": seen.manifest.hash if seen else None,
            "as_of": run.as_of.isoformat(),
            "champion": [champion.version, champion.model_hash] if champion else None,
            "refused": refused,
            "failed": failed,
            "season": before[0].hash if before else None,
            "probation": standing.model_dump(mode="json") if standing else None,
        },
        parameters={
            "rules": rules.model_dump(mode="json"),
            "rollback": pack.rollback.model_dump(mode="json") if pack.rollback else None,
            "confidence": pack.gate.primary.confidence,
            "independent": pack.gate.primary.independent,
            "metric": pack.gate.primary.metric,
        },
        code=tuple(
            PACKAGE / name
            for name in (
                "loop/monitor.py",
                "loop/probation.py",
                "loop/freshness.py",
                "looks.py",
                "columns.py",
                "work.py",
                "runner.py",
                "conversion.py",
            )
        )
        + tuple(PACKAGE / "evaluation" / f"{name}.py" for name in MEASURES)
        + tuple(PACKAGE.glob("monitoring/*.py")),
        act=act,
        outputs=lambda value: [ref for ref in (value.report, value.page, value.profile) if ref is not None],
        intact=store.verify,
    )


def _psi(column: ColumnDrift | None) -> float | None:
    return None if column is None or column.psi is None else round(column.psi, 4)


class Looked(Value):
    """What the monitor would have said of an instant of the past."""

    as_of: datetime
    triage: Triage
    newest: Drift
    freshness: Freshness | None


def backwards(run: Run, manifest: Manifest, as_ofs: Sequence[datetime]) -> Iterator[Looked]:
    """What the monitor would say of each of `as_ofs`, with today's champion, rules, and labels.

    `manifest` holds their windows, and where newer rows are to be rehearsed, those that trainings as of then would have
    had. Raises RegistryError where there is no champion to compare with.
    """
    pack, store, registry = run.pack, Store(run.settings), Registry(run.settings)
    rules = pack.triggers.drift or DriftRules()
    version = registry.champion(pack.name)
    known = Champion.of(registry, version) if version else None
    if known is None:
        raise RegistryError(_unwatched(pack, version), fix=f"evergreen run {pack.name}")
    watcher = Watcher(run, store, known, manifest, rules)
    looked = [watcher.windows(as_of) for as_of in as_ofs]
    watcher.score(*looked)
    for as_of, windows in zip(as_ofs, looked, strict=True):
        newest = windows[-1]
        then = Window(start=newest.start - YEAR, end=newest.end - YEAR)
        reaches = manifest.covered is not None and manifest.covered.start <= then.start
        season = watcher.season(newest, watcher.profile(then)) if reaches else None
        fresh = None
        if rules.freshness is not None:
            end = newest.end if manifest.covered is None else min(newest.end, manifest.covered.end)
            training = Windows.ending(end, pack.data)
            fresh = rehearse(run, store, manifest, training, known.snapshot, known.train, rules)
        drifts = [watcher.drift(window) for window in windows]
        yield Looked(as_of=as_of, triage=triage(drifts, rules, season, fresh), newest=drifts[-1], freshness=fresh)


def alert_of(watched: Watched) -> tuple[str, dict[str, Any]] | None:
    """The alert that follows from a look: its id, by which a repeat is the same alert, and its message; None: none."""
    if watched.kind != "shift":
        return None
    # Names of columns are whatever the data has; a message holds no control characters.
    told = visible("; ".join(watched.reasons[:2]))
    about = f"drift {canonical_json([watched.columns, watched.model])}"
    message = {
        "reason": told if len(told) <= REASON else f"{told[: REASON - 1]}…",
        "as_of": watched.as_of.isoformat(),
        "evidence": _visible(_fitting(watched.evidence)),
        "fingerprint": about if len(about) <= FINGERPRINT else f"drift {digest([watched.columns, watched.model])}",
    }
    window = watched.windows[-1].end.isoformat()
    return f"drift-{digest([watched.pack, watched.champion, window])[:20]}", message


def _visible(content: Any) -> Any:
    """`content`, JSON, with every text in it `visible`."""
    if isinstance(content, dict):
        return {key: _visible(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_visible(value) for value in content]
    return visible(content) if isinstance(content, str) else content


def _fitting(evidence: dict[str, Any]) -> dict[str, Any]:
    """The evidence with as many of the gravest violations as an alert can carry; all of them are in the report."""
    many = len(evidence.get("violated", ()))
    while many and len(json.dumps(evidence)) > EVIDENCE_BYTES:
        many //= 2
        windows = [{**each, "violated": each["violated"][:many]} for each in evidence["windows"]]
        evidence = {**evidence, "violated": evidence["violated"][:many], "windows": windows}
    return evidence


def tell(settings: Settings, watched: Watched, address: str) -> None:
    """Post the alert that follows from a look to Evergreen's webhook, and let the log say what a person must see to.

    Told twice, it is one alert: the webhook knows it by its id. Raises AlertError, SendersError.
    """
    if watched.kind == "data fault":
        log.error("%s: data fault: %s; a person looks, nothing is retrained", watched.pack, "; ".join(watched.reasons))
    if (alert := alert_of(watched)) is not None:
        name, message = alert
        secret = senders.own_secret(settings, senders.MONITOR)
        answer = signatures.post(address, watched.pack, secret, message, id=name)
        log.info("%s: %s kept: %s", watched.pack, answer["alert"], message["reason"])


def page_of(settings: Settings, pack: str, run_id: str) -> bytes | None:
    """The HTML page that a run of the monitor wrote, or found written; None where there is none.

    Raises StageError where it was pruned.
    """
    watched = watched_by(settings, pack, run_id)
    gone = db.connect(settings.database_url).latest(pack, kind="pruned", run_id=run_id)
    if gone is not None and watched is not None and watched.page and not Store(settings).verify(watched.page):
        raise StageError(
            f"the page of {run_id} was removed at {gone.at:%Y-%m-%d %H:%M} UTC, by retention: {gone.body['age']} of {pack}",
            fix=f"evergreen drift {pack} --as-of {watched.as_of:%Y-%m-%d} looks again",
        )
    return Store(settings).read_bytes(watched.page) if watched is not None and watched.page is not None else None


def watched_by(settings: Settings, pack: str, run_id: str) -> Watched | None:
    """What a run of the monitor found, by Airflow's id of it or ours."""
    database = db.connect(settings.database_url)
    for event in database.events(pack, run_id=run_id, newest_first=True):
        if event.kind in (KIND, "receipt") and event.body["stage"] == "monitor":
            found = event if event.kind == KIND else database.latest(pack, kind=KIND, key=event.key)
            return Watched.model_validate(found.body["value"]) if found is not None else None
    return None


def _went_wrong(run: Run, ingested: Ingested | None, validated: Validated | None) -> tuple[str | None, str | None]:
    """What the stage before refused of the data; or why else it failed, of which the data know nothing."""
    if validated is not None:
        return None, None
    stage = "validate" if ingested is not None else "ingest"
    for event in db.connect(run.settings.database_url).events(run.pack.name, run_id=run.id, newest_first=True):
        if event.kind == "failure" and event.body["stage"] == stage:
            what = str(event.body["what"])
            error = getattr(errors, event.body["error"], Exception)
            if issubclass(error, errors.LeaseHeldError):
                raise errors.LeaseHeldError(what, fix=event.body["fix"])
            refused = issubclass(error, errors.SourceError | errors.ValidationError)
            return (what, None) if refused else (None, f"{stage} failed: {what}")
    return None, f"{stage} did not come to an end"


def _unwatched(pack: Pack, champion: ModelVersion | None) -> str:
    if champion is None:
        return f"{pack.name} has no champion yet: there is nothing to compare with"
    if champion.model_hash is None:
        return (
            f"version {champion.version} is champion, and Evergreen did not make it, so it has no profile: "
            f"evergreen rollback {pack.name} --why … puts the champion before it back"
        )
    return (
        f"version {champion.version} is champion and has no profile, having been registered before there were any: "
        "the next version will have one"
    )


def _year_before(run: Run, store: Store, rules: DriftRules) -> tuple[Ref, Profile] | None:
    """The profile of the newest window that a look saw a year ago, give or take half a window."""
    from evergreen.monitoring.profiles import Profile

    then = run.as_of - YEAR
    found: list[tuple[timedelta, Ref]] = []
    near = (then - rules.window / 2, then + rules.window / 2)
    for event in db.connect(run.settings.database_url).events(run.pack.name, kind=KIND, as_of=near, newest_first=True):
        value = event.body["value"]
        if value["profile"] is not None:
            away = abs(datetime.fromisoformat(value["as_of"]) - then)
            found.append((away, Ref.model_validate(value["profile"])))
    for _, ref in sorted(found, key=lambda each: each[0]):
        if store.verify(ref):
            return ref, Profile.from_bytes(store.read_bytes(ref))
    return None


def _report(
    run: Run,
    store: Store,
    registry: Registry,
    champion: Champion,
    rules: DriftRules,
    found: Triage,
    history: Sequence[Drift],
    window: Profile,
) -> dict[str, Ref]:
    """The report as JSON and as a page, and the window's profile: in the store; the page on the champion's run, too."""
    from evergreen.monitoring import report

    pack = run.pack
    page = report.page(pack.name, found, history, rules, champion.profile, window)
    refs = {
        "report": store.put_bytes(report.to_json(pack.name, found, history).encode()),
        "page": store.put_bytes(page.encode()),
        "profile": store.put_bytes(window.to_bytes()),
    }
    store.push(refs.values())
    name = period_name(run.as_of, pack.data.partition)
    registry.attach(pack.name, champion.version.version, f"drift/{name}.html", page)
    return refs
