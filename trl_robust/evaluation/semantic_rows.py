"""What the semantic checks are given: requests with their completions, and settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from datasets import Dataset

from ..attacks.subject import Prompt
from ..data.cells import rows_named
from ..data.errors import DataError
from ..threat import decoder_layers, resolve_sites
from ..threat.sites import Site, parse_site
from .distance import with_wording
from .semantic_measures import Thresholds


@dataclass(frozen=True)
class SemanticRow:
    """
    A request with the answer that its loss is taken of.

    Args:
        id (`str`):
            Name of the row.
        prompt (`str` or `list[dict]`):
            The request.
        completion (`str`):
            The reference answer.
        paraphrases (`tuple[str, ...]`, *optional*):
            Other wordings of the request.
        edit (`str`, *optional*):
            The request with its meaning changed, a changed entity for example. Another row's request is taken where
            there is none.
        answer (`str`, *optional*):
            What a right answer states.
    """

    id: str
    prompt: Prompt
    completion: str
    paraphrases: tuple[str, ...] = ()
    edit: str | None = None
    answer: str | None = None


@dataclass(frozen=True)
class SemanticSettings:
    """
    Settings of the search and of the checks.

    Args:
        layer (`str`, `int`, `float` or a sequence of them, *optional*, defaults to `0.625`):
            Where; as [`~trl_robust.find_paraphrase`] takes it.
        epsilon (`float`, *optional*, defaults to `0.05`):
            How far the loss may move.
        steps (`int`, *optional*, defaults to `8`):
            Steps of the searches.
        preset (`str`, *optional*, defaults to `"robust"`):
            Of LAP's search.
        positions (`str`, *optional*, defaults to `"prompt"`):
            `"prompt"` or `"last_user"`.
        overrides (`dict`, *optional*):
            Further settings of LAP's search.
        pooling (`str`, *optional*, defaults to `"last"`):
            Where real paraphrases are compared: `"last"` token, or `"mean_query"`.
        top_k (`int`, *optional*, defaults to `10`):
            Principal directions of real paraphrases.
        thresholds ([`Thresholds`], *optional*):
            What has to be reached.
        seed (`int`, *optional*, defaults to `0`):
            Seed of all that is drawn.
    """

    layer: Any = 0.625
    epsilon: float = 0.05
    steps: int = 8
    preset: str = "robust"
    positions: Literal["prompt", "last_user"] = "prompt"
    overrides: dict[str, Any] = field(default_factory=dict)
    pooling: Literal["last", "mean_query"] = "last"
    top_k: int = 10
    thresholds: Thresholds = field(default_factory=Thresholds)
    seed: int = 0

    def sites(self, model: torch.nn.Module) -> tuple[Site, ...]:
        """The sites of `layer` in a model."""
        layers = [self.layer] if isinstance(self.layer, str | int | float) else list(self.layer)
        return resolve_sites([parse_site(site) for site in layers], len(decoder_layers(model)))


def semantic_rows(dataset: Dataset, name: str) -> list[SemanticRow]:
    """
    Rows of a dataset.

    Args:
        dataset ([`~datasets.Dataset`]):
            `prompt` and `completion`, plain or conversational, and, where there are such, `paraphrases` (a list of
            texts), `edit` (a text) and `answer`.
        name (`str`):
            What messages call it.

    Returns:
        `list` of [`SemanticRow`].

    Raises:
        [`DataError`]: a column is missing, or rows are not of this form.
    """
    if missing := [column for column in ("prompt", "completion") if column not in dataset.column_names]:
        raise DataError(
            f"{name} has no column {' and '.join(map(repr, missing))} but {dataset.column_names}. The semantic checks "
            "need `prompt` and `completion`."
        )
    found, wrong = [], []
    for number, row in enumerate(dataset):
        prompt, completion = row["prompt"], row["completion"]
        if isinstance(completion, list):
            completion = completion[-1].get("content") if completion else None
        paraphrases, edit, answer = row.get("paraphrases") or (), row.get("edit"), row.get("answer")
        texts = [prompt if isinstance(prompt, str) else prompt and prompt[-1].get("content"), completion, *paraphrases]
        if not all(isinstance(text, str) and text.strip() for text in texts) or not isinstance(edit, str | None):
            wrong.append(number)
            continue
        answer = None if answer is None else str(answer)
        found.append(SemanticRow(str(row.get("id", number)), prompt, completion, tuple(paraphrases), edit, answer))
    if wrong:
        raise DataError(
            f"{name} has rows without a prompt and a completion, or with paraphrases or an edit that are no texts, in "
            f"{rows_named(wrong)}. Correct or remove them."
        )
    return found


def edited_prompts(rows: Sequence[SemanticRow]) -> list[Prompt | None]:
    """
    For every row a request that means something else: the positive control.

    Args:
        rows (sequence of [`SemanticRow`]):
            Rows.

    Returns:
        `list`: the row's own edit, or the next row's request that has another completion; `None` where all rows have
        the same.
    """
    found: list[Prompt | None] = []
    for number, row in enumerate(rows):
        others = [*rows[number + 1 :], *rows[:number]]
        other = next((other.prompt for other in others if other.completion != row.completion), None)
        found.append(other if row.edit is None else with_wording(row.prompt, row.edit))
    return found
