"""Runs migrations on the connection that `audit.migrate` hands over, inside its transaction."""

from alembic import context

attributes = context.config.attributes
context.configure(
    connection=attributes["connection"],
    version_table="schema_version",
    version_table_schema=attributes["schema"],
    transactional_ddl=False,  # the transaction is the caller's
)
context.run_migrations()
