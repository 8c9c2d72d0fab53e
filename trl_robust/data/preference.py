"""From datasets as users have them to the columns the trainers train on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from trl.data_utils import maybe_extract_prompt

from ..threat.positions import SPANS
from .cells import check_cells, check_full, rows_named
from .corpora import check_generic_labels, is_corpus_pairs, is_generic_labels
from .errors import DataError
from .row_weights import check_row_weights

COLUMNS = ("prompt", "completion", "chosen", "rejected")


def as_prompt_completion(
    dataset: Dataset, name: str, *, needs_rejected: bool = False, needs_prompt: bool = False
) -> Dataset:
    """
    Brings preference data into prompt-completion form: `chosen` becomes `completion`, `rejected` stays beside it.

    Prompt-completion data, language-modelling data and tokens with generic labels pass unchanged; of texts to forget
    and to retain, the latter become `text`; preference data with the prompt inside the completions has it taken out,
    as TRL does.

    Args:
        dataset ([`~datasets.Dataset`]):
            Preference, prompt-completion or language-modelling data, plain or conversational.
        name (`str`):
            What messages call it.
        needs_rejected (`bool`, *optional*, defaults to `False`):
            Whether rejected completions are required.
        needs_prompt (`bool`, *optional*, defaults to `False`):
            Whether prompts are required.

    Returns:
        [`~datasets.Dataset`].

    Raises:
        [`DataError`]: missing columns, no rows, cells that are neither text nor messages, or empty prompts or
        completions.
    """
    if not isinstance(dataset, Dataset):
        raise DataError(
            f"The {name} dataset is a {type(dataset).__name__}; a map-style `datasets.Dataset` is needed, because "
            "rows are joined. Load it without streaming."
        )
    columns = dataset.column_names
    if "input_ids" in columns:
        if needs_rejected:
            raise DataError(
                f"The {name} dataset is tokenised; a targeted attack and the away term need text in the columns "
                "`prompt`, `chosen` and `rejected`. Pass the text, or use `attack_objective: untargeted` with "
                "`away_coef: 0`."
            )
        return dataset
    if len(dataset) == 0:
        raise DataError(f"The {name} dataset has no rows.")
    if is_generic_labels(dataset) or is_corpus_pairs(dataset):
        if needs_prompt:
            raise DataError(_no_prompts(dataset, name))
        if is_generic_labels(dataset):
            check_generic_labels(dataset, name)
            return dataset
        check_cells(dataset, name, ("forget", "retain"))
        check_full(dataset, name)
        return dataset.rename_column("retain", "text")
    if needs_rejected and not {"chosen", "rejected"} <= set(columns):
        raise DataError(
            f"The {name} dataset has the columns {columns}; a targeted attack and the away term need preference data "
            "with the columns `prompt`, `chosen` and `rejected`. Add them, or use `attack_objective: untargeted` with "
            "`away_coef: 0`, which needs only `prompt` and `completion`."
        )
    if {"chosen", "rejected"} <= set(columns):
        if "completion" in columns:
            raise DataError(
                f"The {name} dataset has `chosen` and `rejected` and also `completion`. Remove `completion`, or both "
                "of the others."
            )
        if prompt_inside(dataset) and "prompt" in columns:
            dataset = dataset.remove_columns("prompt")
        _check_values(dataset, name)
        if prompt_inside(dataset):
            dataset = take_prompt_out(dataset, name)
            check_full(dataset, name)
        dataset = dataset.rename_column("chosen", "completion")
    elif not ({"prompt", "completion"} <= set(columns) or {"text"} <= set(columns) or {"messages"} <= set(columns)):
        raise DataError(
            f"The {name} dataset has the columns {columns}; `prompt` and `completion` are needed (or `prompt`, "
            "`chosen`, `rejected`). "
            + (
                "Rename `conversations` to `messages`, and in it `from` and `value` to `role` and `content`."
                if "conversations" in columns
                else "Rename its columns."
            )
        )
    else:
        _check_values(dataset, name)
    if needs_prompt and "prompt" not in dataset.column_names:
        raise DataError(_no_prompts(dataset, name))
    return dataset


def prompt_inside(dataset: Dataset) -> bool:
    """
    Whether preference data holds its prompts inside the completions.

    Besides rows without a `prompt`, that is rows whose `prompt` is a text beside completions that are conversations
    and begin with it (UltraFeedback's form).

    Args:
        dataset ([`~datasets.Dataset`]):
            Any data.

    Returns:
        `bool`.
    """
    if not {"chosen", "rejected"} <= set(dataset.column_names) or len(dataset) == 0:
        return False
    first = dataset[0]
    if "prompt" not in first:
        return True
    chosen = first["chosen"]
    begins_with_it = isinstance(chosen, list) and bool(chosen) and dict(chosen[0]).get("role") != "assistant"
    return isinstance(first["prompt"], str) and begins_with_it


def take_prompt_out(dataset: Dataset, name: str) -> Dataset:
    """
    Takes the prompts out of completions that hold them, as TRL does.

    Args:
        dataset ([`~datasets.Dataset`]):
            Data of which [`prompt_inside`] holds.
        name (`str`):
            What the progress bar calls it.

    Returns:
        [`~datasets.Dataset`] with `prompt`, `chosen` and `rejected`.
    """
    bare = dataset.remove_columns("prompt") if "prompt" in dataset.column_names else dataset
    return bare.map(maybe_extract_prompt, desc=f"Extracting prompts of the {name} dataset")


def _no_prompts(dataset: Dataset, name: str) -> str:
    return (
        f"The {name} dataset has the columns {dataset.column_names}, and the attack perturbs prompts, of which it has "
        "none. Use prompt-completion data (`prompt` and `completion`), or `attack_positions: all`."
    )


def _check_values(dataset: Dataset, name: str) -> None:
    """Refuses cells that nothing can be trained on."""
    check_cells(dataset, name, COLUMNS)
    for column in ("text", "messages"):
        check_cells(dataset, name, (column,))
    check_row_weights(dataset, name)
    check_full(dataset, name)


def check_none_lost(before: Dataset, after: Dataset, name: str, max_length: int | None) -> None:
    """
    Refuses to go on when preparation dropped rows, which TRL does with prompts that leave no room for a completion.

    Args:
        before ([`~datasets.Dataset`]):
            Rows that went in, with a `row` column that numbers them.
        after ([`~datasets.Dataset`]):
            Rows that came out.
        name (`str`):
            What the message calls the dataset.
        max_length (`int`, *optional*):
            Limit in tokens.

    Raises:
        [`DataError`]: naming the rows that were lost.
    """
    lost = sorted(set(before["row"]) - set(after["row"]))
    if lost:
        raise DataError(
            f"The {name} dataset has a prompt longer than the limit in {rows_named(lost)}: {max_length} tokens "
            "(`max_length`) hold no token of the completion. Raise `max_length`, or shorten or remove these rows."
        )


def kept_whole(prepare: Callable[[Dataset], Dataset], dataset: Dataset, name: str, max_length: int | None) -> Dataset:
    """
    Prepares rows, and refuses to go on when some are lost on the way; see [`check_none_lost`].

    Args:
        prepare (`Callable`):
            TRL's preparation.
        dataset ([`~datasets.Dataset`]):
            Rows.
        name (`str`):
            What the message calls them.
        max_length (`int`, *optional*):
            Limit in tokens.

    Returns:
        [`~datasets.Dataset`]: as prepared.

    Raises:
        [`DataError`]: naming the rows that were lost.
    """
    numbered = dataset.add_column("row", list(range(len(dataset))))
    prepared = prepare(numbered)
    check_none_lost(numbered, prepared, name, max_length)
    return prepared.remove_columns("row")


def add_user_spans(dataset: Dataset, tokenizer: Any, positions: str, name: str, **template: Any) -> Dataset:
    """
    Adds where the user turns of every prompt lie, if positions are asked for that need to know.

    Args:
        dataset ([`~datasets.Dataset`]):
            Rows with a `prompt`.
        tokenizer (`PreTrainedTokenizerBase`):
            Tokenizer, with a chat template if the prompts are conversations.
        positions (`str`):
            With `"last_user"` a column `last_user_span` is added, with `"all_user"` a column `user_spans`.
        name (`str`):
            What the progress bar calls the dataset.
        template:
            Passed on to `apply_chat_template`.

    Returns:
        [`~datasets.Dataset`]; the same one for other positions.

    Raises:
        [`DataError`]: a conversation without a user turn.
    """
    if positions not in SPANS:
        return dataset

    def locate(row: dict[str, Any]) -> dict[str, Any]:
        spans = user_spans(tokenizer, row["prompt"], last_only=positions == "last_user", **template)
        return {SPANS[positions]: spans[-1] if positions == "last_user" else spans}

    return dataset.map(locate, desc=f"Locating user turns in {name} dataset")


def user_spans(
    tokenizer: Any, prompt: list[dict] | str, *, last_only: bool = False, **template: Any
) -> list[list[int]]:
    """
    Where the text of the user turns lies in a tokenised prompt.

    The prompt is rendered once more for every turn, with other text in it; what both share at the start and at the
    end is not that turn. So no chat template has to be known.

    Args:
        tokenizer (`PreTrainedTokenizerBase`):
            Tokenizer with a chat template.
        prompt (`list[dict]` or `str`):
            Messages; a plain prompt is one user turn as a whole.
        last_only (`bool`, *optional*, defaults to `False`):
            Whether only the last user turn is looked for.
        template:
            Passed on to `apply_chat_template`.

    Returns:
        `list[list[int]]`: for every turn the index of its first token, and of the one after its last.

    Raises:
        [`DataError`]: the conversation has no user turn.
    """
    if isinstance(prompt, str):
        return [[0, len(tokenizer(prompt)["input_ids"])]]
    users = [number for number, message in enumerate(prompt) if message["role"] == "user"]
    if not users:
        raise DataError("Positions in user turns need one in every prompt, and one has none.")

    def rendered(messages: list[dict]) -> list[int]:
        return tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, **template
        )["input_ids"]

    ids, spans = rendered(prompt), []
    for turn in users[-1:] if last_only else users:
        text = prompt[turn]["content"]
        # Other text at both ends, so that nothing of the turn is taken for the template.
        stand_in = ("B" if text[:1] != "B" else "C") + ("Y" if text[-1:] != "Y" else "Z")
        others = rendered(
            [{**message, "content": stand_in} if i == turn else message for i, message in enumerate(prompt)]
        )
        shortest = min(len(ids), len(others))
        start = next((i for i in range(shortest) if ids[i] != others[i]), shortest)
        end = next((i for i in range(shortest - start) if ids[-1 - i] != others[-1 - i]), shortest - start)
        spans.append([start, len(ids) - end])
    return spans


def join_benign(prepared: Dataset, benign: Dataset, per_example: int, seed: int) -> Dataset:
    """
    Gives every row of a prepared dataset its benign rows, so that they are sharded, shuffled and resumed together.

    The benign rows are dealt out in a random order, all of them before any comes a second time, each round in a new
    order. Those beyond `per_example` times the number of rows are never dealt.

    Args:
        prepared ([`~datasets.Dataset`]):
            Rows with `input_ids` and `labels`.
        benign ([`~datasets.Dataset`]):
            Benign rows with `input_ids` and `labels`.
        per_example (`int`):
            Benign rows for every row.
        seed (`int`):
            Seed of the order.

    Returns:
        [`~datasets.Dataset`] with `benign_input_ids` and `benign_labels`, a list of `per_example` rows in each.
    """
    needed = len(prepared) * per_example
    generator = torch.Generator().manual_seed(seed)
    rounds = [torch.randperm(len(benign), generator=generator) for _ in range(-(-needed // len(benign)))]
    order = torch.cat(rounds)[:needed].view(len(prepared), per_example).tolist()
    tokens, labels = benign["input_ids"][:], benign["labels"][:]

    def deal(row: dict, index: int) -> dict:
        return {
            "benign_input_ids": [tokens[number] for number in order[index]],
            "benign_labels": [labels[number] for number in order[index]],
        }

    return prepared.map(deal, with_indices=True, desc="Joining benign rows")
