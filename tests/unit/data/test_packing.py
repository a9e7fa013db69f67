from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd_ray.data.packing import (
    micro_batches,
    micro_batches_by_kind,
    pack,
    pad,
    partition,
    split_to,
    training_cost,
)

COSTS = st.lists(st.integers(0, 1000), max_size=40)
LENGTHS = st.lists(st.integers(1, 64), max_size=40)
IDS = st.lists(st.integers(1, 30), min_size=1, max_size=6)
SEQUENCES = st.lists(st.tuples(IDS, IDS), min_size=1, max_size=6)


@given(costs=COSTS, num_parts=st.integers(1, 9))
def test_a_partition_holds_every_item_once_in_ascending_order(costs: list[int], num_parts: int):
    parts = partition(costs, num_parts)
    assert len(parts) == num_parts
    assert sorted(item for part in parts for item in part) == list(range(len(costs)))
    assert all(part == sorted(part) for part in parts)


@given(costs=COSTS, num_parts=st.integers(1, 9))
def test_the_dearest_part_costs_at_most_one_item_more_than_the_mean(costs: list[int], num_parts: int):
    loads = [sum(costs[item] for item in part) for part in partition(costs, num_parts)]
    assert max(loads) <= sum(costs) / num_parts + max(costs, default=0)


@given(costs=st.lists(st.integers(0, 9), min_size=1, max_size=40), num_parts=st.integers(1, 9))
def test_no_part_is_empty_when_there_are_enough_items(costs: list[int], num_parts: int):
    parts = partition(costs, num_parts)
    assert sum(map(bool, parts)) == min(num_parts, len(costs))


def test_equal_costs_are_dealt_out_evenly():
    assert sorted(map(len, partition([5] * 12, 4))) == [3, 3, 3, 3]


@given(lengths=LENGTHS, max_tokens=st.integers(64, 200))
def test_micro_batches_hold_every_sequence_once_and_no_more_padded_positions_than_allowed(
    lengths: list[int], max_tokens: int
):
    cuts = micro_batches(lengths, max_tokens=max_tokens, padded=True)
    assert sorted(item for cut in cuts for item in cut) == list(range(len(lengths)))
    assert all(cut for cut in cuts)
    assert all(max(lengths[item] for item in cut) * len(cut) <= max_tokens for cut in cuts)


@given(lengths=LENGTHS, max_tokens=st.integers(64, 200))
def test_no_two_neighbouring_micro_batches_would_fit_into_one(lengths: list[int], max_tokens: int):
    cuts = micro_batches(lengths, max_tokens=max_tokens, padded=True)
    for cut, following in pairwise(cuts):
        assert lengths[cut[0]] * (len(cut) + len(following)) > max_tokens


@given(lengths=LENGTHS, max_tokens=st.integers(64, 200))
def test_packed_micro_batches_hold_every_sequence_once_and_no_two_would_fit_into_one(
    lengths: list[int], max_tokens: int
):
    cuts = micro_batches(lengths, max_tokens=max_tokens, padded=False)
    assert sorted(item for cut in cuts for item in cut) == list(range(len(lengths)))
    sizes = [sum(lengths[item] for item in cut) for cut in cuts]
    assert all(0 < size <= max_tokens for size in sizes)
    assert all(a + b > max_tokens for i, a in enumerate(sizes) for b in sizes[:i])


def test_packing_fills_the_room_that_padding_wastes():
    assert micro_batches([10, 2, 9, 2, 2], max_tokens=15, padded=True) == [[0], [2], [1, 3, 4]]
    assert micro_batches([10, 2, 9, 2, 2], max_tokens=15, padded=False) == [[0, 1, 3], [2, 4]]


@given(lengths=st.lists(st.integers(1, 64), min_size=1, max_size=30), num_cuts=st.integers(1, 12))
def test_micro_batches_are_split_until_there_are_enough_or_each_has_one_sequence(lengths: list[int], num_cuts: int):
    cuts = micro_batches(lengths, max_tokens=100, padded=False)
    parts = split_to(cuts, lengths, num_cuts=num_cuts)
    assert sorted(item for part in parts for item in part) == list(range(len(lengths)))
    assert len(parts) == max(len(cuts), min(num_cuts, len(lengths)))
    assert all(any(set(part) <= set(cut) for cut in cuts) for part in parts)


def test_the_largest_micro_batch_is_halved_by_tokens():
    assert sorted(split_to([[0, 1, 2], [3]], [4, 2, 2, 7], num_cuts=3)) == [[0], [1, 2], [3]]


def test_the_tokens_of_a_long_sequence_are_dearer_by_its_attention():
    assert training_cost(10, hidden_size=1000) == 10
    assert training_cost(12_000, hidden_size=1000) == 24_000


def test_sequences_of_similar_length_share_a_micro_batch():
    assert micro_batches([10, 2, 9, 2, 2], max_tokens=20, padded=True) == [[0, 2], [1, 3, 4]]


def test_a_sequence_that_fits_no_micro_batch_is_refused_with_the_key():
    with pytest.raises(ValueError, match=r"a sequence of 9 tokens .* learner\.max_tokens_per_micro_batch is 8"):
        micro_batches([3, 9], max_tokens=8, padded=True)


@given(items=st.lists(st.tuples(st.integers(1, 64), st.sampled_from("abc"))), max_tokens=st.integers(64, 200))
def test_micro_batches_by_kind_are_those_of_every_kind_by_itself(items: list[tuple[int, str]], max_tokens: int):
    lengths, kinds = [length for length, _ in items], [kind for _, kind in items]
    cuts = micro_batches_by_kind(lengths, kinds, max_tokens=max_tokens, padded=True)
    expected = []
    for kind in sorted(set(kinds)):
        mine = [i for i in range(len(items)) if kinds[i] == kind]
        expected += [
            [mine[i] for i in cut]
            for cut in micro_batches([lengths[i] for i in mine], max_tokens=max_tokens, padded=True)
        ]
    assert cuts == expected
    assert all(len({kinds[i] for i in cut}) == 1 for cut in cuts)
    assert sorted(i for cut in cuts for i in cut) == list(range(len(items)))


def test_sequences_of_one_kind_are_cut_as_without_kinds():
    lengths = [10, 2, 9, 2, 2]
    assert micro_batches_by_kind(lengths, ["a"] * 5, max_tokens=20, padded=True) == micro_batches(
        lengths, max_tokens=20, padded=True
    )
    assert micro_batches_by_kind(lengths, ["b", "a", "b", "a", "b"], max_tokens=20, padded=True) == [
        [1, 3],
        [0, 2],
        [4],
    ]


@given(SEQUENCES)
def test_padded_rows_give_back_prompt_and_response(sequences: list[tuple[list[int], list[int]]]):
    prompts, responses = ([np.array(s[i], dtype=np.int32) for s in sequences] for i in (0, 1))
    batch = pad(prompts, responses)
    assert batch.input_ids_BT.shape == batch.attention_mask_BT.shape
    assert batch.input_ids_BT.shape[1] == max(len(p) + len(r) for p, r in sequences)
    for row, (prompt, response) in enumerate(sequences):
        is_token_T = batch.attention_mask_BT[row] == 1
        assert batch.input_ids_BT[row][is_token_T].tolist() == [*prompt, *response]
        assert is_token_T[: len(prompt) + len(response)].all()
        assert not batch.input_ids_BT[row][~is_token_T].any()


@given(SEQUENCES)
def test_the_state_rows_point_at_the_position_before_each_response_token(sequences: list[tuple[list[int], list[int]]]):
    prompts, responses = ([np.array(s[i], dtype=np.int32) for s in sequences] for i in (0, 1))
    batch = pad(prompts, responses)
    flat = batch.input_ids_BT.reshape(-1)
    assert flat[batch.state_rows_N + 1].tolist() == batch.response_ids_N.tolist()
    width = batch.input_ids_BT.shape[1]
    for row, (start, end) in enumerate(zip(batch.offsets[:-1], batch.offsets[1:], strict=True)):
        assert batch.response_ids_N[start:end].tolist() == sequences[row][1]
        assert (batch.state_rows_N[start:end] // width == row).all()
        assert batch.state_rows_N[start] % width == len(sequences[row][0]) - 1


def test_a_padded_batch_is_made_of_int64_as_the_model_wants_it():
    batch = pad([np.array([1, 2], dtype=np.int32)], [np.array([3], dtype=np.int32)])
    for array in (batch.input_ids_BT, batch.attention_mask_BT, batch.state_rows_N, batch.response_ids_N, batch.offsets):
        assert array.dtype == np.int64


def test_as_many_prompts_as_responses_are_expected():
    with pytest.raises(ValueError, match="zip"):
        pad([np.array([1], dtype=np.int32)], [])


@given(SEQUENCES)
def test_packed_rows_are_the_sequences_end_to_end_each_with_positions_from_zero(
    sequences: list[tuple[list[int], list[int]]],
):
    prompts, responses = ([np.array(s[i], dtype=np.int32) for s in sequences] for i in (0, 1))
    batch = pack(prompts, responses)
    assert batch.input_ids_T.tolist() == [id_ for p, r in sequences for id_ in [*p, *r]]
    assert batch.lengths == tuple(len(p) + len(r) for p, r in sequences)
    assert batch.position_ids_T.tolist() == [t for length in batch.lengths for t in range(length)]
    assert batch.input_ids_T[batch.state_rows_N + 1].tolist() == batch.response_ids_N.tolist()
    assert (batch.position_ids_T[batch.state_rows_N] + 1 == batch.position_ids_T[batch.state_rows_N + 1]).all()
    for (prompt, response), start, end in zip(sequences, batch.offsets[:-1], batch.offsets[1:], strict=True):
        assert batch.response_ids_N[start:end].tolist() == response
        assert batch.position_ids_T[batch.state_rows_N[start]] == len(prompt) - 1


def test_a_packed_batch_is_made_of_int64_as_the_model_wants_it():
    batch = pack([np.array([1, 2], dtype=np.int32)], [np.array([3], dtype=np.int32)])
    for array in (batch.input_ids_T, batch.position_ids_T, batch.state_rows_N, batch.response_ids_N, batch.offsets):
        assert array.dtype == np.int64
