"""A real year, look by look, through monitor, admission and chain, beside what a timetable would do.

The packs: `flight_delay`, 2013's flights, on which `freshness` was built; and `wind`, 2013's weather reports, on which
nothing was, with a twelfth of the rows.

As of 2013-04-01 every policy trains its first champion, and from then on the pack is looked at every `--every` days:

    evergreen   the monitor looks; what it takes for a shift is an alert, and admission decides about it by the pack's rules
    monthly     a training at the first look of each month, as cron would start it
    weekly      a training at every look (of at least 7 days)
    never       the first champion for ever

What counts is the champion in force on the rows that were still to come: ROC-AUC on the days from each look to the next,
meaned over the looks. Every training is a whole chain, with the gate's word on whether the champion changes. Time is
simulated: the events database takes the instant of the look for now. A model that one policy trained as of a day is
looked up by the others, as it would be in a home of theirs where it was made before. Killed and started again with
the same --folder, it goes on.

Goal: Evergreen's mean not below the monthly timetable's, with fewer trainings.

    python benchmarks/year.py [--pack flight_delay] [--every 7] [--folder FOLDER] [--until 2013-12-24]
"""

from __future__ import annotations

import argparse
import logging
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import yaml

from evergreen import database, keys, looks, loop, stages
from evergreen.data.store import Store
from evergreen.errors import EvergreenError
from evergreen.evaluation import metrics
from evergreen.loop.monitor import Watched, alert_of, monitor, watched_by
from evergreen.pack import Pack, parse_instant
from evergreen.registry.models import Registry
from evergreen.run import Promoted, Ref, Run, Window
from evergreen.settings import Settings
from evergreen.triggers import inbox
from evergreen.triggers.inbox import NewAlert
from evergreen.work import manifest_of

HERE = Path(__file__).resolve().parent
PACKS = {"flight_delay": HERE.parent / "include" / "packs", "wind": HERE / "packs"}
FIRST = datetime(2013, 4, 1, tzinfo=UTC)
SHARED = ("validate", "train", "evaluate")
"""Stages whose work one policy looks up in another's home."""


class Simulated(datetime):
    """What the events database takes for the clock."""

    at = FIRST

    @classmethod
    def now(cls, tz: Any = None) -> Any:  # noqa: ARG003
        return cls.at


class Ready:
    """Whoever runs the training, as admission sees it: never paused, and starts what it is asked for."""

    def __init__(self, url: str) -> None:
        self.url = url

    def is_paused(self, pack: str) -> bool:  # noqa: ARG002
        return False

    def run_exists(self, pack: str, run_id: str) -> bool:
        return database.connect(self.url).latest(pack, kind="run", run_id=run_id) is not None

    def run_failed(self, pack: str, run_id: str) -> bool:
        last = database.connect(self.url).latest(pack, kind=("stage", "receipt", "failure"), run_id=run_id)
        return last is not None and last.kind == "failure"


@dataclass
class Policy:
    """A home of its own, and what was done in it."""

    name: str
    folder: Path
    every: timedelta
    pack_name: str
    trained: list[datetime] = field(default_factory=list)
    promoted: list[datetime] = field(default_factory=list)
    champions: dict[datetime, str] = field(default_factory=dict)
    """By look, the model that is in force from it to the next."""
    champion: int | None = None
    """The version in force now."""
    said: dict[datetime, str] = field(default_factory=dict)
    """What the monitor said."""

    def __post_init__(self) -> None:
        found = Settings.from_env({"EVERGREEN_HOME": str(self.folder / self.name)})
        shared = {name: self.folder / name for name in ("packs", "cache", "jobs")}
        self.settings = found.model_copy(update={**shared, "data_remote": str(self.folder / "remote")})
        self.pack = Pack.load(self.settings.packs / self.pack_name)
        self.database = database.connect(self.settings.database_url)

    def learn_of(self, other: Policy) -> None:
        """Look up the work of another home's stages, as if it had been done in this one before."""
        known = {event.key for event in self.database.events(kind="stage")}
        with self.database.chain(self.pack.name) as chain:
            for event in other.database.events(self.pack.name, kind="stage"):
                if event.body["stage"] in SHARED and event.key not in known:
                    chain.append("stage", event.body, run_id="another-home", key=event.key)

    def train(self, at: datetime, run_id: str, reason: str, as_of: datetime | None = None) -> None:
        """The whole chain; of a run that came to its end before, how it ended."""
        self.trained.append(at)
        ended = self.database.events(self.pack.name, run_id=run_id, kind="stage")
        if ended and ended[-1].body["stage"] == "promote":
            self.end(at, Promoted.model_validate(ended[-1].body["value"]))
            return
        run = self.begin(at, run_id, reason, as_of=as_of)
        try:
            ingested = stages.ingest(run)
            validated = stages.validate(run, ingested)
            snapshot = stages.snapshot(run, ingested, validated)
            trained = stages.train(run, snapshot)
            evaluated = stages.evaluate(run, snapshot, trained)
            registered = stages.register(run, validated, snapshot, trained, evaluated)
            self.end(at, stages.promote(run, evaluated, registered))
        except EvergreenError as error:
            print(f"    {self.name} {at:%m-%d}: {error.what[:160]}", flush=True)

    def end(self, at: datetime, promoted: Promoted) -> None:
        self.champion = promoted.champion
        if promoted.champion == promoted.version != promoted.previous:
            self.promoted.append(at)

    def watch(self, at: datetime) -> None:
        """Ingest → validate → monitor → inbox → admission → the runs it asks for."""
        run = self.begin(at, f"look-{at:%Y%m%d}", "the schedule", kind="watch")
        watched = watched_by(self.settings, self.pack.name, run.id) or self.look(run)
        self.said[at] = f"{watched.kind}: {watched.reasons[0]}"
        if (alert := alert_of(watched)) is not None:
            name, message = alert
            new = NewAlert("monitor", name, message["reason"], message["fingerprint"], run.as_of, message["evidence"])
            inbox.keep(self.database, self.pack.name, [new])
        scheduler = Ready(self.settings.database_url)
        asked = {start.run_id: start.conf for start in loop.admit(self.settings, scheduler, at)}
        for event in self.database.events(self.pack.name, kind="run"):  # of a look that was taken before
            if event.at == at:
                asked.setdefault(str(event.run_id), event.body)
        for run_id, conf in asked.items():
            self.train(at, run_id, conf["reason"], as_of=datetime.fromisoformat(conf["as_of"]))
        loop.confirm(self.settings, scheduler)

    def look(self, run: Run) -> Watched:
        ingested = validated = None
        try:
            ingested = stages.ingest(run)
            validated = stages.validate(run, ingested)
        except EvergreenError as error:  # the monitor says what it makes of it
            print(f"    {self.name}: {error.what[:160]}", flush=True)
        return monitor(run, ingested, validated)

    def begin(self, at: datetime, run_id: str, reason: str, as_of: datetime | None = None, **more: Any) -> Run:
        return keys.begin(self.settings, self.pack, run_id, as_of=as_of, scheduled=at, reason=reason, **more)

    def go(self, looks_at: list[datetime]) -> None:
        """The year."""
        began = time.perf_counter()
        last = None
        for at in looks_at:
            Simulated.at = at
            due = {
                "weekly": last is None or at - last >= timedelta(days=7),
                "monthly": last is None or at.month != last.month,
                "never": last is None,
                "evergreen": last is None,
            }[self.name]
            if due:
                self.train(at, f"cron-{at:%Y%m%d}", "the schedule")
                last = at
            elif self.name == "evergreen":
                self.watch(at)
            assert self.champion is not None, f"the first chain came to no champion: see {self.folder}"
            version = Registry(self.settings).version(self.pack.name, self.champion)
            self.champions[at] = looks.model_of(version).hash
            told = self.said.get(at, "")[:110]
            print(f"  {self.name:<10}{at:%m-%d}  version {version.version:>2}  {told}", flush=True)
        print(f"{self.name}: {len(self.trained)} trainings, {time.perf_counter() - began:.0f} s", flush=True)

    def scores(self, manifest: Any, step: timedelta) -> dict[datetime, float]:
        """ROC-AUC of the champion in force on the rows from each look to the next."""
        store, target = Store(self.settings), self.pack.data.target
        run = self.begin(FIRST, f"scores-{self.name}", "the benchmark", kind="watch")
        found: dict[datetime, float] = {}
        for model in dict.fromkeys(self.champions.values()):
            parts = {
                at: manifest.within(Window(start=at, end=at + step))
                for at, champion in self.champions.items()
                if champion == model
            }
            predicted, _ = looks.predictions(
                run, store, Ref(hash=model, size=0), [part for each in parts.values() for part in each]
            )
            for at, each in parts.items():
                truth = np.concatenate([pl.read_parquet(store.path(part.object))[target].to_numpy() for part in each])
                scored = np.concatenate([predicted[part.identity] for part in each])
                found[at] = metrics.score(self.pack.data.task, truth, scored)["roc_auc"]
        return found


def look_days(every: timedelta, until: datetime) -> Iterator[datetime]:
    at = FIRST
    while at + every <= until:
        yield at
        at += every


def prepare(folder: Path, name: str) -> None:
    """The pack as a live source has it: without a clock and a cron; what it says of drift and admission stays.

    The cool-down of `flight_delay` is five minutes because its clock makes five days of them.
    """
    source, target = PACKS[name] / name, folder / "packs" / name
    if target.exists():
        return
    shutil.copytree(source, target)
    content = yaml.safe_load((target / "pack.yaml").read_text("utf-8"))
    loaded = Pack.load(source)
    if loaded.clock is not None:
        cooldown = loaded.triggers.admission.cooldown * loaded.clock.speed
        content["triggers"]["admission"]["cooldown"] = f"{cooldown.total_seconds():.0f}s"
        del content["clock"], content["triggers"]["schedule"]
    (target / "pack.yaml").write_text(yaml.safe_dump(content, sort_keys=False), "utf-8")


def all_partitions(policy: Policy, until: datetime) -> Any:
    """The clean partitions of the whole year, from the looks of this policy and one at the end."""
    Simulated.at = until
    run = policy.begin(until, "last-look", "the benchmark", kind="watch")
    ingested = stages.ingest(run)
    last = stages.validate(run, ingested)
    store = Store(policy.settings)
    found = [
        manifest_of(store, Ref.model_validate(event.body["value"]["manifest"]))
        for event in policy.database.events(policy.pack.name, kind="stage")
        if event.body["stage"] == "validate"
    ]
    whole = manifest_of(store, last.manifest)
    parts = {part.period: part for manifest in [*found, whole] for part in manifest.partitions}
    return whole.model_copy(update={"partitions": tuple(parts[period] for period in sorted(parts))})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pack", choices=list(PACKS), default="flight_delay")
    parser.add_argument("--every", type=int, default=7, help="days from look to look")
    parser.add_argument("--folder", type=Path, help="where the homes are, to go on after a stop")
    parser.add_argument("--until", type=parse_instant, default="2014-01-01", help="the end of the rows")
    arguments = parser.parse_args()
    folder = (arguments.folder or Path(tempfile.mkdtemp(prefix="evergreen-year-"))).absolute()
    every, until = timedelta(days=arguments.every), arguments.until
    logging.disable(logging.ERROR)
    database.datetime = Simulated  # type: ignore[attr-defined]
    prepare(folder, arguments.pack)
    days = list(look_days(every, until))
    print(f"{len(days)} looks, {days[0]:%Y-%m-%d} … {days[-1]:%Y-%m-%d}, in {folder}", flush=True)
    policies: list[Policy] = []
    for name in ("weekly", "monthly", "never", "evergreen"):
        policy = Policy(name, folder, every, arguments.pack)
        for other in policies:
            policy.learn_of(other)
        policy.go(days)
        policies.append(policy)
    manifest = all_partitions(policies[0], until)
    scores = {policy.name: policy.scores(manifest, every) for policy in policies}

    print(f"\n{'look':<12}" + "".join(f"{name:>11}" for name in scores) + "   the monitor")
    own = policies[-1]
    for at in days:
        cells = [
            f"{scores[policy.name][at]:.3f}{'*' if at in policy.promoted else '·' if at in policy.trained else ' '}"
            for policy in policies
        ]
        print(f"{at:%Y-%m-%d}  " + "".join(f"{cell:>11}" for cell in cells) + f"   {own.said.get(at, '')[:90]}")
    print("(* the champion changed, · trained and not promoted)")
    means = {name: float(np.mean(list(found.values()))) for name, found in scores.items()}
    for policy in policies:
        print(
            f"{policy.name:<10} mean ROC-AUC {means[policy.name]:.4f}  "
            f"{len(policy.trained):>3} trainings  {len(policy.promoted):>3} promotions"
        )
    for policy in policies[:-1]:
        differences = np.array([scores["evergreen"][at] - scores[policy.name][at] for at in days])
        reach = 1.96 * differences.std(ddof=1) / len(differences) ** 0.5
        print(
            f"evergreen - {policy.name:<8} {differences.mean():+.4f} "
            f"({differences.mean() - reach:+.4f} … {differences.mean() + reach:+.4f}, looks taken as independent)"
        )
    fewer = len(own.trained) < len(policies[1].trained)
    reached = fewer and means["evergreen"] >= means["monthly"]
    print(f"goal: not below monthly, with fewer trainings: {'reached' if reached else 'MISSED'}")
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main())
