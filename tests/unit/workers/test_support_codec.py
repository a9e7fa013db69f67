import pickle

import numpy as np
import pytest

from opd_ray.protocol import SupportScore
from workers.support_codec import pack_support, support_ids

NO_LOGPROBS = np.empty(0, dtype=np.float32)
QWEN_IDS, GEMMA_IDS = 151_936, 262_144


def make_support(vocab_size: int, *, num_tokens: int = 50, num_ids: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """Return distinct ids in every row, some of them -1, and log-probs of all sizes."""
    random = np.random.default_rng(vocab_size)
    ids_NK = np.stack([random.choice(vocab_size, num_ids, replace=False) for _ in range(num_tokens)]).astype(np.int32)
    ids_NK[random.random(ids_NK.shape) < 0.1] = -1
    return ids_NK, -random.exponential(10, ids_NK.shape).astype(np.float32)


def packed(ids_NK: np.ndarray, logprobs_NK: np.ndarray) -> SupportScore:
    return pack_support(ids_NK, logprobs_NK, sampled_logprobs_N=NO_LOGPROBS)


def rows_of(ids_NK: np.ndarray, logprobs_NK: np.ndarray) -> list[dict[int, float]]:
    """Return what each row says, whatever its order."""
    pairs = [
        zip(ids, logprobs, strict=True) for ids, logprobs in zip(ids_NK.tolist(), logprobs_NK.tolist(), strict=True)
    ]
    return [{id_: logprob for id_, logprob in row if id_ >= 0} for row in pairs]


@pytest.mark.parametrize("vocab_size", [100, 65_535, 65_536, 65_537, 131_072, 131_073, QWEN_IDS, GEMMA_IDS])
def test_every_id_keeps_its_logprob_bit_for_bit(vocab_size: int):
    ids_NK, logprobs_NK = make_support(vocab_size)
    score = packed(ids_NK, logprobs_NK)
    assert rows_of(support_ids(score), score.logprobs_NK) == rows_of(ids_NK, logprobs_NK)


def test_columns_keep_their_order_where_every_id_fits_16_bits():
    ids_NK, logprobs_NK = make_support(65_536)
    ids_NK[0, 0] = 65_535
    score = packed(ids_NK, logprobs_NK)
    np.testing.assert_array_equal(support_ids(score), ids_NK)
    np.testing.assert_array_equal(score.logprobs_NK[ids_NK >= 0], logprobs_NK[ids_NK >= 0])


def test_a_wider_vocabulary_sorts_the_columns_by_id_and_puts_those_without_one_last():
    ids_NK = np.array([[140_000, -1, 65_536, 3, 70_000, 65_535]], dtype=np.int32)
    score = packed(ids_NK, np.arange(6, dtype=np.float32)[None])
    assert support_ids(score).tolist() == [[3, 65_535, 65_536, 70_000, 140_000, -1]]
    assert score.logprobs_NK.tolist() == [[3, 5, 2, 4, 0, -np.inf]]
    assert score.page_starts_NH.tolist() == [[2, 4]]


@pytest.mark.parametrize("top", [65_535, 65_536, QWEN_IDS - 1])
def test_a_row_without_any_id_stays_without(top: int):
    ids_NK = np.array([[-1, -1], [0, top]], dtype=np.int32)
    assert support_ids(packed(ids_NK, np.zeros((2, 2), np.float32))).tolist() == ids_NK.tolist()


@pytest.mark.parametrize("shape", [(0, 4), (3, 0)])
def test_a_support_of_nothing_is_nothing(shape: tuple[int, int]):
    score = packed(np.empty(shape, np.int32), np.empty(shape, np.float32))
    assert support_ids(score).shape == shape


def test_a_logprob_that_is_no_number_is_not_lost():
    score = packed(np.array([[5, 70_000]], np.int32), np.array([[np.nan, np.nan]], np.float32))
    assert support_ids(score).tolist() == [[5, 70_000]]
    assert np.isnan(score.logprobs_NK).all()


def test_packing_leaves_what_it_was_given_as_it_was():
    ids_NK, logprobs_NK = make_support(QWEN_IDS)
    before = ids_NK.copy(), logprobs_NK.copy()
    packed(ids_NK, logprobs_NK)
    np.testing.assert_array_equal(ids_NK, before[0])
    np.testing.assert_array_equal(logprobs_NK, before[1])


def test_rows_of_a_message_can_be_read_by_themselves():
    ids_NK, logprobs_NK = make_support(QWEN_IDS)
    whole = packed(ids_NK, logprobs_NK)
    part = SupportScore(
        low_ids_NK=whole.low_ids_NK[7:9],
        page_starts_NH=whole.page_starts_NH[7:9],
        logprobs_NK=whole.logprobs_NK[7:9],
        sampled_logprobs_N=NO_LOGPROBS,
    )
    np.testing.assert_array_equal(support_ids(part), support_ids(whole)[7:9])


@pytest.mark.parametrize("vocab_size", [32_768, QWEN_IDS, GEMMA_IDS])
@pytest.mark.parametrize("num_ids", [1, 64, 128])
def test_a_token_takes_at_most_8_bytes_beside_6_for_each_id(vocab_size: int, num_ids: int):
    ids_NK, logprobs_NK = make_support(vocab_size, num_tokens=1000, num_ids=num_ids)
    num_bytes = len(pickle.dumps(packed(ids_NK, logprobs_NK), protocol=5))
    assert num_bytes <= 1000 * (6 * num_ids + 8)


def test_more_columns_than_a_place_among_them_can_name_are_refused():
    ids_NK = np.arange(65_536, dtype=np.int32)[None]
    with pytest.raises(ValueError, match=r"objective\.top_k asks for 65536 ids a token: expected at most 65535"):
        packed(ids_NK, np.zeros(ids_NK.shape, np.float32))
