"""One cell of the loss benchmark, in a process of its own: prints its time and peak memory as a line of JSON."""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch
from loss_problem import Problem, Sizes, load_problem, make_problem
from loss_variants import VARIANTS
from measure import measure


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("objective", choices=VARIANTS)
    parser.add_argument("variant", help="naive, liger or ours")
    parser.add_argument("--problem", type=Path, required=True, help="file of the inputs")
    parser.add_argument("--num-tokens", type=int, required=True, help="leading tokens of the problem to use")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs, at least 1")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--result", type=Path, help="file to write the loss and its gradients to")
    return parser.parse_args()


def main() -> None:
    """Measure one variant's loss and backward pass; the two gradients that it must leave are not charged to it."""
    arguments = _parse()
    loss_of = VARIANTS[arguments.objective][arguments.variant]
    _warm_up(loss_of, device=arguments.device)
    problem = load_problem(arguments.problem, num_tokens=arguments.num_tokens, device=arguments.device)
    leaves = {"hidden": problem.hidden_ND, "head": problem.head_VD}
    losses: list[torch.Tensor] = []

    def reset() -> None:
        for leaf in leaves.values():
            leaf.grad = None

    def step() -> None:
        loss = loss_of(problem)
        loss.backward()
        losses.append(loss.detach())

    reset()
    gradient_bytes = sum(leaf.nbytes for leaf in leaves.values())
    cost = measure(step, reset=reset, repeats=arguments.repeats, device=arguments.device)
    cost = replace(cost, peak_mb=cost.peak_mb - gradient_bytes / 1e6)
    if arguments.result:
        gradients = {name: leaf.grad for name, leaf in leaves.items()}
        torch.save({"loss": losses[-1]} | gradients, arguments.result)
    print(json.dumps(asdict(cost)))


def _warm_up(loss_of: Callable[[Problem], torch.Tensor], *, device: str) -> None:
    """Run a tiny problem: what the first call loads and keeps (libraries, threads) is not the loss's memory."""
    tiny = make_problem(Sizes(num_tokens=8, vocab_size=256, student_size=32, teacher_size=64, device=device))
    tiny.hidden_ND.requires_grad_()
    tiny.head_VD.requires_grad_()
    loss_of(tiny).backward()


if __name__ == "__main__":
    main()
