"""Where the serving certificate comes from: a Secret that the replicas share, or a folder that somebody else fills.

Own: whoever finds the one in the Secret due makes another; the Secret's resourceVersion decides between replicas, and
the loser uses what the winner wrote. The Secret is part of the install and only written here: who may create Secrets
can make one that holds the token of any ServiceAccount of the namespace. A certificate is served only once the
APIServices trust it.
"""

import asyncio
import base64
import binascii
import logging
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Protocol

from phoenix_operator.cluster import ApiError, Cluster
from phoenix_operator.kinds import API_SERVICE, SECRET
from phoenix_operator.metrics_api import certificates
from phoenix_operator.metrics_api.certificates import CertificateError, Pair
from phoenix_operator.metrics_api.names import API_SERVICES, NAME
from phoenix_operator.observed import Object

_log = logging.getLogger(__name__)
_MOST_TRIES = 5
_KEYS = ("tls.crt", "tls.key", "ca.crt")


class Source(Protocol):
    """Gives the certificate that is to be served now."""

    async def current(self) -> Pair:
        """Return it. Raises `CertificateError` and `ApiError`."""


class MountedCertificate:
    """`tls.crt` and `tls.key` of a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    async def current(self) -> Pair:
        """Return what is in the folder. Raises `CertificateError`."""
        pair = Pair(self._read("tls.crt"), self._read("tls.key"))
        certificates.expiry(pair)
        return pair

    def _read(self, name: str) -> bytes:
        file = self._folder / name
        try:
            return file.read_bytes()
        except OSError as error:
            raise CertificateError(f"{file}: cannot be read: {error.strerror or type(error).__name__}") from None


class OwnCertificate:
    """The Secret of the metrics API in its namespace, and the `caBundle` of its APIServices."""

    def __init__(
        self,
        cluster: Cluster,
        *,
        namespace: str,
        lifetime: timedelta,
        settle_s: float,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._cluster, self._namespace = cluster, namespace
        self._lifetime, self._settle_s, self._clock = lifetime, settle_s, clock
        self._given: Pair | None = None
        self._names = [
            f"{NAME}.{namespace}.svc",
            f"{NAME}.{namespace}.svc.cluster.local",
            f"{NAME}.{namespace}",
        ]

    async def current(self) -> Pair:
        """Return the pair of the Secret, made new where that is due and trusted. Raises as `Source`."""
        pair = await self._from_secret()
        await self._have_it_trusted(pair)
        if self._given not in (None, pair):
            await asyncio.sleep(self._settle_s)  # the API server watches its APIServices: it is not told at once
        self._given = pair
        return pair

    async def _from_secret(self) -> Pair:
        where = f"Secret {self._namespace}/{NAME}"
        for _ in range(_MOST_TRIES):
            secret = await self._cluster.get(SECRET, self._namespace, NAME)
            if secret is None:
                raise CertificateError(f"{where} does not exist; apply metrics-api.yaml again")
            pair = _pair(secret)
            if not certificates.is_due(pair, self._names, now=self._clock()):
                return pair
            try:
                return await self._renew(secret, pair)
            except ApiError as error:
                if error.code != 409:
                    raise
        raise CertificateError(f"{where} was changed by others {_MOST_TRIES} times in a row")

    async def _renew(self, secret: Object, old: Pair) -> Pair:
        before = old.authorities or (self._given.authorities if self._given else b"")
        try:
            pair = certificates.make(self._names, lifetime=self._lifetime, now=self._clock(), before=before)
        except CertificateError:  # what somebody wrote there are no certificates
            pair = certificates.make(self._names, lifetime=self._lifetime, now=self._clock())
        values = dict(zip(_KEYS, (pair.certificate, pair.key, pair.authorities), strict=True))
        data = {key: base64.b64encode(value).decode() for key, value in values.items()}
        metadata = {key: value for key, value in secret["metadata"].items() if key != "managedFields"}
        await self._cluster.replace(SECRET, secret | {"metadata": metadata, "data": data})
        _log.info("made a new serving certificate", extra={"expires": certificates.expiry(pair).isoformat()})
        return pair

    async def _have_it_trusted(self, pair: Pair) -> None:
        bundle = base64.b64encode(pair.authorities).decode()
        found = 0
        for name in API_SERVICES:
            service = await self._cluster.get(API_SERVICE, None, name)
            if service is None:
                continue
            found += 1
            spec = service["spec"]
            target = spec.get("service") or {}
            if (target.get("namespace"), target.get("name")) != (self._namespace, NAME):
                other = f"{target.get('namespace')}/{target.get('name')}"
                raise CertificateError(f"APIService {name} is of Service {other}, not of {self._namespace}/{NAME}")
            if spec.get("caBundle") != bundle:
                await self._cluster.apply(
                    API_SERVICE,
                    {
                        "apiVersion": API_SERVICE.api_version,
                        "kind": API_SERVICE.kind,
                        "metadata": {"name": name},
                        "spec": {"caBundle": bundle},
                    },
                )
        if not found:
            raise CertificateError(f"there is no APIService {' or '.join(API_SERVICES)}; apply metrics-api.yaml again")


def _pair(secret: Object) -> Pair:
    data = secret.get("data") or {}
    try:
        return Pair(*(base64.b64decode(data.get(key, ""), validate=True) for key in _KEYS))
    except (binascii.Error, ValueError, TypeError):
        return Pair(b"", b"")
