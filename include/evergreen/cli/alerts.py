"""Alerts: sent, listed, held by hand; what was decided of them, and what would have been."""

from __future__ import annotations

import getpass
import json
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from evergreen import database as db
from evergreen.cli.terminal import AsJson, AsOf, For, PackName, Since, minute, out, plain_table, show_json
from evergreen.database import Database, Event
from evergreen.errors import PackError, SettingsError, quoted
from evergreen.pack import folder_of, load, load_policy, parse_instant
from evergreen.run import count
from evergreen.settings import Settings
from evergreen.triggers import inbox
from evergreen.triggers.admission import KINDS, Alert
from evergreen.triggers.refusals import refused_of
from evergreen.triggers.replay import Course, Look, Replay
from evergreen.triggers.replay import simulate as replay_of

Limit = Annotated[int | None, typer.Option(min=1, help="How many, newest first: 20, or all with --since.")]
NEWEST = 20


def _evidence(value: str) -> dict[str, Any]:
    """A JSON object: as it stands, or @FILE."""
    try:
        content = json.loads(Path(value[1:]).read_text(encoding="utf-8") if value.startswith("@") else value)
        json.dumps(content, allow_nan=False)
    except (OSError, ValueError, RecursionError) as error:
        raise typer.BadParameter(f"{quoted(value)} cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise typer.BadParameter(f"{quoted(value)} is no JSON object: write {{...}}, or @FILE that holds one")
    return content


def alert(
    pack: PackName,
    reason: Annotated[str, typer.Option(help="Why the model may need retraining; it stays on the run.")],
    as_of: AsOf = None,
    evidence: Annotated[
        Any, typer.Option(parser=_evidence, metavar="JSON|@FILE", help="What shows it: a JSON object.")
    ] = None,
    fingerprint: Annotated[
        str | None, typer.Option(help="What makes two alerts the same complaint; by default the reason.")
    ] = None,
    id: Annotated[str | None, typer.Option(help="The same id again is the same alert; by default a new one.")] = None,  # noqa: A002
    as_json: AsJson = False,
) -> None:
    """Send a signed alert, as any sender does. It is kept when this returns; admission decides what becomes of it."""
    from evergreen.triggers import senders, signatures

    settings = Settings.from_env()
    url = _airflow(settings)
    when = parse_instant(as_of).isoformat() if as_of else None
    message = {"reason": reason, "as_of": when, "evidence": evidence, "fingerprint": fingerprint}
    said = {name: value for name, value in message.items() if value is not None}
    answer = signatures.post(url, pack, senders.own_secret(settings), said, id=id)
    if as_json:
        show_json({"pack": pack, **answer})
    else:
        out().print(f"[bold]{answer['alert']}[/] is kept. What becomes of it: evergreen alerts {pack}")


def _airflow(settings: Settings) -> str:
    """Where Airflow's API server answers: on this home, or where the environment says."""
    from evergreen.orchestration import embedded

    url = settings.url or embedded.services(settings).get("airflow")
    if url is None:
        raise SettingsError(
            f"no Airflow runs on {settings.home}",
            fix="start it: make up; or say where one runs: EVERGREEN_URL=http://…",
        )
    return url


def alerts(
    pack: Annotated[str | None, typer.Argument(help="A pack's name; all packs without it.")] = None,
    since: Since = None,
    limit: Limit = None,
    refused: Annotated[bool, typer.Option("--refused", help="What the webhook did not take, by the minute.")] = False,
    as_json: AsJson = False,
) -> None:
    """The alerts that were kept: when, from whom, why, and what became of each; or, --refused, what was not kept."""
    settings = Settings.from_env()
    database = db.connect(settings.database_url)
    _require_pack(settings, database, pack)
    if refused:
        _show_refused(database, pack, since, limit, as_json)
        return
    found = inbox.alerts_of(database, pack, since=since, limit=limit or (None if since else NEWEST))
    heard = inbox.heard_of(database, [alert.id for alert, _ in found])
    if as_json:
        show_json([_alert_row(alert, event, *heard.get(alert.id, (0, None))) for alert, event in found])
        return
    more = [*(["last heard"] if heard else []), *([] if pack else ["pack"])]
    table = plain_table("alert", "when (UTC)", *more, "from", "because", "became")
    for alert, event in found:
        which = [minute(heard[alert.id][1] if alert.id in heard else alert.at)] if heard else []
        which += [] if pack else [alert.pack]
        because = f"{'resolved: ' if alert.status == 'resolved' else ''}{alert.reason}"
        table.add_row(alert.id, minute(alert.at), *which, alert.sender, Text(because), _became(event))
    for column in table.columns[: 3 if heard else 2]:
        column.no_wrap = True
    out().print(table if found else f"no alerts: evergreen alert {pack or 'PACK'} --reason …")


def _show_refused(
    database: Database, pack: str | None, since: datetime | None, limit: int | None, as_json: bool
) -> None:
    """Requests for no pack that there is are shown without `pack` only."""
    found = refused_of(database, pack, since=since, limit=limit or (None if since else NEWEST))
    if as_json:
        show_json(found)
        return
    table = plain_table("until (UTC)", *([] if pack else ["pack"]), "from", "answer", "because", "times")
    for row in found:
        which = [] if pack else [row["pack"] or "?"]
        who = row["sender"] or f"nobody known at {row['address'] or '?'}"
        until = minute(datetime.fromisoformat(row["until"]))
        table.add_row(until, *which, who, str(row["status"]), Text(row["reason"]), str(row["times"]))
    out().print(table if found else "nothing was refused")


def _require_pack(settings: Settings, database: Database, pack: str | None) -> None:
    """A pack that is there, or that was: its history stays."""
    if pack is not None and database.latest(pack) is None:
        folder_of(settings.packs, pack)


def _alert_row(alert: Alert, event: Event | None, again: int, last_heard: datetime | None) -> dict[str, Any]:
    body = event.body if event else {}
    return {
        "alert": alert.id,
        "pack": alert.pack,
        "at": alert.at.isoformat(),
        "heard_again": again,
        "last_heard": (last_heard or alert.at).isoformat(),
        "sender": alert.sender,
        "reason": alert.reason,
        "fingerprint": alert.fingerprint,
        "status": alert.status,
        "as_of": alert.as_of and alert.as_of.isoformat(),
        "evidence": alert.evidence,
        "outcome": body.get("outcome"),
        "final": event is not None and event.kind == "decision" and body["outcome"] != "hold",
        "rule": body.get("rule"),
        "because": body.get("reason"),
        "run_id": event and event.run_id,
        "until": body.get("until"),
    }


STYLES = {"retrain": "green", "merge": "blue", "drop": "dim", "dead": "red", "hold": "yellow"}


def _became(event: Event | None) -> Text:
    """What an alert has become, in a few words."""
    if event is None:
        return Text("not decided yet", style="yellow")
    outcome, rule = event.body["outcome"], event.body["rule"]
    if event.kind == "intent":
        return Text(f"{outcome}: its run is asked for", style="yellow")
    until = f" until {minute(datetime.fromisoformat(event.body['until']))}" if outcome == "hold" else ""
    return Text(outcome + (f", {rule}" if rule != outcome else "") + until, style=STYLES[outcome])


def decisions(
    pack: Annotated[str | None, typer.Option(help="A pack's name; all packs without it.")] = None,
    since: Since = None,
    limit: Limit = None,
    as_json: AsJson = False,
) -> None:
    """What admission decided, newest first: of which alert, by which rule, and why."""
    settings = Settings.from_env()
    database = db.connect(settings.database_url)
    _require_pack(settings, database, pack)
    found = inbox.decisions_of(database, pack, since=since, limit=limit or (None if since else NEWEST))
    if as_json:
        show_json([_decision_row(event) for event in found])
        return
    for event in found:
        said = Text.assemble(minute(event.at), "  ", _became(event), "  ", (event.pack, "bold"), f"  {event.key}")
        if event.run_id:
            said.append(f"  run {event.run_id}")
        out().print(Group(said, Padding(Text(event.body["reason"]), (0, 0, 0, 18), expand=False)), soft_wrap=False)
    if not found:
        out().print("nothing was decided: evergreen alerts")


def _decision_row(event: Event) -> dict[str, Any]:
    row = {"at": event.at.isoformat(), "pack": event.pack, "alert": event.key}
    return row | {name: event.body[name] for name in ("outcome", "rule", "reason", "until")} | {"run_id": event.run_id}


def snooze(
    pack: PackName,
    duration: For = None,
    why: Annotated[str | None, typer.Option(help="Why; every alert that is held then says it.")] = None,
    off: Annotated[bool, typer.Option("--off", help="End it now; what was held is looked at again.")] = False,
    as_json: AsJson = False,
) -> None:
    """Hold a pack's alerts for a while: they are kept, and start no run until it is over."""
    if (duration is None) != off:
        raise typer.BadParameter("say either --for how long, or --off")
    if duration is not None and not (duration and why):
        raise typer.BadParameter("say for how long and why: --for 6h --why 'the source is being moved'")
    settings = Settings.from_env()
    folder_of(settings.packs, pack)
    until = datetime.now(UTC) + duration if duration else None
    event = inbox.snooze(
        db.connect(settings.database_url), pack, until=until, why=why or "ended by hand", by=getpass.getuser()
    )
    if as_json:
        show_json({"pack": pack, "at": event.at.isoformat(), **event.body})
    elif until:
        out().print(f"the alerts of [bold]{pack}[/] are held until {minute(until)} UTC: {why}", markup=True)
    else:
        out().print(f"the alerts of [bold]{pack}[/] are decided again")


def data_arrived(pack: PackName, as_json: AsJson = False) -> None:
    """Say that there is new data: updates the Airflow asset `data/<dataset>`, which any DAG may do too."""
    from evergreen.orchestration import embedded

    settings = Settings.from_env()
    loaded = load(settings.packs, pack)
    if not loaded.triggers.on_new_data:
        raise PackError(
            f"{loaded.folder / 'pack.yaml'}: triggers.on_new_data is off: new data of {pack} start nothing",
            fix="write on_new_data: true under triggers; or start a run: evergreen run " + pack,
        )
    at = embedded.update_asset(_airflow(settings), f"data/{loaded.dataset}")
    if as_json:
        show_json({"pack": pack, "asset": f"data/{loaded.dataset}", "at": at})
    else:
        out().print(f"data/{loaded.dataset} is updated. What becomes of it: evergreen alerts {pack}")


def simulate(
    pack: PackName,
    policy: Annotated[
        Path | None,
        typer.Option(
            help="YAML: what may stand under admission:, or a pack.yaml. Without it: as it was, which changes nothing."
        ),
    ] = None,
    since: Since = None,
    as_json: AsJson = False,
) -> None:
    """Replay a pack's alerts under another policy: what would have run, been held, dropped, and cost, beside what did."""
    settings = Settings.from_env()
    database = db.connect(settings.database_url)
    _require_pack(settings, database, pack)
    other = load_policy(policy) if policy else None
    replay = replay_of(database.events(pack, kind=KINDS), other, since=since)
    if as_json:
        answer = {"pack": pack, "since": since and since.isoformat(), "policy": other and other.model_dump(mode="json")}
        figures = {"was": asdict(replay.was), "would": asdict(replay.would)}
        guess = {"guessed": replay.guessed, "median_hours": replay.median_hours}
        show_json({**answer, **figures, **guess, "differences": [_course_row(course) for course in replay.differences]})
    else:
        _show_replay(replay, policy.name if policy else "the same policy")


def _course_row(course: Course) -> dict[str, Any]:
    alert = course.alert
    row = {"alert": alert.id, "at": alert.at.isoformat(), "sender": alert.sender, "reason": alert.reason}
    return row | {"was": [_look_row(look) for look in course.was], "would": [_look_row(look) for look in course.would]}


def _look_row(look: Look) -> dict[str, Any]:
    decision = asdict(look.decision)
    del decision["alert"]
    return {"now": look.now.isoformat(), **decision, "until": look.decision.until and look.decision.until.isoformat()}


SHOWN = 20
"""How many differences are shown in full."""


def _show_replay(replay: Replay, policy: str) -> None:
    console = out()
    if not replay.courses:
        console.print("no alerts to replay: evergreen alerts")
        return
    table = plain_table(count(len(replay.courses), "alert"), "as it was", f"under {policy}")
    for column in table.columns[1:]:
        column.justify = "right"
    was, would = asdict(replay.was), asdict(replay.would)
    for name, title in TITLES.items():
        table.add_row(title, f"{was[name]:.3g}", f"{would[name]:.3g}")
    console.print(table)
    if replay.guessed:
        cost = f"{replay.median_hours:.3g} device-hours each, the median" if replay.median_hours else "nothing"
        console.print(f"{count(replay.guessed, 'run')} of these never took place: taken to cost {cost}")
    different = replay.differences
    console.print(f"\n{count(len(different), 'alert')} would have gone another way")
    for course in different[:SHOWN]:
        alert = course.alert
        console.print(Text.assemble((alert.id, "bold"), f"  {minute(alert.at)}  {alert.sender}: {alert.reason}"))
        looks = Table.grid(padding=(0, 1))
        for title, side in (("  was", course.was), ("  would", course.would)):
            for number, look in enumerate(side or [None]):
                looks.add_row(title if number == 0 else "", _said(look))
        console.print(looks)
    if len(different) > SHOWN:
        console.print(f"… and {count(len(different) - SHOWN, 'more alert')}: --json has all")


TITLES = {
    "runs": "runs",
    "device_hours": "device-hours",
    "merged": "merged into a run",
    "dropped": "dropped",
    "dead": "given up",
    "waiting": "waiting still",
    "held": "held at least once",
}
"""The totals, in the order in which they are shown."""


def _said(look: Look | None) -> Text:
    if look is None:
        return Text("not looked at")
    decision = look.decision
    until = f" until {minute(decision.until)}" if decision.until else ""
    return Text.assemble(
        f"{minute(look.now)}  ", (f"{decision.outcome}{until}", STYLES[decision.outcome]), f": {decision.reason}"
    )


def sender(
    name: Annotated[str, typer.Argument(help="Who it is; the name stands on each of its alerts.")],
    signing: Annotated[bool, typer.Option("--signing", help="A secret to sign with: Standard Webhooks.")] = False,
    bearer: Annotated[
        bool, typer.Option("--bearer", help="A token to send, for Alertmanager and Grafana, which cannot sign.")
    ] = False,
    rotate: Annotated[
        bool, typer.Option("--rotate", help="One more: the newest before it stays active until the next rotation.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Make a secret for a sender of alerts, and print it: this once."""
    from evergreen.triggers import senders

    if signing == bearer:
        raise typer.BadParameter("say either --signing or --bearer")
    settings = Settings.from_env()
    secret = senders.add(settings.senders, name, "signing" if signing else "bearer", rotate=rotate)
    if as_json:
        show_json({"sender": name, "kind": "signing" if signing else "bearer", "secret": secret})
    else:
        sys.stdout.write(f"{secret}\n")
