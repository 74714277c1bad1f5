#!/usr/bin/env python
"""Coverage of the 95% intervals over simulated ladders with a known law, as a Markdown table."""

import argparse
import sys
import time

from megamm.errors import exit_on_error
from megamm.scaling.calibration import SCENARIOS, Coverage, cover


def to_markdown(results: list[Coverage], kind: str) -> str:
    """One row per scenario, one column per decision, in percent; those outside 92-98% in bold."""
    names = list(results[0].percentile)
    lines = [
        "| scenario | " + " | ".join(names) + " |",
        "| --- |" + " --- |" * len(names),
    ]
    for result in results:
        shares = getattr(result, kind)
        cells = [f"{100 * shares[n]:.1f}" if 0.92 <= shares[n] <= 0.98 else f"**{100 * shares[n]:.1f}**" for n in names]
        lines.append(f"| {result.scenario.name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--simulations", type=int, default=1000)
    parser.add_argument("--bootstrap", type=int, default=1000, metavar="R")
    parser.add_argument("--only", metavar="TEXT", help="only scenarios whose name holds this text")
    parser.add_argument("--pigeonhole-every", type=int, default=5, metavar="K", help="of one ladder in K (default: 5)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    results = []
    for scenario in SCENARIOS:
        if arguments.only and arguments.only not in scenario.name:
            continue
        begin = time.perf_counter()

        def progress(done: int, name: str = scenario.name, begin: float = begin) -> None:
            if done % 50 == 0:
                print(f"{name}: {done} ladders, {time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)

        results.append(
            cover(
                scenario,
                arguments.simulations,
                arguments.bootstrap,
                seed=arguments.seed,
                pigeonhole_every=arguments.pigeonhole_every,
                progress=progress,
            )
        )
        bias = ", ".join(f"{name} {value:.2f}" for name, value in results[-1].bias.items())
        print(f"{scenario.name}: bias in standard deviations: {bias}", file=sys.stderr)
        print(f"{to_markdown(results[-1:], 'percentile')}\n{to_markdown(results[-1:], 'pigeonhole')}", file=sys.stderr)
    counts = f"{arguments.simulations} ladders a scenario, {arguments.bootstrap} resamples each; coverage in %"
    print(f"{counts}\n\nRuns (or trunks) resampled, as in fits.json:\n\n{to_markdown(results, 'percentile')}")
    note = f"of one ladder in {arguments.pigeonhole_every}"
    print(f"\nSizes and lengths resampled, {note}:\n\n{to_markdown(results, 'pigeonhole')}")


if __name__ == "__main__":
    exit_on_error(main)
