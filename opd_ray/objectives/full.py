"""The full-vocabulary objective: exact reverse KL from the teacher's hidden states.

Suffixes: N tokens, V vocabulary, D hidden size.
"""

import torch
from torch import Tensor

from opd_ray.objectives.divergences import reverse_kl
from opd_ray.objectives.logits import at_sampled, common_vocabulary, log_probs, map_chunks, widest_dtype
from opd_ray.objectives.objective import ObjectiveOptions, TokenLosses
from opd_ray.objectives.signals import HiddenSignal, Tokens, check_num_tokens


def token_losses(
    hidden_ND: Tensor, head_VD: Tensor, *, tokens: Tokens, signal: HiddenSignal, options: ObjectiveOptions
) -> TokenLosses:
    """Return loss_t = KL(p || q) = sum_v p (log p - log q) over the common vocabulary, at the sampled prefixes.

    The gradient in the student's logits is p (log p - log q - loss): what `sampled` at discount 0 has in expectation
    over y_t, without its noise. divergence_N is the loss itself, exact and >= 0. Both models' logits are divided by
    the temperature; heads of different sizes are cut to the common range before the softmax.

    hidden_ND [N,D], head_VD [V,D]; the teacher has its own D and V and gets no gradient; nats. Standard.
    Choose it when the exact signal is worth 2D bytes a token and products with both heads.
    """
    check_num_tokens(tokens, hidden_ND=hidden_ND, signal_N=signal.hidden_ND)
    vocab_size = common_vocabulary(options.vocab_size, head_VD, signal.head_VD)
    teacher_head_VD = signal.head_VD[:vocab_size]
    # Cast before the chunks: their gradients then add up in the wide dtype, not in the head's.
    wide_head_VD = head_VD[:vocab_size].to(widest_dtype(hidden_ND, head_VD))

    def of_chunk(rows: slice) -> tuple[Tensor, Tensor]:
        mask = tokens.mask_N[rows]
        log_p = log_probs(hidden_ND[rows], wide_head_VD, mask_N=mask, temperature=options.temperature)
        with torch.no_grad():
            log_q = log_probs(signal.hidden_ND[rows], teacher_head_VD, mask_N=mask, temperature=options.temperature)
            sampled_logprobs = at_sampled(log_p, ids_N=tokens.ids_N[rows], mask_N=mask)
        return reverse_kl(log_p, log_q.to(log_p.dtype)).masked_fill(~mask, 0), sampled_logprobs

    loss_N, sampled_logprobs_N = map_chunks(of_chunk, num_tokens=len(tokens.ids_N), chunk_tokens=options.chunk_tokens)
    return TokenLosses(loss_N=loss_N, divergence_N=loss_N.detach(), sampled_logprobs_N=sampled_logprobs_N)
