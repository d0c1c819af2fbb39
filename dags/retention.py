"""One retention DAG per pack that asks for it: <pack>__prune. Airflow parses a file only when it holds the words airflow and dag."""

from evergreen.orchestration.dags import dags_to_parse, retention_dag

for dag in dags_to_parse(retention_dag):
    globals()[dag.dag_id] = dag
