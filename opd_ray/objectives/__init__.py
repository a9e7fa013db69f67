"""Objectives of on-policy distillation, by name: pure functions from hidden states to a loss per token.

Each minimises a form of KL(student || teacher) on the student's own prefixes, from a different teacher signal:
`sampled` is cheap for the teacher but noisy, `full` exact, `support` in between and the cheapest for the student.
"""

from opd_ray.objectives import full, sampled, support
from opd_ray.objectives.objective import Objective, ObjectiveOptions, TokenLosses
from opd_ray.objectives.signals import HiddenSignal, SampledSignal, SupportSignal, Tokens

OBJECTIVES: dict[str, Objective] = {
    "sampled": Objective(payload="sampled", token_losses=sampled.token_losses),
    "support": Objective(payload="support", token_losses=support.token_losses),
    "full": Objective(payload="hidden", token_losses=full.token_losses),
}

__all__ = [
    "OBJECTIVES",
    "HiddenSignal",
    "Objective",
    "ObjectiveOptions",
    "SampledSignal",
    "SupportSignal",
    "TokenLosses",
    "Tokens",
]
