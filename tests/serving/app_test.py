"""Checks the service as clients use it: clips, limits, a full queue, browsers, odd requests."""

import asyncio
import base64
import collections
import concurrent.futures
import contextlib
import hashlib
import io
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from functools import partial

import httpx
import numpy as np
import pytest
import schemathesis
import soundfile
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from processes import Processes
from schemathesis.specs.openapi import checks
from selenium import webdriver
from selenium.webdriver.chrome.service import Service as ChromeService
from selenium.webdriver.common.by import By

from musicrl_jax import serve as serving
from musicrl_jax.core.audio import encode
from musicrl_jax.serving import bundle as bundles
from musicrl_jax.serving.app import Limits, create
from musicrl_jax.serving.batcher import Batcher, Closed, Full, Row
from musicrl_jax.serving.composition import continued, joined
from musicrl_jax.serving.edge import MOST_BYTES
from musicrl_jax.serving.settings import Access

RATE = 8000
LOCAL = "http://localhost"
ORDER = {"prompt": "a slow piano", "seed": 7}


def service(bundle, rows=4, most_waiting=16, token=""):
    queue = partial(Batcher, bundle, rows, 0.02, most_waiting)
    return create(bundle, queue, Limits(1.6, 4), Access(token=token))


@pytest.fixture(scope="module")
def client(bundle):
    with TestClient(service(bundle), LOCAL) as client:
        until_ready(client)
        yield client


def until_ready(client):
    until(lambda: client.get("/readyz").status_code == 200)


def wav_of(answer):
    assert answer.status_code == 200, answer.text
    return soundfile.read(io.BytesIO(answer.content), dtype="float32")


# --- clips ---


def test_a_clip_is_that_of_the_bundle(client, bundle):
    answer = client.post("/v1/clips", json=ORDER)
    wav, rate = wav_of(answer)
    expected = np.asarray(bundle.draw(bundle.encode([ORDER["prompt"]] * 4), [7] * 4).wav[0])
    np.testing.assert_allclose(wav, np.clip(expected, -1, 1), atol=2 / 32768)
    assert rate == RATE and answer.headers["content-type"] == "audio/wav"
    assert answer.headers["x-seed"] == "7" and json.loads(answer.headers["x-rewards"]) == {}


@pytest.mark.parametrize(("form", "kind"), [("flac", "FLAC"), ("ogg", "OGG"), ("wav", "WAV")])
def test_a_clip_has_its_format_tags_and_length(client, bundle, form, kind):
    answer = client.post("/v1/clips", json={**ORDER, "format": form, "seconds": 0.25})
    with soundfile.SoundFile(io.BytesIO(answer.content)) as file:
        tags = json.loads(file.comment)
        assert (file.format, file.title) == (kind, ORDER["prompt"])
    assert (tags["seed"], tags["candidate"]) == (7, 0)
    assert tags["model"] == bundle.manifest["sha256"]
    assert len(wav_of(answer)[0]) == 2000
    if form == "wav":  # a shorter clip is the beginning of the whole
        whole = wav_of(client.post("/v1/clips", json=ORDER))[0]
        np.testing.assert_array_equal(wav_of(answer)[0], whole[:2000])


@pytest.mark.parametrize("seconds", [0.4, 0.41, 0.6, 0.61, 1.0, 1.6])
def test_a_longer_piece_has_its_length_and_begins_as_the_clip(client, seconds):
    wav = wav_of(client.post("/v1/clips", json={**ORDER, "seconds": seconds}))[0]
    whole = wav_of(client.post("/v1/clips", json=ORDER))[0]
    assert len(wav) == round(seconds * RATE)
    np.testing.assert_array_equal(wav[:2800], whole[:2800])  # up to the first fade
    assert np.abs(wav[-200:]).max() > 0


def test_windows_continue_half_of_the_one_before_and_fade():
    tokens = np.arange(10)[:, None]
    np.testing.assert_array_equal(continued(tokens, 5)[:, 0], [5, 6, 7, 8, 9, 0, 0, 0, 0, 0])
    # Windows of one tone join to that tone.
    tone = np.sin(2 * np.pi * 40 * np.arange(16000) / RATE).astype(np.float32)
    windows = [tone[start : start + 3200] for start in (0, 1600, 3200)]
    np.testing.assert_allclose(joined(windows, 0.5, RATE), tone[:6400], atol=1e-6)


def metric(client, name):
    """Returns the value of a metric."""
    text = client.get("/metrics").text
    return float(re.search(rf"^{re.escape(name)} (.*)$", text, re.MULTILINE)[1])


def test_a_seed_gives_the_same_clip_beside_other_requests(client):
    alone = client.post("/v1/clips", json=ORDER).content
    orders = [{"prompt": "jazz", "seed": number, "temperature": 1.1} for number in range(7)]
    orders.insert(3, ORDER)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        clips = list(pool.map(lambda each: client.post("/v1/clips", json=each).content, orders))
    assert clips[3] == alone and len(set(clips)) == 8
    # Some batches had more than one clip.
    single = metric(client, 'musicrl_batch_clips_bucket{le="1.0"}')
    assert single < metric(client, "musicrl_batch_clips_count")


def test_the_best_candidate_has_the_highest_reward(client, bundle):
    answer = client.post("/v1/clips", json={**ORDER, "candidates": 4})
    clips = bundle.draw(bundle.encode([ORDER["prompt"]] * 4), [7] * 4, candidates=range(4))
    totals = np.asarray(bundle.score(clips)["total"])
    best = int(totals.argmax())
    assert int(answer.headers["x-candidate"]) == best
    np.testing.assert_allclose(
        json.loads(answer.headers["x-rewards"])["total"], totals[best], atol=1e-5
    )
    np.testing.assert_allclose(wav_of(answer)[0], np.clip(clips.wav[best], -1, 1), atol=2 / 32768)


# --- refusals and access ---


@pytest.mark.parametrize(
    ("order", "why"),
    [
        ({}, "prompt: Field required"),
        ({"prompt": " "}, "is empty: say what the music should be like"),
        ({"prompt": "x" * 1001}, "prompt: String should have at most 1000 characters"),
        ({"prompt": "a", "seed": -1}, "seed: Input should be greater than or equal to 0"),
        ({"prompt": "a", "seed": 2**32}, "seed: Input should be less than 4294967296"),
        ({"prompt": "a", "seed": 1.5}, "seed: Input should be a valid integer"),
        ({"prompt": "a", "seconds": 1.7}, "seconds: Input should be less than or equal to 1.6"),
        (
            {"prompt": "a", "seconds": 0.03},
            "seconds: Input should be greater than or equal to 0.04",
        ),
        ({"prompt": "a", "temperature": 9}, "temperature: Input should be less than or equal to 2"),
        ({"prompt": "a", "candidates": 5}, "candidates: Input should be less than or equal to 4"),
        (
            {"prompt": "a", "format": "/etc/passwd"},
            "format: Input should be 'wav', 'flac' or 'ogg'",
        ),
        ({"prompt": "a", "bundle": "../other"}, "bundle: Extra inputs are not permitted"),
    ],
)
def test_a_field_out_of_range_is_refused_by_name(client, order, why):
    answer = client.post("/v1/clips", json=order)
    assert answer.status_code == 422 and why in answer.json()["detail"]


@pytest.mark.parametrize(
    "body",
    [
        b'{"prompt": "\\ud800"}',
        b"\xff",
        b"{",
        b'{"prompt": NaN}',
        b"[]",
        b"",
        b'{"seconds": 1e999}',
    ],
)
def test_a_body_that_is_not_an_order_is_refused(client, body):
    answer = client.post("/v1/clips", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code in (400, 422) and answer.json()["detail"]


def test_a_large_body_is_refused_with_or_without_a_length(client):
    large = json.dumps({"prompt": "a" * MOST_BYTES}).encode()
    assert client.post("/v1/clips", content=large).status_code == 413
    assert client.post("/v1/clips", content=iter([large[:9000], large[9000:]])).status_code == 413


def get_all(client, headers, *paths):
    return [client.get(path, headers=headers).status_code for path in paths]


@pytest.mark.parametrize("public_status", [False, True])
def test_the_token_guards_clips_and_status_but_not_health(fake_app, public_status):
    status = 200 if public_status else 401
    with TestClient(fake_app(token="open sesame", public_status=public_status), LOCAL) as client:
        until_ready(client)
        for credentials in ("", "Bearer open", "Basic open sesame"):
            headers = {"Authorization": credentials} if credentials else {}
            answer = client.post("/v1/clips", json=ORDER, headers=headers)
            assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
            assert get_all(client, headers, "/metrics", "/v1/model") == [status] * 2
            public = "/", "/healthz", "/readyz", "/docs", "/openapi.json"
            assert get_all(client, headers, *public) == [200] * 5
        headers = {"Authorization": "Bearer open sesame"}
        assert client.post("/v1/clips", json=ORDER, headers=headers).status_code == 200
        assert client.get("/v1/model", headers=headers).json()["token"] is True
        assert get_all(client, headers, "/metrics", "/v1/model") == [200] * 2
        described = client.get("/openapi.json").json()["paths"]
        assert ("401" in described["/v1/model"]["get"]["responses"]) != public_status
        assert "401" in described["/v1/clips"]["post"]["responses"]


@pytest.mark.parametrize("token", ["schlüssel", "ключ"])
def test_a_token_of_any_alphabet_is_accepted_as_bytes(fake_app, token):
    spellings = [token.encode()] + ([token.encode("latin-1")] if token == "schlüssel" else [])
    with TestClient(fake_app(token=token), LOCAL) as client:
        for spelling in spellings:
            assert get_all(client, {"Authorization": b"Bearer " + spelling}, "/v1/model") == [200]
        for other in (token[:-1].encode(), token.encode("utf-16"), b"schlussel"):
            assert get_all(client, {"Authorization": b"Bearer " + other}, "/v1/model") == [401]


def test_cors_is_off_until_an_origin_is_allowed(fake_app):
    origin, other = {"Origin": "https://music.example"}, {"Origin": "https://other.example"}
    preflight = {**origin, "Access-Control-Request-Method": "POST"}
    preflight["Access-Control-Request-Headers"] = "authorization,content-type"
    with TestClient(fake_app(), LOCAL) as client:
        until_ready(client)
        assert client.options("/v1/clips", headers=preflight).status_code == 405
        answer = client.get("/v1/model", headers=preflight)
        assert "access-control-allow-origin" not in answer.headers
        # A page may send these without a preflight: they must draw nothing.
        for kind in ("", "text/plain", "application/x-www-form-urlencoded"):
            headers = {**origin, "Content-Type": kind} if kind else origin
            answer = client.post("/v1/clips", content=json.dumps(ORDER), headers=headers)
            assert answer.status_code == 422

    with TestClient(fake_app(origins=(origin["Origin"],), token="x"), LOCAL) as client:
        until_ready(client)
        answer = client.options("/v1/clips", headers=preflight)
        assert answer.status_code == 200
        assert client.options("/v1/clips", headers={**preflight, **other}).status_code == 400
        with_token = {**origin, "Authorization": "Bearer x"}
        clip = client.post("/v1/clips", json=ORDER, headers=with_token)
        assert clip.status_code == 200
        assert "X-Seed" in clip.headers["access-control-expose-headers"]
        large = client.post("/v1/clips", content=b"a" * (MOST_BYTES + 1), headers=origin)
        for each in (answer, clip, large, client.get("/v1/model", headers=origin)):
            assert each.headers["access-control-allow-origin"] == origin["Origin"]
        answer = client.get("/healthz", headers=other)
        assert "access-control-allow-origin" not in answer.headers


# --- other paths and methods ---


def test_head_answers_as_get_without_a_body(fake_app):
    with TestClient(fake_app(), LOCAL) as client:
        until_ready(client)
        pages = "/", "/healthz", "/readyz", "/metrics", "/v1/model", "/docs", "/openapi.json"
        for path in pages:
            whole, head = client.get(path), client.head(path)
            assert head.status_code == whole.status_code == 200 and head.content == b"", path
            if path != "/metrics":  # its length changes
                assert head.headers == whole.headers, path


def test_other_methods_are_refused_and_slashes_redirected(fake_app):
    with TestClient(fake_app(), LOCAL, follow_redirects=False) as client:
        for path in ("/", "/healthz", "/v1/clips"):
            answer = client.options(path)
            methods = {"POST"} if path == "/v1/clips" else {"GET", "HEAD"}
            assert answer.status_code == 405 and set(answer.headers["allow"].split(", ")) == methods
        assert client.head("/v1/clips").status_code == 405
        answer = client.get("/healthz/")
        assert answer.status_code == 307 and answer.headers["location"] == f"{LOCAL}/healthz"


def test_the_pages_load_only_local_files(fake_app):
    with TestClient(fake_app(), LOCAL) as client:
        page = client.get("/docs")
        assert not re.findall(r"(?:https?:)?//[\w.]+", page.text)
        files = re.findall(r'(?:src|href)="([^"]+)"', page.text)
        assert len(files) == 3
        for file in files:
            assert client.get(f"/{file}").status_code == 200
        for answer in (page, client.get("/")):
            policy = answer.headers["content-security-policy"]
            assert "unsafe" not in policy
            for script in re.findall(r"<script>(.+?)</script>", answer.text, re.DOTALL):
                digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
                assert f"'sha256-{digest}'" in policy
        assert client.get("/docs/files/../../../etc/passwd").status_code == 404


# --- the queue ---


def until(condition):
    """Waits until a condition holds, for five minutes at most: a machine may be slow."""
    for _ in range(3000):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError("the condition does not hold after five minutes")


def ready_at(address):
    """Returns the URL of a service once it is ready."""
    url = f"http://{address[0]}:{address[1]}"
    until(lambda: httpx.get(f"{url}/readyz").status_code == 200)
    return url


class Slow:
    """A bundle that draws only while `go` is set, and records the seeds of each batch."""

    def __init__(self, bundle):
        self.manifest, self.encode, self.streams = bundle.manifest, bundle.encode, False
        self.go, self.batches, self._bundle = threading.Event(), [], bundle

    def score(self, clips):
        return self._bundle.score(clips)

    def draw(self, text, seeds, *rest):
        assert self.go.wait(300)
        self.batches.append(list(seeds))
        return self._bundle.draw(text, seeds, *rest)


def test_a_full_queue_refuses_with_a_time_and_draws_the_rest(bundle):
    slow = Slow(bundle)
    queue = Batcher(slow, 2, 0.0, 3)
    text = bundle.encode(["jazz"])[0]
    first = queue.submit(Row(text, 0, 0, 1.0))
    until(lambda: queue.waiting == 0)  # it is being drawn
    waiting = [queue.submit(Row(text, seed, 0, 1.0))[0] for seed in (1, 2, 3)]
    with pytest.raises(Full) as full:
        queue.submit(Row(text, 4, 0, 1.0))
    assert full.value.retry_after == 1 and queue.waiting == 3
    queue._seconds = 7.0  # a batch, of two
    with pytest.raises(Full) as full:
        queue.submit(*[Row(text, seed, 0, 1.0) for seed in (4, 5, 6)])
    assert full.value.retry_after == 14

    # A cancelled clip makes room; a clip that continues a piece is never refused, and is next.
    assert waiting[0].cancel() and queue.waiting == 2
    last = queue.submit(Row(text, 4, 0, 1.0))
    more = queue.submit(Row(text, 5, 0, 1.0), begun=True)

    # Batches are filled up with their first row; seed 1 was cancelled.
    slow.go.set()
    closing = threading.Thread(target=queue.close)
    closing.start()
    for future in (*first, *waiting[1:], *last, *more):
        assert future.result(300).wav.shape == (3200,)
    closing.join(300)
    assert slow.batches == [[0, 0], [5, 2], [3, 4]]
    with pytest.raises(Closed):
        queue.submit(Row(text, 5, 0, 1.0))


class Broken(Slow):
    """A bundle that always draws, and whose samples or rewards are NaN for odd seeds.

    Args:
      part: 'wav', 'total', or 'all' for the samples of all seeds.
    """

    def __init__(self, bundle, part):
        super().__init__(bundle)
        self.part = part
        self.go.set()

    def score(self, clips):
        scores = self._bundle.score(clips)
        return {name: self._broken(score, name) for name, score in scores.items()}

    def _broken(self, array, part):
        odd = (np.asarray(self.batches[-1]) % 2 == 1) | (self.part == "all")
        rows = odd.reshape(-1, *[1] * (array.ndim - 1))
        return np.where(rows & (self.part in (part, "all")), np.nan, array)

    def draw(self, text, seeds, *rest):
        clips = super().draw(text, seeds, *rest)
        return clips._replace(wav=self._broken(clips.wav, "wav"))


@pytest.mark.parametrize("part", ["wav", "total"])
def test_a_clip_that_is_not_finite_fails_alone(bundle, part):
    # In a batch with a good one.
    broken = Broken(bundle, part)
    queue = Batcher(broken, 2, 0.1, 8)
    text = bundle.encode(["jazz"])[0]
    good, bad = queue.submit(*[Row(text, seed, 0, 1.0, scored=True) for seed in (2, 3)])
    with pytest.raises(FloatingPointError, match="try another seed"):
        bad.result(300)
    assert np.isfinite(good.result(300).wav).all() and np.isfinite(good.result(300).scores["total"])
    queue.close()

    # In the service.
    with TestClient(service(broken), LOCAL) as client:
        until_ready(client)
        order = {**ORDER, "candidates": 2}
        assert client.post("/v1/clips", json={**order, "seed": 2}).status_code == 200
        answer = client.post("/v1/clips", json={**order, "seed": 3})
        assert answer.status_code == 500 and "not finite" in answer.json()["detail"]


def test_a_service_whose_first_clip_cannot_be_drawn_gives_up(bundle, exported, monkeypatch):
    broken, errors = Broken(bundle, "all"), []
    queue = partial(Batcher, broken, 2, 0.0, 8)
    app = create(broken, queue, Limits(1.6, 4), Access(), errors.append)
    with TestClient(app, LOCAL) as client:
        until(lambda: errors)
        for answer in (client.get("/readyz"), client.post("/v1/clips", json=ORDER)):
            assert answer.status_code == 503
            assert "the first clip could not be drawn" in answer.json()["detail"]
    monkeypatch.setattr(bundles, "Bundle", lambda folder: broken)
    with pytest.raises(
        ValueError, match=r"the first clip of .* could not be drawn: .* fewer rows than 2"
    ):
        serving.serve(str(exported[0]), port=0, rows=2)


@pytest.mark.parametrize("form", ["wav", "flac", "ogg"])
def test_two_minutes_of_sound_are_encoded(form):
    """Vorbis would overflow the stack of a thread if it encoded all at once."""
    wav = np.sin(np.arange(120 * 24000) / 20).astype(np.float32) / 2
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        content = pool.submit(encode, wav, 24000, form).result()
    decoded, rate = soundfile.read(io.BytesIO(content), dtype="float32")
    assert rate == 24000 and len(decoded) == len(wav)
    np.testing.assert_allclose(decoded, wav, atol=0.1 if form == "ogg" else 1e-4)


def test_a_failed_batch_raises_and_the_next_is_drawn(bundle):
    slow = Slow(bundle)
    slow.go.set()
    queue = Batcher(slow, 1, 0.0, 3)
    (bad,) = queue.submit(Row(np.zeros(3, np.int32), 0, 0, 1.0))
    (good,) = queue.submit(Row(bundle.encode(["jazz"])[0], 0, 0, 1.0))
    with pytest.raises(ValueError, match=r"expected \(b, 12\) and called with \(1, 3\)"):
        bad.result(300)
    assert good.result(300).wav.shape == (3200,)
    queue.close()


def test_the_service_answers_429_and_503_and_drops_clips_of_clients_that_left(bundle):
    slow = Slow(bundle)
    app = service(slow, rows=1, most_waiting=2)

    async def waiting(client, clips):
        while f"musicrl_waiting_clips {clips}.0" not in (await client.get("/metrics")).text:
            await asyncio.sleep(0.05)

    async def story():
        transport = httpx.ASGITransport(app)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url=LOCAL) as client,
        ):
            # While it compiles.
            early = await client.post("/v1/clips", json=ORDER)
            assert early.status_code == 503 and early.headers["retry-after"] == "5"
            slow.go.set()
            while (await client.get("/readyz")).status_code != 200:
                await asyncio.sleep(0.05)

            # While one clip is drawn and two wait. They come one by one, so their order is known.
            slow.go.clear()
            requests = []
            for seed in range(3):
                request = client.post("/v1/clips", json={**ORDER, "seed": seed})
                requests.append(asyncio.create_task(request))
                await waiting(client, seed)
            full = await client.post("/v1/clips", json=ORDER)
            assert full.status_code == 429 and int(full.headers["retry-after"]) >= 1

            # The client of seed 2 leaves.
            requests[2].cancel()
            await waiting(client, 1)
            slow.go.set()
            return [answer.status_code for answer in await asyncio.gather(*requests[:2])]

    assert asyncio.run(story()) == [200, 200]
    # The first batch compiles; seed 2 was never drawn.
    assert [seeds[0] for seeds in slow.batches] == [0, 0, 1]


def test_a_closed_connection_takes_its_clips_out_of_the_queue(bundle, on_loopback):
    """It closes a real socket, once while a clip is drawn and once while it waits."""
    slow = Slow(bundle)
    slow.go.set()
    with on_loopback(service(slow, rows=1)) as listening:
        address = ready_at(listening)
        slow.go.clear()
        for seed in (1, 2):
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(
                    f"{address}/v1/clips",
                    json={**ORDER, "seed": seed},
                    timeout=httpx.Timeout(60, read=1),
                )
        until(
            lambda: (
                'musicrl_requests_total{status="499"} 2.0' in httpx.get(f"{address}/metrics").text
            )
        )
        assert "musicrl_waiting_clips 0.0" in httpx.get(f"{address}/metrics").text
        slow.go.set()
    # The first batch compiles; seed 2 was never drawn.
    assert [seeds[0] for seeds in slow.batches] == [0, 1]


# --- browsers ---


NEEDS_BROWSER = pytest.mark.skipif(
    not shutil.which("chromedriver"), reason="needs chromium and chromedriver: Debian's packages"
)


@pytest.fixture
def browser(tmp_path):
    """Yields a headless Chromium that saves into `tmp_path`."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    flags = "headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-sync"
    background = "disable-component-update", "disable-background-networking"
    for flag in (*flags, *background, f"user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(f"--{flag}")
    options.add_experimental_option("prefs", {"download.default_directory": str(tmp_path)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


def check_console(browser, *expected):
    """Checks that the console has no errors but those of expected requests."""
    for line in browser.get_log("browser"):
        is_expected = any(name in line["message"] for name in (*expected, "favicon"))
        assert is_expected or line["level"] != "SEVERE", line["message"]


def element(browser, selector):
    return browser.find_element(By.CSS_SELECTOR, selector)


def fill(browser, **fields):
    for name, text in fields.items():
        element(browser, f"#{name}").clear()
        element(browser, f"#{name}").send_keys(text)


@pytest.mark.slow
@NEEDS_BROWSER
def test_a_browser_plays_saves_and_cancels_clips(bundle, browser, tmp_path, on_loopback):
    slow = Slow(bundle)
    slow.go.set()
    with on_loopback(service(slow)) as listening:
        # Plays a clip, and a piece of two windows.
        address = ready_at(listening)
        browser.get(address)
        until(lambda: element(browser, "#seconds").get_property("value") == "0.4")
        assert not element(browser, "#token").is_displayed()  # the service needs none
        for seconds in ("0.25", "0.6"):
            fill(browser, prompt=ORDER["prompt"], seconds=seconds, seed="7", candidates="2")
            element(browser, "#play").click()
            script = f"return document.querySelector('audio')?.duration == {seconds}"
            until(lambda script=script: browser.execute_script(script))
            until(lambda: element(browser, "audio").get_property("ended"))
            text = element(browser, "article").text
            assert text.startswith("a slow piano\nseed 7 · acoustic_quality ")
            assert element(browser, "#status").text == ""
            assert not element(browser, "#stop").is_displayed()

        # Saves the clip.
        element(browser, "article:last-child a").click()
        until(lambda: (tmp_path / "musicrl_7.wav").exists())
        order = {**ORDER, "seconds": 0.25, "candidates": 2}
        wav = wav_of(httpx.post(f"{address}/v1/clips", json=order))[0]
        saved = soundfile.read(tmp_path / "musicrl_7.wav", dtype="float32")[0]
        np.testing.assert_array_equal(saved, wav)

        # Shows a refusal, and cancels a request.
        fill(browser, prompt="   ")
        element(browser, "#play").click()
        refusal = "is empty: say what the music should be like"
        until(lambda: element(browser, "#status").text.endswith(refusal))
        slow.go.clear()
        fill(browser, prompt="upbeat jazz")
        element(browser, "#play").click()
        until(lambda: element(browser, "#status").text.startswith("drawing"))
        element(browser, "#stop").click()
        until(lambda: element(browser, "#status").text == "cancelled")
        until(lambda: "musicrl_requests_in_progress 0.0" in httpx.get(f"{address}/metrics").text)
        slow.go.set()

        # Plays one clip at a time.
        for place, paused in ((1, [True, False]), (0, [False, True])):
            clips = browser.find_elements(By.CSS_SELECTOR, "audio")
            browser.execute_script("arguments[0].loop = true; arguments[0].play()", clips[place])
            until(lambda c=clips, p=paused: [clip.get_property("paused") for clip in c] == p)
    check_console(browser, "v1/clips")


@pytest.mark.slow
@NEEDS_BROWSER
def test_a_browser_shows_the_description_and_asks_for_the_token(fake_app, browser, on_loopback):
    with on_loopback(fake_app(token="schlüssel ключ")) as listening:
        address = ready_at(listening)
        browser.get(f"{address}/docs")
        until(lambda: "/v1/clips" in element(browser, "#swagger-ui").text)
        element(browser, "#operations-default-clip_v1_clips_post button").click()
        until(lambda: '"prompt": "upbeat jazz"' in element(browser, "#swagger-ui").text)
        browser.get(f"{address}/")
        until(lambda: element(browser, "#token").is_displayed())
        assert element(browser, "#status").text == "the service needs a token"
        for token, status in (("ключ\t", "the token is wrong"), ("schlüssel ключ\t", "")):
            fill(browser, token=token)
            until(lambda s=status: element(browser, "#status").text == s)
        assert element(browser, "#seconds").get_property("value") == "1"
        element(browser, "#play").click()
        until(lambda: element(browser, "#clips").text.startswith("upbeat jazz"))
    check_console(browser, "v1/model")


# --- its own description ---


def test_health_metrics_page_and_description(client):
    # Health and metrics.
    assert client.get("/healthz").json() == {"alive": True}
    assert client.post("/v1/clips", json=ORDER).status_code == 200
    assert metric(client, 'musicrl_requests_total{status="200"}') >= 1
    assert metric(client, "musicrl_waiting_clips") == 0

    # The page and the model.
    page = client.get("/")
    assert page.headers["content-security-policy"].startswith("default-src 'none'")
    assert "v1/clips" in page.text
    model = client.get("/v1/model").json()
    assert model["limits"] == {"seconds": 1.6, "candidates": 4} and model["licence"] == "CC0-1.0"
    assert client.get("/v1/../../etc/passwd").status_code == 404

    # The description.
    answers = client.get("/openapi.json").json()["paths"]["/v1/clips"]["post"]["responses"]
    assert set(answers) == {"200", "400", "408", "413", "422", "429", "500", "503"}


def test_fuzzed_requests_get_described_answers(bundle, on_loopback):
    """No answer is a 500, or missing from the service's own description."""
    with on_loopback(service(bundle)) as listening:
        address = ready_at(listening)
        description = schemathesis.openapi.from_url(f"{address}/openapi.json")
        counts = collections.Counter()
        for operation in description.get_all_operations():

            @given(case=operation.ok().as_strategy())
            @settings(
                max_examples=60,
                deadline=None,
                suppress_health_check=list(HealthCheck),
                database=None,
            )
            def ask(case):
                answer = case.call(base_url=address, timeout=300)
                counts[case.path, answer.status_code] += 1
                # A prompt of spaces fits the description, but is refused.
                case.validate_response(answer, excluded_checks=[checks.positive_data_acceptance])

            ask()
    assert counts["/v1/clips", 200] > 5 and all(status < 500 for _, status in counts)


# --- a process of its own ---


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def started(processes, folder, port):
    """Starts `musicrl serve`; returns its process once it is ready."""
    command = [sys.executable, "-m", "musicrl_jax.cli", "serve", f"--bundle={folder}"]
    command += [f"--port={port}", "--rows=2", "--limits=@ServiceLimits()"]
    command += ["--gin.ServiceLimits.candidates=2", "--gin.ServiceLimits.piece_seconds=60"]
    process = processes.start(command, stdout=subprocess.DEVNULL)

    def ready():
        assert process.poll() is None
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"http://127.0.0.1:{port}/readyz").status_code == 200

    until(ready)
    return process


@pytest.fixture(scope="module")
def served(exported):
    """Yields (address, [process], start) of a service; a test that kills it puts start() there."""
    port = free_port()
    with Processes() as processes:

        def start():
            return started(processes, exported[0], port)

        yield f"http://127.0.0.1:{port}", [start()], start


def request_count(client):
    """Returns the number of requests for clips so far, answered or not."""
    text = client.get("/metrics").text
    pattern = r"^musicrl_requests(?:_total{.*}|_in_progress) (.*)$"
    return sum(map(float, re.findall(pattern, text, re.MULTILINE)))


def test_a_killed_service_draws_the_same_clips_after_a_restart(served):
    address, process, start = served
    with (
        concurrent.futures.ThreadPoolExecutor(4) as pool,
        httpx.Client(base_url=address, timeout=300) as client,
    ):
        before, clip = request_count(client), client.post("/v1/clips", json=ORDER)
        long = {**ORDER, "seconds": 60}
        requests = [pool.submit(client.post, "/v1/clips", json=long) for _ in range(4)]
        until(lambda: request_count(client) == before + 5)
        process[0].kill()
        for request in requests:  # none hangs
            assert isinstance(request.exception(), httpx.TransportError)
    process[0].wait()
    process[0] = start()
    again = httpx.post(f"{address}/v1/clips", json=ORDER, timeout=300)
    assert again.content == clip.content and again.headers["x-seed"] == clip.headers["x-seed"]


def test_sigterm_finishes_whole_requests(served):
    """It does not wait for half a request. This test is the last, since it ends the service."""
    address, (process,), _ = served
    half = socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2])), timeout=300)
    half.sendall(b"POST /v1/clips HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
    with (
        concurrent.futures.ThreadPoolExecutor(6) as pool,
        httpx.Client(base_url=address, timeout=300) as client,
    ):
        before = request_count(client)
        order = {**ORDER, "seconds": 8}
        requests = [pool.submit(client.post, "/v1/clips", json=order) for _ in range(6)]
        until(lambda: request_count(client) == before + 6)
        assert "musicrl_requests_in_progress 0.0" not in client.get("/metrics").text
        process.send_signal(signal.SIGTERM)
        with half:
            assert half.recv(100).startswith(b"HTTP/1.1 503 ")
        assert [request.result().status_code for request in requests] == [200] * 6
    assert process.wait(300) == 0
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{address}/healthz")
