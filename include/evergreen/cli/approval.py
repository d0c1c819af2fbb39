"""What a person decides, and what there is to know before: approve, reject, report."""

from __future__ import annotations

import getpass
import sys
from typing import Annotated, Literal

import typer

from evergreen import database as db
from evergreen.cli.runs import version_named
from evergreen.cli.terminal import AsJson, out, show_json
from evergreen.pack import load
from evergreen.run import sayable
from evergreen.settings import Settings

Model = Annotated[str, typer.Argument(help="MODEL@VERSION, or MODEL for the version that waits.")]
Why = Annotated[str, typer.Option(help="Why. It stays on the version and in the history.")]


def approve(model: Model, why: Why, as_json: AsJson = False) -> None:
    """Make a version champion that waits for approval."""
    _answer(model, "promote", why, as_json)


def reject(model: Model, why: Why, as_json: AsJson = False) -> None:
    """Refuse a version that waits for approval."""
    _answer(model, "reject", why, as_json)


def _answer(model: str, choice: Literal["promote", "reject"], why: str, as_json: bool) -> None:
    from evergreen.loop import approval

    settings = Settings.from_env()
    registry, version = version_named(settings, model, approval.CHALLENGER)
    name = version.name
    run_id = approval.asking(settings, name, version.version)
    said = approval.Answer(choice=choice, person=getpass.getuser(), comment=sayable(why), through="terminal")
    text = approval.answer(settings, name, run_id, said, version=version.version, holder=db.this_process())
    champion = registry.champion(name)
    done = choice == "reject" or (champion is not None and champion.version == version.version)
    if as_json:
        now = champion.version if champion else None
        show_json({"model": name, "version": version.version, "done": done, "what": text, "champion": now})
    else:
        out().print(f"{name} {text}", markup=False)
    if not done:
        raise typer.Exit(1)


def report(
    model: Annotated[str, typer.Argument(help="MODEL@VERSION or MODEL@champion.")],
    as_markdown: Annotated[bool, typer.Option("--markdown", help="As markdown, the default.")] = False,
    as_html: Annotated[bool, typer.Option("--html", help="As one HTML page with its plots.")] = False,
    as_json: AsJson = False,
) -> None:
    """What there is to know about a version: verdict, figures beside the champion's, slices, data, lineage."""
    from evergreen import reports
    from evergreen.evaluation.report import markdown, page

    if as_html + as_markdown + as_json > 1:
        raise typer.BadParameter("--markdown, --html and --json exclude one another")
    settings = Settings.from_env()
    _, version = version_named(settings, model)
    description = load(settings.packs, version.name).description
    found = reports.of_version(settings, version.name, version.version, description)
    if as_json:
        show_json(found.model_dump(mode="json"))
    else:
        sys.stdout.write(page(found, reports.plots(settings, found)) if as_html else markdown(found))
