"""Measures how soon a stream of the service sounds, alone and beside others.

    python tests/benchmarks/stream.py --bundle=bundle

1. Warm requests for one clip, streamed and whole in turns: time to the first second of sound, and
   to the end.
2. Some listeners at once. Each plays a stream from its first second to its end, and then asks for
   the next: time to the first second, and the streams that would pause.
"""

import argparse
import http.client
import json
import random
import threading
import time
from typing import Any, NamedTuple
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
from serve import service

PROMPTS = "upbeat jazz", "a slow piano", "a reel on a harp"
SAMPLE_BYTES, HEADER_BYTES = 2, 1024  # of the service's files; of a header, about


class Answer(NamedTuple):
    """Times of an answer, in seconds after its request.

    Attributes:
      first: until the first second of sound is there.
      end: until all is there.
      pause: that a player would be silent for while it waits for sound.
    """

    first: float
    end: float
    pause: float


def wait_for_streams(address: str) -> None:
    """Waits until the service has compiled the functions of streams: until then it answers 503."""
    body, headers = b'{"prompt": "jazz"}', {"Content-Type": "application/json"}
    while True:
        try:
            urlopen(Request(f"{address}/v1/clips?stream=1", body, headers), timeout=600).close()
            return
        except HTTPError as error:
            if error.code != 503:
                raise SystemExit(f"the service answered {error.code}: {error.read()}") from None
        time.sleep(0.5)


def request(address: str, seed: int, stream: bool, rate: int) -> Answer:
    """Sends a request for a clip, and times its answer."""
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=600)
    body = json.dumps({"prompt": PROMPTS[seed % len(PROMPTS)], "seed": seed})
    headers, start = {"Content-Type": "application/json"}, time.perf_counter()
    connection.request("POST", f"/v1/clips?stream={int(stream)}", body, headers)
    answer = connection.getresponse()
    if answer.status != 200:
        raise SystemExit(f"the service answered {answer.status}: {answer.read()[:500]!r}")

    # The bytes of music, and when they came.
    size, first, pause = 0, None, 0.0
    while part := answer.read1(1 << 16):
        now = time.perf_counter() - start
        seconds_before = max(0, size - HEADER_BYTES) / SAMPLE_BYTES / rate
        size += len(part)
        if first is None and size >= rate * SAMPLE_BYTES:
            first = now
        elif first is not None:
            pause = max(pause, now - first - seconds_before)
    connection.close()
    return Answer(first, time.perf_counter() - start, pause)


def cells(values: list[float]) -> str:
    """Returns median, 99th percentile and maximum as table cells."""
    return " | ".join(f"{x:.2f}" for x in (*np.percentile(values, (50, 99)), max(values)))


def together(address: str, listeners: int, requests: int, model: dict[str, Any]) -> list[Answer]:
    """Returns the answers to listeners who each play some streams, one after another."""
    answers: list[Answer] = []
    clip_seconds, rate = model["clip_seconds"], model["sample_rate_hz"]

    def play(listener: int) -> None:
        time.sleep(clip_seconds * random.Random(listener).random())  # they start at any time
        for number in range(requests):
            answer = request(address, 1000 * listener + number, True, rate)
            answers.append(answer)
            time.sleep(max(0.0, answer.first + clip_seconds - answer.end))

    threads = [threading.Thread(target=play, args=(listener,)) for listener in range(listeners)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", required=True)
    parser.add_argument("--requests", type=int, default=30, help="of each kind")
    parser.add_argument("--listeners", type=int, nargs="*", default=[2, 4, 8])
    flags = parser.parse_args()
    with open(f"{flags.bundle}/manifest.json") as file:
        model = json.load(file)
    rate = model["sample_rate_hz"]

    # One clip at a time.
    with service(flags.bundle, "--rows=1") as (address, _):
        wait_for_streams(address)
        answers = {True: [], False: []}
        for seed in range(flags.requests):
            for stream in answers:
                answers[stream].append(request(address, seed, stream, rate))
        whole = np.median([each.end for each in answers[False]])
        first = np.median([each.first for each in answers[True]])
        print(f"first second of a stream over the whole clip: {first / whole:.2f}\n")
        print("| time to | p50 s | p99 s | slowest s |\n|---|---|---|---|")
        print(f"| the first second of a stream | {cells([x.first for x in answers[True]])} |")
        print(f"| the end of a stream | {cells([x.end for x in answers[True]])} |")
        print(f"| a whole clip | {cells([x.end for x in answers[False]])} |\n", flush=True)

        # Several streams at once.
        print("| listeners | streams | first second: p50 s | p99 s | slowest s | paused |")
        print("|---|---|---|---|---|---|")
        for listeners in flags.listeners:
            streams = together(address, listeners, max(1, flags.requests // 4), model)
            paused = sum(each.pause > 0 for each in streams)
            times = cells([each.first for each in streams])
            print(f"| {listeners} | {len(streams)} | {times} | {paused} |", flush=True)


if __name__ == "__main__":
    main()
