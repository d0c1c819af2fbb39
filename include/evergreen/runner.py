"""The job's entry: `python -m evergreen.runner JOB_DIR` does what the folder's `job.json` says, and ends.

It reads nothing but the folder, and talks to nobody: what became of it is `output/result.json`, written last. A job
ends itself when its time is up, for nobody may be there to do it.
"""

from __future__ import annotations

import faulthandler
import importlib.metadata
import importlib.util
import itertools
import json
import mmap
import os
import pickletools
import platform
import random
import shutil
import signal
import sys
import threading
import time
import traceback
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn

from evergreen import columns
from evergreen.data.partitions import require_unrounded
from evergreen.errors import EvaluationError, EvergreenError, PackError, SourceError, TrainingError, nearest
from evergreen.run import Class, Hardware, count
from evergreen.training import devices
from evergreen.training.checkpoints import FolderCheckpoint, write_whole
from evergreen.training.jobs import (
    MORE_TIME,
    Failure,
    Job,
    JobResult,
    JobSpec,
    TrainingData,
    classes_as_json,
    pinned,
    sizes,
)
from evergreen.training.runtimes import process

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    import pyarrow as pa

PICKLES = frozenset([".pkl", ".pickle", ".pt", ".pth", ".joblib"])


def main() -> NoReturn:
    """Run the job in the folder that the command line names; the exit status says whether it succeeded."""
    started = time.monotonic()
    folder = Path(sys.argv[1]).resolve()
    process.record(folder, os.getpid())
    os.chdir(folder)
    spec = JobSpec.model_validate_json((folder / "job.json").read_bytes())
    (folder / "output").mkdir(exist_ok=True)
    faulthandler.enable()
    ending = _watch(folder, spec, started)
    result = run(folder, spec, started)
    with ending:
        _leave(folder, result)
        # Not sys.exit: a thread or an exit handler of the pack's libraries must not keep a finished job waiting.
        os._exit(0 if result.ok else 1)


def run(folder: Path, spec: JobSpec, started: float) -> JobResult:
    """Do the job; whatever escapes its function is the result's failure. `started` is of the monotonic clock, in s."""
    device = "cpu"
    result: dict[str, Any] = {}
    try:
        if spec.kind == "train":
            device = devices.resolve(spec.gpus)
            result = train(folder, spec, device)
        else:
            result = {"read": read, "score": score}[spec.kind](folder, spec)
    except BaseException as error:  # noqa: BLE001  SystemExit and the like from a pack are failures too
        traceback.print_exc()
        result["failure"] = _failure(folder, spec, error)
    return JobResult(
        ok="failure" not in result,
        duration_s=round(time.monotonic() - started, 3),
        hardware=devices.hardware(device),
        versions=_versions(result.get("requirements", ())),
        files=sizes(folder / "output"),
        **result,
    )


def read(folder: Path, spec: JobSpec) -> dict[str, Any]:
    """`read`: the frames that the pack's function yields, as Arrow files `output/frames/00000.arrow` and so on."""
    function = _function(folder / "input" / "pack", spec)
    frames = folder / "output" / "frames"
    frames.mkdir()
    yielded = function(spec.window)
    if not isinstance(yielded, Iterable):
        raise SourceError(
            f"{spec.call} returned {type(yielded).__name__}", fix="yield polars, pandas or pyarrow frames"
        )
    rows = number = 0
    for number, frame in enumerate(yielded, start=1):
        rows += _write_frame(frame, frames / f"{number - 1:05d}.arrow", spec)
    return {"metrics": {"rows": rows, "frames": number}}


def train(folder: Path, spec: JobSpec, device: str) -> dict[str, Any]:
    """`train`: the model folder that the pack's function leaves, checked and described in its `model.json`."""
    import numpy as np

    function = _function(folder / "input" / "pack", spec)
    model = folder / "output" / "model"
    model.mkdir()
    job = Job(
        columns=spec.columns,
        params=spec.params,
        seed=spec.seed,
        device=device,
        model_dir=model,
        checkpoint=FolderCheckpoint(folder / "checkpoint"),
        folder=folder,
    )
    random.seed(spec.seed)
    np.random.seed(spec.seed)  # noqa: NPY002  packs and scikit-learn draw from the global generator
    function(TrainingData(folder / "input", target=spec.target, event_time=spec.event_time, task=spec.task), job)
    inputs = job.inputs or {name: kind for name, kind in job.types.items() if name != spec.target}
    if spec.target in inputs:
        raise TrainingError(
            f"describe(inputs=…): the model takes {spec.target!r}, the target", fix="leave it out: no client knows it"
        )
    described: dict[str, Any] = {
        "task": spec.task,
        "inputs": inputs,
        "dtypes": "nullable",
        "requirements": job.requirements or (pinned("numpy"), pinned("pandas")),
    }
    if (classes := _classes(folder / "input" / "train", job, spec)) is not None:
        described["classes"] = classes
    check_model_folder(model, folder)
    (model / "model.json").write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
    return {
        **{name: value for name, value in described.items() if name not in ("task", "dtypes")},
        "metrics": job.metrics,
    }


def _classes(rows: Path, job: Job, spec: JobSpec) -> tuple[Class, ...] | None:
    """The classes that the function stated; else, of a multiclass target, the sorted values in the training window."""
    if spec.task != "multiclass":
        if job.classes is not None:
            raise TrainingError(
                f"describe(classes=…): data.task is {spec.task}",
                fix="leave it out: only a multiclass model has classes",
            )
        return None
    if job.classes is not None:
        return job.classes
    files = [columns.read(file, [spec.target]) for file in sorted(rows.glob("*.parquet"))]
    values = columns.series(columns.stacked(files), spec.target).drop_nulls()
    return classes_as_json((values.drop_nans() if values.dtype.is_float() else values).unique().sort().to_list())


def check_model_folder(model: Path, job_folder: Path) -> None:
    """Hold a model folder to its laws, `__pycache__` removed first. Raises TrainingError naming the file.

    It has `loader.py`, nothing in it unpickles, and no file speaks of the job's folder, which is gone tomorrow.
    """
    for cache in list(model.rglob("__pycache__")):
        shutil.rmtree(cache)
    if not (model / "loader.py").is_file():
        raise TrainingError(
            f"the training function left no loader.py in job.model_dir ({_names(model)})",
            fix="write one there with load(folder) returning an object that has predict(frame)",
        )
    for file in sorted(file for file in model.rglob("*") if file.is_file()):
        name = file.relative_to(model)
        if file.is_symlink():
            raise TrainingError(f"{name} of the model folder is a link", fix="put the file itself there")
        if file.suffix in PICKLES or _unpickles(file):
            raise TrainingError(
                f"{name} of the model folder is a pickle: loading it would run whatever it holds",
                fix="keep weights as safetensors, ONNX or skops, and the rest as JSON",
            )
        if _mentions(file, os.fsencode(job_folder)):
            raise TrainingError(
                f"{name} of the model folder names {job_folder}, which is gone when the model is used",
                fix="keep no absolute path: loader.py is handed the folder it lies in",
            )


FRAME_CELLS = 2**25
"""Values in one frame of rows to predict. Rows of a wide table are predicted in several frames, those of others in one."""
SAMPLE_BYTES = 2**32
"""Predictions kept of one sample, for want of disk."""


def score(folder: Path, spec: JobSpec) -> dict[str, Any]:
    """`score`: the model's predictions for all rows, and how long it takes for single ones.

    `output/predictions.parquet` has the column `prediction`, or `prediction_0` … `prediction_<k-1>` for k classes, in
    the order of the rows. Latencies are of predicting a frame of one row, in ms. `input/samples/<name>` are the samples
    by which importance is measured: see `_permuted`. Raises EvaluationError when the predictions are not what the task
    asks for.
    """
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    started = time.monotonic()
    model = _import(folder / "input" / "model" / "loader.py").load(folder / "input" / "model")
    classes = _stated_classes(folder / "input" / "model")
    to_frame = _to_frame(folder / "input" / "model", spec)
    frames = _frames(sorted((folder / "input" / "rows").glob("*.parquet")), to_frame)
    first = next(frames)
    _leaves_as_it_is(model, first.head(64), spec)
    predicted = [
        checked_predictions(model.predict(frame), len(frame), spec, classes)
        for frame in itertools.chain([first], frames)
    ]
    values = np.concatenate(predicted)
    columns = (
        {"prediction": values}
        if values.ndim == 1
        else {f"prediction_{k}": values[:, k] for k in range(values.shape[1])}
    )
    pq.write_table(pa.table(columns), folder / "output" / "predictions.parquet")
    latency = _latency_ms(model, first)  # before the samples, which must not touch it
    del first
    samples = sorted((folder / "input" / "samples").glob("*"))
    notes = {}
    for place, sample in enumerate(samples):
        left_s = started + 0.9 * spec.timeout_s - time.monotonic()
        if (
            note := _permuted(model, sample, folder / "output", spec, left_s / (len(samples) - place), to_frame)
        ) is not None:
            notes[sample.name] = note
    return {"metrics": {"rows": len(values), **latency}, "notes": notes}


def _to_frame(model: Path, spec: JobSpec) -> Callable[[pa.Table, int], pd.DataFrame]:
    """Return the function that turns rows into a frame of the types that the model folder declares.

    It takes the number of the first row for messages, and raises EvaluationError for a value that does not fit.
    """
    from evergreen import conversion

    file = model / "model.json"
    described = json.loads(file.read_bytes()) if file.is_file() else {"inputs": {}}

    def to_frame(table: pa.Table, first_row: int) -> pd.DataFrame:
        try:
            return conversion.from_arrow(table, described, first_row=first_row)
        except conversion.ConversionError as error:
            raise EvaluationError(
                f"the model of {spec.pack} cannot take the rows: {error.what}", fix=error.fix
            ) from error

    return to_frame


def _frames(files: Sequence[Path], to_frame: Callable[[pa.Table, int], pd.DataFrame]) -> Iterator[pd.DataFrame]:
    """The rows of Parquet files, in frames of whole files and about `FRAME_CELLS` values at most; at least one frame."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.unify_schemas([pq.read_schema(file) for file in files], promote_options="permissive")
    tables: list[pa.Table] = []
    first_row = 0
    for place, file in enumerate(files, start=1):
        tables.append(pq.ParquetFile(file).read())
        cells = sum(table.num_rows for table in tables) * len(schema)
        if cells >= FRAME_CELLS or place == len(files):
            # Every frame has the types that the columns have over all files.
            whole = pa.concat_tables([schema.empty_table(), *tables], promote_options="permissive")
            tables = []
            yield to_frame(whole, first_row)
            first_row += whole.num_rows


def _permuted(
    model: Any,
    sample: Path,
    output: Path,
    spec: JobSpec,
    left_s: float,
    to_frame: Callable[[pa.Table, int], Any],
) -> str | None:
    """Predict a sample's rows as they are, and with the values of one column permuted at a time.

    `sample` has `rows.parquet` and `sample.json`: the columns, the place of each row's partner, and the time that may be
    taken. `output/samples/<name>.npy` gets one array after another: the predictions for the rows as they are, then for
    each column in turn with the partners' values in it; an empty array where the model fails. So memory holds one frame
    and its original, whatever the number of columns. Return why columns are missing; None where none is.
    """
    import numpy as np
    import pyarrow.parquet as pq

    told = json.loads((sample / "sample.json").read_bytes())
    budget_s = min(told["budget_s"], left_s)
    ends = time.monotonic() + budget_s
    (output / "samples").mkdir(exist_ok=True)
    with (output / "samples" / f"{sample.name}.npy").open("wb") as file:
        try:
            original = to_frame(pq.ParquetFile(sample / "rows.parquet").read(), 0)
            rows = original.copy()
            partners = np.array(told["partners"], dtype=np.int64)
            np.save(file, checked_predictions(model.predict(rows), len(rows), spec), allow_pickle=False)
        except Exception as error:  # noqa: BLE001  no run fails for want of importance
            return f"the model fails on a sample of the rows: {_short(error)}"
        why = None
        for name in told["columns"]:
            if time.monotonic() >= ends:
                why = f"the {budget_s:.0f} s that it may take were used up"
                break
            if file.tell() > SAMPLE_BYTES:
                why = f"its predictions reached {SAMPLE_BYTES / 2**30:.0f} GiB"
                break
            place = original.columns.get_loc(name)
            values = original.iloc[:, place].array
            rows.isetitem(place, values.take(partners))
            try:
                predicted = checked_predictions(model.predict(rows), len(rows), spec)
            except Exception as error:  # noqa: BLE001  shuffled rows are rows that never were: models may refuse them
                why = f"the model fails where {name[:80]!r} is shuffled: {_short(error)}"
                predicted = np.empty(0)
            if not rows.columns.equals(original.columns):
                break
            np.save(file, predicted, allow_pickle=False)
            rows.isetitem(place, values.copy())
        if not rows.equals(original):  # what one column's turn left would stand in the next one's
            file.truncate(0)
            return "the model changes the frame that it predicts from"
    return why


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _stated_classes(model: Path) -> list[Class] | None:
    """The classes that a model folder states; None of one that states none, as older ones do."""
    file = model / "model.json"
    stated: list[Class] | None = json.loads(file.read_bytes()).get("classes") if file.is_file() else None
    return stated


def checked_predictions(
    predictions: Any, rows: int, spec: JobSpec, classes: Sequence[Class] | None = None
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Predictions as floats of shape (rows,), or (rows, k) for classes; EvaluationError where they are not.

    `classes`: those of the model, where they are known: then k must be their number.
    """
    import numpy as np

    values = np.asarray(predictions, dtype=np.float64)
    if values.shape[:1] != (rows,):
        found = count(values.shape[0], "prediction") if values.ndim else "a single number"
        raise EvaluationError(
            f"the model of {spec.pack} returned {found} for {count(rows, 'row')}",
            fix="make predict(frame) of its loader.py return one prediction for each row of the frame",
        )
    if values.ndim != (2 if spec.task == "multiclass" else 1):
        wanted = "(rows, classes)" if spec.task == "multiclass" else "(rows,)"
        raise EvaluationError(
            f"the model of {spec.pack} returned predictions of shape {values.shape}",
            fix=f"make predict(frame) of its loader.py return shape {wanted}, as data.task {spec.task} asks for",
        )
    if classes is not None and values.shape[1] != len(classes):
        raise EvaluationError(
            f"the model of {spec.pack} returned {count(values.shape[1], 'column')}, and it has {len(classes)} classes",
            fix="make predict(frame) of its loader.py return a probability for each of its classes, in their order; "
            "job.describe(classes=…) states which they are",
        )
    wrong = ~np.isfinite(values)
    if spec.task != "regression":
        wrong |= (values < 0) | (values > 1)
    if wrong.any():
        row = int(np.argwhere(wrong)[0][0])
        raise EvaluationError(
            f"the model of {spec.pack} returned {values[wrong][0]} for row {row}, and {int(wrong.sum())} such values in all",
            fix="predictions are finite; for binary and multiclass they are probabilities, 0 to 1",
        )
    return values


def _latency_ms(model: Any, frame: pd.DataFrame) -> dict[str, float]:
    """p50 and p95 over 200 single rows, spread over the frame, after 30 to warm up; fewer when they take over 10 s.

    A row counts with the fastest of three tries: what the model takes, not what its neighbours on the machine take.
    """
    import numpy as np

    spread = np.linspace(0, len(frame) - 1, num=230).astype(int)
    fastest: list[float] = []
    begun = time.perf_counter()
    for position in np.roll(spread, 30):
        row = frame.iloc[[position]]
        tries = []
        for _ in range(3):
            before = time.perf_counter()
            model.predict(row)
            tries.append((time.perf_counter() - before) * 1000)
        fastest.append(min(tries))
        if before - begun > 10:
            break
    p50, p95 = np.percentile(fastest[30:] or fastest, [50, 95])
    return {"latency_p50_ms": round(float(p50), 4), "latency_p95_ms": round(float(p95), 4)}


def _leaves_as_it_is(model: Any, frame: pd.DataFrame, spec: JobSpec) -> None:
    """Raise EvaluationError when predicting changes the frame that it is given."""
    given = frame.copy()
    model.predict(given)
    if not given.equals(frame):
        changed = [name for name in frame.columns if name not in given or not given[name].equals(frame[name])]
        raise EvaluationError(
            f"the model of {spec.pack} changes the frame it predicts from: {', '.join(changed[:5]) or 'new columns'}",
            fix="work on a copy in predict(frame) of its loader.py: frame = frame.copy()",
        )


def _write_frame(frame: Any, file: Path, spec: JobSpec) -> int:
    """Write a frame of polars, pandas or pyarrow as an Arrow file; its number of rows."""
    library = type(frame).__module__.partition(".")[0]
    if library == "polars" and hasattr(frame, "write_ipc"):
        import polars as pl

        frame.write_ipc(file, compat_level=pl.CompatLevel.oldest())
        return int(frame.height)
    import pyarrow as pa

    if library == "pandas" and hasattr(frame, "columns"):
        require_unrounded(frame, f"{spec.call}: frame {int(file.stem) + 1}")
        frame = pa.Table.from_pandas(frame, preserve_index=False)
    if isinstance(frame, pa.RecordBatch):
        frame = pa.Table.from_batches([frame])
    if not isinstance(frame, pa.Table):
        raise SourceError(
            f"{spec.call} yielded {type(frame).__module__}.{type(frame).__name__}",
            fix="yield polars, pandas or pyarrow frames",
        )
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, frame.schema) as writer:
        writer.write_table(frame)
    return int(frame.num_rows)


def _function(pack: Path, spec: JobSpec) -> Callable[..., Any]:
    """The function of the pack that the job calls. Raises PackError when the file has none of that name."""
    assert spec.call is not None
    module_name, _, name = spec.call.partition(":")
    sys.path.insert(0, str(pack))  # a pack's files may import one another
    module = _import(pack / f"{module_name}.py")
    function = getattr(module, name, None)
    if not callable(function):
        own = [key for key, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
        raise PackError(f"{spec.pack}/{module_name}.py has no function {name!r}", fix=nearest(name, own))
    return function  # type: ignore[no-any-return]


def _import(file: Path) -> ModuleType:
    """The module in `file`, under its own name unless that is taken."""
    name = file.stem if file.stem not in sys.modules else f"pack_{file.stem}"
    found = importlib.util.spec_from_file_location(name, file)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module
    found.loader.exec_module(module)
    return module


def _unpickles(file: Path) -> bool:
    """Whether the file starts as a pickle of protocol 2 or later does, or is a zip that holds one."""
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            return any(Path(name).suffix in PICKLES for name in archive.namelist())
    with file.open("rb") as stream:
        head = stream.read(2)
        if head[:1] != b"\x80" or not 2 <= head[-1] <= 5:
            return False
        stream.seek(0)
        try:  # a safetensors file may begin with the same two bytes, but not with three instructions
            instructions = pickletools.genops(stream)
            return all(next(instructions, None) is not None for _ in range(3))
        except ValueError:
            return False


def _mentions(file: Path, text: bytes) -> bool:
    if file.stat().st_size == 0:
        return False
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(text) >= 0


def _names(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir())
    return ", ".join(names[:5]) + (" …" if len(names) > 5 else "") if names else "it is empty"


def _failure(folder: Path, spec: JobSpec, error: BaseException) -> Failure:
    """What escaped, and where in the pack's or the model's files."""
    frames = list(_own_frames(folder, spec, error))
    if isinstance(error, EvergreenError):
        return Failure(error=type(error).__name__, what=error.what, fix=error.fix, where=tuple(frames[-3:]))
    return Failure(error=type(error).__name__, what=str(error), where=tuple(frames[-3:]))


def _own_frames(folder: Path, spec: JobSpec, error: BaseException) -> Iterator[str]:
    places = {folder / "input" / "pack": spec.pack, folder / "input" / "model": f"the model of {spec.pack}"}
    stack = [
        (frame.filename, frame.lineno, f" in {frame.name}", frame.line)
        for frame in traceback.extract_tb(error.__traceback__)
    ]
    if isinstance(error, SyntaxError) and error.filename:
        stack.append((error.filename, error.lineno, "", (error.text or "").strip()))
    for filename, line, function, code in stack:
        for place, name in places.items():
            if Path(filename).is_relative_to(place):
                yield f"{name}/{Path(filename).relative_to(place)}:{line}{function}: {code}"


def _versions(requirements: Iterable[str]) -> dict[str, str]:
    versions = {"python": platform.python_version(), "evergreen": importlib.metadata.version("evergreen-training")}
    return versions | {
        name: importlib.metadata.version(name) for name in (text.partition("==")[0] for text in requirements)
    }


def _watch(folder: Path, spec: JobSpec, started: float) -> threading.Lock:
    """Touch `heartbeat` every second, and end the job when its time is up or its folder is gone.

    Whoever ends the job holds the lock that is returned, so that there is one result.
    """
    ending = threading.Lock()
    (folder / "heartbeat").touch()

    def beat() -> None:
        while True:
            left_s = started + spec.timeout_s - time.monotonic()
            time.sleep(min(1.0, max(left_s, 0.0)))
            try:
                os.utime(folder / "heartbeat")
            except FileNotFoundError:
                _end_all()
            if left_s <= 0:
                with ending:
                    faulthandler.dump_traceback()
                    _leave(folder, _late(spec))
                    _end_all()

    threading.Thread(target=beat, daemon=True).start()
    # The thread cannot act while native code holds the interpreter; this timer can.
    faulthandler.dump_traceback_later(spec.timeout_s + 10, exit=True)
    return ending


def _late(spec: JobSpec) -> JobResult:
    failure = Failure(
        error="JobError",
        what=f"the {spec.kind} job {spec.id} of {spec.pack} ran past its {spec.timeout_s:g} s",
        fix=MORE_TIME,
    )
    return JobResult(
        ok=False, failure=failure, duration_s=spec.timeout_s, hardware=Hardware(device="cpu", name="unknown")
    )


def _leave(folder: Path, result: JobResult) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    write_whole(folder / "output" / "result.json", result.model_dump_json(indent=1).encode())


def _end_all() -> None:
    """End this process and, where it leads its own session, all that it started."""
    if os.getsid(0) == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


if __name__ == "__main__":
    main()
