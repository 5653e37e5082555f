"""Rows that are bound: entries to their engines, what is remembered of files and command lines to a boot and a mount.

Also engines that were damaged, and answers by one of a wider reach.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

OLDEST_READER = 2
"""A reader of revision 0004 asks for memos by host."""


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
    # Nothing is taken along: no row says in which boot it was found.
    op.drop_table("file_memo")
    op.create_table(
        "file_memo",
        sa.Column("boot", sa.Text(), nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("mount", sa.Text(), nullable=False),
        sa.Column("device", sa.Text(), nullable=False),
        sa.Column("inode", sa.Text(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("mtime_ns", sa.BigInteger(), nullable=False),
        sa.Column("ctime_ns", sa.BigInteger(), nullable=False),
        sa.Column("found", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("boot", "kind", "mount", "device", "inode", name=op.f("pk_file_memo")),
    )
    op.drop_table("answers")
    op.create_table(
        "answers",
        sa.Column("command", sa.String(64), nullable=False),
        sa.Column("key", sa.String(64), nullable=False),
        sa.Column("build_id", sa.String(32), nullable=False),
        sa.Column("watched", sa.LargeBinary(), nullable=False),
        sa.Column("said", sa.LargeBinary(), nullable=False),
        sa.Column("printed", sa.LargeBinary(), nullable=False),
        sa.Column("seal", sa.String(64), nullable=False),
        sa.Column("boot", sa.Text(), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("siblings", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("command", name=op.f("pk_answers")),
    )
    info = sa.table("schema_info", sa.column("oldest_reader", sa.Integer))
    op.execute(sa.update(info).values(oldest_reader=OLDEST_READER))
