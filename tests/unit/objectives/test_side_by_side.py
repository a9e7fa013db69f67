"""Student and teacher side by side against plain [N,V] arithmetic."""

import pytest
import torch
from torch import Tensor

from opd_ray.objectives import HiddenSignal, ObjectiveOptions, Tokens
from opd_ray.objectives.comparison import COMPARISON, TOP_K

N, V, D, TEACHER_D = 11, 40, 6, 9


def tokens(generator: torch.Generator, *, mask_N: Tensor) -> Tokens:
    ids_N = torch.randint(V, (N,), generator=generator)
    return Tokens(
        ids_N=ids_N,
        offsets=torch.tensor([0, 4, N]),
        mask_N=mask_N,
        weights_N=torch.ones(N, dtype=torch.float64),
        sampler_logprobs_N=torch.zeros(N, dtype=torch.float64),
        advantages_N=torch.zeros(N, dtype=torch.float64),
    )


def problem(*, chunk_tokens: int = 3, vocab_size: int = 0, mask_N: Tensor | None = None) -> dict:
    generator = torch.Generator().manual_seed(3)
    options = {"generator": generator, "dtype": torch.float64}
    return {
        "hidden_ND": torch.randn(N, D, **options),
        "head_VD": torch.randn(V, D, **options),
        "tokens": tokens(generator, mask_N=torch.ones(N, dtype=torch.bool) if mask_N is None else mask_N),
        "signal": HiddenSignal(
            hidden_ND=torch.randn(N, TEACHER_D, **options), head_VD=torch.randn(V + 3, TEACHER_D, **options)
        ),
        "options": ObjectiveOptions(temperature=0.7, chunk_tokens=chunk_tokens, vocab_size=vocab_size),
    }


def compared(given: dict) -> dict[str, Tensor]:
    with torch.no_grad():
        losses = COMPARISON.losses(
            given["hidden_ND"], given["head_VD"], **{k: given[k] for k in ("tokens", "signal", "options")}
        )
    return {**losses.stats, "kl": losses.divergence_N, "logprob": losses.sampled_logprobs_N, "loss": losses.loss}


def naive(given: dict, *, vocab_size: int) -> dict[str, Tensor]:
    signal, t = given["signal"], given["options"].temperature
    log_p = ((given["hidden_ND"] @ given["head_VD"][:vocab_size].T) / t).log_softmax(-1)
    log_q = ((signal.hidden_ND @ signal.head_VD[:vocab_size].T) / t).log_softmax(-1)
    p, q, ids_N1 = log_p.exp(), log_q.exp(), given["tokens"].ids_N[:, None]
    k = min(TOP_K, vocab_size)
    top_p, top_q = log_p.argsort(descending=True)[:, :k], log_q.argsort(descending=True)[:, :k]
    return {
        "kl": (p * (log_p - log_q)).sum(-1),
        "logprob": log_p.gather(1, ids_N1)[:, 0],
        "teacher_logprob": log_q.gather(1, ids_N1)[:, 0],
        "student_entropy": -(p * log_p).sum(-1),
        "teacher_entropy": -(q * log_q).sum(-1),
        "topk_overlap": torch.tensor(
            [len(set(a.tolist()) & set(b.tolist())) / k for a, b in zip(top_p, top_q, strict=True)], dtype=torch.float64
        ),
        "student_mass_in_teacher_topk": p.gather(1, top_q).sum(-1),
        "teacher_mass_in_student_topk": q.gather(1, top_p).sum(-1),
        "student_top_ids": top_p[:, :5],
        "student_top_logprobs": log_p.gather(1, top_p[:, :5]),
        "teacher_top_ids": top_q[:, :5],
        "teacher_top_logprobs": log_q.gather(1, top_q[:, :5]),
    }


@pytest.mark.parametrize(("chunk_tokens", "vocab_size"), [(1, 0), (5, 0), (320, 0), (6, 30), (6, 10)])
def test_every_statistic_is_that_of_the_whole_vocabulary(chunk_tokens: int, vocab_size: int):
    given = problem(chunk_tokens=chunk_tokens, vocab_size=vocab_size)
    given["tokens"].ids_N.clamp_(max=(vocab_size or V) - 1)
    result = compared(given)
    for name, expected in naive(given, vocab_size=vocab_size or V).items():
        torch.testing.assert_close(result[name], expected, atol=1e-12, rtol=1e-12, msg=name)
    assert float(result["loss"]) == 0


def test_masked_tokens_are_0_in_everything_and_change_nothing_else():
    mask_N = torch.arange(N) % 3 != 0
    masked, whole = problem(mask_N=mask_N), problem()
    masked["signal"].hidden_ND[~mask_N] = torch.nan
    one, other = compared(masked), compared(whole)
    for name in set(one) - {"loss"}:
        assert not one[name][~mask_N].any(), name
        torch.testing.assert_close(one[name][mask_N], other[name][mask_N], msg=name)


def test_a_teacher_that_is_the_student_agrees_in_everything():
    given = problem()
    given["signal"] = HiddenSignal(hidden_ND=given["hidden_ND"], head_VD=given["head_VD"])
    result = compared(given)
    assert result["kl"].abs().max() < 1e-14
    assert (result["topk_overlap"] == 1).all()
    torch.testing.assert_close(result["student_mass_in_teacher_topk"], result["teacher_mass_in_student_topk"])
    assert torch.equal(result["student_top_ids"], result["teacher_top_ids"])
