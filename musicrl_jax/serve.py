"""A bundle over HTTP."""

import signal
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

from musicrl_jax.core import extras
from musicrl_jax.serving import settings
from musicrl_jax.serving.settings import ServiceLimits

DEFAULT_LIMITS = ServiceLimits()


def serve(
    bundle: str,
    host: str = "127.0.0.1",
    port: int = 8000,
    rows: int = 8,
    token_file: str = "",
    public_status: bool = False,
    allowed_hosts: str = "",
    allowed_origins: str = "",
    limits: ServiceLimits = DEFAULT_LIMITS,
) -> None:
    """Serves a bundle until it is told to stop; SIGTERM lets finish what was asked for.

    Nothing is kept: a service that was killed starts again as it was, but for the requests that it
    was answering. Settings are checked, and the address is taken, before the bundle is loaded.

    Args:
      bundle: folder of a bundle.
      host: the address that it listens at; by default this machine alone can reach it.
      port: of TCP, 0 to 65535; 0 takes any that is free.
      rows: clips of a batch, 1 or more. Every batch is filled up to it, so that a seed's clip is
        the same in any company.
      token_file: a file with a token that requests must carry (`Authorization: Bearer ...`), if
        anything. Letters outside ASCII may be sent as UTF-8 or Latin-1.
      public_status: whether `/metrics` and `/v1/model` answer without the token.
      allowed_hosts: names that a Host header may hold beside localhost and `host`, with commas
        between them; * allows every name. Other names are refused, so that no web page reaches the
        service by DNS rebinding. Where it listens beyond loopback, every IP address is allowed.
      allowed_origins: origins of web pages that may call the service from a browser (CORS), as
        https://music.example, with commas between them; * allows every page. None by default.
      limits: of requests, connections and times.

    Raises:
      ValueError: a setting is out of range, the address is in use, the bundle is damaged or not for
        this machine, or its first clip cannot be drawn.
      FileNotFoundError: there is no bundle or no token.
    """
    # Settings and the address, before anything is loaded.
    extras.check("serving", "serve", "fastapi", "fastapi_offline", "prometheus_client", "uvicorn")
    _check(bundle, port, rows, public_status, limits)
    token = settings.read_token(token_file) if token_file else ""
    hosts, origins = settings.read_hosts(allowed_hosts), settings.read_origins(allowed_origins)
    with ExitStack() as stack:
        sockets = [stack.enter_context(each) for each in settings.listen(host, port)]
        local = settings.only_loopback(sockets)
        access = settings.Access(token, hosts | {host.lower()}, local, origins, public_status)

        # The bundle. These imports are extras, which training hosts go without, and jax.
        from musicrl_jax.serving import app, batcher, edge
        from musicrl_jax.serving.bundle import Bundle

        loaded = Bundle(bundle)
        seconds = limits.piece_seconds or 4 * loaded.about["clip_seconds"]
        if not local and not token:
            print(
                f"anyone who reaches {host} can have clips: give a token_file to ask for a token",
                flush=True,
            )
        address = settings.url(host, sockets[0].getsockname()[1])
        print(
            f"{address} once the functions are compiled; the first clip takes as long as that",
            flush=True,
        )

        # The server, until it is told to stop or its first clip cannot be drawn.
        failures: list[Exception] = []

        def give_up(error: Exception) -> None:
            failures.append(error)
            server.should_exit = True

        application = app.create(
            loaded,
            partial(batcher.Batcher, loaded, rows, limits.window_ms / 1000, limits.waiting_clips),
            app.Limits(seconds, min(limits.candidates, limits.waiting_clips)),
            access,
            give_up,
        )
        server = edge.server(application, limits)
        # uvicorn handles SIGTERM first, and then raises it once more.
        before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
        try:
            with suppress(KeyboardInterrupt):
                server.run(sockets)
        finally:
            signal.signal(signal.SIGTERM, before)
    if failures:
        raise ValueError(
            f"the first clip of {bundle} could not be drawn: {failures[0]}; where memory is "
            f"short, give fewer rows than {rows}, or run it elsewhere"
        ) from failures[0]


def _check(bundle: str, port: int, rows: int, public_status: bool, limits: ServiceLimits) -> None:
    """Checks settings of `serve`, whose docstring has their ranges and errors."""
    settings.check_number("serve.rows", rows, 1, whole=True)
    settings.check_number("serve.port", port, 0, 65535, whole=True)
    if not isinstance(public_status, bool):
        raise ValueError(f"serve.public_status={public_status!r} must be True or False")
    if limits.connections <= limits.waiting_clips + rows:
        raise ValueError(
            f"ServiceLimits.connections={limits.connections} must be more than "
            f"waiting_clips={limits.waiting_clips} and serve.rows={rows} together: each clip may be a "
            "connection's"
        )
    settings.check_files(limits.connections)
    if not Path(bundle).is_dir():
        raise FileNotFoundError(f"no bundle in {bundle}: `musicrl export` writes one")
