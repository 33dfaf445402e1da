"""The audit: which models were served, and what each prediction was, in PostgreSQL or in SQLite in the state folder.

Hides SQL, its drivers, migrations, and the thread that writes. `recording` hands predictions to `writer.Writer`, which
groups all that wait into one transaction and chains their hashes; `relay.Relay` takes events out of the outbox;
`verify` and `replay` read it all again. Importing this package loads no driver: that takes a third of a second, and
happens on the writer's thread.
"""
