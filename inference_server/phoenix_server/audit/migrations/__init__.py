"""Alembic's folder: `env.py` runs the files of `versions`, each of which is one step of the schema."""
