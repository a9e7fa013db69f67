"""The cell that runs TRL's `DistillationTrainer` for the end-to-end benchmark: local teacher, exact reverse KL, CPU."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DistillationConfig, DistillationTrainer


class _Clock(TrainerCallback):
    """Keeps the time at which each update ends."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(time.perf_counter())


class _Counting(DistillationTrainer):
    """Counts the response tokens that it trains on."""

    num_tokens: list[int]

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        batch = super()._generate_and_score_completions(inputs)
        self.num_tokens.append(int(batch["completion_mask"].sum()))
        return batch


def main(folder: Path, settings: dict[str, Any]) -> None:
    """Train, write the student to `trl`, and print the seconds and the response tokens of each update."""
    prompts = [json.loads(line)["prompt"] for line in (folder / "train.jsonl").read_text().splitlines()]
    student = AutoModelForCausalLM.from_pretrained(folder / "student", dtype=torch.float32)
    teacher = AutoModelForCausalLM.from_pretrained(folder / "teacher", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder / "student", padding_side="left")
    clock = _Clock()
    trainer = _Counting(
        model=student,
        teacher_model=teacher,
        args=DistillationConfig(
            output_dir=str(folder / "trl_output"),
            per_device_train_batch_size=settings["num_prompts"],
            max_steps=settings["num_updates"],
            max_completion_length=settings["max_response_tokens"],
            learning_rate=settings["lr"],
            lr_scheduler_type="constant",
            adam_beta2=settings["beta2"],
            weight_decay=0.0,
            max_grad_norm=1.0,
            beta=1.0,
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
            logging_steps=10_000,
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer,
        callbacks=[clock],
    )
    trainer.num_tokens = []
    start = time.perf_counter()
    trainer.train()
    student.save_pretrained(folder / "trl")
    seconds = [end - begin for begin, end in zip([start, *clock.ends[:-1]], clock.ends, strict=True)]
    print(json.dumps({"seconds": seconds, "num_tokens": trainer.num_tokens}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
