"""One monitoring DAG per pack that asks for it: <pack>__monitor. Airflow parses a file only when it holds the words airflow and dag."""

from evergreen.orchestration.dags import dags_to_parse, monitoring_dag

for dag in dags_to_parse(monitoring_dag):
    globals()[dag.dag_id] = dag
