"""Whatever schemathesis makes of the webhook's schema, the server answers as that schema says."""

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from tests.served import PACK, Served

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


@pytest.fixture
def server(tmp_path):
    with Served(tmp_path).running() as served:
        yield served


def tried(server, path, method, examples, **call):
    """Requests made from the operation's schema, and such as break it; each answer is held against the schema."""
    operation = schemathesis.openapi.from_dict(server.app.openapi())[path][method]
    modes = [operation.as_strategy(generation_mode=mode) for mode in schemathesis.GenerationMode]

    @settings(max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=HealthCheck)
    @given(case=st.one_of(modes))
    def try_one(case):
        if "pack" in call:
            case.path_parameters = {"pack": call["pack"]}
        case.call_and_validate(base_url=server.url, checks=CHECKS, headers=call.get("headers"), timeout=60)

    try_one()


@pytest.mark.slow
def test_no_body_of_a_sender_ends_in_an_undocumented_answer(server):
    """For a pack that there is: 202, or a refusal that the schema has; never a 500. Some do reach the inbox."""
    tried(server, "/alerts/{pack}", "POST", 120, pack=PACK, headers={"authorization": f"Bearer {server.token}"})
    assert {202, 422} <= set(server.statuses)
    assert server.kept()


@pytest.mark.parametrize(("path", "method"), [("/alerts/{pack}", "POST"), ("/metrics", "GET")])
def test_nobody_gets_an_undocumented_answer(server, path, method):
    """From anybody, for any pack."""
    tried(server, path, method, 50)
    assert set(server.statuses) <= {401, 404, 405, 413}
