"""Turns a dataset into the Parquet file of prompts that a run reads, and says what is in it.

  python -m opd_ray.prepare_data source=gsm8k.jsonl output=data/gsm8k.parquet prompt=question task=numeric
  python -m opd_ray.prepare_data source=openai/gsm8k subset=main output=data/gsm8k.parquet prompt=question \\
      task=numeric model=Qwen/Qwen3-0.6B
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from opd_ray.config.data import DataKind
from opd_ray.config.plain import read_command_line
from opd_ray.config.prepare import PrepareConfig
from opd_ray.data.models import open_tokenizer
from opd_ray.data.preparation import Prepared, prepare, source_rows, write
from opd_ray.data.prompts import token_ids
from opd_ray.data.records import read_records

_USER_ERROR = 2


def run(config: PrepareConfig) -> Table:
    """Write the file and return what is told of it. Raises ValueError for what a user can mend."""
    output = Path(config.output)
    if output.exists() and not config.overwrite:
        raise ValueError(f"output={output}: is there already; overwrite=true replaces it")
    prepared = prepare(source_rows(config), config)
    if not prepared.rows:
        raise ValueError(
            f"source={config.source}: none of {prepared.num_read} rows can be used ({prepared.num_empty} without a"
            f" prompt, {prepared.num_bad_answers} with an answer that cannot be compared: {prepared.first_bad_answer})"
        )
    write(prepared.rows, output)
    lengths = _lengths(config) if config.model else []
    return _table(config, prepared, lengths)


def main() -> None:
    """Prepare what the command line says."""
    try:
        config = read_command_line(PrepareConfig, sys.argv[1:], usage=__doc__ or "")
        table = run(config)
    except (ValueError, OSError) as fault:
        print(f"error: {str(fault).strip().partition(chr(10))[0]}", file=sys.stderr)
        raise SystemExit(_USER_ERROR) from None
    Console(highlight=False).print(table)
    print(f"to train on it: data=parquet data.path={Path(config.output).resolve()}")


def _lengths(config: PrepareConfig) -> list[int]:
    """Return the tokens of each prompt as the model would read it."""
    tokenizer = open_tokenizer("model", str(config.model))
    records = read_records(config.output, kind=DataKind.parquet, key="output")
    return [len(ids) for ids in token_ids(records, tokenizer=tokenizer)]


def _table(config: PrepareConfig, prepared: Prepared, lengths: Sequence[int]) -> Table:
    with_answer = sum(row.get("answer") is not None for row in prepared.rows)
    rows = [
        ("rows read", prepared.num_read),
        ("without a prompt", prepared.num_empty),
        ("duplicates left out", prepared.num_duplicates),
        ("  of these with another answer", prepared.num_conflicts),
        ("answers that cannot be compared", prepared.num_bad_answers),
        ("prompts written", len(prepared.rows)),
        ("  of these with an answer", with_answer),
    ]
    table = Table(title=config.output, show_header=False, title_justify="left")
    for name, number in rows:
        table.add_row(name, f"{number:,}")
    if prepared.first_bad_answer:
        table.add_row("  the first", prepared.first_bad_answer)
    if lengths:
        quantiles = {"median": 0.5, "95 %": 0.95, "99 %": 0.99}
        spread = ", ".join(f"{name} {np.quantile(lengths, q):,.0f}" for name, q in quantiles.items())
        table.add_row("prompt tokens", f"{min(lengths):,} to {max(lengths):,}, {spread}")
        above = sum(length > config.max_prompt_tokens for length in lengths)
        table.add_row(f"longer than max_prompt_tokens={config.max_prompt_tokens}", f"{above:,}")
    return table


if __name__ == "__main__":
    main()
