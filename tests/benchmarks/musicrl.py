"""Prints the tables of an evaluated run in Markdown, beside the paper's figures.

    python tests/benchmarks/musicrl.py --run runs/demo

The four tables are: every pair of policies by the judging panel of simulated listeners, with the
paper's win rate if it has that pair; opinion score, rewards and distances of every policy;
independent measurements of the waveforms, in standard deviations of real clips; and the seconds of
each stage, with the decision of a held-out judge. Intervals are 95 %, clustered by prompt and by
listener for opinions, and over prompts for other figures.
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
    """Returns a number in words, with its interval if it has one."""
    return printed(value) if isinstance(value, dict) else f"{value:.{digits}f}"


def table(head: list[str], rows: list[list[str]]) -> None:
    """Prints a table in Markdown."""
    print(f"| {' | '.join(head)} |\n{'|---' * len(head)}|")
    for row in rows:
        print(f"| {' | '.join(row)} |")
    print()


def main() -> None:
    """Prints the four tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, required=True, help="folder of the run")
    summary = read_json(parser.parse_args().run / "summary.json")
    policies = summary["policies"]

    # Pairs of policies.
    rows = []
    for pair in summary["pairs"]:
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

    # Policies.
    rewards = list(summary["rewards"])
    rows = [
        [
            name,
            printed(summary["mos"][name], 2),
            PAPER_MOS.get(name, ""),
            *(printed(summary["rewards"][reward][name], 3) for reward in rewards),
            printed(summary["kl"][name], 1) if name in summary["kl"] else "",
            plain(summary["diversity"][name], 2),
            plain(summary["frechet"][name], 1),
        ]
        for name in policies
    ]
    rows.append(["real clips", printed(summary["real"]["mos"], 2), *[""] * (len(rewards) + 2)])
    rows[-1] += [plain(summary["diversity"]["real"], 2), "0"]
    head = [
        "",
        "MOS, simulated listeners",
        "MOS, paper's people",
        *(name.replace("_", " ") for name in rewards),
    ]
    table([*head, "KL to the base, nats a clip", "diversity", "Frechet distance"], rows)

    # Measurements of the waveforms.
    measurements = summary["measurements"] | {"real clips": summary["real"]["measurements"]}
    names = list(summary["real"]["measurements"])
    table(
        ["measured", *measurements],
        [
            [name.replace("_", " "), *(f"{each[name]:+.2f}" for each in measurements.values())]
            for name in names
        ],
    )

    # Stages.
    watches = {name.lower(): watch for name, watch in summary["watched"].items() if watch}
    for stage, seconds in summary["seconds"].items():
        watch = watches.get(stage)
        verdict = (
            ""
            if not watch
            else f", {watch['looks']} looks of the held-out judge, "
            + (
                "no alarm"
                if watch["kept"] is None
                else f"stopped by its alarm, step {watch['kept']} kept"
            )
        )
        print(f"* {stage}: {seconds:.0f} s{verdict}")


if __name__ == "__main__":
    main()
