"""The admission DAG: alerts in, training runs out. It is woken by the inbox's bell and by data, and every minute anyway."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

from airflow.providers.standard.operators.trigger_dagrun import TriggerDagRunOperator
from airflow.sdk import (
    DAG,
    Asset,
    AssetAny,
    AssetOrTimeSchedule,
    AssetWatcher,
    CronTriggerTimetable,
    get_current_context,
    get_parsing_context,
    task,
)
from airflow.sdk.exceptions import AirflowRuntimeError, ErrorType

from evergreen.errors import PackError
from evergreen.orchestration.dags import START
from evergreen.orchestration.watchers import InboxBell
from evergreen.pack import Pack, find
from evergreen.settings import Settings

log = logging.getLogger("evergreen")

POOL = "admission"
"""Its tasks have a pool of their own: trainings that fill the default pool for hours must not keep alerts waiting."""

DATA = "data/"
"""The name of a dataset's asset begins with this."""

LOOK_BACK = timedelta(days=1)
"""How far back the minute's run looks for updates of data that did not wake it: Airflow loses and merges some."""


def admission_dag() -> DAG:
    """`evergreen__admission`: decide → start, once for each run that is to be."""
    inbox = Asset("evergreen/inbox", watchers=[AssetWatcher("bell", trigger=InboxBell())])
    packs = _packs_on_new_data() if get_parsing_context().dag_id is None else ()  # a task has no use for the schedule
    with DAG(
        dag_id="evergreen__admission",
        description="Decides what becomes of each alert, and starts the training runs that follow.",
        schedule=AssetOrTimeSchedule(
            timetable=CronTriggerTimetable("* * * * *", timezone="UTC"),
            assets=AssetAny(inbox, *(Asset(f"{DATA}{pack.dataset}") for pack in packs)),
        ),
        start_date=START,
        catchup=False,
        is_paused_upon_creation=False,
        max_active_runs=3,  # an alert that comes while runs are being started need not wait for them
        auto_register=False,  # the DAG file says which DAGs are its own
        # No retries: what is left undone is done by the next run. First in line, whatever waits.
        default_args={"owner": "evergreen", "pool": POOL, "priority_weight": 1000, "weight_rule": "absolute"},
        tags={"evergreen", "admission"},
        doc_md=__doc__,
    ) as dag:

        @task(task_id="decide", show_return_value_in_logs=False)
        def decide() -> list[dict[str, Any]]:
            """Keep an alert for each update of data, and decide all alerts that are due; → the runs to start."""
            from evergreen import loop

            context = get_current_context()
            settings = Settings.from_env()
            try:
                _keep_data_events(settings, context)
            except Exception:  # what came otherwise need not wait for it
                log.exception("updates of data could not be read; the run of the next minute looks again")
            return [
                {"trigger_dag_id": f"{start.pack}__train", "trigger_run_id": start.run_id, "conf": start.conf}
                for start in loop.admit(settings, AirflowRuns(context["ti"]))
            ]

        # By its id a run exists once, however often it is asked for. Airflow's default logical date, now, is unique
        # for a DAG as well: two runs could collide on it, and the second be taken for one that is there already.
        StartRun.partial(
            task_id="start",
            logical_date=None,
            skip_when_already_exists=True,
            on_success_callback=confirm,
            on_skipped_callback=confirm,
            doc_md="Ask for the training run, and make final the decisions that wanted it, now that it exists.",
        ).expand_kwargs(decide())
    return dag


class StartRun(TriggerDagRunOperator):
    """Asks for a training run. Nothing of it is a template: an alert's reason is what a stranger wrote."""

    template_fields = ()


def confirm(context: Any) -> None:
    """Make the decisions final that asked for this task's run, read back by its id.

    It is done where the run was asked for: a task of its own would come a second later. What it misses, killed or
    failing, the next run of `decide` finds.
    """
    from evergreen import loop

    pack = context["task"].trigger_dag_id.removesuffix("__train")
    loop.confirm(Settings.from_env(), AirflowRuns(context["ti"]), pack)


class AirflowRuns:
    """What admission asks of Airflow, through the API that a task has."""

    def __init__(self, task_instance: Any) -> None:
        self.task_instance = task_instance

    def is_paused(self, pack: str) -> bool | None:
        """Whether `<pack>__train` is paused; None where Airflow knows no such DAG."""
        try:
            return bool(self.task_instance.get_dag(f"{pack}__train").is_paused)
        except AirflowRuntimeError as error:
            if error.error.error is ErrorType.API_SERVER_ERROR and (error.error.detail or {}).get("status_code") == 404:
                return None
            raise

    def run_exists(self, pack: str, run_id: str) -> bool:
        return bool(self.task_instance.get_dr_count(f"{pack}__train", run_ids=[run_id]))

    def run_failed(self, pack: str, run_id: str) -> bool:
        return bool(self.task_instance.get_dr_count(f"{pack}__train", run_ids=[run_id], states=["failed"]))


def _packs_on_new_data() -> Iterator[Pack]:
    """The packs that want to know of new data."""
    for folder in find(Settings.from_env().packs):
        with contextlib.suppress(PackError):  # which is the import error of another file
            pack = Pack.load(folder)
            if pack.triggers.on_new_data:
                yield pack


def _keep_data_events(settings: Settings, context: Any) -> None:
    """An alert for each update of data that woke this run; in a run of the minute, for all of the last day."""
    from airflow.sdk.execution_time.context import InletEventsAccessor

    from evergreen import loop

    found = [
        (asset.name.removeprefix(DATA), event)
        for asset, events in context["triggering_asset_events"].items()
        if asset.name.startswith(DATA)
        for event in events
    ]
    if context["dag_run"].run_type == "scheduled":
        since = (datetime.now(UTC) - LOOK_BACK).isoformat()
        for pack in _packs_on_new_data():
            events = InletEventsAccessor(asset_name=f"{DATA}{pack.dataset}").after(since)
            found += [(pack.name, event) for event in events]
    for pack_name, event in found:
        # Not Airflow's number of it: a new Airflow database counts from one again.
        source = [event.source_dag_id, event.source_run_id, event.source_task_id, event.source_map_index]
        where = "/".join(str(part) for part in source if part not in (None, -1))
        loop.data_arrived(
            settings,
            pack_name,
            f"{event.timestamp.isoformat()} {where}".strip(),
            event.timestamp,
            where or "Airflow's API",
        )
