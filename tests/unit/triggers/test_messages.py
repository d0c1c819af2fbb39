"""Claims about what senders' bodies are read as."""

import hashlib
import json
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evergreen.errors import visible
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
    return messages.read("script", pack, headers, content, NOW).alerts


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
        (b'{"reason": "x", "evidence": ' + b"[" * 60_000, "recursion limit"),
        (b'{"a":' * 10_000, "recursion limit"),
        (b'{"reason": "x", "evidence": {"a": [' + b"[]," * 70_000 + b"[]]}}", "more than 65,536 objects and lists"),
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
        assert json.loads(json.dumps(alert.evidence, allow_nan=False)) == escaped(evidence)


def escaped(value):
    """A JSON value whose texts are visible."""
    if isinstance(value, dict):
        return {visible(key): escaped(child) for key, child in value.items()}
    if isinstance(value, list):
        return [escaped(child) for child in value]
    return visible(value) if isinstance(value, str) else value


@pytest.mark.parametrize("headers", [JSON, {"content-type": "application/cloudevents+json"}], ids=["plain", "event"])
def test_control_characters_are_kept_as_escapes(headers):
    """A message is worth more than its form: what a terminal would obey can be read instead, keys and lists included."""
    body = {"reason": "a\0b\x9bc", "evidence": {"\x1b[2J": ["\u202e", {"lines": "one\r\n\ttwo"}]}}
    (alert,) = read(body if headers is JSON else {**EVENT, "data": body}, headers)
    assert alert.reason == r"a\x00b\x9bc"
    assert alert.evidence == {r"\x1b[2J": [r"\u202e", {"lines": "one\r\n\ttwo"}]}


@pytest.mark.parametrize("notification", [ALERTMANAGER, grafana()], ids=["alertmanager", "grafana"])
def test_control_characters_in_one_alert_refuse_neither_it_nor_the_others(notification):
    """Of a hundred and twenty alerts with one bell in a label all are kept."""
    alert = notification["alerts"][0]
    alerts = [alert | {"fingerprint": f"f{number}"} for number in range(120)]
    alerts[7] = alerts[7] | {"labels": {"alertname": "Drift\x07"}, "annotations": {}}
    kept = read(notification | {"alerts": alerts})
    assert [alert.fingerprint for alert in kept] == [f"f{number}" for number in range(120)]
    assert kept[7].reason == r"Drift\x07"


WRONG = {
    "no labels": {"labels": None},
    "a label that is no text": {"labels": {"a": 1}},
    "another status": {"status": "pending"},
    "a fingerprint that is too long": {"fingerprint": "f" * 201},
    "a number past all bounds": {"values": {"B": 1e999}},
    "a label that is too long": {"labels": {"alertname": "x" * messages.BODY_BYTES}},
    "too many labels": {"labels": {str(number): "x" for number in range(20_000)}},
    "too many values": {"values": {"B": [0] * messages.BODY_BYTES}},
}


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG.keys())
def test_an_alert_that_cannot_be_kept_does_not_refuse_the_others(change):
    """What is wrong with it is said, by its place."""
    alert = ALERTMANAGER["alerts"][0]
    body = json.dumps(ALERTMANAGER | {"alerts": [alert, alert | change, "text", alert]}).replace("Infinity", "1e999")
    found = messages.read("script", "digits", JSON, body.encode(), NOW)
    assert len(found.alerts) == 2
    assert list(found.refused) == [1, 2]
    assert messages.numbered(1, found.refused[1]).startswith("alerts.1")
    assert messages.numbered(2, found.refused[2]) == "alerts.2: is no JSON object"


def test_alerts_past_the_thousandth_are_refused_and_the_others_kept():
    """An Alertmanager does not send a group again that was refused."""
    alert = grafana()["alerts"][0]
    alerts = [alert | {"fingerprint": str(number)} for number in range(1002)]
    found = messages.read("am", "digits", JSON, json.dumps(grafana() | {"alerts": alerts}).encode(), NOW)
    assert (len(found.alerts), found.refused) == (
        1000,
        {1000: "alert: this one and all after it, 2, are past the first 1,000"},
    )


def test_only_a_notification_may_be_large():
    """A single alert has the bound that it always had."""
    large = {"reason": "x", "evidence": {"a": "x" * messages.BODY_BYTES}}
    with pytest.raises(messages.TooLargeError):
        read(large)
    with pytest.raises(messages.TooLargeError):
        read({**EVENT, "data": large}, {"content-type": "application/cloudevents+json"})
