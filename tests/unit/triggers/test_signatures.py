"""Claims about Standard Webhooks signatures, held against the standard's own library."""

import json
from datetime import UTC, datetime

import pytest
import standardwebhooks
from hypothesis import assume, given
from hypothesis import strategies as st

from evergreen.errors import AlertError
from evergreen.triggers import signatures
from evergreen.triggers.signatures import SignatureError, key_of, sign, verify

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSwpzGSvT5ZrhE="
OTHER = "whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oDpzGSvT5ZrhE="
NOW = 1_700_000_000
IDS = st.from_regex(r"[!-\-/-~]{1,200}", fullmatch=True)


def signed(body, *, id="msg_1", at=NOW, secret=SECRET):  # noqa: A002
    return {
        "webhook-id": id,
        "webhook-timestamp": str(at),
        "webhook-signature": sign(secret, id, at, body),
    }


def accepted(headers, body, *, now=NOW, secrets=(SECRET,)):
    try:
        verify([key_of(secret) for secret in secrets], headers, body, now)
    except SignatureError:
        return False
    return True


@given(id=IDS, text=st.text(st.characters(exclude_categories=["Cs"])))
def test_what_the_standards_library_signs_is_accepted(id, text):  # noqa: A002
    """Any body, any id."""
    given_by = standardwebhooks.Webhook(SECRET).sign(id, datetime.fromtimestamp(NOW, UTC), text)
    headers = {"webhook-id": id, "webhook-timestamp": str(NOW), "webhook-signature": given_by}
    assert accepted(headers, text.encode())


@given(id=IDS, value=st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), st.integers()))
def test_what_is_signed_here_the_standards_library_accepts(id, value):  # noqa: A002
    """Any JSON object, any id, at the time it is."""
    body = json.dumps(value).encode()
    headers = signed(body, id=id, at=int(datetime.now(UTC).timestamp()))
    assert standardwebhooks.Webhook(SECRET).verify(body, headers) == value


@given(body=st.binary(max_size=200), data=st.data())
def test_one_flipped_bit_is_refused(body, data):
    """In the body, or in any of the three headers."""
    headers = signed(body)
    where = data.draw(st.sampled_from([*headers, "body"]))
    content = bytearray(body if where == "body" else headers[where].encode())
    assume(content)
    place = data.draw(st.integers(0, len(content) * 8 - 1))
    content[place // 8] ^= 1 << place % 8
    flipped = headers if where == "body" else headers | {where: content.decode("latin-1")}
    assert not accepted(flipped, bytes(content) if where == "body" else body)


@given(
    headers=st.fixed_dictionaries(
        {}, optional={f"webhook-{name}": st.text() for name in ("id", "timestamp", "signature")}
    ),
    body=st.binary(),
)
def test_whatever_comes_is_refused_in_good_order(headers, body):
    """Headers of any text end in a refusal, never in another error."""
    assert not accepted(headers, body)


@pytest.mark.parametrize(
    ("off", "fine"), [(-301, False), (-300, True), (-299, True), (299, True), (300, True), (301, False)]
)
def test_a_message_is_fresh_within_300_seconds(off, fine):
    """Either way, to the second."""
    assert accepted(signed(b"{}", at=NOW + off), b"{}") is fine


@pytest.mark.parametrize("header", ["webhook-id", "webhook-timestamp", "webhook-signature"])
def test_a_message_without_one_of_its_headers_is_refused(header):
    """Each of the three is needed."""
    headers = signed(b"{}")
    del headers[header]
    assert not accepted(headers, b"{}")


def test_a_message_of_another_secret_is_refused():
    """What matters is the key."""
    assert not accepted(signed(b"{}", secret=OTHER), b"{}")


def test_any_active_secret_and_any_given_signature_will_do():
    """A sender in the midst of a rotation signs twice, and the receiver knows two secrets."""
    headers = signed(b"{}")
    twice = headers | {
        "webhook-signature": f"v1a,AAAA {sign(OTHER, 'msg_1', NOW, b'{}')} {headers['webhook-signature']}"
    }
    assert accepted(twice, b"{}")
    assert accepted(headers, b"{}", secrets=(OTHER, SECRET))


def test_the_key_that_signed_is_told():
    """So that the sender is known by its key."""
    assert verify([key_of(OTHER), key_of(SECRET)], signed(b"{}"), b"{}", NOW) == key_of(SECRET)


def test_the_signed_text_cannot_be_cut_elsewhere():
    """An id with a full stop could pass the timestamp of another message for its own."""
    headers = signed(b"{}", id=f"msg.{NOW}", at=NOW + 1)
    moved = {**headers, "webhook-id": "msg", "webhook-timestamp": str(NOW)}
    assert not accepted(headers, b"{}")
    # What is left of the trick needs a body that is no JSON.
    assert accepted(moved, f"{NOW + 1}.{{}}".encode())


@pytest.mark.parametrize(
    "secret", ["MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "whsec_short", "whsec_####", "whsec_" + "QUFB" * 22]
)
def test_what_is_no_signing_secret_is_refused_unseen(secret):
    """The error says what is wrong without showing it."""
    with pytest.raises(ValueError, match="signing secret") as refused:
        key_of(secret)
    assert secret.removeprefix("whsec_") not in str(refused.value)


def test_a_post_to_nobody_says_so():
    """The address, and how to start what should answer."""
    with pytest.raises(AlertError, match=r"http://127\.0\.0\.1:9/evergreen/alerts/digits: nobody answers.*\n.*make up"):
        signatures.post("http://127.0.0.1:9", "digits", SECRET, {"reason": "drift"})
