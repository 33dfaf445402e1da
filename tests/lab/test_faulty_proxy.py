"""The proxy that breaks connections, between a real Redis and its clients."""

import socket
import time

import confluent_kafka
import pytest
import redis
import services
from faulty_proxy import FaultyProxy, proxy_to
from lab import machine

SOON_S = 0.5  # what never answers is given this long before a test says that it hangs


@pytest.fixture
def proxy(redis_server):
    with proxy_to(redis_server.port) as proxy:
        yield proxy


def through(proxy: FaultyProxy, *, timeout_s: float = services.DEADLINE_S) -> redis.Redis:
    return redis.Redis(host=proxy.host, port=proxy.port, socket_timeout=timeout_s, retry=None)


def test_proxy_hands_on_and_delays(proxy):
    with through(proxy) as client:
        assert client.ping()
        proxy.set("delay", delay_s=0.3)
        begun = time.monotonic()
        assert client.ping()
        assert time.monotonic() - begun >= 0.3
        proxy.set("pass")
        assert client.ping()


def test_proxy_that_hangs_accepts_and_never_answers_until_it_goes_on(proxy):
    with through(proxy, timeout_s=SOON_S) as opened, through(proxy, timeout_s=SOON_S) as new:
        assert opened.ping()
        proxy.set("hang")
        for client in (opened, new):
            with pytest.raises(redis.exceptions.TimeoutError):
                client.ping()
    with socket.create_connection((proxy.host, proxy.port), timeout=services.DEADLINE_S) as waiting:
        waiting.sendall(b"PING\r\n")
        proxy.set("pass")
        assert waiting.recv(16) == b"+PONG\r\n"


def test_proxy_that_refuses_ends_connections_and_takes_none(proxy):
    with through(proxy) as client:
        assert client.ping()
        proxy.set("refuse")
        for _ in range(2):
            with pytest.raises(redis.exceptions.ConnectionError):
                client.ping()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((proxy.host, proxy.port), timeout=1)
        proxy.set("pass")
        assert client.ping()


def test_proxy_that_resets_ends_connections_abruptly(proxy):
    with socket.create_connection((proxy.host, proxy.port), timeout=services.DEADLINE_S) as opened:
        opened.sendall(b"PING\r\n")
        assert opened.recv(16) == b"+PONG\r\n"
        proxy.set("reset")
        with pytest.raises(ConnectionResetError):
            opened.recv(16)
    with (
        pytest.raises(ConnectionResetError),
        socket.create_connection((proxy.host, proxy.port), timeout=services.DEADLINE_S) as new,
    ):
        new.recv(16)
    proxy.set("pass")
    with through(proxy) as client:
        assert client.ping()


def test_proxy_of_a_server_that_is_away_closes_the_connection():
    with (
        proxy_to(machine.free_port("127.0.0.1")) as proxy,
        through(proxy) as client,
        pytest.raises(redis.exceptions.ConnectionError),
    ):
        client.ping()


@pytest.mark.parametrize(("mode", "delay_s"), [("slow", 0), ("delay", 0), ("pass", 1)])
def test_proxy_refuses_a_mode_it_does_not_have(proxy, mode, delay_s):
    with pytest.raises(ValueError, match=r"mode must be one of|delay_s, in seconds"):
        proxy.set(mode, delay_s=delay_s)


def test_kafka_told_of_its_proxy_is_reached_through_it_only(kafka_factory):
    port = machine.free_port("127.0.0.1")
    with proxy_to(port) as proxy:
        broker = kafka_factory(port=port, advertised_port=proxy.port)
        topic = broker.fresh_topic()
        outcomes: list[confluent_kafka.KafkaError | None] = []
        config = broker.config({"bootstrap.servers": f"127.0.0.1:{proxy.port}", "message.timeout.ms": 1500})
        producer = confluent_kafka.Producer(config)
        for mode in ("pass", "hang", "pass"):
            proxy.set(mode)
            producer.produce(topic, b"x", on_delivery=lambda error, _: outcomes.append(error))
            producer.flush(services.DEADLINE_S)
        assert [error and error.code() for error in outcomes] == [None, confluent_kafka.KafkaError._MSG_TIMED_OUT, None]
