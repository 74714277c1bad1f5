"""Planted laws for the tests of declared forms."""

import numpy as np
from megamm_laws.law import power_law
from megamm_laws.law.forms import FORMS
from megamm_laws.runs.table import RunTable, check_rows

MUENNIGHOFF = {
    "E": np.exp(0.6254804),
    "A": np.exp(6.255414),
    "B": np.exp(7.3049974),
    "alpha": 0.3526596,
    "beta": 0.3526596,
    "R_D": 15.387756,
    "R_N": 5.309743,
}
PLAIN = {"E": 1.2, "A": 300.0, "alpha": 0.33, "B": 1500.0, "beta": 0.36}
FLOOR = {"C_caption": 1.0, "gamma_caption": 0.4, "C_interleaved": 1.5, "gamma_interleaved": 0.6} | {
    "C_text": 0.6,
    "gamma_text": 0.3,
}
VALUES = {
    "repeated": MUENNIGHOFF,
    "moe": {**PLAIN, "C": 0.1, "lambda": -0.4, "F": 120.0, "delta": -0.2, "gamma": 0.28},
    "mixture-additive": {**PLAIN, **FLOOR},
    "mixture-exponential": {**PLAIN, "t_caption": -1.0, "t_interleaved": -3.0, "t_text": 0.2},
    "mixture-joint": {
        **{name: PLAIN[name] for name in ("E", "alpha", "beta")},
        **FLOOR,
        "phi": 0.8,
        "psi": 0.7,
        "F_caption": 1500.0,
        "F_interleaved": 900.0,
        "F_text": 2000.0,
        "G_caption": 30000.0,
        "G_interleaved": 20000.0,
        "G_text": 60000.0,
    },
}
SHARES = np.array(
    [
        [0.45, 0.45, 0.1],
        [0.4, 0.2, 0.4],
        [0.3, 0.3, 0.4],
        [0.2, 0.4, 0.4],
        [0.8, 0.1, 0.1],
        [0, 0.8, 0.2],
        [0.1, 0, 0.9],
    ]
)
SIZES, LENGTHS = np.geomspace(1e8, 1e10, 4), np.geomspace(2e9, 1e12, 4)


def conditions(name: str) -> list[dict[str, float]]:
    if name == "repeated":
        return [{"unique_tokens": u} for u in (2e9, 2e10, 1e12)]
    if name == "moe":
        return [{"sparsity": s} for s in (0.0, 0.5, 0.75, 0.9375)]
    return [dict(zip(("share_caption", "share_interleaved", "share_text"), h)) for h in SHARES]


def planted(name: str, noise: float = 0.0, seed: int = 0, values=None) -> RunTable:
    rows = [{"params": n, "tokens": d, **c} for c in conditions(name) for n in SIZES for d in LENGTHS]
    columns = {key: np.array([row[key] for row in rows]) for key in rows[0]}
    loss = FORMS[name].predict(values or VALUES[name], **columns)
    loss = loss * np.exp(noise * np.random.default_rng(seed).standard_normal(len(rows)))
    return table_of([row | {"loss": y} for row, y in zip(rows, loss)])


def table_of(rows: list[dict]) -> RunTable:
    return check_rows(RunTable(path="made.csv", rows=rows, lines=list(range(2, len(rows) + 2))))


def columns_of(table: RunTable) -> dict[str, np.ndarray]:
    return {c: table.numbers(c) for c in table.columns if c not in ("loss", "flops")}


def two_groups(second_alpha: float, seed: int = 0) -> dict[str, RunTable]:
    rng = np.random.default_rng(seed)
    n, d = (x.ravel() for x in np.meshgrid(np.geomspace(1e8, 1e10, 5), np.geomspace(2e9, 1e12, 5)))
    groups = {}
    for name, law in (("early", [1.9, 420, 0.33, 1500, 0.36]), ("late", [1.85, 520, second_alpha, 1400, 0.36])):
        loss = power_law.predict(np.array(law), n, d) * np.exp(0.002 * rng.standard_normal(len(n)))
        rows = [
            {"run": f"{name}{i}", "params": a, "tokens": b, "loss": y} for i, (a, b, y) in enumerate(zip(n, d, loss))
        ]
        groups[name] = table_of(rows)
    return groups
