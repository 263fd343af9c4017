"""The tables of a run that `musicrl evaluate` judged, in Markdown, beside the paper's.

    python tests/benchmarks/musicrl.py --run runs/demo

Four tables: every pair of policies by the judging panel of simulated listeners, with the paper's win rate where it has
that pair; every policy's opinion score, rewards and distances; what independent measurements of the waveform say of
each, in standard deviations of real clips; and the seconds of each stage, with what a held-out judge did about it.
Intervals are 95 %, clustered by prompt and by listener for what listeners say, else over prompts.
"""

import argparse
from pathlib import Path
from typing import Any

from musicrl_jax.core.files import read_json
from musicrl_jax.core.statistics import printed

# MusicRL, table 2 and section 5.2: people, 101 prompts, 3 raters a pair.
PAPER = {
    ("R", "MusicLM"): "65.0 / 22.1 / 12.9, 83 %",
    ("U", "MusicLM"): "58.6 / 21.2 / 20.2, 74 %",
    ("RU", "MusicLM"): "66.7 / 22.9 / 10.4, 87 %",
    ("RU", "R"): "42.6 / 35.6 / 21.8, 66 %",
    ("RU", "U"): "43.9 / 29.7 / 26.4, 62 %",
}
PAPER_MOS = {"MusicLM": "3.07", "R": "3.54", "U": "3.54", "RU": "3.82"}


def plain(value: float | dict[str, Any], digits: int) -> str:
    return printed(value) if isinstance(value, dict) else f"{value:.{digits}f}"


def table(head: list[str], rows: list[list[str]]) -> None:
    print(f"| {' | '.join(head)} |\n{'|---' * len(head)}|")
    for row in rows:
        print(f"| {' | '.join(row)} |")
    print()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, required=True, help="folder of the run")
    found = read_json(parser.parse_args().run / "summary.json")
    policies = found["policies"]

    rows = []
    for pair in found["pairs"]:
        names = (pair["first"], pair["second"])
        rate = printed(pair["win_rate"], 0, 100)
        if "win" in pair:
            points = " / ".join(f"{100 * pair[side]:.1f}" for side in ("win", "tie", "loss"))
            rows.append(
                [
                    " - ".join(names),
                    points,
                    f"{rate} %",
                    f"{pair['wilcoxon_p']:.1g}",
                    PAPER.get(names, ""),
                ]
            )
        else:
            rows.append([" - ".join(names), rate, rate, rate, PAPER.get(names, "")])
    table(
        [
            "pair",
            "win / tie / loss %",
            "win rate",
            "Wilcoxon p",
            "paper, people: win / tie / loss %, win rate",
        ],
        rows,
    )

    rewards = list(found["rewards"])
    rows = [
        [
            name,
            printed(found["mos"][name], 2),
            PAPER_MOS.get(name, ""),
            *(printed(found["rewards"][reward][name], 3) for reward in rewards),
            printed(found["kl"][name], 1) if name in found["kl"] else "",
            plain(found["diversity"][name], 2),
            plain(found["frechet"][name], 1),
        ]
        for name in policies
    ]
    rows.append(["real clips", printed(found["real"]["mos"], 2), *[""] * (len(rewards) + 2)])
    rows[-1] += [plain(found["diversity"]["real"], 2), "0"]
    head = [
        "",
        "MOS, simulated listeners",
        "MOS, paper's people",
        *(name.replace("_", " ") for name in rewards),
    ]
    table([*head, "KL to the base, nats a clip", "diversity", "Frechet distance"], rows)

    heard = found["measurements"] | {"real clips": found["real"]["measurements"]}
    names = list(found["real"]["measurements"])
    table(
        ["measured", *heard],
        [
            [name.replace("_", " "), *(f"{each[name]:+.2f}" for each in heard.values())]
            for name in names
        ],
    )

    watched = {name.lower(): watch for name, watch in found["watched"].items() if watch}
    for stage, seconds in found["seconds"].items():
        watch = watched.get(stage)
        told = (
            ""
            if not watch
            else f", {watch['looks']} looks of the held-out judge, "
            + (
                "no alarm"
                if watch["kept"] is None
                else f"stopped by its alarm, step {watch['kept']} kept"
            )
        )
        print(f"* {stage}: {seconds:.0f} s{told}")


if __name__ == "__main__":
    main()
