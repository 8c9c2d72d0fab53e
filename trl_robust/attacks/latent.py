from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..inner import Perturbation, find_perturbation, median_norms
from ..inner.pgd import Objective, Optimizer
from ..threat import ThreatModel
from ..threat.balls import Ball, Norm
from ..threat.model import RadiusUnit
from ..threat.positions import Positions
from ..threat.sites import Stream
from .request import chance
from .subject import AttackRow, Generation, Subject


@dataclass(frozen=True)
class Latent:
    """
    Projected gradient descent on the hidden states of the prompt, one perturbation a request, toward the row's target.

    The target is only the opening of an answer: a search that is given the answer can write it into the residual
    stream of a model that does not know it. Rows without a target are skipped.

    Args:
        sites (`tuple`, *optional*, defaults to `("embedding", 0.25, 0.5)`):
            Where; see [`~trl_robust.ThreatModel`].
        stream (`str`, *optional*, defaults to `"layer"`):
            `"layer"` or `"mlp"`.
        positions (`str`, *optional*, defaults to `"prompt"`):
            Which tokens.
        norm (`str`, *optional*, defaults to `"l2"`):
            Norm of the ball.
        radius (`float`, *optional*, defaults to `0.3`):
            Radius.
        radius_unit (`str`, *optional*, defaults to `"relative"`):
            `"relative"` to the median norm of the attacked model's own hidden states over all requests, so that a
            defence cannot win by making its hidden states larger; or `"absolute"`.
        ball (`str`, *optional*, defaults to `"token"`):
            `"token"` or `"sequence"`.
        steps (`int`, *optional*, defaults to `20`):
            Steps of the search.
        learning_rate (`float`, *optional*, defaults to `5e-2`):
            Learning rate of AdamW.
        optimizer (`str`, *optional*, defaults to `"steepest"`):
            `"steepest"` or `"adamw"`.
        objective (`str`, *optional*, defaults to `"targeted"`):
            `"targeted"`, or `"random"`: a random perturbation of the same norm, the control.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the random control.
    """

    sites: tuple[str | int | float, ...] = ("embedding", 0.25, 0.5)
    stream: Stream = "layer"
    positions: Positions = "prompt"
    norm: Norm = "l2"
    radius: float = 0.3
    radius_unit: RadiusUnit = "relative"
    ball: Ball = "token"
    steps: int = 20
    learning_rate: float = 5e-2
    optimizer: Optimizer = "steepest"
    objective: Objective = "targeted"
    seed: int = 0
    name: ClassVar[str] = "latent"
    attack_class: ClassVar[str] = "latent"
    version: ClassVar[int] = 2
    budget_axis: ClassVar[str] = "radius"

    @property
    def threat(self) -> ThreatModel:
        """The threat model that the fields describe."""
        return ThreatModel(
            self.sites, self.stream, self.positions, self.norm, self.radius, self.radius_unit, self.ball
        )

    def run(self, subject: Subject, rows: Sequence[AttackRow]) -> list[Generation]:
        """Answers of the model under perturbation; see [`Subject.answer`]."""
        threat = self.threat
        if threat.radius_unit == "relative":
            threat = threat.calibrated(self._unit(subject, rows))

        def worst(batch: Sequence[AttackRow]) -> Perturbation:
            # Of its own for every batch, so that a run which goes on in the middle draws the same.
            generator = torch.Generator().manual_seed(chance(self.seed, batch[0]).getrandbits(62))
            return find_perturbation(
                subject.model,
                self._batch(subject, batch),
                threat,
                objective=self.objective,
                steps=self.steps,
                learning_rate=self.learning_rate,
                optimizer=self.optimizer,
                generator=generator,
            )

        return subject.answer(rows, self.name, needs_target=True, perturb=worst)

    def _unit(self, subject: Subject, rows: Sequence[AttackRow]) -> dict:
        usable = [row for row in rows if row.target and len(subject.encode(row.prompt)) <= subject.max_prompt_tokens]
        if not usable:
            return dict.fromkeys(self.threat.resolve_sites(subject.model), 1.0)  # every row will be skipped
        size = subject.batch_size
        batches = [self._batch(subject, usable[start : start + size]) for start in range(0, len(usable), size)]
        return median_norms(subject.model, batches, self.threat)

    @staticmethod
    def _batch(subject: Subject, rows: Sequence[AttackRow]) -> dict[str, torch.Tensor]:
        """Prompts followed by their targets, labels on the targets."""
        prompts = [subject.encode(row.prompt) for row in rows]
        targets = [subject.encode_opening(row.target or "") for row in rows]
        both = [prompt + target for prompt, target in zip(prompts, targets, strict=True)]
        labels = [[-100] * len(prompt) + target for prompt, target in zip(prompts, targets, strict=True)]
        return {
            "input_ids": subject.pad(both, "right"),
            "attention_mask": subject.pad([[1] * len(row) for row in both], "right", 0),
            "labels": subject.pad(labels, "right", -100),
        }


@dataclass(frozen=True)
class Embedding(Latent):
    """
    [`Latent`] at the embedding alone, with a radius above the norm of the embeddings themselves.

    Args:
        sites (`tuple`, *optional*, defaults to `("embedding",)`):
            As in [`Latent`].
        radius (`float`, *optional*, defaults to `1.2`):
            As in [`Latent`].
    """

    sites: tuple[str | int | float, ...] = ("embedding",)
    radius: float = 1.2
    name: ClassVar[str] = "embedding"
    attack_class: ClassVar[str] = "embedding"
