"""Drift: what the monitor sees now, or would have seen on the days of a history."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.text import Text

from evergreen import keys
from evergreen.cli.terminal import (
    AsJson,
    AsOf,
    PackName,
    Since,
    duration,
    minute,
    out,
    plain_table,
    show_json,
)
from evergreen.errors import EvergreenError, SourceError, visible
from evergreen.pack import DriftRules, Pack, load, parse_instant
from evergreen.run import Ingested, Manifest, Run, Validated, Window, count, floor
from evergreen.settings import Settings

if TYPE_CHECKING:
    from evergreen.loop.monitor import Looked, Watched

COLUMNS = 120
"""Most columns of a table, those that violate a rule first."""

STYLES = {
    "data fault": "bold red",
    "shift": "bold yellow",
    "seasonal": "magenta",
    "withstood": "cyan",
    "quiet": "green",
}


def drift(
    pack: PackName,
    as_of: AsOf = None,
    since: Since = None,
    every: Annotated[
        timedelta, typer.Option(parser=duration, metavar="DURATION", help="With --since: how often to look.")
    ] = timedelta(days=1),
    open_page: Annotated[bool, typer.Option("--open", help="Show the report in a browser.")] = False,
    as_json: AsJson = False,
) -> None:
    """How the newest data differs from what the champion was made from; or, --since, how often it would have."""
    settings = Settings.from_env()
    loaded = load(settings.packs, pack)
    if since is not None:
        _backwards(settings, loaded, since, as_of, every, as_json)
        return
    run = _begin(settings, loaded, parse_instant(as_of) if as_of else None)
    watched = look(run)
    page = _kept(settings, watched)
    if as_json:
        show_json({**watched.model_dump(mode="json"), "measured": _measured(settings, watched), "file": page})
    else:
        _show(settings, loaded.triggers.drift or DriftRules(), watched, page)
    if open_page and page is not None:
        typer.launch(page)


def look(run: Run) -> Watched:
    """Ingest → validate → monitor, in this process; no alert is sent, and no champion taken back."""
    from evergreen.loop.monitor import monitor

    return monitor(run, *_read(run))


def _begin(settings: Settings, pack: Pack, as_of: datetime | None) -> Run:
    from evergreen.orchestration.connections import connection_of

    now = datetime.now(UTC)
    return keys.begin(
        settings,
        pack,
        f"manual__{now.isoformat()}",
        as_of=as_of,
        scheduled=now,
        reason="a person asked",
        kind="watch",
        connect=connection_of,
    )


def _read(run: Run) -> tuple[Ingested | None, Validated | None]:
    """What the chain's first two stages give; what they refuse is written down, and the monitor says so."""
    from evergreen import stages

    ingested = validated = None
    with contextlib.suppress(EvergreenError):
        ingested = stages.ingest(run)
        validated = stages.validate(run, ingested)
    return ingested, validated


def _measured(settings: Settings, watched: Watched) -> dict[str, Any] | None:
    from evergreen.data.store import Store

    found: dict[str, Any] | None = Store(settings).read_json(watched.report) if watched.report else None
    return found


def _kept(settings: Settings, watched: Watched) -> str | None:
    """The page as a file of this home."""
    from evergreen.data.store import Store

    if watched.page is None:
        return None
    file = settings.home / "drift" / f"{watched.pack}-{watched.as_of:%Y%m%dT%H}.html"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(Store(settings).read_bytes(watched.page))
    return str(file)


def _show(settings: Settings, rules: DriftRules, watched: Watched, page: str | None) -> None:
    from evergreen.monitoring.drift import ClassDrift

    console = out()
    head = f"{watched.pack}  as of {minute(watched.as_of)}"
    if watched.windows:
        newest = watched.windows[-1]
        head += f", {minute(newest.start)} … {minute(newest.end)} beside version {watched.champion}"
    console.print(head)
    kind = watched.kind or "not compared"
    console.print(Text.assemble((kind, STYLES.get(kind, "bold")), f": {watched.reasons[0]}"))
    for reason in watched.reasons[1:]:
        console.print(Text(f"  {reason}"))
    if watched.probation is not None:
        console.print(Text.assemble(("probation", "bold"), f": {watched.probation.why}"))
    measured = _measured(settings, watched)
    if measured is not None:
        newest = measured["windows"][-1]
        violated = {each["column"] for each in newest["violated"]}
        predictions = [newest["predictions"]] if newest.get("predictions") else []
        told = next((each for each in reversed(measured["windows"]) if each["importance"]), None)
        shift = told["importance"] if told else {"columns": []}
        leanings = {each["column"]: each for each in shift["columns"]}
        if told:
            allowed = rules.importance.shift
            chance = "" if shift["noise"] is None else f", chance leaves up to {shift['noise']:.2f}"
            console.print(
                f"what version {watched.champion} leans on, until {told['end'][:10]}: moved by {shift['shift']:.2f} of 1 "
                f"(the pack allows {allowed:g}{chance})"
            )
        if classes := next((each["classes"] for each in reversed(measured["windows"]) if each.get("classes")), None):
            console.print(Text(f"classes: {ClassDrift.model_validate(classes)}"))
        table = plain_table(
            "column", "psi", "usual", "missing", "before", *(["importance"] if told else []), "violated"
        )
        columns = sorted(newest["columns"], key=lambda each: (each["name"] not in violated, -(each["psi"] or 0)))
        for each in (*predictions, *columns[:COLUMNS]):
            predicted = each["role"] == "prediction"
            of_it = [
                found["measure"]
                for found in newest["violated"]
                if (found["kind"] == "prediction" if predicted else found["column"] == each["name"])
            ]
            table.add_row(
                "[italic]predictions[/]" if predicted else escape(visible(each["name"])),
                _number(each["psi"]),
                _number(each["usual"]),
                f"{each['missing']:.1%}",
                f"{each['missing_before']:.1%}",
                *([_leaning(None if predicted else leanings.get(each["name"]))] if told else []),
                ", ".join(of_it),
            )
        console.print(table)
        if len(columns) > COLUMNS:
            console.print(f"and {count(len(columns) - COLUMNS, 'more column')} of the least PSI; --json has them all")
    if page is not None:
        console.print(f"report: {page}", soft_wrap=True)


def _leaning(found: dict[str, Any] | None) -> str:
    return "" if found is None else f"{found['before']:.0%} → {found['now']:.0%}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


# Windows backwards.


def _backwards(
    settings: Settings, pack: Pack, since: datetime, until: str | None, every: timedelta, as_json: bool
) -> None:
    from evergreen.loop.monitor import backwards

    run = _begin(settings, pack, parse_instant(until) if until else None)
    as_ofs = list(_instants(pack, since, run.as_of, every))
    manifest = _history(settings, run, as_ofs[0])
    looks = backwards(run, manifest, as_ofs)
    found = list(track(looks, "looking back", total=len(as_ofs), console=Console(stderr=True), transient=True))
    if as_json:
        show_json(
            [
                {
                    "as_of": each.as_of,
                    "kind": each.triage.kind,
                    "reasons": each.triage.reasons,
                    "violated": [finding.model_dump(mode="json") for finding in each.newest.violated],
                    "performance": each.newest.performance.model_dump(mode="json") if each.newest.performance else None,
                    "freshness": each.freshness.model_dump(mode="json") if each.freshness else None,
                }
                for each in found
            ]
        )
        return
    _show_backwards(pack, found)


def _instants(pack: Pack, since: datetime, until: datetime, every: timedelta) -> Iterator[datetime]:
    at = floor(since, pack.data.partition)
    if at > until:
        raise SourceError(
            f"pack {pack.name}: --since {minute(since)} is after as-of {minute(until)}", fix="give a later --as-of"
        )
    while at <= until:
        yield floor(at, pack.data.partition)
        at += max(every, timedelta(hours=1))


def _history(settings: Settings, run: Run, first: datetime) -> Manifest:
    """The partitions that looks from `first` until `run.as_of` take, read a chain's length at a time."""
    from evergreen.data.store import Store
    from evergreen.work import manifest_of

    data, rules = run.pack.data, run.pack.triggers.drift or DriftRules()
    reach = rules.reach if rules.freshness is None else max(rules.reach, data.whole)  # as a training then would read
    ends = [run.as_of]
    while ends[-1] - data.whole > first - reach:
        ends.append(floor(ends[-1] - data.whole, data.partition))
    store = Store(settings)
    manifests: list[Manifest] = []
    failed: EvergreenError | None = None
    for end in reversed(ends):
        try:
            ingested, validated = _read(_begin(settings, run.pack, end))
        except EvergreenError as error:
            failed = error
            continue
        if (seen := validated or ingested) is not None:
            manifests.append(manifest_of(store, seen.manifest))
    if not manifests:
        raise failed or SourceError(
            f"pack {run.pack.name}: the source has no rows since {minute(first)}", fix="give a later --since"
        )
    parts = {part.period: part for manifest in manifests for part in manifest.partitions}
    covered = [manifest.covered for manifest in manifests if manifest.covered is not None]
    whole = Window(start=min(each.start for each in covered), end=max(each.end for each in covered))
    return manifests[-1].model_copy(
        update={"partitions": tuple(parts[period] for period in sorted(parts)), "covered": whole}
    )


def _show_backwards(pack: Pack, found: list[Looked]) -> None:
    console = out()
    kinds = Counter(each.triage.kind for each in found)
    rules: dict[tuple[str, str], list[float]] = {}
    for each in found:
        for finding in each.newest.violated:
            rules.setdefault((finding.column or f"({finding.kind})", finding.measure), []).append(finding.value)
        if each.freshness is not None and each.freshness.exceeds(pack.triggers.drift or DriftRules()):
            rules.setdefault(("(newer rows)", "gain"), []).append(each.freshness.gain.value)
    console.print(
        f"{pack.name}: {count(len(found), 'look')}, {found[0].as_of:%Y-%m-%d} … {found[-1].as_of:%Y-%m-%d}, "
        "with today's champion"
    )
    table = plain_table("kind", "looks", "first", "last")
    for kind, looks in kinds.most_common():
        days = [each.as_of for each in found if each.triage.kind == kind]
        table.add_row(
            Text(kind, style=STYLES[kind]),
            f"{looks} ({looks / len(found):.0%})",
            f"{days[0]:%Y-%m-%d}",
            f"{days[-1]:%Y-%m-%d}",
        )
    console.print(table)
    fired = plain_table("rule", "measure", "fired in", "median", "largest")
    for (column, measure), values in sorted(rules.items(), key=lambda each: -len(each[1])):
        fired.add_row(
            escape(visible(column)),
            measure,
            f"{len(values)} ({len(values) / len(found):.0%})",
            f"{median(values):.3g}",
            f"{max(values):.3g}",
        )
    console.print(fired if rules else "no rule would have fired")
