"""Estimate memory, communication, bubble, step time and MFU of a training run without a GPU, or rank its layouts."""

import argparse
from dataclasses import fields
from pathlib import Path

from megamm_laws.arguments import ArgumentParser

from megamm.config import load
from megamm.errors import exit_on_error
from megamm.estimate.assumptions import Assumptions
from megamm.estimate.hardware import GPUS, find_gpu
from megamm.estimate.outputs import SHOWN, ranking_to_json, ranking_to_text, to_json, to_text
from megamm.estimate.search import search
from megamm.estimate.step import estimate, mfu_interval
from megamm.estimate.tokens import resolve_for_estimate
from megamm.files import check_out, write_json

HELP = {
    "matmul": "share of the peak rate that large matrix products reach",
    "attention": "share of the peak rate that attention reaches, of the pairs that the mask admits",
    "memory": "share of the memory bandwidth that element-wise kernels and the optimizer reach",
    "network": "share of the links' bandwidth that collectives reach",
    "overlap": "share of the computation that communication can hide behind",
    "ranks_per_node": "ranks that share a node's fast links",
    "node_bandwidth": "bytes/s per rank, in each direction, between nodes",
    "launch": "seconds that a kernel takes at least",
    "reserve": "bytes per rank for the CUDA context, NCCL and fragmentation",
}


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = ArgumentParser(
        description=__doc__,
        epilog="Settings are overridden as in training: --section.key VALUE. Efficiencies are assumptions.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--config", nargs="+", required=True, metavar="FILE", help="training config; later files override earlier ones")
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--world-size", type=int, metavar="N", help="ranks, one per device that torch sees")
    size.add_argument("--gpus", type=int, metavar="N", help="GPUs as they are bought (a MI250X is two ranks)")
    add("--search", action="store_true", help="rank the layouts of the config, and say what bounds each")
    add("--gpu", required=True, metavar="NAME", help=", ".join(GPUS))
    add("--out", metavar="FILE.json", help="write the estimate there as well")
    add("--image-share", type=float, metavar="S", help="positions with image patches, without prepared data")
    add("--document-length", type=int, metavar="L", help="positions of a document, without prepared data")
    for one in fields(Assumptions):
        name = "--" + one.name.replace("_", "-")
        add(name, type=type(one.default), default=one.default, metavar="X", help=f"{HELP[one.name]} (%(default)s)")
    return parser.parse_known_args()


def main() -> None:
    arguments, overrides = parse_arguments()
    if arguments.out is not None:
        check_out(arguments.out, folder=False)
    gpu = find_gpu(arguments.gpu)
    config = load([Path(path) for path in arguments.config], overrides)
    config, stats, source = resolve_for_estimate(config, arguments.image_share, arguments.document_length)
    a = Assumptions(**{one.name: getattr(arguments, one.name) for one in fields(Assumptions)})
    ranks = arguments.world_size if arguments.gpus is None else arguments.gpus * gpu.dies
    if arguments.search:
        ranking = search(config, ranks, gpu, stats, a)
        best = ranking.found[:SHOWN]
        intervals = [mfu_interval(one.config, one.estimate.layout, gpu, stats, a) for one in best]
        document, text = ranking_to_json(ranking, intervals), ranking_to_text(ranking, intervals, gpu)
    else:
        found = estimate(config, ranks, gpu, stats, a)
        ends = mfu_interval(config, found.layout, gpu, stats, a)
        document, text = to_json(found, ends), to_text(found, ends)
    if arguments.out is not None:
        write_json(arguments.out, document | {"data": source})
    print(text)
    print(f"data           {source}")


def command() -> None:
    """The console script: :func:`main` under the exit-code contract."""
    exit_on_error(main)
