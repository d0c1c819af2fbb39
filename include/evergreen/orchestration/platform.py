"""What Prometheus sees of the platform under the loop: Airflow's processes and queues, the databases, the disk."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime

import psutil
import sqlalchemy as sa
from airflow.jobs.job import Job
from airflow.models.errors import ParseImportError
from airflow.models.taskinstance import TaskInstance
from airflow.settings import engine as airflow_engine
from airflow.utils.session import create_session
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from sqlalchemy.orm import Session

from evergreen import database as db
from evergreen.settings import Settings

UNFINISHED = ("scheduled", "queued", "running", "deferred", "up_for_retry")


class Platform:
    """Collects the metrics, anew with each scrape. It reads Airflow's own database."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def collect(self) -> Iterator[Metric]:
        """All families. Raises what the databases raise: a scrape that fails shows as `up == 0`."""
        now = datetime.now(UTC)
        with create_session() as session:
            yield self._heartbeats(session, now)
            yield from self._tasks(session, now)
            broken = session.scalar(sa.select(sa.func.count()).select_from(ParseImportError)) or 0
        yield GaugeMetricFamily("evergreen_airflow_import_errors", "DAG files that cannot be loaded.", value=broken)
        yield from self._databases()
        disk = psutil.disk_usage(str(self.settings.home if self.settings.home.exists() else "/"))
        yield GaugeMetricFamily("evergreen_disk_free_bytes", "On the disk of this home.", value=disk.free)
        yield GaugeMetricFamily("evergreen_disk_bytes", "The size of the disk of this home.", value=disk.total)
        backup = db.connect(self.settings.database_url).latest(db.HOME, kind="backup")
        if backup is not None:
            days = (now - backup.at).total_seconds() / 86400
            yield GaugeMetricFamily("evergreen_days_since_backup", "Since the newest backup ended.", value=days)

    def _heartbeats(self, session: Session, now: datetime) -> Metric:
        family = GaugeMetricFamily(
            "evergreen_airflow_heartbeat_seconds",
            "Since the newest sign of life of any process of a kind that should live.",
            labels=("job",),
        )
        query = sa.select(Job.job_type, sa.func.max(Job.latest_heartbeat)).group_by(Job.job_type)
        for job, beat in session.execute(query):
            if job is not None and beat is not None:
                family.add_metric((job.removesuffix("Job"),), (now - beat).total_seconds())
        return family

    def _tasks(self, session: Session, now: datetime) -> Iterator[Metric]:
        tasks = GaugeMetricFamily(
            "evergreen_airflow_tasks", "Task instances that have not ended, by queue.", labels=("queue", "state")
        )
        oldest = GaugeMetricFamily(
            "evergreen_airflow_queued_seconds", "How long the oldest queued task waits for a worker.", labels=("queue",)
        )
        query = (
            sa.select(TaskInstance.queue, TaskInstance.state, sa.func.count(), sa.func.min(TaskInstance.queued_dttm))
            .where(TaskInstance.state.in_(UNFINISHED))
            .group_by(TaskInstance.queue, TaskInstance.state)
        )
        # A state in which there is no task is a zero: a graph of nothing, and a rule about nothing, would say nothing.
        numbers = {("default", state): 0 for state in UNFINISHED}
        waits = {"default": 0.0}
        for queue, state, number, queued in session.execute(query):
            numbers[queue, state] = number
            waits[queue] = max(waits.get(queue, 0.0), (now - queued).total_seconds() if state == "queued" else 0.0)
        for labels, number in sorted(numbers.items()):
            tasks.add_metric(labels, number)
        for queue, seconds in sorted(waits.items()):
            oldest.add_metric((queue,), seconds)
        yield from (tasks, oldest)

    def _databases(self) -> Iterator[Metric]:
        size = GaugeMetricFamily("evergreen_database_bytes", "The size of a database.", labels=("database",))
        connections = GaugeMetricFamily(
            "evergreen_database_connections", "Connections to a PostgreSQL database.", labels=("database",)
        )
        engines = {"airflow": airflow_engine, "evergreen": db.connect(self.settings.database_url).engine}
        for name, engine in engines.items():
            with engine.connect() as connection:
                if connection.dialect.name == "sqlite":
                    pages = "SELECT page_count * page_size FROM pragma_page_count(), pragma_page_size()"
                    size.add_metric((name,), connection.execute(sa.text(pages)).scalar_one())
                    continue
                size.add_metric(
                    (name,), connection.execute(sa.func.pg_database_size(sa.func.current_database())).scalar_one()
                )
                used = "SELECT numbackends FROM pg_stat_database WHERE datname = current_database()"
                connections.add_metric((name,), connection.execute(sa.text(used)).scalar_one())
        yield from (size, connections)
