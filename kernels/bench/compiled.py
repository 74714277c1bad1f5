"""What a compiler makes of every kernel at its real tiles, for GPUs that need not be there.

    python kernels/bench/compiled.py [OP ...] [--arch sm_80 sm_90 sm_100 gfx942] [--out FILE.csv]

A line per launch, shape and GPU: registers and bytes spilled per thread, shared memory of a program, how many programs
a multiprocessor holds at once, and instructions inside loops: tensor-core products, and copies into shared memory that
run beside the computation. Registers and instructions are those of the machine code (cuobjdump). The interpreter
accepts what a compiler may not; a spill, or a program less per multiprocessor, is a kernel made slower. Needs triton
with its back ends; no GPU; TRITON_INTERPRET unset.
"""

import argparse
import contextlib
import csv
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from megamm_kernels.gpu import (
    embedding_gradient,
    grouped_experts,
    interval_attention,
    launch,
    linear_cross_entropy,
    multimodal_embedding,
    qk_norm_rope,
    rms_norm,
    swiglu,
)
from triton.backends.compiler import GPUTarget

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Gpu(NamedTuple):
    """What a launcher asks a GPU for, and what bounds the programs on one of its multiprocessors.

    Attributes:
        shared: bytes of shared memory that one program may use.
        shared_total: of a multiprocessor; each program takes 1 KiB more than it asks for.
        warps: of a multiprocessor at once.
    """

    target: GPUTarget
    multiprocessors: int
    shared: int
    shared_total: int
    warps: int


GPUS = {
    "sm_80": Gpu(GPUTarget("cuda", 80, 32), 108, 163 << 10, 164 << 10, 64),
    "sm_90": Gpu(GPUTarget("cuda", 90, 32), 132, 227 << 10, 228 << 10, 64),
    "sm_100": Gpu(GPUTarget("cuda", 100, 32), 148, 227 << 10, 228 << 10, 64),
    "gfx942": Gpu(GPUTarget("hip", "gfx942", 64), 304, 64 << 10, 64 << 10, 32),
}
"""A100, H100, B200 (CUDA C++ programming guide, table of technical specifications), MI300X (CDNA3 guide)."""
REGISTERS = 65536
TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.uint8: "u8",
    torch.bool: "i1",
    torch.int32: "i32",
    torch.int64: "i64",
}
OPTIONS = ("num_warps", "num_stages", "num_ctas", "enable_fp_fusion")
PRODUCTS = re.compile(r"\b(HMMA|IMMA|HGMMA|QGMMA|UTC\w*MMA|v_mfma\w*)")
COPIES = re.compile(r"\b(LDGSTS|UBLKCP|UTMALDG)")


@dataclass(kw_only=True)
class Compiled:
    """One kernel on one GPU; None where the tools do not say."""

    triton: str
    op: str
    kernel: str
    shape: str
    arch: str
    warps: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    programs: int
    """On a multiprocessor at once, by registers, shared memory and warps."""
    loop_products: int | None
    loop_copies: int | None


class PretendCuda(torch.Tensor):
    """A CPU tensor that launchers take for a CUDA tensor."""

    is_cuda = property(lambda self: True)


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """A tensor that says it is on a GPU; integers are 0."""
    return torch.zeros(shape, dtype=dtype).as_subclass(PretendCuda)


class Compiler:
    """Compiles instead of launching, specialised as a launch would be."""

    def __init__(self, arch: str):
        self.arch, self.gpu, self.op, self.shape = arch, GPUS[arch], "", ""
        self.found: list[Compiled] = []

    def run(self, kernel, *args, grid, warmup, **meta) -> None:
        options = {name: meta.pop(name) for name in OPTIONS if name in meta}
        signature, constants, attributes = {}, {}, {}
        for i, (name, value) in enumerate(zip(kernel.arg_names, args, strict=False)):
            if isinstance(value, torch.Tensor):
                signature[name], attributes[i,] = "*" + TYPES[value.dtype], [["tt.divisibility", 16]]
            elif isinstance(value, float):
                signature[name] = "fp32"
            elif value is None or value == 1:
                signature[name], constants[i,] = "constexpr", value
            else:
                signature[name] = "i32"
                if value % 16 == 0:
                    attributes[i,] = [["tt.divisibility", 16]]
        for name, value in meta.items():
            signature[name], constants[kernel.arg_names.index(name),] = "constexpr", value
        source = triton.compiler.ASTSource(kernel, signature, constants, attributes)
        made = triton.compile(source, target=self.gpu.target, options=options)
        self.found.append(self._report(kernel, made))

    def _report(self, kernel, made) -> Compiled:
        cuda = self.gpu.target.backend == "cuda"
        registers, spilled, code = _cuda_resources(made.asm["cubin"]) if cuda else _amd_resources(made.asm["amdgcn"])
        warps, shared = made.metadata.num_warps, made.metadata.shared
        lanes = self.gpu.target.warp_size
        limits = [self.gpu.warps // warps, self.gpu.shared_total // (shared + (1024 if cuda else 0) or 1)]
        if cuda:  # handed out to a warp in units of 256
            limits.append(REGISTERS // (warps * -(-registers * lanes // 256) * 256))
        else:  # 512 of each lane of a SIMD, of which a multiprocessor has four
            limits.append(512 // (-(-registers // 8) * 8) * 4 // warps)
        loops = "\n".join(_loops(code)) if cuda else None
        return Compiled(
            triton=triton.__version__,
            op=self.op,
            kernel=kernel.fn.__name__.strip("_"),
            shape=self.shape,
            arch=self.arch,
            warps=warps,
            registers=registers,
            spilled_bytes=spilled,
            shared_bytes=shared,
            programs=min(limits),
            loop_products=None if loops is None else len(PRODUCTS.findall(loops)),
            loop_copies=None if loops is None else len(COPIES.findall(loops)),
        )


def _cuda_resources(cubin: bytes) -> tuple[int, int, str]:
    """Registers of a thread, bytes that it spills, and the machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run([TOOLS / "cuobjdump", flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("--dump-resource-usage", "-sass")
        )
    registers = re.search(r"REG:(\d+)", usage)
    stack, local = (re.search(rf"{name}:(\d+)", usage) for name in ("STACK", "LOCAL"))
    if not (registers and stack and local):
        raise RuntimeError(f"cuobjdump says nothing of registers: {usage[:200]}")
    return int(registers[1]), int(stack[1]) + int(local[1]), code


def _amd_resources(assembly: str) -> tuple[int, int, str]:
    """The same of an AMD kernel's assembly; accumulation registers count as they share the file."""

    def read(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", assembly)
        return int(found[1]) if found else 0

    return max(read("vgpr_count"), 1), 4 * read("vgpr_spill_count") + read("private_segment_fixed_size"), assembly


def _loops(code: str) -> list[str]:
    """Instructions that stand between the target of a backward branch and the branch, each once."""
    lines = [(int(m[1], 16), m[2]) for m in re.finditer(r"/\*([0-9a-f]{4,})\*/\s+([^;/]+);", code)]
    inside: set[int] = set()
    for address, text in lines:
        branch = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text)
        # A branch to itself fills the end of a kernel.
        if branch and int(branch[1], 16) < address:
            inside.update(a for a, _ in lines if int(branch[1], 16) <= a <= address)
    return [text for address, text in lines if address in inside]


def rms_norm_kernels(width: int) -> None:
    x, weight, scale = empty(64, width), empty(width, dtype=torch.float32), empty(64, dtype=torch.float32)
    rms_norm.rms_norm_gpu._init_fn(x, weight, 1e-6)
    rms_norm.add_rms_norm_gpu._init_fn(x, x, weight, 1e-6)
    rms_norm.rms_norm_backward_gpu._init_fn(x, x, x, weight, scale)


def swiglu_kernels(hidden: int) -> None:
    swiglu.swiglu_gpu._init_fn(empty(64, 2 * hidden))
    swiglu.swiglu_backward_gpu._init_fn(empty(64, hidden), empty(64, 2 * hidden))


def qk_norm_rope_kernels(groups: int, queries: int, dim: int) -> None:
    qkv, weight = empty(2, 64, groups, queries + 2, dim), empty(2, dim, dtype=torch.float32)
    table = empty(2, 64, 1, dim // 2, dtype=torch.float32)
    scale = empty(2, 64, groups, queries + 1, dtype=torch.float32)
    grads = [empty(2, 64, heads, dim) for heads in (groups * queries, groups, groups)]
    qk_norm_rope.qk_norm_rope_gpu._init_fn(qkv, weight, table, table, 1e-6)
    qk_norm_rope.qk_norm_rope_backward_gpu._init_fn(*grads, qkv, weight, table, table, scale)


def multimodal_embedding_kernels(width: int, channels: int = 588, num_patches: int = 96) -> None:
    tokens, table = empty(2, 64, dtype=torch.int32), empty(1000, width, dtype=torch.float32)
    patches, projection = empty(num_patches, channels, dtype=torch.uint8), empty(width, channels, dtype=torch.float32)
    index, grad = torch.arange(num_patches), empty(2, 64, width)
    op = multimodal_embedding
    op.multimodal_embedding_gpu._init_fn(tokens, table, empty(num_patches, width), index, torch.bfloat16)
    op.multimodal_patch_embedding_gpu._init_fn(tokens, table, patches, projection, index, torch.bfloat16)
    op.patch_projection_backward_gpu._init_fn(grad, patches, projection, index)
    embedding_gradient.table_gradient(grad.flatten(0, 1), empty(128, dtype=torch.int32), 1000, torch.float32)


def interval_attention_kernels(head_dim: int, heads: int, key_heads: int) -> None:
    q = empty(2, 64, heads, head_dim)
    k, v = empty(2, 64, 2, key_heads, head_dim).unbind(2)
    mask = [empty(2, 64, dtype=torch.int32) for _ in range(4)]
    lse = empty(2, heads, 64, dtype=torch.float32)
    interval_attention.interval_attention_gpu._init_fn(q, k, v, *mask)
    interval_attention.interval_attention_backward_gpu._init_fn(q, None, q, k, v, q, lse, *mask)


def linear_cross_entropy_kernels() -> None:
    labels = empty(64, dtype=torch.int64)
    for needs_grad in (False, True):
        linear_cross_entropy.softmax_gradient(empty(64, 50432), labels, 0.1, needs_grad)
    linear_cross_entropy.softmax_gradient(empty(64, 25216), labels, 0.1, True, lambda lse, picked: (lse, picked))


def grouped_experts_kernels(width: int = 800, hidden: int = 2304, k: int = 2) -> None:
    x, order, weights = empty(64, width), empty(64, dtype=torch.int64), empty(32, k, dtype=torch.float32)
    op = grouped_experts
    op.gather_copies(x, order, k)
    op.sum_copies(x, order.view(32, k), weights)
    op.sum_copies(x, order.view(32, k), None)
    op.sum_copies_backward(empty(32, width), x, weights, order)
    weight, offsets = empty(8, hidden, width), empty(8, dtype=torch.int32)
    op.rows_product(x, weight.transpose(1, 2), offsets)
    op.rows_product(empty(64, hidden), weight, offsets)
    op.weight_gradient(empty(64, hidden), x, offsets)


OPS: dict[str, dict[str, Callable[[], None]]] = {
    "rms_norm": {f"width {w}": (lambda w=w: rms_norm_kernels(w)) for w in (800, 2208, 5120)},
    "swiglu": {f"hidden {h}": (lambda h=h: swiglu_kernels(h)) for h in (2304, 13824)},
    "qk_norm_rope": {
        "10 heads of 80": lambda: qk_norm_rope_kernels(10, 1, 80),
        "16 on 4 heads of 128": lambda: qk_norm_rope_kernels(4, 4, 128),
    },
    "multimodal_embedding": {f"width {w}": (lambda w=w: multimodal_embedding_kernels(w)) for w in (800, 2208)},
    "interval_attention": {
        "10 heads of 80": lambda: interval_attention_kernels(80, 10, 10),
        "8 on 2 heads of 64": lambda: interval_attention_kernels(64, 8, 2),
        "40 heads of 128": lambda: interval_attention_kernels(128, 40, 40),
    },
    "linear_cross_entropy": {"vocabulary 50432": linear_cross_entropy_kernels},
    "grouped_experts": {"width 800": grouped_experts_kernels},
}
"""Op -> shape -> what launches its kernels at it."""


def compile_all(ops: list[str], arch: str, shapes: int | None = None) -> list[Compiled]:
    """Compile the kernels that the launchers of some ops ask for, at the first ``shapes`` of each, for one GPU."""
    compiler, gpu = Compiler(arch), GPUS[arch]
    triton.runtime.jit.JITFunction.run = lambda kernel, *args, **options: compiler.run(kernel, *args, **options)
    torch.cuda.device_of = contextlib.nullcontext
    launch._multiprocessors = lambda device: gpu.multiprocessors
    interval_attention._shared_memory = lambda device: gpu.shared
    for op in ops:
        for shape, launch_kernels in list(OPS[op].items())[:shapes]:
            compiler.op, compiler.shape = op, shape
            launch_kernels()
    return compiler.found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ops", nargs="*", metavar="OP", help=", ".join(OPS))
    parser.add_argument("--arch", nargs="+", choices=GPUS, default=["sm_80", "sm_90", "sm_100"], help="which GPUs")
    parser.add_argument("--shapes", type=int, metavar="N", help="only the first N of each op")
    parser.add_argument("--out", metavar="FILE.csv", help="write the table there as well")
    args = parser.parse_args()
    unknown = [op for op in args.ops if op not in OPS]
    if unknown:
        parser.error(f"{unknown[0]}: no such op; known: {', '.join(OPS)}")
    found = [one for arch in args.arch for one in compile_all(args.ops or list(OPS), arch, args.shapes)]
    names = [field.name for field in fields(Compiled)]
    with contextlib.ExitStack() as stack:
        files = [sys.stdout] + ([stack.enter_context(open(args.out, "w", newline=""))] if args.out else [])
        for file in files:
            writer = csv.DictWriter(file, names, lineterminator="\n")
            writer.writeheader()
            writer.writerows(asdict(one) for one in found)


if __name__ == "__main__":
    main()
