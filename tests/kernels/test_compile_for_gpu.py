"""Every row-wise kernel compiles for an H100, on machines without one."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from megamm_kernels import dispatch


@pytest.mark.skipif(not dispatch.HAS_TRITON, reason="needs triton")
def test_kernels_compile_for_h100():
    script = Path(__file__).with_name("compile_for_gpu.py")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    compiled = Counter(line.split()[0] for line in done.stdout.splitlines())
    assert compiled == {
        "rms_norm": 3, "swiglu": 2, "qk_norm_rope": 6, "multimodal_embedding": 4, "embedding_gradient": 2,
        "interval_attention_kernels": 6, "linear_cross_entropy": 4, "grouped_experts": 7,
    }  # fmt: skip
