from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from jinja2 import TemplateError

from ..objectives import label_logits, toward
from .request import chance, request_of
from .subject import AttackRow, Generation, Subject
from .suffix import NoSuffix, SuffixPlace, locate_suffix, ordinary_tokens

TRIES = 20
"""How many replacements are looked at in search of one that can be typed."""

SuffixObjective = Literal["targeted", "random"]


class SearchFailed(RuntimeError):
    """The search for one request's suffix failed, now or before the run was stopped; the message is the reason."""


@dataclass(frozen=True)
class GCG:
    """
    Greedy coordinate gradient (2307.15043): a suffix behind the request that makes the row's target likely.

    Every step takes the gradient of the target's cross-entropy with respect to the choice of every token of the
    suffix, keeps the `topk` replacements at every place that promise most, measures `candidates` of these
    replacements, drawn without repetition, and takes the best if it is better than what there was. Unlike in the
    paper the loss never rises. A replacement counts only where the suffix, written as text and encoded again with the
    whole prompt, gives the same tokens: the attack is a text that anyone could type.

    Rows without a target, and those whose suffix cannot be found in the encoded prompt, are skipped.

    Args:
        suffix_tokens (`int`, *optional*, defaults to `20`):
            Length of the suffix.
        steps (`int`, *optional*, defaults to `500`):
            Steps of the search. A search of fewer steps is the beginning of one of more.
        candidates (`int`, *optional*, defaults to `512`):
            Replacements that are measured in a step; fewer where fewer are left that can be typed.
        topk (`int`, *optional*, defaults to `256`):
            Replacements at every place that the draw is from.
        stop_loss (`float`, *optional*, defaults to `0.05`):
            The search ends once the mean cross-entropy of the target's tokens is this low, in nats.
        objective (`str`, *optional*, defaults to `"targeted"`):
            `"targeted"`, or `"random"`: replacements drawn from all ordinary tokens without a gradient and measured
            in the same way, the control.
        ascii_only (`bool`, *optional*, defaults to `True`):
            Whether the suffix is of printable ASCII only.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the draw.

    Raises:
        `ValueError`: a setting outside its range.
    """

    suffix_tokens: int = 20
    steps: int = 500
    candidates: int = 512
    topk: int = 256
    stop_loss: float = 0.05
    objective: SuffixObjective = "targeted"
    ascii_only: bool = True
    seed: int = 0
    name: ClassVar[str] = "gcg"
    attack_class: ClassVar[str] = "input"
    version: ClassVar[int] = 1
    budget_axis: ClassVar[str] = "steps"

    def __post_init__(self) -> None:
        for name, least in {"suffix_tokens": 1, "steps": 0, "candidates": 1, "topk": 1, "stop_loss": 0}.items():
            if not getattr(self, name) >= least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}.")
        if self.objective not in get_args(SuffixObjective):
            raise ValueError(f"objective={self.objective!r} is not one of {list(get_args(SuffixObjective))}.")

    @property
    def queries(self) -> int:
        """Suffixes measured for one request at most, besides the first. Each step adds a gradient unless random."""
        return self.steps * self.candidates

    def run(self, subject: Subject, rows: Sequence[AttackRow]) -> list[Generation]:
        """Answers of the model to the requests with their suffixes; see [`Subject.answer`]."""
        tokens = ordinary_tokens(subject, self.ascii_only)
        prompts, failed = [], {}
        for number, row in enumerate(rows):
            try:
                prompts.append(self._attacked(subject, row, tokens, f"gcg, request {number + 1} of {len(rows)}"))
            except NoSuffix as error:
                failed[number] = Generation(row, request_of(row.prompt), status="skipped", reason=str(error))
            except (TemplateError, RuntimeError, ValueError) as error:
                reason = str(error) if isinstance(error, SearchFailed) else f"{type(error).__name__}: {error}"
                failed[number] = Generation(row, request_of(row.prompt), status="errored", reason=reason)
        waiting = [row for number, row in enumerate(rows) if number not in failed]
        answers = iter(
            subject.answer(waiting, self.name, needs_target=True, prompt_of=lambda number, row: prompts[number])
        )
        return [failed.get(number) or next(answers) for number in range(len(rows))]

    def _attacked(self, subject: Subject, row: AttackRow, tokens: list[int], description: str) -> Any:
        if not row.target:
            return row.prompt  # will be skipped for that
        if not subject.encode_opening(row.target):
            raise NoSuffix("the target has no tokens")
        place = locate_suffix(subject, row.prompt, self.suffix_tokens, tokens)
        if len(place.tokens(place.start)) > subject.max_prompt_tokens:
            return place.prompt(place.start)  # likewise

        def found() -> list[int] | str:
            try:
                return self.search(subject, row, place, tokens, description)[0]
            except (RuntimeError, ValueError, FloatingPointError) as error:
                return f"{type(error).__name__}: {error}"

        suffix = subject.remembered([self.name, row.id, row.target, place.tokens(place.start)], found)
        if isinstance(suffix, str):
            raise SearchFailed(suffix)
        return place.prompt(suffix)

    def search(
        self, subject: Subject, row: AttackRow, place: SuffixPlace, tokens: list[int], description: str = "gcg"
    ) -> tuple[list[int], list[float]]:
        """
        Searches the suffix of one request.

        Args:
            subject ([`Subject`]):
                The model.
            row ([`AttackRow`]):
                The request, with a target.
            place (`SuffixPlace`):
                Where the suffix goes.
            tokens (`list[int]`):
                What it may consist of.
            description (`str`, *optional*):
                What the progress bar says.

        Returns:
            `tuple`: tokens of the suffix, and the losses before the first step and after every one (fewer where the
            search ended early).

        Raises:
            `FloatingPointError`: the loss of the first suffix is not finite.
        """
        target = subject.encode_opening(row.target or "")
        generator = torch.Generator().manual_seed(chance(self.seed, row).getrandbits(62))
        suffix = place.start
        losses = suffix_losses(subject, place, target, [suffix])
        if not losses[0] < float("inf"):
            raise FloatingPointError(f"the loss of the target is {losses[0]} before the first step")
        choices = torch.tensor(tokens)
        for _ in subject.track(range(self.steps), description):
            if losses[-1] <= self.stop_loss:
                break
            swaps = self._choices(subject, place, target, suffix, choices)
            candidates = self._draw(place, suffix, swaps, generator)
            found = suffix_losses(subject, place, target, candidates) if candidates else [float("inf")]
            best = min(range(len(found)), key=found.__getitem__)
            if found[best] < losses[-1]:
                suffix = candidates[best]
            elif len(candidates) < self.candidates and swaps.numel() <= TRIES * self.candidates:
                break  # everything was measured, and nothing is better
            losses.append(min(found[best], losses[-1]))
        return suffix, losses

    def _choices(
        self, subject: Subject, place: SuffixPlace, target: list[int], suffix: list[int], tokens: torch.Tensor
    ) -> torch.Tensor:
        """Tokens that may replace each one of the suffix, of shape `(suffix_tokens, K)`."""
        if self.objective == "random":
            return tokens.expand(len(suffix), -1)
        gradient = suffix_gradient(subject, place, target, suffix, tokens)
        # The loss goes down along minus the gradient. What stands there already is no replacement.
        gradient[tokens.expand(len(suffix), -1) == torch.tensor(suffix)[:, None]] = float("inf")
        best = gradient.topk(min(self.topk, len(tokens)), largest=False).indices
        return tokens[best]

    def _draw(
        self, place: SuffixPlace, suffix: list[int], swaps: torch.Tensor, generator: torch.Generator
    ) -> list[list[int]]:
        """Suffixes with one token replaced, all different and all readable."""
        found: list[list[int]] = []
        order = torch.randperm(swaps.numel(), generator=generator)[: TRIES * self.candidates]
        for index in order.tolist():
            where, which = divmod(index, swaps.shape[1])
            token = int(swaps[where, which])
            candidate = [*suffix[:where], token, *suffix[where + 1 :]]
            if token != suffix[where] and place.readable(candidate):
                found.append(candidate)
                if len(found) == self.candidates:
                    break
        return found


@torch.no_grad()
def suffix_losses(
    subject: Subject, place: SuffixPlace, target: list[int], suffixes: Sequence[list[int]]
) -> list[float]:
    """
    Mean cross-entropy of the target behind the prompt with each suffix, batch by batch.

    Args:
        subject ([`Subject`]):
            The model.
        place (`SuffixPlace`):
            Where the suffix goes.
        target (`list[int]`):
            Tokens of the target.
        suffixes (sequence of `list[int]`):
            Tokens of the suffixes.

    Returns:
        `list[float]`, in nats; infinite where it is not a number.
    """
    found: list[float] = []
    for start in range(0, len(suffixes), subject.batch_size):
        batch = suffixes[start : start + subject.batch_size]
        scores = label_logits(subject.model, *_labelled(subject, place, target, batch))
        losses = scores.row_means(toward(scores.logits, scores.targets))
        found += losses.nan_to_num(nan=float("inf"), posinf=float("inf")).tolist()
    return found


def suffix_gradient(
    subject: Subject, place: SuffixPlace, target: list[int], suffix: list[int], tokens: torch.Tensor
) -> torch.Tensor:
    """
    Gradient of the target's mean cross-entropy with respect to the one-hot choice of every token of the suffix.

    It is taken at the output of the embedding, whatever that does to its rows (some models scale them), so that no
    weight needs a gradient: quantised models and adapters are as good as others.

    Args:
        subject ([`Subject`]):
            The model.
        place (`SuffixPlace`):
            Where the suffix goes.
        target (`list[int]`):
            Tokens of the target.
        suffix (`list[int]`):
            Tokens of the suffix.
        tokens (`torch.Tensor` of shape `(V,)`):
            Tokens to choose from.

    Returns:
        `torch.Tensor` of shape `(suffix_tokens, V)` in float32 on the CPU.
    """
    embedding = subject.model.get_input_embeddings()
    leaves: list[torch.Tensor] = []

    def keep(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        leaves.append(output.detach().requires_grad_())
        return leaves[-1]

    handle = embedding.register_forward_hook(keep)
    try:
        with torch.enable_grad():
            scores = label_logits(subject.model, *_labelled(subject, place, target, [suffix]))
            loss = toward(scores.logits, scores.targets).mean()
            (gradient,) = torch.autograd.grad(loss, leaves)
    finally:
        handle.remove()
    slopes = gradient[0, len(place.before) : len(place.before) + len(suffix)].float()
    with torch.no_grad():
        parts = [slopes @ embedding(part.to(slopes.device)).float().T for part in tokens.split(8192)]
    return torch.cat(parts, dim=1).cpu()


def _labelled(
    subject: Subject, place: SuffixPlace, target: list[int], suffixes: Sequence[list[int]]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, mask and labels. All rows are of one length: suffixes of one request differ in nothing but tokens."""
    tokens = torch.tensor([place.tokens(suffix) + target for suffix in suffixes], device=subject.device)
    labels = torch.full_like(tokens, -100)
    labels[:, -len(target) :] = tokens[:, -len(target) :]
    return tokens, torch.ones_like(tokens), labels
