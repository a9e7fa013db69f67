"""The configuration of `python -m opd_ray.prepare_data`."""

from dataclasses import dataclass

from opd_ray.config.plain import key


@dataclass(kw_only=True, slots=True)
class PrepareConfig:
    """One dataset to turn into prompts."""

    source: str = key(..., words="JSONL, JSON, CSV or Parquet file, or a dataset's name on the Hugging Face hub")
    output: str = key(..., words="Parquet file to write")
    prompt: str = key("prompt", words="column of the prompt: text, or a list of chat messages")
    answer: str | None = key("answer", words="column of the reference answer; null: there is none")
    task: str | None = key(None, words="task of every prompt, the verifier that marks it: exact, numeric, choice, math")
    template: str = key("{prompt}", words="text of the prompt, with {prompt} for the column's")
    chat: bool = key(True, words="write text prompts as chat messages of a user")
    split: str = key("train", words="of a hub dataset")
    subset: str | None = key(None, words="of a hub dataset: its folder or configuration")
    model: str | None = key(None, words="model whose chat template and tokenizer prompts are measured with")
    max_prompt_tokens: int = key(1024, words="with model: prompts above it are counted")
    overwrite: bool = key(False, words="replace the output if it is there")

    def __post_init__(self) -> None:
        if not self.output.endswith(".parquet"):
            raise ValueError(f"output={self.output}: expected a name that ends in .parquet")
        if "{prompt}" not in self.template:
            raise ValueError(f"template={self.template!r}: expected {{prompt}} in it")
