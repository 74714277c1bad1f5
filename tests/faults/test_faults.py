"""A few of the faults of each kind; ``make faults`` injects all."""

from collections import Counter

import pytest
from injection import MOST_LOST, Templates, inject
from kinds import all_faults

PER_KIND = 2


@pytest.fixture(scope="module")
def templates(tmp_path_factory) -> Templates:
    return Templates.make(tmp_path_factory.mktemp("faults"))


@pytest.mark.slow
def test_faults_lose_an_interval_at_most_and_no_number(templates, tmp_path):
    every = [fault for fault in all_faults(templates) if fault.what == "run"]  # the others have tests of their own
    of_kind = Counter(fault.kind for fault in every)
    seen: Counter[str] = Counter()
    for i, fault in enumerate(every):
        number, seen[fault.kind] = seen[fault.kind], seen[fault.kind] + 1
        if number * PER_KIND % of_kind[fault.kind] < PER_KIND:
            outcome = inject(fault, templates, tmp_path / str(i))
            assert outcome.state in ("survived", "hands") and outcome.lost <= MOST_LOST, outcome
    assert len(every) > 200
