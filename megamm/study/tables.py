"""A study as text: what it will cost, and what came out."""

from megamm.model.counts import count_parameters
from megamm.study.cost import LadderCost
from megamm.study.ladders import Study
from megamm.study.runner import Status


def grid_table(study: Study, patch_shares: dict[str, float]) -> str:
    """A line per run with its size and cost, then the totals (runs with resolved configs)."""
    rows, total, swept = [], 0.0, []
    for run in study.runs:
        flops = run.flops(patch_shares[run.name], own=True)
        total += flops
        if run.config.train.sweep is not None:
            swept.append(flops)
        steps = f"{run.steps:,}" if run.trunk or not run.start else f"{run.start:,} to {run.steps:,}"
        params = count_parameters(run.config.model).total
        rows.append(
            [run.name, run.architecture, str(run.width), f"{params:,}", f"{run.tokens:,}", steps, f"{flops:.3g}"]
        )
    head = ["run", "architecture", "width", "params", "tokens", "steps", "FLOPs"]
    lines = [format_table(head, rows), "", f"{len(rows)} runs, {total:.4g} FLOPs (6ND of the steps that each trains)"]
    if swept:
        lines.append(f"{len(swept)} of them are of the sweep, {sum(swept):.4g} FLOPs, {sum(swept) / total:.1%} of all")
    saving = study.saving(patch_shares)
    return "\n".join([*lines, saving_line(saving)] if saving else lines)


def cost_table(costs: dict[str, LadderCost], price: float | None) -> str:
    """A line per ladder with its time on the cluster and, at a price per GPU-hour, its money; then the totals."""
    rows, hours = [], sum(cost.gpu_hours for cost in costs.values())
    for name, cost in costs.items():
        one = cost.found.estimate
        axes = " x ".join(f"{axis} {size}" for axis, size in one.layout.sizes().items() if size > 1) or "one GPU"
        row = [name, axes, f"{one.step_time:.3g}", f"{one.mfu:.0%}", f"{cost.steps:,}", f"{cost.gpu_hours:,.0f}"]
        rows.append(row + ([] if price is None else [f"{cost.gpu_hours * price:,.0f}"]))
    head = ["ladder", "layout", "s/step", "MFU", "steps", "GPU-hours"] + ([] if price is None else ["money"])
    total = f"{hours:,.0f} GPU-hours" + ("" if price is None else f", {hours * price:,.0f} at {price:g} per GPU-hour")
    return "\n".join([format_table(head, rows), "", f"{total}, by the estimator (docs/estimate.md)"])


def result_table(statuses: list[Status]) -> str:
    """A line per run with its losses (nats); trunks, which are never cooled down, have none to compare."""
    finished = [status for status in statuses if status.result]
    sources = list(dict.fromkeys(source for status in finished for source in status.result["losses"]))
    rows = []
    for status in statuses:
        run, result = status.run, status.result
        row = [run.name, run.architecture, str(run.width), run.mixture]
        if result is None or run.trunk:
            rows.append([*row, "trunk" if result else status.state])
            continue
        losses = [result["losses"].get(source, {}).get("loss") for source in sources]
        row += [f"{result['params']:,}", f"{result['tokens']:,}", f"{result['flops']:.3g}"]
        rows.append([*row, *("" if loss is None else f"{loss:.4f}" for loss in (result["loss"], *losses))])
    head = ["run", "architecture", "width", "mixture", "params", "tokens", "FLOPs", "loss", *sources]
    return format_table(head, rows)


def saving_line(saving: dict[str, float]) -> str:
    """What :meth:`megamm.study.ladders.Study.saving` says, in a sentence."""
    return (
        f"ladders cost {saving['trained_to_longest']:.2f}x their longest runs; "
        f"training each run apart would cost {saving['apart_to_longest']:.2f}x "
        f"({saving['flops_trained']:.3g} against {saving['flops_apart']:.3g} FLOPs)"
    )


def format_table(head: list[str], rows: list[list[str]]) -> str:
    """Aligned columns: the first two to the left, the others to the right. Rows may be short."""
    table = [head, *([*row, *[""] * (len(head) - len(row))] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    aligned = [
        "  ".join(
            cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in table
    ]
    return "\n".join(line.rstrip() for line in aligned)
