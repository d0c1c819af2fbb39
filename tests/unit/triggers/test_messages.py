"""Claims about what senders' bodies are read as."""

import hashlib
import json
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evergreen.triggers import messages
from evergreen.triggers.messages import ContentTypeError, MessageError

NOW = datetime(2026, 5, 4, 12, tzinfo=UTC)
JSON = {"content-type": "application/json"}
EVENT = {"specversion": "1.0", "id": "7", "source": "/warehouse", "type": "drift.found"}

ALERTMANAGER = {
    "version": "4",
    "groupKey": '{}:{alertname="Drift"}',
    "truncatedAlerts": 0,
    "status": "firing",
    "receiver": "evergreen",
    "groupLabels": {"alertname": "Drift"},
    "commonLabels": {"alertname": "Drift"},
    "commonAnnotations": {},
    "externalURL": "http://alertmanager:9093",
    "alerts": [
        {
            "status": "firing",
            "labels": {"alertname": "Drift", "carrier": "UA"},
            "annotations": {"summary": "PSI of dep_delay\n is 0.31"},
            "startsAt": "2026-05-04T11:58:00.000Z",
            "endsAt": "0001-01-01T00:00:00Z",
            "generatorURL": "http://prometheus:9090/graph?g0.expr=psi",
            "fingerprint": "c6eadffa33fcdf37",
        },
        {
            "status": "resolved",
            "labels": {"alertname": "Latency"},
            "annotations": {},
            "startsAt": "2026-05-04T10:00:00.000Z",
            "endsAt": "2026-05-04T11:59:00.000Z",
            "generatorURL": "",
            "fingerprint": "bc97ff14869b13e3",
        },
    ],
}


def grafana():
    """A body of Grafana's webhook contact point, by its documented shape."""
    return {
        "receiver": "evergreen",
        "status": "firing",
        "orgId": 1,
        "alerts": [
            {
                "status": "firing",
                "labels": {"alertname": "Late labels", "grafana_folder": "models"},
                "annotations": {"description": "AUC fell to 0.61"},
                "startsAt": "2026-05-04T13:58:03.157076+02:00",
                "endsAt": "0001-01-01T00:00:00Z",
                "generatorURL": "https://grafana.example/alerting/1afz29v7z/edit",
                "fingerprint": "57c6d9296de2ad39",
                "silenceURL": "https://grafana.example/alerting/silence/new?matcher=alertname%3DLate+labels",
                "dashboardURL": "",
                "panelURL": "",
                "values": {"B": 0.61, "C": 1},
                "valueString": "[ var='B' labels={} value=0.61 ], [ var='C' labels={} value=1 ]",
            }
        ],
        "groupLabels": {},
        "commonLabels": {"alertname": "Late labels"},
        "commonAnnotations": {},
        "externalURL": "https://grafana.example/",
        "version": "1",
        "groupKey": "{}:{}",
        "truncatedAlerts": 0,
        "title": "[FIRING:1]  (Late labels models)",
        "state": "alerting",
        "message": "**Firing**\n\nValue: B=0.61, C=1\n",
    }


def read(body, headers=JSON, pack="digits"):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return messages.read("script", pack, headers, content, NOW)


def test_a_message_says_why_and_as_of_when_with_what_evidence():
    """Each field comes through as it was meant."""
    (alert,) = read(
        {"reason": "drift of  dep_delay\n", "as_of": "2026-05-01", "evidence": {"psi": 0.3}, "fingerprint": "dep_delay"}
    )
    assert (alert.sender, alert.reason, alert.as_of, alert.evidence, alert.fingerprint, alert.status) == (
        "script",
        "drift of dep_delay",
        datetime(2026, 5, 1, tzinfo=UTC),
        {"psi": 0.3},
        "dep_delay",
        "firing",
    )


def test_the_same_reason_is_the_same_complaint():
    """Where no fingerprint is said."""
    one, same, other = (read({"reason": reason})[0].fingerprint for reason in ("drift", " drift ", "latency"))
    assert (one == same, one == other) == (True, False)


@pytest.mark.parametrize(
    ("headers", "sender_id"),
    [
        ({"webhook-id": "msg_1", "idempotency-key": "key"}, "msg_1"),
        ({"idempotency-key": "key"}, "key"),
        ({"ce-specversion": "1.0", "ce-id": "7", "ce-source": "/warehouse", "ce-type": "x"}, "/warehouse 7"),
        ({}, hashlib.sha256(b'{"reason":"drift"}').hexdigest()),
    ],
)
def test_a_message_is_known_by_its_senders_id(headers, sender_id):
    """The header's, else the event's, else the body's hash."""
    assert read(b'{"reason":"drift"}', JSON | headers)[0].sender_id == sender_id


def test_a_cloudevents_data_are_the_message():
    """In structured mode; source and id are the sender's id of it."""
    headers = {"content-type": "application/cloudevents+json; charset=UTF-8"}
    (alert,) = read({**EVENT, "time": "2026-05-04T11:00:00Z", "data": {"reason": "drift"}}, headers)
    assert (alert.reason, alert.sender_id) == ("drift", "/warehouse 7")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"specversion": "0.3"}, "specversion"),
        ({"id": ""}, "id"),
        ({"source": None}, "source: is no text"),
        ({"data": None}, "data: is no JSON object"),
        ({"data": {"reasn": "drift"}}, r"data\.reason: is missing"),
        ({"datacontenttype": "text/xml"}, "datacontenttype"),
    ],
)
def test_what_is_no_cloudevent_is_refused_by_its_field(change, why):
    """Structured mode."""
    event = {**EVENT, "data": {"reason": "drift"}, **change}
    with pytest.raises(MessageError, match=why):
        read(event, {"content-type": "application/cloudevents+json"})


def test_a_cloudevent_in_headers_must_be_whole():
    """Binary mode without a source is refused, and says so."""
    with pytest.raises(MessageError, match="ce-source: is missing"):
        read({"reason": "drift"}, JSON | {"ce-specversion": "1.0", "ce-id": "7", "ce-type": "x"})


def test_each_alert_of_alertmanagers_notification_is_one():
    """With its own fingerprint, a reason that can be read, its evidence; a resolved one as resolved."""
    firing, resolved = read(ALERTMANAGER)
    assert (firing.reason, firing.fingerprint, firing.status) == (
        "Drift: PSI of dep_delay is 0.31",
        "c6eadffa33fcdf37",
        "firing",
    )
    assert firing.evidence["labels"] == {"alertname": "Drift", "carrier": "UA"}
    assert (resolved.reason, resolved.status) == ("Latency", "resolved")


def test_a_repeated_notification_repeats_its_alerts():
    """By fingerprint, beginning and status, whatever else changed; a later firing is another alert."""
    again = json.loads(json.dumps(ALERTMANAGER))
    again["alerts"][0]["annotations"]["summary"] = "PSI is 0.35"
    ids = [alert.sender_id for alert in read(ALERTMANAGER)]
    assert [alert.sender_id for alert in read(again)] == ids
    again["alerts"][0]["startsAt"] = "2026-05-04T12:58:00.000Z"
    again["alerts"][1]["status"] = "firing"
    assert not set(ids) & {alert.sender_id for alert in read(again)}


def test_grafanas_notification_is_read():
    """Its name and description are the reason, its values are evidence."""
    (alert,) = read(grafana())
    assert (alert.reason, alert.fingerprint) == ("Late labels: AUC fell to 0.61", "57c6d9296de2ad39")
    assert alert.evidence["values"] == {"B": 0.61, "C": 1}


def test_a_long_summary_is_cut():
    """A reason has at most 500 characters, whoever wrote it."""
    body = grafana()
    body["alerts"][0]["annotations"]["description"] = "far " * 500
    assert (len(read(body)[0].reason), read(body)[0].reason[-1]) == (500, "…")


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b"", "body: is not JSON"),
        (b"{", "body: is not JSON"),
        (b'\xff{"reason": "x"}', "body: is not JSON"),
        (b'{"reason": "\xed\xa0\x80"}', "body: is not JSON"),
        (rb'{"reason": "\ud800"}', "body: is not JSON"),
        (b'{"reason": "x", "evidence": {"a": NaN}}', "body: is not JSON"),
        (b'{"reason": "x", "evidence": {"a": -Infinity}}', "body: is not JSON"),
        (b'{"reason": "x", "evidence": {"a": [1e999]}}', r"evidence\.a\.0: the number is too large"),
        (b'{"reason": "x", "evidence": ' + b"[" * 100_000, "recursion limit"),
        (b'{"a":' * 10_000, "recursion limit"),
        (rb'{"reason": "a\u0000b"}', "reason: holds a control character"),
        (rb'{"reason": "a\u009bb"}', "reason: holds a control character"),
        (rb'{"reason": "x", "evidence": {"\u001b[2J": 1}}', r"evidence\.'\\\\?x1b\[2J'"),
        (b"[]", "body: is no JSON object"),
        (b"null", "body: is no JSON object"),
        (b"{}", "reason: is missing"),
        (b'{"reason": 5}', "reason: is no text"),
        (b'{"reason": " "}', "reason: is empty"),
        (json.dumps({"reason": "x" * 501}).encode(), "reason: .*500"),
        (b'{"reason": "x", "reasons": []}', "reasons: unknown field"),
        (b'{"reason": "x", "evidence": [1]}', "evidence: is no JSON object"),
        (b'{"reason": "x", "fingerprint": ""}', "fingerprint"),
        (b'{"reason": "x", "as_of": "yesterday"}', "as_of: 'yesterday' is not a time"),
        (b'{"reason": "x", "as_of": "0001-01-01T00:00:00+23:00"}', "as_of"),
        (b'{"reason": "x", "as_of": 1700000000}', "as_of: is no text"),
        (b'{"reason": "x", "as_of": "2026-05-04T12:06:00Z"}', "as_of: .* is in the future"),
        (b'{"reason": "x", "pack": "flights"}', "pack: 'flights' is not the pack it was posted for"),
        (b'{"alerts": []}', "version: is missing"),
        (b'{"version": "4", "alerts": []}', "alerts"),
        (b'{"version": "5", "alerts": [{}]}', "version"),
        (b'{"version": "4", "alerts": [{"status": "gone"}]}', r"alerts\.0\.status"),
        (
            b'{"version": "4", "alerts": [{"status": "firing", "labels": {"a": 1}}]}',
            r"alerts\.0\.labels\.a: is no text",
        ),
    ],
)
def test_a_mistake_is_named_by_its_field(body, why):
    """And the sender can mend it."""
    with pytest.raises(MessageError, match=why):
        read(body)


@pytest.mark.parametrize(
    "kind", ["", "text/plain", "application/x-www-form-urlencoded", "application/json; charset=latin1"]
)
def test_only_json_is_read(kind):
    """The refusal says what to send."""
    with pytest.raises(ContentTypeError, match="send application/json"):
        read({"reason": "x"}, {"content-type": kind})


def test_a_senders_id_that_is_too_long_is_refused():
    """Ids stand in the inbox."""
    with pytest.raises(MessageError, match="idempotency-key: is longer than 200"):
        read({"reason": "x"}, JSON | {"idempotency-key": "k" * 201})


def test_a_clock_that_is_a_little_ahead_is_forgiven():
    """Five minutes, as for signatures."""
    assert read({"reason": "x", "as_of": (NOW + timedelta(minutes=4)).isoformat()})[0].as_of == NOW + timedelta(
        minutes=4
    )


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def refused(body):
    """What a refusal says; None where the body is read."""
    try:
        read(body)
    except MessageError as error:
        return str(error)
    return None


@given(body=st.binary() | VALUES.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_are_refused_in_a_line_fit_for_a_log(body):
    """Nothing ends in another error."""
    assert (refused(body) or "").isprintable()


@given(evidence=st.dictionaries(st.text(max_size=5), VALUES, max_size=3))
def test_what_is_read_can_be_stored(evidence):
    """As JSON without NaN, which is how events are stored."""
    body = {"reason": "x", "evidence": evidence}
    if refused(body) is None:
        (alert,) = read(body)
        assert json.loads(json.dumps(alert.evidence, allow_nan=False)) == evidence
