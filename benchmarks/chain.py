"""The whole chain in process, from an empty home, beside a plain script that does the same work without a platform.

Claim: not slower than the script as one would first write it, and at most 1.3 × the same script tuned. The chain does
more (see `plain_script.py`, the peer, for what it leaves out); both pay their own imports, in processes of their own.

    python benchmarks/chain.py [ROUNDS]
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
BIN = Path(sys.executable).parent


def timed(command: list[str], **environment: str) -> tuple[float, str]:
    """Seconds and standard output of a command that must succeed."""
    env = {**os.environ, **environment}
    env.pop("PYTHONDONTWRITEBYTECODE", None)
    began = time.perf_counter()
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - began
    if done.returncode:
        sys.exit(f"{command[0]} failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return seconds, done.stdout


def main(rounds: int) -> None:
    taken: dict[str, list[float]] = {"chain": [], "chain, again": [], "script": [], "script, tuned": []}
    stages: dict[str, list[float]] = {}
    for number in range(rounds):
        folder = Path(tempfile.mkdtemp(prefix="evergreen-bench-"))
        run = [str(BIN / "evergreen"), "run", "flight_delay", "--as-of", "2013-04-01", "--json"]
        script = [sys.executable, str(HERE / "plain_script.py")]
        cases = {
            "chain": (run, {"EVERGREEN_HOME": str(folder / "home")}),
            "script": ([*script, str(folder / "first")], {}),
            "script, tuned": ([*script, str(folder / "tuned"), "--tuned"], {}),
            "chain, again": (run, {"EVERGREEN_HOME": str(folder / "home")}),
        }
        for name, (command, environment) in cases.items():
            seconds, output = timed(command, **environment)
            taken[name].append(seconds)
            if name == "chain":
                for stage in json.loads(output)["stages"]:
                    stages.setdefault(stage["stage"], []).append(stage["seconds"])
            print(f"round {number + 1}  {name:<14} {seconds:6.1f} s", flush=True)
        shutil.rmtree(folder)
    print()
    middle = {name: statistics.median(values) for name, values in taken.items()}
    for name, seconds in middle.items():
        print(f"{name:<14} {seconds:6.1f} s  (of {rounds}: {', '.join(f'{value:.1f}' for value in taken[name])})")
    print("stages         " + "  ".join(f"{stage} {statistics.median(each):.1f}" for stage, each in stages.items()))
    print(f"chain / script        {middle['chain'] / middle['script']:.2f}  (goal ≤ 1.00)")
    print(f"chain / script, tuned {middle['chain'] / middle['script, tuned']:.2f}  (goal ≤ 1.30)")
    print(f"chain again / chain   {middle['chain, again'] / middle['chain']:.2f}  (nothing new to learn)")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
