"""Trials that kill the process of a stage, or let two race: run as a script, which prints one JSON line.

    killed.py TRIALS    a JSON list of trials, each of [FOLDER, START, TRIAL, …]:

    points [POINT …]    what START names is killed just before each call that begins so (before every one where none is named),
                        each time from the same start, and performed again
    row POINT …         one run, killed before each of these calls in turn
    adopted             the waiting process is killed while its training job is at work
    race RUN RUN        two processes perform runs of these ids at once
    back [POINT …]      a rollback is killed just before each of these calls, or before every one, and asked for again
    prune [POINT …]     one removal, killed before each of these calls in turn, or before every one that it makes

`first` is the pack's first run ever; `next` finds a champion that an earlier run made, `two` a second one; `rejected`
has a version between two champions that the gate rejected. `shift` is a look of the monitor that alerts, up to the
alert's being posted; `fault` is one at data that `validate` refuses; `fall` is one that sees a champion on probation
fail, and takes it back. A point is `stage/call/n`:
the n-th such call within the stage. The script imports what stages need once and then forks; it opens nothing itself, since
neither SQLite's connections nor polars' threads survive a fork.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import shutil
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from conftest import (
    AS_OF,
    DAYS,
    LATER,
    MORE,
    NAME,
    RULES,
    SCHEDULED,
    Home,
    fallen,
    new_truth,
    perform_stage,
    reject,
)
from dvc_objects.db import ObjectDB
from fastapi import FastAPI
from mlflow import MlflowClient
from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository
from tests.served import nobody, serving
from tests.servers import free_port

from evergreen import database as db
from evergreen import keys, looks, work
from evergreen.data import repository, store
from evergreen.database import Database
from evergreen.errors import EvergreenError
from evergreen.history import history_of
from evergreen.loop import probation, rollback
from evergreen.loop import prune as pruning
from evergreen.loop.monitor import Watched, monitor, tell
from evergreen.registry import ledger, promotion
from evergreen.run import Value
from evergreen.stages import CHAIN
from evergreen.training import jobs
from evergreen.training.runtimes import process
from evergreen.triggers import inbox, senders, signatures, webhook

for library in ("dvc.config", "dvc.fs", "matplotlib.pyplot", "mlflow.pyfunc", "polars", "pyarrow.dataset"):
    importlib.import_module(library)  # so that no child pays for it

RUN = "scheduled__2024-01-13T00:00:00+00:00"
WRITES = (
    "create_experiment",
    "create_run",
    "log_artifacts",
    "create_logged_model",
    "log_model_artifacts",
    "finalize_logged_model",
    "log_outputs",
    "log_inputs",
    "log_batch",
    "create_registered_model",
    "create_model_version",
    "log_text",
    "set_model_version_tag",
    "set_logged_model_tags",
    "set_terminated",
    "update_model_version",
    "set_registered_model_alias",
    "delete_registered_model_alias",
    "delete_model_version_tag",
    "delete_tag",
)
"""What changes the registry."""
CALLS = (
    (Database, ("append",)),
    (store.Store, ("put", "put_json", "put_bytes", "push", "commit")),
    (repository, ("_git",)),
    (looks, ("write_whole",)),
    (jobs, ("start", "wait", "discard")),
    (process, ("launch",)),
    (MlflowClient, WRITES),
    (LocalArtifactRepository, ("delete_artifacts",)),
    (ObjectDB, ("delete",)),
    (signatures, ("post",)),
    (inbox, ("keep",)),
)
LOOKS = ("shift", "fault", "fall")
IMPOSSIBLE = {"expect_column_mean_to_be_between": {"column": "wind", "min_value": 5, "max_value": 6}}
DAY = timedelta(days=1)
GONE = ("pruned", "retention")
LONG_AFTER = datetime(2100, 1, 1, tzinfo=UTC)
WAITS = "    for step in range(1, job.params"


class Watch:
    """Counts the calls of a process, and kills it before the one called `point`."""

    def __init__(self, point: str | None) -> None:
        self.point = point
        self.stage = "begin"
        self.met: list[str] = []
        for owner, names in CALLS:
            for name in names:
                setattr(owner, name, self.watched(getattr(owner, name), name))

    def watched(self, call: Callable[..., Any], name: str) -> Callable[..., Any]:
        @functools.wraps(call)
        def watched(*arguments: Any, **more: Any) -> Any:
            # What is appended is the second argument, the command of git the first.
            shown = {"append": f"append {arguments[2:3]}", "_git": f"git {arguments[:1]}"}.get(name, name)
            self.meet(shown.translate(str.maketrans("", "", chr(39) + "(),")))
            return call(*arguments, **more)

        return watched

    def meet(self, what: str) -> None:
        """Die here, if this is the point."""
        label = f"{self.stage}/{what}"
        label += f"/{Counter(met.rpartition('/')[0] for met in self.met)[label] + 1}"
        self.met.append(label)
        if label == self.point:
            os.kill(os.getpid(), signal.SIGKILL)


def perform(home: Home, run_id: str = RUN, point: str | None = None, state: Path | None = None) -> None:
    """The chain from the first stage on; then the state is written down."""
    watch = Watch(point)
    run = home.begin(run_id)
    values: dict[str, Value] = {}
    for stage in CHAIN:
        watch.stage = stage
        perform_stage(run, stage, values)
    if state is not None:
        met = list(watch.met)
        state.write_text(json.dumps({"state": end_state(home, run_id, values), "met": met}))


def end_state(home: Home, run_id: str, values: dict[str, Value]) -> dict[str, Any]:
    """What must be the same after a kill and a retry as after an undisturbed run."""
    said = {name: value.model_dump(mode="json") for name, value in values.items()}
    seen = home.visible()
    client = home.registry._client
    return {
        "stage events": home.stages("stage"),
        "receipts": home.stages("receipt"),
        "failures": home.stages("failure"),
        "promotions": [event.body["status"] for event in home.events("promotion")],
        "verdicts": len(home.events("verdict")),
        "first bad event": home.database.first_bad(NAME),
        "outcome": history_of(home.database, run_id)["outcome"],
        "partitions": (said["ingest"]["known"], said["ingest"]["manifest"]["hash"]),
        "validated": said["validate"]["manifest"]["hash"],
        "snapshot": (said["snapshot"]["hash"], said["snapshot"]["tag"]),
        "tags": seen["tags"],
        "commits": len(seen["commits"]),
        "model": said["train"]["model"]["hash"],
        "trainings begun": begun(home, values),
        "figures": said["evaluate"]["challenger"]["metrics"],
        "registered": (said["register"]["version"], said["register"]["new"]),
        "versions": [(version.version, version.aliases, version.complete) for version in seen["versions"]],
        "mlflow runs": [client.get_run(run).info.status for run in seen["mlflow runs"]],
        "logged models": len(seen["logged models"]),
        "tag of the verdict": home.champion.tags["evergreen.verdict.decision"] if home.champion else None,
        "promoted": said["promote"],
        "left in jobs": home.leftovers(),
        "processes": len(home.processes()),
        "leases": leases(home),
    }


def look(home: Home, run_id: str = RUN, point: str | None = None, state: Path | None = None) -> None:
    """A look of the monitor, as the DAG's three tasks take it; the webhook is a thread of this process, and dies with it."""
    watch = Watch(point)
    run = keys.begin(
        home.settings, home.pack, run_id, as_of=LATER, scheduled=SCHEDULED, reason="a test asked", kind="watch"
    )
    values: dict[str, Any] = {}
    try:
        for watch.stage in ("ingest", "validate"):
            perform_stage(run, watch.stage, values)
    except EvergreenError:
        pass
    watch.stage = "monitor"
    found = monitor(run, values.get("ingest"), values.get("validate"))
    if found.probation is not None:
        watch.stage = "withdraw"
        probation.withdraw(run, found.probation)
    watch.stage = "tell"
    outer, port = FastAPI(), free_port()
    outer.mount("/evergreen", webhook.make_app(home.settings, nobody))
    with serving(outer, port):
        tell(home.settings, found, f"http://127.0.0.1:{port}")
        watch.meet("told")
    if state is not None:
        state.write_text(json.dumps({"state": end_of_look(home, found), "met": list(watch.met)}))


def end_of_look(home: Home, found: Watched) -> dict[str, Any]:
    """What must be the same after a kill and a retry as after an undisturbed look."""
    seen = home.visible()
    watched = home.registry.version(NAME, found.champion).run_id
    pages = home.registry._client.list_artifacts(watched, "drift")
    return {
        **moves(home),
        "found": found.model_dump(mode="json"),
        "stage events": home.stages("stage"),
        "looks": [event.body["value"] for event in home.events("drift")],
        "receipts": home.stages("receipt"),
        # Every attempt says why it failed, of which there may be two.
        "failures": sorted({(event.body["stage"], event.body["what"]) for event in home.events("failure")}),
        "alerts": [(event.key, event.body) for event in home.events("alert")],
        "undecided": [alert.id for alert in inbox.due(home.database, NAME, home.events("watch")[-1].at + DAY)],
        "pages": [page.path for page in pages],
        "unfinished runs": seen["unfinished runs"],
        "first bad event": home.database.first_bad(NAME),
        "half-written": [file.name for file in home.settings.home.rglob("*.part")],
        "left in jobs": home.leftovers(),
        "processes": len(home.processes()),
        "leases": leases(home),
    }


def begun(home: Home, values: dict[str, Value]) -> int:
    """How often the training function was entered."""
    from evergreen.data.store import Store

    return Store(home.settings).read_bytes(values["train"].log).count(b"training begins")  # type: ignore[attr-defined]


def leases(home: Home) -> list[str]:
    with home.database.engine.connect() as connection:
        return [row.name for row in connection.execute(db.leases.select())]


def fork(function: Callable[..., None], *arguments: Any) -> int:
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        try:
            function(*arguments)
        except BaseException:  # noqa: BLE001
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return pid


def ended(pid: int) -> str:
    """How a child ended; a failure other than a SIGKILL ends the script."""
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return "killed"
    if status != 0:
        sys.exit("a child failed")
    return "done"


def make(root: Path, start: str) -> Home:
    """The home of the trials, and a copy of it as it is at their start; by a child, for polars is not to be used here."""

    def made() -> None:
        home = Home.make(root / "live", days=range(DAYS + MORE if start in LOOKS else DAYS))
        if start in ("next", "two"):
            home.perform("before", as_of=AS_OF - timedelta(days=1))
        elif start == "fall":
            fallen(home)
            senders.ensure(home.settings)
        elif start in LOOKS:
            home.write(triggers=RULES)
            home.perform("before")
            senders.ensure(home.settings)
        if start == "shift":
            for number in range(DAYS + MORE - 6, DAYS + MORE):
                home.write_day(number, new_truth)
        elif start == "fault":
            home.write(triggers=RULES, expectations=[IMPOSSIBLE])
        elif start == "rejected":
            reject(home)
        if start == "two":
            home.perform(RUN)

    ended(fork(made))
    shutil.copytree(root / "live", root / "start")
    return Home.at(root / "live")


def again(root: Path) -> None:
    """The home as it was at the start, in the same place: its databases hold paths."""
    shutil.rmtree(root / "live")
    shutil.copytree(root / "start", root / "live")


def performed(root: Path, home: Home, run_id: str = RUN, act: Callable[..., None] = perform) -> dict[str, Any]:
    """The state after a child has performed the run, and the calls that it made."""
    file = root / "state.json"
    ended(fork(act, home, run_id, None, file))
    return json.loads(file.read_text())


def points(root: Path, home: Home, *chosen: str, act: Callable[..., None] = perform) -> dict[str, Any]:
    whole = performed(root, home, act=act)
    trials = []
    for point in [met for met in whole["met"] if not chosen or met.startswith(chosen)]:
        again(root)
        death = ended(fork(act, home, RUN, point))
        trials.append({"point": point, "death": death, "state": performed(root, home, act=act)["state"]})
    return {"undisturbed": whole["state"], "trials": trials}


def row(root: Path, home: Home, *chosen: str, act: Callable[..., None] = perform) -> dict[str, Any]:
    whole = performed(root, home, act=act)["state"]
    again(root)
    deaths = [ended(fork(act, home, RUN, point)) for point in chosen]
    return {"undisturbed": whole, "deaths": deaths, "state": performed(root, home, act=act)["state"]}


def adopted(root: Path, home: Home) -> dict[str, Any]:
    """The job waits until its second caller has found it."""
    waits = "    import time\n    while not (job.folder / 'go').exists(): time.sleep(0.01)\n"
    home.write_model(WAITS, waits + WAITS)
    death = ended(fork(perform, home, RUN, "train/wait/1"))
    (folder,) = home.settings.jobs.glob("train-*")
    started = json.loads((folder / "pid.json").read_text())["pid"]
    found = root / "found.json"

    def second() -> None:
        start = jobs.start

        def starts(*arguments: Any) -> jobs.Handle:
            handle = start(*arguments)
            if handle.spec.kind == "train":
                now = json.loads((handle.folder / "pid.json").read_text())["pid"]
                found.write_text(json.dumps({"found": handle.found, "adopted": now}))
                (handle.folder / "go").touch()
            return handle

        jobs.start = starts
        perform(home, RUN, None, root / "state.json")

    ended(fork(second))
    state = json.loads((root / "state.json").read_text())["state"]
    return {"death": death, "started": started, **json.loads(found.read_text()), "state": state}


def race(root: Path, home: Home, *run_ids: str) -> dict[str, Any]:
    files = [root / f"racer-{number}.json" for number in range(len(run_ids))]
    pids = [fork(perform, home, run_id, None, file) for run_id, file in zip(run_ids, files, strict=True)]
    for pid in pids:
        ended(pid)
    racers = [json.loads(file.read_text())["state"] for file in files]
    return {"racers": racers, "state": performed(root, home, run_ids[0])["state"]}


def go_back(home: Home, point: str | None, file: Path) -> None:
    """A rollback to the champion before; then what came of it is written down."""
    watch = Watch(point)
    watch.stage = "rollback"
    rollback.rollback(home.settings, NAME, why="a trial", by="ada")
    met = list(watch.met)
    file.write_text(json.dumps({"state": moves(home) | {"leases": leases(home)}, "met": met}))


def moves(home: Home) -> dict[str, Any]:
    """Where the champion alias is, and all that is said of how it got there."""
    noted = work.checkpoints(home.settings, NAME)
    events = home.database.events(NAME, kind=promotion.MOVES)
    return {
        "champion": home.champion.version if home.champion else None,
        "moves": [(event.kind, event.body["status"]) for event in events],
        "reigns": [reign.version for reign in ledger.reigns(home.database, NAME)],
        "left": sorted(promotion.left(home.database, NAME)),
        "tags": [sorted(version.tags) for version in home.registry.versions(NAME)],
        "holds": ledger.verify(home.database, NAME, noted).holds,
        "checkpoints": len(noted),
    }


def back(root: Path, home: Home, *chosen: str) -> dict[str, Any]:
    file = root / "state.json"
    ended(fork(go_back, home, None, file))
    whole = json.loads(file.read_text())
    trials = []
    for point in chosen or whole["met"]:
        again(root)
        death = ended(fork(go_back, home, point, file))
        ended(fork(go_back, home, None, file))
        trials.append({"point": point, "death": death, "state": json.loads(file.read_text())["state"]})
    return {"undisturbed": whole["state"], "trials": trials}


def let_go(home: Home, point: str | None, file: Path) -> None:
    """What retention lets go of is removed; then what is left is written down."""
    watch = Watch(point)
    watch.stage = "prune"
    pruning.prune(home.settings, NAME, now=LONG_AFTER)
    met = list(watch.met)
    places = [home.settings.cache / "files", Path(home.settings.data_remote), Path(home.settings.mlflow_artifacts)]
    state = {
        "events": [(event.kind, event.run_id, event.body) for event in home.database.events(NAME, kind=GONE)],
        "files": sorted(str(path) for place in places for path in place.rglob("*") if path.is_file()),
        "tags": [version.tags for version in home.registry.versions(NAME)],
        "holds": ledger.verify(home.database, NAME, work.checkpoints(home.settings, NAME)).holds,
        "leases": leases(home),
    }
    file.write_text(json.dumps({"state": state, "met": met}))


def prune(root: Path, home: Home, *chosen: str) -> dict[str, Any]:
    """Killed at each point in turn, one home: each call goes on from what the one before left."""
    file = root / "state.json"
    before = [str(path) for path in Path(home.settings.data_remote).rglob("*") if path.is_file()]
    ended(fork(let_go, home, None, file))
    whole = json.loads(file.read_text())
    trials = []
    for chain in [[*chosen]] if chosen else [[point] for point in whole["met"]]:
        again(root)
        deaths = [ended(fork(let_go, home, point, file)) for point in chain]
        ended(fork(let_go, home, None, file))
        trials.append({"points": chain, "deaths": deaths, "state": json.loads(file.read_text())["state"]})
    return {"before": before, "undisturbed": whole["state"], "trials": trials}


TRIALS = {"back": back, "prune": prune, "points": points, "row": row, "adopted": adopted, "race": race}

if __name__ == "__main__":
    answers = []
    for place, begins, trial, *more in json.loads(sys.argv[1]):
        Path(place).mkdir()
        acts = {"act": look} if begins in LOOKS else {}
        answers.append(TRIALS[trial](Path(place), make(Path(place), begins), *more, **acts))
    print(json.dumps(answers))  # noqa: T201
