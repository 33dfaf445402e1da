"""The first tables: models, predictions (by month on PostgreSQL), chains, outbox.

Audit rows are never changed: triggers say so to the owner too, whom grants do not bind.
"""

from typing import Any

import sqlalchemy as sa
from alembic import context, op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Make everything."""
    schema = context.config.attributes["schema"]
    is_postgresql = op.get_bind().dialect.name == "postgresql"
    moment: sa.types.TypeEngine[Any] = sa.DateTime(timezone=True) if is_postgresql else sa.Text()
    op.create_table(
        "models",
        *(sa.Column(name, sa.Text, primary_key=True) for name in ("namespace", "name", "version", "digest")),
        *(sa.Column(name, sa.Text, nullable=False) for name in ("uri", "folder", "signature")),
        *(sa.Column(name, moment, nullable=False) for name in ("first_seen", "last_seen")),
        schema=schema,
    )
    op.create_table(
        "predictions",
        sa.Column("writer", sa.Text, nullable=False),
        sa.Column("sequence", sa.BigInteger, nullable=False),
        sa.Column("written", moment, nullable=False),
        sa.Column("time", moment, nullable=False),
        sa.Column("latency_us", sa.BigInteger, nullable=False),
        *(
            sa.Column(name, sa.Text, nullable=False)
            for name in ("namespace", "model", "version", "digest", "provider", "runtime", "outcome", "request_id")
        ),
        *(sa.Column(name, sa.Text) for name in ("event_id", "entity", "caller", "error")),
        *(sa.Column(name, sa.LargeBinary) for name in ("inputs", "outputs", "features")),
        sa.Column("hash", sa.LargeBinary, nullable=False),
        sa.PrimaryKeyConstraint("writer", "sequence", "written"),  # PostgreSQL wants the partition's column in it
        schema=schema,
        postgresql_partition_by="RANGE (written)",
    )
    op.create_index("predictions_written", "predictions", ["written"], schema=schema)
    op.create_index("predictions_request_id", "predictions", ["request_id"], schema=schema)
    op.create_table(
        "chains",
        sa.Column("writer", sa.Text, primary_key=True),
        sa.Column("sequence", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("is_pruned", sa.Boolean, primary_key=True),
        sa.Column("hash", sa.LargeBinary, nullable=False),
        sa.Column("time", moment, nullable=False),
        schema=schema,
    )
    op.create_table(
        "outbox",
        sa.Column(
            "id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), sa.Identity(always=True), primary_key=True
        ),
        sa.Column("time", moment, nullable=False),
        *(sa.Column(name, sa.Text, nullable=False) for name in ("event_id", "topic")),
        *(sa.Column(name, sa.LargeBinary, nullable=False) for name in ("key", "value")),
        schema=schema,
    )
    (_forbid_on_postgresql if is_postgresql else _forbid_on_sqlite)(schema)


def _forbid_on_postgresql(schema: str | None) -> None:
    prefix = "" if schema is None else f"{op.get_bind().dialect.identifier_preparer.quote_identifier(schema)}."
    op.execute(f"CREATE TABLE {prefix}predictions_default PARTITION OF {prefix}predictions DEFAULT")
    op.execute(
        f"""CREATE FUNCTION {prefix}refuse_change() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN RAISE EXCEPTION 'rows of % are never changed or deleted', TG_TABLE_NAME
           USING ERRCODE = 'insufficient_privilege'; END $$"""
    )
    for table in ("predictions", "chains"):
        op.execute(
            f"CREATE TRIGGER refuse_change BEFORE UPDATE OR DELETE ON {prefix}{table} "
            f"FOR EACH ROW EXECUTE FUNCTION {prefix}refuse_change()"
        )


def _forbid_on_sqlite(_: str | None) -> None:
    for table in ("predictions", "chains"):
        for change in ("UPDATE", "DELETE"):
            op.execute(
                f"CREATE TRIGGER {table}_refuse_{change.lower()} BEFORE {change} ON {table} "
                f"BEGIN SELECT RAISE(ABORT, 'rows of {table} are never changed or deleted'); END"
            )
