"""A snapshot's cost beside reading the bytes once, beside ten partitions, and beside the stock DVC command line.

Goals: 1 GiB in 365 files put and committed in at most 1.7 times what `md5sum` takes for the same files; one more
partition on 1,000 at most twice what it costs on 10. Each figure is the best of three rounds within this run, so that a
busy machine shows less; caches, remotes and repositories are on one disk, in the temporary folder, and new in each
round; files are in the page cache and written back.

    python benchmarks/snapshot.py
"""

from __future__ import annotations

import functools
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

from evergreen.data.store import Store
from evergreen.run import Ref
from evergreen.settings import Settings

FILES, TOTAL_BYTES = 365, 2**30
ROUNDS = 3
START = datetime(2013, 1, 1, tzinfo=UTC)
DVC = str(Path(sys.executable).with_name("dvc"))
PEER_SETTINGS = "cache.type=reflink,hardlink,symlink, analytics off"


def main() -> None:
    with TemporaryDirectory() as folder:
        home = Path(folder)
        source = home / "source"
        write_partitions(source)
        rounds = [whole_snapshot(home / f"round{number}", source) for number in range(ROUNDS)]
        seconds = {name: min(each[name] for each in rounds) for name in rounds[0]}
        md5sum = seconds["md5sum"]
        print(f"1 GiB in {FILES} files, {os.cpu_count()} cores, best of {ROUNDS} rounds")
        for name, taken in seconds.items():
            print(f"  {name:32} {taken:6.2f} s   {taken / md5sum:5.2f} x md5sum")
        print(f"  peer: dvc add, git commit and tag, dvc push from the command line; {PEER_SETTINGS}")
        few, many = (one_more(home / f"on{count}", count) for count in (10, 1000))
        print("one more partition, put and committed, everything pushed")
        print(f"  on 10 {few * 1000:.0f} ms, on 1,000 {many * 1000:.0f} ms: {many / few:.2f} x (goal 2.00)")
        print(f"snapshot of 1 GiB: {seconds['put + commit'] / md5sum:.2f} x md5sum (goal 1.70)")


def write_partitions(folder: Path) -> None:
    folder.mkdir()
    generator = random.Random(7)
    for number in range(FILES):
        (folder / f"{START + timedelta(days=number):%Y-%m-%d}.parquet").write_bytes(
            generator.randbytes(TOTAL_BYTES // FILES)
        )


def whole_snapshot(home: Path, source: Path) -> dict[str, float]:
    """Seconds by what was done, from nothing to a tagged snapshot in the remote."""
    home.mkdir()
    copy = home / "copy"  # The store links what it is given and turns it read-only: each gets files of its own.
    subprocess.run(["cp", "-r", str(source), str(copy)], check=True)
    subprocess.run(["cp", "-r", str(source), str(home / "flights")], check=True)
    store = Store(Settings.from_env({"EVERGREEN_HOME": str(home / "evergreen")}))
    store.push([store.put_bytes(b"warm")])
    refs: list[Ref] = []
    files: dict[str, Ref] = {}
    os.sync()
    md5sum = timed(lambda: run("md5sum", *map(str, sorted(copy.iterdir())), cwd=home))
    put = timed(lambda: refs.append(store.put(copy)))
    push = timed(lambda: store.push(refs))
    files.update(store.listing(refs[0]))
    commit = timed(lambda: store.commit("flights", files, tag_time=START, message="benchmark"))
    prepare_peer(home)
    os.sync()
    peer = timed(lambda: peer_snapshot(home))
    for place in ("copy", "evergreen", "flights", ".dvc", "peer"):
        subprocess.run(["rm", "-rf", str(home / place)], check=True)
    return {
        "md5sum": md5sum,
        "put": put,
        "put + commit": put + commit,
        "put + push + commit": put + push + commit,
        "stock dvc": peer,
    }


def prepare_peer(home: Path) -> None:
    run("git", "init", "--quiet", cwd=home)
    run(DVC, "init", "--quiet", cwd=home)
    run(DVC, "config", "cache.type", "reflink,hardlink,symlink", cwd=home)
    run(DVC, "config", "core.analytics", "false", cwd=home)
    run(DVC, "remote", "add", "--quiet", "--default", "store", str(home / "peer"), cwd=home)


def peer_snapshot(home: Path) -> None:
    run(DVC, "add", "--quiet", "flights", cwd=home)
    run("git", "add", "flights.dvc", ".gitignore", ".dvc", cwd=home)
    run("git", "-c", "user.name=A", "-c", "user.email=a@example.com", "commit", "--quiet", "-m", "benchmark", cwd=home)
    run("git", "tag", "benchmark", cwd=home)
    run(DVC, "push", "--quiet", cwd=home)


def one_more(home: Path, count: int) -> float:
    """Seconds to add one partition of 100 kB to a committed dataset of `count`; median of five."""
    store = Store(Settings.from_env({"EVERGREEN_HOME": str(home)}))
    generator = random.Random(count)
    files = {f"{number:05}.parquet": store.put_bytes(generator.randbytes(100_000)) for number in range(count)}
    store.commit("flights", files, tag_time=START, message="benchmark")

    def add(number: int) -> None:
        content = generator.randbytes(100_000)
        files[f"{count + number:05}.parquet"] = store.put_bytes(content)
        store.commit("flights", files, tag_time=START + timedelta(days=number), message="benchmark")

    return statistics.median(timed(functools.partial(add, number)) for number in range(1, 6))


def timed(act: Callable[[], object]) -> float:
    begun = time.perf_counter()
    act()
    return time.perf_counter() - begun


def run(*command: str, cwd: Path) -> None:
    subprocess.run(command, cwd=cwd, check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
