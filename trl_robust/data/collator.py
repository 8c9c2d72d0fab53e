from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from .row_weights import WEIGHT


@dataclass
class LATDataCollator:
    """
    Collates the wanted completions, and beside them what latent adversarial training adds.

    Args:
        collator (`Callable`):
            TRL's collator for rows of `input_ids` and `labels`.

    Returns:
        On a call, a batch with `input_ids`, `attention_mask`, `labels` of the wanted completions; where the rows have
        them, the same keys with `away_` in front for the rejected completions, `benign` (a batch of its own),
        `last_user_span` of shape `(B, 2)`, `user_spans` of shape `(B, K, 2)`, `weight` of shape `(B,)` and `topic` (a
        list).
    """

    collator: Callable[[list[dict[str, Any]]], dict[str, Any]]

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collator([{"input_ids": row["input_ids"], "labels": row["labels"]} for row in rows])
        if "away_input_ids" in rows[0]:
            away = [{"input_ids": row["away_input_ids"], "labels": row["away_labels"]} for row in rows]
            batch.update({f"away_{key}": value for key, value in self.collator(away).items()})
        if "benign_input_ids" in rows[0]:
            batch["benign"] = self.collator(_benign_rows(rows))
        batch.update(_spans(rows))
        if WEIGHT in rows[0]:
            batch[WEIGHT] = torch.tensor([row[WEIGHT] for row in rows], dtype=torch.float32)
        if "topic" in rows[0]:
            batch["topic"] = [row["topic"] for row in rows]
        return batch


@dataclass
class PreferenceCollator:
    """
    Collates pairs of completions, and beside them the benign rows and the last user turns.

    Args:
        collator (`Callable`):
            TRL's collator for rows of `prompt_ids`, `chosen_ids` and `rejected_ids`.
        pad_token_id (`int`):
            Padding of the benign rows.

    Returns:
        On a call, TRL's batch (chosen completions first); where the rows have them, `benign` (a batch of `input_ids`,
        `attention_mask` and `labels`), `last_user_span` of shape `(B, 2)` and `user_spans` of shape `(B, K, 2)`.
    """

    collator: Callable[[list[dict[str, Any]]], dict[str, Any]]
    pad_token_id: int

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collator(rows)
        if "benign_input_ids" in rows[0]:
            batch["benign"] = DataCollatorForLanguageModeling(self.pad_token_id)(_benign_rows(rows))
        batch.update(_spans(rows))
        return batch


def _spans(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Where user turns lie; rows with fewer turns are filled up with spans that hold nothing."""
    found = {}
    if "last_user_span" in rows[0]:
        found["last_user_span"] = torch.tensor([row["last_user_span"] for row in rows])
    if "user_spans" in rows[0]:
        most = max(len(row["user_spans"]) for row in rows)
        filled = [[*row["user_spans"], *[[0, 0]] * (most - len(row["user_spans"]))] for row in rows]
        found["user_spans"] = torch.tensor(filled)
    return found


def _benign_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The benign rows that go with some rows, one below the other."""
    return [
        {"input_ids": tokens, "labels": labels}
        for row in rows
        for tokens, labels in zip(row["benign_input_ids"], row["benign_labels"], strict=True)
    ]
