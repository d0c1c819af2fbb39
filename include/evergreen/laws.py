"""The laws a pack is held to by `evergreen check`, and a pack to start from that keeps them.

Checked on real rows of the pack's source, in a home of its own that is thrown away: data, models and runs stay as
they are.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evergreen import keys, stages
from evergreen.columns import named, stacked
from evergreen.data.store import Store
from evergreen.errors import EvaluationError, EvergreenError, PackError, TrainingError, nearest
from evergreen.evaluation import significance
from evergreen.looks import predictions_in
from evergreen.pack import NAME, NAMING, Pack
from evergreen.run import Connect, Ingested, Ref, Run, count, no_connections
from evergreen.settings import Settings
from evergreen.training import jobs
from evergreen.work import copy_python, job_spec, manifest_of

if TYPE_CHECKING:
    import polars as pl

ROWS = 64
"""How many rows a checked model trains on."""

TEMPLATE = Path(__file__).parent / "template"


@dataclass(frozen=True)
class Law:
    """One law, whether the pack keeps it, and what was seen."""

    name: str
    holds: bool
    detail: str
    seconds: float


def scaffold(packs: Path, name: str) -> Path:
    """A working pack called `name`; → its folder. Raises PackError for a name that is taken or cannot be one."""
    folder = packs / name
    if not NAME.fullmatch(name):
        raise PackError(f"{name!r} cannot name a pack", fix=NAMING)
    if folder.exists():
        raise PackError(f"{folder} is there already", fix="choose another name, or remove the folder")
    folder.mkdir(parents=True)
    for file in sorted(TEMPLATE.iterdir()):
        if file.is_file():
            shutil.copyfile(file, folder / file.name)
    return folder


def check_pack(
    settings: Settings, pack: Pack, home: Path, as_of: datetime | None, connect: Connect = no_connections
) -> Iterator[Law]:
    """Each law as it is judged; the first that is broken is the last, since the others build on it."""
    checking = Settings.from_env(
        {
            "EVERGREEN_HOME": str(home),
            "EVERGREEN_PROJECT": str(settings.project),
            "EVERGREEN_PACKS": str(settings.packs),
            "EVERGREEN_IMAGE": settings.image or "",
        }
    )
    instant = as_of or (pack.clock.start if pack.clock else datetime.now(UTC))
    found: dict[str, Any] = {}
    for name, law in LAWS.items():
        began = time.monotonic()
        try:
            if "run" not in found:
                found["run"] = keys.begin(
                    checking,
                    pack,
                    "check",
                    as_of=instant,
                    scheduled=instant,
                    reason="a check of the pack",
                    connect=connect,
                )
            detail = law(found["run"], found)
            broken = False
        except EvergreenError as error:
            detail, broken = str(error), True
        yield Law(name, not broken, detail, time.monotonic() - began)
        if broken:
            return


def _reads(run: Run, found: dict[str, Any]) -> str:
    found["ingested"] = stages.ingest(run)
    return str(found["ingested"].summary())


def _is_valid(run: Run, found: dict[str, Any]) -> str:
    found["validated"] = stages.validate(run, found["ingested"])
    return str(found["validated"].summary())


def _trains(run: Run, found: dict[str, Any]) -> str:
    found["rows"] = _sample(run, found["ingested"])
    result, found["model"] = _train(run, found["rows"], "first")
    found["inputs"], found["classes"] = result.inputs, result.classes
    return f"{count(ROWS, 'row')} in {result.duration_s:.1f} s"


def _repeats(run: Run, found: dict[str, Any]) -> str:
    _, again = _train(run, found["rows"], "second")
    if again.hash != found["model"].hash:
        store = Store(run.settings)
        first, second = store.listing(found["model"]), store.listing(again)
        differ = sorted(name for name in first.keys() | second.keys() if first.get(name) != second.get(name))
        raise TrainingError(
            f"pack {run.pack.name}: trained twice with seed {run.pack.training.seed}, the model folders differ: "
            f"{', '.join(differ[:5])}",
            fix="draw every random number from job.seed, and write no times or paths into the folder",
        )
    return f"model {again.hash[:8]}"


def _predicts(run: Run, found: dict[str, Any]) -> str:
    found["predicted"], result = _score(run, found["rows"]["holdout"], found["model"])
    strings = [name for name, kind in found["inputs"].items() if kind == "string"]
    takes = count(len(found["inputs"]), "raw column")
    return f"{takes}, {len(strings)} of text, p95 {result.metrics['latency_p95_ms']:.1f} ms for one row"


def _is_judged(run: Run, found: dict[str, Any]) -> str:
    import numpy as np

    data, rules = run.pack.data, run.pack.gate
    holdout = found["rows"]["holdout"]
    for by in rules.columns:
        if by not in holdout.columns:
            raise EvaluationError(
                f"pack {run.pack.name}: the evaluation does not produce figures by {by!r}: no such column",
                fix=nearest(by, holdout.columns),
            )
    truth = holdout[data.target].to_numpy()
    produced = significance.intervals(
        data.task,
        truth,
        found["predicted"],
        np.arange(len(truth)),
        confidence=rules.primary.confidence,
        classes=found["classes"],
        metrics=rules.metrics(data.task),
    )
    return ", ".join(f"{name} {produced[name].value:.3f}" for name in sorted(rules.named))


LAWS: dict[str, Callable[[Run, dict[str, Any]], str]] = {
    "its source has rows for every window": _reads,
    "its expectations are known, and hold": _is_valid,
    "it trains on the CPU": _trains,
    "the same seed makes the same model": _repeats,
    "its model folder loads by itself, takes raw columns and leaves them as they are": _predicts,
    "every metric of its gate is produced": _is_judged,
}


def _sample(run: Run, ingested: Ingested) -> dict[str, pl.DataFrame]:
    """At most ROWS rows of each window, spread evenly; of each class in turn where there are classes."""
    import polars as pl

    data = run.pack.data
    manifest = manifest_of(Store(run.settings), ingested.manifest)
    found = {}
    for name in ("train", "validation", "holdout"):
        window = getattr(ingested.windows, name)
        store = Store(run.settings)
        rows = stacked([pl.read_parquet(store.path(part.object), glob=False) for part in manifest.within(window)])
        if data.task == "regression":
            found[name] = rows.gather_every(max(1, rows.height // ROWS)).head(ROWS)
        else:
            turn = pl.int_range(pl.len()).over(named(data.target))
            found[name] = rows.sort(turn, maintain_order=True).head(ROWS).sort(named(data.event_time))
    return found


def _train(run: Run, rows: dict[str, pl.DataFrame], attempt: str) -> tuple[jobs.JobResult, Ref]:
    pack = run.pack
    spec = job_spec(run, "train", f"check-{pack.name}-{attempt}", call=pack.training.call)
    spec = spec.model_copy(update={"gpus": 0, "timeout_s": 60.0})

    def fill(folder: Path) -> None:
        copy_python(pack, folder)
        for name in ("train", "validation"):
            (folder / name).mkdir()
            rows[name].write_parquet(folder / name / "rows.parquet")

    handle = jobs.start(run.settings, spec, fill)
    result = jobs.wait(handle)
    return result, Store(run.settings).put(handle.folder / "output" / "model")


def _score(run: Run, rows: pl.DataFrame, model: Ref) -> tuple[Any, jobs.JobResult]:
    spec = job_spec(run, "score", f"check-{run.pack.name}-score")

    def fill(folder: Path) -> None:
        Store(run.settings).checkout(model, folder / "model")
        (folder / "rows").mkdir()
        rows[[name for name in rows.columns if name != run.pack.data.target]].write_parquet(
            folder / "rows" / "rows.parquet"
        )

    handle = jobs.start(run.settings, spec, fill)
    result = jobs.wait(handle)
    return predictions_in(handle.folder / "output" / "predictions.parquet"), result
