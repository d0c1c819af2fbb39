"""What a hundred packs cost Airflow's DAG processor, and what one of them costs a task process.

Goals: 100 packs built in at most 0.5 s after `import airflow.sdk`, in a fresh process; at most 10 ms for the DAG in a
task process once its modules are imported: in a bare process, and in those of a real run, forked from the scheduler. Peer: the same hundred DAGs of seven tasks written by hand in one file with
Airflow's own `@task`, nothing else read. Each figure is the median of fresh processes, taken in turn.

    python benchmarks/dags.py
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from evergreen.laws import scaffold
from evergreen.orchestration import embedded
from evergreen.settings import Settings

PACKS = 100
ROUNDS = 7
HERE = Path(__file__).resolve().parents[1]

OURS = """
import json, os, sys, time
import airflow.sdk
begun = time.perf_counter()
from evergreen.orchestration.dags import dags_to_parse, training_dag
imported = time.perf_counter()
dags = dags_to_parse(training_dag)
built = time.perf_counter()
again = dags_to_parse(training_dag)
print(json.dumps({"imports": imported - begun, "build": built - imported, "warm": time.perf_counter() - built,
                  "dags": len(dags), "tasks": sum(len(dag.tasks) for dag in dags)}))
"""

PEER = """
import json, sys, time
import airflow.sdk
begun = time.perf_counter()
namespace = {}
exec(compile(open(sys.argv[1]).read(), sys.argv[1], "exec"), namespace)
built = time.perf_counter()
dags = [value for value in namespace.values() if isinstance(value, airflow.sdk.DAG)]
print(json.dumps({"build": built - begun, "dags": len(dags), "tasks": sum(len(dag.tasks) for dag in dags)}))
"""

TIMED = """
'An airflow dag file that says how long it takes in a task process.'
import json, os, time
begun = time.perf_counter()
from evergreen.orchestration.dags import dags_to_parse, training_dag
imported = time.perf_counter()
for dag in dags_to_parse(training_dag):
    globals()[dag.dag_id] = dag
built = time.perf_counter()
if os.environ.get("_AIRFLOW_PARSING_CONTEXT_DAG_ID"):
    with open({file!r}, "a") as file:
        file.write(json.dumps({{"imports": imported - begun, "build": built - imported}}) + "\\n")
"""

HAND_WRITTEN = """
with DAG("pack{n:03}", schedule="0 3 * * *", start_date=START, catchup=False, max_active_runs=1, tags={{"train"}},
         doc_md="A model.", params={{"as_of": Param(None, type=["null", "string"]), "force": Param(False, type="boolean")}},
         default_args={{"owner": "me", "retries": 2}}) as dag{n}:
    @task
    def ingest(): return {{}}
    @task
    def validate(ingested): return {{}}
    @task
    def snapshot(ingested, validated): return {{}}
    @task
    def train(named): return {{}}
    @task
    def evaluate(named, trained): return {{}}
    @task
    def register(ingested, validated, named, trained, evaluated): return {{}}
    @task
    def promote(registered, evaluated): return {{}}
    a = ingest(); b = validate(a); c = snapshot(a, b); d = train(c); e = evaluate(c, d); f = register(a, b, c, d, e)
    promote(f, e)
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        for number in range(PACKS):
            file = scaffold(home / "packs", f"pack{number:03}") / "pack.yaml"
            file.write_text(file.read_text(encoding="utf-8").replace('"0 3 * * *"', "null"), encoding="utf-8")
        head = "from datetime import UTC, datetime\nfrom airflow.sdk import DAG, Param, task\nSTART = datetime(2000, 1, 1, tzinfo=UTC)\n"
        peer = home / "peer.py"
        peer.write_text(head + "".join(HAND_WRITTEN.format(n=n) for n in range(PACKS)), encoding="utf-8")
        env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        env |= {"EVERGREEN_PACKS": str(home / "packs"), "AIRFLOW_HOME": str(home / "airflow")}
        task = env | {"_AIRFLOW_PARSING_CONTEXT_DAG_ID": "pack050__train", "_AIRFLOW_PARSING_CONTEXT_TASK_ID": "train"}
        measure(OURS, env)  # writes the compiled modules
        rounds = [(measure(OURS, env), measure(PEER, env, str(peer)), measure(OURS, task)) for _ in range(ROUNDS)]
        real = middle(in_a_real_run(home))
    ours, peers, tasks = (middle([each[column] for each in rounds]) for column in range(3))
    print(
        f"{PACKS} packs, {ours['tasks']:.0f} tasks; median of {ROUNDS} fresh processes, seconds after import airflow.sdk"
    )
    print(f"  import evergreen.orchestration   {ours['imports']:6.3f}")
    print(f"  load {PACKS} packs, build the DAGs   {ours['build']:6.3f}   again: {ours['warm']:.3f}")
    print(f"  peer: {peers['dags']:.0f} DAGs by hand          {peers['build']:6.3f}")
    print("in a task process, one DAG of the hundred")
    print(f"  import evergreen.orchestration   {tasks['imports']:6.3f}")
    print(f"  first build                      {tasks['build']:6.4f}   again: {tasks['warm']:.4f}")
    print("in the task processes of a real run, forked from the scheduler, one DAG of the hundred")
    print(f"  import evergreen.orchestration   {real['imports']:6.3f}")
    print(f"  build                            {real['build']:6.4f}")
    total = ours["imports"] + ours["build"]
    print(
        f"{PACKS} packs: {total:.2f} s with imports (goal 0.50), {ours['build'] / peers['build']:.2f} x the peer without"
    )
    print(f"a task's DAG: {1000 * real['build']:.1f} ms in a real run (goal 10.0), {1000 * tasks['build']:.1f} ms bare")


def in_a_real_run(home: Path) -> list[dict[str, float]]:
    """The same of each task of one run through a scheduler on the same packs, one row a task."""
    (home / "dags").mkdir()
    told = home / "told.jsonl"
    (home / "dags" / "training.py").write_text(TIMED.format(file=str(told)), encoding="utf-8")
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ |= {
        "EVERGREEN_HOME": str(home / "home"),
        "EVERGREEN_PACKS": str(home / "packs"),
        "AIRFLOW__CORE__DAGS_FOLDER": str(home / "dags"),
        "AIRFLOW__API__PORT": str(free_port()),
        "EVERGREEN_MLFLOW_PORT": str(free_port()),
    }
    settings = Settings.from_env()
    try:
        list(embedded.up(settings))
        ended = embedded.run_through_scheduler(settings, "pack050", {}, lambda _: None)
        assert ended.success, ended
    finally:
        embedded.down(settings)
    return [json.loads(line) for line in told.read_text(encoding="utf-8").splitlines()]


def free_port() -> int:
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        return int(trial.getsockname()[1])


def measure(code: str, env: dict[str, str], *words: str) -> dict[str, float]:
    done = subprocess.run([sys.executable, "-c", code, *words], env=env, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def middle(rows: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(row[name] for row in rows) for name in rows[0]}


if __name__ == "__main__":
    main()
