"""Who asks: the API key, or the address where no keys are asked for. Hides proxies and how addresses are written.

`X-Forwarded-For` says anything its sender likes, so it counts only where the peer is a proxy that the settings trust.
The client is then the last address in it that is no such proxy. An IPv6 client is its /64: a host may use all of one.
"""

import functools
import ipaddress
from collections.abc import Sequence

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
_IPV6_PREFIX = 64
# Longer texts are no address, and must not fill the cache's memory.
_ADDRESS_CHARACTERS = 64


def parse_networks(text: str) -> tuple[Network, ...]:
    """Return the networks of a list like `10.0.0.0/8, 192.0.2.7`; raise `ValueError` that names what is none."""
    networks = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        try:
            networks.append(ipaddress.ip_network(part))
        except ValueError as error:
            raise ValueError(f"expected addresses or networks (10.0.0.0/8), separated by commas: {error}") from None
    return tuple(networks)


class Clients:
    """Tells clients apart."""

    def __init__(self, *, is_keyed: bool = False, proxies: Sequence[Network] = ()) -> None:
        """`is_keyed`: every request has been checked to hold a known key."""
        self._is_keyed = is_keyed
        self._proxies = tuple(proxies)

    def of(self, peer: str, authorization: str, forwarded: str) -> str:
        """Return who asks: `peer` is the address of the connection, the others the headers, empty if not sent."""
        if self._is_keyed:
            return authorization.partition(" ")[2].strip()
        client, is_proxy = _known(peer, self._proxies)
        if is_proxy:
            for hop in reversed(forwarded.split(",")):
                if not (text := hop.strip()):
                    break
                client, is_proxy = _known(text, self._proxies)
                if not is_proxy:
                    break
        return client


def _known(text: str, proxies: tuple[Network, ...]) -> tuple[str, bool]:
    """Return what stands for an address, and whether it is a trusted proxy's."""
    return _looked_up(text, proxies) if len(text) <= _ADDRESS_CHARACTERS else ("?", False)


@functools.lru_cache(maxsize=4096)
def _looked_up(text: str, proxies: tuple[Network, ...]) -> tuple[str, bool]:
    try:
        address = ipaddress.ip_address(_host(text))
    except ValueError:
        return "?", False  # all that is no address is one client
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is None:
            client = str(ipaddress.ip_network((int(address), _IPV6_PREFIX), strict=False).network_address)
            return client, any(address in network for network in proxies)
        address = address.ipv4_mapped
    return str(address), any(address in network for network in proxies)


def _host(text: str) -> str:
    """Return an address without port, brackets and zone: proxies write all of them."""
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    return text.partition("%")[0]


def host_of_grpc(peer: str) -> str:
    """Return the address in gRPC's name of a peer: `ipv4:127.0.0.1:5000`, `ipv6:[::1]:5000` (percent-encoded too)."""
    return _host(peer.partition(":")[2].replace("%5B", "[").replace("%5D", "]"))
