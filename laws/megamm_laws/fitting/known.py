"""The first lines of a fit in `fits.md`: in words, what the runs say and what they cannot tell."""

from typing import Any

from megamm_laws.fitting.fit import Fit
from megamm_laws.fitting.form_fit import FormFit
from megamm_laws.pictures.units import count, power

WIDE_FACTOR = 10.0
"""Ratio of the ends of an interval of N* from which the runs do not tell the size."""
WIDE_EXPONENT = 0.3
"""Width of the interval of a from which they do not tell how size should grow."""


def known(fit: Fit | FormFit, entry: dict[str, Any]) -> list[str]:
    """Sentences on the size to train, the growth of sizes and the forms; each names the kind of its interval."""
    decision = entry.get("decision")
    if decision is None:
        return _within_form(fit, entry)
    several = len(decision["forms"]) > 1
    over = f"over {', '.join(decision['forms'])}" if several else "by noise, under this form"
    lines = [_exponent(entry, decision["exponents"]["a"], over)]
    best = decision["optimum"][-1]
    served = entry["rivals"]["forms"][fit.form]["optimum"][-1] if isinstance(fit, Fit) else {}
    lines.append(_size(best["flops"], served.get("params"), best["params"], over))
    rejected = [name for name, form in entry["rivals"]["forms"].items() if form["rejected"]]
    left = [name for name, form in entry["rivals"]["forms"].items() if not form["rejected"]]
    lines.append(
        f"- **Forms**: the runs do not reject {', '.join(left)}; they reject {', '.join(rejected) or 'none'}. "
        "Where several are left, their intervals by noise are spanned from end to end."
    )
    if fit.form in rejected:
        lines.append("- The law below is itself rejected: what it predicts outside the runs is not to be trusted.")
    return lines


def _within_form(fit: Fit | FormFit, entry: dict[str, Any]) -> list[str]:
    """What is known where no rivals were judged."""
    held_errors = isinstance(fit, Fit) and fit.model_error is not None
    over = f"under this form alone, by {'all errors that the residuals show' if held_errors else 'noise'}"
    lines = []
    if "a" in entry["intervals"]:
        lines.append(_exponent(entry, entry["intervals"]["a"], over))
    for best in entry.get("optimum", [])[-1:]:
        lines.append(_size(best["flops"], best["params"], best["params_interval"], over))
    return lines or ["This form has no optimum size in parameters and tokens alone: read its predictions."]


def _exponent(entry: dict[str, Any], ends: list[float] | None, over: str) -> str:
    value = entry["exponents"]["a"]
    if ends is None:
        return f"- **Growth of size**: cannot tell; a has an open interval ({over})."
    text = f"a of N* ~ C^a is {value:.3f}, 95% {ends[0]:.3f} to {ends[1]:.3f} ({over})"
    if ends[1] - ends[0] > WIDE_EXPONENT:
        return f"- **Growth of size**: cannot tell: {text}; more sizes and lengths are needed."
    return f"- **Growth of size**: {text}."


def _size(flops: float, value: float | None, ends: list[float] | None, over: str) -> str:
    head = f"- **Best size at {power(flops)} FLOPs**"
    if value is None or ends is None:
        return f"{head}: cannot tell; at least one form that is left has no optimum there ({over})."
    factor = ends[1] / ends[0]
    text = f"{count(value)} parameters, 95% {count(ends[0])} to {count(ends[1])}, a factor of {factor:.2g} ({over})"
    return f"{head}: cannot tell: {text}." if factor > WIDE_FACTOR else f"{head}: {text}."
