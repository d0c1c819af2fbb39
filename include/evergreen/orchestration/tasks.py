"""The one `stage_task`: a plain stage function as an Airflow task."""

from __future__ import annotations

import functools
import typing
from datetime import timedelta
from typing import Any

from airflow.sdk import get_current_context, task
from airflow.sdk.exceptions import AirflowFailException

from evergreen import database as db
from evergreen import keys
from evergreen.errors import PackError, SourceError, TrainingError, ValidationError
from evergreen.pack import Pack, load, parse_instant
from evergreen.run import Run, Value
from evergreen.settings import Settings
from evergreen.stages import CHAIN

REASONS = {"scheduled": "the schedule", "backfill": "a backfill", "asset_triggered": "new data"}
"""Why a run exists, by Airflow's run type; a person asked for every other."""

FINAL = (PackError, SourceError, ValidationError, TrainingError)
"""Mistakes that trying again does not mend."""


@functools.cache
def signature(stage: str) -> tuple[dict[str, type[Value]], type[Value]]:
    """The values a stage takes, by parameter name, and the value it gives."""
    hints = typing.get_type_hints(CHAIN[stage])
    result = hints.pop("return")
    del hints["run"]
    return hints, result


def stage_task(pack: Pack, stage: str) -> Any:
    """An Airflow task that performs `stage` for `pack`: takes and gives the values' JSON, by parameter name.

    It is retried twice, soon: a stage that was killed goes on from what it left. A mistake that a person must mend
    is not retried.
    """
    takes, _ = signature(stage)

    @task(
        task_id=stage,
        multiple_outputs=False,
        show_return_value_in_logs=False,  # the stage says what it did, in words
        retries=2,
        retry_delay=timedelta(seconds=5),
        execution_timeout=None,  # the job has its own, and outlives the task
        doc_md=CHAIN[stage].__doc__,
    )
    def act(**values: Any) -> dict[str, Any]:
        given = {name: kind.model_validate(values[name]) for name, kind in takes.items()}
        try:
            value = CHAIN[stage](current_run(pack.name, get_current_context()), **given)
        except FINAL as error:
            raise AirflowFailException(str(error)) from error
        return value.model_dump(mode="json")

    return act


def current_run(pack_name: str, context: Any) -> Run:
    """The run that an Airflow task belongs to."""
    settings = Settings.from_env()
    dag_run, params = context["dag_run"], context["params"]
    run_type = str(getattr(dag_run.run_type, "value", dag_run.run_type))
    scheduled = dag_run.logical_date or dag_run.run_after
    if run_type == "scheduled":
        # The first tick may lie before the home was made; unlike a backfill, it means now.
        scheduled = max(scheduled, db.connect(settings.database_url).made_at())
    return keys.begin(
        settings,
        load(settings.packs, pack_name),
        dag_run.run_id,
        as_of=parse_instant(params["as_of"]) if params.get("as_of") else None,
        scheduled=scheduled,
        reason=params.get("reason") or REASONS.get(run_type, "a person asked"),
        force=bool(params.get("force")),
    )
