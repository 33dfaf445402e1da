"""`phoenix-server migrate`, `audit verify` and `audit replay`: what they print and how they end.

Exit codes: 0 all is well; 3 something differs (a broken chain, a replay that is not identical); 4 it could not be
looked at (no database, no such prediction, no such model).
"""

import asyncio
import sys

from phoenix_server.artifacts import ArtifactStore
from phoenix_server.audit import migrate as migrations
from phoenix_server.audit.chain import AuditRow, Head
from phoenix_server.audit.database import Database, DatabaseError, Link
from phoenix_server.audit.replay import Comparison, Replay
from phoenix_server.audit.store import Store
from phoenix_server.audit.tables import VERSION
from phoenix_server.audit.verify import verify as verdicts
from phoenix_server.errors import ModelLoadError, StartError
from phoenix_server.settings import Settings

DIFFERS = 3
CANNOT_LOOK = 4


def parse_head(text: str) -> Head:
    """Read WRITER:SEQUENCE:HASH, as the log and the topic have them. Raises `ValueError`."""
    writer, sequence, digest = text.split(":")
    return Head(writer, int(sequence), bytes.fromhex(digest))


def migrate(settings: Settings) -> int:
    """Bring the schema to this version."""
    try:
        database = Database(settings)
        with database.connect() as link:
            is_changed = migrations.migrate(link)
            print(f"{database.place}: audit schema {'migrated to' if is_changed else 'is at'} version {VERSION}")
    except DatabaseError as error:
        return _cannot(error.message)
    return 0


def verify(settings: Settings, heads: list[Head]) -> int:
    """Walk every chain and print a line for each."""
    try:
        store = Store(Database(settings))
        with store.database.connect() as link:
            _known(link)
            broken = total = chains = 0
            for verdict in verdicts(store, link, heads):
                chains += 1
                total += verdict.rows
                if verdict.fault is None:
                    print(f"{verdict.writer}  {verdict.rows} rows  ok")
                else:
                    broken += 1
                    at = f"{verdict.fault.writer}-{verdict.fault.sequence}"
                    print(f"{verdict.writer}  {verdict.rows} rows  BROKEN at row {at}: {verdict.fault.text}")
    except DatabaseError as error:
        return _cannot(error.message)
    print(f"{chains} chains, {total} rows verified, {broken} broken")
    return DIFFERS if broken else 0


def replay(settings: Settings, artifacts: ArtifactStore, name: str | None, last: int) -> int:
    """Run predictions again: those of one id, or the newest ones."""
    return asyncio.run(_replay(settings, artifacts, name, last))


async def _replay(settings: Settings, artifacts: ArtifactStore, name: str | None, last: int) -> int:
    counts = dict.fromkeys(Comparison, 0)
    runner = Replay(artifacts)
    try:
        store = Store(Database(settings))
        with store.database.connect() as link:
            _known(link)
            connection = link.connection.execution_options(phoenix_reads_only=True)
            with store.database.errors(), connection.begin():
                rows: list[AuditRow] = (
                    list(store.last(connection, last)) if name is None else store.find(connection, name)
                )
                if not rows:
                    return _cannot("no prediction" + (f" with the id {name}" if name else " is recorded"))
                for row in rows:
                    found = await runner.run(row, store.model(connection, row))
                    counts[found.comparison] += 1
                    if found.comparison is not Comparison.IDENTICAL or name is not None:
                        text = f": {found.text}" if found.text else ""
                        print(f"{row.writer}-{row.sequence} {row.model} {row.version} {found.comparison.value}{text}")
    except DatabaseError as error:
        return _cannot(error.message)
    except StartError:
        raise
    except ModelLoadError as error:
        return _cannot(f"{error.reason}: {error.message}")
    finally:
        runner.close()
    print(", ".join(f"{count} {comparison.value}" for comparison, count in counts.items()))
    return DIFFERS if counts[Comparison.DIFFERENT] else 0


def _known(link: Link) -> None:
    version = migrations.version(link)
    if version != VERSION:
        raise DatabaseError(f"{link.database.place}: the audit schema has version {version}, expected {VERSION}")


def _cannot(text: str) -> int:
    print(text, file=sys.stderr)
    return CANNOT_LOOK
