"""No DAG: where Airflow shows, as this file's import error, which packs cannot be loaded. The others stay in force."""

from evergreen.orchestration import dags

dags.refuse_broken_packs(
    dags.training_dag, dags.monitoring_dag, dags.approval_dag, dags.rollback_dag, dags.retention_dag
)
