"""A table of runs that follow known laws, for plans."""

import numpy as np
from megamm_laws.law import power_law
from megamm_laws.runs.table import RunTable, check_rows

EARLY = np.array([1.904, 420.0, 0.301, 1500.0, 0.335])
LATE = np.array([1.891, 420.0, 0.2903, 1500.0, 0.3383])


def make_table(laws_by_name: dict, noise: float = 0.003) -> RunTable:
    rows = []
    for k, (name, law) in enumerate(laws_by_name.items()):
        n, d = (x.ravel() for x in np.meshgrid(np.geomspace(3e8, 4e9, 5), np.geomspace(1e10, 4e11, 5), indexing="ij"))
        losses = power_law.predict(law, n, d) * np.exp(noise * np.random.default_rng(k).standard_normal(len(n)))
        rows += [
            {"run": f"{name}-{i}", "architecture": name, "params": p, "tokens": t, "loss": y}
            for i, (p, t, y) in enumerate(zip(n, d, losses))
        ]
    return check_rows(RunTable(path="made.csv", rows=rows, lines=list(range(2, len(rows) + 2))))


def transfer_runs(a: float, b: float, worth: float) -> RunTable:
    """LLM-initialised runs that EARLY describes with ``worth`` (D/5e10)^a (N/1e9)^b tokens more than they had."""
    n, d = (x.ravel() for x in np.meshgrid([5e8, 1e9, 2e9], np.geomspace(1e10, 3e11, 6), indexing="ij"))
    effective = d + worth * (d / 5e10) ** a * (n / 1e9) ** b
    rows = [
        {"run": f"llm-{i}", "params": p, "tokens": t, "loss": y, "init": "llm"}
        for i, (p, t, y) in enumerate(zip(n, d, power_law.predict(EARLY, n, effective)))
    ]
    return check_rows(RunTable(path="llm.csv", rows=rows, lines=list(range(2, len(rows) + 2))))
