"""Which tokens of a row an adversary may perturb.

Positions are counted in *ranks*: the rank of a token is the number of real (not padding) tokens before it in its row.
So a perturbation found on a right-padded batch means the same on a left-padded one, and the prompt shared by two
completions has the same ranks in both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

import torch

Positions = Literal["prompt", "completion", "all", "last_user", "all_user"]

SPANS: dict[str, str] = {"last_user": "last_user_span", "all_user": "user_spans"}
"""Positions that are parts of a conversation, and the key of a batch that says where they lie."""


def ranks(attention_mask: torch.Tensor) -> torch.Tensor:
    """
    Rank of every token among the real tokens of its row.

    Args:
        attention_mask (`torch.Tensor` of shape `(B, T)`):
            1 at real tokens, 0 at padding.

    Returns:
        `torch.Tensor` of shape `(B, T)`, int64; meaningless (but not negative) at padding.
    """
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def selected_tokens(batch: Mapping[str, torch.Tensor], positions: Positions) -> torch.Tensor:
    """
    Tokens that an adversary may perturb.

    The prompt is what comes before the first token with a label (the only place where that rule stands). In a
    dialogue with several trained turns it is therefore what comes before the first of them.

    Args:
        batch (`Mapping[str, torch.Tensor]`):
            `attention_mask` and `labels` (or `completion_mask`), each of shape `(B, T)`; for `"last_user"` also
            `last_user_span` of shape `(B, 2)`: ranks of its first token and of the one after its last; for
            `"all_user"` also `user_spans` of shape `(B, K, 2)`: the same of every user turn, filled up with `(0, 0)`.
        positions (`str`):
            `"prompt"`, `"completion"` (tokens with a label), `"all"` (every real token), `"last_user"` or
            `"all_user"`: the text of the last user turn, or of all of them.

    Returns:
        `torch.Tensor` of shape `(B, T)`, bool.

    Raises:
        `ValueError`: unknown `positions`, or user turns without their spans.
    """
    if positions not in get_args(Positions):
        raise ValueError(f"`positions` is {positions!r}; choose one of {list(get_args(Positions))}.")
    real = batch["attention_mask"].bool()
    if positions == "all":
        return real
    if positions in SPANS:
        key = SPANS[positions]
        if key not in batch:
            raise ValueError(
                f"`positions={positions!r}` needs `{key}` in the batch: the ranks of a user turn's first token and of "
                "the token after its last. The trainers add it to conversational data."
            )
        rank, spans = ranks(batch["attention_mask"]), batch[key].reshape(len(real), -1, 2)
        inside = (rank.unsqueeze(1) >= spans[..., :1]) & (rank.unsqueeze(1) < spans[..., 1:])
        return real & inside.any(1)
    labelled = batch["completion_mask"].bool() if "completion_mask" in batch else batch["labels"] != -100
    if positions == "completion":
        return real & labelled
    return real & (labelled.cumsum(-1) == 0)


def selected_ranks(batch: Mapping[str, torch.Tensor], positions: Positions) -> torch.Tensor:
    """
    Ranks that an adversary may perturb, row by row: [`selected_tokens`] with the padding taken out.

    Args:
        batch (`Mapping[str, torch.Tensor]`):
            As in [`selected_tokens`].
        positions (`str`):
            As in [`selected_tokens`].

    Returns:
        `torch.Tensor` of shape `(B, P)`, bool, where `P - 1` is the largest selected rank of the batch.
    """
    selected = selected_tokens(batch, positions)
    rank = ranks(batch["attention_mask"])
    by_rank = torch.zeros_like(selected, dtype=torch.long).scatter_add(1, rank, selected.long()) > 0
    width = int(by_rank.any(0).nonzero().max()) + 1 if by_rank.any() else 0
    return by_rank[:, :width]
