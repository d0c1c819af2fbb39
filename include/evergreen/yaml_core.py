"""YAML as version 1.2 defines it, for every file that a person writes: the types of its "core schema", and no others.

PyYAML follows YAML 1.1, in which `NO` is false, `12:30` is 750, `010` is 8 and `1e-4` is text. Here only `true` and
`false` are booleans (also as `True` and `TRUE`), and numbers are what JSON, Python and people call numbers:

- integers: `10`, `010` (ten), `0o17`, `0xff`
- floats: `1.5`, `1e-4`, `.inf`, `.nan`
- null: `null`, `~`, or nothing at all
- everything else is text: `yes`, `on`, `NO`, `12:30`, `1_000`, `2013-04-01`. Whoever needs a date parses it.

The parser is PyYAML's in C. Loading builds plain values only and executes nothing.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

TAG = "tag:yaml.org,2002:"
TEXT_TAG = f"{TAG}str"

_SCALARS = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
)
"""Tag, pattern and first characters of the scalars that are not text, from section 10.3.2 of the specification."""


def _resolvers() -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
    for name, pattern, firsts in _SCALARS:
        for first in firsts:
            resolvers.setdefault(first, []).append((TAG + name, re.compile(rf"(?:{pattern})\Z")))
    return resolvers


class CoreLoader(yaml.CSafeLoader):
    """Loads YAML 1.2; pass it to `yaml.load` and `yaml.compose`. Raises yaml.YAMLError or ValueError."""

    yaml_implicit_resolvers = _resolvers()

    def construct_core_int(self, node: yaml.ScalarNode) -> int:
        """Build an int; PyYAML's own reads `010` as octal."""
        text = str(self.construct_scalar(node))
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))

    def construct_core_float(self, node: yaml.ScalarNode) -> float:
        """Build a float from `1e-4`, `.inf` and the like."""
        text = str(self.construct_scalar(node)).lower()
        return float(text.replace(".inf", "inf").replace(".nan", "nan"))


CoreLoader.add_constructor(f"{TAG}int", CoreLoader.construct_core_int)
CoreLoader.add_constructor(f"{TAG}float", CoreLoader.construct_core_float)


class CoreDumper(yaml.SafeDumper):
    """Writes YAML whose text is read back as text by YAML 1.1 and by 1.2: `1e-4` and `NO` are quoted."""


for _name, _pattern, _firsts in _SCALARS:
    CoreDumper.add_implicit_resolver(TAG + _name, re.compile(rf"(?:{_pattern})\Z"), _firsts)


def dump(content: Any) -> str:
    """Return `content` as YAML, its keys in their own order."""
    return str(yaml.dump(content, Dumper=CoreDumper, sort_keys=False))


def dump_on_one_line(content: Any) -> str:
    """Return `content` as YAML in one line, to be quoted in a message and copied from there."""
    written = yaml.dump(
        content, Dumper=CoreDumper, sort_keys=False, default_flow_style=True, allow_unicode=True, width=10**9
    )
    return str(written).removesuffix("\n")
