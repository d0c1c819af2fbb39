"""The one `stage_task`: a plain stage function as an Airflow task."""

from __future__ import annotations

import functools
import typing
from datetime import datetime, timedelta
from typing import Any, Literal
from urllib.parse import quote, urlsplit

from airflow.sdk import BaseOperatorLink, get_current_context, task
from airflow.sdk.configuration import conf
from airflow.sdk.exceptions import AirflowFailException, AirflowSkipException

from evergreen import database as db
from evergreen import keys
from evergreen.errors import (
    LeaseHeldError,
    PackError,
    RegistryError,
    SourceError,
    TrainingError,
    UnreachableError,
    ValidationError,
    quoted,
    shortened,
    visible,
)
from evergreen.orchestration.connections import connection
from evergreen.pack import Pack, load, parse_instant
from evergreen.run import Ingested, Run, Validated, Value
from evergreen.settings import Settings
from evergreen.stages import CHAIN

REASONS = {"scheduled": "the schedule", "backfill": "a backfill", "asset_triggered": "new data"}
"""Why a run exists, by Airflow's run type; a person asked for every other."""

GPU = "gpu"
"""The queue of Celery's workers that have a GPU, and of those that run containers. Other executors know no queues."""

REASON = 1_000
"""Maximum number of characters of a run's reason; a longer one is shortened."""

NEXT_LOOK = "the next look comes by its own schedule"

patient = functools.partial(
    task,
    multiple_outputs=False,
    show_return_value_in_logs=False,  # what acts says what it did, in words
    retries=2,
    retry_delay=timedelta(seconds=5),
)
"""A task that is tried again, soon: what was killed goes on from what it left."""

FINAL = (PackError, SourceError, ValidationError, TrainingError)
"""Mistakes that trying again does not mend; a source that is away for a moment is none."""


@functools.cache
def signature(stage: str) -> tuple[dict[str, type[Value]], type[Value]]:
    """The values a stage takes, by parameter name, and the value it gives."""
    hints = typing.get_type_hints(CHAIN[stage])
    result = hints.pop("return")
    del hints["run"]
    return hints, result


def stage_task(pack: Pack, stage: str, kind: Literal["run", "watch"] = "run") -> Any:
    """An Airflow task that performs `stage` for `pack`: takes and gives the values' JSON, by parameter name.

    It is retried twice, soon: a stage that was killed goes on from what it left. A mistake that a person must mend
    is not retried. A look of the monitor is skipped while a run of the pack acts: it would keep a slot for hours.
    """
    takes, _ = signature(stage)

    @patient(
        task_id=stage,
        execution_timeout=None,  # the job has its own, and outlives the task
        queue=_queue(pack, stage),
        executor_config=_pod(pack) if stage == "train" else None,
        doc_md=CHAIN[stage].__doc__,
    )
    def act(**values: Any) -> dict[str, Any]:
        if missing := [name for name in takes if values[name] is None]:
            raise AirflowFailException(
                f"{stage} needs what the tasks before it give, and there is no {' and no '.join(missing)}: a task that is "
                "marked as a success by hand gives nothing; clear the task, so that it runs"
            )
        given = {name: kind.model_validate(values[name]) for name, kind in takes.items()}
        try:
            value = CHAIN[stage](current_run(pack.name, get_current_context(), kind), **given)
        except UnreachableError:
            raise
        except FINAL as error:
            raise AirflowFailException(str(error)) from error
        except LeaseHeldError as error:
            if kind == "watch":
                raise AirflowSkipException(f"not looked: {error.what}; {NEXT_LOOK}") from error
            raise
        return value.model_dump(mode="json")

    return act


def _queue(pack: Pack, stage: str) -> str:
    """Where a task of `pack` waits: trainings for a GPU, unless the pack wants none; what runs containers, for those."""
    in_containers = pack.training.runtime is not None and stage in ("train", "evaluate", "monitor")
    return GPU if in_containers or (stage == "train" and pack.training.gpus != 0) else "default"


def _pod(pack: Pack) -> dict[str, Any] | None:
    """On Kubernetes, what the pod of a training asks the cluster for: the GPU that the pack insists on.

    `gpus: auto` asks for none: where the cluster has no GPU to give, its pod would wait for ever.
    """
    if pack.training.gpus != 1 or "KubernetesExecutor" not in conf.get("core", "executor"):
        return None
    from kubernetes.client import models as k8s  # half a second of every parse, where it is needed

    asks = k8s.V1ResourceRequirements(limits={"nvidia.com/gpu": "1"})
    container = k8s.V1Container(name="base", resources=asks)
    return {"pod_override": k8s.V1Pod(spec=k8s.V1PodSpec(containers=[container]))}


def monitor_task(pack: Pack) -> Any:
    """An Airflow task that looks at the newest windows of `pack`, and posts the alert that follows from a shift.

    A look that a person must see to ends as a failed task, which nobody tries again: a data fault, or one for which
    `ingest` or `validate` gave nothing; one that a run of the pack kept from looking is skipped. Failed tasks are what
    callbacks, e-mail and metrics of an Airflow are wired to; and this being the DAG's last task, the run would else be
    green over a red one.
    """

    @patient(
        task_id="monitor",
        queue=_queue(pack, "monitor"),
        trigger_rule="all_done",
        doc_md="Look at the newest windows beside what the champion was made from, and say what kind of change they "
        "show. It runs after a failure as well: data that is refused is a fault that somebody must be told of, "
        "and so it fails itself, for good.",
    )
    def act(ingested: dict[str, Any] | None, validated: dict[str, Any] | None) -> dict[str, Any]:
        from evergreen.loop import monitor, probation  # numpy: every parse of a DAG would pay for it

        run = current_run(pack.name, get_current_context(), "watch")
        try:
            watched = monitor.monitor(
                run,
                Ingested.model_validate(ingested) if ingested else None,
                Validated.model_validate(validated) if validated else None,
            )
        except LeaseHeldError as error:
            raise AirflowSkipException(f"not looked: {error.what}; {NEXT_LOOK}") from error
        failed = None
        try:
            if watched.probation is not None:
                probation.withdraw(run, watched.probation)
        except RegistryError as error:
            failed = error
        monitor.tell(run.settings, watched, run.settings.url or conf.get("api", "base_url"))
        if failed is not None:
            raise AirflowFailException(str(failed)) from failed
        if watched.kind == "data fault" or validated is None:
            raise AirflowFailException(f"{watched.summary()}; a person looks, nothing is retrained")
        return watched.model_dump(mode="json", exclude={"evidence"})

    def build(**values: Any) -> Any:
        looked = act(**values)
        looked.operator.operator_extra_links = (ReportLink(),)
        return looked

    return build


def rollback_task(pack: Pack) -> Any:
    """An Airflow task that makes an earlier champion of `pack` champion again, for the person who asked for the run."""

    @patient(
        task_id="rollback",
        doc_md="Verify that the version is what it was: its bytes, and its predictions for the first rows of its "
        "hold-out; then move the alias, and write down who asked, and why.",
    )
    def act() -> dict[str, Any]:
        from evergreen.loop import rollback

        context = get_current_context()
        dag_run, params = context["dag_run"], context["params"]
        try:
            restored = rollback.rollback(
                Settings.from_env(),
                pack.name,
                to=params["to"],
                why=shortened(visible(params["why"]), REASON),
                by=getattr(dag_run, "triggering_user_name", None) or "somebody in Airflow",
                run_id=dag_run.run_id,
            )
        except RegistryError as error:
            raise AirflowFailException(str(error)) from error
        return restored.model_dump(mode="json")

    return act


def prune_task(pack: Pack) -> Any:
    """An Airflow task that removes what `pack` lets go of; it is skipped while any pack acts, and comes again tomorrow."""

    @patient(
        task_id="prune",
        doc_md="Remove from the store and from MLflow what runs left that ended longer ago than `retention` says, and "
        "that made no champion; write down what, and why.",
    )
    def act() -> dict[str, Any]:
        from evergreen.loop import prune

        try:
            pruned = prune.prune(Settings.from_env(), pack.name)
        except LeaseHeldError as error:
            raise AirflowSkipException(f"nothing was removed: {error.what}; the next try is tomorrow's") from error
        return pruned.model_dump(mode="json", exclude={"stays", "goes"})

    return act


class ReportLink(BaseOperatorLink):
    """From the task to the page that it wrote."""

    name = "Drift report"

    def get_link(self, operator: Any, *, ti_key: Any) -> str:
        """The page's address on this Airflow."""
        pack = operator.dag_id.removesuffix("__monitor")
        return within_airflow(f"/evergreen/drift/{pack}/{quote(ti_key.run_id, safe='')}")


def within_airflow(path: str) -> str:
    """A path on this Airflow, which may itself lie under one."""
    return f"{urlsplit(conf.get('api', 'base_url', fallback='')).path.rstrip('/')}{path}"


def _as_of(value: str | None) -> datetime | None:
    """The as-of that a run was started with; raises AirflowFailException, as no retry makes a time of it."""
    try:
        return parse_instant(value) if value else None
    except ValueError as error:
        raise AirflowFailException(
            f"as_of: {quoted(value)} {error}\n  fix: start another run, with such an as-of or with none"
        ) from None


def current_run(pack_name: str, context: Any, kind: Literal["run", "watch"] = "run") -> Run:
    """The run that an Airflow task belongs to."""
    settings = Settings.from_env()
    dag_run, params = context["dag_run"], context["params"]
    run_type = str(getattr(dag_run.run_type, "value", dag_run.run_type))
    scheduled = dag_run.logical_date or dag_run.run_after
    if run_type == "scheduled" or dag_run.logical_date is None:
        # The first tick, or who asks first, may come before the home was made; unlike a backfill, they mean now.
        scheduled = max(scheduled, db.connect(settings.database_url).made_at())
    return keys.begin(
        settings,
        load(settings.packs, pack_name),
        dag_run.run_id,
        as_of=_as_of(params.get("as_of")),
        scheduled=scheduled,
        reason=shortened(visible(params.get("reason") or ""), REASON) or REASONS.get(run_type, "a person asked"),
        force=bool(params.get("force")),
        kind=kind,
        connect=connection,
    )
