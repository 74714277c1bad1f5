"""Try tile sizes of the interval attention kernels on this GPU, each kernel by itself.

    python kernels/bench/tune/attention_tiles.py --head-dim 64 [--dtype bfloat16]

Prints, per kernel, the candidates by their time summed over a row of mixed documents, one of text and a single causal
document; the best belong into ``TILES`` of megamm_kernels/gpu/interval_attention.py.
"""

import argparse
import itertools
import sys
from pathlib import Path

import torch
import triton
from megamm_kernels import attention_mask
from megamm_kernels.gpu import interval_attention as gpu

sys.path.insert(0, str(Path(__file__).parents[1]))
from interval_attention import make_case

QUERIES_AND_KEYS = {
    "forward": ((64, 128), (32, 64, 128)),
    "query": ((64, 128), (32, 64, 128)),
    "key": ((32, 64), (64, 128)),
}
CASES = ((1024, "45-45-10"), (4096, "45-45-10"), (4096, "text"), (4096, "one document"))


def kernel_launches(inputs) -> dict:
    """Closures that run the forward, and the two kernels of the backward by themselves."""
    q, k, v, grad = (x.detach() for x in inputs[:4])
    mask = attention_mask(inputs.lo, inputs.hi, q.dtype, "interval")
    out, lse = gpu.interval_attention_gpu(q, k, v, *mask)
    delta = torch.empty_like(lse)
    return {
        "forward": lambda: gpu.interval_attention_gpu(q, k, v, *mask),
        "query": lambda: gpu.query_gradient(grad, None, q, k, v, out, lse, delta, mask[0], mask[1]),
        "key": lambda: gpu.key_gradient(grad, q, k, v, lse, delta, mask[2], mask[3]),
    }


def milliseconds(run, kernel: str, tiles: gpu.Tiles) -> float:
    """Median time with these tiles; infinite where they do not fit."""
    table = gpu.TILES[kernel]
    gpu.TILES[kernel] = ({gpu.MAX_HEAD_DIM: tiles},) * 2
    try:
        return triton.testing.do_bench(run, warmup=5, rep=20, return_mode="median")
    except (triton.runtime.errors.OutOfResources, triton.compiler.errors.CompilationError):
        return float("inf")
    finally:
        gpu.TILES[kernel] = table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--kernel", choices=list(gpu.TILES), nargs="+", default=list(gpu.TILES))
    args = parser.parse_args()
    device, dtype = torch.device("cuda"), getattr(torch, args.dtype)
    width = args.width // args.head_dim * args.head_dim
    cases = [make_case(width, args.head_dim, length, mixture).make(device, dtype) for length, mixture in CASES]
    launches = [kernel_launches(inputs) for inputs in cases]
    for kernel in args.kernel:
        candidates = itertools.starmap(gpu.Tiles, itertools.product(*QUERIES_AND_KEYS[kernel], (2, 3), (4, 8)))
        times = {tiles: [milliseconds(case[kernel], kernel, tiles) for case in launches] for tiles in candidates}
        for tiles in sorted(times, key=lambda t: sum(times[t]))[:8]:
            print(f"{kernel:8} {tuple(tiles)!s:20} " + " ".join(f"{ms:8.3f}" for ms in times[tiles]), flush=True)


if __name__ == "__main__":
    main()
