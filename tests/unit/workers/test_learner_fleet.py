from collections.abc import Sequence

from fakes import make_summary
from hypothesis import given
from hypothesis import strategies as st

from opd_ray.protocol import GroupSummary
from workers.learner.fleet import rank_batches
from workers.learner.report import RankBatch

PROMPT_TOKENS = 2  # of every group of `make_summary`
GROUPS = st.lists(
    st.tuples(st.lists(st.integers(1, 30), min_size=1, max_size=4), st.sampled_from("abc")), min_size=4, max_size=12
)


def split(
    groups: Sequence[tuple[list[int], str]], *, num_ranks: int, max_tokens: int, padded: bool = False
) -> tuple[list[GroupSummary], list[tuple[list[int], RankBatch]]]:
    """Return the summaries of groups, given by response lengths and teacher, and the ranks' shares."""
    summaries = [make_summary(*lengths) for lengths, _ in groups]
    teachers = [teacher for _, teacher in groups]
    return summaries, rank_batches(
        summaries,
        teachers=teachers,
        num_ranks=num_ranks,
        max_tokens=max_tokens,
        padded=padded,
        hidden_size=8,
        version=6,
    )


@given(groups=GROUPS, num_ranks=st.integers(1, 4), max_tokens=st.integers(32, 100), padded=st.booleans())
def test_no_micro_batch_of_any_rank_mixes_teachers_and_every_sequence_is_in_one(
    groups: list[tuple[list[int], str]], num_ranks: int, max_tokens: int, padded: bool
):
    summaries, shares = split(groups, num_ranks=num_ranks, max_tokens=max_tokens, padded=padded)
    assert sorted(i for share, _ in shares for i in share) == list(range(len(groups)))
    for share, batch in shares:
        assert batch.version == 6
        assert batch.teachers == tuple(groups[i][1] for i in share)
        of_sequences = [
            (teacher, length)
            for i, teacher in zip(share, batch.teachers, strict=True)
            for length in summaries[i].response_lengths
        ]
        assert sorted(n for cut in batch.micro_batches for n in cut) == list(range(len(of_sequences)))
        for cut in filter(None, batch.micro_batches):
            assert len({of_sequences[n][0] for n in cut}) == 1
            lengths = [PROMPT_TOKENS + of_sequences[n][1] for n in cut]
            assert (len(cut) * max(lengths) if padded else sum(lengths)) <= max_tokens


@given(groups=GROUPS, num_ranks=st.integers(1, 4), max_tokens=st.integers(32, 100))
def test_all_ranks_have_groups_and_equally_many_micro_batches_the_empty_ones_at_the_end(
    groups: list[tuple[list[int], str]], num_ranks: int, max_tokens: int
):
    _, shares = split(groups, num_ranks=num_ranks, max_tokens=max_tokens)
    assert all(share for share, _ in shares)
    assert len({len(batch.micro_batches) for _, batch in shares}) == 1
    for _, batch in shares:
        sizes = [bool(cut) for cut in batch.micro_batches]
        assert sizes == sorted(sizes, reverse=True)
    assert any(all(batch.micro_batches) for _, batch in shares)


def test_sequences_that_would_fit_into_one_micro_batch_are_cut_by_teacher():
    _, ((share, batch),) = split([([3, 3], "b"), ([3], "a"), ([3], "b")], num_ranks=1, max_tokens=100)
    assert share == [0, 1, 2]
    assert batch.micro_batches == ((2,), (0, 1, 3))


def test_tasks_are_cut_apart_where_each_ones_gradient_is_measured():
    summaries = [make_summary(3, 3, task="sort"), make_summary(3, task="copy"), make_summary(3, task="sort")]
    given = {"teachers": ["a"] * 3, "num_ranks": 1, "max_tokens": 100, "padded": False, "hidden_size": 8, "version": 0}
    for tasks_apart, micro_batches in ((True, ((2,), (0, 1, 3))), (False, ((0, 1, 2, 3),))):
        ((_, batch),) = rank_batches(summaries, tasks_apart=tasks_apart, **given)
        assert batch.tasks_apart is tasks_apart
        assert sorted(tuple(sorted(cut)) for cut in batch.micro_batches) == sorted(micro_batches)


def test_one_teacher_is_cut_by_length_alone():
    groups = [([3, 8], "a"), ([8], "a"), ([3], "a")]
    _, ((_, batch),) = split(groups, num_ranks=1, max_tokens=20, padded=True)
    assert batch.micro_batches == ((1, 2), (0, 3))
    _, ((_, batch),) = split(groups, num_ranks=1, max_tokens=25)
    assert batch.micro_batches == ((1, 2, 0), (3,))


def test_a_rank_for_which_no_group_is_left_reads_the_first_one_and_counts_nothing_of_it():
    _, shares = split([([3, 3], "b"), ([5], "a")], num_ranks=3, max_tokens=8, padded=True)
    assert sorted(share for share, batch in shares if any(batch.micro_batches)) == [[0], [1]]
    ((share, batch),) = [pair for pair in shares if not any(pair[1].micro_batches)]
    assert share == [0]
    assert batch.teachers == ("b",)
    assert batch.micro_batches == ((), ())


def test_a_rank_with_fewer_micro_batches_splits_its_own_rather_than_compute_an_empty_one():
    groups = [([30], "a"), ([30], "a"), ([13, 13, 13], "b")]
    _, shares = split(groups, num_ranks=2, max_tokens=50)
    cuts = [batch.micro_batches for _, batch in shares]
    assert [len(cut) for cut in cuts] == [2, 2]
    assert all(sequences for cut in cuts for sequences in cut)


def test_ranks_are_balanced_by_a_cost_that_knows_of_attention():
    groups = [([94], "a"), *[([4], "a")] * 14]  # at this width the long one costs as much as 32 short ones
    _, shares = split(groups, num_ranks=2, max_tokens=100)
    assert sorted(len(share) for share, _ in shares) == [1, 14]
