"""The home examined: what is well, what is wrong, and what to do."""

from __future__ import annotations

import typer
from rich.text import Text

from evergreen.cli.terminal import AsJson, out, show_json
from evergreen.run import count
from evergreen.settings import Settings


def doctor(as_json: AsJson = False) -> None:
    """Examine the home, and say what is wrong with it and what to do. Changes nothing.

    The exit status is 1 where something is wrong.
    """
    from evergreen.loop.doctor import examine

    checks = examine(Settings.from_env())
    findings = [finding for check in checks for finding in check.findings]
    if as_json:
        show_json({"healthy": not findings, "checks": [check.model_dump(mode="json") for check in checks]})
        raise typer.Exit(1 if findings else 0)
    console = out()
    for check in checks:
        mark, colour = ("\N{BALLOT X}", "red") if check.findings else ("\N{CHECK MARK}", "green")
        console.print(Text.assemble((f"{mark} ", colour), (f"{check.name:<10}", "bold"), check.summary))
        for finding in check.findings:
            console.print(Text(f"  {finding.what}"))
            console.print(Text(f"    fix: {finding.fix}"))
        if check.skipped:
            console.print(Text(f"  not looked at: {check.skipped}", style="dim"))
    if findings:
        console.print(Text(f"{count(len(findings), 'thing')} to see to", style="bold red"))
        raise typer.Exit(1)
    console.print(Text("Nothing is wrong with this home.", style="bold green"))
