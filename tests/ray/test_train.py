"""Whole runs on the real stack: Ray, vLLM rollouts, vLLM teacher, object store, DeepSpeed."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import read_lines, run_train
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm import LLM, SamplingParams

from opd_ray.pipeline_log import read_windows
from opd_ray.report import write_report

pytestmark = pytest.mark.ray

Overrides = Callable[..., list[str]]


def _slow(*overrides: str) -> Any:
    return pytest.param(list(overrides), marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "objective",
    [
        _slow("objective=full"),
        ["objective=support"],
        _slow("objective=sampled", "objective.discount=0.5"),
        _slow("objective=support", "objective.support=student", "rollout.temperature=0.8"),
        _slow("objective=support", "objective.support=union", "objective.tail=bucket", "objective.divergence=jsd"),
        _slow("objective=sampled", "objective.baseline=kl", 'objective.equivalent_tokens=[["<eos>","<pad>"]]'),
    ],
    ids=lambda overrides: " ".join(o.removeprefix("objective.") for o in overrides),
)
def test_a_teacher_that_is_the_student_gives_kl_zero_through_the_whole_stack(
    overrides: Overrides, tmp_path: Path, model_folder: Any, objective: list[str]
) -> None:
    folder = model_folder(seed=1, tied=objective == ["objective=full"])
    summary, _ = run_train(
        overrides(
            f"student.path={folder}",
            f"teacher.path={folder}",
            *objective,
            "objective.top_k=8",
            # A step that small leaves the student the teacher, so that the second batch must give 0 as well.
            "learner.lr=1e-9",
        )
    )
    assert summary["reverse_kl_before"] < 1e-4
    assert summary["reverse_kl_after"] < 1e-4
    evaluated = [m for m in read_lines(tmp_path / "runs" / "test" / "metrics.jsonl") if "eval/reverse_kl" in m]
    for metrics in evaluated:
        assert max(abs(metrics[f"eval/logprob_gap_p{q}"]) for q in (10, 50, 90)) < 1e-4
        assert metrics["eval/student_entropy"] == pytest.approx(metrics["eval/teacher_entropy"], abs=1e-4)
        assert metrics["eval/topk_overlap"] > 0.99
        assert metrics["eval/student_mass_in_teacher_topk"] == pytest.approx(
            metrics["eval/teacher_mass_in_student_topk"], abs=1e-4
        )
    steps = [m for m in read_lines(tmp_path / "runs" / "test" / "metrics.jsonl") if m["step"] > 0]
    assert len(steps) == 2
    for metrics in steps:
        (estimate,) = (n for n in metrics if n.startswith(("distill/reverse_kl_", "distill/jsd_")))
        assert abs(metrics[estimate]) < 1e-4
        assert metrics["rollout/logprob_gap_max"] < 1e-4


def _teacher(folder: str) -> str:
    return f"{{path: '{folder}', dtype: float32, cpus_per_worker: 0.25, engine_args: '${{rollout.engine_args}}'}}"


@pytest.fixture
def two_teachers(overrides: Overrides, model_folder: Any) -> Overrides:
    """Return a function that gives the overrides of a run whose teacher of `sort` is the student itself, while that of
    `copy` is another model of another width; the student stays as it is. Only groups and heads at the right teacher
    give a divergence of 0 on the one task and not on the other."""
    student, other = model_folder(seed=1), model_folder(seed=2, hidden_size=128)

    def build(*more: str) -> list[str]:
        return overrides(
            f"student.path={student}",
            f"+teachers={{sort: {_teacher(student)}, copy: {_teacher(other)}}}",
            "data.tasks=[sort,copy]",
            "data.max_prompt_tokens=25",
            "learner.lr=1e-9",
            "eval_every=1",
            *more,
        )

    return build


@pytest.mark.slow
def test_a_mixed_batch_is_scored_by_the_teachers_of_its_tasks_each_with_its_own_head(
    two_teachers: Overrides, tmp_path: Path
) -> None:
    summary, screen = run_train(two_teachers("+tasks={copy: {loss_weight: 0}}"))
    run_dir = tmp_path / "runs" / "test"
    lines = read_lines(run_dir / "metrics.jsonl")
    assert len(lines) == 3
    for metrics in lines:
        assert metrics["eval/reverse_kl_sort"] < 1e-4
        assert metrics["eval/reverse_kl_copy"] > 0.1
        assert metrics["eval/reverse_kl_sort"] < metrics["eval/reverse_kl"] < metrics["eval/reverse_kl_copy"]
        assert {"eval/accuracy_sort", "eval/accuracy_avg_copy"} <= metrics.keys()
    for metrics in lines[1:]:
        assert metrics["distill/reverse_kl_full"] > 0.05
        assert metrics["train/grad_norm"] < 1e-3  # of `sort` alone: the weight of `copy` is 0
        assert metrics["rollout/logprob_gap_max"] < 1e-4
        assert all(math.isfinite(value) for value in metrics.values())
    assert summary["reverse_kl_after_copy"] > 0.1
    assert "  of task copy" in screen
    logs = {path.name for path in (run_dir / "logs").iterdir()}
    assert {"teacher-sort-0.log", "teacher-copy-0.log"} <= logs
    assert "teacher-0.log" not in logs


@pytest.mark.slow
def test_sequential_batches_are_of_one_task_with_its_own_sampling_and_teacher(
    two_teachers: Overrides, tmp_path: Path
) -> None:
    options = "+tasks={copy: {samples_per_prompt: 3, max_response_tokens: 4}, sort: {max_response_tokens: 9}}"
    run_train(two_teachers("batch.mode=sequential", options, "objective=support", "objective.top_k=8"))
    copy, sort = read_lines(tmp_path / "runs" / "test" / "metrics.jsonl")[1:]
    assert (copy["rollout/num_responses"], sort["rollout/num_responses"]) == (4 * 3, 4 * 2)
    assert copy["rollout/response_tokens_max"] <= 4 < sort["rollout/response_tokens_max"] <= 9
    assert copy["distill/reverse_kl_support"] > 0.05
    assert copy["train/grad_norm"] > 0.1
    assert abs(sort["distill/reverse_kl_support"]) < 1e-4
    assert sort["train/grad_norm"] < 1e-3


def test_a_run_leaves_what_the_readme_lists_and_a_student_that_others_load(
    overrides: Overrides, tmp_path: Path, model_folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    summary, screen = run_train(
        overrides(
            f"student.path={model_folder(seed=1, tied=True)}", "tracking=wandb", "teacher.evaluate=true", "eval_every=1"
        )
    )
    run_dir = tmp_path / "runs" / "test"

    steps = read_lines(run_dir / "metrics.jsonl")
    assert [m["step"] for m in steps] == [0, 1, 2]
    assert all(m["rollout/logprob_gap_max"] < 1e-4 for m in steps[1:])
    assert all("eval/reverse_kl" in m and "eval/accuracy_avg" in m for m in steps)
    assert steps[1]["teacher/bytes_per_token"] == 4 * 128
    written = json.loads((run_dir / "summary.json").read_text())
    assert written == dict(summary)
    assert {"wall_s", "steps", "teacher_accuracy", "student_accuracy_before", "reverse_kl_after"} <= written.keys()
    assert len(read_lines(run_dir / "samples.jsonl")) == 2 * 2
    traces = read_lines(run_dir / "traces.jsonl")
    assert [line["step"] for line in traces] == [0, 1, 2]
    for line in traces:
        told = line["tasks"]["sort"]
        gaps = [q - p for p, q in zip(told["traces"][0]["student"], told["traces"][0]["teacher"], strict=True)]
        assert len(told["traces"][0]["tokens"]) == len(gaps) == len(told["traces"][0]["teacher_top"])
        assert max(map(abs, gaps)) > 0.01
        assert "+" in told["traces"][0]["prompt"]
    assert "Student and teacher, token by token" in write_report(run_dir).read_text()
    assert "num_prompts: 4" in (run_dir / "config.yaml").read_text()
    assert {p.name for p in (run_dir / "logs").iterdir()} >= {"rollout-0.log", "teacher-0.log", "learner-1.log"}
    assert list((run_dir / "wandb").glob("offline-run-*"))
    assert "held-out reverse KL after" in screen
    assert "WARNING" not in screen

    tokenizer = AutoTokenizer.from_pretrained(run_dir / "export")
    prompt = tokenizer("1+2=", return_tensors="pt")
    by_transformers = AutoModelForCausalLM.from_pretrained(run_dir / "export").generate(
        **prompt, max_new_tokens=6, do_sample=False
    )[0, prompt["input_ids"].shape[1] :]
    llm = LLM(
        str(run_dir / "export"),
        dtype="float32",
        enforce_eager=True,
        max_model_len=32,
        distributed_executor_backend="uni",
        kv_cache_memory_bytes=64 << 20,
    )
    (by_vllm,) = llm.generate("1+2=", SamplingParams(temperature=0, max_tokens=6), use_tqdm=False)
    assert by_transformers.tolist() == list(by_vllm.outputs[0].token_ids)


@pytest.mark.slow
def test_one_batch_ahead_over_two_workers_trains_on_tokens_one_version_old(
    overrides: Overrides, tmp_path: Path
) -> None:
    data = tmp_path / "prompts.parquet"
    rows = [{"prompt": f"{i % 10}+1=", "answer": "1", "task": "numeric"} for i in range(12)]
    pq.write_table(pa.Table.from_pylist(rows), data)
    run_train(
        overrides(
            "max_staleness=1",
            "num_steps=4",
            "data=parquet",
            f"data.path={data}",
            "data.task=null",
            "objective=sampled",
            "objective.discount=0.5",
            "rollout.num_workers=2",
            "rollout.cpus_per_worker=0.25",
        )
    )
    steps = read_lines(tmp_path / "runs" / "test" / "metrics.jsonl")[1:]
    assert len(steps) == 4
    assert steps[0]["train/token_age_mean"] == 0
    assert all(0 <= m["train/token_age_mean"] <= 1 for m in steps)
    assert max(m["train/token_age_mean"] for m in steps) > 0
    assert all(m["rollout/logprob_gap_max"] < 1e-4 for m in steps if "rollout/logprob_gap_max" in m)
    assert all("rollout/accuracy" in m for m in steps)
    pools = ("rollout", "teacher", "learner")
    used = {pool: [m[f"perf/{pool}_utilisation"] for m in steps[1:]] for pool in pools}  # of the step before
    assert all(0 <= min(values) <= max(values) <= 1 for values in used.values())
    assert all(sum(values) > 0 for values in used.values())  # two workers may be done early: idle in one of the steps
    assert not any(f"perf/{pool}_utilisation" in steps[0] for pool in pools)
    windows = read_windows(tmp_path / "runs" / "test", last=9)
    assert [window.step for window in windows] == [1, 2, 3]
    lanes = {(span.lane, span.phase) for window in windows for span in window.spans}
    assert lanes >= {("rollout-0", "generate"), ("rollout-1", "generate"), ("teacher-0", "score"), ("learner", "learn")}


@pytest.mark.slow
def test_a_few_updates_bring_the_student_nearer_to_its_teacher(overrides: Overrides) -> None:
    summary, _ = run_train(overrides("num_steps=25", "batch.num_prompts=16", "learner.lr=3e-3"))
    assert summary["reverse_kl_after"] < 0.5 * summary["reverse_kl_before"]


@pytest.mark.slow
def test_a_resumed_run_goes_on_from_its_checkpoint(overrides: Overrides, tmp_path: Path) -> None:
    run_dir = tmp_path / "runs" / "test"
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{i}+{i}="}) + "\n" for i in range(10)))
    more = ["data=jsonl", f"data.path={data}", "data.task=null", "objective=support", "objective.top_k=4"]
    run_train(overrides(*more, "save_every=2"))
    first = read_lines(run_dir / "metrics.jsonl")
    assert (run_dir / "checkpoints" / "step-000002" / "MANIFEST.json").exists()

    run_train(overrides(*more, "save_every=2", "num_steps=3", "resume=auto"))
    steps = read_lines(run_dir / "metrics.jsonl")
    assert steps[:3] == first
    assert [m["step"] for m in steps] == [0, 1, 2, 3]
    assert "eval/accuracy" not in steps[-1]  # the file gives no answers
    assert steps[-1]["rollout/logprob_gap_max"] < 1e-4
