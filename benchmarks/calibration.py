#!/usr/bin/env python
"""Coverage of the 95% intervals over simulated ladders with a known law, as a Markdown table."""

import sys
import time

from megamm_laws.arguments import ArgumentParser
from simulated.ladders import SCENARIOS, Coverage, cover

from megamm.errors import exit_on_error

KINDS = {
    "coverage": "Coverage in %, intervals as in fits.json",
    "resampling_coverage": "Coverage in %, plain bootstrap",
    "widening": "Median width over that of the plain bootstrap",
}


def to_markdown(results: list[Coverage], kind: str) -> str:
    """One row per scenario, one column per decision: shares in percent, those outside 92-98% in bold, or ratios."""
    names = list(results[0].coverage)
    lines = ["| scenario | " + " | ".join(names) + " |", "| --- |" + " --- |" * len(names)]
    for result in results:
        values = [getattr(result, kind)[name] for name in names]
        if kind == "widening":
            cells = [f"{x:.2f}" for x in values]
        else:
            cells = [f"{100 * x:.1f}" if 0.92 <= x <= 0.98 else f"**{100 * x:.1f}**" for x in values]
        lines.append(f"| {result.scenario.name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--simulations", type=int, default=1000)
    parser.add_argument("--bootstrap", type=int, default=1000, metavar="R")
    parser.add_argument("--only", metavar="TEXT", help="only scenarios whose name holds this text")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    results = []
    for scenario in SCENARIOS:
        if arguments.only and arguments.only not in scenario.name:
            continue
        begin = time.perf_counter()

        def progress(done: int, name: str = scenario.name, begin: float = begin) -> None:
            if done % 100 == 0:
                print(f"{name}: {done} ladders, {time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)

        results.append(cover(scenario, arguments.simulations, arguments.bootstrap, arguments.seed, progress))
        bias = ", ".join(f"{name} {value:.2f}" for name, value in results[-1].bias.items())
        print(f"{scenario.name}: bias in standard deviations: {bias}", file=sys.stderr)
        for kind in KINDS:
            print(to_markdown(results[-1:], kind), file=sys.stderr, flush=True)
    print(f"{arguments.simulations} ladders a scenario, {arguments.bootstrap} resamples each")
    for kind, title in KINDS.items():
        print(f"\n{title}:\n\n{to_markdown(results, kind)}")


if __name__ == "__main__":
    exit_on_error(main)
