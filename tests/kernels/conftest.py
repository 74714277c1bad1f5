"""Every test that asks for ``device`` runs on the CPU in plain torch, through Triton's interpreter, and on a GPU."""

import pytest
import torch
from megamm_kernels import dispatch


@pytest.fixture(params=["torch", "interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch) -> torch.device:
    """Where the tensors of a test lie; the implementation follows."""
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        return torch.device("cuda")
    if request.param == "interpreter":
        if torch.cuda.is_available() or not dispatch.HAS_TRITON:
            pytest.skip("Triton's interpreter is for machines without a GPU")
        monkeypatch.setattr(dispatch, "interpret", True)
    return torch.device("cpu")
