"""What two engines' log-probs of the same tokens say of the engines: pure, on what was measured.

Suffix: N sampled tokens, all of the student's own samples at the rollout temperature.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from opd_ray.config.schema import Dtype
from opd_ray.preflight.finding import Finding, error, ok, warning
from opd_ray.protocol import Float32

LIMITS = {Dtype.float32: 1e-3, Dtype.bfloat16: 0.05}  # nats a token that rounding may explain
SIGNAL_SHARE = 0.1  # a disagreement beyond this share of the OPD signal disturbs what is to be learned
_TINY = 1e-30
_NO_SIGNAL = 1e-3  # nats a token; below it student and teacher are as good as one


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """How far one engine's log-probs are from another's, in nats a token."""

    kl: float  # KL(first || second), estimated
    mean: float  # of the absolute differences
    largest: float


def gap(first_N: Float32, second_N: Float32) -> Gap:
    """Compare two engines on tokens drawn from the first.

    The KL is the mean of exp(d) - 1 - d with d = log q - log p: unbiased and never negative (Schulman's k3).
    """
    difference_N = second_N.astype(np.float64) - first_N
    with np.errstate(over="ignore", invalid="ignore"):
        terms_N = np.expm1(difference_N) - difference_N
    return Gap(
        kl=float(terms_N.mean()),
        mean=float(np.abs(difference_N).mean()),
        largest=float(np.abs(difference_N).max()),
    )


def opd_signal(signals: Mapping[str, float]) -> Finding:
    """Judge KL(student || teacher) of each teacher, in nats a token."""
    found = ", ".join(f"{name} {value:.3g}" for name, value in signals.items()) + " nats a token"
    if not np.isfinite(list(signals.values())).all():
        return error("OPD signal", found, "a teacher gives probability 0 or no number: check its weights and dtype")
    if min(signals.values()) < _NO_SIGNAL:
        return warning("OPD signal", f"{found}: student and teacher agree", "there is nothing to learn; other paths?")
    return ok("OPD signal", found)


def self_kl(kl: float, *, dtypes: Iterable[Dtype], signal: float) -> Finding:
    """Judge the learner's own forward pass against a teacher worker that holds the student's weights: the exact KL."""
    return _judge(
        "student as teacher",
        kl,
        words=f"KL(student || student as teacher), exact over the vocabulary, {kl:.2g} nats a token",
        limit=max(LIMITS[dtype] for dtype in dtypes),
        signal=signal,
        advice="learner and teacher engine disagree on one model: compare learner.dtype, rollout.dtype, engine_args and"
        " student.path's files",
    )


def same_temperature(student: Gap, *, dtype: Dtype, temperature: float, signal: float) -> Finding:
    """Judge the sampler against the same worker token by token: a temperature that one side leaves out shows in every
    log-prob."""
    return _judge(
        "temperature",
        student.mean,
        words=f"at rollout.temperature={temperature:g} |log p - log p as teacher| is {student.mean:.2g} nats in the"
        f" mean and {student.largest:.2g} at most",
        limit=LIMITS[dtype],
        signal=signal,
        advice="sampler and teacher do not mean the same temperature or weights: look into rollout.engine_args"
        " (logprobs_mode, generation config)",
    )


def replicas(teacher: str, logprobs: Sequence[Float32], *, dtype: Dtype, signal: float) -> Finding:
    """Judge a teacher's workers against its first."""
    name = f"replicas of {teacher}"
    if len(logprobs) == 1:
        return ok(name, "one worker")
    means = [gap(logprobs[0], other_N).mean for other_N in logprobs[1:]]
    worst = float(np.max(means))
    return _judge(
        name,
        worst,
        words=f"{len(logprobs)} workers differ by {worst:.2g} nats a token at most",
        limit=max(LIMITS[dtype], SIGNAL_SHARE * signal),
        signal=signal,
        advice=f"compare the files of {teacher}.path on all nodes, and {teacher}.engine_args",
    )


def reference_gap(teacher: str, engine: Gap, *, dtype: Dtype, signal: float) -> Finding:
    """Judge a teacher's engine against its checkpoint; signal: |log p - log q| in the mean over the student's tokens.

    Quantisation and a short dtype may cost something: yellow beyond a tenth of the signal, red beyond all of it.
    """
    return _judge(
        f"engine of {teacher}",
        engine.mean,
        words=f"its log-probs differ from a float32 forward of the checkpoint by {engine.mean:.2g} nats in the mean and"
        f" {engine.largest:.2g} at most",
        limit=max(LIMITS[dtype], signal),
        signal=signal,
        advice=f"look into {teacher}.dtype and {teacher}.engine_args (quantisation, attention backend)",
    )


def engine_gap_metrics(gaps: Mapping[str, tuple[Gap, float]]) -> dict[str, float]:
    """Return the largest mean gap over teachers, in nats, and the largest relative to its teacher's signal.

    gaps: by teacher, its engine against its checkpoint, and the mean |log p - log q|. Several teachers have their own
    metrics as well.
    """
    means = {name: engine.mean for name, (engine, _) in gaps.items()}
    relative = {name: engine.mean / max(signal, _TINY) for name, (engine, signal) in gaps.items()}
    metrics = {
        "teacher/engine_gap_mean": float(np.max(list(means.values()))),
        "teacher/engine_gap_relative": float(np.max(list(relative.values()))),
    }
    for name in gaps if len(gaps) > 1 else ():
        metrics |= {f"teacher/engine_gap_mean_{name}": means[name]}
        metrics |= {f"teacher/engine_gap_relative_{name}": relative[name]}
    return metrics


def _judge(name: str, value: float, *, words: str, limit: float, signal: float, advice: str) -> Finding:
    """Red beyond the limit, yellow beyond a tenth of the signal."""
    known = signal >= _NO_SIGNAL
    found = f"{words}, {value / signal:.2%} of the OPD signal" if known else words
    if not value <= limit:  # NaN is beyond every limit
        return error(name, f"{found}; expected at most {limit:.2g}", advice)
    if known and value > SIGNAL_SHARE * signal:
        return warning(name, f"{found}; expected at most {SIGNAL_SHARE:.0%}", advice)
    return ok(name, found)
