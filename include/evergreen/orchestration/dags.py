"""The DAGs of a pack. Built from sorted packs alone, without clocks or chance, so that a DAG version means a change."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from airflow.sdk import DAG, Param, get_parsing_context

from evergreen.errors import PackError
from evergreen.orchestration.tasks import signature, stage_task
from evergreen.pack import Pack, find
from evergreen.settings import Settings
from evergreen.stages import CHAIN

START = datetime(2000, 1, 1, tzinfo=UTC)
"""Before any data: a backfill may reach as far back as the source does."""


def packs_to_parse() -> tuple[list[Pack], list[PackError]]:
    """The packs whose DAGs are wanted, and what is wrong with the others.

    A task process wants its own pack's only; the DAG processor wants all.
    """
    wanted = get_parsing_context().dag_id
    packs, broken = [], []
    for folder in find(Settings.from_env().packs):
        if wanted is not None and not wanted.startswith(f"{folder.name}__"):
            continue
        try:
            packs.append(Pack.load(folder))
        except PackError as error:
            broken.append(error)
    return packs, broken


def training_dag(pack: Pack) -> DAG:
    """`<pack>__train`: ingest → validate → snapshot → train → evaluate → register → promote."""
    with DAG(
        dag_id=f"{pack.name}__train",
        description=pack.description,
        doc_md=pack.card,
        schedule=pack.triggers.schedule,
        start_date=START,
        catchup=False,
        max_active_runs=1,
        is_paused_upon_creation=True,
        default_args={"owner": pack.owner},
        tags={"evergreen", "train", *pack.tags},
        params={
            "as_of": Param(
                None,
                type=["null", "string"],
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
        },
    ) as dag:
        made: dict[type, Any] = {}
        before = None
        for stage in CHAIN:
            takes, gives = signature(stage)
            output = stage_task(pack, stage)(**{name: made[kind] for name, kind in takes.items()})
            if before is not None:
                before >> output
            made[gives] = before = output
    return dag


class BrokenPacks(DAG):
    """Stands for packs that cannot be loaded: Airflow shows its message as an import error and keeps the other DAGs."""

    def validate(self) -> None:
        """Raise what is wrong with the packs."""
        raise PackError(str(self.description), fix="mend the packs named; the other packs' DAGs are in force")


def broken_packs_dag(errors: list[PackError]) -> DAG:
    """A DAG that Airflow refuses with the packs' mistakes as its import error."""
    return BrokenPacks(dag_id="broken_packs", description="\n".join(str(error) for error in errors), schedule=None)
