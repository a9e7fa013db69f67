"""The cell that gives the exact reverse KL of students on their own responses to held-out prompts, all in one way."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

_SEED = 0


def main(folder: Path, max_response_tokens: int, students: list[str]) -> None:
    """Print the mean over response tokens of KL(student || teacher), in nats, of each student, a list."""
    prompts = [json.loads(line)["prompt"] for line in (folder / "held_out.jsonl").read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(folder / "student", padding_side="left")
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
    teacher = _load(folder / "teacher")
    kl = [_reverse_kl(_load(folder / path), teacher, inputs, num_tokens=max_response_tokens) for path in students]
    print(json.dumps(kl))


def _load(path: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@torch.no_grad()
def _reverse_kl(student: PreTrainedModel, teacher: PreTrainedModel, inputs: Any, *, num_tokens: int) -> float:
    torch.manual_seed(_SEED)
    end = teacher.generation_config.eos_token_id  # as the folder was built
    ids_BT = student.generate(**inputs, eos_token_id=end, max_new_tokens=num_tokens, do_sample=True, top_k=0)
    num_prompt = inputs["input_ids"].shape[1]
    ends = torch.isin(ids_BT[:, num_prompt:], torch.tensor(end))
    is_response_BT = ends.cumsum(1) - ends.int() == 0  # up to the first end, with it
    mask_BT = torch.cat([inputs["attention_mask"], is_response_BT.long()], dim=1)
    positions_BT = (mask_BT.cumsum(1) - 1).clamp(min=0)
    logprobs = [
        model(input_ids=ids_BT, attention_mask=mask_BT, position_ids=positions_BT)
        .logits[:, num_prompt - 1 : -1][is_response_BT]
        .log_softmax(-1)
        for model in (student, teacher)
    ]
    p_NV = logprobs[0].exp()
    return float((p_NV * (logprobs[0] - logprobs[1])).sum(-1).mean())


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
