"""What to distrust in the fit of a declared form."""

from megamm_laws.fitting.diagnostics import bootstrap, coverage, outliers
from megamm_laws.fitting.form_fit import FormFit
from megamm_laws.fitting.stability import drop_warnings
from megamm_laws.law.forms.shares import domains

FEW_PER_PARAMETER = 3
OUTSIDE = 0.02
"""By how much a best share may leave the measured ones without a warning."""


def form_warnings(fit: FormFit) -> list[str]:
    """All warnings about ``fit``, the gravest kinds first."""
    unstable = drop_warnings(fit.extras["drop_k"], fit.noise_intervals)
    measured = [*coverage(fit), *bootstrap(fit)]
    return [*_identification(fit), *unstable, *_mixture(fit), *_holdout(fit), *measured, *outliers(fit)]


def _identification(fit: FormFit) -> list[str]:
    found = fit.form.warnings(fit.problem.data.columns)
    if fit.starts_at_optimum < 0.5 * fit.starts_total:
        found.append(
            f"only {fit.starts_at_optimum} of {fit.starts_total} starts ended at the optimum "
            f"({fit.starts_near} within 1% of it): parameters trade off, so read predictions, not single parameters"
        )
    if len(fit.table) < FEW_PER_PARAMETER * len(fit.names):
        found.append(f"{len(fit.table)} runs for {len(fit.names)} parameters: intervals are too narrow")
    # In theta, where an amplitude has its bounds as a logarithm: a share of the range means the same at both ends.
    theta = fit.problem.to_theta(fit.parameters)
    low, high = fit.problem.bounds
    for i, name in enumerate(fit.names):
        if min(theta[i] - low[i], high[i] - theta[i]) < 1e-3 * (high[i] - low[i]):
            # The lower end of an amplitude is a term that is gone, the upper one is a bound like any other.
            what = "vanishes" if fit.problem.declared[i].amplitude and theta[i] < high[i] - 1 else "is at its bound"
            found.append(f"{name} = {fit.parameters[i]:.3g} {what}: the runs do not need or do not determine it")
    return found


def _mixture(fit: FormFit) -> list[str]:
    best = fit.extras.get("optimal_mixture")
    if not best or not domains(fit.problem.data.columns):
        return []
    found = []
    for name, share in best["shares"].items():
        low, high = best["measured"][name]
        if not low - OUTSIDE <= share <= high + OUTSIDE:
            found.append(
                f"extrapolation: the best share of {name}, {share:.2f}, leaves the measured {low:.2f} to {high:.2f}"
            )
    return found


def _holdout(fit: FormFit) -> list[str]:
    if fit.holdout.get("a_drift_in_half_widths", 0) <= 1:
        return []
    return [
        f"held out: a is {fit.holdout['a_without']:.3f} without the runs of largest FLOPs and "
        f"{fit.holdout['a_with']:.3f} with them, apart by more than the half-width of its interval"
    ]
