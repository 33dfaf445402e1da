"""API keys: who may ask. Hides the key file and the comparison.

The file holds one key a line; empty lines and lines that begin with `#` are left out. It is read again when it changes,
so that keys can be rotated without a restart. Health endpoints and metrics need no key.
"""

import contextlib
import hashlib
import hmac
import os
from pathlib import Path

from phoenix_server.errors import Code, PhoenixError, Reason, StartError


class ApiKeys:
    """The keys of one file."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._stamp = 0
        self._keys: tuple[bytes, ...] = ()
        try:
            self._read()
        except OSError as error:
            raise StartError(
                Reason.INVALID_SETTING, f"PHOENIX_API_KEYS_FILE: cannot read {file}: {error.strerror}"
            ) from error
        if not self._keys:
            raise StartError(Reason.INVALID_SETTING, f"PHOENIX_API_KEYS_FILE: {file} holds no key")

    def check(self, authorization: bytes | None) -> None:
        """Raise UNAUTHENTICATED without a bearer key, FORBIDDEN with a wrong one."""
        scheme, _, key = (authorization or b"").partition(b" ")
        if scheme.lower() != b"bearer" or not key.strip():
            raise PhoenixError(
                Code.UNAUTHENTICATED, "an API key is needed: send the header 'Authorization: Bearer KEY'"
            )
        with contextlib.suppress(OSError):  # the keys known so far stay
            self._read()
        # Every key is compared, so that the time taken tells nothing of which one was close.
        if not sum([hmac.compare_digest(key.strip(), known) for known in self._keys]):
            raise PhoenixError(Code.FORBIDDEN, "the API key is not known")

    @staticmethod
    def caller(authorization: bytes | None) -> str:
        """Return what tells apart who holds which key, and is no key: the first digits of its hash."""
        key = (authorization or b"").partition(b" ")[2].strip()
        return f"key:{hashlib.sha256(key).hexdigest()[:16]}"

    def _read(self) -> None:
        stamp = os.stat(self._file).st_mtime_ns
        if stamp != self._stamp:
            lines = (line.strip() for line in self._file.read_bytes().splitlines())
            self._keys = tuple(line for line in lines if line and not line.startswith(b"#"))
            self._stamp = stamp
