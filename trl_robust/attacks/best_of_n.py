from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass, fields
from random import Random
from typing import Any, ClassVar

import torch
from transformers import LogitsProcessor, LogitsProcessorList, TopPLogitsWarper

from .request import chance, request_of, with_request
from .subject import AttackRow, Generation, Prompt, Subject


@dataclass(frozen=True)
class BestOfN:
    """
    Many sampled answers to randomly altered spellings of the request (best-of-n jailbreaking, 2412.03556).

    The answers come back one [`Generation`] a sample: `n` in a row for every request, in the order in which they were
    drawn. The first samples are the same whatever `n` is, so one run holds the curve over all smaller numbers. The
    mean over a request's samples says how often a single sample succeeds; whether any of the first `k` did is the
    success of a budget of `k`.

    A request is altered by three kinds of noise, all of which keep the order of the words. With strength `s`, the
    inner letters of a word of more than three are shuffled with probability `s ** 0.5`; a letter changes between upper
    and lower case with probability `s ** 0.5`; a printable character becomes its neighbour in ASCII with probability
    `s ** 3`.

    Args:
        n (`int`, *optional*, defaults to `32`):
            Samples of every request.
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature of the sampling; 0 for the likeliest answer.
        top_p (`float`, *optional*, defaults to `1.0`):
            Share of the probability that the likeliest tokens keep, in (0, 1].
        augment (`float`, *optional*, defaults to `0.4`):
            Strength of the alteration, between 0 (sampling only) and 1.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the alterations and of the sampling.

    Raises:
        `ValueError`: a setting outside its range, or several samples that could not differ.
    """

    n: int = 32
    temperature: float = 1.0
    top_p: float = 1.0
    augment: float = 0.4
    seed: int = 0
    name: ClassVar[str] = "best_of_n"
    attack_class: ClassVar[str] = "input"
    version: ClassVar[int] = 1
    budget_axis: ClassVar[str] = "n"

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"n={self.n} must be at least 1.")
        if not self.temperature >= 0:
            raise ValueError(f"temperature={self.temperature} must be at least 0.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be above 0 and at most 1.")
        if not 0 <= self.augment <= 1:
            raise ValueError(f"augment={self.augment} must lie between 0 and 1.")
        if self.n > 1 and not self.temperature and not self.augment:
            raise ValueError(
                f"With temperature=0 and augment=0 all {self.n} samples of a request are the same. Raise one of them, "
                "or set n=1."
            )

    def run(self, subject: Subject, rows: Sequence[AttackRow]) -> list[Generation]:
        """
        `n` answers of the model to every request, those of a request next to each other; see [`Subject.answer`].
        """
        sampler = _Sampler(
            **{field.name: getattr(subject, field.name) for field in fields(Subject)},
            temperature=self.temperature,
            top_p=self.top_p,
        )
        attempts = [self._attempt(row, number) for row in rows for number in range(self.n)]
        found = sampler.answer(attempts, self.name, perturb=lambda batch: [_seed_of(row) for row in batch])  # type: ignore[arg-type, return-value]
        for position, generation in enumerate(found):
            generation.row = rows[position // self.n]
        return found

    def _attempt(self, row: AttackRow, number: int) -> _Attempt:
        draw = chance(self.seed, row, number)
        prompt: Prompt = with_request(row.prompt, altered(request_of(row.prompt), self.augment, draw))
        return _Attempt(row.id, prompt, row.target, row.answer, draw.getrandbits(62))


@dataclass(frozen=True)
class _Attempt(AttackRow):
    """One sample of a request, with the seed that its answer is drawn by."""

    seed: int = 0


def _seed_of(row: AttackRow) -> int:
    assert isinstance(row, _Attempt)
    return row.seed


def altered(text: str, strength: float, draw: Random) -> str:
    """
    A text with noise in its spelling; words stay in order, and white space as it is.

    Args:
        text (`str`):
            The text.
        strength (`float`):
            See [`BestOfN`]; at 0 the text comes back as it is.
        draw (`random.Random`):
            Random numbers.

    Returns:
        `str`.
    """
    if not strength:
        return text
    often, seldom = strength**0.5, strength**3
    pieces = []
    for line in text.splitlines(keepends=True):
        pieces += [_misspelt(word, often, seldom, draw) for word in line.split(" ")]
        pieces[-len(line.split(" ")) :] = [" ".join(pieces[-len(line.split(" ")) :])]
    return "".join(pieces)


def _misspelt(word: str, often: float, seldom: float, draw: Random) -> str:
    letters = list(word)
    if len(word.strip()) > 3 and word == word.strip() and draw.random() < often:
        inner = letters[1:-1]
        draw.shuffle(inner)
        letters[1:-1] = inner
    for position, letter in enumerate(letters):
        if draw.random() < often and len(letter.swapcase()) == 1:
            letters[position] = letter = letter.swapcase()
        if letter in _PRINTABLE and draw.random() < seldom:
            near = [chr(ord(letter) + step) for step in (-1, 1) if chr(ord(letter) + step) in _PRINTABLE]
            letters[position] = draw.choice(near)
    return "".join(letters)


_PRINTABLE = frozenset(string.ascii_letters + string.digits + string.punctuation)


@dataclass
class _Sampler(Subject):
    """A subject whose answers are drawn, every row of a batch by its own seed."""

    temperature: float = 1.0
    top_p: float = 1.0
