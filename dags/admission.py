"""The DAG that decides alerts: evergreen__admission. Airflow parses a file only when it holds the words airflow and dag."""

from evergreen.orchestration.admission import admission_dag

dag = admission_dag()
