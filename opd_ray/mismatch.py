"""Watches how far two engines that hold one model are apart, in a run's metrics, against the OPD signal."""

import math

from opd_ray.preflight.engines import SIGNAL_SHARE
from opd_ray.protocol import Metrics

_WORSE = 10  # times the last one that was said: worth saying again
_ADVICE = {
    "rollout/logprob_gap": "the sampler's log-probs are not the learner's: compare rollout.dtype with learner.dtype,"
    " look into rollout.engine_args and at rollout/logprob_gap_max",
    "teacher/engine_gap": "the teacher's engine is not its checkpoint: look into its dtype and engine_args"
    " (quantisation, attention backend)",
}


class MismatchWatch:
    """Says once what is beyond a tenth of the signal, and again when it has become ten times as bad."""

    def __init__(self) -> None:
        self._said: dict[str, float] = {}

    def warnings(self, metrics: Metrics) -> list[str]:
        """Return a line for each mismatch of a step that is too large and was not said before."""
        return [line for name in _ADVICE if f"{name}_relative" in metrics for line in self._warnings(name, metrics)]

    def _warnings(self, name: str, metrics: Metrics) -> list[str]:
        gap, relative = metrics[f"{name}_mean"], metrics[f"{name}_relative"]
        ranked = math.inf if math.isnan(relative) else relative  # NaN is beyond every limit
        if ranked <= max(SIGNAL_SHARE, _WORSE * self._said.get(name, 0.0)):
            return []
        self._said[name] = ranked
        return [
            f"{name}_mean {gap:.2g} nats a token is {relative:.0%} of the OPD signal, expected at most"
            f" {SIGNAL_SHARE:.0%}; {_ADVICE[name]}"
        ]
