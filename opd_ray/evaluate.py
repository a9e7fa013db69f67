"""Measures a model on a task with vLLM: greedy, the mean of k samples, pass@k.

  python -m opd_ray.evaluate model=runs/demo task=sort
  python -m opd_ray.evaluate model=Qwen/Qwen3-0.6B task=reasoning_gym/gcd num_prompts=200 num_samples=8
  python -m opd_ray.evaluate model=runs/demo/export data=heldout.parquet task=math temperature=0.6 top_p=0.95

model is a Hugging Face folder or hub name, or the run dir of a finished run. task is a built-in task, a dataset of
reasoning-gym, or, with data, the verifier of records that name none: exact, numeric, choice, math.
"""

import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ray.exceptions import RayError
from rich.console import Console
from rich.table import Table
from transformers.utils.logging import disable_progress_bar

import workers
from opd_ray.config.evaluate import EvaluateConfig
from opd_ray.config.plain import read_command_line
from opd_ray.config.schema import RolloutConfig
from opd_ray.config.services import ClusterConfig
from opd_ray.console import RunConsole
from opd_ray.data.evaluation_prompts import evaluation_prompts, model_folder, response_tokens
from opd_ray.data.models import open_model
from opd_ray.evaluation import HeldOut
from opd_ray.evaluation_statistics import Estimate, estimates
from opd_ray.protocol import GroupSummary, SamplingOptions
from opd_ray.train import QUIET_ENV
from opd_ray.versions import versions
from workers.faults import describe

_FAILED, _USER_ERROR = 1, 2  # exit codes
_NOT_A_VERSION = -1  # any weights may serve
_CPU_ENGINE_ARGS = {"enforce_eager": True, "kv_cache_memory_bytes": 1 << 30}


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskResult:
    """What a model does on the prompts of one task, or on all."""

    task: str
    num_prompts: int
    estimates: Mapping[str, Estimate]
    response_tokens_mean: float  # of the samples
    truncated_fraction: float  # of the samples


def evaluate(config: EvaluateConfig, console: RunConsole, *, log_dir: Path) -> list[TaskResult]:
    """Return the results of all prompts and, with several tasks, of each. Raises ValueError, RayError."""
    folder = model_folder(config.model)
    opened = open_model("model", folder)
    prompts = evaluation_prompts(config, tokenizer=opened.tokenizer)
    console.say(f"{len(prompts)} prompts, {config.num_samples} samples each and the likeliest response")
    longest = max(len(p.ids_P) for p in prompts)
    max_response_tokens = response_tokens(config, prompt_tokens=longest, positions=_positions(config, opened.config))
    options = SamplingOptions(
        num_samples=config.num_samples,
        max_response_tokens=max_response_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        support_size=0,
        support_top_p=1.0,
    )
    held_out = HeldOut(prompts=prompts, sampling={p.task: options for p in prompts}, seed=config.seed)
    with (
        console.phase("start workers and evaluate"),
        workers.model_sampler(
            folder,
            rollout=_rollout(config),
            cluster=ClusterConfig(address=config.address, threads_per_worker=config.threads_per_worker),
            max_model_tokens=longest + max_response_tokens,
            log_dir=log_dir,
        ) as fleet,
    ):
        greedy = fleet.generate(held_out.greedy_requests(version=_NOT_A_VERSION))
        sampled = fleet.generate(held_out.requests(version=_NOT_A_VERSION))
        answers = list(zip(fleet.summaries(greedy), fleet.summaries(sampled), strict=True))
    tasks = sorted({p.task for p in prompts})
    of_task = {task: [pair for pair in answers if pair[0].task == task] for task in tasks}
    whole = [_result("all" if len(tasks) > 1 else tasks[0], answers)]
    return whole + ([_result(task, pairs) for task, pairs in of_task.items()] if len(tasks) > 1 else [])


def results_table(results: Sequence[TaskResult]) -> Table:
    """Return the results with their 95 % intervals, a block a task."""
    table = Table(title="Evaluation", title_justify="left")
    for heading in ("task", "measure", "value", "95 % interval"):
        table.add_column(heading, justify="right" if heading == "value" else "left")
    for result in results:
        table.add_row(result.task, "prompts", str(result.num_prompts), "")
        for name, e in result.estimates.items():
            table.add_row("", name, f"{e.value:.1%}", f"{e.low:.1%} to {e.high:.1%}")
        table.add_row("", "response tokens, mean", f"{result.response_tokens_mean:.1f}", "")
        table.add_row("", "truncated", f"{result.truncated_fraction:.1%}", "", end_section=True)
    return table


def main() -> None:
    """Evaluate what the command line says; print a table and write JSON."""
    os.environ.update(QUIET_ENV)
    disable_progress_bar()
    log_dir = Path(tempfile.mkdtemp(prefix="opd-ray-evaluate-"))
    try:
        config = read_command_line(EvaluateConfig, sys.argv[1:], usage=__doc__ or "")
        output = output_path(config)
        if output.is_dir():
            raise ValueError(f"output={output}: is a folder, expected the name of a JSON file")
        output.parent.mkdir(parents=True, exist_ok=True)
        results = evaluate(config, RunConsole(), log_dir=log_dir)
        output.write_text(json.dumps(_record(config, results), indent=2) + "\n")
    except RayError as fault:
        _fail(f"{describe(fault, log_dir=log_dir)}\nthe workers' logs lie in {log_dir}", _FAILED)
    except (ValueError, OSError) as fault:
        _fail(str(fault), _USER_ERROR)
    Console(highlight=False).print(results_table(results))
    print(f"{output}: these figures, with the settings and versions")


def output_path(config: EvaluateConfig) -> Path:
    """Return where the results go: `output`, else beside the model, or under runs/ for a hub name."""
    if config.output is not None:
        return Path(config.output)
    task = (config.task or Path(config.data or "data").stem).replace("/", "-")
    base = Path(config.model) if Path(config.model).is_dir() else Path("runs") / config.model.replace("/", "--")
    return base / f"evaluation-{task}.json"


def _positions(config: EvaluateConfig, model: Any) -> int | None:
    if "hf_overrides" in config.engine_args:
        return None
    return getattr(model, "max_position_embeddings", None)


def _rollout(config: EvaluateConfig) -> RolloutConfig:
    gpus, size = config.gpus_per_worker, config.tensor_parallel_size
    parallel = {"tensor_parallel_size": size, "distributed_executor_backend": "mp"} if size > 1 else {}
    return RolloutConfig(
        temperature=config.temperature,
        dtype=config.dtype,
        num_workers=config.num_workers,
        cpus_per_worker=config.cpus_per_worker,
        gpus_per_worker=gpus,
        engine_args={**({} if gpus else _CPU_ENGINE_ARGS), **parallel, **config.engine_args},
    )


def _result(task: str, answers: Sequence[tuple[GroupSummary, GroupSummary]]) -> TaskResult:
    lengths = [length for _, sampled in answers for length in sampled.response_lengths]
    return TaskResult(
        task=task,
        num_prompts=len(answers),
        estimates=estimates([greedy.rewards[0] for greedy, _ in answers], [sampled.rewards for _, sampled in answers]),
        response_tokens_mean=sum(lengths) / len(lengths),
        truncated_fraction=sum(sampled.num_truncated for _, sampled in answers) / len(lengths),
    )


def _record(config: EvaluateConfig, results: Sequence[TaskResult]) -> dict[str, Any]:
    settings = asdict(config)
    return {"settings": settings, "versions": versions(), "results": [asdict(result) for result in results]}


def _fail(message: str, code: int) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
