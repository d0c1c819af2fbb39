"""What a pack may say of drift. What is wrong in one: tests/contract/invalid_packs."""

import pytest
from pydantic import ValidationError

from evergreen.pack import DriftRules, Pack

PACK = """
description: Is it more?
owner: tests@example.com
source: {kind: csv, path: rows.csv}
data: {target: more, event_time: at}
training: {call: "model:train"}
gate: {primary: {metric: roc_auc}}
"""


def load(tmp_path, triggers: str = "") -> Pack:
    folder = tmp_path / "more"
    folder.mkdir()
    (folder / "pack.yaml").write_text(PACK + triggers)
    (folder / "model.py").write_text("")
    return Pack.load(folder)


def test_a_pack_that_does_not_say_is_not_monitored(tmp_path):
    """No rules rather than rules nobody asked for."""
    assert load(tmp_path).triggers.drift is None


def test_each_threshold_is_read_from_its_own_key(tmp_path):
    """Features, target, prediction and performance each have one; M and N are read from `violated`."""
    rules = load(
        tmp_path,
        "triggers: {drift: {features: {psi: 0.3}, target: {psi: 0.15}, prediction: {psi: 0.12}, "
        "performance: {drop: 0.05}, violated: 3 of 5}}",
    ).triggers.drift
    assert (rules.features.psi, rules.target.psi, rules.prediction.psi) == (0.3, 0.15, 0.12)
    assert (rules.performance.drop, rules.seen, rules.of) == (0.05, 3, 5)


def test_empty_rules_ask_for_the_defaults(tmp_path):
    """`drift: {}` is monitored, by what the README shows."""
    rules = load(tmp_path, "triggers: {drift: {}}").triggers.drift
    assert rules == DriftRules.model_validate(
        {
            "features": {"psi": 0.2},
            "target": {"psi": 0.1},
            "prediction": {"psi": 0.1},
            "performance": {"drop": 0.02},
            "violated": "2 of 3",
        }
    )


@pytest.mark.parametrize("violated", ["3 of 2", "0 of 3", "2", "two of three", "2 of 100"])
def test_windows_that_cannot_be_counted_are_refused(violated):
    """M is at least one and at most N; N has two digits."""
    with pytest.raises(ValidationError, match="write 2 of 3"):
        DriftRules(violated=violated)


@pytest.mark.parametrize("nothing", [{"features": {"psi": 0}}, {"performance": {"drop": -0.1}}])
def test_a_threshold_of_nothing_is_refused(nothing):
    """It would call every window a violation."""
    with pytest.raises(ValidationError, match="greater than 0"):
        DriftRules.model_validate(nothing)
