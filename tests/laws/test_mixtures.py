"""Mixture laws: the best shares on the simplex, the plain law at a mixture, several losses."""

import numpy as np
import pytest
from form_factory import PLAIN, VALUES, planted, table_of
from megamm_laws.fitting.form_fit import fit_form
from megamm_laws.fitting.form_warnings import form_warnings
from megamm_laws.fitting.outputs import fit_table, write_fits
from megamm_laws.law import power_law
from megamm_laws.law.forms import FORMS
from megamm_laws.law.forms.shares import read_shares
from megamm_laws.law.forms.simplex import mixture_entry, optimal_mixture, optimal_mixture_draws, simplex_grid

from megamm.errors import InputError


def test_simplex_grid():
    for parts in (2, 3, 4, 6):
        grid = simplex_grid(parts, 2000)
        np.testing.assert_allclose(grid.sum(axis=1), 1)
        assert len(np.unique(grid.round(9), axis=0)) == len(grid) <= 2000 and (grid >= 0).all()


def test_optimal_mixture_of_the_additive_law_in_closed_form():
    """sum C_i h_i^gamma on the simplex is largest where h_i ~ C_i^(1/(1-gamma))."""
    C, gamma = np.array([1.0, 1.6, 0.7]), 0.5
    names = ["x", "y", "z"]
    values = PLAIN | {f"C_{k}": c for k, c in zip(names, C)} | {f"gamma_{k}": gamma for k in names}
    expected = C ** (1 / (1 - gamma)) / (C ** (1 / (1 - gamma))).sum()
    form = FORMS["mixture-additive"]
    shares, loss = optimal_mixture([(form, values)], names, 1e9, 1e11)
    np.testing.assert_allclose(list(shares.values()), expected, atol=1e-4)
    floor = PLAIN["E"] + 1 / (C @ expected**gamma)
    assert loss == pytest.approx(floor + 300 / 1e9**0.33 + 1500 / 1e11**0.36, rel=1e-8)
    draws = {name: np.full(3, value) for name, value in values.items()}
    assert np.abs(optimal_mixture_draws([(form, draws)], names, 1e9, 1e11) - expected).max() < 0.02


def test_exponential_laws_meet_inside_only_together():
    form, names = FORMS["mixture-exponential"], ["x", "y"]
    one, two = PLAIN | {"t_x": -2.0, "t_y": 0.0}, PLAIN | {"t_x": 0.0, "t_y": -2.0}
    assert optimal_mixture([(form, one)], names, 1e9, 1e11)[0]["x"] == pytest.approx(1, abs=1e-6)
    assert optimal_mixture([(form, one), (form, two)], names, 1e9, 1e11)[0]["x"] == pytest.approx(0.5, abs=1e-4)


def test_joint_law_has_a_best_mixture_that_moves_with_size():
    form, names = FORMS["mixture-joint"], ["caption", "interleaved", "text"]
    best = [optimal_mixture([(form, VALUES["mixture-joint"])], names, n, 20 * n)[0] for n in (1e7, 1e11)]
    assert abs(best[0]["interleaved"] - best[1]["interleaved"]) > 0.05
    additive = FORMS["mixture-additive"]
    same = [optimal_mixture([(additive, VALUES["mixture-additive"])], names, n, 20 * n)[0] for n in (1e7, 1e11)]
    np.testing.assert_allclose(*(list(s.values()) for s in same), atol=1e-3)


def test_mixture_entry_names_what_was_measured():
    fit = fit_form(planted("mixture-exponential", noise=0.002), "mixture-exponential", resamples=20)
    entry = mixture_entry([fit])
    assert entry["shares"]["interleaved"] == pytest.approx(1, abs=1e-6)
    assert entry["measured"]["interleaved"] == [0.0, 0.8]
    assert "the best share of interleaved, 1.00, leaves the measured 0.00 to 0.80" in "\n".join(form_warnings(fit))


@pytest.mark.parametrize("name", ["mixture-additive", "mixture-joint", "mixture-exponential"])
def test_law_at_the_mean_mixture(name):
    table = planted(name)
    columns = FORMS[name].read(table)
    law, at = FORMS[name].law(VALUES[name], columns)
    n, d = np.array([1e8, 1e10]), np.array([1e12, 1e10])
    expected = FORMS[name].predict(VALUES[name], n, d, **{key: [value] * 2 for key, value in at.items()})
    np.testing.assert_allclose(power_law.predict(law, n, d), expected, rtol=1e-9)
    assert sum(at.values()) == pytest.approx(1)


def test_mixture_column_of_three_numbers():
    rows = planted("mixture-additive").rows
    texts = ["45-45-10", "40-20-40", "30-30-40", "20-40-40", "80-10-10", "0-80-20", "10-0-90"]
    named = [{"params": r["params"], "tokens": r["tokens"], "loss": r["loss"]} for r in rows]
    for i, row in enumerate(named):
        row["mixture"] = texts[i // 16]
    read, given = (FORMS["mixture-additive"].read(table_of(r)) for r in (named, rows))
    assert list(read) == list(given)
    for key in read:
        np.testing.assert_allclose(read[key], given[key], atol=1e-12)


@pytest.mark.parametrize(
    ("text", "valid"), [("33-33-33", True), (".45-.45-.1", True), ("50-50-50", False), ("1-1-2", False)]
)
def test_shares_of_a_mixture_column_sum_to_one(text, valid):
    table = table_of([{"params": 1e6, "tokens": 1e7, "loss": 3.0, "mixture": text}])
    if valid:
        assert sum(read_shares(table).values()) == pytest.approx(1)
    else:
        with pytest.raises(InputError, match=f"line 2.*column mixture: '{text}' is not three shares that sum to 100"):
            read_shares(table)


def test_several_losses_share_one_best_mixture(tmp_path):
    other = VALUES["mixture-exponential"] | {"t_caption": -3.0, "t_interleaved": -1.0}
    table, second = planted("mixture-exponential", 0.002), planted("mixture-exponential", 0.002, 1, other)
    for row, twin in zip(table.rows, second.rows):
        row["loss_text"], row["loss_caption"] = row["loss"], twin["loss"]
    fits = fit_table(table, form="mixture-exponential", losses="loss_text,loss_caption", resamples=20)
    both = fits[0].extras["optimal_mixture_of_losses"]
    assert both["losses"] == ["loss_text", "loss_caption"]
    assert both["shares"]["caption"] == pytest.approx(0.5, abs=0.03)
    write_fits(tmp_path, fits)
    page = (tmp_path / "fits.md").read_text()
    assert "lowest value of the mean of loss_text, loss_caption" in page and "exp(sum_i t_i h_i)" in page
