"""Objectives of on-policy distillation, by name: pure functions from hidden states to a loss per token.

Each minimises a divergence of the student from the teacher on the student's own prefixes, from a different teacher
signal: `sampled` is cheap for the teacher but noisy, `full` exact, `support` in between and the cheapest for the
student.
"""

from opd_ray.objectives import full, sampled, support
from opd_ray.objectives.diagnostics import keep_high_entropy
from opd_ray.objectives.divergences import (
    Divergence,
    forward_kl,
    generalised_jsd,
    mixed_kl,
    reverse_kl,
    skewed_reverse_kl,
)
from opd_ray.objectives.objective import Losses, Objective, ObjectiveOptions, Payload, PolicyOptions, Tail
from opd_ray.objectives.signals import HiddenSignal, SampledSignal, Signal, SupportSignal, Tokens

OBJECTIVES: dict[str, Objective] = {
    "sampled": Objective(payload=lambda o: "hidden" if o.policy.kl_baseline else "sampled", losses=sampled.losses),
    "support": Objective(payload=lambda _: "support", losses=support.losses),
    "full": Objective(payload=lambda _: "hidden", losses=full.losses),
}

__all__ = [
    "OBJECTIVES",
    "Divergence",
    "HiddenSignal",
    "Losses",
    "Objective",
    "ObjectiveOptions",
    "Payload",
    "PolicyOptions",
    "SampledSignal",
    "Signal",
    "SupportSignal",
    "Tail",
    "Tokens",
    "forward_kl",
    "generalised_jsd",
    "keep_high_entropy",
    "mixed_kl",
    "reverse_kl",
    "skewed_reverse_kl",
]
