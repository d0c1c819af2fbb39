"""One approval DAG per pack: <pack>__approval. Airflow parses a file only when it holds the words airflow and dag."""

from evergreen.orchestration.dags import approval_dag, dags_to_parse

for dag in dags_to_parse(approval_dag):
    globals()[dag.dag_id] = dag
