"""Time limits of the service's connections, and checks of requests before the application.

`Connection` is uvicorn's protocol with time limits. uvicorn 0.54 has none for a request that is
never sent whole, nor for an answer that is never read. `Edge` is an ASGI middleware.
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
    """Returns a server of `app` that keeps to the limits; its caller gives it sockets."""
    return uvicorn.Server(
        uvicorn.Config(
            app,
            http=functools.partial(Connection, limits),
            ws="none",  # a WebSocket would leave the time limits behind
            log_level="warning",
            server_header=False,
            backlog=BACKLOG,
            h11_max_incomplete_event_size=MOST_BYTES,
            timeout_keep_alive=limits.idle_seconds,
            timeout_graceful_shutdown=limits.grace_seconds,
        )
    )


class Connection(H11Protocol):
    """A connection whose client must send requests and read answers in time.

    Attributes:
      waiting_since: the event loop's time at which the client last had to send or read something.
    """

    def __init__(self, limits: ServiceLimits, **uvicorn_arguments: Any):
        super().__init__(**uvicorn_arguments)
        self.waiting_since = self.loop.time()
        self._limits = limits
        self._reading: asyncio.TimerHandle | None = None  # runs while a request is being sent
        self._writing: asyncio.TimerHandle | None = None  # runs while an answer is not yet read

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Starts the time of the first request; closes another connection if there are too many."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # every byte that is not sent yet pauses writing
        self._time_request()
        # uvicorn counts closing connections too, and so refuses requests that there is room for.
        others = [
            each
            for each in self.connections
            if each is not self and not each.transport.is_closing()
        ]
        if len(others) >= self._limits.connections:
            waiting = [each for each in others if each.waits_for_request or each.flow.write_paused]
            if waiting:  # one that reads an answer goes last
                oldest = min(waiting, key=lambda each: (each.flow.write_paused, each.waiting_since))
                oldest.transport.abort()
            else:
                self.limit_concurrency = 0  # uvicorn answers 503 on this connection, and closes it

    def connection_lost(self, exc: Exception | None) -> None:
        """Stops the clocks."""
        super().connection_lost(exc)
        self._stop_reading()
        self._stop_writing()

    def data_received(self, data: bytes) -> None:
        """Starts the time of a request with its first byte, and stops it with its last."""
        super().data_received(data)
        self._time_request()

    def on_response_complete(self) -> None:
        """Starts the time of a request that was begun before the answer to the one before."""
        self.waiting_since = self.loop.time()
        super().on_response_complete()
        self._time_request()

    def shutdown(self) -> None:
        """Closes the connection after its answers, and at once where a request is half sent."""
        super().shutdown()
        if not self.transport.is_closing() and self.waits_for_request:
            self._refuse(503, "the service stops")

    def send_400_response(self, msg: str) -> None:
        """Answers in JSON, as the description says, and only where no answer was begun."""
        self._refuse(400, msg)

    def pause_writing(self) -> None:
        """Starts the time of reading an answer."""
        self.waiting_since = self.loop.time()
        super().pause_writing()
        self._stop_writing()
        self._writing = self.loop.call_later(self._limits.answer_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """Stops it: all is sent."""
        super().resume_writing()
        self._stop_writing()

    @property
    def waits_for_request(self) -> bool:
        """Whether the client has sent no whole request that is still to be answered."""
        return self.conn.their_state in (h11.IDLE, h11.SEND_BODY)

    def _time_request(self) -> None:
        """Lets the clock run while a request is to be read, and no longer.

        Between two requests it is uvicorn's own, of `idle_seconds`.
        """
        if not self.waits_for_request or self.transport.is_closing():
            self._stop_reading()
        elif self._reading is None and self.timeout_keep_alive_task is None:
            seconds = self._limits.request_seconds
            detail = f"the request did not arrive within {seconds:g} s"
            self._reading = self.loop.call_later(seconds, self._refuse, 408, detail)

    def _refuse(self, status: int, detail: str) -> None:
        """Answers a request that was begun and has no answer yet, and closes the connection."""
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

    def _stop_reading(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None

    def _stop_writing(self) -> None:
        if self._writing is not None:
            self._writing.cancel()
            self._writing = None


class Edge:
    """Middleware that checks the Host header and the length of a body, and answers HEAD as GET.

    It calls `answered` with the path and status of every answer. It passes `receive` on: behind
    Starlette's BaseHTTPMiddleware nobody would notice that a client left.
    """

    def __init__(self, app: Any, access: Access, answered: Callable[[str, int], None]):
        self.app, self.access, self.answered = app, access, answered

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answers one ASGI call."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        scope, is_head = _origin_form(scope), scope["method"] == "HEAD"

        async def checked_send(message: Any) -> None:
            if message["type"] == "http.response.start":
                self.answered(scope["path"], message["status"])
                headers = [
                    (name, _allowed(value) if name == b"allow" else value)
                    for name, value in message["headers"]
                ]
                message = {
                    **message,
                    "headers": [*headers, (b"x-content-type-options", b"nosniff")],
                }
            elif is_head:
                message = {**message, "body": b""}
            await send(message)

        async def refuse(status: int, detail: str) -> None:
            await JSONResponse({"detail": detail}, status)(scope, receive, checked_send)

        # Only HTTP/1.0 may leave the Host header out, which no browser does.
        hosts = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
        if not all(self.access.serves(host) for host in hosts):
            await refuse(
                400,
                f"the host {hosts[0][:100]!r} is not served here: start with --allowed_hosts=NAME",
            )
            return
        body = await _body(receive)
        if body is None:
            return
        if len(body) > MOST_BYTES:
            await refuse(413, f"a request has at most {MOST_BYTES} bytes")
            return

        # The application sees whole requests alone, and GET for HEAD.
        whole = [{"type": "http.request", "body": body, "more_body": False}]

        async def whole_receive() -> Any:
            return whole.pop() if whole else await receive()

        await self.app(
            {**scope, "method": "GET"} if is_head else scope, whole_receive, checked_send
        )


async def _body(receive: Any) -> bytes | None:
    """Returns a request's body, or more than MOST_BYTES of it; None where the client left."""
    body, more = b"", True
    while more and len(body) <= MOST_BYTES:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        more = message.get("more_body", False)
    return body


def _allowed(methods: bytes) -> bytes:
    """Returns the methods of an Allow header, with HEAD where GET is one."""
    return methods + b", HEAD" if b"GET" in methods and b"HEAD" not in methods else methods


def _origin_form(scope: Any) -> Any:
    """Returns the scope of a request for `http://host/path` as that of `/path` at that host.

    RFC 9112, 3.2.2, asks servers to take both forms. uvicorn leaves such a target whole in `path`.
    """
    if not scope["path"].lower().startswith(("http://", "https://")):
        return scope
    host, _, rest = scope["raw_path"].partition(b"://")[2].partition(b"/")
    headers = [
        (b"host", host),
        *((name, value) for name, value in scope["headers"] if name != b"host"),
    ]
    return {
        **scope,
        "path": "/" + unquote(rest.decode("ascii")),
        "raw_path": b"/" + rest,
        "headers": headers,
    }
