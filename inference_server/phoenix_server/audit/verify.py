"""`phoenix-server audit verify`: walks every chain and names the first row of each that does not hold."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from phoenix_server.audit.chain import Break, Head, check
from phoenix_server.audit.database import Link
from phoenix_server.audit.store import Store


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was found of one writer's chain. `rows` held before the break, if there is one."""

    writer: str
    rows: int
    fault: Break | None


def verify(store: Store, link: Link, heads: Sequence[Head] = ()) -> Iterator[Verdict]:
    """Yield a verdict for each writer, reading one state of the database however long it takes.

    `heads` are those that were published outside of the database (log, topic): with them the end of a chain, or a whole
    chain, cannot be missing unnoticed. Raises `DatabaseError`.
    """
    connection = link.connection
    level = {} if store.database.is_sqlite else {"isolation_level": "REPEATABLE READ"}
    with store.database.errors():
        connection = connection.execution_options(phoenix_reads_only=True, **level)
        with connection.begin():
            writers = store.writers(connection)
            writers += sorted({head.writer for head in heads} - set(writers))
            for writer in writers:
                known = store.heads(connection, writer) + [head for head in heads if head.writer == writer]
                rows, fault = 0, None
                for step in check(writer, store.chain(connection, writer), known):
                    if isinstance(step, Break):
                        fault = step
                    else:
                        rows += 1
                yield Verdict(writer, rows, fault)
