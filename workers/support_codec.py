"""The wire form of a support: 2 bytes an id, 4 a log-prob, without loss.

An id needs 17 or 18 bits in the vocabularies of today. Sorted, a row's ids pass from one page of 65,536 ids to the next
a few times only, so the places where they do, and the 16 low bits of each id, say everything.

Suffixes: N tokens, K support, H pages of ids beyond the first.
"""

import numpy as np

from opd_ray.protocol import Float32, Int32, SupportScore

_PAGE_IDS = 2**16
_MAX_IDS = _PAGE_IDS - 1  # in a row, so that a column fits 16 bits
_NO_ID = -1


def pack_support(ids_NK: Int32, logprobs_NK: Float32, *, sampled_logprobs_N: Float32) -> SupportScore:
    """Return the message that says which ids, distinct in a row, have which log-probs; -1 is no id.

    Columns keep their order where every id is below 65,536, and are sorted by id where not. Raises ValueError for more
    columns than a page has ids.
    """
    if ids_NK.shape[1] > _MAX_IDS:
        raise ValueError(f"objective.top_k asks for {ids_NK.shape[1]} ids a token: expected at most {_MAX_IDS}")
    logprobs_NK = np.where(ids_NK < 0, np.float32(-np.inf), logprobs_NK)
    num_pages = 1 + int(ids_NK.max(initial=0)) // _PAGE_IDS
    if num_pages > 1:
        ids_NK, logprobs_NK = _sorted_by_id(ids_NK, logprobs_NK)
    starts = [(ids_NK.view(np.uint32) < page * _PAGE_IDS).sum(1, dtype=np.uint16) for page in range(1, num_pages)]
    return SupportScore(
        low_ids_NK=ids_NK.astype(np.uint16),  # keeps the low bits
        page_starts_NH=np.stack(starts, axis=1) if starts else np.empty((len(ids_NK), 0), dtype=np.uint16),
        logprobs_NK=logprobs_NK,
        sampled_logprobs_N=sampled_logprobs_N,
    )


def support_ids(score: SupportScore) -> Int32:
    """Return the ids [N,K] of a support, -1 for none."""
    ids_NK = score.low_ids_NK.astype(np.int32)
    columns_K = np.arange(ids_NK.shape[1], dtype=np.uint16)
    for starts_N in score.page_starts_NH.T:
        ids_NK += _PAGE_IDS * (columns_K >= starts_N[:, None]).astype(np.int32)
    ids_NK[score.logprobs_NK == -np.inf] = _NO_ID
    return ids_NK


def _sorted_by_id(ids_NK: Int32, logprobs_NK: Float32) -> tuple[Int32, Float32]:
    """Return each row in the order of its ids, -1 last. Both halves of a 64-bit number are sorted as one."""
    pairs_NK = ids_NK.astype(np.uint32).astype(np.uint64) << np.uint64(32)  # -1 becomes the largest
    pairs_NK |= logprobs_NK.view(np.uint32)
    pairs_NK.sort(axis=1)
    return (pairs_NK >> np.uint64(32)).astype(np.uint32).view(np.int32), pairs_NK.astype(np.uint32).view(np.float32)
