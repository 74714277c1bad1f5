"""Inject all faults and print a table.

    python tests/faults/run.py [--kinds WORDS ...] [--limit N] [--jobs N] [--seed S]

Exits with 1 where a run hung, crashed, ended with other numbers, or lost more than a checkpoint interval and the step
beside which a checkpoint is written.
"""

import argparse
import os
import sys
import tempfile
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / name) for name in ("tests/faults", "tests/unit", "", "kernels", "laws")]
os.environ.setdefault("OMP_NUM_THREADS", "1")

from injection import MOST_LOST, Fault, Outcome, Templates, inject, seconds_since  # noqa: E402
from kinds import all_faults  # noqa: E402

STATES = ("survived", "hands", "wrong", "hung", "crashed")


def inject_all(faults: list[Fault], templates: Templates, folder: Path, jobs: int, seed: int) -> list[Outcome]:
    """The outcome of each fault, in the order of the list; progress goes to stderr."""
    found: list[Outcome] = []
    began = time.monotonic()
    with ThreadPoolExecutor(jobs) as pool:
        waiting = [pool.submit(inject, fault, templates, folder / f"case-{i}", seed) for i, fault in enumerate(faults)]
        for one in waiting:
            outcome = one.result()
            found.append(outcome)
            is_bad = outcome.state in STATES[2:] or outcome.lost > MOST_LOST
            if is_bad or len(found) % 20 == 0 or len(found) == len(faults):
                line = f"[{len(found)}/{len(faults)}, {seconds_since(began)}]"
                if is_bad:
                    fault = outcome.fault
                    line += f" {fault.kind}, {fault.name}: {outcome.state}, {outcome.lost} steps lost: {outcome.note}"
                print(line, file=sys.stderr, flush=True)
    return found


def table(outcomes: list[Outcome]) -> str:
    """A line per kind, and the totals."""
    by_kind: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        by_kind[outcome.fault.kind].append(outcome)
    lines = [f"{'kind':<24}{'injected':>9}" + "".join(f"{state:>10}" for state in STATES) + f"{'lost steps':>12}"]
    for kind, some in [*by_kind.items(), ("all", outcomes)]:
        counts = "".join(f"{sum(outcome.state == state for outcome in some):>10}" for state in STATES)
        lines.append(f"{kind:<24}{len(some):>9}{counts}{max(outcome.lost for outcome in some):>12}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", default=[], metavar="WORDS", help="only kinds that hold one of these")
    parser.add_argument("--limit", type=int, metavar="N", help="only every so manieth, N in all")
    parser.add_argument("--jobs", type=int, default=2, help="cases at a time (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the places that are damaged")
    parser.add_argument("--keep", metavar="DIR", help="work in this folder and leave it")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(args.keep or name)
        templates = Templates.make(folder / "templates")
        faults = [f for f in all_faults(templates) if not args.kinds or any(w in f.kind for w in args.kinds)]
        if args.limit:
            faults = faults[:: -(-len(faults) // args.limit)]
        if any(fault.what != "run" for fault in faults):
            templates.make_larger()
        outcomes = inject_all(faults, templates, folder, args.jobs, args.seed)
    print(table(outcomes))
    bad = [outcome for outcome in outcomes if outcome.state in STATES[2:] or outcome.lost > MOST_LOST]
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
