"""Claims about the senders file, on real files."""

import stat
import subprocess
import sys

import pytest

from evergreen.errors import SendersError
from evergreen.settings import Settings
from evergreen.triggers import senders
from evergreen.triggers.senders import Senders

SIGNING = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSwpzGSvT5ZrhE="
TOKEN = "a-token-of-thirty-two-characters"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "home" / "senders.yaml"


def written(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    path.chmod(0o600)
    return path


def test_a_made_secret_is_the_senders(path):
    """Of either kind; the file is made with it."""
    signing, bearer = senders.add(path, "script", "signing"), senders.add(path, "alertmanager", "bearer")
    known = Senders(path).now()
    assert (known["script"].signing, known["alertmanager"].bearer) == ((signing,), (bearer,))


def test_a_secret_made_elsewhere_is_taken_once(path):
    """Beside the newest before it, as in a rotation; taken again, nothing changes."""
    for _ in range(2):
        senders.accept(path, "alertmanager", "bearer", TOKEN)
    assert Senders(path).now()["alertmanager"].bearer == (TOKEN,)
    senders.accept(path, "alertmanager", "bearer", f"new-{TOKEN}")
    assert Senders(path).now()["alertmanager"].bearer == (f"new-{TOKEN}", TOKEN)


def test_only_its_owner_can_read_the_file(path):
    """From its making on, and after a change."""
    for name in ("one", "two"):
        senders.add(path, name, "bearer")
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o644])
def test_a_file_that_others_can_use_is_refused(path, mode):
    """Whoever could read it may have the secrets."""
    senders.add(path, "one", "bearer")
    path.chmod(mode)
    with pytest.raises(SendersError, match=r"mode is 6..\n.*chmod 600"):
        Senders(path).now()


def test_a_rotation_keeps_the_secret_before(path):
    """Two are active, the newest first; the next rotation ends the older."""
    first = senders.add(path, "one", "signing")
    second = senders.add(path, "one", "signing", rotate=True)
    assert Senders(path).now()["one"].signing == (second, first)
    third = senders.add(path, "one", "signing", rotate=True)
    assert Senders(path).now()["one"].signing == (third, second)


def test_a_second_secret_needs_a_rotation(path):
    """So that nobody ends a sender's secret by making a sender of its name."""
    before = senders.add(path, "one", "signing")
    with pytest.raises(SendersError, match="--rotate"):
        senders.add(path, "one", "signing")
    assert Senders(path).now()["one"].signing == (before,)


def test_a_change_is_seen_without_a_restart(path):
    """A rotation, an edit, a removal and a return."""
    known = Senders(path)
    with pytest.raises(SendersError, match="does not exist"):
        known.now()
    first = senders.add(path, "one", "bearer")
    assert known.now()["one"].bearer == (first,)
    second = senders.add(path, "one", "bearer", rotate=True)
    assert known.now()["one"].bearer == (second, first)
    written(path, f"one: {{bearer: [{TOKEN}], per_minute: 5}}")
    assert (known.now()["one"].bearer, known.now()["one"].per_minute) == ((TOKEN,), 5)
    path.chmod(0o644)
    with pytest.raises(SendersError, match="used by others"):
        known.now()


def test_names_and_secrets_that_look_like_other_types_are_text(path):
    """A sender may be called `no`, and a token be digits with an e: what is written is read back."""
    token = "1" * 40 + "e2"
    written(path, f"no: {{bearer: ['{token}'], per_minute: 010}}")
    senders.accept(path, "no", "signing", SIGNING)
    (no,) = Senders(path).now().values()
    assert (no.name, no.bearer, no.signing, no.per_minute) == ("no", (token,), (SIGNING,), 10)


def test_what_else_is_in_the_file_stays(path):
    """Making a sender leaves the others as they are."""
    written(path, f"grafana: {{bearer: [{TOKEN}], per_minute: 60}}")
    senders.add(path, "one", "signing")
    grafana = Senders(path).now()["grafana"]
    assert (grafana.bearer, grafana.per_minute) == ((TOKEN,), 60)


def test_senders_made_at_once_are_all_kept(path):
    """Six processes, each with a sender of its own."""
    code = (
        "import sys; from pathlib import Path; from evergreen.triggers import senders\n"
        "senders.add(Path(sys.argv[1]), sys.argv[2], 'bearer')"
    )
    names = [f"sender{n}" for n in range(6)]
    workers = [subprocess.Popen([sys.executable, "-c", code, str(path), name]) for name in names]
    assert [worker.wait() for worker in workers] == [0] * 6
    assert sorted(Senders(path).now()) == names
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_home_has_the_sender_of_the_command_line_once(path):
    """`ensure` makes it, and leaves it as it is from then on."""
    settings = Settings.from_env({"EVERGREEN_HOME": str(path.parent)})
    senders.ensure(settings)
    secret = senders.own_secret(settings)
    senders.ensure(settings)
    assert (secret[:6], senders.own_secret(settings)) == ("whsec_", secret)


def test_a_home_without_that_sender_says_how_to_make_it(path):
    """The command is in the error."""
    written(path, f"grafana: {{bearer: [{TOKEN}]}}")
    with pytest.raises(SendersError, match="evergreen sender evergreen --signing"):
        senders.own_secret(Settings.from_env({"EVERGREEN_HOME": str(path.parent)}))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (f"one: {{bearer: [{SIGNING}]}}", r"one\.bearer\.0: is a signing secret"),
        (f"one: {{signing: [{TOKEN}]}}", r"one\.signing\.0: is not a signing secret"),
        ("one: {bearer: [short]}", r"one\.bearer\.0: is not 32 or more"),
        ("one: {bearer: [1]}", r"one\.bearer\.0: is no text"),
        (f"one: {{bearer: [{TOKEN}]}}\ntwo: {{bearer: [{TOKEN}]}}", "one and two have a secret in common"),
        (f"one: {{bearer: {TOKEN}}}", r"one\.bearer: is no list"),
        ("one: {barer: []}", r"one\.barer: unknown key\n.*'bearer'"),
        ("one: {per_minute: 0}", r"one\.per_minute"),
        ("one: {per_minute: true}", r"one\.per_minute"),
        ("one: [a]", "one: is no mapping"),
        ("One: {}", "'One' cannot name a sender"),
        ("data: {}", "'data' cannot name a sender"),
        ("7: {}", "'7' cannot name a sender"),
        (f"one: &a {{bearer: [{TOKEN}]}}\ntwo: *a", "aliases"),
        (f"one: {{bearer: [{TOKEN}\ntwo: x", r":2: not YAML"),
        ("one: !!python/object/apply:os.system [ls]", "not YAML"),
        ("- one", "holds no mapping"),
        ("one: {}\none: {}", "one is there twice"),
    ],
)
def test_a_mistake_in_the_file_is_named_without_the_secret(path, text, why):
    """Where it is and what to do, and nothing that could be posted with."""
    written(path, text)
    with pytest.raises(SendersError, match=why) as refused:
        Senders(path).now()
    shown = str(refused.value)
    assert TOKEN not in shown
    assert SIGNING not in shown


def test_a_sender_is_shown_without_its_secrets():
    """In logs and tracebacks."""
    assert TOKEN not in repr(senders.Sender("one", bearer=(TOKEN,)))
