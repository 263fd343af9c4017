"""The verb `serve`: plays a bundle over HTTP."""

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
    """Serves a bundle until SIGTERM or Ctrl-C; requests that it has are finished.

    It saves nothing. A service that was killed loses only the requests that it was answering.
    Settings and the address are checked before the bundle is loaded.

    Args:
      bundle: folder of a bundle.
      host: address to listen at; by default only this machine can reach it.
      port: of TCP, 0 to 65535; 0 uses any that is free.
      rows: clips of a batch, 1 or more. Every batch is filled up to it, so a seed's clip does not
        depend on other requests.
      token_file: file with a token that requests must have (`Authorization: Bearer ...`); '' needs
        none. Letters outside ASCII may be sent as UTF-8 or Latin-1.
      public_status: whether `/metrics` and `/v1/model` answer without the token.
      allowed_hosts: names allowed in a Host header beside localhost and `host`, separated by
        commas; * allows every name. Other names are refused, against DNS rebinding by web pages. If
        the service listens beyond loopback, every IP address is allowed.
      allowed_origins: origins of web pages that may call the service (CORS), such as
        https://music.example, separated by commas; * allows every page. None by default.
      limits: of requests, connections and times.

    Raises:
      ValueError: a setting is out of range, the address is in use, the bundle is damaged or not for
        this machine, or its first clip cannot be drawn.
      FileNotFoundError: there is no bundle or token file.
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

        # The bundle. These imports need jax and an extra, so they come after the checks.
        from musicrl_jax.serving import app, batcher, edge
        from musicrl_jax.serving.bundle import Bundle

        loaded = Bundle(bundle)
        seconds = limits.piece_seconds or 4 * loaded.manifest["clip_seconds"]
        if not local and not token:
            print(f"anyone who reaches {host} can have clips: give a token_file", flush=True)
        address = settings.url(host, sockets[0].getsockname()[1])
        print(f"{address} is ready once the functions are compiled", flush=True)

        # The server, until it is stopped or its first clip cannot be drawn.
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
        # uvicorn handles SIGTERM, and then raises it again for the handler before.
        before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
        try:
            with suppress(KeyboardInterrupt):
                server.run(sockets)
        finally:
            signal.signal(signal.SIGTERM, before)
    if failures:
        raise ValueError(
            f"the first clip of {bundle} could not be drawn: {failures[0]}; if memory is short, "
            f"give fewer rows than {rows}, or run it elsewhere"
        ) from failures[0]


def _check(bundle: str, port: int, rows: int, public_status: bool, limits: ServiceLimits) -> None:
    """Checks settings of `serve`; raises as it does."""
    settings.check_number("serve.rows", rows, 1, whole=True)
    settings.check_number("serve.port", port, 0, 65535, whole=True)
    if not isinstance(public_status, bool):
        raise ValueError(f"serve.public_status={public_status!r} must be True or False")
    if limits.connections <= limits.waiting_clips + rows:
        raise ValueError(
            f"ServiceLimits.connections={limits.connections} must be more than waiting_clips="
            f"{limits.waiting_clips} and serve.rows={rows} together: a clip may have a connection"
        )
    settings.check_files(limits.connections)
    if not Path(bundle).is_dir():
        raise FileNotFoundError(f"no bundle in {bundle}: `musicrl export` writes one")
