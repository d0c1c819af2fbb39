"""The tasks around a person's answer: a question on Airflow's own page, what comes of it, and what starts both."""

from __future__ import annotations

import json
from contextlib import suppress
from datetime import timedelta
from typing import Any, NoReturn
from urllib.parse import quote

from airflow.providers.standard.operators.hitl import HITLOperator
from airflow.sdk import BaseOperator, BaseOperatorLink, Param, get_current_context, task
from airflow.sdk.exceptions import (
    AirflowFailException,
    AirflowSkipException,
    DagRunTriggerException,
    TaskAwaitingInput,
    TaskDeferred,
)

from evergreen.orchestration.tasks import within_airflow
from evergreen.orchestration.watchers import AnswerBell
from evergreen.pack import Pack
from evergreen.run import sayable, slug_of
from evergreen.settings import Settings

RETRY: dict[str, Any] = {"retries": 2, "retry_delay": timedelta(seconds=5)}


def ask_task(pack: Pack) -> Ask:
    """The question; its output is the answer, where a person or the time-out gave one."""
    return Ask(
        task_id="ask",
        pack=pack.name,
        subject=f"{pack.name}: promote the challenger?",
        options=["promote", "reject"],
        defaults="reject",
        params={
            "comment": Param(
                "",
                type=["null", "string"],
                title="Comment",
                description="Why. It stays on the version and in the history.",
                format="multiline",
            )
        },
        response_timeout=pack.gate.approval_timeout,
        doc_md="Show the report, and wait for an answer: without a slot, until the time-out rejects.",
        **RETRY,
    )


def answer_task(pack: Pack) -> Any:
    """An Airflow task that writes down what was answered and does it, whatever became of the question."""

    @task(
        task_id="answer",
        trigger_rule="all_done",
        show_return_value_in_logs=False,
        doc_md="Write down who said what, and do it. It runs whatever became of the question.",
        **RETRY,
    )
    def act(said: dict[str, str | None] | None) -> str:
        from evergreen.loop import approval

        context = get_current_context()
        ended = approval.answer(
            Settings.from_env(),
            pack.name,
            context["params"]["run"],
            approval.Answer.model_validate({**said, "through": "Airflow"}) if said else None,
            version=context["params"]["version"],
            holder=context["dag_run"].run_id,
        )
        if ended is None:
            raise AirflowFailException(
                "the question ended without an answer, and the version goes on waiting: clear the task ask, "
                "or answer with evergreen approve or evergreen reject"
            )
        return ended

    return act


class Ask(HITLOperator):
    """Airflow's question to a person, its body the report; it ends too when nobody needs to answer any more."""

    template_fields = ()  # what the report says is data

    def __init__(self, *, pack: str, **more: Any) -> None:
        super().__init__(**more)
        self.pack = pack

    def execute(self, context: Any) -> None:
        from evergreen.loop import approval

        params = context["params"]
        if why := approval.overtaken(Settings.from_env(), self.pack, params["run"], params["version"]):
            raise AirflowSkipException(why)
        task = context["task_instance"]
        if task.try_number == task.max_tries - self.retries + 1:
            self._ask(context)
        else:  # the try that failed may have been answered, and to ask again would wipe the answer out
            self._wait(context)

    def _ask(self, context: Any) -> NoReturn:
        from evergreen.loop import approval

        params, web = context["params"], within_airflow("/evergreen")
        self.subject, self.body = approval.question(
            Settings.from_env(), self.pack, params["run"], params["version"], web
        )
        with suppress(TaskAwaitingInput):  # parked like that, a task hears of a person and of the time-out alone
            super().execute(context)
        self._wait(context)

    def _wait(self, context: Any) -> NoReturn:
        raise TaskDeferred(
            trigger=AnswerBell(
                pack=self.pack,
                run=context["params"]["run"],
                version=context["params"]["version"],
                ti_id=context["task_instance"].id,
                options=self.options,
                defaults=self.defaults,
                params={},  # what comes with an answer is not held to the form
                timeout_datetime=context["task_instance"].start_date + self.response_timeout,
            ),
            method_name="execute_complete",
        )

    def execute_complete(self, context: Any, event: dict[str, Any]) -> dict[str, str | None]:
        if why := event.get("overtaken"):
            raise AirflowSkipException(why)
        if event.get("unasked"):
            self._ask(context)
        heard = super().execute_complete(context, {**event, "params_input": {}})
        person = heard["responded_by_user"]
        return {
            "choice": heard["chosen_options"][0],
            "person": (person["name"] or person["id"]) if person else None,
            "comment": _comment(event["params_input"] or {}),
        }


def _comment(sent: dict[str, Any]) -> str:
    """What came with an answer: the comment; as JSON where it is another thing than the page sends, as the API may."""
    comment = sent.get("comment") or ""
    asked = sent.keys() <= {"comment"} and isinstance(comment, str)
    return sayable(comment if asked else json.dumps(sent, sort_keys=True, ensure_ascii=False))


class QuestionLink(BaseOperatorLink):
    """From the training to the run that asks."""

    name = "The question"

    def get_link(self, operator: Any, *, ti_key: Any) -> str:  # noqa: ARG002 -- Airflow calls it by these names
        """Where it is on this Airflow; nothing where nobody is asked."""
        if operator.asks is None:
            return ""
        return within_airflow(f"/dags/{operator.asked}/runs/{quote(operator.asks, safe='')}")


class StartApproval(BaseOperator):
    """Asks for the run of `<pack>__approval`, where the version waits; its id is the training run's, so it is one run.

    It raises what TriggerDagRunOperator raises, whose module imports Airflow's database models: every parse of the
    training DAGs would pay a third of a second for them.
    """

    operator_extra_links = (QuestionLink(),)

    def __init__(self, *, asked: str, **more: Any) -> None:
        super().__init__(**more)
        self.asked = asked
        self.asks: str | None = None

    def execute(self, context: Any) -> None:
        promoted = context["ti"].xcom_pull(task_ids="promote")
        if promoted is None:
            raise AirflowFailException(
                "promote gave nothing, being marked as a success by hand: clear it, so that it runs"
            )
        if not promoted["waits"]:
            raise AirflowSkipException("nobody needs to be asked")
        run_id = context["dag_run"].run_id
        self.asks = f"version_{promoted['version']}__{slug_of(run_id)}"
        raise DagRunTriggerException(
            trigger_dag_id=self.asked,
            dag_run_id=self.asks,
            conf={"run": run_id, "version": promoted["version"]},
            logical_date=None,
            reset_dag_run=False,
            skip_when_already_exists=True,
            wait_for_completion=False,
            allowed_states=["success"],
            failed_states=["failed"],
            poke_interval=60,
            deferrable=False,
        )


def start_task(pack: Pack) -> StartApproval:
    """The last task of `<pack>__train`."""
    return StartApproval(
        task_id="approval",
        asked=f"{pack.name}__approval",
        doc_md="Where the verdict is for a person to give: start the run that asks.",
        **RETRY,
    )
