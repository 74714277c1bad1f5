"""Named conventions for counting a run's parameters and FLOPs, and conversions between them.

Two papers that fit the same runs under different counts report different exponents (Porian et al. 2024, arXiv
2406.19146; Pearce and Song 2024, arXiv 2406.12907), so that a table says which count it holds, in the column
``flops_convention``, and one table never holds two.

A row is a dictionary with the columns of `runs.csv`. Conversions use these columns where a row has them:

=====================  =========================================================================================
``params_total``       all parameters, where ``params`` counts fewer
``params_active``      parameters that a token meets (mixture of experts), encoder included
``params_embedding``   of all vocabulary tables: input and head, a tied pair once; learned positions too
``params_head``        of the output head, tied or not
``params_vision``      of the image encoder (late fusion)
``tokens_vision``      image patches that went through the encoder
``flops_exact``        operations counted product by product
=====================  =========================================================================================
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from megamm_laws.errors import InputError

FACTS = (
    "params_total",
    "params_embedding",
    "params_head",
    "params_vision",
    "tokens_vision",
    "flops_exact",
)
"""Columns from which a count can be converted into another, beside those of `runs.csv`."""
COLUMN = "flops_convention"
GIVEN = "given"
"""FLOPs as the source of the table gave them, by a count that it did not name."""
SAME = 1e-3
"""Relative difference below which given FLOPs are taken for those of a named convention."""


class MissingFactError(Exception):
    """A column that a convention needs and a row lacks; the message is its name."""


class Facts:
    """The counts of one run, in the units of the module's table.

    What a row leaves out is zero only where that cannot be wrong: a run without an encoder has no parameters in
    it, a dense model uses all of its parameters.
    """

    def __init__(self, row: dict[str, Any]):
        self.row = row

    def need(self, column: str) -> float:
        """The value of a column.

        Raises:
            MissingFactError: the row has none.
        """
        value = self.row.get(column)
        if value is None:
            raise MissingFactError(column)
        return float(value)

    @property
    def tokens(self) -> float:
        return self.need("tokens")

    @property
    def total(self) -> float:
        return self.need("params_total" if self.row.get("params_total") is not None else "params")

    @property
    def vision(self) -> float:
        if self.row.get("params_vision") is None and "late" not in str(self.row.get("architecture")):
            return 0.0
        return self.need("params_vision")

    @property
    def active(self) -> float:
        if self.row.get("params_active") is None and "moe" not in str(self.row.get("architecture")).lower():
            return self.total
        return self.need("params_active")

    @property
    def encoder_flops(self) -> float:
        """6 N_v D_v, zero without an encoder."""
        vision = self.vision
        # Only with an encoder: a run without one need not say how many patches went through it.
        return 6.0 * vision * self.need("tokens_vision") if vision else 0.0

    def decoder_flops(self, left_out: float = 0.0) -> float:
        """6 (N_active - N_v - left_out) D."""
        return 6.0 * (self.active - self.vision - left_out) * self.tokens


@dataclass(frozen=True, kw_only=True)
class Convention:
    """How ``params`` and ``flops`` of a run are counted."""

    name: str
    explained: str
    flops: Callable[[Facts], float]
    params: Callable[[Facts], float] = lambda facts: facts.total


CONVENTIONS = {
    c.name: c
    for c in (
        Convention(
            name="paper",
            explained="6 N D with all parameters; late fusion 6 (N_v D_v + N D); mixture of experts 6 N_active D "
            "(arXiv 2504.07951)",
            flops=lambda f: f.decoder_flops() + f.encoder_flops,
        ),
        Convention(
            name="6nd",
            explained="6 N D with every parameter at every token (Hoffmann et al. 2022)",
            flops=lambda f: 6.0 * f.total * f.tokens,
        ),
        Convention(
            name="active",
            explained="as paper, and params are the active ones",
            flops=lambda f: f.decoder_flops() + f.encoder_flops,
            params=lambda f: f.active,
        ),
        Convention(
            name="decoder",
            explained="as paper without the image encoder: the front end is not counted",
            flops=lambda f: f.decoder_flops(),
        ),
        Convention(
            name="no-embedding",
            explained="as paper, neither params nor FLOPs with the vocabulary tables (Kaplan et al. 2020)",
            flops=lambda f: f.decoder_flops(f.need("params_embedding")) + f.encoder_flops,
            params=lambda f: f.total - f.need("params_embedding"),
        ),
        Convention(
            name="with-head",
            explained="as no-embedding, but with the output head (Porian et al. 2024)",
            # params_embedding holds the head as well, which is not left out here.
            flops=lambda f: f.decoder_flops(f.need("params_embedding") - f.need("params_head")) + f.encoder_flops,
            params=lambda f: f.total - f.need("params_embedding") + f.need("params_head"),
        ),
        Convention(
            name="exact",
            explained="every matrix product as logged, attention included; params are all",
            flops=lambda f: f.need("flops_exact"),
        ),
    )
}


def convert_row(row: dict[str, Any], name: str) -> dict[str, Any]:
    """The row counted by the convention ``name``.

    Raises:
        MissingFactError: it lacks a column that the convention needs.
    """
    convention, facts = CONVENTIONS[name], Facts(row)
    params, total = convention.params(facts), facts.total
    new = row | {"params": params, "flops": convention.flops(facts), COLUMN: name}
    # Kept beside the new count, or a second conversion could not find its way back.
    new["params_total"] = total if params != total else None
    return new


def convert_rows(rows: list[dict[str, Any]], places: Iterable[str], name: str) -> list[dict[str, Any]]:
    """All rows counted by the convention ``name``; ``places`` say where each comes from.

    Raises:
        InputError: an unknown convention, or a row that lacks a column which it needs.
    """
    if name not in CONVENTIONS:
        raise InputError(f"--flops-convention: {name!r} is unknown; known: {', '.join(CONVENTIONS)}")
    converted = []
    for row, place in zip(rows, places):
        try:
            converted.append(convert_row(row, name))
        except MissingFactError as error:
            raise InputError(
                f"{place}: column {error} is missing, and FLOPs counted as {name!r} need it; add it with --facts"
            ) from error
    return converted


def label(row: dict[str, Any]) -> dict[str, Any]:
    """The row with its convention named; missing FLOPs are counted as in the paper.

    FLOPs that came without a name are called ``paper`` or ``6nd`` if they agree with that count to 0.1%, else
    ``given``.

    Raises:
        MissingFactError: the row has no FLOPs and lacks a column that counting them needs.
        InputError: it names an unknown convention.
    """
    named = row.get(COLUMN)
    if named and named not in (*CONVENTIONS, GIVEN):
        raise InputError(f"column {COLUMN}: {named!r} is unknown; known: {', '.join(CONVENTIONS)}, {GIVEN}")
    if row.get("flops") is None:
        # A count that has no name cannot be counted anew.
        if named == GIVEN:
            raise MissingFactError("flops")
        return convert_row(row, named or "paper")
    if named:
        return row
    # A dense decoder agrees with both. By the first it can stand in one table with run directories, whose count is the
    # paper's.
    for name in ("paper", "6nd"):
        try:
            if abs(convert_row(row, name)["flops"] / row["flops"] - 1) < SAME:
                return row | {COLUMN: name}
        except MissingFactError:
            continue
    return row | {COLUMN: GIVEN}


def check_one_convention(rows: list[dict[str, Any]], places: Iterable[str]) -> None:
    """Raise InputError where two rows are counted by different conventions."""
    first: tuple[str, str] | None = None
    for row, place in zip(rows, places):
        # Rows without a name are a kind of their own: nobody knows whether they agree with the named ones.
        name = row.get(COLUMN) or "none named"
        first = first or (name, place)
        if name != first[0]:
            raise InputError(
                f"{place}: column {COLUMN}: {name}, but {first[1]} has {first[0]}: mixed conventions; count all by "
                "one with tools/collect_runs.py --flops-convention NAME"
            )


def conversion_lines(rows: list[dict[str, Any]]) -> list[str]:
    """How the other conventions would count these rows: a line per architecture and convention.

    Each line holds the median ratio of the FLOPs (and of ``params`` where it is not 1) to those in ``rows`` over
    the runs that have the columns it needs.
    """
    lines = []
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(str(row.get("architecture") or "all"), []).append(row)
    for group, members in groups.items():
        for name in CONVENTIONS:
            ratios = []
            for row in members:
                try:
                    other = convert_row(row, name)
                except MissingFactError:
                    continue
                ratios.append((other["flops"] / row["flops"], other["params"] / row["params"]))
            if not ratios:
                continue
            # A ratio changes with size, since vocabulary tables weigh most in small models: one figure can only be the
            # middle.
            flops, params = np.median(ratios, axis=0)
            if name == members[0].get(COLUMN) or (abs(flops - 1) < SAME and abs(params - 1) < SAME):
                continue
            sizes = f", params x{params:.4g}" if abs(params - 1) >= SAME else ""
            some = "" if len(ratios) == len(members) else f" ({len(ratios)} of {len(members)} runs)"
            lines.append(f"{group}: counted as {name}, FLOPs x{flops:.4g}{sizes}{some}")
    return lines
