"""Classes of token ids that mean the same, such as several end tokens: each class counts as one outcome.

Both models' probabilities are summed over a class, so the divergence compares what they mean and not which of the
equivalent ids they prefer. Suffixes: N tokens, V vocabulary or columns of logits, K support, C ids of a class.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from opd_ray.objectives.divergences import ABSENT
from opd_ray.objectives.rows import RowLoss, RowLosses


@dataclass(frozen=True, slots=True, kw_only=True)
class Equivalence:
    """Disjoint classes of ids; the first id of a class stands for it."""

    classes: tuple[Tensor, ...]  # each [C] int64, C >= 2

    @staticmethod
    def of(ids: Sequence[Sequence[int]], *, device: torch.device, vocab_size: int | None = None) -> "Equivalence":
        """Build from lists of ids. Raises ValueError when an id is in two classes, a class has fewer than two, or an id
        has no row among the vocab_size that both models have."""
        flat = [id_ for class_ in ids for id_ in class_]
        if len(set(flat)) < len(flat) or any(len(class_) < 2 for class_ in ids):
            raise ValueError(
                f"objective.equivalent_tokens has ids {list(map(list, ids))}: expected disjoint classes of 2+"
            )
        if vocab_size is not None and max(flat, default=-1) >= vocab_size:
            raise ValueError(
                f"objective.equivalent_tokens has the id {max(flat)}: expected ids below {vocab_size}, the tokens that"
                " student and teacher share"
            )
        return Equivalence(classes=tuple(torch.tensor(class_, dtype=torch.int64, device=device) for class_ in ids))

    def canonical(self, ids: Tensor) -> Tensor:
        """Return ids, any shape, with every member of a class replaced by its first."""
        for class_C in self.classes:
            ids = torch.where(torch.isin(ids, class_C), class_C[0], ids)
        return ids

    def merge(self, logits_NV: Tensor) -> Tensor:
        """Move each class's whole mass to its first id, in place; the normaliser of a row stays the same."""
        for class_C in self.classes:
            merged_N = logits_NV[:, class_C].logsumexp(-1)
            logits_NV[:, class_C] = ABSENT
            logits_NV[:, class_C[0]] = merged_N
        return logits_NV

    def without_duplicates(self, ids_NK: Tensor) -> Tensor:
        """Return the canonical ids of a support, with -1 at all but the first of equal ids in a row."""
        if not self.classes:
            return ids_NK
        ids_NK = self.canonical(ids_NK)
        same_NKK = (ids_NK[:, :, None] == ids_NK[:, None, :]).tril(diagonal=-1)
        return ids_NK.masked_fill(same_NKK.any(-1), -1)


def merging(row_loss: RowLoss, equivalence: Equivalence, *, ids_N: Tensor) -> RowLoss:
    """Return the row loss on merged logits of the whole vocabulary, its slopes handed down to the members of a class.

    d loss / d z_v = slope of the class * p_v / p_class. log p(y_t) stays that of the sampled id itself.
    """
    if not equivalence.classes:
        return row_loss

    def merged(rows: slice, logits_NV: Tensor, wanted: bool) -> RowLosses:
        ids_N1 = ids_N[rows][:, None]
        own_N = logits_NV.gather(1, ids_N1).squeeze(1)
        members = [logits_NV[:, class_C].softmax(-1) for class_C in equivalence.classes]
        logits_NV = equivalence.merge(logits_NV)
        share_N = own_N - logits_NV.gather(1, equivalence.canonical(ids_N1)).squeeze(1)
        part = row_loss(rows, logits_NV, wanted)
        if part.slope_NV is not None:
            for class_C, member_NC in zip(equivalence.classes, members, strict=True):
                part.slope_NV[:, class_C] = part.slope_NV[:, class_C[:1]] * member_NC
        return part if part.logprobs_N is None else replace(part, logprobs_N=part.logprobs_N + share_N)

    return merged


def gathering(row_loss: RowLoss, equivalence: Equivalence, *, ids_NK: Tensor) -> tuple[Tensor, RowLoss]:
    """Return the ids to gather [N, K + members of all classes], and the row loss on the gathered logits.

    The members ride along in every row, so that a class in S can stand for its whole mass.
    """
    if not equivalence.classes:
        return ids_NK, row_loss
    num_ids = ids_NK.shape[1]
    members_C = torch.cat(equivalence.classes)
    sizes = [len(class_C) for class_C in equivalence.classes]

    def merged(rows: slice, logits_NK: Tensor, wanted: bool) -> RowLosses:
        own_NK, *members = logits_NK.split([num_ids, *sizes], dim=1)
        stands_for = [ids_NK[rows] == class_C[0] for class_C in equivalence.classes]
        for member_NC, stands_NK in zip(members, stands_for, strict=True):
            own_NK = torch.where(stands_NK, member_NC.logsumexp(-1, keepdim=True), own_NK)
        part = row_loss(rows, own_NK, wanted)
        if part.slope_NV is None:
            return part
        slopes = [part.slope_NV]
        for member_NC, stands_NK in zip(members, stands_for, strict=True):
            of_class_N1 = part.slope_NV.masked_fill(~stands_NK, 0).sum(-1, keepdim=True)
            slopes.append(of_class_N1 * member_NC.softmax(-1))
            slopes[0] = slopes[0].masked_fill(stands_NK, 0)
        return replace(part, slope_NV=torch.cat(slopes, dim=1))

    return torch.cat([ids_NK, members_C.expand(len(ids_NK), -1)], dim=1), merged
