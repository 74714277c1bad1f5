"""What a study shows, in sentences and rows: the verdict first."""

from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
from megamm_laws.comparison.compare import Comparison, Crossover, compare, verdict
from megamm_laws.law.fitted import Law
from megamm_laws.pictures.units import digits, power, prettify

from megamm.report.figures import column_name, image_sources, longest, loss_after_image, title_of
from megamm.report.study import BLIND, StudyResults

MANY = "over 10⁴"
"""So many times that the number says nothing, or endlessly many: a law may never reach the other's loss."""
SUBJECTS = {
    "decoder": "average, image encoder not counted",
    "exact": "average, every matrix product counted",
}
"""What a finding of the average loss is called under another count of FLOPs."""


@dataclass(kw_only=True)
class Finding:
    """The comparison of two architectures by one loss under one count of FLOPs."""

    subject: str
    comparison: Comparison
    counting: str = "counted"
    """How FLOPs are counted, a key of recounted.COUNTED."""

    @property
    def verdict(self) -> str:
        """One sentence, figures as people write them."""
        comparison = self.comparison
        named = replace(comparison, first=title_of(comparison.first), second=title_of(comparison.second))
        text = prettify(verdict(named))
        return text[0].upper() + text[1:]

    @property
    def difference(self) -> tuple[str, str]:
        """Loss of the first minus the second at the largest budget, and its pointwise interval."""
        low, high = self.comparison.pointwise[:, -1]
        return signed(self.comparison.difference[-1]), f"[{signed(low)}, {signed(high)}]"

    @property
    def gain(self) -> tuple[str, str]:
        """FLOPs of the second over those of the first for equal loss there, and its interval."""
        low, high = self.comparison.gain_interval[:, -1]
        return _times(self.comparison.gain[-1]), f"[{_times(low)}, {_times(high)}]"

    @property
    def crossover(self) -> tuple[str, str]:
        """Where the frontiers cross, and its interval."""
        crossing = self.comparison.crossover
        if crossing is None:
            share = self.comparison.crossing_share
            return "none in range", f"{share:.0%} of resamples" if share else ""
        return power(crossing.flops), _interval(crossing)


def signed(value: float) -> str:
    """A difference of losses in nats, with its sign."""
    return f"{value:+.3f}".replace("-", "−")


def _times(value: float) -> str:
    return MANY if not np.isfinite(value) or value > 1e4 else f"{value:.2f}" if value < 10 else digits(float(value))


def _interval(crossing: Crossover) -> str:
    low, high = crossing.interval
    if low and high:
        return f"[{power(low)}, {power(high)}]"
    return f"from {power(low)} on" if low else f"up to {power(high)}" if high else "could lie anywhere"


def findings(study: StudyResults) -> list[Finding]:
    """Comparisons of the study's pair: the average loss under three counts of FLOPs, then each source."""
    if study.pair is None:
        return []
    found = []
    for column in study.loss_columns:
        found += _finding(study, column_name(column), study.laws[column])
        if column == "loss":
            for counting in ("decoder", "exact"):
                found += _finding(study, SUBJECTS[counting], study.recounted("loss", counting), counting)
    return found


def _finding(study: StudyResults, subject: str, laws: dict[str, Law], counting: str = "counted") -> list[Finding]:
    first, second = study.pair
    if first not in laws or second not in laws:
        return []
    comparison = compare(laws[first], laws[second])
    return [Finding(subject=subject, comparison=comparison, counting=counting)]


def headline(study: StudyResults, found: list[Finding]) -> list[str]:
    """The verdict in one to three sentences."""
    if not found:
        groups = ", ".join(title_of(g) for g in study.groups)
        first = f"No verdict: a comparison needs the fits of two architectures, and this study has {groups}."
        return [first, *_alone(study)]
    main = found[0]
    comparison = main.comparison
    first, second = title_of(comparison.first), title_of(comparison.second)
    top = power(comparison.flops[-1])
    sentences = [main.verdict]
    ratio, (low, high) = comparison.gain[-1], comparison.gain_interval[:, -1]
    # Said of the one that needs more, whichever that is; the ends of the interval change places with it.
    if ratio >= 1:
        needs, other = second, first
    else:
        needs, other, ratio, low, high = first, second, 1 / ratio, 1 / high, 1 / max(low, 1e-9)
    interval = f"(95% interval {_times(low)} to {_times(high)})"
    if _times(ratio) != MANY:
        sentences.append(
            f"At {top} FLOPs, the largest budget that both were measured at, {needs} needs {_times(ratio)} times the "
            f"compute of {other} for the same average loss {interval}."
        )
    elif low > 1:
        sentences.append(f"At {top} FLOPs, {needs} needs at least {_times(low)} times the compute of {other}.")
    else:
        sentences.append(f"How much more compute {needs} needs at {top} FLOPs, these runs cannot tell.")
    if comparison.crossover:
        sentences.append(f"The fitted frontiers cross at {main.crossover[0]} FLOPs: {main.crossover[1]}.")
    uncounted = next((f for f in found if f.counting == "decoder"), None)
    if uncounted is not None:
        ratio, _ = uncounted.gain
        low, high = uncounted.comparison.gain_interval[:, -1]
        sentences.append(
            f"If the image encoder's FLOPs are not counted, {second} needs {ratio} times the compute of {first} for "
            f"the same loss at {power(uncounted.comparison.flops[-1])} FLOPs (95% interval {_times(low)} to "
            f"{_times(high)})."
        )
    return sentences


def _alone(study: StudyResults) -> list[str]:
    """What a study of one architecture says: its best model, and whether size or data would lower the loss more."""
    group = study.groups[0]
    law = study.laws.get("loss", {}).get(group)
    runs = [run for run in study.cooled if study.group_column != "architecture" or run.architecture == group]
    if len(study.groups) != 1 or law is None or not runs:
        return []
    best = min(runs, key=lambda run: run.result["loss"])
    tokens = float(best.result["tokens"])
    _, a, alpha, b, beta = law.parameters
    size, data = (x * n**-power * (1 - 2**-power) for x, n, power in ((a, best.params, alpha), (b, tokens, beta)))
    return [
        f"The best of {len(runs)} models has width {best.width} and {best.params:,.0f} parameters; trained on "
        f"{tokens:,.0f} tokens it reaches a loss of {best.result['loss']:.3f} on data it has not seen.",
        f"By the fitted law twice the parameters would lower it by {size:.3f}, and twice the tokens by {data:.3f}.",
    ]


def cautions(study: StudyResults) -> list[tuple[str, str]]:
    """Warnings of the fits, each with the fits that it holds for; those of the average loss first."""
    holders: dict[str, dict[str, list[str]]] = {}
    for fit in sorted(study.fits, key=lambda f: f.get("loss_column", "loss") != "loss"):
        for text in fit.get("warnings", []):
            groups = holders.setdefault(prettify(text), {})
            groups.setdefault(fit["group"], []).append(column_name(fit.get("loss_column", "loss")))
    return [(text, _join(groups, study)) for text, groups in holders.items()]


def _join(groups: dict[str, list[str]], study: StudyResults) -> str:
    """Name fits shortly: ``early fusion: caption, text; late fusion: all losses``."""
    totals = Counter(fit["group"] for fit in study.fits)
    if {g: len(columns) for g, columns in groups.items()} == totals:
        return "all fits"
    parts = []
    for group, columns in groups.items():
        every = len(columns) == totals[group] > 1
        parts.append(f"{title_of(group)}: {'all losses' if every else ', '.join(columns)}")
    return "; ".join(parts)


def image_rows(study: StudyResults) -> list[dict]:
    """For each source with images and each seeing architecture at its largest size: the three losses."""
    rows = []
    groups = sorted({run.architecture for run in study.cooled} - {BLIND})
    blind = longest(study, BLIND)
    for source in image_sources(study):
        for group in groups:
            runs = [r for r in longest(study, group) if source in (r.result.get("losses_swapped") or {})]
            if not runs:
                continue
            run = runs[-1]
            match = [r for r in blind if source in r.result["losses"]]
            near = min(match, key=lambda r: abs(np.log(r.params / run.params))) if match else None
            rows.append(
                {
                    "source": source,
                    "group": group,
                    "run": run,
                    "true": loss_after_image(run.result["losses"][source]),
                    "swapped": loss_after_image(run.result["losses_swapped"][source]),
                    "blind": loss_after_image(near.result["losses"][source]) if near else None,
                }
            )
    return rows
