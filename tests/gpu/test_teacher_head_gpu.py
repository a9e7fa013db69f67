"""The teacher's head on a CUDA device against the same head on the CPU."""

import pytest
import torch

from opd_ray.objectives.equivalence import Equivalence
from opd_ray.protocol import Payload, ScoreRequest
from workers.teacher.head import HeadScores, TeacherHead

pytestmark = pytest.mark.gpu

_NUM_TOKENS, _NUM_ROWS, _HIDDEN_SIZE, _NUM_IDS = 1100, 44, 8, 5
_VOCAB_SIZE = 40  # the head has four rows more
_CLASSES = ((7, 3, 30), (12, 39))
_REQUESTS = [
    ScoreRequest(payload=Payload.support, top_k=6, top_p=0.9, sampled_logprobs=True),
    ScoreRequest(payload=Payload.support, support="union", top_k=6, include_sampled=True),
    ScoreRequest(payload=Payload.support, support="student", normalised=False),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("classes", [(), _CLASSES], ids=["no classes", "classes"])
@pytest.mark.parametrize("request_", _REQUESTS, ids=["teacher", "union", "student"])
def test_a_gpu_says_what_the_cpu_says(request_: ScoreRequest, classes: tuple[tuple[int, ...], ...], dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)
    hidden_ND = torch.randn(_NUM_TOKENS, _HIDDEN_SIZE, generator=generator).to(dtype)
    head_RD = torch.randn(_NUM_ROWS, _HIDDEN_SIZE, generator=generator).to(dtype)
    ids_N = torch.randint(_VOCAB_SIZE, (_NUM_TOKENS,), generator=generator)
    student_ids_NK = torch.rand(_NUM_TOKENS, _VOCAB_SIZE, generator=generator).argsort(-1)[:, :_NUM_IDS]

    def score_on(name: str) -> HeadScores:
        device = torch.device(name)
        equivalence = Equivalence.of(classes, device=device)
        head = TeacherHead(head_RD.to(device), vocab_size=_VOCAB_SIZE, temperature=0.7, equivalence=equivalence)
        return head.score(
            hidden_ND.to(device),
            ids_N=ids_N.to(device),
            student_ids_NK=student_ids_NK.to(device),
            request=request_,
        )

    on_gpu, on_cpu = score_on("cuda"), score_on("cpu")
    for name in ("ids_NK", "logprobs_NK", "sampled_logprobs_N", "dropped_mass_N"):
        given, expected = getattr(on_gpu, name).cpu(), getattr(on_cpu, name)
        torch.testing.assert_close(given, expected, atol=1e-4, rtol=1e-4, equal_nan=True)
