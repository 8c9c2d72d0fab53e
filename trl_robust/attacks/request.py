"""The text of a request inside its prompt, and what is random about one request."""

from __future__ import annotations

import random

from .subject import AttackRow, Prompt


def request_of(prompt: Prompt) -> str:
    """
    Text of the request: a plain prompt, or the last turn of a conversation.

    Args:
        prompt (`str` or `list[dict]`):
            The prompt.

    Returns:
        `str`.
    """
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])


def with_request(prompt: Prompt, text: str) -> Prompt:
    """
    The prompt with another text for its request; earlier turns stay.

    Args:
        prompt (`str` or `list[dict]`):
            The prompt.
        text (`str`):
            What takes the place of [`request_of`].

    Returns:
        `str` or `list[dict]`, as `prompt`.
    """
    if isinstance(prompt, str):
        return text
    *before, last = prompt
    return [*before, {**last, "content": text}]


def chance(seed: int, row: AttackRow, *more: int) -> random.Random:
    """
    Random numbers of one request. They do not depend on which other requests are asked, or in what order.

    Args:
        seed (`int`):
            Seed of the attack.
        row ([`AttackRow`]):
            The request.
        *more (`int`):
            What else tells one use from another, such as the number of a sample.

    Returns:
        `random.Random`.
    """
    return random.Random("\0".join((str(seed), row.id, repr(row.prompt), *map(str, more))))
