"""Runs the scripts on the connection that :mod:`enginecache.storage.registry.schema` hands over."""

from __future__ import annotations

from alembic import context

from enginecache.storage.registry.tables import METADATA

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=METADATA,
    render_as_batch=True,
    # The caller's transaction holds the write lock already; all scripts run inside it, or none.
    transactional_ddl=False,
    compare_type=True,
)
context.run_migrations()
