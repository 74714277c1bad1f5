"""What the log says of a mixture of experts."""

import torch


def expert_record(counts: torch.Tensor) -> dict[str, float]:
    """Entries of a line of metrics.jsonl; waits for the device.

    For each layer with routed positions: ``experts/LAYER/load/E``, the share of the layer's copies that expert E got;
    ``experts/LAYER/violation``, the largest load / the mean load - 1; ``experts/LAYER/specialisation``, 1 - the binary
    entropy (in bits) of an expert's split into text and image positions, the mean over experts that got any
    (arXiv 2504.07951, appendix): 1 where each expert has one modality, 0 where all have both equally.

    Args:
        counts: int64 [layers, E, 2], text and image positions of each expert, summed over ranks.
    """
    record: dict[str, float] = {}
    for layer, positions in enumerate(counts.cpu().double()):
        load = positions.sum(-1)
        if load.sum() == 0:
            continue
        record |= {f"experts/{layer}/load/{e}": x for e, x in enumerate((load / load.sum()).tolist())}
        record[f"experts/{layer}/violation"] = (load.max() / load.mean() - 1).item()
        # Experts that got nothing have no split; 0 / 0 would spoil the mean.
        split = positions[load > 0] / load[load > 0, None]
        entropy = -torch.special.xlogy(split, split).sum(-1) / torch.log(torch.tensor(2.0))
        record[f"experts/{layer}/specialisation"] = (1 - entropy).mean().item()
    return record
