"""A bundle over HTTP."""

import signal
from contextlib import suppress
from functools import partial
from pathlib import Path

from musicrl_jax.serving.batcher import Batcher
from musicrl_jax.serving.bundle import Bundle

LOCAL = "127.0.0.1", "::1", "localhost"


def serve(
    bundle: str,
    host: str = "127.0.0.1",
    port: int = 8000,
    rows: int = 8,
    window_ms: float = 5.0,
    most_waiting: int = 64,
    most_seconds: float = 0.0,
    most_candidates: int = 8,
    token_file: str = "",
    grace_seconds: int = 60,
) -> None:
    """Serves a bundle until it is told to stop; SIGTERM lets finish what was asked for.

    Nothing is kept: a service that was killed starts again as it was, but for the requests that it was answering.

    Args:
      bundle: folder of a bundle.
      host: the address that it listens at; by default this machine alone can reach it.
      port: of TCP.
      rows: clips of a batch. Every batch is filled up to it, so that a seed's clip is the same in any company.
      window_ms: how long a clip waits for others to be drawn with.
      most_waiting: clips that may wait; beyond, a request is answered 429.
      most_seconds: length of a piece that may be asked for; 0 is four times the bundle's clips. What is longer than
        one of these goes on from half of it (MusicLM 5.5: a stride of 15 s).
      most_candidates: clips that a request may have drawn to choose from.
      token_file: a file with a token that requests must carry (`Authorization: Bearer ...`), if anything.
      grace_seconds: that requests have to finish once it is told to stop.

    Raises:
      ValueError: where a setting is out of range, the bundle is damaged or not for this machine, or its first clip
        cannot be drawn.
      FileNotFoundError: where there is no bundle or no token.
    """
    if min(rows, most_waiting, most_candidates) < 1 or window_ms < 0 or most_seconds < 0:
        raise ValueError(
            f"serve: rows={rows}, most_waiting={most_waiting} and most_candidates={most_candidates} must be 1 or more, "
            f"window_ms={window_ms} and most_seconds={most_seconds} 0 or more"
        )
    import uvicorn  # an extra, as what it runs: training hosts go without

    from musicrl_jax.serving.app import Limits, create

    token = Path(token_file).read_text(encoding="utf-8").strip() if token_file else ""
    if token_file and not token:
        raise ValueError(f"serve.token_file={token_file!r} is empty: write a token into it")
    read = Bundle(bundle)
    limits = Limits(most_seconds or 4 * read.about["clip_seconds"], min(most_candidates, most_waiting))
    queue = partial(Batcher, read, rows, window_ms / 1000, most_waiting)
    if host not in LOCAL and not token:
        print(f"anyone who reaches {host} can have clips: give a token_file to ask for a token", flush=True)
    print(f"http://{host}:{port}/ once the functions are compiled; the first clip takes as long as that", flush=True)
    failures: list[Exception] = []

    def give_up(error: Exception) -> None:
        failures.append(error)
        server.should_exit = True

    app = create(read, queue, limits, token, give_up)
    settings = {"log_level": "warning", "timeout_graceful_shutdown": grace_seconds, "server_header": False}
    server = uvicorn.Server(uvicorn.Config(app, host, port, **settings))
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # uvicorn hears it first, and then raises it once more
    try:
        with suppress(KeyboardInterrupt):
            server.run()
    finally:
        signal.signal(signal.SIGTERM, before)
    if failures:
        raise ValueError(
            f"the first clip of {bundle} could not be drawn: {failures[0]}; where memory is short, give fewer rows "
            f"than {rows}, or run it elsewhere"
        ) from failures[0]
