"""Builds the HTTP service: POST a prompt, get a clip. OpenAPI is at /openapi.json, a page at /.

Legend: C channels, N samples.
"""

import asyncio
import dataclasses
import json
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Annotated, Any, Literal

import numpy as np
import prometheus_client
import pydantic
from fastapi import Depends, FastAPI, HTTPException, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from prometheus_client import Counter, Gauge, Histogram
from pydantic import Field

from musicrl_jax.core.audio import encode, provenance_tags
from musicrl_jax.serving import stream as streams
from musicrl_jax.serving.batcher import Batcher, Closed, Full, Row, Stream
from musicrl_jax.serving.bundle import Bundle
from musicrl_jax.serving.composition import Piece
from musicrl_jax.serving.edge import MOST_BYTES, Edge
from musicrl_jax.serving.pages import add_pages
from musicrl_jax.serving.settings import Access

MEDIA = {"wav": "audio/wav", "flac": "audio/flac", "ogg": "audio/ogg"}
MOST_LETTERS = 1000  # of a prompt
POLL_SECONDS = 0.2  # how often a waiting request checks that its client is connected
STREAM = "Sends the clip while it is drawn, as a wav file."
GONE = 499  # status of a client that left before its clip was ready; counted, never sent


@dataclasses.dataclass(frozen=True)
class Limits:
    """Upper limits of a request.

    Attributes:
      seconds: length of a piece.
      candidates: number of clips to choose from.
    """

    seconds: float
    candidates: int


# --- descriptions of answers ---


class Problem(pydantic.BaseModel):
    """Body of an answer without a clip: the reason."""

    detail: str


def _problems(reasons: dict[int, str]) -> dict[int | str, dict[str, Any]]:
    """Returns OpenAPI's descriptions of answers without a clip, from the reason of each status."""
    return {status: {"model": Problem, "description": why} for status, why in reasons.items()}


# Answers to any request, and to a request for a clip.
ANY_PROBLEMS = _problems(
    {
        400: "The request is not HTTP, or is for a host that is not served.",
        408: "The request did not arrive in time.",
        413: f"The body has more than {MOST_BYTES} bytes.",
    }
)
CLIP_PROBLEMS = _problems(
    {
        422: "A field is missing, unknown or out of its range, or the prompt is empty.",
        429: "Too many clips wait; Retry-After has the seconds to wait.",
        500: "The clip has numbers that are not finite.",
        503: "The service starts or stops.",
    }
)
UNAUTHORIZED = _problems({401: "The bearer token is missing or wrong."})
# OpenAPI schema of a response with a clip, whose body FastAPI cannot infer.
INTEGER, STRING = {"type": "integer"}, {"type": "string"}
BINARY = {**STRING, "format": "binary"}
SOUND = {
    "content": {media: {"schema": BINARY} for media in MEDIA.values()},
    "description": "The clip.",
    "headers": {
        "X-Seed": {"schema": INTEGER, "description": "Its seed."},
        "X-Candidate": {"schema": INTEGER, "description": "Which of the candidates it is."},
        "X-Rewards": {"schema": STRING, "description": "Its rewards, as JSON."},
    },
}


# --- metrics and drawing ---


class Metrics:
    """Metrics of one service for Prometheus, in their own registry."""

    def __init__(self) -> None:
        """Creates the metrics."""
        # Prometheus' default registry is one for the process, and tests run several services.
        self.registry = prometheus_client.CollectorRegistry()
        here = {"registry": self.registry}

        # Requests: their number, time and music.
        self.requests = Counter("musicrl_requests", "Answers, by status.", ["status"], **here)
        seconds = 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100
        name = "musicrl_stream_start_seconds"
        what = "From a request to the first sound of its stream."
        self.stream_start = Histogram(name, what, buckets=seconds, **here)
        name = "musicrl_request_seconds"
        self.latency = Histogram(name, "From a request to its clip.", buckets=seconds, **here)

        # The device: batches, time, and the queue.
        clips = 1, 2, 4, 8, 16, 32, 64
        self._sizes = Histogram("musicrl_batch_clips", "Clips in a batch.", buckets=clips, **here)
        self._busy = Counter("musicrl_device_seconds", "Spent on drawing.", **here)
        self.music = Counter("musicrl_music_seconds", "Of music sent.", **here)
        self.waiting = Gauge("musicrl_waiting_clips", "Clips that wait for the device.", **here)
        name = "musicrl_requests_in_progress"
        self.in_progress = Gauge(name, "Requests whose clips are wanted.", **here)

    def count_batch(self, clips: int, seconds: float) -> None:
        """Counts a batch of clips and its seconds."""
        self._sizes.observe(clips)
        self._busy.inc(seconds)

    def count_answer(self, path: str, status: int) -> None:
        """Counts an answer to a request for a clip; ignores others."""
        if path == "/v1/clips":
            self.requests.labels(status).inc()


class Studio:
    """Draws the clips of a service: the bundle and its queue.

    Attributes:
      bundle: draws the clips.
      metrics: of the service.
      problem: why no clip can be drawn yet; '' once the first is drawn.
      stream_problem: why no stream can be drawn yet; '' once the first is drawn.
    """

    def __init__(
        self,
        bundle: Bundle,
        batcher: Callable[..., Batcher],
        give_up: Callable[[Exception], None],
    ):
        """Stores the arguments of `create`."""
        self.bundle, self.metrics = bundle, Metrics()
        self.problem = "the service starts: its functions are being compiled"
        self.stream_problem = "the functions of streams are being compiled"
        self._batcher, self._give_up = batcher, give_up
        self._queue: Batcher | None = None

    @asynccontextmanager
    async def lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        """Runs the queue while the service lives."""
        self._queue = self._batcher(on_batch=self.metrics.count_batch)
        # Prometheus reads the gauge when it scrapes.
        self.metrics.waiting.set_function(lambda: self._queue.waiting)
        warming = asyncio.create_task(self._warm())
        yield
        # Queued clips are drawn before the service ends.
        warming.cancel()
        await asyncio.to_thread(self._queue.close)

    async def _warm(self) -> None:
        """Draws the first clip, which compiles the functions."""
        manifest = self.bundle.manifest
        try:
            text = self.bundle.encode(manifest["golden"]["prompts"][:1])[0]
            first = Row(text, 0, 0, manifest["temperature"], scored=bool(manifest["rewards"]))
            await asyncio.wrap_future(self._queue.submit(first)[0])
        except Exception as error:  # any error must stop the service and be printed
            self.problem = f"the first clip could not be drawn: {error}"
            self._give_up(error)
        else:
            self.problem = ""
            await asyncio.to_thread(self._warm_stream, text)

    def _warm_stream(self, text: np.ndarray) -> None:
        """Draws a first stream, which compiles its functions, beside the clips of the queue."""
        if not self.bundle.streams:
            return
        try:
            for _ in self.bundle.stream(text, 0, self.bundle.manifest["temperature"]):
                pass
        except Exception as error:  # whole clips can be drawn all the same
            self.stream_problem = f"the first stream could not be drawn: {error}"
        else:
            self.stream_problem = ""

    def open(self, parts: Iterator[bytes]) -> Stream:
        """Opens a stream; raises as `Batcher.stream`."""
        return self._queue.stream(parts)

    async def draw(self, piece: Piece) -> tuple[np.ndarray, int, dict[str, float]]:
        """Returns (wav f32 [N] or [C, N], candidate, rewards as means over windows)."""
        # The candidates of a window are drawn together, then those of the next.
        while rows := piece.rows():
            futures = []
            for future in self._queue.submit(*rows, begun=piece.begun):
                futures.append(asyncio.wrap_future(future))
            try:
                piece.add(await asyncio.gather(*futures))
            finally:  # if one failed or the client left, the others are not needed
                for future in futures:
                    future.cancel()
        return piece.best()


# --- the application ---


def create(
    bundle: Bundle,
    batcher: Callable[..., Batcher],
    limits: Limits,
    access: Access,
    give_up: Callable[[Exception], None] = lambda error: None,
) -> FastAPI:
    """Builds the application.

    Args:
      bundle: draws the clips.
      batcher: is called once with `on_batch`, and closed at the end.
      limits: of a request.
      access: who may send requests.
      give_up: is called if the first clip, which compiles, cannot be drawn; no later one could.
    """
    # The application and its answers to invalid requests.
    studio = Studio(bundle, batcher, give_up)
    app = FastAPI(
        title="MusicRL",
        version=bundle.manifest["version"],
        description="A prompt -> a clip of music.",
        lifespan=studio.lifespan,
        docs_url=None,
        redoc_url=None,
        responses=ANY_PROBLEMS,
    )

    @app.exception_handler(RequestValidationError)
    async def refused(_: Request, error: RequestValidationError) -> JSONResponse:
        """Lists the wrong fields, but not their values, which may not be text."""
        details = []
        for each in error.errors():
            field = ".".join(map(str, each["loc"][1:])) or "the body"
            details.append(f"{field}: {each['msg']}")
        return JSONResponse({"detail": "; ".join(details).encode("utf-8", "replace").decode()}, 422)

    # The routes. A token always guards clips, and status unless it is public.
    guard = [Depends(_token_check(access))] if access.token else []
    _add_clips(app, studio, limits, guard)
    _add_model(app, bundle, limits, access, [] if access.public_status else guard)
    _add_status(app, studio, [] if access.public_status else guard)
    add_pages(app)

    # Middleware; the last is the outermost, so that allowed pages can read refusals by Edge.
    app.add_middleware(Edge, access=access, on_answer=studio.metrics.count_answer)
    if access.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=access.origins,
            allow_methods=("GET", "HEAD", "POST"),
            allow_headers=("Authorization", "Content-Type"),
            expose_headers=("Retry-After", "X-Candidate", "X-Rewards", "X-Seed"),
        )
    return app


def _token_check(access: Access) -> Callable:
    """Returns a dependency of routes that refuses requests without the token."""
    bearer = HTTPBearer(
        auto_error=False, description="The token that the service was started with."
    )

    async def check(
        credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)],
    ) -> None:
        # Starlette decodes headers as Latin-1; this restores their bytes.
        if credentials is None or not access.admits(credentials.credentials.encode("latin-1")):
            raise HTTPException(401, "a bearer token is needed", {"WWW-Authenticate": "Bearer"})

    return check


# --- routes ---


def _clip_request(manifest: dict[str, Any], limits: Limits) -> type[pydantic.BaseModel]:
    """Returns the model of a request for a clip, with the ranges of this bundle and service."""
    length, least = min(manifest["clip_seconds"], limits.seconds), _frame_seconds(manifest)
    any_seed = "The same seed gives the same clip. By default it is random."
    to_choose = "Number of clips, of which the one with the best reward is sent."

    class ClipRequest(pydantic.BaseModel):
        """A request for a clip."""

        model_config = pydantic.ConfigDict(extra="forbid")
        prompt: str = Field(min_length=1, max_length=MOST_LETTERS, examples=["upbeat jazz"])
        seed: int | None = Field(None, ge=0, lt=2**32, description=any_seed)
        seconds: float = Field(length, ge=least, le=limits.seconds, allow_inf_nan=False)
        temperature: float = Field(manifest["temperature"], ge=0.1, le=2.0, allow_inf_nan=False)
        candidates: int = Field(1, ge=1, le=limits.candidates, description=to_choose)
        format: Literal["wav", "flac", "ogg"] = "wav"

    return ClipRequest


def _frame_seconds(manifest: dict[str, Any]) -> float:
    return manifest["clip_seconds"] / manifest["frames"]


def _add_clips(app: FastAPI, studio: Studio, limits: Limits, guard: list[Any]) -> None:
    """Adds /v1/clips."""
    bundle, metrics = studio.bundle, studio.metrics
    manifest, rate = bundle.manifest, bundle.manifest["sample_rate_hz"]
    ClipRequest = _clip_request(manifest, limits)
    responses = {200: SOUND, **CLIP_PROBLEMS, **(UNAUTHORIZED if guard else {})}

    @app.post("/v1/clips", response_class=Response, responses=responses, dependencies=guard)
    async def clip(
        order: ClipRequest,
        request: Request,
        stream: Annotated[bool, Query(description=STREAM)] = False,
    ) -> Response:
        """Draws a clip."""
        # Refusals.
        start = time.monotonic()
        if studio.problem:
            raise HTTPException(503, studio.problem, {"Retry-After": "5"})
        if order.candidates > 1 and not manifest["rewards"]:
            raise HTTPException(422, "candidates: the bundle has no rewards to choose by: give 1")
        if stream:
            _check_stream(studio, order.seconds, order.candidates, order.format)
        try:
            text = bundle.encode([order.prompt])[0]
        except ValueError as error:
            raise HTTPException(422, str(error).encode("utf-8", "replace").decode()) from error

        # A stream, or the clip, unless the client leaves.
        seed = secrets.randbelow(2**32) if order.seed is None else order.seed
        row = text, seed, order.seconds, order.temperature
        if stream:
            tags = provenance_tags(order.prompt, model=manifest["sha256"], seed=seed, stream=True)
            parts = streams.parts(bundle, *row, tags)
            headers = {"X-Seed": str(seed)}
            answer = await _streamed(studio, parts, order.seconds, headers, request)
            metrics.stream_start.observe(time.monotonic() - start)
            return answer
        piece = Piece(manifest, *row, order.candidates)
        with _problem_statuses():
            best = await _unless_gone(studio.draw(piece), studio, request)
        if best is None:
            return Response(status_code=GONE)
        wav, candidate, rewards = best

        # Its file. Encoding takes seconds for a long piece, so it runs on a thread.
        tags = provenance_tags(
            order.prompt, model=manifest["sha256"], seed=seed, candidate=candidate
        )
        content = await asyncio.to_thread(encode, wav, rate, order.format, tags)
        metrics.latency.observe(time.monotonic() - start)
        metrics.music.inc(wav.shape[-1] / rate)
        headers = {
            "X-Seed": str(seed),
            "X-Candidate": str(candidate),
            "X-Rewards": json.dumps(rewards),
        }
        return Response(content, media_type=MEDIA[order.format], headers=headers)


@contextmanager
def _problem_statuses() -> Iterator[None]:
    """Raises HTTPException, with the status for a client, if work of the queue fails."""
    try:
        yield
    except Full as full:
        retry_after = str(int(np.ceil(full.retry_after)))
        raise HTTPException(429, str(full), {"Retry-After": retry_after}) from full
    except Closed as closed:
        raise HTTPException(503, str(closed), {"Retry-After": "5"}) from closed
    except FloatingPointError as error:
        raise HTTPException(500, str(error)) from error


async def _unless_gone(work: Awaitable[Any], studio: Studio, request: Request) -> Any:
    """Awaits work for a request; cancels it and returns None if the client leaves."""
    task = asyncio.ensure_future(work)
    try:
        with studio.metrics.in_progress.track_inprogress():
            while not (await asyncio.wait({task}, timeout=POLL_SECONDS))[0]:
                if await request.is_disconnected():
                    return None
        return task.result()
    finally:
        task.cancel()


# --- streams ---


def _check_stream(studio: Studio, seconds: float, candidates: int, form: str) -> None:
    """Raises HTTPException if a clip cannot be streamed, or not yet."""
    if why := streams.refusal(studio.bundle, seconds, candidates, form):
        raise HTTPException(422, why)
    if studio.stream_problem:
        raise HTTPException(503, studio.stream_problem, {"Retry-After": "5"})


async def _streamed(
    studio: Studio,
    parts: Iterator[bytes],
    seconds: float,
    headers: dict[str, str],
    request: Request,
) -> Response:
    """Returns the answer that sends a stream, once its first part is drawn.

    An error before then has its status. A later one closes the connection: the client has fewer
    bytes than Content-Length says.
    """
    # Its place, and the first part.
    with _problem_statuses():
        stream = studio.open(parts)
        try:
            first = await _unless_gone(asyncio.wrap_future(stream.next()), studio, request)
        except BaseException:
            stream.close()
            raise
    if first is None:
        stream.close()
        return Response(status_code=GONE)
    # The first part has the header, which says how long the file is.
    headers["Content-Length"] = str(streams.file_bytes(first))
    return StreamedClip(stream, first, seconds, headers, studio.metrics)


class StreamedClip(StreamingResponse):
    """Sends a stream as it is drawn, and frees its place when it ends or the client leaves."""

    def __init__(
        self,
        stream: Stream,
        first: bytes,
        seconds: float,
        headers: dict[str, str],
        metrics: Metrics,
    ):
        """Stores the stream, its first part and its length."""
        self._stream, self._seconds, self._metrics = stream, seconds, metrics
        super().__init__(self._parts(first), media_type=MEDIA[streams.FORM], headers=headers)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Sends the answer."""
        # A response that is cancelled, as its client left, ends here too.
        try:
            with self._metrics.in_progress.track_inprogress():
                await super().__call__(scope, receive, send)
        finally:
            self._stream.close()

    async def _parts(self, first: bytes) -> AsyncIterator[bytes]:
        """Yields the parts; the next is drawn once the connection has room for it."""
        # Content-Length says when all is sent, so the end needs no turn in the queue.
        part, missing = first, streams.file_bytes(first) - len(first)
        yield part
        while missing:
            part = await asyncio.wrap_future(self._stream.next())
            missing -= len(part)
            yield part
        self._metrics.music.inc(self._seconds)


def _add_model(
    app: FastAPI, bundle: Bundle, limits: Limits, access: Access, guard: list[Any]
) -> None:
    """Adds /v1/model."""
    manifest = bundle.manifest
    names = "sample_rate_hz", "clip_seconds", "temperature", "licence", "models"

    @app.get("/v1/model", responses=UNAUTHORIZED if guard else {}, dependencies=guard)
    async def model() -> dict[str, Any]:
        """Describes the bundle and the limits of a request."""
        return {
            **{name: manifest[name] for name in names},
            "frame_seconds": _frame_seconds(manifest),
            "limits": dataclasses.asdict(limits),
            "streams": bundle.streams,
            "token": bool(access.token),
            "rewards": sorted(manifest["rewards"]),
        }


def _add_status(app: FastAPI, studio: Studio, guard: list[Any]) -> None:
    """Adds /healthz, /readyz and /metrics, for those who run the service."""

    @app.get("/healthz")
    async def health() -> dict[str, bool]:
        """Answers if the process lives."""
        return {"alive": True}

    @app.get("/readyz", responses=_problems({503: "Not yet."}))
    async def readiness() -> dict[str, bool]:
        """Answers 200 once the functions are compiled and clips can be drawn."""
        if studio.problem:
            raise HTTPException(503, studio.problem)
        return {"ready": True}

    @app.get("/metrics", response_class=Response, include_in_schema=False, dependencies=guard)
    async def metrics() -> Response:
        content = prometheus_client.generate_latest(studio.metrics.registry)
        return Response(content, media_type=prometheus_client.CONTENT_TYPE_LATEST)
