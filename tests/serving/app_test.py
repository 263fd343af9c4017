"""The service, asked as its clients ask it: sound, limits, a full queue, company, those who leave, a browser, and
nonsense.
"""

import asyncio
import collections
import concurrent.futures
import contextlib
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
from musicrl_jax.serving.batcher import Batcher, Closed, Full, Wanted
from musicrl_jax.serving.composition import continued, joined
from musicrl_jax.serving.edge import MOST_BYTES
from musicrl_jax.serving.settings import Access

RATE = 8000
LOCAL = "http://localhost"
ASKED = {"prompt": "a slow piano", "seed": 7}


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


def test_a_clip_is_the_bundles(client, bundle):
    answer = client.post("/v1/clips", json=ASKED)
    wav, rate = wav_of(answer)
    found = np.asarray(bundle.draw(bundle.encode([ASKED["prompt"]] * 4), [7] * 4).wav[0])
    np.testing.assert_allclose(wav, np.clip(found, -1, 1), atol=2 / 32768)
    assert rate == RATE and answer.headers["content-type"] == "audio/wav"
    assert answer.headers["x-seed"] == "7" and json.loads(answer.headers["x-rewards"]) == {}


@pytest.mark.parametrize(("form", "kind"), [("flac", "FLAC"), ("ogg", "OGG"), ("wav", "WAV")])
def test_formats_and_lengths(client, bundle, form, kind):
    answer = client.post("/v1/clips", json={**ASKED, "format": form, "seconds": 0.25})
    with soundfile.SoundFile(io.BytesIO(answer.content)) as file:  # says what it was made of
        made = json.loads(file.comment)
        assert (file.format, file.title, made["seed"], made["candidate"]) == (
            kind,
            ASKED["prompt"],
            7,
            0,
        )
        assert made["model"] == bundle.about["sha256"]
    assert len(wav_of(answer)[0]) == 2000
    if form == "wav":
        whole = wav_of(client.post("/v1/clips", json=ASKED))[0]
        np.testing.assert_array_equal(
            wav_of(answer)[0], whole[:2000]
        )  # a shorter one is its beginning


@pytest.mark.parametrize("seconds", [0.4, 0.41, 0.6, 0.61, 1.0, 1.6])
def test_a_longer_piece_has_its_length_and_begins_as_the_clip(client, seconds):
    wav = wav_of(client.post("/v1/clips", json={**ASKED, "seconds": seconds}))[0]
    whole = wav_of(client.post("/v1/clips", json=ASKED))[0]
    assert len(wav) == round(seconds * RATE)
    np.testing.assert_array_equal(wav[:2800], whole[:2800])  # up to the first fade
    assert np.abs(wav[-200:]).max() > 0


def test_windows_go_on_from_half_of_the_one_before_and_fade():
    tokens = np.arange(10)[:, None]
    np.testing.assert_array_equal(continued(tokens, 5)[:, 0], [5, 6, 7, 8, 9, 0, 0, 0, 0, 0])
    time_ = np.arange(16000) / RATE
    tone = np.sin(2 * np.pi * 40 * time_).astype(np.float32)  # windows of one tone are that tone
    windows = [tone[start : start + 3200] for start in (0, 1600, 3200)]
    np.testing.assert_allclose(joined(windows, 0.5, RATE), tone[:6400], atol=1e-6)


def test_the_same_seed_is_the_same_clip_in_any_company(client):
    alone = client.post("/v1/clips", json=ASKED).content
    others = [{"prompt": "jazz", "seed": number, "temperature": 1.1} for number in range(7)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = list(
            pool.map(
                lambda asked: client.post("/v1/clips", json=asked).content,
                [*others[:3], ASKED, *others[3:]],
            )
        )
    assert found[3] == alone and len(set(found)) == 8
    sizes = client.get("/metrics").text
    together = float(
        next(
            line
            for line in sizes.splitlines()
            if line.startswith('musicrl_batch_clips_bucket{le="1.0"')
        ).split()[1]
    )
    assert together < float(
        next(
            line for line in sizes.splitlines() if line.startswith("musicrl_batch_clips_count")
        ).split()[1]
    )


def test_the_best_of_several_is_the_one_with_the_highest_reward(client, bundle):
    answer = client.post("/v1/clips", json={**ASKED, "candidates": 4})
    clips = bundle.draw(bundle.encode([ASKED["prompt"]] * 4), [7] * 4, candidates=range(4))
    totals = np.asarray(bundle.score(clips)["total"])
    best = int(totals.argmax())
    assert int(answer.headers["x-candidate"]) == best
    np.testing.assert_allclose(
        json.loads(answer.headers["x-rewards"])["total"], totals[best], atol=1e-5
    )
    np.testing.assert_allclose(wav_of(answer)[0], np.clip(clips.wav[best], -1, 1), atol=2 / 32768)


@pytest.mark.parametrize(
    ("asked", "why"),
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
def test_what_cannot_be_is_refused_by_name(client, asked, why):
    answer = client.post("/v1/clips", json=asked)
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
def test_what_is_no_text_is_refused(client, body):
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
        for headers in (
            {},
            {"Authorization": "Bearer open"},
            {"Authorization": "Basic open sesame"},
        ):
            answer = client.post("/v1/clips", json=ASKED, headers=headers)
            assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
            assert get_all(client, headers, "/metrics", "/v1/model") == [status] * 2
            assert (
                get_all(client, headers, "/", "/healthz", "/readyz", "/docs", "/openapi.json")
                == [200] * 5
            )
        headers = {"Authorization": "Bearer open sesame"}
        assert client.post("/v1/clips", json=ASKED, headers=headers).status_code == 200
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
    origin = "https://music.example"
    ask = {"Origin": origin, "Access-Control-Request-Method": "POST"}
    ask["Access-Control-Request-Headers"] = "authorization,content-type"
    with TestClient(fake_app(), LOCAL) as client:
        until_ready(client)
        assert client.options("/v1/clips", headers=ask).status_code == 405
        assert "access-control-allow-origin" not in client.get("/v1/model", headers=ask).headers
        # A page may send these without asking first: they must draw nothing.
        for kind in (
            {},
            {"Content-Type": "text/plain"},
            {"Content-Type": "application/x-www-form-urlencoded"},
        ):
            answer = client.post(
                "/v1/clips", content=json.dumps(ASKED), headers={"Origin": origin, **kind}
            )
            assert answer.status_code == 422
    with TestClient(fake_app(origins=(origin,), token="x"), LOCAL) as client:
        until_ready(client)
        answer = client.options("/v1/clips", headers=ask)
        assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == origin
        assert (
            client.options(
                "/v1/clips", headers={**ask, "Origin": "https://other.example"}
            ).status_code
            == 400
        )
        sound = client.post(
            "/v1/clips", json=ASKED, headers={"Origin": origin, "Authorization": "Bearer x"}
        )
        assert (
            sound.status_code == 200 and "X-Seed" in sound.headers["access-control-expose-headers"]
        )
        large = client.post(
            "/v1/clips", content=b"a" * (MOST_BYTES + 1), headers={"Origin": origin}
        )
        for answer in (sound, large, client.get("/v1/model", headers={"Origin": origin})):
            assert answer.headers["access-control-allow-origin"] == origin
        other = client.get("/healthz", headers={"Origin": "https://other.example"})
        assert "access-control-allow-origin" not in other.headers


@pytest.mark.parametrize(
    "path", ["/", "/healthz", "/readyz", "/metrics", "/v1/model", "/docs", "/openapi.json"]
)
def test_head_answers_as_get_without_a_body(fake_app, path):
    with TestClient(fake_app(), LOCAL) as client:
        until_ready(client)
        whole, head = client.get(path), client.head(path)
        assert head.status_code == whole.status_code == 200 and head.content == b""
        if path != "/metrics":  # whose length changes
            assert head.headers == whole.headers


def test_other_methods_are_named_and_slashes_redirected(fake_app):
    with TestClient(fake_app(), LOCAL, follow_redirects=False) as client:
        for path, methods in (
            ("/", {"GET", "HEAD"}),
            ("/healthz", {"GET", "HEAD"}),
            ("/v1/clips", {"POST"}),
        ):
            answer = client.options(path)
            assert answer.status_code == 405 and set(answer.headers["allow"].split(", ")) == methods
        assert client.head("/v1/clips").status_code == 405
        answer = client.get("/healthz/")
        assert answer.status_code == 307 and answer.headers["location"] == f"{LOCAL}/healthz"


def test_the_description_is_shown_from_local_files(fake_app):
    with TestClient(fake_app(), LOCAL) as client:
        page = client.get("/docs")
        assert not re.findall(r"(?:https?:)?//[\w.]+", page.text)
        files = re.findall(r'(?:src|href)="([^"]+)"', page.text)
        assert len(files) == 3
        for file in files:
            assert client.get(f"/{file}").status_code == 200
        assert "unsafe" not in page.headers["content-security-policy"]
        assert "unsafe" not in client.get("/").headers["content-security-policy"]
        assert client.get("/docs/files/../../../etc/passwd").status_code == 404


def until(true):
    for _ in range(3000):  # five minutes: a machine may be slow
        if true():
            return
        time.sleep(0.1)
    raise AssertionError("never")


def ready_at(address):
    """The URL of a service, once it is ready."""
    url = f"http://{address[0]}:{address[1]}"
    until(lambda: httpx.get(f"{url}/readyz").status_code == 200)
    return url


class Slow:
    """A bundle that draws when it is let, and keeps count."""

    def __init__(self, bundle):
        self.about, self.encode, self.score = bundle.about, bundle.encode, bundle.score
        self.go, self.drawn, self._bundle = threading.Event(), [], bundle

    def draw(self, text, seeds, *rest):
        assert self.go.wait(300)
        self.drawn.append(list(seeds))
        return self._bundle.draw(text, seeds, *rest)


def test_a_full_queue_says_when_to_come_back_and_all_others_get_their_clip(bundle):
    slow = Slow(bundle)
    queue = Batcher(slow, 2, 0.0, 3)
    text = bundle.encode(["jazz"])[0]
    first = queue.submit(Wanted(text, 0, 0, 1.0))
    until(lambda: queue.waiting == 0)  # it is being drawn
    waiting = [queue.submit(Wanted(text, seed, 0, 1.0))[0] for seed in (1, 2, 3)]
    with pytest.raises(Full) as full:
        queue.submit(Wanted(text, 4, 0, 1.0))
    assert full.value.retry_after == 1 and queue.waiting == 3
    queue._seconds = 7.0  # a batch, of two
    with pytest.raises(Full) as full:
        queue.submit(*[Wanted(text, seed, 0, 1.0) for seed in (4, 5, 6)])
    assert full.value.retry_after == 14
    assert waiting[0].cancel() and queue.waiting == 2  # who leaves makes room
    last = queue.submit(Wanted(text, 4, 0, 1.0))
    more = queue.submit(
        Wanted(text, 5, 0, 1.0), begun=True
    )  # of a piece whose beginning is drawn: next, and never refused
    slow.go.set()
    closing = threading.Thread(target=queue.close)
    closing.start()
    for future in (*first, *waiting[1:], *last, *more):
        assert future.result(300).wav.shape == (3200,)
    closing.join(300)
    assert slow.drawn == [
        [0, 0],
        [5, 2],
        [3, 4],
    ]  # filled up with the first, and the one that left was never drawn
    with pytest.raises(Closed):
        queue.submit(Wanted(text, 5, 0, 1.0))


class Broken(Slow):
    """A bundle some of whose clips are not finite: those of an odd seed, or all; or whose rewards are not."""

    def __init__(self, bundle, what):
        super().__init__(bundle)
        self.what = what
        self.score = lambda clips: {
            name: self.marred(x, name) for name, x in bundle.score(clips).items()
        }

    def marred(self, array, what):
        rows = (np.asarray(self.drawn[-1]) % 2 == 1) | (self.what == "all")
        return np.where(
            rows.reshape(-1, *[1] * (array.ndim - 1)) & (what in (self.what, "all")), np.nan, array
        )

    def draw(self, text, seeds, *rest):
        clips = super().draw(text, seeds, *rest)
        return clips._replace(wav=self.marred(clips.wav, "all" if self.what == "all" else "wav"))


@pytest.mark.parametrize("what", ["wav", "total"])
def test_what_is_not_finite_is_its_own_clips_failure(bundle, what):
    broken = Broken(bundle, what)
    broken.go.set()
    queue = Batcher(broken, 2, 0.1, 8)
    text = bundle.encode(["jazz"])[0]
    good, bad = queue.submit(*[Wanted(text, seed, 0, 1.0, scored=True) for seed in (2, 3)])
    with pytest.raises(FloatingPointError, match="try another seed"):
        bad.result(300)
    assert np.isfinite(good.result(300).wav).all() and np.isfinite(good.result(300).scores["total"])
    queue.close()
    with TestClient(service(broken), LOCAL) as client:
        until_ready(client)
        asked = {**ASKED, "candidates": 2}
        assert client.post("/v1/clips", json={**asked, "seed": 2}).status_code == 200
        answer = client.post("/v1/clips", json={**asked, "seed": 3})
        assert answer.status_code == 500 and "not finite" in answer.json()["detail"]


def test_a_service_whose_first_clip_cannot_be_drawn_gives_up(bundle, exported, monkeypatch):
    broken, heard = Broken(bundle, "all"), []
    broken.go.set()
    app = create(
        broken,
        lambda told: Batcher(broken, 2, 0.0, 8, told),
        Limits(1.6, 4),
        Access(),
        heard.append,
    )
    with TestClient(app, LOCAL) as client:
        until(lambda: heard)
        for answer in (client.get("/readyz"), client.post("/v1/clips", json=ASKED)):
            assert (
                answer.status_code == 503
                and "the first clip could not be drawn" in answer.json()["detail"]
            )
    monkeypatch.setattr(bundles, "Bundle", lambda folder: broken)
    with pytest.raises(
        ValueError, match=r"the first clip of .* could not be drawn: .* fewer rows than 2"
    ):
        serving.serve(str(exported[0]), port=0, rows=2)


@pytest.mark.parametrize("form", ["wav", "flac", "ogg"])
def test_two_minutes_of_sound_are_encoded(form):
    """Vorbis, given all of it at once, overflows the stack of a thread."""
    wav = np.sin(np.arange(120 * 24000) / 20).astype(np.float32) / 2
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        content = pool.submit(encode, wav, 24000, form).result()
    found, rate = soundfile.read(io.BytesIO(content), dtype="float32")
    assert rate == 24000 and len(found) == len(wav)
    np.testing.assert_allclose(found, wav, atol=0.1 if form == "ogg" else 1e-4)


def test_a_failure_reaches_who_waits_and_the_next_is_served(bundle):
    slow = Slow(bundle)
    slow.go.set()
    queue = Batcher(slow, 1, 0.0, 3)
    (bad,) = queue.submit(Wanted(np.zeros(3, np.int32), 0, 0, 1.0))
    (good,) = queue.submit(Wanted(bundle.encode(["jazz"])[0], 0, 0, 1.0))
    with pytest.raises(ValueError, match=r"expected \(b, 12\) and called with \(1, 3\)"):
        bad.result(300)
    assert good.result(300).wav.shape == (3200,)
    queue.close()


def test_the_service_answers_429_and_503_and_notices_who_left(bundle, monkeypatch):
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
            early = await client.post("/v1/clips", json=ASKED)
            assert early.status_code == 503 and early.headers["retry-after"] == "5"
            slow.go.set()
            while (await client.get("/readyz")).status_code != 200:
                await asyncio.sleep(0.05)
            slow.go.clear()
            asked = []
            for seed in range(
                3
            ):  # one after the other, so that the last to come is the last to be drawn
                asked.append(
                    asyncio.create_task(client.post("/v1/clips", json={**ASKED, "seed": seed}))
                )
                await waiting(client, seed)
            full = await client.post("/v1/clips", json=ASKED)
            assert full.status_code == 429 and int(full.headers["retry-after"]) >= 1
            asked[2].cancel()  # the request of a client that went away
            await waiting(client, 1)
            slow.go.set()
            return [answer.status_code for answer in await asyncio.gather(*asked[:2])]

    assert asyncio.run(story()) == [200, 200]
    assert [seeds[0] for seeds in slow.drawn] == [
        0,
        0,
        1,
    ]  # the first to compile; seed 2 was never drawn


def test_a_connection_that_closes_takes_its_clips_out_of_the_queue(bundle, on_loopback):
    """Over a real socket, and both while a clip waits and while it is drawn."""
    slow = Slow(bundle)
    slow.go.set()
    with on_loopback(service(slow, rows=1)) as listening:
        address = ready_at(listening)
        slow.go.clear()
        for seed in (1, 2):
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(
                    f"{address}/v1/clips",
                    json={**ASKED, "seed": seed},
                    timeout=httpx.Timeout(60, read=1),
                )
        until(
            lambda: (
                'musicrl_requests_total{status="499"} 2.0' in httpx.get(f"{address}/metrics").text
            )
        )
        assert "musicrl_waiting_clips 0.0" in httpx.get(f"{address}/metrics").text
        slow.go.set()
    assert [seeds[0] for seeds in slow.drawn] == [
        0,
        1,
    ]  # the first to compile; seed 2 was never drawn


@pytest.fixture
def browser(tmp_path):
    """A headless Chromium that saves into `tmp_path`."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in (
        "headless",
        "no-sandbox",
        "disable-gpu",
        "disable-quic",
        "no-first-run",
        "disable-component-update",
    ):
        options.add_argument(f"--{flag}")
    options.add_argument("--disable-background-networking")
    options.add_argument("--disable-sync")
    options.add_argument(f"--user-data-dir={tmp_path / 'profile'}")
    options.add_experimental_option("prefs", {"download.default_directory": str(tmp_path)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


def found(browser, selector):
    return browser.find_element(By.CSS_SELECTOR, selector)


def fill(browser, **fields):
    for name, text in fields.items():
        found(browser, f"#{name}").clear()
        found(browser, f"#{name}").send_keys(text)


@pytest.mark.skipif(
    not shutil.which("chromedriver"), reason="needs chromium and chromedriver: Debian's packages"
)
def test_who_types_on_the_page_and_waits_hears_the_clip(bundle, browser, tmp_path, on_loopback):
    """To its end: a clip, a piece of two windows; and saves one, is refused one in words, and cancels one."""
    slow = Slow(bundle)
    slow.go.set()
    with on_loopback(service(slow)) as listening:
        address = ready_at(listening)
        browser.get(address)
        until(lambda: found(browser, "#seconds").get_property("value") == "0.4")
        assert not found(browser, "#token").is_displayed()  # the service asks for none
        for seconds in ("0.25", "0.6"):
            fill(browser, prompt=ASKED["prompt"], seconds=seconds, seed="7", candidates="2")
            found(browser, "#play").click()
            until(
                lambda n=seconds: browser.execute_script(
                    f"return document.querySelector('audio')?.duration == {n}"
                )
            )
            until(lambda: found(browser, "audio").get_property("ended"))
            assert found(browser, "article").text.startswith(
                "a slow piano\nseed 7 · acoustic_quality "
            )
            assert (
                found(browser, "#status").text == "" and not found(browser, "#stop").is_displayed()
            )
        found(browser, "article:last-child a").click()
        until(lambda: (tmp_path / "musicrl_7.wav").exists())
        wav = wav_of(
            httpx.post(f"{address}/v1/clips", json={**ASKED, "seconds": 0.25, "candidates": 2})
        )[0]
        np.testing.assert_array_equal(
            soundfile.read(tmp_path / "musicrl_7.wav", dtype="float32")[0], wav
        )
        fill(browser, prompt="   ")
        found(browser, "#play").click()
        until(
            lambda: found(browser, "#status").text.endswith(
                "is empty: say what the music should be like"
            )
        )
        slow.go.clear()
        fill(browser, prompt="upbeat jazz")
        found(browser, "#play").click()
        until(lambda: found(browser, "#status").text.startswith("drawing"))
        found(browser, "#stop").click()
        until(lambda: found(browser, "#status").text == "cancelled")
        until(lambda: "musicrl_requests_in_progress 0.0" in httpx.get(f"{address}/metrics").text)
        slow.go.set()
        for place, paused in ((1, [True, False]), (0, [False, True])):  # one at a time
            clips = browser.find_elements(By.CSS_SELECTOR, "audio")
            browser.execute_script("arguments[0].loop = true; arguments[0].play()", clips[place])
            until(lambda c=clips, p=paused: [clip.get_property("paused") for clip in c] == p)
    wrong = [line["message"] for line in browser.get_log("browser") if line["level"] == "SEVERE"]
    assert all(any(known in line for known in ("v1/clips", "favicon")) for line in wrong), wrong


@pytest.mark.skipif(
    not shutil.which("chromedriver"), reason="needs chromium and chromedriver: Debian's packages"
)
def test_a_browser_shows_the_description_and_asks_for_the_token(fake_app, browser, on_loopback):
    with on_loopback(fake_app(token="schlüssel ключ")) as listening:
        address = ready_at(listening)
        browser.get(f"{address}/docs")
        until(lambda: "/v1/clips" in found(browser, "#swagger-ui").text)
        found(browser, "#operations-default-clip_v1_clips_post button").click()
        until(lambda: '"prompt": "upbeat jazz"' in found(browser, "#swagger-ui").text)
        browser.get(f"{address}/")
        until(lambda: found(browser, "#token").is_displayed())
        assert found(browser, "#status").text == "the service asks for a token"
        for token, status in (("ключ\t", "the token is another one"), ("schlüssel ключ\t", "")):
            fill(browser, token=token)
            until(lambda s=status: found(browser, "#status").text == s)
        assert found(browser, "#seconds").get_property("value") == "1"
        found(browser, "#play").click()
        until(lambda: found(browser, "#clips").text.startswith("upbeat jazz"))
    wrong = [line["message"] for line in browser.get_log("browser") if line["level"] == "SEVERE"]
    assert all(any(known in line for known in ("v1/model", "favicon.ico")) for line in wrong), wrong


def test_health_metrics_page_and_description(client):
    assert (
        client.get("/healthz").json() == {"alive": True}
        and client.post("/v1/clips", json=ASKED).status_code == 200
    )
    text = client.get("/metrics").text
    assert 'musicrl_requests_total{status="200"}' in text and "musicrl_waiting_clips 0.0" in text
    page = client.get("/")
    assert (
        page.headers["content-security-policy"].startswith("default-src 'none'")
        and "v1/clips" in page.text
    )
    model = client.get("/v1/model").json()
    assert model["limits"] == {"seconds": 1.6, "candidates": 4} and model["licence"] == "CC0-1.0"
    assert client.get("/v1/../../etc/passwd").status_code == 404
    answers = client.get("/openapi.json").json()["paths"]["/v1/clips"]["post"]["responses"]
    assert set(answers) == {"200", "400", "408", "413", "422", "429", "500", "503"}


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def started(processes, folder, port):
    """`musicrl serve`, a process of its own, once it is ready."""
    command = [
        sys.executable,
        "-m",
        "musicrl_jax.cli",
        "serve",
        f"--bundle={folder}",
        f"--port={port}",
    ]
    settings = "--rows=2", "--limits=@ServiceLimits()", "--gin.ServiceLimits.candidates=2"
    settings += ("--gin.ServiceLimits.piece_seconds=60",)
    process = processes.start([*command, *settings], stdout=subprocess.DEVNULL)

    def ready():
        assert process.poll() is None
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"http://127.0.0.1:{port}/readyz").status_code == 200

    until(ready)
    return process


@pytest.fixture(scope="module")
def served(exported):
    """(address, [process], start) of a service; who replaces the process puts it there, by start()."""
    port = free_port()
    with Processes() as processes:

        def start():
            return started(processes, exported[0], port)

        yield f"http://127.0.0.1:{port}", [start()], start


def test_fuzzed_requests_by_its_own_description(served):
    """No 500, and no answer that the description does not name."""
    address, _, _ = served
    described, counts = (
        schemathesis.openapi.from_url(f"{address}/openapi.json"),
        collections.Counter(),
    )
    for operation in described.get_all_operations():

        @given(case=operation.ok().as_strategy())
        @settings(
            max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), database=None
        )
        def ask(case):
            answer = case.call(base_url=address, timeout=300)
            counts[case.path, answer.status_code] += 1
            case.validate_response(
                answer, excluded_checks=[checks.positive_data_acceptance]
            )  # a text may say nothing

        ask()
    assert counts["/v1/clips", 200] > 5 and all(status < 500 for _, status in counts)


def taken(client):
    """Requests for clips so far, answered or not."""
    told = client.get("/metrics").text
    return sum(
        map(
            float,
            re.findall(r"^musicrl_requests(?:_total{.*}|_in_progress) (.*)$", told, re.MULTILINE),
        )
    )


def test_a_killed_service_loses_what_it_was_drawing_and_starts_again_as_it_was(served):
    address, process, start = served
    with (
        concurrent.futures.ThreadPoolExecutor(4) as pool,
        httpx.Client(base_url=address, timeout=300) as client,
    ):
        before, clip = taken(client), client.post("/v1/clips", json=ASKED)
        asked = [
            pool.submit(client.post, "/v1/clips", json={**ASKED, "seconds": 60}) for _ in range(4)
        ]
        until(lambda: taken(client) == before + 5)
        process[0].kill()
        assert all(
            isinstance(answer.exception(), httpx.TransportError) for answer in asked
        )  # none hangs
    process[0].wait()
    process[0] = start()
    again = httpx.post(f"{address}/v1/clips", json=ASKED, timeout=300)
    assert again.content == clip.content and again.headers["x-seed"] == clip.headers["x-seed"]


def test_sigterm_lets_finish_what_was_asked_for(served):
    """And waits for no request that is half sent. The last of this file: the service is gone then."""
    address, (process,), _ = served
    half = socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2])), timeout=300)
    half.sendall(b"POST /v1/clips HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
    with (
        concurrent.futures.ThreadPoolExecutor(6) as pool,
        httpx.Client(base_url=address, timeout=300) as client,
    ):
        before = taken(client)
        asked = [
            pool.submit(client.post, "/v1/clips", json={**ASKED, "seconds": 8}) for _ in range(6)
        ]
        until(lambda: taken(client) == before + 6)
        assert "musicrl_requests_in_progress 0.0" not in client.get("/metrics").text
        process.send_signal(signal.SIGTERM)
        with half:
            assert half.recv(100).startswith(b"HTTP/1.1 503 ")
        assert [answer.result().status_code for answer in asked] == [200] * 6
    assert process.wait(300) == 0
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{address}/healthz")
