"""What every test needs before the first module of megamm is imported."""

import os

import pytest
import torch
import torch.distributed as dist

if not torch.cuda.is_available():
    # Triton reads it when a kernel is defined. Tests of any folder may import kernels, so it stands here and not beside
    # the tests of kernels; kernels still run on CPU tensors only where a test asks for it (dispatch.interpret).
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def no_process_group_left():
    """A process group that a test leaves behind would break the tests after it, far from the cause."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
        pytest.fail("this test left a process group")
