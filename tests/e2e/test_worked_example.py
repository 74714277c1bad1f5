"""The worked example of the docs: its commands run, and give what the page quotes."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "worked-example.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_commands_give_what_the_page_says(tmp_path):
    for name in ("tests", "tools"):
        (tmp_path / name).symlink_to(ROOT / name)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    given = ""
    for command in re.findall(r"(?m)^    (.+)$", PAGE):
        environment = os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            ["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, f"{command}\n{done.stderr[-2000:]}"
        given += done.stdout
    given += (tmp_path / "fits" / "fits.md").read_text() + (tmp_path / "plan" / "plan.md").read_text()
    for line in re.findall(r"(?m)^> *(.+)$", PAGE):
        assert line in given, line
    for cell in ("29.8B [6.76B, 140B]", "560B [119B, 2.47T]", "2.0314 [1.8739, 2.1054]", "0.32% [0.27%, 0.46%]"):
        assert cell in PAGE and cell in given, cell
