"""Checks streams: their bytes are a whole wav file, and their place is free once they end."""

import contextlib
import io
import json
import shutil
import socket
import time
from functools import partial

import httpx
import numpy as np
import pytest
import soundfile
from fastapi.testclient import TestClient

from musicrl_jax import generate
from musicrl_jax.core.audio import encode
from musicrl_jax.core.manifest import MANIFEST, sealed, unsealed
from musicrl_jax.serving.app import Limits, create
from musicrl_jax.serving.batcher import Batcher, Closed, Full, Row
from musicrl_jax.serving.bundle import Bundle, Clips
from musicrl_jax.serving.settings import Access
from musicrl_jax.serving.stream import parts
from musicrl_jax.serving.system_player import SystemPlayer
from musicrl_jax.systems.musiclm import MusicLMSystem

RATE, SAMPLES = 8000, 3200
ORDER = {"prompt": "a slow piano", "seed": 7}
STREAM = "/v1/clips?stream=1"


def until(condition):
    """Waits until a condition holds, for five minutes at most: a machine may be slow."""
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("the condition does not hold after five minutes")


def until_ready(client, url=""):
    """Waits until a service can stream: until then it answers 503."""
    until(lambda: client.post(url + STREAM, json=ORDER).status_code == 200)


def service(bundle, most_waiting=16):
    queue = partial(Batcher, bundle, 2, 0.0, most_waiting)
    return create(bundle, queue, Limits(1.6, 4), Access())


@pytest.fixture(scope="module")
def client(bundle):
    with TestClient(service(bundle), "http://localhost") as client:
        until_ready(client)
        yield client


@pytest.fixture(scope="module")
def chunks(bundle):
    """Returns the chunks of the clip of ORDER."""
    return list(bundle.stream(bundle.encode([ORDER["prompt"]])[0], ORDER["seed"], 0.99))


@pytest.fixture(scope="module")
def whole(chunks):
    return np.clip(np.concatenate([each.wav[0] for each in chunks]), -1, 1)


def samples(content):
    return soundfile.read(io.BytesIO(content), dtype="int16")[0]


# --- the same bits ---


def test_the_bytes_of_a_stream_are_a_whole_wav_file(client, bundle, whole):
    answer = client.post(STREAM, json=ORDER)
    assert answer.status_code == 200 and answer.headers["content-type"] == "audio/wav"
    assert answer.headers["content-length"] == str(len(answer.content))
    with soundfile.SoundFile(io.BytesIO(answer.content)) as file:
        tags = {"title": file.title, "comment": file.comment}
        assert (file.frames, file.samplerate) == (SAMPLES, RATE)
    assert answer.content == encode(whole, RATE, "wav", tags)
    settings = json.loads(tags["comment"])
    assert (settings["seed"], settings["stream"], tags["title"]) == (7, True, ORDER["prompt"])
    assert client.post(STREAM, json=ORDER).content == answer.content


def test_a_shorter_stream_is_the_beginning(client, whole):
    for seconds in (0.04, 0.16, 0.25, 0.28):
        answer = client.post(STREAM, json={**ORDER, "seconds": seconds})
        expected = samples(encode(whole[: round(seconds * RATE)], RATE, "wav"))
        np.testing.assert_array_equal(samples(answer.content), expected)


def test_a_bundle_streams_the_tokens_of_the_whole_clip(bundle, chunks):
    assert [each.tokens.shape for each in chunks] == [(1, 4, 3), (1, 3, 3), (1, 3, 3)]
    tokens = np.concatenate([each.tokens for each in chunks], axis=1)
    text = bundle.encode([ORDER["prompt"]])
    np.testing.assert_array_equal(tokens, bundle.draw(text, [7], temperatures=[0.99]).tokens)


def test_a_bundle_streams_what_its_system_streams(run, chunks, monkeypatch):
    monkeypatch.setattr(MusicLMSystem, "STREAM_FRAMES", 3)
    player = SystemPlayer(str(run / "policy"), None)
    streamed = list(player.stream(player.encode([ORDER["prompt"]])[0], 7, 0.99))
    for expected, chunk in zip(streamed, chunks, strict=True):
        np.testing.assert_array_equal(chunk.tokens, expected.tokens)
        np.testing.assert_allclose(chunk.wav, expected.wav, atol=1e-5)


# --- generate ---


def stream(exported, out, **settings):
    arguments = {"seed": 7, "temperature": 0.99, "loudness_lufs": None, "stream": True, **settings}
    return generate.generate(str(exported[0]), ORDER["prompt"], out=str(out), **arguments)


def test_generate_streams_to_a_file_and_to_standard_output(exported, whole, tmp_path, capsysbinary):
    (path,) = stream(exported, tmp_path / "new" / "a.wav")
    np.testing.assert_array_equal(samples(path.read_bytes()), samples(encode(whole, RATE, "wav")))
    capsysbinary.readouterr()
    assert stream(exported, "-") == []
    assert capsysbinary.readouterr().out == path.read_bytes()


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"loudness_lufs": -16.0}, "no loudness before its end: give --loudness_lufs=None"),
        ({"out": "clips"}, "give a name that ends in .wav, or - for standard output"),
        ({"out": "a.flac"}, "out='a.flac': a stream is one wav file"),
        ({"out": "*.wav"}, "a stream is one wav file"),
        ({"candidates": 2}, "candidates=2: a stream cannot wait for the best of several; give 1"),
        ({"clip_seconds": 0.6}, "0.6 s is more than the 0.4 s of one clip"),
    ],
)
def test_generate_refuses_what_cannot_be_streamed(exported, tmp_path, monkeypatch, settings, why):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=why.replace("*", r"\*")):
        stream(exported, **{"out": "a.wav", **settings})
    with pytest.raises(ValueError, match="give one prompt"):
        generate.generate("x", ["a", "b"], out="a.wav", loudness_lufs=None, stream=True)
    assert not list(tmp_path.iterdir())


def test_a_reader_that_leaves_and_a_broken_decoder_are_said(exported, monkeypatch, tmp_path):
    class Closed(io.BytesIO):
        def write(self, _):
            raise BrokenPipeError(32, "Broken pipe")

    output = io.TextIOWrapper(Closed())
    with contextlib.redirect_stdout(output), pytest.raises(OSError, match="keep its reader open"):
        stream(exported, "-")
    monkeypatch.setattr(Bundle, "stream", lambda *_: nan_after(1))
    with pytest.raises(ValueError, match="not finite"):
        stream(exported, tmp_path / "a.wav")
    assert not list(tmp_path.iterdir())


# --- refusals of the service ---


@pytest.mark.parametrize(
    ("order", "why"),
    [
        ({"candidates": 2}, "the best of several"),
        ({"format": "ogg"}, "the format ogg cannot be streamed"),
        ({"seconds": 0.5}, "0.5 s is more than the 0.4 s of one clip"),
        ({"prompt": " "}, "is empty"),
    ],
)
def test_the_service_refuses_what_cannot_be_streamed(client, order, why):
    answer = client.post(STREAM, json={**ORDER, **order})
    assert answer.status_code == 422 and why in answer.json()["detail"]


def test_a_bundle_without_the_functions_says_so(exported, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(exported[0], copy)
    fields = unsealed(copy / MANIFEST)
    del fields["stream_functions"]
    (copy / MANIFEST).write_text(sealed(fields))
    bundle = Bundle(copy)
    with pytest.raises(ValueError, match="cannot stream: export its system again"):
        bundle.stream(np.zeros(12, np.int32), 0)
    with TestClient(service(bundle), "http://localhost") as client:
        until(lambda: client.get("/readyz").status_code == 200)
        assert client.get("/v1/model").json()["streams"] is False
        answer = client.post(STREAM, json=ORDER)
        assert answer.status_code == 422 and "export the bundle again" in answer.json()["detail"]


# --- the place of a stream ---


def nan_after(count):
    """Yields `count` good chunks of 10 ms, then one with NaN."""
    for number in range(count + 1):
        value = np.nan if number == count else 0.1
        yield Clips(np.zeros((1, 1, 3), np.int32), np.full((1, 80), value, np.float32), {})


class Slow:
    """A bundle whose stream has 40 chunks and takes 0.1 s for each; it counts them."""

    streams = True

    def __init__(self, bundle):
        self.manifest, self.encode = bundle.manifest, bundle.encode
        self.draw, self.score, self.chunks = bundle.draw, bundle.score, 0
        self.seconds = 0.0

    def stream(self, text, seed, temperature):
        for _ in range(40):
            time.sleep(self.seconds)
            self.chunks += 1
            yield Clips(np.zeros((1, 1, 3), np.int32), np.zeros((1, 80), np.float32), {})


@pytest.mark.parametrize("chunks_read", [0, 2])
def test_a_client_that_leaves_frees_its_place(bundle, on_loopback, chunks_read):
    slow = Slow(bundle)
    with on_loopback(service(slow, most_waiting=1)) as address:
        url = f"http://{address[0]}:{address[1]}"
        until_ready(httpx, url)
        slow.chunks, slow.seconds = 0, 0.1
        body = json.dumps(ORDER)
        head = f"POST {STREAM} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        request = f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode()

        # While the stream is open, its place is not free.
        with socket.create_connection(address) as client:
            client.sendall(request)
            until(lambda: slow.chunks >= chunks_read)
            if chunks_read:
                assert client.recv(65536).startswith(b"HTTP/1.1 200 OK")
                assert httpx.post(f"{url}/v1/clips", json=ORDER).status_code == 429

        # Its client left: no more is drawn, and another stream has the place.
        until(lambda: httpx.post(f"{url}/v1/clips", json=ORDER, timeout=60).status_code == 200)
        assert slow.chunks < 40
        slow.seconds, count = 0.0, slow.chunks
        answer = httpx.post(f"{url}{STREAM}", json=ORDER, timeout=60)
        assert answer.status_code == 200 and len(samples(answer.content)) == SAMPLES
        assert slow.chunks == count + 40


@pytest.mark.parametrize("good", [0, 2])
def test_a_stream_that_is_not_finite_fails_visibly(bundle, on_loopback, good):
    broken = Slow(bundle)
    with on_loopback(service(broken, most_waiting=1)) as address:
        url = f"http://{address[0]}:{address[1]}"
        until_ready(httpx, url)
        broken.stream = lambda *_: nan_after(good)
        if good:
            with pytest.raises(httpx.RemoteProtocolError):
                httpx.post(f"{url}{STREAM}", json=ORDER, timeout=60)
        else:
            answer = httpx.post(f"{url}{STREAM}", json=ORDER, timeout=60)
            assert answer.status_code == 500 and "not finite" in answer.json()["detail"]
        assert httpx.post(f"{url}/v1/clips", json=ORDER, timeout=60).status_code == 200


def test_streams_take_turns_with_batches_and_have_places(bundle):
    slow = Slow(bundle)
    queue = Batcher(slow, 2, 0.0, 2)
    text = bundle.encode(["jazz"])[0]

    def opened():
        return queue.stream(parts(slow, text, 0, 0.4, 0.99, {}))

    first, second = opened(), opened()
    with pytest.raises(Full):
        opened()
    with pytest.raises(Full):
        queue.submit(Row(text, 0, 0, 1.0))
    received = [first.next().result(60)]
    second.close()  # before its first part
    (clip,) = queue.submit(Row(text, 0, 0, 1.0))
    while part := first.next().result(60):
        received.append(part)
    assert clip.result(300).wav.shape == (SAMPLES,)
    assert len(received) == 40 and len(samples(b"".join(received))) == SAMPLES
    first.close()
    queue.close()
    with pytest.raises(Closed):
        opened()
    with pytest.raises(Closed):
        first.next()
