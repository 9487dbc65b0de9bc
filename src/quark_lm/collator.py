"""One batch, two views: with the reward token for the policy, without it for the reference, which must never see it.

Right-padded: GPT-2's absolute positions shift under left padding.
Axes: B draws, T tokens, N completion tokens (packed).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

import torch

from .reward_tokens import RewardTokens


class Draw(TypedDict):
    """One row of the pool as a step draws it; `quantile` None leaves the reward token out."""

    prompt_ids: list[int]
    completion_ids: list[int]
    token_at: int
    quantile: int | None


def view(sequences: Sequence[tuple[Sequence[int], Sequence[int]]], pad_id: int) -> dict[str, torch.Tensor]:
    """(prompt ids, completion ids) pairs as one right-padded batch.

    Returns: input_ids, attention_mask, position_ids, labels: int64 (B, T), labels -100 outside the completions; and
        rows: int64 (N,), the flat positions (b x T + t) whose next token is a completion token, in the order of the
        completions.
    """
    length = max(len(prompt) + len(completion) for prompt, completion in sequences)
    ids = torch.full((len(sequences), length), pad_id)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, -100)
    rows = []
    for b, (prompt, completion) in enumerate(sequences):
        start, end = len(prompt), len(prompt) + len(completion)
        ids[b, :end] = torch.tensor([*prompt, *completion])
        mask[b, :end] = 1
        labels[b, start:end] = ids[b, start:end]
        rows.append(torch.arange(start - 1, end - 1) + b * length)
    positions = torch.arange(length).expand_as(ids).contiguous()
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": positions,
        "labels": labels,
        "rows": torch.cat(rows),
    }


@dataclass(frozen=True)
class Collator:
    """Draws to a batch. Keys: those of `view` for the policy, the same with the prefix `reference_`."""

    reward_tokens: RewardTokens
    pad_id: int

    def __call__(self, draws: Sequence[Draw]) -> dict[str, torch.Tensor]:
        policy = view(
            [
                (self.reward_tokens.insert(d["prompt_ids"], d["quantile"], d["token_at"]), d["completion_ids"])
                for d in draws
            ],
            self.pad_id,
        )
        reference = view([(d["prompt_ids"], d["completion_ids"]) for d in draws], self.pad_id)
        targets = policy["labels"][policy["labels"] != -100]
        return {**policy, "targets": targets, **{f"reference_{name}": value for name, value in reference.items()}}
