"""The command line: which commands there are, in which order `--help` shows them, and where each is written.

A command's module is imported when the command is called, and `--help` reads summaries from the source, so that the
prompt does not wait for what the other commands need.
"""

from __future__ import annotations

import ast
import gc
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperGroup
from typer.main import get_command_from_info, get_group
from typer.models import CommandInfo

from evergreen.errors import EvergreenError

COMMANDS: dict[str, dict[str, str]] = {
    "Train": {"run": "runs", "runs": "runs", "why": "runs", "packs": "packs"},
    "Bring a model": {"new": "packs", "check": "packs", "docs": "packs"},
    "Versions": {
        "lineage": "runs",
        "report": "approval",
        "predict": "runs",
        "approve": "approval",
        "reject": "approval",
        "history": "ledger",
        "rollback": "ledger",
        "drill": "ledger",
        "rejudge": "ledger",
        "ledger": "ledger",
    },
    "Monitor": {"drift": "drift", "metrics": "metrics"},
    "Alerts": {
        "alert": "alerts",
        "alerts": "alerts",
        "decisions": "alerts",
        "snooze": "alerts",
        "simulate": "alerts",
        "sender": "alerts",
        "data-arrived": "alerts",
    },
    "The platform": {"doctor": "doctor", "up": "home", "down": "home", "airflow": "home", "prune": "packs"},
}
"""Heading → command → the module of `evergreen.cli` whose function of that name it is."""
MODULES = {name: module for commands in COMMANDS.values() for name, module in commands.items()}
FOREIGN = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
"""Settings of `airflow`, whose words are all Airflow's, `--help` too."""


class Commands(TyperGroup):
    """The group of all commands."""

    def __init__(self, **attrs: Any) -> None:
        super().__init__(**attrs)
        self.commands: dict[str, Any] = dict.fromkeys(MODULES)  # the names that typer compares a mistyped one with

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ARG002  typer's signature
        return list(MODULES)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:  # noqa: ARG002
        """Return the command, its module imported; None for a name that is no command."""
        if cmd_name not in MODULES:
            return None
        module = importlib.import_module(f"evergreen.cli.{MODULES[cmd_name]}")
        function = getattr(module, cmd_name.replace("-", "_"))
        if cmd_name == "ledger":
            return get_group(module.app)
        settings = FOREIGN if cmd_name == "airflow" else None
        info = CommandInfo(name=cmd_name, callback=function, context_settings=settings)
        return get_command_from_info(info, pretty_exceptions_short=False, rich_markup_mode=None)

    def format_commands(self, ctx: Any, formatter: Any) -> None:  # noqa: ARG002
        """Write each heading's commands with the first sentence of their docstrings, none cut off."""
        for heading, commands in COMMANDS.items():
            with formatter.section(heading):
                formatter.write_dl([(name, summary(name)) for name in commands])


def summary(command: str) -> str:
    """Return the first line of a command's docstring, read from its source."""
    source = (Path(__file__).parent / f"{MODULES[command]}.py").read_text(encoding="utf-8")
    name = command.replace("-", "_")
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return (ast.get_docstring(node) or "").partition("\n")[0]
    raise LookupError(f"cli/{MODULES[command]}.py has no function {name}")


app = typer.Typer(
    name="evergreen",
    cls=Commands,
    help="Keeps models trained, and can say and prove what made each of them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback()
def evergreen() -> None:
    """Keeps models trained, and can say and prove what made each of them."""


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
