from dataclasses import replace

import numpy as np
from fakes import Event, FakeQuarantine, fake_fleets, make_comparison, make_prompt

from opd_ray.controller import Fleets
from opd_ray.evaluation import FleetEvaluator, HeldOut, greedy_summaries
from opd_ray.protocol import Metrics, Payload, SamplingOptions, ScoreRequest

SAMPLING = SamplingOptions(
    num_samples=4, max_response_tokens=8, temperature=0.7, top_p=0.9, support_size=0, support_top_p=1.0
)
HIDDEN = ScoreRequest(payload=Payload.hidden)
HELD_OUT = HeldOut(prompts=[make_prompt(i) for i in range(3)], sampling={"exact": SAMPLING}, seed=5)


def test_evaluation_gives_accuracy_average_and_kl():
    fleets = fake_fleets([], rewards=[1.0, 0.0])
    metrics = FleetEvaluator(held_out=HELD_OUT, fleets=fleets, asked=HIDDEN, quarantine=FakeQuarantine()).evaluate(2)
    assert metrics.pop("time/eval_s") >= 0
    assert metrics == {"eval/reverse_kl": 0.75, "eval/bad_groups": 0, "eval/accuracy": 0.5, "eval/accuracy_avg": 0.5}


def test_accuracies_are_left_out_where_prompts_have_no_answers():
    metrics = FleetEvaluator(
        held_out=HELD_OUT, fleets=fake_fleets([]), asked=HIDDEN, quarantine=FakeQuarantine()
    ).evaluate(2)
    assert set(metrics) == {"eval/reverse_kl", "eval/bad_groups", "time/eval_s"}


def test_the_kl_is_left_out_where_there_is_no_teacher_to_ask():
    events: list[Event] = []
    fleets = fake_fleets(events, rewards=[1.0, 0.0])
    metrics = FleetEvaluator(held_out=HELD_OUT, fleets=fleets, asked=None, quarantine=FakeQuarantine()).evaluate(2)
    assert set(metrics) == {"eval/accuracy", "eval/accuracy_avg", "time/eval_s"}
    assert [event[0] for event in events] == ["generate", "generate"]


def test_the_kl_is_that_of_the_samples_scored_with_hidden_states_and_nothing_is_learned():
    events: list[Event] = []
    fleets = fake_fleets(events)
    FleetEvaluator(held_out=HELD_OUT, fleets=fleets, asked=HIDDEN, quarantine=FakeQuarantine()).evaluate(2)
    assert events == [("generate", 0, 2), ("generate", 0, 2), ("score", 0, HIDDEN), ("compare", 2)]
    (batch,) = fleets.learner.batches
    sampled = fleets.rollout.requests[3:]
    assert [group.summary for group in batch.groups] == sampled
    assert [score.score for score in batch.scores] == [("score of", group.group) for group in batch.groups]


def test_one_pass_is_greedy_and_the_other_is_sampled_as_in_training():
    fleets = fake_fleets([])
    FleetEvaluator(held_out=HELD_OUT, fleets=fleets, asked=HIDDEN, quarantine=FakeQuarantine()).evaluate(2)
    greedy, sampled = fleets.rollout.requests[:3], fleets.rollout.requests[3:]
    assert all(
        r.sampling == replace(SAMPLING, num_samples=1, temperature=0.0, top_p=1.0) and r.version == 2 for r in greedy
    )
    assert all(r.sampling == SAMPLING and r.version == 2 for r in sampled)
    assert [r.prompt.index for r in greedy] == [r.prompt.index for r in sampled] == [0, 1, 2]


def test_every_evaluation_uses_the_same_seeds_and_every_prompt_its_own():
    fleets = fake_fleets([])
    evaluator = FleetEvaluator(held_out=HELD_OUT, fleets=fleets, asked=HIDDEN, quarantine=FakeQuarantine())
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
    metrics = FleetEvaluator(held_out=held_out, fleets=fleets, asked=HIDDEN, quarantine=FakeQuarantine()).evaluate(2)
    names = {"eval/reverse_kl", "eval/accuracy", "eval/accuracy_avg"}
    assert set(metrics) == {"time/eval_s", "eval/bad_groups"} | {
        n + task for n in names for task in ("", "_exact", "_sort")
    }
    assert [r.sampling for r in fleets.rollout.requests[3:]] == [SAMPLING, other, other]
    assert [len(batch.groups) for batch in fleets.learner.batches] == [1, 2]  # no token is computed twice
    assert (metrics["eval/reverse_kl_exact"], metrics["eval/reverse_kl_sort"]) == (2.25, 1.125)
    assert metrics["eval/reverse_kl"] == (10 * 2.25 + 20 * 1.125) / 30  # the mean over all tokens
    assert [p.index for p in held_out.of_task({"sort"}).prompts] == [1, 2]


def test_what_is_known_of_student_and_teacher_is_a_metric_of_all_and_of_each_task_and_is_handed_on():
    prompts = [make_prompt(0), make_prompt(1, task="sort"), make_prompt(2, task="sort")]
    held_out = HeldOut(prompts=prompts, sampling={"exact": SAMPLING, "sort": SAMPLING}, seed=5)
    fleets, kept = fake_fleets([]), []
    fleets.learner.compare = lambda batch: make_comparison(
        kl_sum=1.0, num_tokens=10 * len(batch.groups), sums={"student_entropy": 10.0}
    )
    metrics = FleetEvaluator(
        held_out=held_out,
        fleets=fleets,
        asked=HIDDEN,
        quarantine=FakeQuarantine(),
        keep=lambda *given: kept.append(given),
    ).evaluate(2)
    found = [metrics[f"eval/student_entropy{task}"] for task in ("", "_exact", "_sort")]
    assert found == [20 / 30, 1.0, 0.5]
    ((version, by_task),) = kept
    assert (version, {task: compared.num_tokens for task, compared in by_task.items()}) == (
        2,
        {"exact": 10, "sort": 20},
    )


def test_a_task_of_which_the_teacher_knows_no_token_is_left_out():
    fleets, kept = fake_fleets([]), []
    fleets.learner.compare = lambda _: make_comparison(kl_sum=0.0, num_tokens=0)
    metrics = FleetEvaluator(
        held_out=HELD_OUT,
        fleets=fleets,
        asked=HIDDEN,
        quarantine=FakeQuarantine(),
        keep=lambda *given: kept.append(given),
    ).evaluate(2)
    assert set(metrics) == {"eval/bad_groups", "time/eval_s"}
    assert kept == []


def evaluate_with_bad(*bad_prompts: int, held_out: HeldOut = HELD_OUT) -> tuple[Metrics, Fleets, FakeQuarantine]:
    fleets, quarantine = fake_fleets([], rewards=[1.0, 0.0]), FakeQuarantine()
    fleets.teacher.fault = lambda index, _: f"NaN at {index}" if index in bad_prompts else ""
    evaluator = FleetEvaluator(held_out=held_out, fleets=fleets, asked=HIDDEN, quarantine=quarantine)
    return evaluator.evaluate(2), fleets, quarantine


def test_groups_without_a_score_are_left_out_of_the_kl_and_of_nothing_else_and_are_quarantined():
    metrics, fleets, quarantine = evaluate_with_bad(1)
    assert metrics["eval/bad_groups"] == 1
    assert metrics["eval/accuracy_avg"] == 0.5
    (batch,) = fleets.learner.batches
    assert [group.summary.prompt.index for group in batch.groups] == [0, 2]
    assert [score.score for score in batch.scores] == [("score of", group.group) for group in batch.groups]
    (bad,) = quarantine.groups
    assert (bad.step, bad.held_out, bad.teacher, bad.reason) == (2, True, "teacher", "NaN at 1")
    assert (bad.seed, bad.summary.prompt_index) == (HELD_OUT.requests(version=2)[1].seed, 1)
    assert quarantine.warnings == []


def test_without_any_score_there_is_no_kl_and_a_warning():
    metrics, fleets, quarantine = evaluate_with_bad(0, 1, 2)
    assert "eval/reverse_kl" not in metrics
    assert metrics["eval/bad_groups"] == 3
    assert metrics["eval/accuracy"] == 0.5
    assert fleets.learner.batches == []
    (warning,) = quarantine.warnings
    assert "version 2: none of 3 held-out groups could be scored" in warning
    assert quarantine.where in warning


def test_a_task_without_any_score_has_no_kl_while_the_others_keep_theirs():
    prompts = [make_prompt(0), make_prompt(1, task="sort"), make_prompt(2, task="sort")]
    held_out = HeldOut(prompts=prompts, sampling={"exact": SAMPLING, "sort": SAMPLING}, seed=5)
    metrics, _, quarantine = evaluate_with_bad(0, held_out=held_out)
    assert {name for name in metrics if "reverse_kl" in name} == {"eval/reverse_kl", "eval/reverse_kl_sort"}
    assert quarantine.warnings == []


def test_a_teacher_is_measured_on_what_it_reads_itself():
    own = replace(make_prompt(1), teacher_ids_P=np.array([7, 8, 9], dtype=np.int32))
    held_out = HeldOut(prompts=[make_prompt(0), own], sampling={}, seed=0).as_teacher_reads()
    assert [p.ids_P.tolist() for p in held_out.prompts] == [[1, 2], [7, 8, 9]]
    assert [p.index for p in held_out.prompts] == [0, 1]
