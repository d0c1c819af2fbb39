"""Alerts without a final decision; a pack's events by time."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.create_table(
        "undecided",
        sa.Column("alert", sa.String(64), primary_key=True),
        sa.Column("pack", sa.String(64), nullable=False),
        sa.Column("position", sa.Integer, nullable=False),
        sa.Column("due_at", sa.String(32), nullable=False),
        sa.Column("run_id", sa.String(250)),
        sa.Column("held", sa.Text),
    )
    op.create_index("ix_undecided_due", "undecided", ["due_at", "pack"])
    op.create_index("ix_events_pack_at", "events", ["pack", "at"])


def downgrade() -> None:
    op.drop_index("ix_events_pack_at", "events")
    op.drop_table("undecided")
