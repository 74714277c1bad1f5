"""An estimate, or a ranking of layouts, as a table for people and as JSON for programs."""

from collections import defaultdict
from dataclasses import asdict
from typing import Any

from megamm.estimate.hardware import Gpu
from megamm.estimate.search import Found, Ranking
from megamm.estimate.step import Estimate

SHOWN = 10


def to_json(found: Estimate, interval: tuple[float, float]) -> dict[str, Any]:
    """Everything that was assumed and found: bytes, seconds, FLOPs; ``interval``: of the MFU by 6ND."""
    return {
        "gpu": found.gpu,
        "layout": asdict(found.layout),
        "params": found.params,
        "tokens_per_step": found.tokens_per_step,
        "per_position": asdict(found.stats),
        "memory": {"total": found.memory_total, "limit": found.memory_limit, "parts": found.memory},
        "communication": {
            "bytes_per_rank": sum(item.bytes for item in found.traffic),
            "bytes_between_nodes_per_rank": found.bytes_between_nodes,
            "by_axis": bytes_by_axis(found),
            "parts": {item.name: {"bytes": item.bytes, "collectives": item.collectives} for item in found.traffic},
        },
        "bubble": found.bubble,
        "step_time": {"total": found.step_time, "parts": found.times},
        "tokens_per_second": found.tokens_per_step / found.step_time,
        "flops_per_step": {"6nd": found.flops, "exact": found.flops_exact},
        "mfu": {"exact": found.mfu, "6nd": found.mfu_6nd, "6nd_interval": list(interval)},
        "assumptions": asdict(found.assumptions),
        "measured": False,
        "warnings": found.warnings,
    }


def bytes_by_axis(found: Estimate) -> dict[str, float]:
    """Bytes that a rank sends in a step over each axis; ``shard`` is dp_shard and context together."""
    sums: dict[str, float] = defaultdict(float)
    for item in found.traffic:
        sums[item.axis] += item.bytes
    return dict(sums)


def to_text(found: Estimate, interval: tuple[float, float]) -> str:
    """The same in lines of 120 columns at most."""
    low, high = interval
    layout, a, stats = found.layout, found.assumptions, found.stats
    sent = sum(item.bytes for item in found.traffic)
    lines = [
        f"layout         {layout.world_size} rank{'s' * (layout.world_size > 1)} on {found.gpu}: {layout}",
        f"               {layout.micro_batches} micro-batch{'es' * (layout.micro_batches > 1)} of {layout.micro_rows} "
        "rows per step and data-parallel rank",
        f"model          {found.params:,} parameters, {found.tokens_per_step:,} positions per step",
        f"per position   {stats.patches:.3f} image patches, {stats.labels:.3f} labels, {stats.pairs:.0f} pairs seen",
        f"memory         {_gb(found.memory_total)} of {_gb(found.memory_limit)} on the fullest rank",
        *(f"  {_gb(value):>11}  {name}" for name, value in found.memory.items()),
        f"communication  {_gb(sent)} sent per rank and step, of it {_gb(found.bytes_between_nodes)} between nodes",
        *(f"  {_gb(item.bytes):>11}  {item.name} ({item.collectives:.0f} times)" for item in found.traffic),
        f"bubble         {found.bubble:.1%} of the passes",
        f"step time      {_seconds(found.step_time)}, {found.tokens_per_step / found.step_time:,.0f} positions/s",
        *(f"  {_seconds(value):>11}  {name}" for name, value in found.times.items()),
        f"MFU            {found.mfu:.1%} by exact operations, {found.mfu_6nd:.1%} by 6ND "
        f"[{low:.1%}, {high:.1%}] over the assumed efficiencies",
        f"assumed        {a.matmul:.0%} of the peak in matrix products, {a.attention:.0%} in attention; {a.memory:.0%} "
        f"of the memory's bandwidth,",
        f"               {a.network:.0%} of the links'; {a.overlap:.0%} of computation hides communication; "
        f"{a.ranks_per_node} ranks a node, {a.node_bandwidth / 1e9:g} GB/s each",
        "               between nodes. None of this was measured on a GPU.",
    ]
    return "\n".join([*lines, *(f"warning        {text}" for text in found.warnings)])


def ranking_to_json(ranking: Ranking, intervals: list[tuple[float, float]]) -> dict[str, Any]:
    """The best layouts in full, best first; ``intervals``: of as many as are to be told."""
    return {
        "tried": ranking.tried,
        "too_large": ranking.too_large,
        "fitting": len(ranking.found),
        "layouts": [
            {"settings": one.settings, "reasons": one.reasons, "estimate": to_json(one.estimate, interval)}
            for one, interval in zip(ranking.found, intervals, strict=False)
        ],
    }


def ranking_to_text(ranking: Ranking, intervals: list[tuple[float, float]], gpu: Gpu) -> str:
    """The best layouts with their reasons and the settings of each."""
    head = f"{ranking.tried} layouts looked at, {ranking.too_large} of them too large for the memory of a {gpu.name}"
    if not ranking.found:
        limit = gpu.memory / gpu.dies
        return (
            f"{head}\nnone fits: the smallest takes {_gb(ranking.least_memory)} of {_gb(limit)} per rank; take more "
            "GPUs, a GPU with more memory, a smaller model or shorter rows"
        )
    lines = [head]
    for i, (one, interval) in enumerate(zip(ranking.found, intervals, strict=False), 1):
        lines += _entry(i, one, interval)
    return "\n".join([*lines, "Estimated by a roofline with assumed efficiencies: nothing was measured on a GPU."])


def _entry(i: int, one: Found, interval: tuple[float, float]) -> list[str]:
    found, (low, high) = one.estimate, interval
    return [
        f"{i:>2}. {_seconds(found.step_time)} a step, {found.tokens_per_step / found.step_time:,.0f} positions/s, "
        f"MFU {found.mfu:.1%} (6ND {found.mfu_6nd:.1%} [{low:.1%}, {high:.1%}]), {_gb(found.memory_total)}",
        f"    {found.layout}; " + "; ".join(one.reasons),
        "    " + " ".join(f"--{name} {value}" for name, value in one.settings.items()),
    ]


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.3g} GB" if num_bytes < 1e10 else f"{num_bytes / 1e9:.1f} GB"


def _seconds(time: float) -> str:
    return f"{time * 1e3:.3g} ms" if time < 1 else f"{time:.3g} s"
