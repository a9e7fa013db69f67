"""Turns a teacher's final hidden states into what an objective needs, a chunk of tokens at a time."""

from collections.abc import Iterator

import torch

_CHUNK_TOKENS = 512


@torch.inference_mode()
def top_k(
    hidden_ND: torch.Tensor, head_VD: torch.Tensor, *, num_tokens: int, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids int32 [N,K] and full-vocabulary log-probs float32 [N,K] of the K likeliest tokens, K = num_tokens."""
    ids, logprobs = [], []
    for logits in _chunked_logits(hidden_ND, head_VD, temperature=temperature):
        values, indices = logits.topk(num_tokens, dim=-1)
        logprobs.append(values - logits.logsumexp(dim=-1, keepdim=True))
        ids.append(indices.to(torch.int32))
    return torch.cat(ids), torch.cat(logprobs)


@torch.inference_mode()
def sampled_logprobs(
    hidden_ND: torch.Tensor, head_VD: torch.Tensor, ids_N: torch.Tensor, *, temperature: float
) -> torch.Tensor:
    """Return the full-vocabulary log-prob float32 [N] of the given tokens."""
    chunks = _chunked_logits(hidden_ND, head_VD, temperature=temperature)
    parts = [
        logits.gather(1, ids[:, None]).squeeze(1) - logits.logsumexp(dim=-1)
        for logits, ids in zip(chunks, ids_N.split(_CHUNK_TOKENS), strict=True)
    ]
    return torch.cat(parts)


def _chunked_logits(hidden_ND: torch.Tensor, head_VD: torch.Tensor, *, temperature: float) -> Iterator[torch.Tensor]:
    for chunk in hidden_ND.split(_CHUNK_TOKENS):
        yield (chunk.float() @ head_VD.float().T) / temperature
