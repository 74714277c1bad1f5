"""`make install` chooses the build of torch: run with a pip and an nvidia-smi that only write down their arguments."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PIP = """#!/bin/sh
echo "$@" >> "$ASKED"
case "$*" in *+cpu*) exit $NO_CPU_BUILD ;; esac
"""
CPU, PLAIN = "torch==2.13.0+cpu", "torch==2.13.0"

pytestmark = pytest.mark.skipif(not shutil.which("make"), reason="needs make")


def script(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)


def asked(tmp_path: Path, *words: str, smi: str, no_cpu_build: int = 0) -> list[str]:
    """Arguments of pip for torch, call by call."""
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    script(tmp_path / ".venv/bin/python", PIP)
    script(tmp_path / "bin/nvidia-smi", f"#!/bin/sh\n{smi}\n")
    env = {k: v for k, v in os.environ.items() if k not in ("TORCH", "TORCH_INDEX", "PYTHON", "MAKEFLAGS", "MAKELEVEL")}
    env |= {
        "PATH": f"{tmp_path / 'bin'}:{env['PATH']}",
        "ASKED": str(tmp_path / "asked"),
        "NO_CPU_BUILD": str(no_cpu_build),
    }
    subprocess.run(["make", "install", *words], cwd=tmp_path, env=env, check=True, capture_output=True, timeout=60)
    lines = (tmp_path / "asked").read_text(encoding="utf-8").splitlines()
    return [line.removeprefix("-m pip install -q ") for line in lines if "torch==" in line]


NONE, ONE = "echo No devices were found; exit 6", "echo 'GPU 0: NVIDIA H100 (UUID: GPU-1)'"


@pytest.mark.parametrize(
    ("smi", "words", "no_cpu_build", "wanted"),
    [
        ("exit 127", [], 0, [f"numpy {CPU}"]),
        (NONE, [], 0, [f"numpy {CPU}"]),
        (NONE, [], 1, [f"numpy {CPU}", f"numpy {PLAIN}"]),
        (ONE, [], 0, [f"numpy {PLAIN}"]),
        (NONE, ["TORCH=torch==2.11.0"], 0, ["numpy torch==2.11.0"]),
        (NONE, ["TORCH_INDEX=file:///builds"], 0, [f"--extra-index-url file:///builds numpy {CPU}"]),
    ],
)
def test_torch_of_an_installation(tmp_path, smi, words, no_cpu_build, wanted):
    assert asked(tmp_path, *words, smi=smi, no_cpu_build=no_cpu_build) == wanted
