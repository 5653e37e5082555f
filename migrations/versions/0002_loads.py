"""What came of loading a plan; the timing cache that a build began with."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

OLDEST_READER = 1
"""A reader of revision 0001 names the columns that it reads, and the new one may be empty."""


def upgrade() -> None:
    op.add_column("entries", sa.Column("timing_cache_digest", sa.String(length=64), nullable=True))
    op.create_table(
        "loads",
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("device", sa.Text(), nullable=False),
        sa.Column("toolchain", sa.Text(), nullable=False),
        sa.Column("driver", sa.Text(), nullable=False),
        sa.Column("outcome", sa.String(length=16), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("digest", "device", "toolchain", "driver", name=op.f("pk_loads")),
    )
