"""YAML 1.2's core schema, whoever wrote the file."""

import math

import pytest
import yaml

from evergreen.yaml_core import CoreLoader, dump, dump_on_one_line

SCALARS = {
    "1e-4": 1e-4,
    "-1E5": -1e5,
    ".5": 0.5,
    "1.": 1.0,
    "+1": 1,
    "010": 10,
    "0o10": 8,
    "0x1F": 31,
    ".inf": math.inf,
    "-.INF": -math.inf,
    "~": None,
    "null": None,
    "": None,
    "true": True,
    "True": True,
    "FALSE": False,
    **{
        text: text
        for text in ("yes", "no", "NO", "on", "off", "y", "tRue", "12:30", "190:20:30", "1_000", "0b11", "0o8", "1.5.2")
    },
    **{text: text for text in ("2013-04-01", "2013-13-45", "2013-04-01T06:00:00Z", "<<", "=", ".", "1e", "nan", "inf")},
}


@pytest.mark.parametrize(("text", "expected"), SCALARS.items())
def test_a_scalar_has_the_type_of_the_core_schema(text, expected):
    """Numbers are numbers, `true` and `false` alone are booleans, all else is text; in values and in keys."""
    value = yaml.load(f"a: {text}", Loader=CoreLoader)["a"]
    assert (value, type(value)) == (expected, type(expected))
    (key,) = yaml.load(f"? {text}\n: 1", Loader=CoreLoader)
    assert (key, type(key)) == (expected, type(expected))


def test_not_a_number_is_a_float():
    """`.nan`, which equals nothing."""
    assert math.isnan(yaml.load(".nan", Loader=CoreLoader))


@pytest.mark.parametrize("text", SCALARS)
def test_quoted_scalars_are_text(text):
    """Quotes make text of anything."""
    assert yaml.load(f"'{text}'", Loader=CoreLoader) == text


@pytest.mark.parametrize("text", SCALARS)
def test_text_that_is_written_is_read_back_as_text(text):
    """By this reader, and by one of YAML 1.1."""
    assert yaml.load(dump([text]), Loader=CoreLoader) == yaml.safe_load(dump([text])) == [text]


@pytest.mark.parametrize(
    "name", ["true", "NO", "1e5", "a: b", "x,y", "#", "it's", 'say "x"', "*", "[bold]", "ä", "-x", "x" * 300]
)
def test_a_mapping_that_a_message_quotes(name):
    """It is one line, and read back as what was meant by YAML 1.1 and by 1.2."""
    line = dump_on_one_line({"column": name})
    assert "\n" not in line
    assert yaml.safe_load(line) == yaml.load(line, CoreLoader) == {"column": name}


def test_a_plain_name_in_a_message_is_not_quoted():
    """Most names need no quotes, and get none."""
    assert dump_on_one_line({"column": "flooded"}) == "{column: flooded}"
