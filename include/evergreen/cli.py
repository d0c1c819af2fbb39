"""`evergreen …`: what an engineer asks of the platform from a terminal. Shows, and hands on; decides nothing.

Every command takes `--json`: one JSON document on standard output, with stable keys. The exit status is 0 when what
was asked for is so, 1 when it failed, 2 when the words of the command were wrong.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from evergreen import database as db
from evergreen.errors import EvergreenError, PackError, RegistryError
from evergreen.history import history_of, runs_of, why_run
from evergreen.pack import Pack, find, load, parse_instant
from evergreen.settings import Settings
from evergreen.view import RunView, show_end

app = typer.Typer(
    name="evergreen",
    help="Keeps models trained, and can say and prove what made each of them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

AsJson = Annotated[bool, typer.Option("--json", help="One JSON document instead of text.")]
PackName = Annotated[str, typer.Argument(help="The pack's name: its folder under include/packs.")]


def main() -> None:
    """Run a command; an error that a person can mend is shown without a traceback."""
    # Importing Airflow and MLflow makes objects by the hundred thousand that all stay: collecting them takes a third
    # longer and frees nothing.
    gc.set_threshold(200_000)
    try:
        app()
    except EvergreenError as error:
        if "--json" in sys.argv:
            print(json.dumps({"error": type(error).__name__, "what": error.what, "fix": error.fix}))  # noqa: T201
        console = Console(stderr=True, highlight=False, soft_wrap=True)  # a path that is broken cannot be copied
        console.print(f"[bold red]{type(error).__name__}[/]: {escape(str(error))}")
        raise SystemExit(1) from None
    finally:
        gc.freeze()  # a last collection of all that, when the interpreter ends, would take seconds


def out() -> Console:
    """Standard output; as wide as the terminal, or as it must be when there is none."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 160)


def show_json(content: Any) -> None:
    print(json.dumps(content, indent=2, default=str))  # noqa: T201


@app.command()
def packs(as_json: AsJson = False) -> None:
    """The packs: what each keeps trained, and how its last run ended."""
    settings = Settings.from_env()
    database = db.connect(settings.database_url)
    rows: list[dict[str, Any]] = []
    for folder in find(settings.packs):
        last = runs_of(database, folder.name, limit=1)
        row: dict[str, Any] = {"pack": folder.name, "description": None, "owner": None, "schedule": None}
        row |= {"last_run": last[0] if last else None, "error": None}
        try:
            pack = Pack.load(folder)
        except PackError as error:
            row["error"] = str(error)
        else:
            row |= {"description": pack.description, "owner": pack.owner, "schedule": pack.triggers.schedule}
        rows.append(row)
    if as_json:
        show_json(rows)
        return
    table = Table("pack", "keeps trained", "schedule", "last run", box=None, pad_edge=False)
    for row in rows:
        said = Text(row["error"], style="red") if row["error"] else row["description"]
        newest = row["last_run"]
        ended = f"{newest['outcome']}, as of {newest['as_of'][:10]}" if newest else "none yet"
        table.add_row(row["pack"], said, row["schedule"] or "", ended)
    out().print(table)


@app.command()
def run(
    pack: PackName,
    as_of: Annotated[str | None, typer.Option(help="See no data at or after this: 2013-04-01.")] = None,
    reason: Annotated[str, typer.Option(help="Why; it stays on the run and on the version.")] = "a person asked",
    force: Annotated[
        bool, typer.Option("--force", help="Do the work again where an earlier run did the same.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Run the chain once, through a real Airflow DAG run, and show how it ended."""
    settings = Settings.from_env()
    loaded = load(settings.packs, pack)
    if as_of is not None:
        try:
            parse_instant(as_of)
        except ValueError as error:
            raise typer.BadParameter(f"{as_of!r} {error}", param_hint="--as-of") from None
    conf = {"as_of": as_of, "reason": reason, "force": force}
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

    logs = settings.home / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    if "airflow" in embedded.services(settings):
        database = db.connect(settings.database_url)

        def follow(run_id: str) -> None:
            if database.latest(pack.name, kind="run", run_id=run_id):  # written by its first task
                view.follow(history_of(database, run_id, pack.name))

        with view.live():
            finished = embedded.run_through_scheduler(settings, pack.name, conf, follow)
        return settings.home / "airflow" / "logs" / f"dag_id={pack.name}__train" / f"run_id={finished.run_id}", finished
    log_file = logs / f"run-{pack.name}-{time.strftime('%Y%m%dT%H%M%S')}.log"
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


@app.command()
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
    table = Table("run", "as of", "because", "outcome", "version", box=None, pad_edge=False)
    for row in found:
        table.add_row(
            row["run_id"], row["as_of"][:16], row["reason"], row["outcome"], str(row["version"] or ""), style=None
        )
    out().print(table if found else f"{pack} has had no run: evergreen run {pack}")


@app.command()
def why(
    run_id: Annotated[str, typer.Argument(help="A run's id, as `evergreen runs` shows it.")],
    pack: Annotated[str | None, typer.Option(help="Its pack, where several packs have a run of this id.")] = None,
    as_json: AsJson = False,
) -> None:
    """For each stage of a run: whether it ran or was skipped, and which input had changed."""
    settings = Settings.from_env()
    answers = why_run(db.connect(settings.database_url), run_id, pack)
    if as_json:
        show_json(answers)
        return
    for answer in answers:
        out().print(Text.assemble((f"{answer['stage']:<9} ", "bold"), f"{answer['what']}: {answer['because']}"))


@app.command()
def lineage(
    model: Annotated[str, typer.Argument(help="MODEL@champion, MODEL@VERSION, or MODEL for its champion.")],
    as_json: AsJson = False,
) -> None:
    """What made a version: data, code, environment, hardware, parameters, metrics, verdict."""
    registry, version = _version(Settings.from_env(), model)
    whole = registry.lineage(version.name, version.version)
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


@app.command()
def predict(
    model: Annotated[str, typer.Argument(help="MODEL@champion, MODEL@VERSION, or MODEL for its champion.")],
    file: Annotated[Path, typer.Argument(help="Parquet or CSV of raw columns.")],
    output: Annotated[Path | None, typer.Option(help="Write the predictions there (.parquet or .csv).")] = None,
    as_json: AsJson = False,
) -> None:
    """Predict from raw rows with a registered version, in a process of its own."""
    from evergreen.stages.scoring import predict as predict_rows

    settings = Settings.from_env()
    _, version = _version(settings, model)
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


def _version(settings: Settings, model: str) -> tuple[Any, Any]:
    from evergreen.registry.models import Registry

    name, _, ref = model.partition("@")
    if not name:
        raise RegistryError(f"{model!r} names no model", fix="write MODEL@champion or MODEL@VERSION")
    registry = Registry(settings)
    return registry, registry.version(name, ref or "champion")


@app.command()
def new(
    name: Annotated[str, typer.Argument(help="Lower-case letters, digits and _; a letter first.")],
    as_json: AsJson = False,
) -> None:
    """Make a working pack to start from."""
    from evergreen.laws import scaffold

    settings = Settings.from_env()
    folder = scaffold(settings.packs, name)
    if as_json:
        show_json({"pack": name, "folder": str(folder), "files": sorted(file.name for file in folder.iterdir())})
        return
    console = out()
    console.print(f"[bold]{name}[/] is in {folder}:")
    for file in sorted(folder.iterdir()):
        console.print(f"  {file.name}")
    console.print(f"Hold it to the laws: evergreen check {name}\nTrain it:            evergreen run {name}")


@app.command()
def check(
    pack: PackName,
    as_of: Annotated[str | None, typer.Option(help="Check with data before this.")] = None,
    as_json: AsJson = False,
) -> None:
    """Hold a pack to the laws, in under a minute, without touching its data, models or runs."""
    from evergreen.laws import check_pack

    settings = Settings.from_env()
    loaded = load(settings.packs, pack)
    console = out()
    results = []
    with tempfile.TemporaryDirectory(prefix="evergreen-check-") as folder:
        for law in check_pack(settings, loaded, Path(folder), parse_instant(as_of) if as_of else None):
            results.append(
                {"law": law.name, "holds": law.holds, "detail": law.detail, "seconds": round(law.seconds, 2)}
            )
            if not as_json:
                mark = "[green]✓[/]" if law.holds else "[red]✗[/]"
                detail = f": {escape(law.detail)}" if law.detail else ""
                console.print(f"{mark} {law.name}{detail}  [dim]{law.seconds:.1f} s[/]")
    if as_json:
        show_json(results)
    if not all(result["holds"] for result in results):
        raise typer.Exit(1)


@app.command()
def docs(
    pack: PackName,
    output: Annotated[Path | None, typer.Option(help="Folder for the site; by default in the home.")] = None,
    as_json: AsJson = False,
) -> None:
    """Build Great Expectations' Data Docs from a pack's last validation."""
    from evergreen.stages import build_docs

    settings = Settings.from_env()
    loaded = load(settings.packs, pack)
    page = build_docs(settings, loaded, output or settings.home / "docs" / pack)
    if as_json:
        show_json({"pack": pack, "page": str(page)})
    else:
        out().print(f"open {page}")


@app.command()
def up(as_json: AsJson = False) -> None:
    """Start Airflow (UI, scheduler, triggerer) and the MLflow UI on this home, on loopback only."""
    from evergreen.orchestration import embedded

    settings = Settings.from_env()
    addresses = {}
    for name, address in embedded.up(settings):
        addresses[name] = address
        if not as_json:
            out().print(f"[bold]{name:<8}[/] {address}")
    if as_json:
        show_json(addresses)
    else:
        out().print(f"logs: {settings.home / 'logs'} · stop: make down")


@app.command()
def down(as_json: AsJson = False) -> None:
    """Stop what `up` started."""
    from evergreen.orchestration import embedded

    stopped = embedded.down(Settings.from_env())
    if as_json:
        show_json({"stopped": stopped})
    else:
        out().print(f"stopped: {', '.join(stopped) if stopped else 'nothing was running'}")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def airflow(context: typer.Context) -> None:
    """Airflow's own command line on this home: `evergreen airflow backfill create --help`."""
    from evergreen.orchestration import embedded

    settings = Settings.from_env()
    embedded.prepare(settings)
    env = {**os.environ, **embedded.environment(settings)}
    code = subprocess.run(
        [str(Path(sys.executable).parent / "airflow"), *context.args], env=env, check=False
    ).returncode
    raise typer.Exit(code)
