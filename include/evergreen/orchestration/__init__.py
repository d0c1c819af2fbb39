"""Orchestration: the only code that imports Airflow."""
