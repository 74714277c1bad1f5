"""The helper of the tests on several ranks."""

import os
import time

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks


def sum_of_ranks(start: int) -> tuple[int, int]:
    value = torch.tensor(start + dist.get_rank())
    dist.all_reduce(value)
    return dist.get_rank(), value.item()


def fail_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise ValueError(f"from {rank}")
    dist.barrier()


def die_on(rank: int) -> None:
    if dist.get_rank() == rank:
        os._exit(3)
    dist.barrier()


def sleep() -> None:
    time.sleep(60)


def test_every_rank_returns_its_result():
    assert run_ranks(sum_of_ranks, 3, 10) == [(0, 33), (1, 33), (2, 33)]


@pytest.mark.parametrize(
    ("function", "arguments", "timeout", "message"),
    [
        (fail_on, (1,), 300, "ValueError: from 1"),
        (die_on, (0,), 300, "the rank died|Connection|closed"),
        (sleep, (), 12, r"ranks \[0, 1\] did not end within 12 s"),
    ],
)
def test_a_rank_that_fails_dies_or_hangs_ends_all(function, arguments, timeout, message):
    with pytest.raises(AssertionError, match=message):
        run_ranks(function, 2, *arguments, timeout=timeout)
