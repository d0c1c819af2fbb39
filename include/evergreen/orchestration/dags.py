"""The DAGs of a pack. Built from sorted packs alone, without clocks or chance, so that a DAG version means a change."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from airflow.sdk import DAG, Param, get_parsing_context

from evergreen.errors import PackError
from evergreen.orchestration.approval import answer_task, ask_task, start_task
from evergreen.orchestration.tasks import monitor_task, prune_task, rollback_task, signature, stage_task
from evergreen.pack import Pack, find
from evergreen.settings import Settings
from evergreen.stages import CHAIN

START = datetime(2000, 1, 1, tzinfo=UTC)
"""Before any data: a backfill may reach as far back as the source does."""


INSTANT: dict[str, Any] = {
    "type": ["null", "string"],
    "maxLength": 40,
    "anyOf": [
        {"type": "null"},
        {"maxLength": 0},
        {"format": "date"},
        {"format": "date-time"},
        {"pattern": r"^\d{4}-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])[T ]([01]\d|2[0-3]):[0-5]\d(:[0-5]\d(\.\d+)?)?$"},
    ],
}
"""JSON schema of a date or a time, without an offset also. Airflow refuses to make a run whose parameter breaks it."""

PARAMS: dict[str, Param] = {
    "as_of": Param(
        None,
        **INSTANT,
        title="As of",
        description="The run sees no data at or after this instant: 2013-04-01 or 2013-04-01T06:00:00+00:00. "
        "Empty: the logical date, else now, on the pack's clock.",
    ),
    "reason": Param(None, type=["null", "string"], title="Reason", description="Why the run is asked for."),
    "force": Param(
        False,
        type="boolean",
        title="Force",
        description="Do the work again even where an earlier run did the same.",
    ),
}
"""What a person may say when asking for a run."""

BACK: dict[str, Param] = {
    "to": Param(
        None,
        type=["null", "integer"],
        minimum=1,
        title="To version",
        description="A version that was champion before. Empty: the champion before this one.",
    ),
    "why": Param(
        type="string", minLength=1, pattern=r"\S", title="Why", description="It stays in the ledger and on the version."
    ),
}
"""What a person says when asking for a rollback."""


ASKED: dict[str, Param] = {
    "run": Param(type="string", minLength=1, title="Run", description="The training run whose version waits."),
    "version": Param(
        None,
        type=["null", "integer"],
        minimum=1,
        title="Version",
        description="The version that waits. Empty: the last that the run asked about.",
    ),
}
"""What a question is about."""


Build = Callable[[Pack], DAG | None]


def dags_to_parse(build: Build) -> list[DAG]:
    """What `build` makes of each pack; a pack that it cannot be made of is left to `refuse_broken_packs`.

    A task process gets its own pack's DAG only, and is told what is wrong with that pack.
    """
    packs = Settings.from_env().packs
    wanted = get_parsing_context().dag_id
    if wanted is not None:
        own = packs / wanted.rpartition("__")[0]
        found = [_checked(own, build)] if (own / "pack.yaml").is_file() else []
        return [dag for dag in found if dag is not None]
    dags = []
    for folder in find(packs):
        with contextlib.suppress(Exception):
            dags.append(_checked(folder, build))
    return [dag for dag in dags if dag is not None]


def refuse_broken_packs(*builds: Build) -> None:
    """Raise what is wrong with the packs that cannot be loaded or built, all in one.

    It is called by a DAG file that has no DAGs: Airflow takes every DAG of a file with an import error out of force.
    """
    mistakes = []
    for folder in find(Settings.from_env().packs):
        try:
            for build in builds:
                _checked(folder, build)
        except PackError as error:
            mistakes.append(str(error))
        except Exception as error:  # noqa: BLE001 -- whatever Airflow refuses must not stop the other packs
            mistakes.append(f"{folder / 'pack.yaml'}: Airflow refuses its DAG: {error}")
    if mistakes:
        raise PackError("\n".join(mistakes), fix="mend these; the DAGs of all other packs are in force")


def _checked(folder: Path, build: Build) -> DAG | None:
    dag = build(Pack.load(folder))
    if dag is not None:
        dag.validate()
    return dag


def training_dag(pack: Pack, *, asks: bool = True) -> DAG:
    """`<pack>__train`: ingest → validate → snapshot → train → evaluate → register → promote → approval.

    The last starts the run that asks a person, where one is to be asked; `asks` is False where no scheduler would run it.
    """
    with _dag(pack, "train", pack.triggers.schedule) as dag:
        made: dict[type, Any] = {}
        before = None
        for stage in CHAIN:
            takes, gives = signature(stage)
            output = stage_task(pack, stage)(**{name: made[kind] for name, kind in takes.items()})
            if before is not None:
                before >> output
            made[gives] = before = output
        if asks:
            before >> start_task(pack)
    # Last: Airflow copies the parameters that a DAG has into every task made after them, four times each.
    dag.params.update(PARAMS)
    return dag


def monitoring_dag(pack: Pack) -> DAG | None:
    """`<pack>__monitor`: ingest → validate → monitor; None for a pack that is not monitored."""
    if pack.triggers.drift is None:
        return None
    with _dag(pack, "monitor", pack.triggers.drift.schedule) as dag:
        ingested = stage_task(pack, "ingest", "watch")()
        validated = stage_task(pack, "validate", "watch")(ingested=ingested)
        monitor_task(pack)(ingested=ingested, validated=validated)
    dag.params.update(PARAMS)
    return dag


def rollback_dag(pack: Pack) -> DAG:
    """`<pack>__rollback`: an earlier champion is champion again, when a person asks for it."""
    with _dag(pack, "rollback", None) as dag:
        rollback_task(pack)()
    dag.params.update(BACK)
    return dag


def retention_dag(pack: Pack) -> DAG | None:
    """`<pack>__prune`: once a day, what the pack lets go of is removed; None for a pack that keeps everything."""
    if pack.retention is None:
        return None
    with _dag(pack, "prune", "@daily") as dag:
        prune_task(pack)()
    return dag


def approval_dag(pack: Pack) -> DAG:
    """`<pack>__approval`: ask → answer, for the version of the training run that it is given."""
    # Several at once: the newer question is asked before the older one ends.
    with _dag(pack, "approval", None, max_active_runs=16) as dag:
        answer_task(pack)(ask_task(pack).output)
    dag.params.update(ASKED)
    return dag


def _dag(pack: Pack, what: str, schedule: str | None, max_active_runs: int = 1) -> DAG:
    return DAG(
        dag_id=f"{pack.name}__{what}",
        description=pack.description,
        doc_md=f"{pack.card}\n",  # Airflow would open a text that ends in .md as a file
        schedule=schedule,
        start_date=START,
        catchup=False,
        max_active_runs=max_active_runs,
        auto_register=False,  # the DAG file says which DAGs are its own
        default_args={"owner": pack.owner},
        tags={"evergreen", what, *pack.tags},
    )
