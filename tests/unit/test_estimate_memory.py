"""The estimator's memory against the storages of the real model, on one of 64 to 1,024 imagined ranks, within 10%.

``python benchmarks/memory.py`` compares more layouts, of a wider model.
"""

import pytest
import torch
from memory import EXPERTS, LiveStorages, compare, config_of

CASES = [
    ("early", 1024, {"dp_replicate": 16, "train.batch_rows": 2048}),
    ("early", 64, {"train.micro_rows": 1, "reduce_every_pass": "false"}),
    ("early", 64, {"train.recompute": "full"}),
    ("late", 256, {"tensor": 4}),
    ("early", 256, {"context": 4}),
    ("early", 256, {"context": 4, "context_method": "ring"}),
    ("early", 64, {"pipeline": 2, "train.batch_rows": 256}),
    ("early", 64, {"pipeline": 2, "pipeline_schedule": "interleaved", "train.batch_rows": 256}),
    ("early", 64, EXPERTS),  # fewer experts than ranks
    ("early", 128, EXPERTS | {"expert": 8, "tensor": 2}),  # one expert a rank
]


@pytest.mark.parametrize(("architecture", "num_ranks", "settings"), CASES)
def test_memory_of_every_axis(architecture, num_ranks, settings):
    found = compare(config_of(architecture, settings, width=512, depth=4 if "pipeline" in settings else 2), num_ranks)
    assert found.estimated == pytest.approx(found.measured, rel=0.1), found.layout


def test_storages_are_counted_while_they_live():
    with LiveStorages() as live:
        a = torch.zeros(2**20)
        view = a[1:]
        b = torch.zeros(2**20)
        assert live.now() == live.most == 2 * 2**22
        del a, b
        assert live.now() == 2**22 and view.numel()
        view.untyped_storage().resize_(0)  # as FSDP frees
        assert live.now() == 0 and live.most == 2 * 2**22
