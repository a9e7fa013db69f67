"""A checkpoint as transformers reads it, in float32 on the CPU: what an engine of it must agree with."""

from collections.abc import Sequence

import numpy as np
import torch

from opd_ray.protocol import Float32, Int32


class ReferenceModel:
    """Gives log-probs one sequence at a time: for a small sample, not for a run."""

    def __init__(self, *, path: str, vocab_size: int, temperature: float) -> None:
        from transformers import AutoModelForCausalLM

        self._model = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
        ).eval()
        self._vocab_size = vocab_size
        self._temperature = temperature

    def logprobs(self, samples: Sequence[tuple[Int32, Int32]]) -> Float32:
        """Return the log-prob of every response token at the temperature, [N], for pairs of prompt and response ids.

        Normalised over the common vocabulary, as teachers do it.
        """
        return np.concatenate([self._of_one(prompt_ids, response_ids) for prompt_ids, response_ids in samples])

    @torch.inference_mode()
    def _of_one(self, prompt_ids: Int32, response_ids: Int32) -> Float32:
        ids_T = torch.from_numpy(np.concatenate([prompt_ids, response_ids]).astype(np.int64))
        logits_NV = self._model(ids_T[None], use_cache=False, logits_to_keep=len(response_ids) + 1).logits[0, :-1]
        log_q_NV = (logits_NV[:, : self._vocab_size] / self._temperature).log_softmax(-1)
        logprobs_N: Float32 = log_q_NV.gather(1, ids_T[-len(response_ids) :, None]).squeeze(1).numpy()
        return logprobs_N
