"""Fits of a made table of two groups, for all tests of plans."""

from pathlib import Path

import pytest
from megamm_laws.fitting.outputs import fit_table, write_fits
from megamm_laws.runs.table import RunTable
from plan_factory import EARLY, LATE, make_table

from megamm.planning.inputs import Fitted, read_fits


@pytest.fixture(scope="session")
def table() -> RunTable:
    return make_table({"early": EARLY, "late": LATE})


@pytest.fixture(scope="session")
def folder(tmp_path_factory, table) -> Path:
    out = tmp_path_factory.mktemp("fits")
    write_fits(out, fit_table(table, resamples=200))
    return out


@pytest.fixture(scope="session")
def fits(folder) -> list[Fitted]:
    return read_fits(folder)[0]
