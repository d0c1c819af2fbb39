"""Wrong packs, kept as fixtures with what their author is told."""

from pathlib import Path

import pytest

from evergreen.errors import PackError
from evergreen.pack import Pack

FIXTURES = sorted((Path(__file__).parent / "invalid_packs").glob("*.yaml"))


@pytest.mark.parametrize("fixture", FIXTURES, ids=lambda file: file.stem)
def test_a_wrong_pack_names_file_line_value_and_fix(fixture, tmp_path):
    """The message holds what the fixture's first line expects, and fits on a screen."""
    folder = tmp_path / "wrong"
    folder.mkdir()
    (folder / "model.py").write_text("")
    text = fixture.read_text()
    (folder / "pack.yaml").write_text(text)
    with pytest.raises(PackError) as caught:
        Pack.load(folder)
    message = str(caught.value)
    expected = text.splitlines()[0].removeprefix("# expect: ").split(" | ")
    assert [part for part in expected if part not in message] == [], message
    assert len(message.splitlines()) <= 8
