"""Reading fits back: what a reader may rely on, and one line that names the file, the group, the field and the fix."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from megamm_laws.fitting.fits_file import digest, read_fits_file, read_laws
from megamm_laws.fitting.outputs import fit_table, write_fits
from megamm_laws.law import power_law
from megamm_laws.runs.table import RunTable, check_rows

from megamm.errors import InputError
from megamm.planning.inputs import read_fits

LAW = {"E": 1.9, "A": 420.0, "alpha": 0.33, "B": 1500.0, "beta": 0.36}
ENTRY = {
    "group": "early",
    "form": "chinchilla",
    "objective_name": "huber_log",
    "n_runs": 20,
    "parameters": LAW,
    "objective": 1e-4,
    "kappa": 1.0,
    "ranges": {"params": [1e8, 1e9], "tokens": [1e9, 1e11], "flops": [6e17, 6e20]},
}
DRAWS = np.tile(list(LAW.values()), (20, 1))


def write(folder: Path, *entries: dict, more: dict | None = None, **draws: np.ndarray) -> Path:
    content = io.BytesIO()
    np.savez(content, **({"early": DRAWS} | draws))
    (folder / "bootstrap.npz").write_bytes(content.getvalue())
    (folder / "fits.json").write_text(json.dumps({"fits": list(entries)} | (more or {})))
    return folder


def changed(name: str, value) -> dict:
    """The entry with one field, by its dotted name, set or, for ``...``, left out."""
    entry = json.loads(json.dumps(ENTRY))
    *sections, key = name.split(".")
    place = entry
    for section in sections:
        place = place[section]
    place[key] = value
    return {k: v for k, v in entry.items() if v is not ...}


def test_an_entry_made_by_hand_is_read(tmp_path):
    """Optional fields and the digest may be missing; parameters are taken by name, not by their order."""
    entry = ENTRY | {"parameters": dict(reversed(LAW.items()))}
    (fit,) = read_fits_file(write(tmp_path, entry))
    assert fit.law.parameters.tolist() == list(LAW.values()) and fit.law.warnings == []
    assert list(read_laws(tmp_path)) == ["early"] and list(read_laws(tmp_path / "fits.json")) == ["early"]
    assert read_fits(tmp_path)[0][0].law.name == "early" and read_laws(tmp_path, "loss_text") == {}


def refused(folder: Path, *parts: str) -> None:
    """plan_training, compare_groups, plot_fits and the report all read by these two."""
    for read in (read_fits, read_laws):
        with pytest.raises(InputError) as caught:
            read(folder)
        text = str(caught.value)
        assert "\n" not in text and all(part in text for part in (str(folder), *parts)), text


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("n_runs", ..., "a whole number above zero, found nothing"),
        ("n_runs", 0, "a whole number above zero, found 0"),
        ("n_runs", "x", 'a whole number above zero, found "x"'),
        ("objective", ..., "a number of zero or more, found nothing"),
        ("objective", None, "a number of zero or more"),
        ("objective", float("nan"), "a number of zero or more, found NaN"),
        ("objective", -1, "a number of zero or more, found -1"),
        ("form", ..., "the name of a form"),
        ("objective_name", ..., "the name of an objective"),
        ("loss_column", 5, "the name of a column, found 5"),
        ("kappa", ..., "a number above zero, found nothing"),
        ("kappa", 0, "a number above zero, found 0"),
        ("kappa", -1, "a number above zero"),
        ("kappa", 10**400, "a number above zero"),
        ("parameters", [1, 2], "a mapping of names to numbers, found [1, 2]"),
        ("parameters.A", None, "a number above zero, found nothing"),
        ("parameters.alpha", 0, "a number above zero, found 0"),
        ("parameters.E", -5, "a number of zero or more, found -5"),
        ("warnings", None, "a list of texts"),
        ("warnings", "abc", 'a list of texts, found "abc"'),
        ("warnings", [1], "a list of texts"),
        ("ranges", ..., "a mapping"),
        ("ranges.flops", [1e22], "two numbers above zero, the lower first"),
        ("ranges.flops", [1e22, 1e18], "two numbers above zero, the lower first"),
        ("ranges.params", None, "two numbers above zero, the lower first"),
        ("ranges.params", [0, 0], "two numbers above zero, the lower first"),
        ("law", [], "a mapping with the parameters of a law"),
        ("intervals", None, "a mapping of names to intervals, found nothing"),
        ("noise_intervals", [1], "a mapping of names to intervals, found [1]"),
        ("holdout", {"relative_errors": [0.1], "runs": []}, "runs with as many relative_errors"),
    ],
)
def test_a_field_that_is_wrong_is_named(tmp_path, name, value, expected):
    refused(
        write(tmp_path, changed(name, value)), "fits.json: group early: ", f"{name}: expected {expected}", "run tools"
    )


def test_an_entry_that_is_wrong_as_a_whole(tmp_path):
    refused(write(tmp_path, changed("parameters.E", 1e308)), "group early: parameters: expected a loss", "1e+308")
    refused(write(tmp_path, ENTRY, ENTRY), "group early: loss is fitted twice")
    refused(write(tmp_path, ENTRY, 5), "fit 2: expected a mapping, found 5")
    refused(write(tmp_path, changed("group", 5)), "fit 1: group: expected a name, found 5")
    refused(write(tmp_path, more={"fits": "abc"}), 'fits: expected a list of fits, found "abc"')


@pytest.mark.parametrize(
    ("draws", "expected"),
    [
        (np.zeros(5), "numbers of shape (R, 5), found float64 (5,)"),
        (np.zeros((0, 5)), "at least 2 draws"),
        (DRAWS[:1], "at least 2 draws, found 1"),
        (np.full((20, 5), np.nan), "finite numbers"),
        (np.zeros((20, 5)), "finite numbers, A, alpha, B and beta above zero"),
        (-DRAWS, "finite numbers, A, alpha, B and beta above zero"),
        (np.array([["a"] * 5] * 9), "numbers of shape (R, 5)"),
    ],
)
def test_draws_that_are_wrong(tmp_path, draws, expected):
    refused(write(tmp_path, ENTRY, early=draws), "bootstrap.npz: array 'early': expected ", expected)


def test_draws_that_are_not_there(tmp_path):
    refused(write(tmp_path, changed("group", "late")), "array 'late': not found, bootstrap.npz has early")
    (tmp_path / "bootstrap.npz").unlink()
    refused(tmp_path, "bootstrap.npz: not found; it holds the draws")
    (tmp_path / "bootstrap.npz").write_text("hello")
    refused(tmp_path, "bootstrap.npz: no readable fits (not an npz archive)")


def test_files_of_two_fits_are_not_mixed(tmp_path):
    n, d = (x.ravel() for x in np.meshgrid(np.geomspace(1e8, 1e9, 4), np.geomspace(1e9, 1e11, 4)))
    for seed in (0, 1):
        noise = np.exp(0.003 * np.random.default_rng(seed).standard_normal(16))
        losses = power_law.predict(list(LAW.values()), n, d) * noise
        rows = [{"params": p, "tokens": t, "loss": y} for p, t, y in zip(n, d, losses)]
        table = check_rows(RunTable(path="made.csv", rows=rows, lines=list(range(2, 18))))
        write_fits(tmp_path / str(seed), fit_table(table, resamples=10))
        kept = json.loads((tmp_path / str(seed) / "fits.json").read_text())["bootstrap_sha256"]
        assert kept == digest((tmp_path / str(seed) / "bootstrap.npz").read_bytes())
        assert list(read_laws(tmp_path / str(seed))) == ["all"]
    (tmp_path / "0" / "bootstrap.npz").write_bytes((tmp_path / "1" / "bootstrap.npz").read_bytes())
    refused(tmp_path / "0", "holds the draws of other fits than")
