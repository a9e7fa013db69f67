"""A teacher with another tokenizer, on a real vLLM pooling engine, as a plain object without Ray."""

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import make_group, reference_logprobs, reference_model, sampled
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from opd_ray.config.schema import Dtype, TeacherConfig
from opd_ray.config.teacher import AlignmentKind
from opd_ray.protocol import Payload, SampledScore, ScoreRequest
from workers.teacher.actor import TeacherActor

pytestmark = pytest.mark.ray

_ENGINE_ARGS = {"enforce_eager": True, "kv_cache_memory_bytes": 64 << 20}
_REQUEST = ScoreRequest(payload=Payload.sampled)


def _actor(teacher: str, *, student: str, alignment: AlignmentKind, token_map: dict[str, str]) -> TeacherActor:
    config = TeacherConfig(
        path=teacher, dtype=Dtype.float32, engine_args=_ENGINE_ARGS, alignment=alignment, token_map=token_map
    )
    return TeacherActor(
        config=config,
        request=_REQUEST,
        student_path=student,
        max_model_tokens=32,
        vocab_size=14,
        temperature=1.0,
        equivalent_ids=(),
    )


def _score(actor: TeacherActor, *responses: list[int]) -> SampledScore:
    async def scenario() -> SampledScore:
        _, score = await actor.score(make_group([1, 10, 2, 11], *responses), _REQUEST)
        assert isinstance(score, SampledScore)
        return score

    return asyncio.run(scenario())


def test_between_equal_tokenizers_aligned_scores_are_the_teachers_own(model_folder: Any) -> None:
    folder = model_folder(seed=2)
    responses = [[1, 2, 12], [3]]
    score = _score(
        _actor(folder, student=model_folder(seed=1), alignment=AlignmentKind.bytes, token_map={}), *responses
    )
    group = make_group([1, 10, 2, 11], *responses)
    truth = sampled(reference_logprobs(reference_model(folder), group), group).detach().numpy()
    np.testing.assert_allclose(score.logprobs_N, truth, atol=1e-5)
    assert score.valid_N.all()


def test_a_teacher_of_other_tokens_scores_the_same_text(model_folder: Any, tmp_path: Path) -> None:
    """Its digits have other ids and two of them in a row are one token; a span's log-probs add up to the teacher's."""
    tokens = ["<end>", *"+=", *"9876543210", "12"]
    tokenizer = Tokenizer(models.WordLevel({token: index for index, token in enumerate(tokens)}))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("12|."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    model = reference_model(model_folder(seed=3))
    model.save_pretrained(tmp_path)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(tmp_path)
    ids = {token: index for index, token in enumerate(tokens)}

    # The student writes 1, 2, 3 and its end token; the teacher reads 12, 3 and its own.
    score = _score(
        _actor(
            str(tmp_path),
            student=model_folder(seed=1),
            alignment=AlignmentKind.bytes,
            token_map={"<eos>": "<end>"},
        ),
        [1, 2, 3, 12],
    )

    prompt, response = [ids[c] for c in "1+2="], [ids["12"], ids["3"], ids["<end>"]]
    logits = model(torch.tensor([prompt + response])).logits[0].log_softmax(-1).detach()
    truth = [float(logits[len(prompt) - 1 + t, token]) for t, token in enumerate(response)]
    np.testing.assert_allclose(score.logprobs_N[:2].sum(), truth[0], atol=1e-4)
    np.testing.assert_allclose(score.logprobs_N[2:], truth[1:], atol=1e-4)
    assert score.valid_N.all()
