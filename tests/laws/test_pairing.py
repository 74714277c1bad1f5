"""Matched runs of two groups: what they err by in common cancels in the comparison, and nothing else does."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from megamm_laws.comparison.compare import compare, gaps, pairing_of, verdict
from megamm_laws.comparison.outputs import compare_fits, to_json, to_markdown
from megamm_laws.fitting.fit import fit_group
from megamm_laws.fitting.fits_file import read_laws, to_bytes
from megamm_laws.fitting.outputs import fit_table, write_fits
from megamm_laws.fitting.page import to_markdown as fits_page
from megamm_laws.law import power_law
from megamm_laws.runs.matching import matched_runs
from megamm_laws.runs.table import RunTable, check_rows, read_runs, write_runs
from megamm_laws.uncertainty.pairing import LEAST_MATCHED, pair_fits

from megamm.errors import InputError

LAW = np.array([1.7, 300.0, 0.32, 900.0, 0.34])
SIZES, LENGTHS = np.geomspace(1e8, 6e9, 7), np.geomspace(3e9, 5e11, 5)


def ladder(group: str, errors: np.ndarray, sizes: np.ndarray = SIZES, gap: float = 0.0) -> list[dict]:
    """Runs of a 7 x 5 grid, sizes slowest, with ``errors`` (35,) of log loss; the loss is higher by ``gap``."""
    n, d = np.repeat(sizes, len(LENGTHS)), np.tile(LENGTHS, len(sizes))
    losses = (1 + gap) * power_law.predict(LAW, n, d) * np.exp(errors)
    return [
        {"run": f"{group}{i}", "architecture": group, "params": a, "tokens": b, "loss": y}
        for i, (a, b, y) in enumerate(zip(n, d, losses))
    ]


def table_of(rows: list[dict]) -> RunTable:
    return check_rows(RunTable(path="made.csv", rows=rows, lines=list(range(2, len(rows) + 2))))


def errors(seed: int, common: float) -> tuple[np.ndarray, np.ndarray]:
    """Two groups' errors: 0.4% of noise by run and 0.3% by size, of which ``common`` is the share of the variance."""
    rng = np.random.default_rng(seed)
    kinds = [0.004 * rng.standard_normal((3, 35)), np.repeat(0.003 * rng.standard_normal((3, 7)), 5, axis=1)]
    one, other, both = sum(kinds)
    return tuple(np.sqrt(1 - common) * own + np.sqrt(common) * both for own in (one, other))


def width(comparison, share: float = 0.5) -> float:
    """Of the pointwise band, in the middle of the range."""
    return float(np.ptp(comparison.pointwise, axis=0)[int(share * 255)])


def apart(law):
    """The law as one of a file without pairs."""
    return replace(law, pairings={})


@pytest.fixture(scope="module")
def matched():
    one, other = errors(4, common=0.95)
    return fit_table(table_of(ladder("wide", one) + ladder("deep", other, gap=0.01)), resamples=300)


def test_matched_ladders_narrow_the_interval_and_show_a_gap(matched):
    wide, deep = (fit.law for fit in matched)
    pairing = pairing_of(wide, deep)
    assert pairing.matched == 35 and pairing.correlation > 0.7
    together, independent = compare(wide, deep), compare(apart(wide), apart(deep))
    assert width(together) < 0.5 * width(independent)
    np.testing.assert_array_equal(together.difference, independent.difference)
    assert "not separable" in verdict(independent) and "wide is ahead of deep" in verdict(together)
    assert "wide; correlation of their errors 0." in fits_page(matched)


def test_ladders_that_err_apart_keep_their_width():
    ratios, correlations = [], []
    for seed in range(5):
        one, other = errors(seed, common=0.0)
        tables = {"wide": table_of(ladder("wide", one)), "deep": table_of(ladder("deep", other))}
        fits = [fit_group(table, group=name, resamples=200) for name, table in tables.items()]
        pair_fits(fits)
        laws = [fit.law for fit in fits]
        ratios.append(width(compare(*laws)) / width(compare(*map(apart, laws))))
        correlations.append(pairing_of(*laws).correlation)
    assert 0.8 < np.median(ratios) < 1.3 and np.median(correlations) < 0.35


def test_ladders_of_other_sizes_are_drawn_apart():
    one, other = errors(4, common=0.95)
    rows = ladder("wide", one) + ladder("deep", other, SIZES * 1.4)
    laws = [fit.law for fit in fit_table(table_of(rows), resamples=100)]
    assert pairing_of(*laws) is None
    np.testing.assert_array_equal(compare(*laws).pointwise, compare(*map(apart, laws)).pointwise)
    few = ladder("wide", one) + ladder("deep", other, np.where(np.arange(7) == 3, SIZES, SIZES * 1.4))
    assert LEAST_MATCHED > 5 and all(not fit.pairings for fit in fit_table(table_of(few), resamples=20))


def test_the_order_of_groups_and_rows_does_not_matter(matched):
    one, other = errors(4, common=0.95)
    rows = ladder("wide", one) + ladder("deep", other, gap=0.01)
    deep, wide = (fit.law for fit in fit_table(table_of(rows[35:] + rows[:35]), resamples=300))
    before = compare(*(fit.law for fit in matched))
    np.testing.assert_array_equal(compare(wide, deep).pointwise, before.pointwise)
    np.testing.assert_allclose(compare(deep, wide).pointwise, -before.pointwise[::-1], atol=1e-12)
    order = np.random.default_rng(0).permutation(70)
    shuffled = {fit.group: fit.law for fit in fit_table(table_of([rows[i] for i in order]), resamples=300)}
    pairing = pairing_of(shuffled["wide"], shuffled["deep"])
    assert pairing.matched == 35
    assert pairing.correlation == pytest.approx(pairing_of(wide, deep).correlation, abs=0.05)
    assert width(compare(shuffled["wide"], shuffled["deep"])) == pytest.approx(width(before), rel=0.25)


def test_a_group_keeps_its_own_draws(matched):
    """Those of its own intervals, as if the other group were not there."""
    alone = fit_group(matched[0].table, group="wide", resamples=300)
    np.testing.assert_array_equal(alone.draws, matched[0].draws)


def test_losses_without_noise_and_noise_of_two_sizes_are_paired():
    still = table_of(ladder("wide", np.zeros(35)) + ladder("deep", np.zeros(35)))
    laws = [fit.law for fit in fit_table(still, resamples=20)]
    assert np.isfinite(compare(*laws).pointwise).all()
    rng = np.random.default_rng(1)
    rows = ladder("wide", 0.001 * rng.standard_normal(35)) + ladder("deep", 0.01 * rng.standard_normal(35))
    laws = [fit.law for fit in fit_table(table_of(rows), resamples=200)]
    assert 0.6 < width(compare(*laws)) / width(compare(*map(apart, laws))) < 1.5


# ------------------------------------------------------------------------------------------------ matching


def runs(*points: tuple, **columns: list) -> RunTable:
    return table_of(
        [
            {"run": f"r{i}", "params": n, "tokens": d, "loss": 3.0 + 0.01 * i} | {k: v[i] for k, v in columns.items()}
            for i, (n, d) in enumerate(points)
        ]
    )


def test_runs_match_the_closest_of_their_size_and_length():
    first = runs((1e9, 1e10), (1e9, 2e10), (2e9, 1e10), (9e9, 1e10))
    second = runs((2.1e9, 1.02e10), (1.03e9, 1e10), (1.01e9, 1e10), (1e9, 4e10))
    assert sorted(map(tuple, matched_runs(first, second).tolist())) == [(0, 2), (2, 0)]
    assert sorted(map(tuple, matched_runs(second, first).tolist())) == [(0, 2), (2, 0)]
    assert matched_runs(first, runs((5e10, 1e10))).shape == (0, 2)


def test_runs_match_those_of_their_seed_and_mixture():
    points = [(1e9, 1e10)] * 3
    first = runs(*points, seed=["1", "2", "3"], mixture=["a", "a", "b"])
    second = runs(*points, seed=["2", "1", "3"], mixture=["a", "a", "a"])
    assert sorted(map(tuple, matched_runs(first, second).tolist())) == [(0, 1), (1, 0)]
    # A column in which the groups have nothing in common is what sets them apart.
    other = runs(*points, seed=["2", "1", "3"], mixture=["c", "c", "c"])
    assert sorted(map(tuple, matched_runs(first, other).tolist())) == [(0, 1), (1, 0), (2, 2)]


# --------------------------------------------------------------------------------------------------- files


@pytest.fixture(scope="module")
def folder(tmp_path_factory, matched):
    place = tmp_path_factory.mktemp("pairs")
    write_runs(place / "runs.csv", [row for fit in matched for row in fit.table.rows])
    write_fits(place / "fits", matched)
    return place


def test_pairs_are_read_back(folder, matched):
    wide, deep = read_laws(folder / "fits").values()
    pairing, written = pairing_of(wide, deep), matched[0].pairings["deep"]
    assert (pairing.matched, pairing.correlation) == (35, pytest.approx(written.correlation))
    for name in ("wide", "deep"):
        np.testing.assert_array_equal(pairing.draws[name], written.draws[name])
    again, _ = read_laws(folder / "fits").values()
    assert pairing_of(again, deep) is None  # laws of two readings, as of two files, do not belong together


@pytest.mark.parametrize("old", [True, False])
def test_a_folder_without_pairs_compares_as_before(folder, tmp_path, old):
    """One written before there were pairs, and one copied without pairs.npz."""
    document = copied(folder, tmp_path)
    (pair,) = document["pairs"]
    assert pair["groups"] == ["deep", "wide"] and pair["loss_column"] == "loss" and pair["matched"] == 35
    (tmp_path / "pairs.npz").unlink()
    if old:
        kept = {key: value for key, value in document.items() if not key.startswith("pairs")}
        (tmp_path / "fits.json").write_text(json.dumps(kept))
    report = compare_fits(tmp_path, read_runs(folder / "runs.csv"), groups=["wide", "deep"])
    laws = [apart(law) for law in read_laws(folder / "fits").values()]
    np.testing.assert_array_equal(report.accounted[0].comparison.pointwise, compare(*laws).pointwise)
    assert to_json(report)["pairing"] is None and "taken for independent" in to_markdown(report)


def copied(folder: Path, place: Path, **changes) -> dict:
    """A copy of the fits in ``folder``, with changes of the first pair; returns what fits.json holds."""
    for name in ("bootstrap.npz", "pairs.npz"):
        shutil.copy(folder / "fits" / name, place)
    document = json.loads((folder / "fits" / "fits.json").read_text())
    document["pairs"][0] |= changes
    (place / "fits.json").write_text(json.dumps(document))
    return document


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"groups": ["wide"]}, "pair 1: groups: expected two different names"),
        ({"matched": 0}, "pair 1: matched: expected a whole number above zero, found 0"),
        ({"correlation": 2}, "pair 1: correlation: expected a number from -1 to 1, found 2"),
        ({"draws": "lost"}, "array 'lost': expected shape (2, R, 5), not found"),
    ],
)
def test_bad_pairs_are_refused(folder, tmp_path, change, message):
    copied(folder, tmp_path, **change)
    with pytest.raises(InputError) as caught:
        read_laws(tmp_path)
    assert message in str(caught.value) and str(tmp_path) in str(caught.value)


def test_draws_of_other_pairs_are_refused(folder, tmp_path):
    document = copied(folder, tmp_path)
    np.savez(tmp_path / "pairs.npz", pair0=np.ones((2, 20, 5)))
    with pytest.raises(InputError, match=r"pairs\.npz: holds the draws of other fits"):
        read_laws(tmp_path)
    del document["pairs_sha256"]
    (tmp_path / "fits.json").write_text(json.dumps(document))
    assert len(read_laws(tmp_path)["wide"].pairings["deep"].draws["wide"]) == 20
    np.savez(tmp_path / "pairs.npz", pair0=np.ones((20, 5)))
    with pytest.raises(InputError, match=r"array 'pair0': expected shape \(2, R, 5\), found \(20, 5\)"):
        read_laws(tmp_path)


def test_a_pair_of_a_fit_taken_out_is_passed_over(folder, tmp_path):
    document = copied(folder, tmp_path)
    del document["fits"][0]
    (tmp_path / "fits.json").write_text(json.dumps(document))
    (law,) = read_laws(tmp_path).values()
    assert law.pairings == {}


def test_fits_of_one_group_have_no_pairs(matched):
    files = to_bytes([fit_group(matched[0].table, group="wide", resamples=20)])
    assert list(files) == ["bootstrap.npz", "fits.json"]
    assert set(json.loads(files["fits.json"])) == {"fits", "bootstrap_sha256"}


# ------------------------------------------------------------------------------------------------- verdict


def test_the_verdict_says_which_gap_would_have_been_seen():
    one, other = errors(4, common=0.5)
    wide, deep = (fit.law for fit in fit_table(table_of(ladder("wide", one) + ladder("deep", other)), resamples=200))
    comparison = compare(wide, deep)
    at = float(comparison.flops[100])
    ((flops, gap),) = gaps(comparison, [at, 1e30])
    low, high = comparison.simultaneous[:, 100]
    level = 0.5 * (wide.frontier(comparison.flops) + deep.frontier(comparison.flops))[100]
    assert flops == at and gap == pytest.approx(50 * (high - low) / level)
    assert verdict(comparison, [at]).endswith(
        f"; the smallest gap that would have been seen is {gap:.2g}% of the loss at {at:.2g} FLOPs."
    )
    # Asked for nothing, or for what lies beyond the range, it is that at its upper end.
    assert (
        gaps(comparison, [1e30]) == gaps(comparison) == [(comparison.flops[-1], pytest.approx(gaps(comparison)[0][1]))]
    )


def test_the_gap_is_in_the_outputs(folder, tmp_path):
    one, other = errors(4, common=0.5)
    write_runs(tmp_path / "runs.csv", ladder("wide", one) + ladder("deep", other))
    write_fits(tmp_path / "fits", fit_table(read_runs(tmp_path / "runs.csv"), resamples=200))
    report = compare_fits(tmp_path / "fits", read_runs(tmp_path / "runs.csv"), at=[1e20])
    document = to_json(report)
    entry = document["accountings"][0]
    assert entry["smallest_gaps"] == [
        {"flops": 1e20, "percent_of_loss": pytest.approx(entry["smallest_gaps"][0]["percent_of_loss"])}
    ]
    assert f"{entry['smallest_gaps'][0]['percent_of_loss']:.2g}% of the loss at 1e+20" in entry["verdict"]
    assert entry["verdict"] in to_markdown(report) and document["pairing"]["matched"] == 35
    assert "35 pairs of runs match" in to_markdown(report)
