"""The places a job can run in: one module each, same contract."""

from pathlib import Path
from typing import Protocol


class Runtime(Protocol):
    """What each module here offers. `folder` is the job's; a job is started by one caller at a time."""

    def launch(self, folder: Path) -> None:
        """Start `evergreen.runner` on the folder, so that it outlives the caller. Raises JobError."""

    def alive(self, folder: Path) -> bool:
        """Whether the job runs, whoever started it."""

    def age_s(self, folder: Path) -> float:
        """Seconds since the last launch."""

    def join(self, folder: Path, timeout_s: float) -> bool:
        """Wait for the job's end, at most so long; whether it has ended. Returns within 50 ms of the end."""

    def stop(self, folder: Path, grace_s: float = 5.0) -> None:
        """End all processes of the job: ask, then, after the grace, kill. Nothing to stop is no error."""
