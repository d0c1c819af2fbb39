"""Whether a service is well, for the health checks of the stack: `health.py URL [PART | --token FILE]` or `health.py worker`.

Airflow's own commands would say it too, each for seconds of computing; asked twice a minute, that is a tenth of a core.
"""

from __future__ import annotations

import json
import socket
import sys
import urllib.request
from pathlib import Path


def main() -> None:
    """Exit with 0 when the service is well."""
    what, *part = sys.argv[1:]
    if what == "worker":
        from celery import Celery

        with Celery(broker=Path("/run/secrets/broker_url").read_text(encoding="ascii").strip()) as app:
            well = bool(app.control.ping(destination=[f"celery@{socket.gethostname()}"], timeout=10))
    else:
        request = urllib.request.Request(what)  # noqa: S310  an address of the stack's own
        if part[:1] == ["--token"]:
            request.add_header("Authorization", f"Bearer {Path(part.pop()).read_text(encoding='ascii').strip()}")
            part.clear()
        with urllib.request.urlopen(request, timeout=8) as answer:  # noqa: S310
            body = answer.read()
        well = not part or json.loads(body)[part[0]]["status"] == "healthy"
    sys.exit(not well)


if __name__ == "__main__":
    main()
