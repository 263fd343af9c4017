"""Limits the time of connections, and checks requests before the application.

`Connection` is uvicorn's protocol with time limits: uvicorn 0.54 has none for a request that is
never sent whole, or an answer that is never read. `Edge` is an ASGI middleware.
"""

import asyncio
import functools
import json
from collections.abc import Callable
from typing import Any
from urllib.parse import unquote

import h11
import uvicorn
from fastapi.responses import JSONResponse
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from musicrl_jax.serving.settings import BACKLOG, Access, ServiceLimits

MOST_BYTES = 16384  # of a request's head, and of its body


def server(app: Any, limits: ServiceLimits) -> uvicorn.Server:
    """Returns a server that runs `app` within these limits; the caller passes it open sockets."""
    return uvicorn.Server(
        uvicorn.Config(
            app,
            http=functools.partial(Connection, limits),
            ws="none",  # a WebSocket would not have the time limits
            log_level="warning",
            server_header=False,
            backlog=BACKLOG,
            h11_max_incomplete_event_size=MOST_BYTES,
            timeout_keep_alive=limits.idle_seconds,
            timeout_graceful_shutdown=limits.grace_seconds,
        )
    )


# --- connections ---


class Connection(H11Protocol):
    """A connection whose client must send requests and read answers in time.

    Attributes:
      waiting_since: time of the event loop since which the client has to send or read something.
    """

    def __init__(self, limits: ServiceLimits, **uvicorn_arguments: Any):
        super().__init__(**uvicorn_arguments)
        self.waiting_since = self.loop.time()
        self._limits = limits
        self._reading: asyncio.TimerHandle | None = None  # set while a request is being sent
        self._writing: asyncio.TimerHandle | None = None  # set while an answer is not yet read

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Starts the time of the first request; closes another connection if there are too many."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # any unsent byte pauses writing
        self._time_request()

        # uvicorn also counts closing connections, and so refuses requests although there is room.
        others = [
            each
            for each in self.connections
            if each is not self and not each.transport.is_closing()
        ]
        if len(others) >= self._limits.connections:
            waiting = [each for each in others if each.waits_for_request or each.flow.write_paused]
            if waiting:  # one that reads an answer is closed last
                oldest = min(waiting, key=lambda each: (each.flow.write_paused, each.waiting_since))
                oldest.transport.abort()
            else:
                self.limit_concurrency = 0  # uvicorn answers 503 and closes this connection

    def connection_lost(self, exc: Exception | None) -> None:
        """Stops both timers."""
        super().connection_lost(exc)
        self._reading = _cancel(self._reading)
        self._writing = _cancel(self._writing)

    def data_received(self, data: bytes) -> None:
        """Starts the timer of a request with its first byte, and stops it with its last."""
        super().data_received(data)
        self._time_request()

    def on_response_complete(self) -> None:
        """Starts the timer of a request that began before the last answer was complete."""
        self.waiting_since = self.loop.time()
        super().on_response_complete()
        self._time_request()

    def shutdown(self) -> None:
        """Closes the connection after its answers, or at once if a request is half sent."""
        super().shutdown()
        if not self.transport.is_closing() and self.waits_for_request:
            self._refuse(503, "the service stops")

    def send_400_response(self, msg: str) -> None:
        """Answers in JSON, unless an answer has begun."""
        self._refuse(400, msg)

    # asyncio calls the next two as the socket's buffer fills and empties.

    def pause_writing(self) -> None:
        """Starts the timer of reading an answer."""
        self.waiting_since = self.loop.time()
        super().pause_writing()
        _cancel(self._writing)
        self._writing = self.loop.call_later(self._limits.answer_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """Stops the timer that limits how long a client may read an answer: all bytes are sent."""
        super().resume_writing()
        self._writing = _cancel(self._writing)

    @property
    def waits_for_request(self) -> bool:
        """Whether there is no whole request that needs an answer."""
        return self.conn.their_state in (h11.IDLE, h11.SEND_BODY)

    def _time_request(self) -> None:
        """Runs the timer while a request is being sent; between two, uvicorn's own runs."""
        if not self.waits_for_request or self.transport.is_closing():
            self._reading = _cancel(self._reading)
        # The timer is not restarted by more bytes: a client cannot keep it alive.
        elif self._reading is None and self.timeout_keep_alive_task is None:
            seconds = self._limits.request_seconds
            detail = f"the request did not arrive within {seconds:g} s"
            self._reading = self.loop.call_later(seconds, self._refuse, 408, detail)

    def _refuse(self, status: int, detail: str) -> None:
        """Answers a request that has begun and has no answer yet, and closes the connection."""
        # h11 is idle until it has parsed a whole head; bytes of half a head are trailing data.
        begun = self.conn.their_state is not h11.IDLE or self.conn.trailing_data[0]
        if begun and self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json.dumps({"detail": detail}).encode()
            headers = [
                ("content-type", "application/json"),
                ("content-length", str(len(body))),
                ("connection", "close"),
            ]
            answer = h11.Response(
                status_code=status, headers=headers, reason=STATUS_PHRASES[status]
            )
            for event in (answer, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event))
        self.transport.close()


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    """Cancels a timer if it is set; returns None to replace it."""
    if timer is not None:
        timer.cancel()


# --- requests ---


class Edge:
    """Middleware that checks the Host header and the length of a body, and answers HEAD as GET.

    It calls `on_answer` with the path and status of every answer. It passes `receive` on, while
    Starlette's BaseHTTPMiddleware would hide that a client left.
    """

    def __init__(self, app: Any, access: Access, on_answer: Callable[[str, int], None]):
        self.app, self.access, self.on_answer = app, access, on_answer

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answers one ASGI call."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        scope, is_head = _origin_form(scope), scope["method"] == "HEAD"

        # Answers: counted, with HEAD in Allow headers, and without a body for HEAD.
        async def checked_send(message: Any) -> None:
            if message["type"] == "http.response.start":
                self.on_answer(scope["path"], message["status"])
                headers = []
                for name, value in message["headers"]:
                    headers.append((name, _add_head(value) if name == b"allow" else value))
                headers.append((b"x-content-type-options", b"nosniff"))
                message = {**message, "headers": headers}
            elif is_head:
                message = {**message, "body": b""}
            await send(message)

        async def refuse(status: int, detail: str) -> None:
            await JSONResponse({"detail": detail}, status)(scope, receive, checked_send)

        # Refusals. Only HTTP/1.0 may leave out the Host header, and no browser does.
        hosts = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
        if not all(self.access.serves(host) for host in hosts):
            name = hosts[0][:100]
            await refuse(400, f"the host {name!r} is not served: start with --allowed_hosts=NAME")
            return
        body = await _body(receive)
        if body is None:
            return
        if len(body) > MOST_BYTES:
            await refuse(413, f"a request has at most {MOST_BYTES} bytes")
            return

        # The application gets whole requests only, and GET for HEAD.
        whole = [{"type": "http.request", "body": body, "more_body": False}]

        async def whole_receive() -> Any:
            return whole.pop() if whole else await receive()

        await self.app(
            {**scope, "method": "GET"} if is_head else scope, whole_receive, checked_send
        )


async def _body(receive: Any) -> bytes | None:
    """Returns a request's body, or more than MOST_BYTES of it; None if the client left."""
    body, more = b"", True
    while more and len(body) <= MOST_BYTES:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        more = message.get("more_body", False)
    return body


def _add_head(methods: bytes) -> bytes:
    """Returns the methods of an Allow header, with HEAD if GET is one."""
    return methods + b", HEAD" if b"GET" in methods and b"HEAD" not in methods else methods


def _origin_form(scope: Any) -> Any:
    """Rewrites a request for `http://host/path` as one for `/path` at that host.

    RFC 9112, 3.2.2, requires servers to accept both. uvicorn leaves such a target in `path`.
    """
    if not scope["path"].lower().startswith(("http://", "https://")):
        return scope
    # The host of the target replaces the Host header.
    host, _, rest = scope["raw_path"].partition(b"://")[2].partition(b"/")
    headers = [(b"host", host), *(each for each in scope["headers"] if each[0] != b"host")]
    path = {"path": "/" + unquote(rest.decode("ascii")), "raw_path": b"/" + rest}
    return {**scope, **path, "headers": headers}
