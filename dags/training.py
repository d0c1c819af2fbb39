"""One training DAG per pack: <pack>__train. (Airflow parses only files that hold the words airflow and dag.)"""

from evergreen.orchestration.dags import broken_packs_dag, packs_to_parse, training_dag

packs, broken = packs_to_parse()
for pack in packs:
    globals()[f"{pack.name}__train"] = training_dag(pack)
if broken:
    broken_packs = broken_packs_dag(broken)
