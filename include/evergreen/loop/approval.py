"""A person's word on a version that waits: what is shown, and the one door that answers go through."""

from __future__ import annotations

from datetime import UTC, datetime

from evergreen import database as db
from evergreen import keys, reports
from evergreen.errors import RegistryError
from evergreen.evaluation.report import description, markdown, page
from evergreen.keys import note
from evergreen.pack import load
from evergreen.registry import approval, promotion
from evergreen.registry.approval import CHALLENGER, Answer
from evergreen.registry.models import Registry
from evergreen.run import Run
from evergreen.settings import Settings
from evergreen.work import checkpoint

__all__ = ["CHALLENGER", "Answer", "answer", "asking", "overtaken", "page_of", "question"]


def overtaken(settings: Settings, pack: str, run_id: str, version: int | None = None) -> str | None:
    """Why the question of a training run, about `version` or the last it asked about, needs no answer any more, or None."""
    return approval.overtaken(db.connect(settings.database_url), pack, run_id, version)


def page_of(settings: Settings, pack: str, version: int) -> str:
    """The report on a version as a page, with its plots. Raises PackError, RegistryError."""
    report = reports.of_version(settings, pack, version, load(settings.packs, pack).description)
    return page(report, reports.plots(settings, report))


def question(settings: Settings, pack: str, run_id: str, version: int | None, web: str) -> tuple[str, str]:
    """What a person is asked about a version of a training run: the subject, and the report as markdown.

    `web` is where Evergreen's pages are.
    """
    asked = approval.state(db.connect(settings.database_url), pack, run_id, version)
    version, against = asked.body["version"], asked.body["judged_against"]
    beside = f" in place of version {against}" if against else ""
    report = reports.of_version(settings, pack, version, load(settings.packs, pack).description)
    return (
        f"{pack}: make version {version} champion{beside}?",
        f"[With plots]({web}/report/{pack}/{version})\n\n{markdown(report, level=3)}",
    )


def asking(settings: Settings, pack: str, version: int) -> str:
    """The training run that waits for an answer about `version`. Raises RegistryError where none does."""
    events = db.connect(settings.database_url).events(pack, kind=approval.KIND)
    waiting = {event.body["version"]: event for event in approval.pending(events)}
    if version in waiting:
        return str(waiting[version].run_id)
    last = next((event for event in reversed(events) if event.body["version"] == version), None)
    raise RegistryError(
        f"{pack} version {version} waits for no answer" + (f": {approval.said(last)}" if last else ""),
        fix=f"waiting: {', '.join(f'{pack}@{each}' for each in waiting) or 'none'}",
    )


def answer(
    settings: Settings, pack: str, run_id: str, said: Answer | None, *, version: int | None = None, holder: str
) -> str | None:
    """Write down the answer to what a training run asked, and do it; → what came of it, None while it goes on waiting.

    `version` is what it asked about, the last where it is None.
    """
    database = db.connect(settings.database_url)
    run = _run(settings, pack, run_id)
    registry = Registry(settings)
    ended = approval.answer(database, registry, run=run, version=version, answer=said, holder=holder)
    if ended.body["status"] == "asked":
        return None
    version = ended.body["version"]
    registry.describe(pack, version, description(reports.of_version(settings, pack, version, run.pack.description)))
    text = f"version {version} {approval.said(ended)}"
    moved = database.latest(pack, kind=promotion.KIND, run_id=run_id)
    if moved is not None and moved.body["status"] == "done":
        checkpoint(settings, moved)
    if moved is not None and moved.body["status"] == "void":
        text += f"; it was not promoted: {moved.body['why']}"
    note(run, "approval", "done", text)
    return text


def _run(settings: Settings, pack: str, run_id: str) -> Run:
    now = datetime.now(UTC)
    return keys.begin(settings, load(settings.packs, pack), run_id, as_of=None, scheduled=now, reason="")
