"""The inputs of the loss benchmark: two random models that agree about as well as a student and its teacher.

Suffixes: N tokens, K support, V vocabulary, D hidden size.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

_SEED = 0
_CHUNK_TOKENS = 128
# Standard deviation of the logits: of what both models share, and of what each has for itself.
_SHARED_STD, _OWN_STD = 2.4, 0.6


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How large a problem is, and where it lives."""

    num_tokens: int
    vocab_size: int
    student_size: int
    teacher_size: int
    top_k: int = 64
    dtype: torch.dtype = torch.float32
    device: str = "cpu"


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """What every objective is computed from; log-probs float32, in nats, over the full vocabulary."""

    hidden_ND: Tensor  # the student's states
    head_VD: Tensor
    teacher_hidden_ND: Tensor  # D is the teacher's
    teacher_head_VD: Tensor
    ids_N: Tensor  # drawn from the student
    student_logprobs_N: Tensor  # of ids_N
    teacher_logprobs_N: Tensor  # of ids_N
    support_ids_NK: Tensor  # the teacher's top-K
    support_logprobs_NK: Tensor  # the teacher's

    @property
    def num_tokens(self) -> int:
        return len(self.ids_N)

    def save(self, path: Path) -> None:
        """Write all tensors to a file."""
        torch.save({field.name: getattr(self, field.name) for field in dataclasses.fields(self)}, path)


def load_problem(path: Path, *, num_tokens: int, device: str) -> Problem:
    """Read a problem and keep its first tokens; the student's tensors come as leaves."""
    tensors: dict[str, Tensor] = torch.load(path, map_location=device)
    kept = {name: tensor if name.endswith("_VD") else tensor[:num_tokens].clone() for name, tensor in tensors.items()}
    problem = Problem(**kept)
    for leaf in (problem.hidden_ND, problem.head_VD):
        leaf.requires_grad_()
    return problem


def make_problem(sizes: Sizes) -> Problem:
    """Return a problem of these sizes, always the same one on the same machine."""
    torch.manual_seed(_SEED)
    shared_size = 3 * min(sizes.student_size, sizes.teacher_size) // 4
    shared_ND = torch.randn(sizes.num_tokens, shared_size, device=sizes.device)
    shared_VD = _head(sizes, width=shared_size, std=_SHARED_STD)
    hidden_ND, head_VD = _model(sizes, shared_ND, shared_VD, hidden_size=sizes.student_size)
    teacher_ND, teacher_VD = _model(sizes, shared_ND, shared_VD, hidden_size=sizes.teacher_size)

    columns: list[tuple[Tensor, ...]] = []
    for start in range(0, sizes.num_tokens, _CHUNK_TOKENS):
        rows = slice(start, start + _CHUNK_TOKENS)
        log_p = (hidden_ND[rows] @ head_VD.T).float().log_softmax(-1)
        log_q = (teacher_ND[rows] @ teacher_VD.T).float().log_softmax(-1)
        ids_N1 = log_p.exp().multinomial(1)
        top = log_q.topk(sizes.top_k)
        columns.append((ids_N1[:, 0], log_p.gather(-1, ids_N1)[:, 0], log_q.gather(-1, ids_N1)[:, 0], *top))
    ids_N, student_N, teacher_N, top_logprobs_NK, top_ids_NK = (
        torch.cat(column) for column in zip(*columns, strict=True)
    )
    return Problem(
        hidden_ND=hidden_ND,
        head_VD=head_VD,
        teacher_hidden_ND=teacher_ND,
        teacher_head_VD=teacher_VD,
        ids_N=ids_N,
        student_logprobs_N=student_N,
        teacher_logprobs_N=teacher_N,
        support_ids_NK=top_ids_NK,
        support_logprobs_NK=top_logprobs_NK,
    )


def _model(sizes: Sizes, shared_ND: Tensor, shared_VD: Tensor, *, hidden_size: int) -> tuple[Tensor, Tensor]:
    """Return states and head of a model that has the shared directions and some of its own."""
    own_size = hidden_size - shared_ND.shape[1]
    own_ND = torch.randn(sizes.num_tokens, own_size, device=sizes.device)
    own_VD = _head(sizes, width=own_size, std=_OWN_STD)
    return torch.cat([shared_ND, own_ND], -1).to(sizes.dtype), torch.cat([shared_VD, own_VD], -1).to(sizes.dtype)


def _head(sizes: Sizes, *, width: int, std: float) -> Tensor:
    return torch.randn(sizes.vocab_size, width, device=sizes.device) * (std / width**0.5)
