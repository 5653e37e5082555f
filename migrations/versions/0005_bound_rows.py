"""Entries that are bound to their engines, engines that were damaged, and answers by one of a wider reach."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

OLDEST_READER = 1
"""A reader of revision 0001 names the columns that it reads, and the new ones may be empty."""


def upgrade() -> None:
    op.add_column("entries", sa.Column("seal", sa.String(length=64), nullable=True))
    op.create_table(
        "set_asides",
        sa.Column("key", sa.String(length=64), nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("model_name", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("key", name=op.f("pk_set_asides")),
    )
    op.add_column("answers", sa.Column("siblings", sa.Text(), nullable=True))
