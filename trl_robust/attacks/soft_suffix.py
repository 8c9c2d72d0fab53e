from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from ..inner import Perturbation, find_perturbation
from ..threat import ThreatModel
from ..threat.sites import base_model
from .request import chance
from .subject import AttackRow, Generation, Prompt, Subject

NEUTRAL = ("!", ".", "x")
"""Words that the suffix may start from; the first that the tokenizer knows is taken."""

WHERE = {True: "at the end of the user turn", False: "right before the answer"}


@dataclass(frozen=True)
class SoftSuffix:
    """
    Free embedding vectors behind the request, searched for every request by sign steps toward the row's target
    (2402.09063). Rows without a target are skipped.

    The vectors stand at the end of the user turn. Where that place cannot be found, since the chat template does more
    than to put the request between fixed texts, they stand right before the answer; the prompt of the generation says
    which. They start as the embeddings of a neutral word, so that 0 steps are those words as text, and there is no
    bound on how far they go but the number of steps.

    Args:
        tokens (`int`, *optional*, defaults to `20`):
            How many vectors.
        steps (`int`, *optional*, defaults to `200`):
            Steps of the search.
        learning_rate (`float`, *optional*, defaults to `1e-3`):
            Step in every coordinate. Vectors are changed where they enter the first layer.
        init (`str`, *optional*):
            The neutral word; by default the first of `!`, `.` and `x` that the tokenizer knows.
        objective (`str`, *optional*, defaults to `"targeted"`):
            `"targeted"`, or `"random"`: as many steps of the same size with random signs, the control.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the control.

    Raises:
        `ValueError`: a value out of its range.
    """

    tokens: int = 20
    steps: int = 200
    learning_rate: float = 1e-3
    init: str | None = None
    objective: Literal["targeted", "random"] = "targeted"
    seed: int = 0
    name: ClassVar[str] = "soft_suffix"
    attack_class: ClassVar[str] = "embedding"
    version: ClassVar[int] = 2
    budget_axis: ClassVar[str] = "steps"

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.steps < 0 or not self.learning_rate > 0:
            raise ValueError(
                f"A soft suffix has at least 1 token, 0 steps and a learning rate above 0, not tokens={self.tokens}, "
                f"steps={self.steps}, learning_rate={self.learning_rate}."
            )
        if self.objective not in ("targeted", "random"):
            raise ValueError(f"`objective` is {self.objective!r}; choose `targeted` or `random`.")
        if self.init is not None and not self.init.strip():
            raise ValueError("`init` is empty; name a neutral word such as `!`, or leave it out.")

    def run(self, subject: Subject, rows: Sequence[AttackRow]) -> list[Generation]:
        """Answers of the model to the requests with their suffixes; see [`Subject.answer`]."""
        own = {field.name: getattr(subject, field.name) for field in dataclasses.fields(Subject)}
        suffixed = Suffixed(**own, tokens=self.tokens, init=self.init)

        def worst(batch: Sequence[AttackRow]) -> Perturbation:
            if self.objective == "random":
                return self._random(suffixed, batch)
            return find_perturbation(
                suffixed.model,
                _batch(suffixed, batch),
                # The box is as large as the steps reach: it never holds a vector back.
                ThreatModel(
                    ("embedding",), positions="last_user", norm="linf", radius=self.steps * self.learning_rate
                ),
                steps=self.steps,
                learning_rate=self.learning_rate,
                optimizer="sign",
            )

        found = suffixed.answer(rows, self.name, needs_target=True, perturb=worst)
        for generation in found:
            if generation.status == "generated":
                place = WHERE[suffixed.placed(generation.row.prompt)[2]]
                generation.prompt += f" [{self.tokens} soft tokens {place}]"
        return found

    def _random(self, suffixed: Suffixed, rows: Sequence[AttackRow]) -> Perturbation:
        """A random walk of every row, drawn row by row, so that it does not depend on the size of the batch."""
        starts = [suffixed.placed(row.prompt)[1] for row in rows]
        hidden = base_model(suffixed.model).config.get_text_config().hidden_size
        delta = torch.zeros(len(rows), max(starts) + self.tokens, hidden)
        for number, start in enumerate(starts):
            generator = torch.Generator().manual_seed(chance(self.seed, rows[number]).getrandbits(62))
            walk = torch.zeros(self.tokens, hidden)
            for _ in range(self.steps):
                walk += torch.randint(0, 2, walk.shape, generator=generator) * 2 - 1
            delta[number, start : start + self.tokens] = self.learning_rate * walk
        delta = delta.to(suffixed.device)
        return Perturbation({"embedding": delta}, torch.ones(delta.shape[:2], dtype=torch.bool, device=delta.device))


@dataclass
class Suffixed(Subject):
    """
    A subject whose requests end in neutral tokens.

    Args:
        tokens (`int`, *optional*, defaults to `20`):
            How many.
        init (`str`, *optional*):
            The neutral word.
    """

    tokens: int = 20
    init: str | None = None

    @property
    def text(self) -> str:
        """The suffix as text: the neutral word again and again."""
        word = self.init or next((word for word in NEUTRAL if self._knows(word)), NEUTRAL[0])
        return " ".join([word] * self.tokens)

    def encode(self, prompt: Prompt, opening: str = "") -> list[int]:
        """Tokens of a request with its suffix, ready for an answer, and of the answer's opening."""
        return self.placed(prompt)[0] + self.encode_opening(opening)

    def placed(self, prompt: Prompt) -> tuple[list[int], int, bool]:
        """
        The tokens of a request with the suffix in place.

        Args:
            prompt (`str` or `list[dict]`):
                The request.

        Returns:
            `tuple`: the tokens, the number of the suffix's first one, and whether that lies in the user turn.
        """
        plain = super().encode(prompt)
        longer = super().encode(_with(prompt, self.text))
        start = next(
            (i for i, (one, other) in enumerate(zip(plain, longer, strict=False)) if one != other), len(plain)
        )
        end = start + len(longer) - len(plain)
        inside = end > start and longer[end:] == plain[start:]
        if not inside:
            start = len(plain)
        suffix = longer[start:end] if inside else []
        if len(suffix) != self.tokens:  # a tokenizer that joins the words, or a place that was not found
            word = self.encode_opening(self.text)
            suffix = (word + word[-1:] * self.tokens)[: self.tokens]
        return plain[:start] + suffix + plain[start:], start, inside

    def _knows(self, word: str) -> bool:
        tokens = self.encode_opening(word)
        return len(tokens) == 1 and tokens[0] != self.tokenizer.unk_token_id


def _with(prompt: Prompt, text: str) -> Prompt:
    if isinstance(prompt, str):
        return f"{prompt} {text}"
    *before, last = prompt
    return [*before, {**last, "content": f"{last['content']} {text}"}]


def _batch(suffixed: Suffixed, rows: Sequence[AttackRow]) -> dict[str, torch.Tensor]:
    """Requests with their suffixes and targets; labels on the targets, the span of the suffix as the last user's."""
    placed = [suffixed.placed(row.prompt) for row in rows]
    targets = [suffixed.encode_opening(row.target or "") for row in rows]
    both = [tokens + target for (tokens, _, _), target in zip(placed, targets, strict=True)]
    labels = [[-100] * len(tokens) + target for (tokens, _, _), target in zip(placed, targets, strict=True)]
    return {
        "input_ids": suffixed.pad(both, "right"),
        "attention_mask": suffixed.pad([[1] * len(row) for row in both], "right", 0),
        "labels": suffixed.pad(labels, "right", -100),
        "last_user_span": torch.tensor(
            [[start, start + suffixed.tokens] for _, start, _ in placed], device=suffixed.device
        ),
    }
