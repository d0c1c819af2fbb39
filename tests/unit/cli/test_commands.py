"""The command line as a whole: its help, its speed at the prompt, and mistyped commands."""

import subprocess
import sys

import pytest
from typer.testing import CliRunner

from evergreen.cli import app
from evergreen.cli.commands import COMMANDS, MODULES, summary


def test_help_groups_the_commands_and_cuts_nothing_off():
    """Each heading is there, and below it each command with the whole first line of its docstring."""
    text = " ".join(CliRunner().invoke(app, ["--help"]).output.split())
    places = [text.index(f"{heading}: ") for heading in COMMANDS]
    assert places == sorted(places)
    assert [name for name in MODULES if f"{name} {summary(name)}" not in text] == []


@pytest.mark.parametrize("name", [name for name in MODULES if name != "airflow"])
def test_every_command_has_a_help_of_its_own(name):
    """`evergreen COMMAND --help` begins its text with the line that `evergreen --help` shows."""
    result = CliRunner().invoke(app, [name, "--help"])
    assert result.exit_code == 0, result.output
    assert summary(name) in " ".join(result.output.split())


def test_a_mistyped_command_is_answered_with_the_nearest():
    """A person who types `rnus` is asked whether `runs` was meant."""
    result = CliRunner().invoke(app, ["rnus"])
    assert result.exit_code == 2
    assert "'runs'" in result.output


def test_help_imports_none_of_the_heavy_libraries():
    """The prompt does not wait for a database, a model or a table library."""
    code = "import sys\nfrom evergreen.cli import app\ntry:\n app(['--help'])\nfinally:\n print(*sys.modules, sep='\\n', file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"sqlalchemy", "pydantic", "polars", "pandas", "numpy", "airflow", "mlflow", "evergreen.database"}
    assert heavy & set(done.stderr.splitlines()) == set()
