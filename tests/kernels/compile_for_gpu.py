"""Compile kernels for an H100 that need not be there: the interpreter accepts what the compiler may not.

Run as a script: ``python compile_for_gpu.py [OP...]`` compiles the kernels that the op's launchers ask for at typical
shapes in bfloat16 and prints their names. Needs triton with its NVIDIA back end, and no GPU; TRITON_INTERPRET unset.
"""

import contextlib
import sys

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

TARGET = GPUTarget("cuda", 90, 32)
TYPES = {
    torch.float64: "fp64", torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16",
    torch.uint8: "u8", torch.bool: "i1", torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip
OPTIONS = ("num_warps", "num_stages", "num_ctas")


class PretendCuda(torch.Tensor):
    """A CPU tensor that launchers take for a CUDA tensor."""

    is_cuda = property(lambda self: True)


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """A tensor that says it is on a GPU; integers are 0."""
    return torch.zeros(shape, dtype=dtype).as_subclass(PretendCuda)


def compile_launch(kernel, *args, grid, warmup, **meta):
    """Compile instead of launching, specialised as a launch would be."""
    options = {name: meta.pop(name) for name in OPTIONS if name in meta}
    signature, constants, attributes = {}, {}, {}
    for i, (name, value) in enumerate(zip(kernel.arg_names, args)):
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
    assert triton.compile(source, target=TARGET, options=options).asm["ptx"]
    print(kernel.fn.__module__.rsplit(".", 1)[1], kernel.fn.__name__, flush=True)


def rms_norm_kernels(width: int = 800) -> None:
    x, weight, scale = empty(64, width), empty(width, dtype=torch.float32), empty(64, dtype=torch.float32)
    rms_norm.rms_norm_gpu._init_fn(x, weight, 1e-6)
    rms_norm.add_rms_norm_gpu._init_fn(x, x, weight, 1e-6)
    rms_norm.rms_norm_backward_gpu._init_fn(x, x, x, weight, scale)


def swiglu_kernels(hidden: int = 2304) -> None:
    swiglu.swiglu_gpu._init_fn(empty(64, 2 * hidden))
    swiglu.swiglu_backward_gpu._init_fn(empty(64, hidden), empty(64, 2 * hidden))


def qk_norm_rope_kernels() -> None:
    for query_heads, key_heads, dim, full in ((10, 10, 80, False), (16, 4, 128, False), (16, 8, 128, True)):
        heads = query_heads + key_heads
        qk = empty(2, 64, heads + key_heads, dim)[:, :, :heads]
        weight = empty(heads if full else 2, dim, dtype=torch.float32)
        table, scale = empty(2, 64, 1, dim // 2, dtype=torch.float32), empty(2, 64, heads, dtype=torch.float32)
        grads = empty(2, 64, query_heads, dim), empty(2, 64, key_heads, dim)
        qk_norm_rope.qk_norm_rope_gpu._init_fn(qk, weight, table, table, 1e-6, query_heads)
        qk_norm_rope.qk_norm_rope_backward_gpu._init_fn(*grads, qk, weight, table, table, scale)


def multimodal_embedding_kernels(width: int = 800, channels: int = 588, num_patches: int = 96) -> None:
    tokens, table = empty(2, 64, dtype=torch.int32), empty(1000, width, dtype=torch.float32)
    patches, projection = empty(num_patches, channels, dtype=torch.uint8), empty(width, channels, dtype=torch.float32)
    index, grad = torch.arange(num_patches), empty(2, 64, width)
    op = multimodal_embedding
    op.multimodal_embedding_gpu._init_fn(tokens, table, empty(num_patches, width), index, torch.bfloat16)
    op.multimodal_patch_embedding_gpu._init_fn(tokens, table, patches, projection, index, torch.bfloat16)
    op.patch_projection_backward_gpu._init_fn(grad, patches, projection, index)
    embedding_gradient.table_gradient(grad.flatten(0, 1), empty(128, dtype=torch.int32), 1000, torch.float32)


def interval_attention_kernels() -> None:
    for head_dim, heads, key_heads in ((80, 10, 10), (64, 8, 2)):
        q = empty(2, 64, heads, head_dim)
        k, v = empty(2, 64, 2, key_heads, head_dim).unbind(2)
        plan = [empty(2, 64, dtype=torch.int32) for _ in range(4)]
        lse = empty(2, heads, 64, dtype=torch.float32)
        interval_attention.interval_attention_gpu._init_fn(q, k, v, *plan)
        interval_attention.interval_attention_backward_gpu._init_fn(q, None, q, k, v, q, lse, *plan)


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


OPS = {
    "rms_norm": rms_norm_kernels,
    "swiglu": swiglu_kernels,
    "qk_norm_rope": qk_norm_rope_kernels,
    "multimodal_embedding": multimodal_embedding_kernels,
    "interval_attention": interval_attention_kernels,
    "linear_cross_entropy": linear_cross_entropy_kernels,
    "grouped_experts": grouped_experts_kernels,
}

if __name__ == "__main__":
    triton.runtime.jit.JITFunction.run = compile_launch
    torch.cuda.device_of = contextlib.nullcontext
    launch._multiprocessors = lambda device: 132
    interval_attention._shared_memory = lambda device: 227 * 1024
    for name in sys.argv[1:] or OPS:
        OPS[name]()
