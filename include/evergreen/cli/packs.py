"""Packs: which there are, new ones, whether they hold to the laws, and what their data were found to be."""

from __future__ import annotations

import contextlib
import tempfile
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.text import Text

from evergreen import database as db
from evergreen.cli.drift import STYLES
from evergreen.cli.terminal import AsJson, AsOf, PackName, minute, out, plain_table, show_json
from evergreen.errors import PackError
from evergreen.history import last_look, runs_of
from evergreen.pack import Pack, find, load, parse_instant
from evergreen.run import count
from evergreen.settings import Settings

TOLD = ("data fault", "not compared", "not rolled back")
"""Looks that a person must see to."""


def packs(as_json: AsJson = False) -> None:
    """The packs: what each keeps trained, how its last run ended, and what the monitor saw last."""
    settings = Settings.from_env()
    database = db.connect(settings.database_url)
    rows: list[dict[str, Any]] = []
    for folder in find(settings.packs):
        last = runs_of(database, folder.name, limit=1)
        row: dict[str, Any] = {"pack": folder.name, "description": None, "owner": None, "schedule": None}
        row |= {"last_run": last[0] if last else None, "last_look": last_look(database, folder.name), "error": None}
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
    table = plain_table("pack", "keeps trained", "schedule", "last run", "last look")
    for row in rows:
        said = Text(row["error"], style="red") if row["error"] else row["description"]
        newest = row["last_run"]
        ended = f"{newest['outcome']}, as of {newest['as_of'][:10]}" if newest else "none yet"
        table.add_row(row["pack"], said, row["schedule"] or "", ended, _seen(row["last_look"]))
    out().print(table)


def _seen(look: dict[str, Any] | None) -> Text:
    """What the monitor saw, and when; of what a person must look at, why as well."""
    if look is None:
        return Text("")
    kind, when = look["kind"] or "not compared", minute(datetime.fromisoformat(look["at"]))
    said = f"{kind}, {when}" + (f": {look['reasons'][0]}" if kind in TOLD else "")
    return Text(said, style=STYLES.get(kind, "bold"))


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


def check(
    pack: PackName,
    as_of: AsOf = None,
    as_json: AsJson = False,
) -> None:
    """Hold a pack to the laws, in under a minute, without touching its data, models or runs."""
    from evergreen.laws import check_pack
    from evergreen.orchestration.connections import connection_of

    settings = Settings.from_env()
    loaded = load(settings.packs, pack)
    console = out()
    results = []
    with tempfile.TemporaryDirectory(prefix="evergreen-check-") as folder:
        instant = parse_instant(as_of) if as_of else None
        for law in check_pack(settings, loaded, Path(folder), instant, connection_of):
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


def prune(
    pack: Annotated[str | None, typer.Argument(help="One pack's only; by default each that says `retention`.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go, and why; remove nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove what packs let go of by `retention`: what old runs left that made no champion. Its events stay."""
    from evergreen.loop import prune as pruning

    settings = Settings.from_env()
    names = [pack] if pack else [folder.name for folder in find(settings.packs) if _lets_go(folder)]
    found = [pruning.prune(settings, name, dry_run=dry_run) for name in names]
    if as_json:
        show_json([each.model_dump(mode="json") for each in found])
        return
    if not found:
        out().print("no pack says `retention`: everything is kept for ever")
    for each in found:
        if each.goes:
            table = plain_table("what", "run", "version", "goes because")
            for row in each.goes:
                table.add_row(row["what"], row["run_id"], str(row["version"] or ""), row["reason"])
            out().print(table)
        went = "would go" if dry_run else "removed"
        things = f"{count(each.objects, 'object')}, {each.bytes / 1e6:,.1f} MB, and the files of "
        things += f"{count(len(each.versions), 'version')} in MLflow"
        out().print(
            Text.assemble(
                (each.pack, "bold"), f" keeps {each.age}: {count(len(each.stays), 'claim')} stay; {things} {went}"
            )
        )


def _lets_go(folder: Path) -> bool:
    """Whether a pack has a rule; one that cannot be loaded has none until it is mended."""
    with contextlib.suppress(PackError):
        return Pack.load(folder).retention is not None
    return False


def docs(
    pack: PackName,
    output: Annotated[Path | None, typer.Option(help="Folder for the site; by default in the home.")] = None,
    as_json: AsJson = False,
) -> None:
    """Build Great Expectations' Data Docs from a pack's last validation.

    The pages take their styles from public servers: a browser without a network shows them plain.
    """
    from evergreen.stages import build_docs

    settings = Settings.from_env()
    loaded = load(settings.packs, pack)
    page = build_docs(settings, loaded, output or settings.home / "docs" / pack)
    if as_json:
        show_json({"pack": pack, "page": str(page)})
    else:
        out().print(f"open {page}")
