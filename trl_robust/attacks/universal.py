from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch

from ..inner import Perturbation, attack_mode, median_norms
from ..inner.search import STEEPEST_REACH
from ..objectives import label_logits, toward
from ..threat import ThreatModel
from ..threat.balls import Norm, project, random_point, steepest
from ..threat.model import RadiusUnit
from ..threat.sites import Site, Stream, base_model
from .latent import Latent
from .linears import all_errored
from .subject import AttackRow, Generation, Subject

Alignment = Literal["every", "end"]


@dataclass(frozen=True)
class Universal:
    """
    One perturbation a site for all requests, found on some examples and applied to others (2502.05209).

    Every step takes all examples. Of the points passed, the one with the lowest loss on the examples is applied.

    Args:
        examples (`list[dict]`):
            Rows of `prompt` and `target` (the opening of an answer, never the answer), about other requests than
            those asked.
        sites (`tuple`, *optional*, defaults to `("embedding", 0.25, 0.5)`):
            Where; see [`~trl_robust.ThreatModel`].
        stream (`str`, *optional*, defaults to `"layer"`):
            `"layer"` or `"mlp"`.
        alignment (`str`, *optional*, defaults to `"every"`):
            `"every"`: one vector a site, the same at every token of the prompt. `"end"`: one vector for each of the
            last `tokens` tokens of the prompt, counted from its end; a shorter prompt gets the last of them.
        tokens (`int`, *optional*, defaults to `8`):
            Number of vectors a site with `alignment="end"`.
        norm (`str`, *optional*, defaults to `"l2"`):
            Norm of the ball, one for every token.
        radius (`float`, *optional*, defaults to `0.3`):
            Radius.
        radius_unit (`str`, *optional*, defaults to `"relative"`):
            `"relative"` to the median norm of the attacked model's own hidden states over the examples' prompts, or
            `"absolute"`.
        steps (`int`, *optional*, defaults to `32`):
            Steps of the search, each of 2.5 times the radius over their number.
        objective (`str`, *optional*, defaults to `"targeted"`):
            `"targeted"`, or `"random"`: random vectors of the same norm, the same for all requests, the control.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the control.

    Raises:
        `ValueError`: no examples, an example without a target, or a value out of its range.
    """

    examples: list[dict[str, Any]] = field(repr=False)
    sites: tuple[str | int | float, ...] = ("embedding", 0.25, 0.5)
    stream: Stream = "layer"
    alignment: Alignment = "every"
    tokens: int = 8
    norm: Norm = "l2"
    radius: float = 0.3
    radius_unit: RadiusUnit = "relative"
    steps: int = 32
    objective: Literal["targeted", "random"] = "targeted"
    seed: int = 0
    name: ClassVar[str] = "universal"
    attack_class: ClassVar[str] = "latent"
    version: ClassVar[int] = 1
    budget_axis: ClassVar[str] = "radius"

    def __post_init__(self) -> None:
        problems = self.threat.faults()
        if not self.examples:
            problems.append("The universal attack has no examples; give rows of `prompt` and `target`.")
        if bare := [number for number, row in enumerate(self.examples) if not row.get("target")]:
            problems.append(f"Example {bare[0]} has no `target`; give each the opening of an answer.")
        if self.alignment not in ("every", "end"):
            problems.append(f"`alignment` is {self.alignment!r}; choose `every` or `end`.")
        if self.objective not in ("targeted", "random"):
            problems.append(f"`objective` is {self.objective!r}; choose `targeted` or `random`.")
        if self.tokens < 1 or self.steps < 0:
            problems.append(f"`tokens` is {self.tokens}, `steps` {self.steps}; they must be at least 1 and 0.")
        if problems:
            raise ValueError(" ".join(problems))

    @property
    def threat(self) -> ThreatModel:
        """The threat model that the fields describe."""
        return ThreatModel(self.sites, self.stream, "prompt", self.norm, self.radius, self.radius_unit, "token")

    def run(self, subject: Subject, rows: Sequence[AttackRow]) -> list[Generation]:
        """Answers of the model under the perturbation; see [`Subject.answer`]."""
        try:
            found = self.found(subject)
        except (RuntimeError, FloatingPointError) as error:
            return all_errored(rows, error)

        def perturbed(batch: Sequence[AttackRow]) -> Perturbation:
            return self.spread(found, [len(subject.encode(row.prompt)) for row in batch], subject.device)

        return subject.answer(rows, self.name, perturb=perturbed)

    def found(self, subject: Subject) -> dict[Site, torch.Tensor]:
        """
        Finds the perturbation on the examples.

        Args:
            subject ([`Subject`]):
                The model.

        Returns:
            `dict[Site, torch.Tensor]`: for every site a float32 tensor of shape `(T, H)`: one vector with
            `alignment="every"`, else one for each of the last `tokens` tokens of a prompt, in their order.

        Raises:
            `FloatingPointError`: the loss has a gradient that is not finite.
        """
        model = subject.model
        rows = [AttackRow(str(number), row["prompt"], row["target"]) for number, row in enumerate(self.examples)]
        groups = [rows[i : i + subject.batch_size] for i in range(0, len(rows), subject.batch_size)]
        batches = [Latent._batch(subject, group) for group in groups]
        lengths = [[len(subject.encode(row.prompt)) for row in group] for group in groups]
        threat = self.threat
        if threat.radius_unit == "relative":
            threat = threat.calibrated(median_norms(model, batches, threat))
        radius = {site: threat.radius_at(site) for site in threat.resolve_sites(model)}
        shape = (1, self.tokens if self.alignment == "end" else 1, _hidden_size(model))
        if self.objective == "random":
            generator = torch.Generator().manual_seed(self.seed)
            return {
                site: random_point(
                    shape, self.norm, size, on_boundary=True, generator=generator, device=subject.device
                )[0]
                for site, size in radius.items()
            }
        leaves = {site: torch.zeros(shape, device=subject.device, requires_grad=True) for site in radius}
        best, lowest = {site: leaf.detach()[0].clone() for site, leaf in leaves.items()}, float("inf")
        with torch.enable_grad(), attack_mode(model):
            for step in subject.track(range(self.steps + 1), "universal search"):
                loss, gradients = self._gradients(subject, batches, lengths, leaves)
                if loss < lowest:
                    best, lowest = {site: leaf.detach()[0].clone() for site, leaf in leaves.items()}, loss
                if step == self.steps:
                    break
                for (site, leaf), gradient in zip(leaves.items(), gradients, strict=True):
                    size = STEEPEST_REACH * radius[site] / self.steps
                    moved = leaf.detach() - size * steepest(gradient, self.norm)
                    leaf.detach().copy_(project(moved, self.norm, radius[site]))
        return best

    def spread(self, found: dict[Site, torch.Tensor], lengths: Sequence[int], device: torch.device) -> Perturbation:
        """
        The perturbation as it lies over the prompts of a batch.

        Args:
            found (`dict[Site, torch.Tensor]`):
                What [`Universal.found`] gives.
            lengths (sequence of `int`):
                Number of tokens of every prompt.
            device (`torch.device`):
                Where to.

        Returns:
            [`~trl_robust.inner.Perturbation`].
        """
        rank = torch.arange(max(lengths), device=device)
        length = torch.tensor(lengths, device=device).unsqueeze(-1)
        selected = rank < length
        slot = torch.zeros_like(selected, dtype=torch.long)
        if self.alignment == "end":
            slot = rank - (length - self.tokens)
            selected = selected & (slot >= 0)
            slot = slot.clamp(0, self.tokens - 1)
        deltas = {site: delta[slot] * selected.unsqueeze(-1) for site, delta in found.items()}
        return Perturbation(deltas, selected, self.stream)

    def _gradients(
        self,
        subject: Subject,
        batches: Sequence[dict[str, torch.Tensor]],
        lengths: Sequence[Sequence[int]],
        leaves: dict[Site, torch.Tensor],
    ) -> tuple[float, list[torch.Tensor]]:
        """Mean loss over the examples, and its gradient in every vector."""
        total, gradients = 0.0, [torch.zeros_like(leaf) for leaf in leaves.values()]
        for batch, counts in zip(batches, lengths, strict=True):
            perturbation = self.spread({site: leaf[0] for site, leaf in leaves.items()}, counts, subject.device)
            # Installed until the backward pass is done: under checkpointing the hooks run again there.
            with perturbation.installed(subject.model):
                found = label_logits(subject.model, batch["input_ids"], batch["attention_mask"], batch["labels"])
                loss = found.row_means(toward(found.logits, found.targets)).sum() / len(self.examples)
                parts = torch.autograd.grad(loss, list(leaves.values()))
            total += loss.item()
            for gradient, part in zip(gradients, parts, strict=True):
                gradient.add_(part)
        if not all(gradient.isfinite().all() for gradient in gradients):
            raise FloatingPointError(
                "the loss has a gradient that is not finite; run the model in bfloat16 or float32 instead of float16"
            )
        return total, gradients


def _hidden_size(model: Any) -> int:
    return base_model(model).config.get_text_config().hidden_size
