"""The configuration of what is trained of the student, where that is not all of its weights."""

from dataclasses import dataclass, field

ALL_LINEAR = "all-linear"  # peft's name for all linear layers but the output head
MAX_RANK = 512  # the highest that vLLM's kernels take


@dataclass(kw_only=True, slots=True)
class LoraConfig:
    """Low-rank adapters: a frozen matrix W becomes W + (alpha / rank) B A; A and B alone are trained and published."""

    rank: int = 0  # of B A; 0: no adapters, all weights are trained
    alpha: float = 32.0  # held fixed, the best learning rate hardly depends on the rank
    # modules by the last part of their names, such as [q_proj, v_proj]; never the head or the embedding
    target_modules: list[str] = field(default_factory=lambda: [ALL_LINEAR])
    seed: int = 0  # of the matrices A; B starts as 0, so that version 0 is the student as it was loaded

    def __post_init__(self) -> None:
        if not 0 <= self.rank <= MAX_RANK:
            raise ValueError(
                f"student.lora.rank={self.rank}: expected an integer from 1 to {MAX_RANK}, or 0 for no adapters"
            )
        if not self.alpha > 0:
            raise ValueError(f"student.lora.alpha={self.alpha}: expected a number above 0")
        if not self.target_modules or (ALL_LINEAR in self.target_modules and len(self.target_modules) > 1):
            raise ValueError(
                f"student.lora.target_modules={self.target_modules}: expected [{ALL_LINEAR}], or names of modules such"
                " as [q_proj,v_proj]"
            )

    @property
    def wanted(self) -> "LoraConfig | None":
        """Return the adapters to train, or None where all weights are."""
        return self if self.rank else None
