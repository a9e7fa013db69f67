from dataclasses import replace

from fakes import Event, fake_fleets, make_prompt

from opd_ray.evaluation import FleetEvaluator, HeldOut, greedy_summaries
from opd_ray.protocol import Payload, SamplingOptions, ScoreRequest

SAMPLING = SamplingOptions(
    num_samples=4, max_response_tokens=8, temperature=0.7, top_p=0.9, support_size=0, support_top_p=1.0
)
HIDDEN = ScoreRequest(payload=Payload.hidden)
HELD_OUT = HeldOut(prompts=[make_prompt(i) for i in range(3)], sampling={"exact": SAMPLING}, seed=5)


def test_evaluation_gives_accuracy_average_and_kl():
    fleets = fake_fleets([], rewards=[1.0, 0.0])
    metrics = FleetEvaluator(held_out=HELD_OUT, fleets=fleets, asked=HIDDEN).evaluate(2)
    assert metrics.pop("time/eval_s") >= 0
    assert metrics == {"eval/reverse_kl": 0.75, "eval/accuracy": 0.5, "eval/accuracy_avg": 0.5}


def test_accuracies_are_left_out_where_prompts_have_no_answers():
    metrics = FleetEvaluator(held_out=HELD_OUT, fleets=fake_fleets([]), asked=HIDDEN).evaluate(2)
    assert set(metrics) == {"eval/reverse_kl", "time/eval_s"}


def test_the_kl_is_left_out_where_there_is_no_teacher_to_ask():
    events: list[Event] = []
    fleets = fake_fleets(events, rewards=[1.0, 0.0])
    metrics = FleetEvaluator(held_out=HELD_OUT, fleets=fleets, asked=None).evaluate(2)
    assert set(metrics) == {"eval/accuracy", "eval/accuracy_avg", "time/eval_s"}
    assert [event[0] for event in events] == ["generate", "generate"]


def test_the_kl_is_that_of_the_samples_scored_with_hidden_states_and_nothing_is_learned():
    events: list[Event] = []
    fleets = fake_fleets(events)
    FleetEvaluator(held_out=HELD_OUT, fleets=fleets, asked=HIDDEN).evaluate(2)
    assert events == [("generate", 0, 2), ("generate", 0, 2), ("score", 0, HIDDEN), ("held_out_kl", 2)]
    (batch,) = fleets.learner.batches
    sampled = fleets.rollout.requests[3:]
    assert [group.summary for group in batch.groups] == sampled
    assert [score.score for score in batch.scores] == [("score of", group.group) for group in batch.groups]


def test_one_pass_is_greedy_and_the_other_is_sampled_as_in_training():
    fleets = fake_fleets([])
    FleetEvaluator(held_out=HELD_OUT, fleets=fleets, asked=HIDDEN).evaluate(2)
    greedy, sampled = fleets.rollout.requests[:3], fleets.rollout.requests[3:]
    assert all(
        r.sampling == replace(SAMPLING, num_samples=1, temperature=0.0, top_p=1.0) and r.version == 2 for r in greedy
    )
    assert all(r.sampling == SAMPLING and r.version == 2 for r in sampled)
    assert [r.prompt.index for r in greedy] == [r.prompt.index for r in sampled] == [0, 1, 2]


def test_every_evaluation_uses_the_same_seeds_and_every_prompt_its_own():
    fleets = fake_fleets([])
    evaluator = FleetEvaluator(held_out=HELD_OUT, fleets=fleets, asked=HIDDEN)
    evaluator.evaluate(0)
    evaluator.evaluate(9)
    seeds = [request.seed for request in fleets.rollout.requests]
    assert seeds[:6] == seeds[6:]
    assert len(set(seeds[3:6])) == 3
    assert seeds[3] != replace(HELD_OUT, seed=6).requests(version=0)[0].seed


def test_a_teachers_own_answers_are_greedy_and_ask_for_no_version():
    fleets = fake_fleets([], rewards=[1.0, 0.0])
    assert [s.rewards for s in greedy_summaries(HELD_OUT, fleets.rollout)] == [(1.0, 0.0)] * 3
    assert all(r.sampling.temperature == 0 and r.version == -1 for r in fleets.rollout.requests)


def test_with_several_tasks_each_has_its_own_numbers_and_its_own_sampling():
    other = replace(SAMPLING, max_response_tokens=3)
    prompts = [make_prompt(0), make_prompt(1, task="sort"), make_prompt(2, task="sort")]
    held_out = HeldOut(prompts=prompts, sampling={"exact": SAMPLING, "sort": other}, seed=5)
    fleets = fake_fleets([], rewards=[1.0, 0.0])
    metrics = FleetEvaluator(held_out=held_out, fleets=fleets, asked=HIDDEN).evaluate(2)
    names = {"eval/reverse_kl", "eval/accuracy", "eval/accuracy_avg"}
    assert set(metrics) == {"time/eval_s"} | {n + task for n in names for task in ("", "_exact", "_sort")}
    assert [r.sampling for r in fleets.rollout.requests[3:]] == [SAMPLING, other, other]
    assert [len(batch.groups) for batch in fleets.learner.batches] == [3, 1, 2]
    assert [p.index for p in held_out.of_task({"sort"}).prompts] == [1, 2]
