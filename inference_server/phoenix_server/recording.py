"""Keeps predictions as the manifest says: joins audit and events, so that the two never disagree.

| `bindings.postgres.audit.mode` | a prediction is answered | its event |
|---|---|---|
| `Durable` | when its row is committed, else 503 | in the outbox, in the same transaction; a relay delivers it |
| `BestEffort` | at once; its row waits in a bounded queue | handed to the events at once |
| `Off`, or no `postgres` | at once; there is no row | handed to the events at once |

Implements the data plane's `Recorder`. The audit's thread starts with the first model that has the binding.
"""

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakKeyDictionary

from phoenix_api import AuditMode
from phoenix_server.audit.record import Record
from phoenix_server.audit.relay import Relay
from phoenix_server.audit.writer import Writer
from phoenix_server.binding_state import BindingState
from phoenix_server.dataplane import Prediction
from phoenix_server.metrics import Metrics
from phoenix_server.served_model import ServedModel
from phoenix_server.settings import Settings

if TYPE_CHECKING:
    from phoenix_server.audit.chain import Head

_log = logging.getLogger(__name__)
_HEAD_DEADLINE_S = 10.0
