"""A rollback beside what people do without one: train again, or move the alias and hope.

A home with two champions of `flight_delay`; then, each in processes of its own as a person would start them, best of
three rounds: `evergreen rollback` (the model folder's bytes verified in MLflow and in the store, 256 predictions made
again and compared, the alias moved by intent, a checkpoint noted); the peers are `evergreen run --force`, which trains
again on the data of the version to restore, and MLflow's own client, which moves the alias and verifies nothing. Goal:
at most 5 s.

    python benchmarks/rollback.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from evergreen.registry import promotion
from evergreen.registry.models import Registry
from evergreen.settings import Settings

ROUNDS = 3
PACK = "flight_delay"
EVERGREEN = str(Path(sys.executable).with_name("evergreen"))
ALIAS = """
import sys, mlflow
uri, name, version = sys.argv[1:]
mlflow.MlflowClient(uri, registry_uri=uri).set_registered_model_alias(name, "champion", version)
"""


def main() -> None:
    with TemporaryDirectory() as folder:
        settings = Settings.from_env({"EVERGREEN_HOME": folder})
        env = os.environ | {"EVERGREEN_HOME": folder}
        two_champions(settings, env)
        rounds = []
        for number in range(ROUNDS):
            alias = [sys.executable, "-c", ALIAS, settings.mlflow_tracking_uri, PACK]
            taken = {}
            taken["rollback"], said = timed(env, EVERGREEN, "rollback", PACK, "--why", f"round {number}", "--json")
            taken["of that, verified and moved"] = json.loads(said)["seconds"]
            timed(env, EVERGREEN, "rollback", PACK, "--to", "2", "--why", f"round {number}")
            taken["MLflow's client"], _ = timed(env, *alias, "1")
            timed(env, *alias, "2")
            taken["train again"], _ = timed(env, EVERGREEN, "run", PACK, "--as-of", "2013-04-01", "--force")
            rounds.append(taken)
        seconds = {name: min(each[name] for each in rounds) for name in rounds[0]}
        print(f"{PACK}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, best of {ROUNDS} rounds")
        for name, best in seconds.items():
            print(f"  {name:28} {best:6.2f} s   {best / seconds['rollback']:6.2f} x rollback")
        print(f"rollback: {seconds['rollback']:.2f} s (goal 5.00)")


def two_champions(settings: Settings, env: dict[str, str]) -> None:
    """Versions 1 and 2, the second put there by hand where the gate would not have it: the ledger knows it as foreign."""
    for as_of in ("2013-04-01", "2013-05-01"):
        timed(env, EVERGREEN, "run", PACK, "--as-of", as_of)
    registry = Registry(settings)
    champion = registry.champion(PACK)
    if champion is None or champion.version != 2:
        registry.set_alias(PACK, "champion", 2)
    from evergreen.database import Database

    promotion.settle(Database(settings.database_url), registry, PACK)


def timed(env: dict[str, str], *command: str) -> tuple[float, str]:
    """Seconds, and what it said; ends the benchmark when it fails."""
    began = time.perf_counter()
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: {done.stdout[-500:]}{done.stderr[-500:]}")
    return time.perf_counter() - began, done.stdout


if __name__ == "__main__":
    main()
