import pytest
from fakes import make_summary

from opd_ray.metrics import mean_reward, rollout_metrics, summarise


def test_rollout_metrics_speak_of_responses_not_of_groups():
    summaries = [make_summary(2, 4, rewards=[1, 0], num_truncated=1), make_summary(6, 8, rewards=[1, 1])]
    assert rollout_metrics(summaries) == {
        "rollout/num_responses": 4,
        "rollout/response_tokens": 20,
        "rollout/response_tokens_mean": 5,
        "rollout/response_tokens_max": 8,
        "rollout/truncated_fraction": 0.25,
        "rollout/repetition": 0.0,
        "time/generate_s_max": 0.5,
        "rollout/accuracy": 0.75,
    }


def test_the_accuracy_is_left_out_where_no_answers_were_given():
    assert "rollout/accuracy" not in rollout_metrics([make_summary(2, 4)])


def test_the_mean_reward_counts_only_the_prompts_that_have_answers():
    assert mean_reward("x", [make_summary(1, 1), make_summary(1, 1, rewards=[1, 0])]) == {"x": 0.5}
    assert mean_reward("x", [make_summary(1, 1)]) == {}
    assert mean_reward("x", []) == {}


def test_with_several_tasks_the_mean_reward_is_given_of_all_and_of_each():
    summaries = [
        make_summary(1, 1, rewards=[1, 0], task="sort"),
        make_summary(1, 1, rewards=[1, 1], task="copy"),
        make_summary(1, 1, rewards=[0, 0], task="sort"),
    ]
    assert mean_reward("x", summaries) == {"x": 0.5, "x_sort": 0.25, "x_copy": 1.0}
    assert rollout_metrics(summaries)["rollout/accuracy_copy"] == 1.0
    assert mean_reward("x", summaries[::2]) == {"x": 0.25}


def test_a_task_without_answers_has_no_mean_reward():
    assert mean_reward("x", [make_summary(1, rewards=[1]), make_summary(1, task="sort")]) == {"x": 1.0, "x_exact": 1.0}


def test_the_summary_has_before_and_after_of_every_task_and_no_average_over_samples():
    history = [
        {"step": 0, "eval/accuracy": 0.1, "eval/accuracy_sort": 0.2, "eval/accuracy_avg": 0.3, "eval/reverse_kl": 2.0},
        {
            "step": 2,
            "eval/accuracy": 0.5,
            "eval/accuracy_sort": 0.6,
            "eval/accuracy_copy_avg": 0.9,  # of a task of the name copy_avg
            "eval/accuracy_avg": 0.7,
            "eval/accuracy_avg_sort": 0.8,
            "eval/reverse_kl": 1.0,
            "eval/reverse_kl_sort": 0.5,
        },
    ]
    assert summarise(history, wall_s=1.0) == {
        "wall_s": 1.0,
        "steps": 2,
        "student_accuracy_before": 0.1,
        "student_accuracy_after": 0.5,
        "student_accuracy_before_sort": 0.2,
        "student_accuracy_after_sort": 0.6,
        "student_accuracy_before_copy_avg": 0.9,
        "student_accuracy_after_copy_avg": 0.9,
        "reverse_kl_before": 2.0,
        "reverse_kl_after": 1.0,
        "reverse_kl_before_sort": 0.5,
        "reverse_kl_after_sort": 0.5,
    }


def test_the_summary_takes_the_first_and_the_last_evaluation_and_the_median_step():
    history = [
        {"step": 0, "eval/accuracy": 0.1, "eval/reverse_kl": 2.0},
        {"step": 1, "perf/tokens_per_s": 100.0, "time/step_s": 9.0},
        {"step": 2, "perf/tokens_per_s": 300.0, "time/step_s": 1.0, "eval/accuracy": 0.5, "eval/reverse_kl": 1.0},
        {"step": 3, "perf/tokens_per_s": 200.0, "time/step_s": 2.0, "eval/accuracy": 0.4, "eval/reverse_kl": 0.5},
    ]
    assert summarise(history, wall_s=12.5) == {
        "wall_s": 12.5,
        "steps": 3,
        "tokens_per_s": 200,
        "step_s": 2,
        "student_accuracy_before": 0.1,
        "student_accuracy_after": 0.4,
        "reverse_kl_before": 2.0,
        "reverse_kl_after": 0.5,
    }


def test_the_summary_counts_the_groups_without_a_score_over_all_updates():
    history = [{"step": 0, "eval/bad_groups": 7.0}, *({"step": n, "teacher/bad_groups": float(n)} for n in (1, 2))]
    assert summarise(history, wall_s=1.0)["bad_groups"] == 3


def test_what_was_never_measured_is_left_out_of_the_summary():
    assert summarise([{"step": 0}], wall_s=1.0) == {"wall_s": 1.0, "steps": 0}


@pytest.mark.parametrize("num_steps", [1, 7])
def test_the_summary_counts_the_steps_of_a_resumed_run_from_its_first(num_steps: int):
    assert summarise([{"step": 0}, {"step": num_steps}], wall_s=1.0)["steps"] == num_steps
