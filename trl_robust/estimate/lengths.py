"""How long a run's rows are: measured on a sample of the data where data and tokenizer are here, else as stated."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset
from jinja2.exceptions import TemplateError
from transformers import AutoTokenizer

from ..data import DataError, as_prompt_completion
from ..recipes import Recipe
from ..recipes.rows import all_local, load_share, named
from ..threat.positions import SPANS

SAMPLE = 200
"""Rows of a dataset that are tokenised."""

DEFAULT_LENGTH = 1024
"""Tokens of a row if nothing says how long rows are, and `max_length` is not set either."""

Row = tuple[int, int]
"""Tokens of a prompt and of its completion."""


@dataclass(frozen=True)
class Lengths:
    """
    Sizes of one batch.

    Args:
        rows (`int`):
            Rows.
        width (`int`):
            Tokens of a row, padding included.
        labels (`int`):
            Labelled tokens of all rows together.
        ranks (`int`, *optional*, defaults to `0`):
            Tokens of a row that a perturbation covers.
    """

    rows: int
    width: int
    labels: int
    ranks: int = 0


@dataclass
class Rows:
    """
    Lengths of the rows of every share of a run's data.

    Args:
        shares (`dict[str, list[Row]]`):
            `chosen`, `rejected` and `benign`; row `i` of the first two has the same prompt. Those that the run does
            not have are not there.
        origin (`str`):
            Where the lengths are from, as a phrase.
        counts (`dict[str, int]`):
            Rows of the training (`train`) and benign data, where they are known.
    """

    shares: dict[str, list[Row]]
    origin: str
    counts: dict[str, int] = field(default_factory=dict)

    def longest(self, share: str, rows: int, positions: str) -> Lengths:
        """
        A batch in which every row is the longest: what memory must hold.

        Args:
            share (`str`):
                Share of the data; `pair` is `chosen` and `rejected` below one another.
            rows (`int`):
                Rows of the batch.
            positions (`str`):
                Which tokens are perturbed.

        Returns:
            [`Lengths`].
        """
        sample = [row for part in _parts(share) for row in self.shares[part]]
        width = max(map(sum, sample))
        labels = min(max(completion for _, completion in sample), width - 1)
        attacked = [row for part in ("chosen", "rejected") for row in self.shares.get(part, [])]
        prompts_only = positions in ("prompt", *SPANS)
        ranks = max(prompt if prompts_only else prompt + completion for prompt, completion in attacked)
        return Lengths(rows, width, rows * labels, ranks)

    def batches(self, share: str, rows: int) -> list[Lengths]:
        """
        The rows of the sample in batches, as they come: what work is averaged over.

        Args:
            share (`str`):
                As in [`longest`].
            rows (`int`):
                Rows of a batch.

        Returns:
            `list` of [`Lengths`].
        """
        parts = _parts(share)
        size = rows // len(parts)
        count = len(self.shares[parts[0]])
        found = []
        # The last batch is filled up with the first rows.
        for start in range(0, count, size):
            numbers = [number % count for number in range(start, start + size)]
            batch = [self.shares[part][number] for part in parts for number in numbers]
            labels = sum(completion if prompt else completion - 1 for prompt, completion in batch)
            found.append(Lengths(rows, max(map(sum, batch)), labels))
        return found


def _parts(share: str) -> tuple[str, ...]:
    return ("chosen", "rejected") if share == "pair" else (share,)


def find_rows(recipe: Recipe, prompt_tokens: int | None = None, completion_tokens: int | None = None) -> Rows:
    """
    Finds the lengths of a recipe's rows.

    Args:
        recipe ([`~trl_robust.recipes.Recipe`]):
            Settings.
        prompt_tokens (`int`, *optional*):
            Tokens of every prompt, if they are stated.
        completion_tokens (`int`, *optional*):
            Tokens of every completion, if they are stated.

    Returns:
        [`Rows`].

    Raises:
        [`~trl_robust.data.DataError`]: local data that cannot be used.
    """
    benign = bool(named(recipe, "benign"))
    counts = {}
    for share in ("train", "benign"):
        if named(recipe, share) and all_local(recipe, share):
            counts[share] = len(load_share(recipe, share) or [])
    limit = recipe.training.max_length
    if prompt_tokens is not None and completion_tokens is not None:
        prompt = prompt_tokens if limit is None else min(prompt_tokens, limit - 1)
        completion = completion_tokens if limit is None else min(completion_tokens, limit - prompt)
        return Rows(_uniform(recipe, prompt, completion, benign), "as stated on the command line", counts)
    if "train" in counts and (tokenizer := _tokenizer(recipe)) is not None:
        found = _measured(recipe, tokenizer, benign and "benign" in counts)
        if found:
            origin = f"{max(map(len, found.values()))} rows of the data, tokenised"
            if benign and "benign" not in found:
                found["benign"] = found["chosen"]
                origin += "; benign rows are not here, and taken to be as long as the others"
            return Rows(found, origin, counts)
    length = limit or DEFAULT_LENGTH
    why = "the tokenizer is not on this machine, or does not take the rows"
    if "train" not in counts:
        why = "the data are not on this machine"
    total = "`max_length`" if limit else f"{DEFAULT_LENGTH} tokens"
    origin = f"{total}, half of it prompt where there are prompts, since {why}"
    return Rows(_uniform(recipe, length // 2, length - length // 2, benign), origin, counts)


def _uniform(recipe: Recipe, prompt: int, completion: int, benign: bool) -> dict[str, list[Row]]:
    """Rows of one length; corpora have no prompts, and neither has what is trained on as a whole."""
    corpus = recipe.verb == "lat-rmu" or bool(named(recipe, "retain"))
    parted, whole = (prompt, completion), (0, prompt + completion)
    other = whole if getattr(recipe.training, "completion_only_loss", None) is False else parted
    row = whole if corpus else other
    return {"chosen": [row], "rejected": [row]} | ({"benign": [other]} if benign else {})


def _tokenizer(recipe: Recipe) -> Any:
    """The model's tokenizer, if it is here and nothing replaces its chat template."""
    name = str(recipe.model.model_name_or_path)
    folder = Path(name).expanduser()
    trust = recipe.training.trust_remote_code
    try:
        return AutoTokenizer.from_pretrained(
            folder if folder.is_dir() else name, local_files_only=True, trust_remote_code=trust
        )
    except (OSError, ValueError, KeyError, ImportError):
        return None  # the lengths are then stated or assumed, and the report says so


def _measured(recipe: Recipe, tokenizer: Any, benign: bool) -> dict[str, list[Row]]:
    """Lengths of a sample of every share; empty if the tokenizer's template does not take the rows."""
    training = recipe.training
    rows = as_prompt_completion(
        _sample(load_share(recipe, "train")), "training", needs_rejected=training.needs_rejected
    )
    wanted = next(
        (column for column in ("completion", "text", "tokens", "messages") if column in rows.column_names), ""
    )
    unwanted = next((column for column in ("rejected", "forget", "tokens") if column in rows.column_names), None)
    try:
        found = {"chosen": [_row(recipe, tokenizer, row, wanted) for row in rows]}
        if unwanted:
            found["rejected"] = [_row(recipe, tokenizer, row, unwanted) for row in rows]
        if benign:
            others = as_prompt_completion(_sample(load_share(recipe, "benign")), "benign")
            column = "completion" if "completion" in others.column_names else "text"
            found["benign"] = [_row(recipe, tokenizer, row, column) for row in others]
    except (TemplateError, TypeError, ValueError):
        return {}
    return found


def _sample(rows: Dataset | None) -> Dataset:
    if rows is None:
        raise DataError("The dataset has no rows.")
    step = max(len(rows) // SAMPLE, 1)
    return rows.select(range(0, len(rows), step)[:SAMPLE])


def _row(recipe: Recipe, tokenizer: Any, row: dict[str, Any], column: str) -> Row:
    """Tokens of a row's prompt and completion, as TRL counts them, cut at `max_length`."""
    limit = recipe.training.max_length or 10**9
    if "input_ids" in row:
        labelled = sum(label != -100 for label in row.get("labels", row["input_ids"]))
        return len(row["input_ids"]) - labelled, labelled
    if "tokens" in row:
        return 0, min(len(row["tokens"]), limit)
    if "prompt" not in row:
        length = len(_tokens(tokenizer, row[column], False)) + isinstance(row[column], str)
        return 0, min(length, limit)
    prompt, answer = row["prompt"], row[column]
    whole = _tokens(tokenizer, prompt + answer, False)
    asked = _tokens(tokenizer, prompt, True)
    # The completion starts where the two part, which may be before the prompt's end.
    shared = next(
        (i for i, (a, b) in enumerate(zip(asked, whole, strict=False)) if a != b), min(len(asked), len(whole))
    )
    length = len(whole) + isinstance(answer, str)  # TRL ends plain text with a token of its own
    if getattr(recipe.training, "completion_only_loss", None) is False:
        shared = 0
    shared = min(shared, limit - 1)
    return shared, min(length, limit) - shared


def _tokens(tokenizer: Any, text: Any, generation: bool) -> list[int]:
    if isinstance(text, str):
        return tokenizer(text)["input_ids"]
    rendered = tokenizer.apply_chat_template(text, tokenize=True, return_dict=True, add_generation_prompt=generation)
    return rendered["input_ids"]
