from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import ClassVar

from .request import chance, request_of, with_request
from .sampling import Sampling
from .subject import AttackRow, Generation, Subject

PRINTABLE = frozenset(map(chr, range(33, 127)))
"""ASCII characters that show."""


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
        attempts = [self._attempt(row, number) for row in rows for number in range(self.n)]
        sampling = Sampling(self.temperature, self.top_p, lambda attempt: attempt.seed)  # type: ignore[attr-defined]
        found = subject.answer(attempts, self.name, sampling=sampling)
        for position, generation in enumerate(found):
            generation.row = rows[position // self.n]
        return found

    def _attempt(self, row: AttackRow, number: int) -> _Attempt:
        draw = chance(self.seed, row, number)
        prompt = with_request(row.prompt, altered(request_of(row.prompt), self.augment, draw))
        return _Attempt(row.id, prompt, row.target, row.answer, draw.getrandbits(62))


@dataclass(frozen=True)
class _Attempt(AttackRow):
    """One sample of a request, with the seed that its answer is drawn by."""

    seed: int = 0


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
    # Every second piece is the white space between two words.
    pieces = re.split(r"(\s+)", text)
    pieces[::2] = [_misspelt(word, strength, draw) for word in pieces[::2]]
    return "".join(pieces)


def _misspelt(word: str, strength: float, draw: Random) -> str:
    often, seldom = strength**0.5, strength**3
    letters = list(word)
    if len(letters) > 3 and draw.random() < often:
        inner = letters[1:-1]
        draw.shuffle(inner)
        letters[1:-1] = inner
    for position, letter in enumerate(letters):
        if draw.random() < often and len(letter.swapcase()) == 1:
            letter = letter.swapcase()
        if letter in PRINTABLE and draw.random() < seldom:
            letter = draw.choice([near for near in (chr(ord(letter) - 1), chr(ord(letter) + 1)) if near in PRINTABLE])
        letters[position] = letter
    return "".join(letters)
