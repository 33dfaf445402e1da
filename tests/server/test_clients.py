"""Who a client is: keys, addresses, and proxies that are believed or not."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phoenix_server.clients import Clients, host_of_grpc, parse_networks

PROXIES = parse_networks("10.0.0.0/8, 192.0.2.7, 2001:db8:1::/48")


@pytest.mark.parametrize(
    ("peer", "forwarded", "client"),
    [
        ("198.51.100.1", "", "198.51.100.1"),
        ("198.51.100.1", "203.0.113.9", "198.51.100.1"),  # no proxy of ours
        ("10.1.2.3", "", "10.1.2.3"),
        ("10.1.2.3", "203.0.113.9", "203.0.113.9"),
        ("10.1.2.3", "1.1.1.1, 203.0.113.9", "203.0.113.9"),  # the first one wrote the client itself
        ("10.1.2.3", "1.1.1.1, 203.0.113.9, 192.0.2.7,10.9.9.9", "203.0.113.9"),
        ("10.1.2.3", "203.0.113.9:4711", "203.0.113.9"),
        ("10.1.2.3", "10.0.0.1, 10.0.0.2", "10.0.0.1"),
        ("10.1.2.3", "203.0.113.9, ", "10.1.2.3"),
        ("10.1.2.3", "unknown", "?"),
        ("10.1.2.3", "203.0.113.9, _hidden", "?"),
        ("10.1.2.3", "x" * 5000, "?"),
        ("::ffff:10.1.2.3", "203.0.113.9", "203.0.113.9"),
        ("::ffff:198.51.100.1", "", "198.51.100.1"),
        ("2001:db8:1:2:3::4", "[2001:db8:9:9::1]:443", "2001:db8:9:9::"),
        ("2001:db8:7:7:1:2:3:4", "", "2001:db8:7:7::"),
        ("2001:db8:7:7:ffff:ffff:ffff:ffff", "", "2001:db8:7:7::"),
        ("fe80::1%eth0", "", "fe80::"),
        ("", "203.0.113.9", "?"),
    ],
)
def test_client_is_the_last_address_that_somebody_trusted_wrote(peer: str, forwarded: str, client: str) -> None:
    assert Clients(proxies=PROXIES).of(peer, "Bearer key", forwarded) == client


def test_key_comes_before_every_address() -> None:
    clients = Clients(is_keyed=True, proxies=PROXIES)
    assert clients.of("10.1.2.3", "Bearer  key ", "203.0.113.9") == "key"
    assert clients.of("198.51.100.1", "bearer key", "") == "key"


@given(st.text(), st.text())
def test_whatever_is_sent_is_some_client(peer: str, forwarded: str) -> None:
    for address in (peer, "10.0.0.1"):
        client = Clients(proxies=PROXIES).of(address, "", forwarded)
        assert 0 < len(client) <= 64


@pytest.mark.parametrize(
    ("peer", "host"),
    [
        ("ipv4:127.0.0.1:5000", "127.0.0.1"),
        ("ipv6:[::1]:5000", "::1"),
        ("ipv6:%5B::1%5D:5000", "::1"),
        ("unix:", ""),
    ],
)
def test_peer_of_grpc_is_read(peer: str, host: str) -> None:
    assert host_of_grpc(peer) == host


def test_connections_of_one_host_are_one_client_over_both_transports() -> None:
    clients = Clients()
    assert clients.of(host_of_grpc("ipv4:192.0.2.1:5000"), "", "") == clients.of("192.0.2.1", "", "")
    assert clients.of(host_of_grpc("ipv6:%5B2001:db8::1%5D:9"), "", "") == clients.of("2001:db8::2", "", "")


@pytest.mark.parametrize("text", ["10.0.0.0/33", "host.example.com", "10.0.0.1/8", "1.2.3"])
def test_network_that_is_none_is_told(text: str) -> None:
    with pytest.raises(ValueError, match="expected addresses or networks") as fault:
        parse_networks(f"192.0.2.1, {text}")
    assert text in str(fault.value)


def test_no_proxies_are_no_networks() -> None:
    assert parse_networks(" , ") == ()
