"""`evergreen …`: what an engineer asks of the platform from a terminal. Shows, and hands on; decides nothing.

Every command takes `--json`: one JSON document on standard output, with stable keys. The exit status is 0 when what
was asked for is so, 1 when it failed, 2 when the words of the command were wrong.
"""

from __future__ import annotations

import gc
import json
import sys

import typer
from rich.console import Console
from rich.markup import escape

from evergreen.cli import alerts, approval, drift, home, ledger, metrics, packs, runs
from evergreen.errors import EvergreenError

app = typer.Typer(
    name="evergreen",
    help="Keeps models trained, and can say and prove what made each of them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for command in (
    *(packs.packs, runs.run, runs.runs, runs.why, runs.lineage, runs.predict),
    *(packs.new, packs.check, packs.docs, packs.prune),
    *(alerts.alert, alerts.alerts, alerts.decisions, alerts.snooze, alerts.data_arrived),
    *(alerts.simulate, alerts.sender),
    *(drift.drift, metrics.metrics),
    *(ledger.history, ledger.rejudge, ledger.rollback, ledger.drill),
    *(approval.report, approval.approve, approval.reject),
    *(home.up, home.down),
):
    app.command(command.__name__.replace("_", "-"))(command)
app.add_typer(ledger.app, name="ledger")
# Its words are Airflow's, `--help` too.
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})(
    home.airflow
)


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
