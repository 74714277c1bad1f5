"""What a study costs on a cluster, by the estimator; no data and no GPU are needed."""

from dataclasses import dataclass

from megamm.errors import InputError
from megamm.estimate.assumptions import Assumptions
from megamm.estimate.hardware import Gpu
from megamm.estimate.search import Found, search
from megamm.estimate.tokens import resolve_for_estimate
from megamm.study.ladders import Study


@dataclass(kw_only=True)
class LadderCost:
    """What the runs of one ladder cost, trained one after the other on all GPUs.

    Attributes:
        found: the fastest layout that fits in memory.
        steps: that its runs train, each counted once.
        gpu_hours: of those steps.
    """

    found: Found
    steps: int
    gpu_hours: float


def resolve_without_data(study: Study) -> tuple[dict[str, float], str]:
    """Complete the configs of all runs in place, from prepared data or from the sizes that they state.

    Returns:
        Run name -> image patches per position; and where that of the first is from, in words.

    Raises:
        InputError: a size that nothing decides.
    """
    shares, origins = {}, []
    for run in study.runs:
        _, stats, origin = resolve_for_estimate(run.config)
        shares[run.name] = stats.patches
        origins.append(origin)
    return shares, origins[0]


def ladder_costs(study: Study, gpu: Gpu, num_gpus: int) -> dict[str, LadderCost]:
    """The cost of each ladder of a study with resolved configs.

    Raises:
        InputError: a model fits on these GPUs in no layout.
    """
    costs, assumptions = {}, Assumptions()
    for name, runs in study.ladders.items():
        # A step costs the same in all runs of a ladder: they have one model, batch and mixture.
        config, stats, _ = resolve_for_estimate(runs[-1].config)
        ranking = search(config, num_gpus * gpu.dies, gpu, stats, assumptions)
        if not ranking.found:
            raise InputError(
                f"{name}: no layout fits in the memory of {num_gpus} {gpu.name}: the smallest of {ranking.tried} needs "
                f"{ranking.least_memory / 2**30:.0f} GiB a rank; name more GPUs"
            )
        steps = sum(run.steps - run.start for run in runs)
        hours = steps * ranking.found[0].estimate.step_time / 3600 * num_gpus
        costs[name] = LadderCost(found=ranking.found[0], steps=steps, gpu_hours=hours)
    return costs
