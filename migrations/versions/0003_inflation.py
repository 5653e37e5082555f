"""The steps of eviction's inflation; whether a failed build would fail again."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

OLDEST_READER = 1
"""A reader of revision 0001 names the columns that it reads and writes, and the new one may be empty."""


def upgrade() -> None:
    op.add_column("builds", sa.Column("is_lasting", sa.Boolean(), nullable=True))
    op.create_table(
        "inflation",
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("value", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("at", name=op.f("pk_inflation")),
    )
