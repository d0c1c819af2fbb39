"""Alembic's entry: runs on the connection that `evergreen.database` hands it."""

from alembic import context

from evergreen.database import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
with context.begin_transaction():
    context.run_migrations()
