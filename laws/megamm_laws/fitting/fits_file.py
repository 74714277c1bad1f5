"""`fits.json` and `bootstrap.npz`, written and read back: every tool that takes fits takes them from here.

`fits.json` is the contract. `bootstrap.npz` holds per fit the draws behind its intervals, a float64 array (R, 5) of
E, A, alpha, B, beta, under :func:`key_of`; for a form of megamm_laws.law.forms (R, P) of its own parameters under
`key@form` and of the plain law that it implies under `key@form/law`; no pickled objects.

`pairs.npz` holds draws of two groups whose runs match, (2, R, 5) under the name that `pairs` of `fits.json` gives, with
the number of matched runs and the correlation of their errors. Where a folder has none, groups are drawn apart.

A file made by hand or edited is as welcome as a written one, so that each field that a reader relies on is checked
here, once, and an error names the file, the group, the field and what was expected.
"""

import hashlib
import io
import json
import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from megamm_laws.errors import InputError
from megamm_laws.fitting.fit import Fit
from megamm_laws.fitting.form_fit import FormFit
from megamm_laws.law import power_law
from megamm_laws.law.fitted import Law, Pairing
from megamm_laws.runs.table import RunTable

FIX = "run tools/fit_scaling_laws.py again"
HIGHEST_LOSS = 1e6
"""Above that a law gives no loss of a language model; one below zero it never gives."""


@dataclass(kw_only=True)
class FitEntry:
    """One fit of the file."""

    entry: dict[str, Any]
    """As in fits.json, with ``loss_column``, ``warnings`` and ``holdout`` also where the file leaves them out."""
    law: Law | None
    """The law in N and D: the fit itself, or what another form says it comes down to; None where it says nothing."""

    @property
    def group(self) -> str:
        return self.entry["group"]

    @property
    def loss_column(self) -> str:
        return self.entry["loss_column"]

    @property
    def plain_law(self) -> Law:
        """``law`` of a fit from :func:`read_plain_fits`, which has one."""
        if self.law is None:
            raise ValueError(f"group {self.group}: form {self.entry['form']} has no law in N and D")
        return self.law


def key_of(group: str, loss_column: str = "loss") -> str:
    """Key of a fit's draws in bootstrap.npz: the group, followed by the column if that is not ``loss``."""
    return group if loss_column == "loss" else f"{group}/{loss_column}"


def digest(draws: bytes) -> str:
    """What fits.json keeps of bootstrap.npz as ``bootstrap_sha256``, so that no two fits are mixed."""
    return hashlib.sha256(draws).hexdigest()


def to_bytes(fits: Sequence[Fit | FormFit]) -> dict[str, bytes]:
    """Contents of bootstrap.npz, of pairs.npz where runs of two groups match, and of fits.json, by name."""
    files = {"bootstrap.npz": _archive({key: array for fit in fits for key, array in _draws_of(fit).items()})}
    document = {"fits": [fit.to_json() for fit in fits], "bootstrap_sha256": digest(files["bootstrap.npz"])}
    pairs, arrays = _pairs_of(fits)
    if pairs:
        files["pairs.npz"] = _archive(arrays)
        document |= {"pairs": pairs, "pairs_sha256": digest(files["pairs.npz"])}
    files["fits.json"] = (json.dumps(document, indent=2, allow_nan=False) + "\n").encode()
    return files


def _archive(arrays: dict[str, np.ndarray]) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


def _draws_of(fit: Fit | FormFit) -> dict[str, np.ndarray]:
    """Arrays of `bootstrap.npz`: of a form, all its parameters under `key@form`, its plain law under `key@form/law`."""
    key = key_of(fit.group, fit.loss_column)
    if isinstance(fit, Fit):
        return {key: fit.draws}
    key = f"{key}@{fit.form.name}"
    law = fit.law_of(fit.draws)
    return {key: fit.draws} | ({} if law is None else {f"{key}/law": law[0]})


def _pairs_of(fits: Sequence[Fit | FormFit]) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """The entries of ``pairs``, each pair once, and their draws (2, R, 5) by name."""
    pairs: list[dict[str, Any]] = []
    arrays: dict[str, np.ndarray] = {}
    for fit in fits:
        for pairing in fit.pairings.values() if isinstance(fit, Fit) else ():
            groups = list(pairing.draws)
            if groups[0] != fit.group:  # both groups hold it: once is enough
                continue
            name = f"pair{len(pairs)}"
            arrays[name] = np.stack(list(pairing.draws.values()))
            facts = {"matched": pairing.matched, "correlation": pairing.correlation, "draws": name}
            pairs.append({"groups": groups, "loss_column": fit.loss_column, **facts})
    return pairs, arrays


def read_fits_file(path: Path | str) -> list[FitEntry]:
    """Every fit in ``path``, a fits.json or its folder, with the draws in bootstrap.npz and pairs.npz beside it.

    Raises:
        InputError: a file is missing, unreadable or of other fits, or a field is not what it has to be.
    """
    path = Path(path)
    path = path / "fits.json" if path.is_dir() else path
    if not path.exists():
        raise InputError(f"{path}: not found; {FIX} with --out {path.parent}")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: no readable fits ({_one_line(error)}); {FIX}") from error
    fits = document.get("fits") if isinstance(document, dict) else None
    if not isinstance(fits, list):
        raise InputError(f"{path}: fits: expected a list of fits, found {_short(fits)}; {FIX}")
    draws = _read_draws(path.with_name("bootstrap.npz"), path, document.get("bootstrap_sha256"))
    found: dict[tuple[str, str], FitEntry] = {}
    for number, raw in enumerate(fits, 1):
        entry = _check_entry(raw, path, number)
        key = entry["group"], entry["loss_column"]
        if key in found:
            raise InputError(f"{path}: group {key[0]}: {key[1]} is fitted twice; remove one of the two entries")
        found[key] = FitEntry(entry=entry, law=_law(entry, path, draws))
    drawn_together = path.with_name("pairs.npz")
    # A folder copied without it is as good as one of before there were pairs: its intervals are only wider.
    if "pairs" in document and drawn_together.exists():
        _read_pairs(document["pairs"], path, _read_draws(drawn_together, path, document.get("pairs_sha256")), found)
    return list(found.values())


def _read_pairs(pairs: Any, path: Path, draws: dict[str, np.ndarray], fits: dict[tuple[str, str], FitEntry]) -> None:
    """Give the laws of ``fits``, by group and loss column, the pairings in ``pairs``, a list as to_bytes writes it."""
    if not isinstance(pairs, list):
        raise InputError(f"{path}: pairs: expected a list of matched groups, found {_short(pairs)}; {FIX}")
    for number, entry in enumerate(pairs, 1):
        where = f"{path}: pair {number}"
        if not isinstance(entry, dict):
            raise InputError(f"{where}: expected a mapping, found {_short(entry)}; {FIX}")
        for name, (expected, holds) in PAIR_FIELDS.items():
            if not holds(entry.get(name)):
                raise InputError(f"{where}: {name}: expected {expected}, found {_short(entry.get(name))}; {FIX}")
        pair = [fits.get((group, entry["loss_column"])) for group in entry["groups"]]
        laws = [fit.law for fit in pair if fit is not None and fit.law is not None]
        if len(laws) < 2:  # somebody took a fit out of the file
            continue
        name, place = entry["draws"], path.with_name("pairs.npz")
        values = draws.get(name)
        if values is None or values.ndim != 3 or len(values) != 2:
            what = "not found" if values is None else f"found {values.shape}"
            raise InputError(f"{place}: array {name!r}: expected shape (2, R, 5), {what}; {FIX}")
        checked = [_check_draws({name: part}, name, place) for part in values]
        pairing = Pairing(
            draws=dict(zip(entry["groups"], checked)),
            matched=entry["matched"],
            correlation=float(entry["correlation"]),
        )
        for law, other in zip(laws, reversed(entry["groups"])):
            law.pairings[other] = pairing


def read_plain_fits(path: Path | str, loss_column: str = "loss") -> dict[str, FitEntry]:
    """The fits of one loss column by group; those of forms with further variables are passed over.

    Raises:
        InputError: see read_fits_file.
    """
    fits = (fit for fit in read_fits_file(path) if fit.loss_column == loss_column)
    return {fit.group: fit for fit in fits if fit.law is not None and "law" not in fit.entry}


def read_laws(path: Path | str, loss_column: str = "loss") -> dict[str, Law]:
    """The laws of read_plain_fits."""
    return {group: fit.plain_law for group, fit in read_plain_fits(path, loss_column).items()}


def check_runs(fit: FitEntry, runs: RunTable, path: Path | str) -> None:
    """Check that ``runs``, those of the group that have the loss, are the ones that ``fit`` of ``path`` was fitted to.

    Raises:
        InputError: another number of runs, or another range of parameters, tokens or FLOPs.
    """
    where = f"{runs.path}: the runs of {fit.group} are not those that {path} was fitted to"
    if len(runs) != fit.entry["n_runs"]:
        raise InputError(
            f"{where}: {len(runs)} with {fit.loss_column}, expected {fit.entry['n_runs']}; give the fitted table, or "
            f"{FIX}"
        )
    for column in ("params", "tokens", "flops"):
        values, expected = runs.numbers(column), fit.entry["ranges"][column]
        if not np.allclose([values.min(), values.max()], expected, rtol=1e-6):
            raise InputError(
                f"{where}: column {column}: {values.min():.4g} to {values.max():.4g}, expected {expected[0]:.4g} to "
                f"{expected[1]:.4g}; give the fitted table, or {FIX}"
            )


def _read_draws(path: Path, fits: Path, expected: Any) -> dict[str, np.ndarray]:
    """All arrays of bootstrap.npz; ``expected`` is the digest in fits.json, None in a file that has none."""
    if not path.exists():
        raise InputError(
            f"{path}: not found; it holds the draws behind the intervals of {fits.name} and is written "
            f"beside it: copy both files, or {FIX}"
        )
    try:
        content = path.read_bytes()
        if not content.startswith(b"PK"):
            raise ValueError("not an npz archive")
        with np.load(io.BytesIO(content), allow_pickle=False) as archive:
            draws = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, BadZipFile, zlib.error) as error:
        raise InputError(f"{path}: no readable fits ({_one_line(error)}); {FIX}") from error
    if expected is not None and expected != digest(content):
        raise InputError(f"{path}: holds the draws of other fits than {fits}; copy both files of one fit, or {FIX}")
    return draws


# ----------------------------------------------------------------------------------------------------- fields


def _is_number(value: Any) -> bool:
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # a whole number of hundreds of digits
        return False


def _is_positive(value: Any) -> bool:
    return _is_number(value) and value > 0


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _is_range(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_positive, value)) and value[0] <= value[1]


def _is_holdout(value: Any) -> bool:
    """Null, a reason why there is none, or the errors of the runs held out."""
    if value is None or (isinstance(value, dict) and "relative_errors" not in value):
        return True
    if not isinstance(value, dict):
        return False
    runs, errors = value.get("runs"), value["relative_errors"]
    lists = isinstance(runs, list) and isinstance(errors, list) and len(runs) == len(errors)
    return lists and all(map(_is_number, [*errors, value.get("a_with"), value.get("a_without")]))


def _is_law(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(name, {}), dict) for name in ("parameters", "at"))


FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "loss_column": ("the name of a column", _is_name),
    "form": ("the name of a form", _is_name),
    "objective_name": ("the name of an objective", _is_name),
    "n_runs": ("a whole number above zero", lambda x: _is_positive(x) and isinstance(x, int)),
    "objective": ("a number of zero or more", lambda x: _is_number(x) and x >= 0),
    "kappa": ("a number above zero", _is_positive),
    "parameters": ("a mapping of names to numbers", lambda x: isinstance(x, dict)),
    "ranges": ("a mapping", lambda x: isinstance(x, dict)),
    "intervals": ("a mapping of names to intervals", lambda x: isinstance(x, dict)),
    "noise_intervals": ("a mapping of names to intervals", lambda x: isinstance(x, dict)),
    **{
        f"ranges.{name}": ("two numbers above zero, the lower first", _is_range)
        for name in ("params", "tokens", "flops")
    },
    "law": ("a mapping with the parameters of a law", _is_law),
    "warnings": ("a list of texts", lambda x: isinstance(x, list) and all(isinstance(text, str) for text in x)),
    "holdout": ("runs with as many relative_errors, a_with and a_without, or null", _is_holdout),
}

PAIR_FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "groups": (
        "two different names",
        lambda x: isinstance(x, list) and len(x) == 2 and all(map(_is_name, x)) and x[0] != x[1],
    ),
    "loss_column": FIELDS["loss_column"],
    "draws": ("the name of an array", _is_name),
    "matched": FIELDS["n_runs"],
    "correlation": ("a number from -1 to 1", lambda x: _is_number(x) and -1 <= x <= 1),
}


def _check_entry(raw: Any, path: Path, number: int) -> dict[str, Any]:
    """The entry with its defaults filled in."""
    if not isinstance(raw, dict):
        raise InputError(f"{path}: fit {number}: expected a mapping, found {_short(raw)}; {FIX}")
    if not _is_name(raw.get("group")):
        raise InputError(f"{path}: fit {number}: group: expected a name, found {_short(raw.get('group'))}; {FIX}")
    defaults: dict[str, Any] = {
        "loss_column": "loss",
        "warnings": [],
        "holdout": None,
        "intervals": {},
        "noise_intervals": {},
    }
    entry = defaults | raw
    for name, (expected, holds) in FIELDS.items():
        section, _, key = name.rpartition(".")
        value = (entry[section] if section else entry).get(key)
        if not holds(value) and not (name == "law" and "law" not in entry):
            raise InputError(f"{path}: group {raw['group']}: {name}: expected {expected}, found {_short(value)}; {FIX}")
    return entry


def _law(entry: dict[str, Any], path: Path, draws: dict[str, np.ndarray]) -> Law | None:
    """The law in N and D with its draws, checked; parameters are taken by name."""
    where, plain = f"{path}: group {entry['group']}", "law" not in entry
    section = "parameters" if plain else "law.parameters"
    values = entry["parameters"] if plain else entry["law"].get("parameters", {})
    if plain and entry["form"] not in power_law.FORMS and set(values) != set(power_law.PARAMETERS):
        return None
    for name in power_law.PARAMETERS:
        value = values.get(name)
        if not (_is_number(value) and (value > 0 or (name == "E" and value == 0))):
            expected = "a number of zero or more" if name == "E" else "a number above zero"
            raise InputError(f"{where}: {section}.{name}: expected {expected}, found {_short(value)}; {FIX}")
    parameters, ranges = np.array([values[name] for name in power_law.PARAMETERS], float), entry["ranges"]
    loss = power_law.predict(parameters, np.array([ranges["params"][1]]), np.array([ranges["tokens"][1]]))[0]
    if not 0 < loss < HIGHEST_LOSS:
        raise InputError(
            f"{where}: {section}: expected a loss above 0 and below {HIGHEST_LOSS:.0e} at the largest runs, "
            f"found {loss:.3g}; {FIX}"
        )
    key = key_of(entry["group"], entry["loss_column"])
    return Law(
        name=entry["group"],
        parameters=parameters,
        draws=_check_draws(draws, key if plain else f"{key}@{entry['form']}/law", path.with_name("bootstrap.npz")),
        kappa=float(entry["kappa"]),
        flops_range=(float(ranges["flops"][0]), float(ranges["flops"][1])),
        form=entry["form"],
        warnings=list(entry["warnings"]),
    )


def _check_draws(draws: dict[str, np.ndarray], key: str, path: Path) -> np.ndarray:
    """The array under ``key``, (R, 5) with R of at least 2."""
    if key not in draws:
        raise InputError(f"{path}: array {key!r}: not found, {path.name} has {', '.join(draws) or 'none'}; {FIX}")
    values = draws[key]
    if values.dtype.kind not in "fiu" or values.ndim != 2 or values.shape[1] != len(power_law.PARAMETERS):
        raise InputError(
            f"{path}: array {key!r}: expected numbers of shape (R, 5), found {values.dtype} {values.shape}; {FIX}"
        )
    if len(values) < 2:
        raise InputError(f"{path}: array {key!r}: expected at least 2 draws, found {len(values)}; {FIX}")
    if not (np.isfinite(values).all() and (values[:, 0] >= 0).all() and (values[:, 1:] > 0).all()):
        raise InputError(
            f"{path}: array {key!r}: expected finite numbers, A, alpha, B and beta above zero, E not below; {FIX}"
        )
    return values.astype(float)


def _short(value: Any) -> str:
    """A value as JSON has it, cut short."""
    if value is None:
        return "nothing"
    text = json.dumps(value, default=str)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
