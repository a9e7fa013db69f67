from dataclasses import replace
from pathlib import Path

import pytest
from config_files import compose_config
from fakes import make_prompt

from opd_ray.banner import closing_words, describe_run, describe_updates, result_rows, teacher_bytes_per_token
from opd_ray.config.schema import BatchMode
from opd_ray.data.models import Models
from opd_ray.data.prompts import PromptSets
from opd_ray.state import RunDir

MODELS = Models(tokenizer=None, vocab_size=14, teacher_hidden_size=128)
PROMPTS = PromptSets(train=[make_prompt()] * 1200, held_out=[make_prompt()] * 8, num_dropped=0, num_held_back=0)


def described(*overrides: str, num_dropped: int = 0, step: int = 0) -> str:
    config = compose_config("experiment=demo", *overrides)
    prompts = replace(PROMPTS, num_dropped=num_dropped)
    lines = describe_run(config, models=MODELS, prompts=prompts, run_dir=RunDir(path=Path("/runs/demo")), step=step)
    return "\n".join(lines)


def describe_multi(*overrides: str) -> list[str]:
    config = compose_config(*overrides)
    return describe_run(config, models=MODELS, prompts=PROMPTS, run_dir=RunDir(path=Path("/runs/multi")), step=0)


def test_the_banner_says_what_the_run_is_made_of():
    text = described("batch.num_prompts=32", "rollout.samples_per_prompt=4", "max_staleness=1")
    assert "student    runs/models/tiny-student" in text
    assert "teacher    runs/models/tiny-teacher" in text
    assert "prompts    1,200 to train on, 8 held out\n" in text
    assert "32 prompts x 4 samples = 128 trajectories an update, max_staleness 1" in text
    assert "1 rollout, 1 teacher, 2 learner (ZeRO-2, float32)" in text
    assert "steps      0 to 280\n" in text
    assert "run dir    /runs/demo" in text


def test_the_banner_says_what_workers_take_of_which_cluster(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    each = "rollout 1 x (0.5 CPU), teacher 1 x (0.5 CPU), learner 2 x (0.5 CPU)"
    assert f"placement  {each}; a cluster of this process; weights by object_store\n" in described()
    assert "; the cluster at head:6379; " in described("cluster.address=head:6379")
    on_gpus = described("cluster=gpus", "rollout.num_workers=3")
    assert "rollout 3 x (1 CPU, 1 GPU), teacher 1 x (1 CPU, 1 GPU)" in on_gpus
    assert "weights by nccl\n" in on_gpus


def test_the_banner_names_a_teacher_that_is_the_student_and_what_only_it_is_told():
    text = described("teacher=self", "teacher.self.update=ema", "teacher.context='{answer} {prompt}'")
    assert "teacher    runs/models/tiny-student, the student itself (ema, decay 0.99), with privileged context" in text
    assert "teacher    runs/models/tiny-student, the student itself (frozen)\n" in described("teacher=self")


def test_the_banner_names_the_recording_that_teaches():
    text = described("teacher=cache", "teacher.path=big", "teacher.cache.path=runs/demo/scores", "teacher.build=null")
    assert "scores     recorded in runs/demo/scores: 1,200 groups, which replace the training prompts\n" in text
    assert "recorded in" not in described()


def test_the_banner_counts_dropped_prompts_and_says_when_a_run_is_resumed():
    text = described(num_dropped=17, step=50)
    assert "8 held out, 17 dropped" in text
    assert "steps      50 to 280 (resumed)" in text


@pytest.mark.parametrize(
    ("overrides", "num_bytes"),
    [
        (["objective=sampled"], 4),
        (["objective=support", "objective.top_k=12"], 72),
        (["objective=support", "objective.top_k=12", "objective.support=student"], 72),
        (["objective=support", "objective.top_k=12", "objective.support=union"], 144),
        (["objective=support", "objective.top_k=12", "objective.include_sampled=true"], 78),
        (["objective=support", "objective.top_k=12", "objective.support=union", "objective.include_sampled=true"], 150),
        (["objective=support", "objective.top_k=12", "objective.tail=bucket"], 72),
        (["objective=support", "objective.top_k=12", "objective.tail=sampled_corrected"], 76),
        (["objective=support", "objective.top_k=12", "objective.weight.drift_rate=0.1"], 76),
        (["objective=sampled", "objective.weight.drift_rate=0.1"], 4),
        (["objective=sampled", "objective.baseline=kl", "teacher.dtype=bfloat16"], 256),
        (
            ["objective=sampled", "objective.baseline=kl", "objective.weight.drift_rate=1", "teacher.dtype=bfloat16"],
            260,
        ),
        (["objective=full", "objective.weight.drift_rate=0.1", "teacher.dtype=float32"], 516),
        (["objective=full", "teacher.dtype=float32"], 512),
        (["objective=full", "teacher.dtype=bfloat16"], 256),
    ],
)
def test_the_bytes_a_token_are_those_of_the_objectives_payload(overrides: list[str], num_bytes: int):
    assert teacher_bytes_per_token(compose_config("experiment=demo", *overrides), MODELS) == num_bytes


@pytest.mark.parametrize(("vocab_size", "num_bytes"), [(65_536, 72), (65_537, 74), (151_936, 76), (262_144, 78)])
def test_ids_of_more_than_16_bits_take_a_few_bytes_a_token_more(vocab_size: int, num_bytes: int):
    config = compose_config("experiment=demo", "objective=support", "objective.top_k=12")
    assert teacher_bytes_per_token(config, replace(MODELS, vocab_size=vocab_size)) == num_bytes


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["objective=sampled", "objective.discount=0.99"], "sampled, discount 0.99, baseline none; 4 bytes"),
        (["objective=sampled", "objective.baseline=group_mean"], "sampled, discount 0, baseline group_mean; 4 bytes"),
        (
            ["objective=support", "objective.top_k=12", "objective.support=union", "objective.tail=bucket"],
            "support, reverse_kl, union top-12, tail bucket; 144 bytes",
        ),
        (["objective=full", "objective.divergence=jsd", "teacher.dtype=float32"], "full, jsd; 512 bytes"),
        (["objective=full", "teacher.dtype=float32", "objective.chunk_tokens=1"], "full, reverse_kl; 512 bytes"),
    ],
)
def test_the_banner_says_what_is_minimised_and_what_the_teacher_sends(overrides: list[str], words: str):
    assert f"objective  {words} a token from the teacher\n" in described(*overrides)


TWO_TEACHERS = ("experiment=demo_multi", "teachers.copy.num_workers=3", "teachers.sort.path=models/sorter")


def test_the_banner_names_every_teacher_with_the_tasks_it_teaches_and_counts_their_workers():
    text = "\n".join(describe_multi(*TWO_TEACHERS))
    assert "teacher    models/sorter (sort)\nteacher    runs/models/tiny-teacher-copy (copy)\n" in text
    assert "1 rollout, 4 teacher, 2 learner" in text
    assert text.count("teacher    ") == 2


def test_the_banner_names_a_teacher_that_tasks_share_once():
    same = ("teachers.copy.path=runs/models/tiny-teacher", "teachers.copy.build=null", "teachers.sort.build=null")
    text = "\n".join(describe_multi("experiment=demo_multi", *same))
    assert "teacher    runs/models/tiny-teacher (sort, copy)\n" in text
    assert text.count("teacher    ") == 1


def batch_line(*overrides: str) -> str:
    train = [make_prompt(i, task=task) for task in ("sort", "copy") for i in range(600)]
    words = describe_run(
        compose_config("experiment=demo_multi", "batch.num_prompts=12", "rollout.samples_per_prompt=2", *overrides),
        models=MODELS,
        prompts=replace(PROMPTS, train=train),
        run_dir=RunDir(path=Path("/runs/multi")),
        step=0,
    )
    (line,) = [line for line in words if line.startswith("batch")]
    return line


def test_the_trajectories_of_an_update_are_counted_with_the_samples_of_each_task():
    own = "+tasks={sort: {samples_per_prompt: 5, share: 2}}"
    assert "12 prompts x 2 samples = 24 trajectories an update" in batch_line()
    assert "copy 4 prompts x 2, sort 8 prompts x 5 samples = 48 trajectories an update" in batch_line(own)
    words = batch_line(own, "batch.mode=sequential")
    assert "one task an update, trajectories: 24 of copy (12 prompts x 2), 60 of sort (12 prompts x 5)" in words


def test_the_banner_counts_the_optimizer_steps_and_the_most_tokens_of_a_batch():
    sizes = ("batch.num_prompts=32", "rollout.samples_per_prompt=4", "rollout.max_response_tokens=13")
    assert "           1 optimizer step, at most 1,664 response tokens\n" in described(*sizes)
    assert "2 optimizer steps of 16 prompts, at most" in described(*sizes, "learner.updates_per_batch=2")


def test_the_most_tokens_of_a_batch_are_counted_task_by_task():
    config = compose_config("experiment=demo_multi", "batch.num_prompts=12", "+tasks={sort: {samples_per_prompt: 5}}")
    assert "at most 546 response" in describe_updates(config, tasks=["copy", "sort"])  # 6 x 2 x 13 and 6 x 5 x 13
    config = replace(config, batch=replace(config.batch, mode=BatchMode.sequential))
    assert "at most 780 response" in describe_updates(config, tasks=["copy", "sort"])  # 12 x 5 x 13


def test_the_bytes_a_token_of_several_teachers_are_at_most_those_of_the_widest():
    for dtypes, num_bytes in ((("float32", "bfloat16"), 512), (("bfloat16", "float32"), 512), (("bfloat16",) * 2, 256)):
        given = (f"teachers.sort.dtype={dtypes[0]}", f"teachers.copy.dtype={dtypes[1]}")
        assert teacher_bytes_per_token(compose_config("experiment=demo_multi", *given), MODELS) == num_bytes


def test_the_result_shows_every_task_below_the_row_of_all():
    summary = {"teacher_accuracy": 0.5, "teacher_accuracy_sort": 0.25, "teacher_accuracy_copy": 0.75, "wall_s": 1.0}
    summary |= {"reverse_kl_before": 0.5, "reverse_kl_after": 0.25, "reverse_kl_after_copy": 0.125}
    rows = result_rows(summary, history=[], phases={})
    assert rows[:3] == [("teacher accuracy", "50.0%"), ("  of task copy", "75.0%"), ("  of task sort", "25.0%")]
    after = rows.index(("held-out reverse KL after", "0.2500 nats/token"))
    assert rows[after + 1] == ("  of task copy", "0.1250 nats/token")


def test_the_result_shows_what_was_measured_and_says_what_was_not():
    summary = {"student_accuracy_before": 0.125, "student_accuracy_after": 0.5, "wall_s": 61.25}
    rows = dict(result_rows(summary, history=[], phases={"train": 40.0}))
    assert rows["student accuracy before"] == "12.5%"
    assert rows["student accuracy after"] == "50.0%"
    assert rows["teacher accuracy"] == "not measured"
    assert rows["held-out reverse KL after"] == "not measured"
    assert "median step" not in rows
    assert "groups without a score" not in rows
    assert dict(result_rows({**summary, "bad_groups": 3.0}, history=[], phases={}))["groups without a score"] == "3"
    assert rows["seconds: train"] == "40.0"
    assert rows["seconds: whole run"] in ("61.2", "61.3")


def test_the_last_words_name_every_file_of_the_run():
    text = "\n".join(closing_words(RunDir(path=Path("/runs/demo"))))
    for name in ("/runs/demo", "metrics.jsonl", "samples.jsonl", "summary.json", "config.yaml", "export/", "logs/"):
        assert name in text
