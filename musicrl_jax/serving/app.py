"""The HTTP service: a prompt -> a clip, by a bundle. OpenAPI at /openapi.json, a page to try it at /.

Legend: N samples.
"""

import asyncio
import dataclasses
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Annotated, Any, Literal

import numpy as np
import prometheus_client
import pydantic
from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from prometheus_client import Counter, Gauge, Histogram

from musicrl_jax.core.audio import encoded, made_from
from musicrl_jax.serving.batcher import Batcher, Closed, Full, Wanted
from musicrl_jax.serving.bundle import Bundle
from musicrl_jax.serving.composition import Piece
from musicrl_jax.serving.edge import MOST_BYTES, Edge
from musicrl_jax.serving.pages import add_pages
from musicrl_jax.serving.settings import Access

MEDIA = {"wav": "audio/wav", "flac": "audio/flac", "ogg": "audio/ogg"}
MOST_LETTERS = 1000  # of a prompt
LOOK_SECONDS = 0.2  # between two looks whether a client is still there
GONE = 499  # a client that left before its clip was there; never sent


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a request may ask for.

    Attributes:
      seconds: length of a piece.
      candidates: clips to choose from.
    """

    seconds: float
    candidates: int


class Problem(pydantic.BaseModel):
    """Why there is no clip."""

    detail: str


def create(
    bundle: Bundle,
    batcher: Callable[..., Batcher],
    limits: Limits,
    access: Access,
    give_up: Callable[[Exception], None] = lambda error: None,
) -> FastAPI:
    """The application.

    Args:
      bundle: what draws.
      batcher: is called with `told` once, at the start, and closed at the end.
      limits: of a request.
      access: who may ask.
      give_up: is called where the first clip, which compiles, cannot be drawn; no later one could.
    """
    about = bundle.about
    frame_seconds = about["clip_seconds"] / about["frames"]
    registry = prometheus_client.CollectorRegistry()
    requests = Counter("musicrl_requests", "Answers, by status.", ["status"], registry=registry)
    latency = Histogram(
        "musicrl_request_seconds",
        "From a request to its clip.",
        buckets=(0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100),
        registry=registry,
    )
    sizes = Histogram("musicrl_batch_clips", "Clips in a batch.", buckets=(1, 2, 4, 8, 16, 32, 64), registry=registry)
    busy = Counter("musicrl_device_seconds", "Spent on drawing.", registry=registry)
    music = Counter("musicrl_music_seconds", "Of music sent.", registry=registry)
    waiting = Gauge("musicrl_waiting_clips", "Clips that wait for the device.", registry=registry)
    taken = Gauge("musicrl_requests_in_progress", "Requests whose clips are wanted.", registry=registry)

    def told(clips: int, seconds: float) -> None:
        sizes.observe(clips)
        busy.inc(seconds)

    queue: Batcher | None = None

    @asynccontextmanager
    async def living(_: FastAPI) -> AsyncIterator[None]:
        nonlocal queue
        queue = batcher(told=told)
        waiting.set_function(lambda: queue.waiting)
        warming = asyncio.create_task(warm())
        yield
        warming.cancel()
        await asyncio.to_thread(queue.close)

    ready, not_yet = False, "the service starts: its functions are being compiled"

    async def warm() -> None:
        """The first clip, which compiles."""
        nonlocal ready, not_yet
        try:
            text = bundle.encode(about["golden"]["prompts"][:1])[0]
            first = Wanted(text, 0, 0, about["temperature"], scored=bool(about["rewards"]))
            await asyncio.wrap_future(queue.submit(first)[0])
        except Exception as error:  # whatever it is, whoever runs the service must hear of it
            not_yet = f"the first clip could not be drawn: {error}"
            give_up(error)
        else:
            ready = True

    bearer = HTTPBearer(auto_error=False, description="The token that the service was started with.")

    async def allowed(given: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]) -> None:
        # Starlette reads headers as Latin-1.
        if given is None or not access.admits(given.credentials.encode("latin-1")):
            raise HTTPException(401, "a bearer token is needed", {"WWW-Authenticate": "Bearer"})

    app = FastAPI(
        title="MusicRL",
        version=about["version"],
        description="A prompt -> a clip of music.",
        lifespan=living,
        docs_url=None,
        redoc_url=None,
        responses={
            400: {"model": Problem, "description": "The request is not HTTP, or is for a host that is not served."},
            408: {"model": Problem, "description": "The request did not arrive in time."},
            413: {"model": Problem, "description": f"The body has more than {MOST_BYTES} bytes."},
        },
    )

    class Asked(pydantic.BaseModel):
        """A clip that is wanted."""

        model_config = pydantic.ConfigDict(extra="forbid")
        prompt: Annotated[str, pydantic.Field(min_length=1, max_length=MOST_LETTERS, examples=["upbeat jazz"])]
        seed: Annotated[
            int | None,
            pydantic.Field(ge=0, lt=2**32, description="The same seed gives the same clip; by default any."),
        ] = None
        seconds: Annotated[float, pydantic.Field(ge=frame_seconds, le=limits.seconds, allow_inf_nan=False)] = min(
            about["clip_seconds"], limits.seconds
        )
        temperature: Annotated[float, pydantic.Field(ge=0.1, le=2.0, allow_inf_nan=False)] = about["temperature"]
        candidates: Annotated[
            int,
            pydantic.Field(ge=1, le=limits.candidates, description="Clips to choose the one of the best reward from."),
        ] = 1
        format: Literal["wav", "flac", "ogg"] = "wav"

    async def drawn(asked: Asked, text: np.ndarray, seed: int) -> tuple[np.ndarray, int, dict[str, float]]:
        """(wav f32 [N], which candidate it is, its rewards' means over windows)."""
        piece = Piece(about, text, seed, asked.seconds, asked.temperature, asked.candidates)
        while rows := piece.rows():
            futures = [asyncio.wrap_future(future) for future in queue.submit(*rows, begun=piece.begun)]
            try:
                piece.add(await asyncio.gather(*futures))
            finally:  # where one failed, or the client left: no one waits for the others
                for future in futures:
                    future.cancel()
        return piece.best()

    def answered(path: str, status: int) -> None:
        if path == "/v1/clips":
            requests.labels(status).inc()

    @app.exception_handler(RequestValidationError)
    async def refused(_: Request, error: RequestValidationError) -> JSONResponse:
        """Says what is wrong without repeating what was sent, which may not be text."""
        told = "; ".join(f"{'.'.join(map(str, e['loc'][1:])) or 'the body'}: {e['msg']}" for e in error.errors())
        return JSONResponse({"detail": told.encode("utf-8", "replace").decode()}, 422)

    problems: dict[int | str, dict[str, Any]] = {
        status: {"model": Problem, "description": why}
        for status, why in (
            (422, "A field is missing, unknown or out of its range, or the prompt says nothing."),
            (429, "Too many clips wait; Retry-After says how long to wait."),
            (500, "The clip has numbers that are not finite."),
            (503, "The service starts or stops."),
        )
    }
    # What a token guards: clips always, the rest unless it is public.
    guard = [Depends(allowed)] if access.token else []
    unauthorized: dict[int | str, dict[str, Any]] = {}
    if access.token:
        unauthorized[401] = {"model": Problem, "description": "No, or another, bearer token."}
    status_guard, status_problems = ([], {}) if access.public_status else (guard, unauthorized)
    sound = {
        "content": {media: {"schema": {"type": "string", "format": "binary"}} for media in MEDIA.values()},
        "description": "The clip.",
        "headers": {
            "X-Seed": {"schema": {"type": "integer"}, "description": "Its seed."},
            "X-Candidate": {"schema": {"type": "integer"}, "description": "Which of the candidates it is."},
            "X-Rewards": {"schema": {"type": "string"}, "description": "Its rewards, as JSON."},
        },
    }

    @app.post(
        "/v1/clips",
        response_class=Response,
        responses={200: sound, **problems, **unauthorized},
        dependencies=guard,
    )
    async def clip(asked: Asked, request: Request) -> Response:
        """Draws a clip."""
        start = time.monotonic()
        if not ready:
            raise HTTPException(503, not_yet, {"Retry-After": "5"})
        if asked.candidates > 1 and not about["rewards"]:
            raise HTTPException(422, "candidates: the bundle has no rewards to choose by: ask for 1")
        try:
            text = bundle.encode([asked.prompt])[0]
        except ValueError as error:
            raise HTTPException(422, str(error).encode("utf-8", "replace").decode()) from error
        seed = secrets.randbelow(2**32) if asked.seed is None else asked.seed
        work = asyncio.create_task(drawn(asked, text, seed))
        try:
            with taken.track_inprogress():
                while not (await asyncio.wait({work}, timeout=LOOK_SECONDS))[0]:
                    if await request.is_disconnected():
                        return Response(status_code=GONE)
            wav, best, rewards = work.result()
        except Full as full:
            raise HTTPException(429, str(full), {"Retry-After": str(int(np.ceil(full.retry_after)))}) from full
        except Closed as closed:
            raise HTTPException(503, str(closed), {"Retry-After": "5"}) from closed
        except FloatingPointError as error:
            raise HTTPException(500, str(error)) from error
        finally:
            work.cancel()
        tags = made_from(asked.prompt, model=about["sha256"], seed=seed, candidate=best)
        content = await asyncio.to_thread(encoded, wav, about["sample_rate_hz"], asked.format, tags)
        latency.observe(time.monotonic() - start)
        music.inc(len(wav) / about["sample_rate_hz"])
        told = {"X-Seed": str(seed), "X-Candidate": str(best), "X-Rewards": json.dumps(rewards)}
        return Response(content, media_type=MEDIA[asked.format], headers=told)

    @app.get("/v1/model", responses=status_problems, dependencies=status_guard)
    async def model() -> dict[str, Any]:
        """What the bundle is, and what may be asked for."""
        told = {name: about[name] for name in ("sample_rate_hz", "clip_seconds", "temperature", "licence", "models")}
        told["frame_seconds"] = frame_seconds
        told["limits"], told["token"] = dataclasses.asdict(limits), bool(access.token)
        return {**told, "rewards": sorted(about["rewards"])}

    @app.get("/healthz")
    async def health() -> dict[str, bool]:
        """Whether the process answers."""
        return {"alive": True}

    @app.get("/readyz", responses={503: {"model": Problem, "description": "Not yet."}})
    async def readiness() -> dict[str, bool]:
        """Whether it can draw: the functions are compiled."""
        if not ready:
            raise HTTPException(503, not_yet)
        return {"ready": True}

    @app.get("/metrics", response_class=Response, include_in_schema=False, dependencies=status_guard)
    async def metrics() -> Response:
        return Response(prometheus_client.generate_latest(registry), media_type=prometheus_client.CONTENT_TYPE_LATEST)

    add_pages(app)
    app.add_middleware(Edge, access=access, answered=answered)
    if access.origins:  # the last is the outermost: refusals by Edge can be read by these pages too
        app.add_middleware(
            CORSMiddleware,
            allow_origins=access.origins,
            allow_methods=("GET", "HEAD", "POST"),
            allow_headers=("Authorization", "Content-Type"),
            expose_headers=("Retry-After", "X-Candidate", "X-Rewards", "X-Seed"),
        )
    return app
