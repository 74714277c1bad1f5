"""The table of results in kernels/README.md, made from the CSVs of the benchmarks.

    python kernels/bench/table.py [--results DIR] [--readme FILE]

A row per op and shape, forward and backward: our time, the best peer's, and the share that we reach of what the
device allows (large matmul or large copy of the same run). Only figures of a GPU count; an op without any is a row
that says "not measured". Ops are the scripts of this folder; where a file holds several devices, each has its rows.
"""

import argparse
import csv
from pathlib import Path

HERE = Path(__file__).parent
ABSENT = "not measured"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
HEAD = (
    "| op | shape | ours | best peer | ceiling reached | device |",
    "|---|---|---|---|---|---|",
)


def ops() -> list[str]:
    """Names of the ops that have a benchmark."""
    return sorted(path.stem for path in HERE.glob("*.py") if "\nfrom harness import" in path.read_text())


def measured(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV with a time of forward and backward on a GPU; none where there is no such file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [r for r in rows if r["ms"] and r["mode"] == "forward+backward" and not r["device"].endswith("CPU")]


def lines(op: str, rows: list[dict[str, str]]) -> list[str]:
    """Lines of the table for one op."""
    shapes = dict.fromkeys((row["case"], row["device"]) for row in rows)
    made = []
    for case, device in shapes:
        times = [row for row in rows if (row["case"], row["device"]) == (case, device)]
        ours = next((row for row in times if row["provider"] == "megamm"), None)
        peers = [row for row in times if not row["provider"].startswith("megamm")]
        best = min(peers, key=lambda row: float(row["ms"]), default=None)
        cells = (
            op,
            case,
            f"{float(ours['ms']):.3g} ms" if ours else ABSENT,
            f"{float(best['ms']):.3g} ms, {best['provider']}" if best else ABSENT,
            f"{float(ours['share_of_ceiling']):.0%}" if ours else ABSENT,
            device,
        )
        made.append(f"| {' | '.join(cells)} |")
    return made or [f"| {op} | all | {ABSENT} | {ABSENT} | {ABSENT} | |"]


def table(results: Path) -> str:
    """The whole table, from ``<results>/<op>.csv``."""
    return "\n".join([*HEAD, *(line for op in ops() for line in lines(op, measured(results / f"{op}.csv")))])


def replaced(text: str, new: str) -> str:
    """``text`` with ``new`` between the two marks; ValueError where these are missing."""
    if BEGIN not in text or END not in text:
        raise ValueError(f"no {BEGIN} and {END} in the page")
    before, rest = text.split(BEGIN, 1)
    return f"{before}{BEGIN}\n{new}\n{END}{rest.split(END, 1)[1]}"


def main() -> None:
    root = HERE.parents[1]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=root / "benchmarks/results", help="where the CSVs are")
    parser.add_argument("--readme", type=Path, default=root / "kernels/README.md", help="the page to change")
    args = parser.parse_args()
    args.readme.write_text(replaced(args.readme.read_text(), table(args.results)))


if __name__ == "__main__":
    main()
