"""What several tests of the real stack share: groups by hand, and the truth by plain transformers."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from rich.console import Console
from transformers import AutoModelForCausalLM

from opd_ray.config.load import load, register_schema
from opd_ray.config.schema import Config
from opd_ray.console import RunConsole
from opd_ray.protocol import GenerateRequest, Metrics, Prompt, SamplingOptions, TrajectoryGroup
from opd_ray.train import train
from workers.rollout.turns import Turn
from workers.rollout.worker import RolloutWorker
from workers.weights import published

CONFIG_DIR = Path(__file__).resolve().parents[2] / "configs"


def compose_config(overrides: list[str]) -> Config:
    """Return the validated configuration of a command line."""
    register_schema()
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        return load(compose("train", overrides=overrides))


def run_train(overrides: list[str], *, width: int = 200) -> tuple[Metrics, str]:
    """Run a command line to its end; return the summary and what a person saw."""
    screen = io.StringIO()
    summary = train(compose_config(overrides), RunConsole(Console(file=screen, width=width)))
    return summary, screen.getvalue()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a JSON lines file; of one that is not there none."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def reference_model(folder: str) -> torch.nn.Module:
    """Return the model in plain transformers, float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def reference_logprobs(model: torch.nn.Module, group: TrajectoryGroup) -> torch.Tensor:
    """Return log-probs [N,V] at every response token, from the unbatched model."""
    rows = []
    for start, end in zip(group.offsets[:-1], group.offsets[1:], strict=True):
        ids = np.concatenate([group.prompt_ids, group.response_ids[start:end]]).astype(np.int64)
        logits = model(torch.from_numpy(ids)[None]).logits[0]
        first = len(group.prompt_ids) - 1
        rows.append(logits[first : first + end - start].log_softmax(-1))
    return torch.cat(rows)


def sampled(logprobs_NV: torch.Tensor, group: TrajectoryGroup) -> torch.Tensor:
    """Return the log-probs [N] of the sampled tokens."""
    ids = torch.from_numpy(group.response_ids.astype(np.int64))
    return logprobs_NV.gather(1, ids[:, None]).squeeze(1)


def make_prompt(*ids: int, answer: str | None = None) -> Prompt:
    """Return a prompt of given tokens."""
    return Prompt(ids_P=np.array(ids, dtype=np.int32), index=0, task="exact", verifier="exact", answer=answer)


def make_request(*ids: int, version: int, seed: int = 0, answer: str | None = None, **sampling: Any) -> GenerateRequest:
    """Return a request for samples behind given tokens, from the whole distribution unless told otherwise."""
    options: dict[str, Any] = {"num_samples": 2, "max_response_tokens": 12, "temperature": 1.0, "top_p": 1.0}
    options |= {"support_size": 0, "support_top_p": 1.0, **sampling}
    return GenerateRequest(
        prompt=make_prompt(*ids, answer=answer),
        sampling=SamplingOptions(**options),
        version=version,
        seed=seed,
        step=0,
        position=0,
    )


async def load_version(
    worker: RolloutWorker, model: torch.nn.Module, version: int, *, turn: Turn | None = None
) -> None:
    """Have a rollout worker take a model's weights as a version of the student."""
    await worker.prepare(*published(model.named_parameters(), version=version), turn)
    await worker.commit(version)


def make_group(prompt: list[int], *responses: list[int], version: int = 0) -> TrajectoryGroup:
    """Return a group of given tokens, with log-probs of zero."""
    lengths = [len(r) for r in responses]
    num_tokens = sum(lengths)
    return TrajectoryGroup(
        prompt_ids=np.array(prompt, dtype=np.int32),
        response_ids=np.concatenate([np.array(r, dtype=np.int32) for r in responses]),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32),
        sampled_logprobs=np.zeros(num_tokens, dtype=np.float32),
        token_versions=np.full(num_tokens, version, dtype=np.int32),
        loss_mask=np.ones(num_tokens, dtype=np.bool_),
        support_ids=np.empty((num_tokens, 0), dtype=np.int32),
        rewards=np.empty(0, dtype=np.float32),
        finish=np.zeros(len(responses), dtype=np.int8),
        prompt_index=0,
        task="exact",
        seed=0,
    )
