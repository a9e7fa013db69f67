"""Part `loss`: time and memory of the objectives on the CPU, against full-logits versions and Liger's fused loss."""

import dataclasses
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from harness import Figure, at_most, run_cell
from loss_problem import Sizes, make_problem
from loss_variants import VARIANTS
from measure import Cost

_PART = "loss"
SIZES = Sizes(num_tokens=2048, vocab_size=151_936, student_size=256, teacher_size=512)
_GROWTH_TOKENS = 1024, 4096
_MAX_DIFFERENCE = 1e-5  # of loss and gradients, relative
_MAX_GROWTH = 0.1  # of the smaller peak; the full-logits version grows by 300 %


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The most that ours may take, as a fraction of another variant's; None: reported without a target."""

    time: float | None
    peak: float | None


LIMITS: dict[str, dict[str, Limits]] = {
    "full": {"naive": Limits(time=0.55, peak=1 / 20), "liger": Limits(time=0.55, peak=None)},
    "support": {"naive": Limits(time=1 / 20, peak=1 / 10)},
    "support_tail": {"naive": Limits(time=0.75, peak=1 / 12)},
    "sampled": {"naive": Limits(time=0.75, peak=1 / 12)},
}


def loss(sizes: Sizes = SIZES) -> Iterator[Figure]:
    """Yield the figures of the part as they are measured; about 10 minutes and 8 GB on two cores."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        largest = max(sizes.num_tokens, *_GROWTH_TOKENS)
        make_problem(dataclasses.replace(sizes, num_tokens=largest)).save(folder / "problem.pt")
        for objective in VARIANTS:
            yield from _objective(objective, sizes=sizes, folder=folder)
        yield from _growth(sizes, folder=folder)


def _objective(objective: str, *, sizes: Sizes, folder: Path) -> Iterator[Figure]:
    """Yield the cost of each variant, then how ours compares to the others, in result and in cost."""
    costs = {}
    for variant in VARIANTS[objective]:
        result = folder / f"{variant}.pt"
        costs[variant] = _run(objective, variant, num_tokens=sizes.num_tokens, folder=folder, result=result)
        yield from _raw(f"{objective}_{variant}", costs[variant])
    for other, limits in LIMITS[objective].items():
        yield from _differences(f"{objective}_vs_{other}", folder / "ours.pt", folder / f"{other}.pt")
        ours, theirs = costs["ours"], costs[other]
        yield _ratio(f"{objective}_time_vs_{other}", ours.time_ms / theirs.time_ms, limit=limits.time)
        yield _ratio(f"{objective}_peak_vs_{other}", ours.peak_mb / theirs.peak_mb, limit=limits.peak)


def _growth(sizes: Sizes, *, folder: Path) -> Iterator[Figure]:
    """Yield the peak of ours at two numbers of tokens, and how much of the difference is not [N,D] gradients."""
    fewer, more = _GROWTH_TOKENS
    peaks_mb = {}
    for num_tokens in _GROWTH_TOKENS:
        cost = _run("full", "ours", num_tokens=num_tokens, folder=folder, repeats=1)
        peaks_mb[num_tokens] = cost.peak_mb
        yield from _raw(f"full_ours_n{num_tokens}", cost)
    gradients_mb = (more - fewer) * sizes.student_size * sizes.dtype.itemsize / 1e6
    growth_mb = peaks_mb[more] - peaks_mb[fewer] - gradients_mb
    yield _ratio(f"full_peak_growth_n{fewer}_to_n{more}", growth_mb / peaks_mb[fewer], limit=_MAX_GROWTH)


def _run(
    objective: str, variant: str, *, num_tokens: int, folder: Path, repeats: int = 5, result: Path | None = None
) -> Cost:
    arguments = [objective, variant, "--problem", str(folder / "problem.pt"), "--num-tokens", str(num_tokens)]
    arguments += ["--repeats", str(repeats)] + (["--result", str(result)] if result else [])
    return run_cell("loss_cell.py", *arguments, extra_packages=variant == "liger")


def _raw(name: str, cost: Cost) -> Iterator[Figure]:
    yield Figure(part=_PART, name=f"{name}_time", value=cost.time_ms, unit="ms")
    yield Figure(part=_PART, name=f"{name}_peak", value=cost.peak_mb, unit="MB")


def _ratio(name: str, value: float, *, limit: float | None) -> Figure:
    if limit is None:
        return Figure(part=_PART, name=name, value=value, unit="ratio")
    return at_most(limit, part=_PART, name=name, value=value, unit="ratio")


def _differences(name: str, ours: Path, theirs: Path) -> Iterator[Figure]:
    """Yield the difference of the loss and of each gradient, relative to theirs, in the Euclidean norm."""
    results, references = torch.load(ours), torch.load(theirs)
    for key, reference in references.items():
        difference = ((results[key] - reference).norm() / reference.norm()).item()
        yield at_most(_MAX_DIFFERENCE, part=_PART, name=f"{name}_{key}_difference", value=difference, unit="relative")
