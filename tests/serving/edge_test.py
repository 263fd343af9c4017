"""Checks time limits and refusals before the application, over real sockets."""

import asyncio
import contextlib
import re
import socket
import threading
import time

import pytest
from fastapi.testclient import TestClient

from musicrl_jax.serving.edge import MOST_BYTES
from musicrl_jax.serving.settings import ServiceLimits, check_files

HEAD = b"POST /v1/clips HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
HALF_HEAD, HALF_BODY = HEAD, HEAD + b'Content-Length: 100\r\n\r\n{"prompt": '
HALF_CHUNKS = HEAD + b"Transfer-Encoding: chunked\r\n\r\n3\r\n{\n\n\r\n"
HEALTH = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"


@contextlib.contextmanager
def sent(address, *parts):
    """Yields a socket that has sent these bytes."""
    with socket.create_connection(address, timeout=20) as opened:
        for part in parts:
            opened.sendall(part)
        yield opened


def received(opened):
    """Returns all bytes until the service closes the connection."""
    content = bytearray()
    with contextlib.suppress(ConnectionResetError):
        while part := opened.recv(1 << 20):
            content += part
    return bytes(content)


def answers(address, *parts):
    """Returns the status of each answer until the service closes the connection."""
    with sent(address, *parts) as opened:
        return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d+) ", received(opened))]


def answer_of(opened):
    """Returns the answer to HEALTH."""
    content = b""
    while not content.endswith(b"}"):
        content += opened.recv(1 << 16)
    return content


def healthy(address):
    with sent(address, HEALTH) as opened:
        return opened.recv(1 << 16).startswith(b"HTTP/1.1 200 ")


# --- time ---


@pytest.mark.parametrize("connections", [100, 1000])
def test_health_answers_while_500_clients_hold_half_requests(fake_app, on_loopback, connections):
    """They are all held until their time ends, or some make room for others."""
    check_files(2000)
    limits = ServiceLimits(connections=connections, request_seconds=1.0)
    halves = HALF_HEAD, HALF_BODY, HALF_CHUNKS, b"", b"G"
    with on_loopback(fake_app(), limits) as address, contextlib.ExitStack() as stack:
        held = [stack.enter_context(sent(address, halves[i % 5])) for i in range(500)]
        start = time.monotonic()
        assert all(healthy(address) for _ in range(20))
        assert time.monotonic() - start < 2
        replies = [received(opened) for opened in held]  # each of them is closed
        assert time.monotonic() - start < 10
        timed_out = [reply.startswith(b"HTTP/1.1 408 ") for reply in replies]
        if connections > 500:
            # A client that sent nothing gets no answer.
            assert timed_out == [bool(halves[i % 5]) for i in range(500)]
        else:
            assert 0 < sum(timed_out) <= connections
        assert healthy(address)


@pytest.mark.parametrize(
    "dripped", [HALF_HEAD, HALF_BODY, HEALTH + HALF_HEAD, HEALTH + HALF_BODY], ids=range(4)
)
def test_a_slow_request_is_closed_in_time(fake_app, on_loopback, dripped):
    """This holds for the second request of a connection too."""
    limits = ServiceLimits(request_seconds=0.5, idle_seconds=0.2)
    with on_loopback(fake_app(), limits) as address, sent(address, dripped) as opened:
        start = time.monotonic()
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            while time.monotonic() - start < 5:
                opened.sendall(b"a")
                time.sleep(0.05)
        assert 0.3 < time.monotonic() - start < 2


def test_each_request_has_its_own_time(fake_app, on_loopback):
    limits = ServiceLimits(request_seconds=0.5, idle_seconds=1.0)
    with on_loopback(fake_app(), limits) as address, sent(address) as opened:
        for _ in range(3):  # together they take longer than one may
            opened.sendall(HEALTH[:30])
            time.sleep(0.25)
            opened.sendall(HEALTH[30:])
            assert answer_of(opened).startswith(b"HTTP/1.1 200 ")
        time.sleep(0.7)
        opened.sendall(HEALTH)
        assert answer_of(opened).startswith(b"HTTP/1.1 200 ")
        start = time.monotonic()
        assert received(opened) == b"" and 0.8 < time.monotonic() - start < 2


def test_a_stop_does_not_wait_for_half_requests(fake_app, on_loopback):
    limits = ServiceLimits(request_seconds=60, grace_seconds=60)
    with contextlib.ExitStack() as stack:
        with on_loopback(fake_app(), limits) as address:
            held = [
                stack.enter_context(sent(address, half))
                for half in (HALF_HEAD, HALF_BODY, HALF_CHUNKS, b"")
            ]
            assert healthy(address)
            start = time.monotonic()
        assert time.monotonic() - start < 3
        replies = [received(opened) for opened in held]
    assert [reply.startswith(b"HTTP/1.1 503 ") for reply in replies] == [False, True, True, False]


async def large(scope, receive, send):
    """Answers 16 MB, more than the buffers of a loopback connection."""
    if scope["type"] != "http":
        return
    await send({"type": "http.response.start", "status": 200, "headers": []})
    for _ in range(16):
        await send({"type": "http.response.body", "body": bytes(1 << 20), "more_body": True})
    await send({"type": "http.response.body"})


def test_an_unread_answer_is_closed_in_time(on_loopback):
    limits = ServiceLimits(answer_seconds=0.5, idle_seconds=0.1)
    with on_loopback(large, limits) as address:
        with sent(address, HEALTH) as opened:
            time.sleep(1)
            assert len(received(opened)) < 16 << 20
        with sent(address, HEALTH) as opened:
            assert len(received(opened)) > 16 << 20  # a client that reads gets all


def test_unread_answers_make_room_for_new_connections(on_loopback):
    limits = ServiceLimits(connections=3)
    with on_loopback(large, limits) as address, contextlib.ExitStack() as stack:
        held = [stack.enter_context(sent(address, HEALTH)) for _ in range(3)]
        time.sleep(0.2)
        assert all(healthy(address) for _ in range(5))
        assert len(received(held[0])) < 16 << 20


# --- odd requests ---


def test_bytes_that_are_not_http_are_refused_in_json(fake_app, on_loopback, caplog):
    chunk = b"4000\r\n" + b"a" * 16384 + b"\r\n"
    with on_loopback(fake_app(), ServiceLimits(request_seconds=0.5)) as address:
        with sent(address, b"nonsense\r\n\r\n") as opened:
            assert received(opened).endswith(b'{"detail": "Invalid HTTP request received."}')
        head = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
        with sent(address, head, chunk, b"1\r\na\r\n") as opened:
            assert opened.recv(1 << 16).startswith(b"HTTP/1.1 413 ")
            opened.sendall(b"no chunk\r\n")
            assert b"HTTP/1.1" not in received(opened)
        assert healthy(address)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_a_connection_with_a_request_in_progress_is_not_closed(on_loopback):
    """If all connections wait for answers, one more is refused."""
    go = threading.Event()

    async def slow(scope, receive, send):
        while scope["type"] == "http" and not go.is_set():
            await asyncio.sleep(0.01)
        if scope["type"] == "http":
            headers = [(b"content-length", b"0")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body"})

    with (
        on_loopback(slow, ServiceLimits(connections=3)) as address,
        contextlib.ExitStack() as stack,
    ):
        held = [stack.enter_context(sent(address, HEALTH)) for _ in range(3)]
        time.sleep(0.1)
        assert answers(address, HEALTH) == [503]
        go.set()
        assert all(opened.recv(100).startswith(b"HTTP/1.1 200 ") for opened in held)


CLOSE = b"Connection: close\r\n\r\n"


@pytest.mark.parametrize(
    ("parts", "statuses"),
    [
        ([HEALTH, HEALTH, b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n" + CLOSE], [200] * 3),
        (
            [HEALTH + HEALTH + b"GET /v1/none HTTP/1.1\r\nHost: localhost\r\n" + CLOSE],
            [200, 200, 404],
        ),
        ([b"GET /healthz HTTP/1.0\r\n\r\n"], [200]),
        ([b"GET http://localhost/healthz HTTP/1.1\r\nHost: elsewhere.example\r\n" + CLOSE], [200]),
        ([b"GET HTTP://127.0.0.1:8000 HTTP/1.1\r\nHost: localhost\r\n" + CLOSE], [200]),
        ([b"GET http://elsewhere.example/healthz HTTP/1.1\r\nHost: localhost\r\n" + CLOSE], [400]),
        ([b"GET http://a@localhost/healthz HTTP/1.1\r\nHost: localhost\r\n" + CLOSE], [400]),
        ([b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\n" + CLOSE], [404]),
        ([b"CONNECT localhost:80 HTTP/1.1\r\nHost: localhost\r\n" + CLOSE], [404]),
        ([b"GET /healthz HTTP/1.1\r\n\r\n"], [400]),
        ([b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nHost: elsewhere.example\r\n\r\n"], [400]),
        ([b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nA: " + b"a" * MOST_BYTES], [400]),
        ([HEALTH[:-2] + b"Upgrade: websocket\r\nConnection: upgrade, close\r\n\r\n"], [200]),
        ([HEAD + b"Content-Length: -1\r\n\r\n"], [400]),
        (
            [HEAD + b"Content-Length: 1\r\nTransfer-Encoding: chunked\r\n" + CLOSE, b"0\r\n\r\n"],
            [422],
        ),
        ([b"HEAD /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n" + HEALTH[:-2] + CLOSE], [200, 200]),
        (
            [
                HEAD + b"Transfer-Encoding: chunked\r\n\r\n",
                *([b"1000\r\n" + b"a" * 4096 + b"\r\n"] * 5),
            ],
            [413],
        ),
    ],
    ids=lambda value: None if isinstance(value, list) and isinstance(value[0], int) else "",
)
def test_odd_requests_get_their_answers(fake_app, on_loopback, parts, statuses):
    limits = ServiceLimits(request_seconds=1.0, idle_seconds=0.2)
    with on_loopback(fake_app(), limits) as address:
        assert answers(address, *parts) == statuses


def test_an_endless_body_is_refused_and_closed(fake_app, on_loopback):
    chunk = b"1000\r\n" + b"a" * 4096 + b"\r\n"
    closed = contextlib.suppress(BrokenPipeError, ConnectionResetError)
    with on_loopback(fake_app(), ServiceLimits(request_seconds=0.5)) as address:
        start = time.monotonic()
        with sent(address, HEAD + b"Transfer-Encoding: chunked\r\n\r\n") as opened, closed:
            while time.monotonic() - start < 10:
                opened.sendall(chunk)
        assert time.monotonic() - start < 3
        assert healthy(address)


@pytest.mark.parametrize(
    ("access", "served", "refused"),
    [
        (
            {},
            [
                "localhost",
                "LOCALHOST:8000",
                "localhost.",
                "127.0.0.1:80",
                "127.3.2.1",
                "[::1]:8000",
            ],
            [
                "rebound.example",
                "localhost.rebound.example",
                "192.168.1.5",
                "[fe80::1]",
                "a@localhost",
                "",
                "::1",
            ],
        ),
        (
            {"only_loopback": False, "hosts": frozenset(["music.example"])},
            ["localhost", "192.168.1.5:8000", "[fe80::1]", "music.example", "Music.Example:443"],
            [
                "rebound.example",
                "evil-music.example",
                "a.music.example",
                "192.168.1.5.rebound.example",
            ],
        ),
        ({"hosts": frozenset("*")}, ["rebound.example", "localhost"], ["192.168.1.5", "a/b"]),
    ],
)
def test_only_allowed_hosts_are_answered(fake_app, access, served, refused):
    with TestClient(fake_app(**access)) as client:
        for host in served:
            assert client.get("/healthz", headers={"Host": host}).status_code == 200, host
        for host in refused:
            answer = client.get("/healthz", headers={"Host": host})
            assert answer.status_code == 400 and "--allowed_hosts" in answer.json()["detail"], host
