"""Measures how soon a stream of the service sounds, alone and beside others.

    python tests/benchmarks/stream.py --bundle=bundle

1. Warm requests for one clip, streamed and whole in turns: time to the first second of sound, and
   to the end.
2. Some clients at once, each of which asks for a stream again when its last one ends: time to the
   first second, and the streams that would pause. A player starts when it has the first second.
"""

import argparse
import http.client
import json
import threading
import time
from typing import NamedTuple
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


def together(address: str, clients: int, requests: int, rate: int) -> list[Answer]:
    """Returns the answers of clients that each send some requests, one after another."""
    answers: list[Answer] = []

    def send(client: int) -> None:
        for number in range(requests):
            answers.append(request(address, 1000 * client + number, True, rate))

    threads = [threading.Thread(target=send, args=(client,)) for client in range(clients)]
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
    parser.add_argument("--requests", type=int, default=30, help="of each kind and client")
    parser.add_argument("--clients", type=int, nargs="*", default=[2, 4, 8])
    flags = parser.parse_args()
    with open(f"{flags.bundle}/manifest.json") as file:
        rate = json.load(file)["sample_rate_hz"]

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
        print("| clients | streams | first second: p50 s | p99 s | slowest s | paused |")
        print("|---|---|---|---|---|---|")
        for clients in flags.clients:
            streams = together(address, clients, max(1, flags.requests // 3), rate)
            paused = sum(each.pause > 0 for each in streams)
            times = cells([each.first for each in streams])
            print(f"| {clients} | {len(streams)} | {times} | {paused} |", flush=True)


if __name__ == "__main__":
    main()
