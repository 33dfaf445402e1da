"""Redis, PostgreSQL and Kafka as processes of this machine: private, on ports of their own, each in one folder.

What a service is (`Service`) is the same for all; the modules know the command lines and files of theirs. Used by the
tests' fixtures (`tests/services.py`) and by `python -m lab services`. Standard library only.
"""

from .kafka import Kafka
from .postgres import Postgres
from .redis import Redis
from .service import Login, Service

__all__ = ["Kafka", "Login", "Postgres", "Redis", "Service"]
