"""Which rows have a prompt that leaves room for a completion, as TRL counts."""

from __future__ import annotations

from typing import Any

from datasets import Dataset


def fitting_rows(rows: Dataset, tokenizer: Any, max_length: int) -> list[int]:
    """
    Rows whose prompt leaves room for a completion.

    Args:
        rows ([`~datasets.Dataset`]):
            Prompts, and completions or pairs.
        tokenizer (`PreTrainedTokenizerBase`):
            The model's.
        max_length (`int`):
            Limit in tokens.

    Returns:
        `list[int]`: their numbers.
    """
    answers = [column for column in ("completion", "chosen", "rejected") if column in rows.column_names]
    return [number for number, row in enumerate(rows) if _fits(row, answers, tokenizer, max_length)]


def _fits(row: dict[str, Any], answers: list[str], tokenizer: Any, max_length: int) -> bool:
    prompt = _tokens(tokenizer, row["prompt"], True)
    if len(prompt) < max_length:
        return True
    # Exactly as TRL: a completion starts where it and the prompt part, which may be before the prompt's end.
    for column in answers:
        whole = _tokens(tokenizer, row["prompt"] + row[column], False)
        shared = next((i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), len(prompt))
        if shared >= max_length:
            return False
    return bool(answers)


def _tokens(tokenizer: Any, text: str | list[dict], generation: bool) -> list[int]:
    if isinstance(text, str):
        return tokenizer(text)["input_ids"]
    return tokenizer.apply_chat_template(text, tokenize=True, return_dict=True, add_generation_prompt=generation)[
        "input_ids"
    ]
