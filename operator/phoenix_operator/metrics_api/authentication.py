"""Who asks: the API server, known by its front-proxy certificate, says on whose behalf in the headers of a request.

Hides the ConfigMap kube-system/extension-apiserver-authentication, in which the API server writes which authority signs
that certificate, which names it may have and what the headers are called. It is read again and again, because the
authority is rotated. TLS has verified the certificate's signature before anything is asked here.
"""

import asyncio
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import unquote

from phoenix_operator.cluster import ApiError, Cluster
from phoenix_operator.kinds import CONFIG_MAP
from phoenix_operator.observed import Object

_log = logging.getLogger(__name__)
CONFIG_NAMESPACE, CONFIG_NAME = "kube-system", "extension-apiserver-authentication"
_EVERY_S, _RETRY_S = 10.0, 2.0


class ConfigError(Exception):
    """A ConfigMap that is not there or does not say what it should."""


class Unauthenticated(Exception):
    """A request from nobody that is known; the message says what is missing."""


class Headers(Protocol):
    """The headers of a request: case-insensitive, several of a name."""

    def get(self, name: str, /) -> str | None:
        """Return the first value of a header."""

    def getall(self, name: str, default: list[str], /) -> list[str]:
        """Return all values of a header."""

    def keys(self) -> Any:
        """Return the names."""


@dataclass(frozen=True, slots=True)
class Caller:
    """On whose behalf the API server asks."""

    name: str
    uid: str = ""
    groups: tuple[str, ...] = ()
    extra: tuple[tuple[str, tuple[str, ...]], ...] = ()


@dataclass(frozen=True, slots=True)
class FrontProxy:
    """What the ConfigMap says. No `allowed_names`: every certificate of the authority will do."""

    authorities_pem: str
    allowed_names: tuple[str, ...]
    username_headers: tuple[str, ...]
    uid_headers: tuple[str, ...]
    group_headers: tuple[str, ...]
    extra_prefixes: tuple[str, ...]


def front_proxy(config_map: Object) -> FrontProxy:
    """Return what a ConfigMap says. Raises `ConfigError`."""
    data: Mapping[str, str] = config_map.get("data") or {}
    authorities = data.get("requestheader-client-ca-file", "")
    if "BEGIN CERTIFICATE" not in authorities:
        raise ConfigError(
            "requestheader-client-ca-file: expected a certificate; the API server has no aggregation layer"
        )
    found = FrontProxy(
        authorities,
        allowed_names=_names(data, "requestheader-allowed-names"),
        username_headers=_names(data, "requestheader-username-headers"),
        uid_headers=_names(data, "requestheader-uid-headers"),
        group_headers=_names(data, "requestheader-group-headers"),
        extra_prefixes=_names(data, "requestheader-extra-headers-prefix"),
    )
    if not found.username_headers:
        raise ConfigError("requestheader-username-headers: expected the name of a header, got none")
    return found


def authenticate(proxy: FrontProxy, certificate: Mapping[str, Any] | None, headers: Headers) -> Caller:
    """Return the caller. `certificate` is that of the connection, verified by TLS. Raises `Unauthenticated`."""
    if not certificate:
        raise Unauthenticated("expected the client certificate of the API server's front proxy, got none")
    if proxy.allowed_names and _common_name(certificate) not in proxy.allowed_names:
        raise Unauthenticated("the client certificate is not one that requestheader-allowed-names names")
    name = _first(headers, proxy.username_headers)
    if not name:
        raise Unauthenticated(f"expected the caller's name in the header {' or '.join(proxy.username_headers)}")
    groups = [value for header in proxy.group_headers for value in headers.getall(header, []) if value]
    return Caller(name, _first(headers, proxy.uid_headers), tuple(groups), _extra(headers, proxy.extra_prefixes))


class FrontProxyConfig:
    """The ConfigMap, kept current. `changed` is called when what it says is another."""

    def __init__(self, cluster: Cluster, *, changed: Callable[[], None]) -> None:
        self._cluster, self._changed = cluster, changed
        self.current: FrontProxy | None = None

    async def follow(self) -> None:
        """Read it for ever; what was read before stands while it cannot be read."""
        told = ""
        while True:
            try:
                await self.read()
                told, wait_s = "", _EVERY_S
            except (ConfigError, ApiError) as error:
                if str(error) != told:
                    told = str(error)
                    _log.warning("the front proxy is not known", extra={"cause": told})
                wait_s = _EVERY_S if self.current else _RETRY_S
            await asyncio.sleep(wait_s)

    async def read(self) -> None:
        """Read it now. Raises `ConfigError` and `ApiError`."""
        config_map = await self._cluster.get(CONFIG_MAP, CONFIG_NAMESPACE, CONFIG_NAME)
        if config_map is None:
            raise ConfigError(f"ConfigMap {CONFIG_NAMESPACE}/{CONFIG_NAME} does not exist")
        found = front_proxy(config_map)
        if found != self.current:
            self.current = found
            self._changed()


def _names(data: Mapping[str, str], key: str) -> tuple[str, ...]:
    text = data.get(key, "").strip()
    try:
        names = json.loads(text) if text else []
    except ValueError:
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{key}: expected a JSON list of names, got {text[:80]!r}")
    return tuple(name.strip() for name in names if name.strip())


def _common_name(certificate: Mapping[str, Any]) -> str:
    names = [value for part in certificate.get("subject", ()) for key, value in part if key == "commonName"]
    return names[-1] if names else ""


def _first(headers: Headers, names: Sequence[str]) -> str:
    return next((value for name in names if (value := headers.get(name))), "")


def _extra(headers: Headers, prefixes: Sequence[str]) -> tuple[tuple[str, tuple[str, ...]], ...]:
    found: dict[str, list[str]] = {}
    for prefix in prefixes:
        for name in dict.fromkeys(str(name).lower() for name in headers.keys()):  # noqa: SIM118
            if name.startswith(prefix.lower()):
                found.setdefault(unquote(name[len(prefix) :]), []).extend(headers.getall(name, []))
    return tuple((key, tuple(values)) for key, values in sorted(found.items()))
