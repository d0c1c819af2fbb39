"""Jobs: a folder in, a folder out, run by `evergreen.runner` in a process of its own that outlives the Airflow task.

The folder of a job, under `settings.jobs`:

    job.json            the JobSpec; written after `input/` is whole
    inputs.json         the size of each file of `input/`, so that a truncated folder is seen
    input/              what the job reads: `pack/` (the pack's Python) and, by kind,
                        train: `train/*.parquet`, `validation/*.parquet` (never a hold-out row)
                        score: `model/` (a model folder), `rows/*.parquet` (no target column), and `samples/*/` by which
                        importance is measured: `rows.parquet`, `sample.json`
    output/             what it leaves: `model/`, `predictions.parquet` with `samples/*.npy`, or `frames/*.arrow`;
                        `result.json` last, so that its existence is the proof
    checkpoint/         what a restarted job goes on from
    pid.json, lock      which process it is; see `runtimes/process.py`
    heartbeat           touched every second while the job lives
    progress.jsonl      a line for each report of progress
    log.txt             its standard output and error

A job never talks to Airflow, MLflow or the events database. Its id derives from what it does, so asking for a job that
was started before finds it: finished, alive, or dead with a checkpoint to go on from.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from pydantic import Field

from evergreen import errors
from evergreen.columns import named, series, stacked
from evergreen.errors import EvaluationError, EvergreenError, JobError, SourceError, TrainingError, nearest
from evergreen.run import Class, Hardware, Value, Window
from evergreen.settings import Settings
from evergreen.training.checkpoints import write_whole
from evergreen.training.runtimes import Runtime, docker, process

if TYPE_CHECKING:
    import polars as pl


class Container(Value):
    """What a job runs in, where it is not a process of this machine."""

    image: str
    """By digest, or by id."""
    memory_bytes: int
    cpus: float


class JobSpec(Value):
    """`job.json`: all that a job is told. Paths inside are relative to its folder, so that it can move."""

    id: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    kind: Literal["read", "train", "score"]
    pack: str
    call: str | None = None
    """`file:function` within `input/pack/`; none for `score`."""
    target: str
    event_time: str
    task: Literal["binary", "multiclass", "regression"]
    params: dict[str, Any] = Field(default_factory=dict)
    seed: int = 7
    gpus: Literal["auto"] | int = "auto"
    timeout_s: float
    window: Window | None = None
    """For `read`: which rows."""
    columns: dict[str, str] = Field(default_factory=dict)
    """For `train`: column → type over the whole snapshot."""
    container: Container | None = None
    """None: a process."""


class Progress(Value):
    """How far a job is."""

    step: int
    of: int
    metrics: dict[str, float]
    eta_s: float | None
    """Seconds left, by the pace of the last reports; None before the second one."""

    @property
    def fraction(self) -> float:
        return min(self.step / self.of, 1.0) if self.of else 0.0


class Failure(Value):
    """Why a job failed."""

    error: str
    """A class of `evergreen.errors`, or the type of whatever else escaped."""
    what: str
    fix: str | None = None
    """Of an EvergreenError."""
    where: tuple[str, ...] = ()
    """`file:line in function: code`, outermost first, within the pack's or the model's own files."""


class JobResult(Value):
    """`output/result.json`: how a job ended."""

    ok: bool
    failure: Failure | None = None
    duration_s: float
    """Of the process that ended, from its start."""
    hardware: Hardware
    inputs: dict[str, str] = Field(default_factory=dict)
    """`train`: raw column → type."""
    requirements: tuple[str, ...] = ()
    """`train`: pinned distributions of the model folder."""
    classes: tuple[Class, ...] | None = None
    """`train`: of a multiclass model, in the order of its predictions."""
    metrics: dict[str, float] = Field(default_factory=dict)
    """`train`: as last reported; `score`: rows, latency_p50_ms, latency_p95_ms; `read`: rows, frames."""
    notes: dict[str, str] = Field(default_factory=dict)
    """`score`: sample → why its importance is not known, or not of every column."""
    versions: dict[str, str] = Field(default_factory=dict)
    """Python's, Evergreen's and, for `train`, of the required distributions, local labels such as `+cpu` included."""
    files: dict[str, int] = Field(default_factory=dict)
    """Files of `output/` → bytes, without this one."""


@dataclass(frozen=True)
class Handle:
    """A job that was started, or found."""

    folder: Path
    spec: JobSpec
    found: Literal["absent", "dead", "alive", "finished"]
    """In which state `start` found it."""

    @property
    def output(self) -> Path:
        return self.folder / "output"


def _runtime(folder: Path) -> Runtime:
    """What runs the job in this folder; a folder that is not a job's yet has no container."""
    try:
        told = json.loads((folder / "job.json").read_bytes())
    except (OSError, ValueError):
        return process
    return docker if told.get("container") else process


def start(settings: Settings, spec: JobSpec, fill: Callable[[Path], None]) -> Handle:
    """See to it that the job runs, once: adopt it where it is finished or alive, otherwise start it.

    A dead job goes on from its checkpoint, on the inputs it has. One that never was, or whose folder is not whole, is
    given a new folder: `fill` puts what it reads into the empty folder it is handed. Two callers may ask at once.
    """
    folder = settings.jobs / spec.id
    with _claimed(folder):
        found = _state(folder, spec)
        if found == "finished":
            (folder / "job.json").touch()  # of use again, so not to be swept away now
        if found in ("absent", "dead"):
            _runtime(folder).stop(folder)  # what a killed job has left running
            if found == "absent":
                _fill(folder, spec, fill)
            shutil.rmtree(folder / "output", ignore_errors=True)
            _runtime(folder).launch(folder)
    sweep(settings, spec.pack)
    return Handle(folder=folder, spec=spec, found=found)


def wait(handle: Handle, on_progress: Callable[[Progress], None] | None = None) -> JobResult:
    """The result, when the job has ended; meanwhile its progress, as it comes.

    An interrupt ends the waiting, not the job. Raises what the job's function is to blame for (SourceError for `read`,
    TrainingError for `train`, EvaluationError for `score`), and JobError for a job that was killed or ran past its time.
    """
    folder, spec = handle.folder, handle.spec
    runtime = docker if spec.container else process
    shown = None
    ended = handle.found == "finished"
    while not ended:
        ended = runtime.join(folder, timeout_s=0.25)
        now = progress(folder)
        if on_progress and now and now != shown:
            on_progress(now)
            shown = now
        # The job ends itself in time; it cannot where it is stopped or stuck in native code.
        if not ended and runtime.age_s(folder) > spec.timeout_s + 30:
            runtime.stop(folder)
            raise JobError(
                f"the {spec.kind} job {spec.id} of {spec.pack} was stopped: it ran past {spec.timeout_s:g} s{_tail(folder)}",
                fix=MORE_TIME,
            )
    with _claimed(folder):
        if runtime.join(folder, timeout_s=0.0):  # nobody has started it again
            runtime.stop(folder)  # what its function may have left running
    if spec.container:
        _refuse_what_is_no_file(folder)
    result = read_result(folder)
    if result is None:
        if folder.exists() and shutil.disk_usage(folder).free < LITTLE_BYTES:
            raise JobError(
                f"the {spec.kind} job {spec.id} of {spec.pack} ended without a result: the disk of {folder} is full",
                fix="make room there, or set EVERGREEN_JOBS to a folder on a larger disk, then run again",
            )
        raise JobError(
            f"the {spec.kind} job {spec.id} of {spec.pack} ended without a result: it was killed, often for want of "
            f"memory, unless its log says otherwise{_tail(folder)}",
            fix="run again: a job that keeps checkpoints goes on from the last; give it more memory if it ends so again",
        )
    if result.failure is not None:
        raise _error(result.failure, folder, spec)
    return result


def _refuse_what_is_no_file(folder: Path) -> None:
    """Raise JobError for a link or a pipe that a job in a container left: whoever reads it may reach further than the job."""
    for path in folder.rglob("*"):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise JobError(
                f"{path} is neither a file nor a folder",
                fix="let the job leave files only, and nothing that leads elsewhere",
            )


def cancel(handle: Handle) -> None:
    """End the job and every process it started; its checkpoint stays."""
    _runtime(handle.folder).stop(handle.folder)


def cancel_all(settings: Settings) -> None:
    """End every job of this home on this machine; their checkpoints stay."""
    for told in sorted(settings.jobs.glob("*/job.json")):
        _runtime(told.parent).stop(told.parent)


def discard(settings: Settings, job_id: str) -> None:
    """Remove a job's folder, ending the job first if it lives."""
    folder = settings.jobs / job_id
    if folder.exists():
        with _claimed(folder):
            _runtime(folder).stop(folder)
            shutil.rmtree(folder)


KEPT_DONE_S = 7 * 86400
KEPT_S = 30 * 86400
USED = (".", "job.json", "heartbeat", "output/result.json")
"""What tells by its time when a job's folder was last of use."""


def sweep(settings: Settings, pack: str) -> None:
    """Remove what nobody came back for: folders of this pack's jobs, and those that never became a job's.

    A job that did its work is kept for KEPT_DONE_S since it was last of use; one that failed or was killed, whose log
    somebody may want to read, for KEPT_S. One that lives stays, and one that somebody is busy with.
    """
    for folder in settings.jobs.glob("*/"):
        if _is_over(folder, pack):
            with suppress(BlockingIOError, JobError), _claimed(folder, fcntl.LOCK_EX | fcntl.LOCK_NB):
                if _is_over(folder, pack) and not _runtime(folder).alive(folder):
                    shutil.rmtree(folder, ignore_errors=True)


def _is_over(folder: Path, pack: str) -> bool:
    """Whether a folder's time is over; one without a readable `job.json` is no other pack's."""
    used = [0.0]
    for name in USED:
        with suppress(OSError):
            used.append((folder / name).stat().st_mtime)
    idle_s = time.time() - max(used)
    if idle_s < KEPT_DONE_S:
        return False
    try:
        spec = JobSpec.model_validate_json((folder / "job.json").read_bytes())
    except (OSError, ValueError):
        return idle_s > KEPT_S
    result = read_result(folder)
    return spec.pack == pack and (idle_s > KEPT_S or (result is not None and result.ok))


def _no_link(path: str, flags: int) -> int:
    """Open a file that a living job may be putting something else in the place of: no link is followed, no pipe waited for."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)


def progress(folder: Path) -> Progress | None:
    """How far the job in `folder` is; None before its first report."""
    try:
        with open(folder / "progress.jsonl", "rb", opener=_no_link) as file:
            begin = max(0, file.seek(0, os.SEEK_END) - 8192)
            file.seek(begin)
            found = file.read().splitlines(keepends=True)
    except OSError:
        return None
    # The first may lack its beginning, the last its end.
    lines = [json.loads(line) for line in found[1 if begin else 0 :] if line.endswith(b"\n")]
    if not lines:
        return None
    first, last = lines[-20:][0], lines[-1]
    steps = last["step"] - first["step"]
    pace_s = (last["time"] - first["time"]) / steps if steps > 0 else None
    eta_s = None if pace_s is None else max(0.0, pace_s * (last["of"] - last["step"]))
    return Progress(step=last["step"], of=last["of"], metrics=last["metrics"], eta_s=eta_s)


def read_result(folder: Path) -> JobResult | None:
    """The result in a job's folder; None where there is none, or where an output it names is missing or truncated."""
    try:
        with open(folder / "output" / "result.json", "rb", opener=_no_link) as file:
            result = JobResult.model_validate_json(file.read())
    except (OSError, ValueError):
        return None
    return result if _holds(folder / "output", result.files) else None


def sizes(folder: Path) -> dict[str, int]:
    """Relative path → bytes of each file under `folder`."""
    return {str(file.relative_to(folder)): file.stat().st_size for file in sorted(folder.rglob("*")) if file.is_file()}


LITTLE_BYTES = 2**18
"""A disk that has no more is full."""
MORE_TIME = "raise training.timeout in pack.yaml, or give the job less to do; run again goes on from its checkpoint"


@contextmanager
def _claimed(folder: Path, how: int = fcntl.LOCK_EX) -> Iterator[None]:
    """Hold `folder`, made where it is missing, against every other caller on this machine; `how` as flock takes it."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            held = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:
            continue  # discarded since
        try:
            fcntl.flock(held, how)
            if _is_at(held, folder):
                yield
                return
        finally:
            os.close(held)


def _is_at(held: int, folder: Path) -> bool:
    """Whether the open folder is still the one at this path, not one discarded while we waited for it."""
    try:
        return os.path.samestat(os.fstat(held), folder.stat())
    except FileNotFoundError:
        return False


def _state(folder: Path, spec: JobSpec) -> Literal["absent", "dead", "alive", "finished"]:
    try:
        known = (folder / "job.json").read_bytes() == _told(spec)
        whole = known and _holds(folder / "input", json.loads((folder / "inputs.json").read_bytes()))
    except (OSError, ValueError):
        return "absent"
    if not whole:
        return "absent"
    result = read_result(folder)
    if result is not None and result.ok:
        return "finished"
    return "alive" if _runtime(folder).alive(folder) else "dead"


def _holds(folder: Path, expected: Mapping[str, int]) -> bool:
    """Whether each of these files is there with its size."""
    try:
        return all((folder / name).stat().st_size == size for name, size in expected.items())
    except FileNotFoundError:
        return False


def _fill(folder: Path, spec: JobSpec, fill: Callable[[Path], None]) -> None:
    """Make the folder anew; `job.json` comes last, so that a folder that has it is whole."""
    for entry in folder.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    part = folder / "input.part"
    part.mkdir()
    fill(part)
    part.rename(folder / "input")
    write_whole(folder / "inputs.json", json.dumps(sizes(folder / "input")).encode())
    write_whole(folder / "job.json", _told(spec))


def _told(spec: JobSpec) -> bytes:
    """`job.json` of this spec."""
    return json.dumps(
        spec.model_dump(mode="json", exclude={"container"} if spec.container is None else None),
        indent=1,
        sort_keys=True,
    ).encode()


def _tail(folder: Path) -> str:
    """The last lines of the job's log and its path, to end a message with."""
    log = folder / "log.txt"
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-8:]
    except OSError:
        lines = []
    return "".join([f"; log: {log}"] + [f"\n  | {line[:200]}" for line in lines])


def _error(failure: Failure, folder: Path, spec: JobSpec) -> EvergreenError:
    """The failure as an error of ours: its own class where it has one, else that of the job's kind."""
    where = f" ({failure.where[-1]})" if failure.where else ""
    own = getattr(errors, failure.error, None)
    if failure.fix is not None and isinstance(own, type) and issubclass(own, EvergreenError):
        return own(failure.what + where, fix=failure.fix)
    kind = {"read": SourceError, "train": TrainingError, "score": EvaluationError}[spec.kind]
    lines = "".join(f"\n  {line}" for line in failure.where[-3:])
    return kind(
        f"{spec.pack}: {spec.call or 'the model'} failed: {failure.error}: {failure.what[:500]}{lines}",
        fix=f"mend {'the line above' if lines else 'the function'}; the whole traceback: {folder / 'log.txt'}",
    )


class TrainingData:
    """What a training function may look at: the training and the validation window, as polars frames."""

    def __init__(self, folder: Path, *, target: str, event_time: str, task: str) -> None:
        self.folder = folder
        self.target = target
        self.event_time = event_time
        self.task = task

    @cached_property
    def train(self) -> pl.DataFrame:
        """Rows of the training window, target included, in order of time."""
        return _read(self.folder / "train", self.event_time)

    @cached_property
    def validation(self) -> pl.DataFrame:
        """Rows of the validation window: the only ones to stop early or to choose by."""
        return _read(self.folder / "validation", self.event_time)

    @property
    def features(self) -> list[str]:
        """Columns that are neither target nor event time."""
        return [name for name in self.train.columns if name not in (self.target, self.event_time)]


class Checkpoint(Protocol):
    """Where a training function keeps what it needs to go on after a kill (`evergreen.training.checkpoints`)."""

    def save(self, step: int, tensors: Mapping[str, Any], state: Mapping[str, Any]) -> None:
        """Keep tensors (safetensors) and JSON state, atomically; the last one wins."""

    def load(self) -> tuple[int, dict[str, Any], dict[str, Any]] | None:
        """The last (step, tensors, state) that was kept whole, or None."""


@dataclass
class Job:
    """What a training function is handed beside its data."""

    params: Mapping[str, Any]
    seed: int
    device: str
    """`cpu` or `cuda`."""
    model_dir: Path
    """Leave the model folder here: `loader.py` and its data; no pickle."""
    checkpoint: Checkpoint
    folder: Path
    columns: Mapping[str, str] = field(default_factory=dict)
    """Column → type over the whole snapshot, as far as it is known."""
    inputs: dict[str, str] | None = field(default=None, init=False)
    requirements: tuple[str, ...] | None = field(default=None, init=False)
    classes: tuple[Class, ...] | None = field(default=None, init=False)
    metrics: dict[str, float] = field(default_factory=dict, init=False)
    """What was reported last."""
    _written: tuple[int, float] | None = field(default=None, init=False, repr=False)
    """The thousandth of the work and the time (monotonic, s) of the last line written."""

    def progress(self, step: int, of: int, **metrics: float) -> None:
        """Report step `step` of `of` (the first is 1) and what was measured: shown live, kept as the training curve.

        Cheap enough for every batch: a line is written for each thousandth of the work, and at least ten a second.
        Raises TrainingError when a metric is NaN or infinite.
        """
        self.metrics = {name: float(value) for name, value in metrics.items()}
        for name, value in self.metrics.items():
            if not math.isfinite(value):
                raise TrainingError(
                    f"{'NaN' if math.isnan(value) else 'infinite'} {name} at step {step} of {of}",
                    fix="lower the learning rate, and look for empty or very large values in the input columns",
                )
        now, thousandth = time.monotonic(), step * 1000 // max(of, 1)
        if self._written is None:
            _forget_from(self.folder / "progress.jsonl", step)
        elif thousandth <= self._written[0] and step < of and now - self._written[1] < 0.1:
            return
        self._written = (thousandth, now)
        line = {"step": int(step), "of": int(of), "time": round(time.time(), 3), "metrics": self.metrics}
        with (self.folder / "progress.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def describe(
        self, *, inputs: Sequence[str], requirements: Sequence[str], classes: Sequence[Any] | None = None
    ) -> None:
        """State the raw columns that the model takes, the distributions that its `loader.py` imports, and its classes.

        `classes`: of a multiclass model, one for each column of its predictions, in their order. Without this call: all
        columns but the target, numpy and pandas, and the sorted values of the target in the training window. Types are
        those of the snapshot, versions those that are installed. Raises TrainingError for a column or a
        distribution that is not there, and for classes that are not distinct bools, numbers or texts.
        """
        for name in inputs:
            if name not in self.types:
                raise TrainingError(
                    f"describe(inputs=…): the data has no column {name!r}", fix=nearest(name, self.types)
                )
        self.inputs = {name: self.types[name] for name in inputs}
        self.requirements = tuple(sorted(pinned(name) for name in requirements))
        self.classes = None if classes is None else classes_as_json(classes)

    @cached_property
    def types(self) -> dict[str, str]:
        """Column → type of the training rows. A column's type over the snapshot wins: here it may have no value."""
        types = column_types(self.folder / "input" / "train")
        return {name: self.columns.get(name, kind) for name, kind in types.items()}


def classes_as_json(classes: Sequence[Any]) -> tuple[Class, ...]:
    """The classes as JSON holds them, numpy's scalars among them. Raises TrainingError for others, and for repeated ones."""
    plain = tuple(each.item() if hasattr(each, "item") else each for each in classes)
    for each in plain:
        if not isinstance(each, bool | int | float | str) or (isinstance(each, float) and not math.isfinite(each)):
            raise TrainingError(
                f"the class {str(each)[:80]!r} is a {type(each).__name__}; a class is a bool, a number or a text",
                fix="write the target as text where the rows are read, and leave out rows without one",
            )
    if len(set(plain)) < len(plain):
        again = next(each for place, each in enumerate(plain) if each in plain[:place])
        raise TrainingError(
            f"the class {str(again)[:80]!r} is there twice",
            fix="give each column of the predictions a class of its own",
        )
    return plain


def pinned(distribution: str) -> str:
    """`numpy==2.4.6`: the distribution at its installed version, without a local label such as `+cpu`."""
    try:
        version = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        raise TrainingError(
            f"describe(requirements=…): no distribution {distribution!r} is installed",
            fix="give its name alone, as pip knows it (scikit-learn, not sklearn), or install it",
        ) from None
    return f"{distribution}=={version.partition('+')[0]}"


def column_types(folder: Path) -> dict[str, str]:
    """Column → canonical type (bool, int, float, string, datetime, date, null) of the Parquet files in `folder`."""
    import polars as pl

    empty = [
        pl.DataFrame(schema=pl.scan_parquet(file, glob=False).collect_schema())
        for file in sorted(folder.glob("*.parquet"))
    ]
    return {name: _canonical(kind) for name, kind in stacked(empty).schema.items()}


def _canonical(kind: pl.DataType) -> str:
    import polars as pl

    if kind.is_integer():
        return "int"
    if kind.is_float() or kind.is_decimal():
        return "float"
    names = {pl.Boolean: "bool", pl.Date: "date", pl.Datetime: "datetime", pl.Null: "null"}
    return names.get(kind.base_type(), "string")


def _forget_from(file: Path, step: int) -> None:
    """Drop the lines from `step` on: a restarted job does those steps again."""
    if not file.exists():
        return
    kept = []
    for line in file.read_text(encoding="utf-8").splitlines(keepends=True):
        if not line.endswith("\n") or json.loads(line)["step"] >= step:
            break
        kept.append(line)
    part = file.with_suffix(".part")
    part.write_text("".join(kept), encoding="utf-8")
    part.replace(file)


def _read(folder: Path, event_time: str) -> pl.DataFrame:
    import polars as pl

    frames = [pl.read_parquet(file, glob=False) for file in sorted(folder.glob("*.parquet"))]
    rows = stacked(frames)
    if series(rows, event_time).is_sorted():  # a sorted copy of a wide table may not fit beside it
        return rows
    return rows.sort(named(event_time), maintain_order=True)
