"""`evergreen …`: what an engineer asks of the platform from a terminal. Shows, and hands on; decides nothing.

Every command takes `--json`: one JSON document on standard output, with stable keys. The exit status is 0 when what
was asked for is so, 1 when it failed, 2 when the words of the command were wrong.
"""

from evergreen.cli.commands import app, main

__all__ = ["app", "main"]
