"""Triton kernels and their launchers, a file per op, each registered with ``torch.library``.

The public functions one folder up call them for CUDA tensors; nothing here is imported where triton is not installed.
"""
