"""One rollback DAG per pack: <pack>__rollback. Airflow parses a file only when it holds the words airflow and dag."""

from evergreen.orchestration.dags import dags_to_parse, rollback_dag

for dag in dags_to_parse(rollback_dag):
    globals()[dag.dag_id] = dag
