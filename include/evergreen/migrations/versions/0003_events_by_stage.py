"""Events by the stage they are about, and looks of the monitor by their as-of."""

import json
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from alembic import op

from evergreen.database import where

revision = "0003"
down_revision = "0002"

AT_ONCE = 10_000


def upgrade() -> None:
    op.add_column("events", sa.Column("stage", sa.String(32)))
    op.add_column("events", sa.Column("as_of", sa.String(32)))
    _fill(op.get_bind())
    op.create_index("ix_events_stage", "events", ["pack", "kind", "stage", "position"], **where("stage IS NOT NULL"))
    op.create_index("ix_events_as_of", "events", ["pack", "kind", "as_of"], **where("as_of IS NOT NULL"))


def _fill(connection: sa.Connection) -> None:
    """What the bodies of the events that are there say."""
    columns: list[sa.ColumnClause[Any]] = [sa.column(name) for name in ("id", "kind", "body", "stage", "as_of")]
    events = sa.table("events", *columns)
    change = sa.update(events).where(events.c.id == sa.bindparam("row"))
    change = change.values(stage=sa.bindparam("new_stage"), as_of=sa.bindparam("new_as_of"))
    kinds = ("stage", "receipt", "failure", "drift")
    query = sa.select(events.c.id, events.c.body).where(events.c.kind.in_(kinds)).order_by(events.c.id).limit(AT_ONCE)
    last = 0
    while rows := connection.execute(query.where(events.c.id > last)).all():
        last = rows[-1].id
        bodies = [(row.id, json.loads(row.body)) for row in rows]
        said = [(row, body.get("stage"), (body.get("value") or {}).get("as_of")) for row, body in bodies]
        connection.execute(
            change, [{"row": row, "new_stage": stage, "new_as_of": _text(at)} for row, stage, at in said]
        )


def _text(as_of: str | None) -> str | None:
    return as_of and datetime.fromisoformat(as_of).astimezone(UTC).isoformat()


def downgrade() -> None:
    op.drop_index("ix_events_as_of", "events")
    op.drop_index("ix_events_stage", "events")
    op.drop_column("events", "as_of")
    op.drop_column("events", "stage")
