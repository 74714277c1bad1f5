#!/usr/bin/env python
"""Estimate memory per rank, communication, step time and MFU of a training run, without a GPU."""

import argparse
from dataclasses import fields
from pathlib import Path

from megamm.arguments import ArgumentParser
from megamm.config import load
from megamm.errors import exit_on_error
from megamm.files import check_out, write_json
from megamm.scaling.estimate.outputs import to_json, to_text
from megamm.scaling.estimate.step import Assumptions, estimate, estimated_efficiency
from megamm.scaling.estimate.tokens import resolve_for_estimate
from megamm.scaling.plan.hardware import GPUS, find_gpu

HELP = {
    "matmul": "share of the peak rate that large matrix products reach",
    "attention": "share of the peak rate that attention reaches, of the pairs that the mask admits",
    "memory": "share of the memory bandwidth that element-wise kernels and the optimizer reach",
    "network": "share of the links' bandwidth that collectives reach",
    "overlap": "share of the computation that communication can hide behind",
    "ranks_per_node": "ranks that share a node's fast links",
    "node_bandwidth": "bytes/s per rank, in each direction, between nodes",
    "reserve": "bytes per rank for the CUDA context, NCCL and fragmentation",
}


def parse() -> tuple[argparse.Namespace, list[str]]:
    parser = ArgumentParser(
        description=__doc__,
        epilog="Settings are overridden as in training: --section.key VALUE. Efficiencies are assumptions.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--config", nargs="+", required=True, metavar="FILE", help="training config; later files override earlier ones")
    add("--world-size", type=int, required=True, metavar="N", help="ranks, one per device that torch sees")
    add("--gpu", required=True, metavar="NAME", help=", ".join(GPUS))
    add("--out", metavar="FILE.json", help="write the estimate there as well")
    add("--image-share", type=float, metavar="S", help="positions with image patches, without prepared data")
    add("--document-length", type=int, metavar="L", help="positions of a document, without prepared data")
    for one in fields(Assumptions):
        name = "--" + one.name.replace("_", "-")
        add(name, type=type(one.default), default=one.default, metavar="X", help=f"{HELP[one.name]} (%(default)s)")
    return parser.parse_known_args()


def main() -> None:
    arguments, overrides = parse()
    if arguments.out is not None:
        check_out(arguments.out, folder=False)
    gpu = find_gpu(arguments.gpu)
    config = load([Path(path) for path in arguments.config], overrides)
    config, stats, source = resolve_for_estimate(config, arguments.image_share, arguments.document_length)
    assumptions = Assumptions(**{one.name: getattr(arguments, one.name) for one in fields(Assumptions)})
    found = estimate(config, arguments.world_size, gpu, stats, assumptions)
    efficiency = estimated_efficiency(config, arguments.world_size, gpu, stats, assumptions)
    if arguments.out is not None:
        write_json(arguments.out, to_json(found, efficiency) | {"data": source})
    print(to_text(found, efficiency))
    print(f"data           {source}")


if __name__ == "__main__":
    exit_on_error(main)
