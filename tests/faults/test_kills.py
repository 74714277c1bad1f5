"""A rank killed twice and a run stopped once; ``make kills`` does it 20 times, on four ranks."""

import random
import shutil

import pytest
from injection import MOST_LOST, numbers
from kills import disturb, draw_moments, make_data

STEPS, RANKS = 24, 2


@pytest.mark.slow
def test_killed_and_stopped_runs_end_as_an_unbroken_one(tmp_path):
    make_data(tmp_path / "unbroken")
    unbroken = disturb(tmp_path / "unbroken", [], "kill", {}, RANKS, STEPS)
    expected = numbers(tmp_path / "unbroken")
    assert (unbroken.restarts, unbroken.lost, unbroken.equal) == (0, 0, False)
    assert len(expected["records"]) == STEPS
    for kind, count, most in (("kill", 2, MOST_LOST), ("stop", 1, 0)):
        shutil.copytree(tmp_path / "unbroken" / "data", tmp_path / kind / "data")
        moments = draw_moments(random.Random(3), count, STEPS, RANKS)
        found = disturb(tmp_path / kind, moments, kind, expected, RANKS, STEPS)
        assert found.struck == found.restarts == count and found.equal and found.lost <= most, (kind, found)
