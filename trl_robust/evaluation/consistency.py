"""Whether a model says the same whatever the wording: with a score (PSS), and without any judge (POSIX, agreement)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any, TypedDict

import numpy as np
import torch

from ..attacks import Subject
from ..attacks.subject import Prompt
from ..objectives import label_logits, toward
from .case_scores import RESAMPLES, Interval, Matrix, Scale, as_rows, case_intervals, check_settings

PSS_ROBUST = 0.1
"""A case with a PSS below this counts as robust (ProSA)."""

ANSWER_TOKENS = 4096
"""Answer tokens scored at a time, at most."""


class Sensitivity(TypedDict):
    """What [`prompt_sensitivity`] returns."""

    pss: float | None
    interval: Interval | None
    robust_share: float | None
    n_cases: int
    n_excluded: int
    n_missing: int


class Posix(TypedDict):
    """What [`posix`] returns."""

    posix: float | None
    interval: Interval | None
    cases: list[float | None]
    n_cases: int
    n_excluded: int
    n_missing: int


class Agreement(TypedDict):
    """What [`answer_agreement`] returns."""

    agreement: float | None
    majority: float | None
    intervals: dict[str, Interval | None]
    n_cases: int
    n_excluded: int
    n_missing: int


def prompt_sensitivity(
    matrix: Matrix,
    *,
    scale: Scale | None = None,
    confidence: float = 0.95,
    num_resamples: int = RESAMPLES,
    seed: int = 0,
) -> Sensitivity:
    """
    ProSA's PSS: the mean difference |Y_a - Y_b| over all pairs of a case's wordings, mean over cases.

    Args:
        matrix:
            Scores in cases x wordings, as in [`prompt_robustness`]. The limit of 0.1 is meant for scores in [0, 1].
        scale, confidence, num_resamples, seed (*optional*):
            As in [`prompt_robustness`].

    Returns:
        `dict` with `pss`, its `interval`, `robust_share` (of the cases, those below 0.1), `n_cases`, `n_excluded`
        (fewer than two scores) and `n_missing`.
    """
    check_settings(confidence, num_resamples, scale)
    rows = as_rows(matrix)
    found = []
    for row in rows:
        scored = row[~np.isnan(row)]
        if len(scored) >= 2:
            found.append([np.mean([abs(a - b) for a, b in combinations(scored, 2)])])
    values = np.array(found).reshape(-1, 1)
    # The largest mean over pairs is that of two halves at the ends: a little over half the scale; the scale bounds it.
    ends = None if scale is None else (0.0, scale[1] - scale[0])
    interval = case_intervals(values, [ends], confidence=confidence, num_resamples=num_resamples, seed=seed)[0]
    return Sensitivity(
        pss=float(values.mean()) if len(values) else None,
        interval=interval,
        robust_share=float((values < PSS_ROBUST).mean()) if len(values) else None,
        n_cases=len(values),
        n_excluded=len(rows) - len(values),
        n_missing=sum(int(np.isnan(row).sum()) for row in rows),
    )


def answer_agreement(
    answers: Sequence[Sequence[str | None]],
    *,
    normalise: Callable[[str], str] | None = None,
    confidence: float = 0.95,
    num_resamples: int = RESAMPLES,
    seed: int = 0,
) -> Agreement:
    """
    How often two wordings of a case get the same answer. Judge-free; of use where answers are short.

    Args:
        answers (`Sequence[Sequence[str]]`):
            Cases x wordings; `None` where there is no answer.
        normalise (`Callable`, *optional*):
            Makes of an answer what is compared; [`normalised`] by default.
        confidence, num_resamples, seed (*optional*):
            As in [`prompt_robustness`].

    Returns:
        `dict` with `agreement` (share of the pairs of wordings with the same answer, mean over cases), `majority`
        (share of the most common answer, mean over cases), `intervals` of both, `n_cases`, `n_excluded` (fewer than
        two answers) and `n_missing`.

    Example:

    ```python
    >>> found = answer_agreement([["Oslo.", "oslo", "Bergen"]])
    >>> round(found["agreement"], 3), round(found["majority"], 3)
    (0.333, 0.667)
    ```
    """
    check_settings(confidence, num_resamples)
    same = normalise or normalised
    found = []
    for case in answers:
        given = [same(answer) for answer in case if answer is not None]
        if len(given) >= 2:
            counts = Counter(given).values()
            pairs = len(given) * (len(given) - 1)
            found.append([sum(count * (count - 1) for count in counts) / pairs, max(counts) / len(given)])
    values = np.array(found).reshape(-1, 2)
    intervals = case_intervals(values, [(0.0, 1.0)] * 2, confidence=confidence, num_resamples=num_resamples, seed=seed)
    return Agreement(
        agreement=float(values[:, 0].mean()) if len(values) else None,
        majority=float(values[:, 1].mean()) if len(values) else None,
        intervals=dict(zip(("agreement", "majority"), intervals, strict=True)),
        n_cases=len(values),
        n_excluded=len(answers) - len(values),
        n_missing=sum(answer is None for case in answers for answer in case),
    )


def normalised(answer: str) -> str:
    """
    An answer in lower case, with single spaces, without punctuation at its ends.

    Args:
        answer (`str`):
            What a model said.

    Returns:
        `str`.
    """
    return re.sub(r"^\W+|\W+$", "", " ".join(answer.casefold().split()))


def posix(
    subject: Subject,
    wordings: Sequence[Sequence[Prompt]],
    answers: Sequence[Sequence[str | None]],
    *,
    confidence: float = 0.95,
    num_resamples: int = RESAMPLES,
    seed: int = 0,
) -> Posix:
    """
    POSIX: how much less likely the answer to one wording becomes under another. Judge-free.

    For a case with N wordings x and the answers y that the model gave to them: the mean over the N(N-1) ordered pairs
    of `|log P(y_j | x_i) - log P(y_j | x_j)| / len(y_j)`, in nats a token; then the mean over cases.

    Args:
        subject ([`~trl_robust.attacks.Subject`]):
            The model that answered. Its chat template is applied to plain wordings.
        wordings (`Sequence[Sequence[str]]`):
            Cases x wordings.
        answers (`Sequence[Sequence[str]]`):
            The answer to each; `None` where there is none. An empty answer counts as none. Its length is that of its
            text in tokens, without an end-of-text token.
        confidence, num_resamples, seed (*optional*):
            As in [`prompt_robustness`].

    Returns:
        `dict` with `posix`, its `interval`, `cases` (one value each, `None` where excluded), `n_cases`, `n_excluded`
        (fewer than two answers) and `n_missing`.

    Raises:
        `ValueError`: different numbers of wordings and answers.
    """
    check_settings(confidence, num_resamples)
    if [len(case) for case in wordings] != [len(case) for case in answers]:
        raise ValueError("`wordings` and `answers` differ in shape; give one answer, or None, for every wording.")
    cases = list(zip(wordings, answers, strict=True))
    found = [posix_of_case(subject, *cases[number]) for number in subject.track(range(len(cases)), "POSIX")]
    return summed_posix(found, answers, confidence=confidence, num_resamples=num_resamples, seed=seed)


def summed_posix(
    cases: Sequence[float | None],
    answers: Sequence[Sequence[str | None]],
    *,
    confidence: float = 0.95,
    num_resamples: int = RESAMPLES,
    seed: int = 0,
) -> Posix:
    """
    The mean of what [`posix_of_case`] found, with its interval.

    Args:
        cases (`Sequence[float]`):
            POSIX of each case, `None` where it has none.
        answers (`Sequence[Sequence[str]]`):
            The answers, to count what is missing.
        confidence, num_resamples, seed (*optional*):
            As in [`prompt_robustness`].

    Returns:
        As [`posix`].
    """
    values = np.array([value for value in cases if value is not None]).reshape(-1, 1)
    return Posix(
        posix=float(values.mean()) if len(values) else None,
        interval=case_intervals(values, [None], confidence=confidence, num_resamples=num_resamples, seed=seed)[0],
        cases=list(cases),
        n_cases=len(values),
        n_excluded=len(cases) - len(values),
        n_missing=sum(not answer for case in answers for answer in case),
    )


def posix_of_case(subject: Subject, wordings: Sequence[Prompt], answers: Sequence[str | None]) -> float | None:
    """
    POSIX of one case; see [`posix`].

    Args:
        subject ([`~trl_robust.attacks.Subject`]):
            The model that answered.
        wordings (`Sequence[str]`):
            Wordings of the case.
        answers (`Sequence[str]`):
            The answer to each, `None` where there is none.

    Returns:
        `float`, or `None` with fewer than two answers.
    """
    kept = [
        (subject.encode(wording), tokens)
        for wording, answer in zip(wordings, answers, strict=True)
        if answer and (tokens := subject.encode_opening(answer))
    ]
    n = len(kept)
    if n < 2:
        return None
    pairs = [(prompt, answer) for prompt, _ in kept for _, answer in kept]
    log_probs = np.array(answer_log_probs(subject, pairs)).reshape(n, n)  # [i, j] is log P(y_j | x_i)
    lengths = np.array([len(answer) for _, answer in kept])
    return float((np.abs(log_probs - np.diag(log_probs)) / lengths).sum() / (n * (n - 1)))


@torch.no_grad()
def answer_log_probs(subject: Subject, pairs: Sequence[tuple[list[int], list[int]]]) -> list[float]:
    """
    Log-probabilities of answers after prompts, in nats, summed over the answer's tokens in float32.

    Args:
        subject ([`~trl_robust.attacks.Subject`]):
            The model.
        pairs (`Sequence[tuple[list[int], list[int]]]`):
            Tokens of a prompt, and of an answer with at least one.

    Returns:
        `list[float]`, in the order of `pairs`.
    """
    # Rows of like length together: less padding.
    waiting = sorted(range(len(pairs)), key=lambda number: sum(map(len, pairs[number])))
    found: dict[int, float] = {}
    while waiting:
        numbers, waiting = _next_batch(waiting, pairs, subject.batch_size)
        batch: list[tuple[list[int], list[int]]] = [pairs[number] for number in numbers]
        logits: Any = label_logits(
            subject.model,
            subject.pad([prompt + answer for prompt, answer in batch], "right"),
            subject.pad([[1] * len(prompt + answer) for prompt, answer in batch], "right", 0),
            subject.pad([[-100] * len(prompt) + answer for prompt, answer in batch], "right", -100),
        )
        sums = -logits.row_sums(toward(logits.logits, logits.targets))
        found.update(zip(numbers, sums.tolist(), strict=True))
    return [found[number] for number in range(len(pairs))]


def _next_batch(
    waiting: list[int], pairs: Sequence[tuple[list[int], list[int]]], most: int
) -> tuple[list[int], list[int]]:
    """At most so many rows, and at most so many answer tokens: the vocabulary is written out for every one of them."""
    size, tokens = 0, 0
    while size < min(most, len(waiting)):
        tokens += len(pairs[waiting[size]][1])
        if size and tokens > ANSWER_TOKENS:
            break
        size += 1
    return waiting[:size], waiting[size:]
