"""Runs: started, listed, explained; and the versions they made."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Annotated, Any

import typer
from rich.markup import escape
from rich.text import Text

from evergreen import database as db
from evergreen.cli.terminal import AsJson, AsOf, PackName, out, plain_table, show_json
from evergreen.errors import RegistryError
from evergreen.history import history_of, runs_of, why_run
from evergreen.keys import Note
from evergreen.pack import Pack, load, parse_instant
from evergreen.settings import Settings
from evergreen.view import RunView, show_end


def run(
    pack: PackName,
    as_of: AsOf = None,
    reason: Annotated[str, typer.Option(help="Why; it stays on the run and on the version.")] = "a person asked",
    force: Annotated[
        bool, typer.Option("--force", help="Do the work again where an earlier run did the same.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Run the chain once, through a real Airflow DAG run, and show how it ended."""
    settings = Settings.from_env()
    loaded = load(settings.packs, pack)
    conf = {"as_of": parse_instant(as_of).isoformat() if as_of else None, "reason": reason, "force": force}
    view = RunView(loaded, as_of, reason, plain=as_json or not sys.stdout.isatty(), silent=as_json)
    log_file, finished = _execute(settings, loaded, conf, view)
    database = db.connect(settings.database_url)
    ended = history_of(database, finished.run_id, pack)
    if as_json:
        show_json({**ended, "success": finished.success, "log": str(log_file)})
    else:
        show_end(out(), ended, log_file)
    if not finished.success:
        raise typer.Exit(1)


def _execute(settings: Settings, pack: Pack, conf: dict[str, Any], view: RunView) -> tuple[Path, Any]:
    """Through the scheduler where one runs on this home, else in this process, with Airflow's own log in a file."""
    from evergreen.orchestration import embedded

    with embedded.turn(settings, lambda text: typer.echo(text, err=True)) as through_airflow:
        if not through_airflow:
            return _in_process(settings, pack, conf, view)
    database = db.connect(settings.database_url)

    def follow(run_id: str) -> None:
        if database.latest(pack.name, kind="run", run_id=run_id):  # written by its first task
            view.follow(history_of(database, run_id, pack.name))

    def wait_for(other: str) -> None:
        view.take(Note("", "ingest", "waiting", f"waits for {other}: one run of {pack.name} goes on at a time"))

    with view.live():
        finished = embedded.run_through_scheduler(settings, pack.name, conf, follow, wait_for)
    return settings.home / "airflow" / "logs" / f"dag_id={pack.name}__train" / f"run_id={finished.run_id}", finished


def _in_process(settings: Settings, pack: Pack, conf: dict[str, Any], view: RunView) -> tuple[Path, Any]:
    from evergreen.orchestration import embedded

    logs = settings.home / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    log_file = logs / f"run-{pack.name}-{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}.log"
    with log_file.open("w", encoding="utf-8") as log, view.live(), _output_to(log):
        logging.getLogger("evergreen").addHandler(view.handler)
        try:
            finished = embedded.run_in_process(settings, pack.name, conf)
        finally:
            logging.getLogger("evergreen").removeHandler(view.handler)
    return log_file, finished


@contextlib.contextmanager
def _output_to(log: IO[str]) -> Iterator[None]:
    """Send this process's standard output and error, file descriptors included, to `log` for a while."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(1), os.dup(2)]
    try:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, descriptor in zip((1, 2), kept, strict=True):
            os.dup2(descriptor, number)
            os.close(descriptor)


def runs(
    pack: PackName,
    limit: Annotated[int, typer.Option(help="How many, newest first.")] = 20,
    as_json: AsJson = False,
) -> None:
    """The runs of a pack: when, as of when, why, and how each ended."""
    settings = Settings.from_env()
    load(settings.packs, pack)
    found = runs_of(db.connect(settings.database_url), pack, limit=limit)
    if as_json:
        show_json(found)
        return
    table = plain_table("run", "as of", "because", "outcome", "version")
    for row in found:
        table.add_row(
            row["run_id"], row["as_of"][:16], Text(row["reason"]), row["outcome"], str(row["version"] or ""), style=None
        )
    out().print(table if found else f"{pack} has had no run: evergreen run {pack}")


def why(
    run_id: Annotated[str, typer.Argument(help="A run's id, as `evergreen runs` shows it.")],
    pack: Annotated[str | None, typer.Option(help="Its pack, where several packs have a run of this id.")] = None,
    as_json: AsJson = False,
) -> None:
    """Why a run was, and for each of its stages: whether it ran or was skipped, and which input had changed."""
    settings = Settings.from_env()
    database = db.connect(settings.database_url)
    answers = why_run(database, run_id, pack)
    if as_json:
        show_json(answers)
        return
    whole = history_of(database, run_id, pack)
    answered = f"; it answers {', '.join(whole['alerts'])}" if whole["alerts"] else ""
    out().print(
        Text.assemble(("run       ", "bold"), f"as of {whole['as_of'][:16]} because {whole['reason']}{answered}")
    )
    for answer in answers:
        out().print(Text.assemble((f"{answer['stage']:<9} ", "bold"), f"{answer['what']}: {answer['because']}"))


def lineage(
    model: Annotated[str, typer.Argument(help="MODEL@champion, MODEL@VERSION, or MODEL for its champion.")],
    as_json: AsJson = False,
) -> None:
    """What made a version: data, code, environment, hardware, parameters, metrics, verdict."""
    registry, version = version_named(Settings.from_env(), model)
    whole = registry.lineage(version.name, version.version) | {"pruned": version.pruned}
    if as_json:
        show_json(whole)
        return
    console = out()
    for key, value in whole.items():
        if isinstance(value, dict):
            for inner, content in value.items():
                console.print(f"[bold]{key + '.' + inner:<30}[/] {escape(_shown(content))}")
        else:
            console.print(f"[bold]{key:<30}[/] {escape(_shown(value))}")


def _shown(value: Any) -> str:
    return json.dumps(value, default=str) if isinstance(value, dict | list) else str(value)


def predict(
    model: Annotated[str, typer.Argument(help="MODEL@champion, MODEL@VERSION, or MODEL for its champion.")],
    file: Annotated[Path, typer.Argument(help="Parquet or CSV of raw columns.")],
    output: Annotated[Path | None, typer.Option(help="Write the predictions there (.parquet or .csv).")] = None,
    as_json: AsJson = False,
) -> None:
    """Predict from raw rows with a registered version, in a process of its own."""
    from evergreen.stages.scoring import predict as predict_rows

    settings = Settings.from_env()
    _, version = version_named(settings, model)
    predictions = predict_rows(settings, version, file)
    if output is not None:
        if output.suffix == ".csv":
            predictions.write_csv(output)
        else:
            predictions.write_parquet(output)
    if as_json:
        show_json(
            {"model": version.name, "version": version.version, "rows": predictions.height}
            | {name: predictions[name].to_list() for name in predictions.columns}
        )
    elif output is None:
        sys.stdout.write(predictions.write_csv())
    else:
        out().print(f"{predictions.height} predictions of {version.name} version {version.version} in {output}")


def version_named(settings: Settings, model: str, default: str = "champion") -> tuple[Any, Any]:
    """The registry, and the version that MODEL@VERSION or MODEL@ALIAS names."""
    from evergreen.registry.models import Registry

    name, _, ref = model.partition("@")
    if not name:
        raise RegistryError(f"{model!r} names no model", fix="write MODEL@champion or MODEL@VERSION")
    registry = Registry(settings)
    return registry, registry.version(name, ref or default)
