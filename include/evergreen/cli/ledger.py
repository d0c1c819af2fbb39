"""Who was champion when and why, whether the record of it holds, and the way back."""

from __future__ import annotations

import getpass
import json
import sys
from datetime import UTC
from typing import Annotated, Any

import typer
from rich.text import Text

from evergreen import database as db
from evergreen.cli.runs import version_named
from evergreen.cli.terminal import AsJson, Since, minute, out, plain_table, show_json
from evergreen.errors import RegistryError, nearest
from evergreen.registry import ledger as records
from evergreen.registry.ledger import Reign
from evergreen.run import count
from evergreen.settings import Settings

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

Model = Annotated[str, typer.Argument(help="The model: its pack's name.")]
OnePack = Annotated[str | None, typer.Argument(help="One pack's only.")]
Why = Annotated[str, typer.Option(help="Why; it stays in the ledger and on the version that is left.")]


def history(model: Model, at: Since = None, as_json: AsJson = False) -> None:
    """Which version was champion since when, by whose decision, on what evidence; with --at, at that instant."""
    reigns = records.reigns(db.connect(Settings.from_env().database_url), model)
    if at is not None:
        found = records.at(reigns, at)
        reigns = [found] if found else []
    if as_json:
        show_json([{"model": model, **reign.model_dump(mode="json")} for reign in reversed(reigns)])
        return
    if not reigns:
        out().print(f"{model} had no champion{f' at {minute(at)}' if at else ''}")
        return
    table = plain_table("champion", "since", "until", "by", "because", "run")
    for reign in reversed(reigns):
        until = minute(reign.until) if reign.until else "now"
        version = f"version {reign.version}" if reign.version else "none"
        table.add_row(version, minute(reign.since), until, _decided(reign), Text(_because(reign)), reign.run_id or "")
    out().print(table)


def _decided(reign: Reign) -> str:
    who = {"gate": "the gate", "rollback": "rollback", "foreign": "somebody, by hand", "person": "a person"}[reign.by]
    return f"{who}: {reign.who}" if reign.who else who


def _because(reign: Reign) -> str:
    return f"{reign.why}; it answers {', '.join(reign.alerts)}" if reign.alerts else reign.why


def rollback(
    model: Model,
    why: Why,
    to: Annotated[int | None, typer.Option(help="The version; by default the champion before this one.")] = None,
    as_json: AsJson = False,
) -> None:
    """Make an earlier champion champion again, in seconds, once its bytes and its predictions are verified."""
    from evergreen.loop import rollback as back

    settings = Settings.from_env()
    _require(settings, model)
    _show(back.rollback(settings, model, to=to, why=why, by=getpass.getuser()), as_json=as_json)


def drill(model: Model, as_json: AsJson = False) -> None:
    """Rehearse a rollback under the alias `drill`, and say how many seconds it takes. The champion stays."""
    from evergreen.loop import rollback as back

    settings = Settings.from_env()
    _require(settings, model)
    _show(back.drill(settings, model, by=getpass.getuser()), as_json=as_json)


def rejudge(
    model: Annotated[str, typer.Argument(help="MODEL@VERSION, or MODEL for its champion.")], as_json: AsJson = False
) -> None:
    """Make each verdict on a version again, from its event and the stored predictions and rows alone.

    The exit status is 1 where one, or anything that it rests on, is not what was written.
    """
    from evergreen import reports
    from evergreen.stages import judging

    settings = Settings.from_env()
    _, version = version_named(settings, model)
    found: list[dict[str, Any]] = []
    for event in reports.verdicts_on(db.connect(settings.database_url), version.name, version.version):
        again = judging.rejudge(settings, event)
        made = again.verdict.model_dump(mode="json") if again.verdict else None
        about = {"run_id": event.run_id, "at": event.at.isoformat(), "position": event.position}
        found.append(about | {"wrong": list(again.wrong), "written": event.body["verdict"], "made_again": made})
    if as_json:
        show_json({"model": version.name, "version": version.version, "verdicts": found})
    else:
        for one in found:
            mark, colour = ("\N{BALLOT X}", "red") if one["wrong"] else ("\N{CHECK MARK}", "green")
            end = f"{count(len(one['wrong']), 'thing')} not as written" if one["wrong"] else "made again, and the same"
            said = f"  {one['written']['decision']} in run {one['run_id']}: {end}"
            out().print(
                Text.assemble((f"{mark} ", colour), (f"{version.name} version {version.version}", "bold"), said)
            )
            for line in one["wrong"]:
                out().print(Text(f"  {line}"))
    if any(one["wrong"] for one in found):
        raise typer.Exit(1)


def _show(restored: Any, *, as_json: bool) -> None:
    if as_json:
        show_json(restored.model_dump(mode="json"))
        return
    console = out()
    for step in restored.steps:
        console.print(
            Text.assemble(
                ("\N{CHECK MARK} ", "green"), (f"{step.name:<12}", "bold"), f"{step.said}  {step.seconds:.1f} s"
            )
        )
    if restored.drill:
        end = f"a rollback to version {restored.version} would take {restored.seconds:.1f} s; nothing was changed"
    elif not restored.steps:
        end = f"version {restored.version} is champion since {minute(restored.at)}, by this very rollback; --to goes further"
    else:
        left = f", instead of version {restored.previous}" if restored.previous else ""
        end = f"version {restored.version} is champion{left}: {restored.why}  {restored.seconds:.1f} s"
    console.print(Text(end))


def _require(settings: Settings, model: str) -> None:
    known = db.connect(settings.database_url).packs()
    if model not in known:
        raise RegistryError(f"nothing is known of a model {model!r}", fix=nearest(model, {*known} - {db.HOME}))


@app.callback()
def ledger() -> None:
    """Verify the hash chain of the events, or export all of them."""


@app.command()
def verify(pack: OnePack = None, as_json: AsJson = False) -> None:
    """Whether every event is as it was written: none edited, removed, added between others, put elsewhere or cut off.

    A chain that holds is noted in the repository of snapshots, for the next time. The exit status is 1 where one does
    not hold.
    """
    from evergreen import work
    from evergreen.data.store import Store

    settings = Settings.from_env()
    database = db.connect(settings.database_url)
    packs = [pack] if pack else sorted({*database.packs(), *Store(settings).noted()})
    found = []
    for name in packs:
        verified = records.verify(database, name, work.checkpoints(settings, name))
        head = database.latest(name) if verified.holds else None
        if head is not None:
            work.note_head(settings, head)
        found.append(verified)
    if pack and not found[0].events and found[0].holds:
        raise RegistryError(f"nothing is known of a pack {pack!r}", fix=nearest(pack, set(database.packs())))
    if as_json:
        show_json([one.model_dump(mode="json") for one in found])
    else:
        for one in found:
            mark, colour = ("\N{CHECK MARK}", "green") if one.holds else ("\N{BALLOT X}", "red")
            after = f"; the last {count(one.uncovered, 'event')} had no checkpoint until now" if one.uncovered else ""
            out().print(Text.assemble((f"{mark} ", colour), (one.pack, "bold"), f"  {one.what}{after}"))
    if not all(one.holds for one in found):
        raise typer.Exit(1)


@app.command()
def export(pack: OnePack = None, since: Since = None) -> None:
    """All events as JSON Lines, with their hashes, in the order in which they were appended."""
    database = db.connect(Settings.from_env().database_url)
    for event in database.events(pack, since=since):
        at = event.at.astimezone(UTC).isoformat()
        sys.stdout.write(json.dumps({**vars(event), "at": at}, sort_keys=True) + "\n")
