"""The executor of a home on one machine: Airflow's LocalExecutor, whose tasks start with their imports done."""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

from airflow.executors.local_executor import LocalExecutor
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import now


class ReadyExecutor(LocalExecutor):
    """Every task's process is a fork of the scheduler's: what is imported there once, no task imports again."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self._sent: Counter[Any] = Counter()

    def start(self) -> None:
        """Import what tasks need of other packages, then start the workers.

        Evergreen's own modules are forgotten again: each task reads them as they are on disk, since a stage's key says
        what code it ran. Together a task gets to its work 0.15 s sooner, which is most of what it costs.
        """
        try:
            from evergreen import loop  # noqa: F401
            from evergreen.orchestration import admission, dags

            dags.dags_to_parse(dags.training_dag)  # Airflow imports some of itself when the first DAG is made
            admission.admission_dag()
        except Exception:
            self.log.exception("tasks will start slowly: what they need could not be imported ahead")
        for name in [name for name in sys.modules if name.partition(".")[0] == "evergreen"]:
            del sys.modules[name]
        _let_sqlite_tell_fractions_of_a_second()
        super().start()

    def _process_workloads(self, workload_list: Any) -> None:
        self._sent.update(workload.key for workload in workload_list)
        super()._process_workloads(workload_list)

    def change_state(self, key: Any, state: Any, info: Any = None, remove_running: bool = True) -> None:
        """Report what became of a workload, unless the same try has been sent out once more since.

        A task that slept may be woken before the process that put it to sleep has left, which takes that up to five
        seconds. The scheduler would read the end of the old process as that of the new one, and fail the try.
        """
        if remove_running and self._sent[key] > 1:
            self._sent[key] -= 1
            return
        if remove_running:
            del self._sent[key]
        super().change_state(key, state, info, remove_running)

    def end(self) -> None:
        """Leave at once, with the tasks that run.

        Airflow's waits for them, and so would a scheduler that an error has ended, for the hours of a training, scheduling
        nothing meanwhile. A task is tried again, and finds its job at work.
        """
        for worker in self.workers.values():
            worker.kill()


def _let_sqlite_tell_fractions_of_a_second() -> None:
    """Let `now()` in this process's queries mean now.

    SQLite's CURRENT_TIMESTAMP is the last whole second: a run that may start after 10:41:33.2 would wait until
    10:41:34, and a chain of two runs a second on average. Other databases are not concerned.
    """

    @compiles(now, "sqlite")
    def _(_element: Any, _compiler: Any, **_options: Any) -> str:
        return "STRFTIME('%Y-%m-%d %H:%M:%f000', 'now')"
