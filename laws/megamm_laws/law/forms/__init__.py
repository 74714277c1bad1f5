"""Forms of law beyond E + A/N^alpha + B/D^beta; a new one is a class with a name, its parameters and its terms."""

from megamm_laws.law.forms.base import Form
from megamm_laws.law.forms.mixtures import AdditiveMixture, ExponentialMixture, JointMixture
from megamm_laws.law.forms.moe import MoeSparsity
from megamm_laws.law.forms.repeated import RepeatedData

FORMS: dict[str, Form] = {
    form.name: form for form in (RepeatedData(), MoeSparsity(), AdditiveMixture(), JointMixture(), ExponentialMixture())
}
