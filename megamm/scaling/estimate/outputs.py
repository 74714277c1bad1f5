"""An estimate as a table for people and as JSON for programs."""

from dataclasses import asdict
from typing import Any

from megamm.scaling.estimate.step import Estimate
from megamm.scaling.plan.hardware import Efficiency


def to_json(found: Estimate, efficiency: Efficiency) -> dict[str, Any]:
    """Everything that was assumed and found: bytes, seconds, FLOPs."""
    return {
        "gpu": found.gpu,
        "layout": found.layout,
        "params": found.params,
        "tokens_per_step": found.tokens_per_step,
        "rows_per_pass": found.rows_per_pass,
        "passes": found.passes,
        "per_position": asdict(found.stats),
        "memory": {"total": found.memory_total, "limit": found.memory_limit, "parts": found.memory},
        "communication": {
            "bytes_per_rank": sum(item.bytes for item in found.traffic),
            "bytes_between_nodes_per_rank": found.bytes_between_nodes,
            "parts": {item.name: item.bytes for item in found.traffic},
        },
        "bubble": found.bubble,
        "step_time": {"total": found.step_time, "parts": found.times},
        "tokens_per_second": found.tokens_per_step / found.step_time,
        "flops_per_step": {"6nd": found.flops, "exact": found.flops_exact},
        "mfu": {"exact": found.mfu, "6nd": found.mfu_6nd, "6nd_interval": list(efficiency.interval)},
        "assumptions": asdict(found.assumptions),
        "measured": False,
        "warnings": found.warnings,
    }


def to_text(found: Estimate, efficiency: Efficiency) -> str:
    """The same in lines of 120 columns at most."""
    low, high = efficiency.interval
    ranks = found.layout["data"]
    a, stats = found.assumptions, found.stats
    sent = sum(item.bytes for item in found.traffic)
    lines = [
        f"layout         {ranks} rank{'s' * (ranks > 1)} on {found.gpu}, data parallel (FSDP2), "
        f"{found.passes} pass{'es' * (found.passes > 1)} of {found.rows_per_pass} rows per step",
        f"model          {found.params:,} parameters, {found.tokens_per_step:,} positions per step",
        f"per position   {stats.patches:.3f} image patches, {stats.labels:.3f} labels, {stats.pairs:.0f} pairs seen",
        f"memory         {_gb(found.memory_total)} per rank of {_gb(found.memory_limit)}",
        *(f"  {_gb(value):>11}  {name}" for name, value in found.memory.items()),
        f"communication  {_gb(sent)} sent per rank and step, of it {_gb(found.bytes_between_nodes)} between nodes",
        *(f"  {_gb(item.bytes):>11}  {item.name}" for item in found.traffic),
        f"bubble         {found.bubble:.0%}",
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


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.3g} GB" if num_bytes < 1e10 else f"{num_bytes / 1e9:.1f} GB"


def _seconds(time: float) -> str:
    return f"{time * 1e3:.3g} ms" if time < 1 else f"{time:.3g} s"
