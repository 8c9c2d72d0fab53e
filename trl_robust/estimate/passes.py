"""What a run does: which passes over which rows, and how often. Forward passes as the trainers count them, and FLOPs.

One forward pass is one row through the whole model. A backward pass to the activations counts as one more, a training
pass as three, and a pass through some of the layers by their share; how long a row is makes no difference to it, and
all the difference to its FLOPs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

from ..threat.sites import Site, resolve_sites
from .lengths import Lengths
from .shapes import Shape

PARTS = ("attack", "defence", "benign", "reference")
"""What a step's work is divided into."""


@dataclass(frozen=True)
class Pass:
    """
    Passes over one share of a micro-batch, in each of its attacks or updates.

    Args:
        part (`str`):
            One of `PARTS`.
        share (`str`):
            Which rows: `chosen`, `rejected`, `pair` (both below one another) or `benign`.
        losses (`tuple[str, ...]`):
            What is made of them: `toward`, `away`, `kl`, `fused` (TRL's own head), `reference` (logits alone) or
            `hidden` (an error of hidden states).
        whole (`float`, *optional*, defaults to `0.0`):
            Forward passes.
        resumed (`float`, *optional*, defaults to `0.0`):
            Forward passes from the first perturbed place on.
        back (`float`, *optional*, defaults to `0.0`):
            Backward passes to the first perturbed place.
        trained (`float`, *optional*, defaults to `0.0`):
            Training passes.
        rows (`int`, *optional*, defaults to `1`):
            Rows for every row of the micro-batch.
        below (`float`, *optional*, defaults to `0.0`):
            Layers below the first perturbed place (a mean where it changes from attack to attack).
        layers (`int`, *optional*):
            Layers that run in a whole or training pass; all if not given.
    """

    part: str
    share: str
    losses: tuple[str, ...]
    whole: float = 0.0
    resumed: float = 0.0
    back: float = 0.0
    trained: float = 0.0
    rows: int = 1
    below: float = 0.0
    layers: int | None = None

    def forward_passes(self, depth: int) -> float:
        """
        What the trainers count for it, a row of the micro-batch.

        Args:
            depth (`int`):
                Layers of the model.

        Returns:
            `float`.
        """
        run = 1.0 if self.layers is None else self.layers / depth
        above = 1 - self.below / depth
        return self.rows * (self.whole * run + (self.resumed + self.back) * above + 3 * self.trained * run)

    def flops(self, shape: Shape, lengths: Lengths, *, checkpointing: bool, all_positions: bool) -> float:
        """
        Its floating-point operations: matrix products and attention, the square of a row's width in full.

        Args:
            shape ([`Shape`]):
                Of the model.
            lengths ([`Lengths`]):
                Of a batch of its rows.
            checkpointing (`bool`):
                Whether layers run forward once more in a backward pass.
            all_positions (`bool`):
                Whether TRL's head projects every position, as on the CPU.

        Returns:
            `float`.
        """
        work = _Work(shape, lengths, self, all_positions)
        again = 1 if checkpointing else 0
        top = shape.depth if self.layers is None else self.layers
        lowest = next((number for number, layer in enumerate(shape.layers) if layer.trained), top)
        total = self.whole * work.forward(0, top) + self.resumed * work.forward(self.below, top)
        total += self.back * (work.backward(self.below, top) + again * work.again(self.below, top, frozen=True))
        if self.trained:
            first = 0 if shape.trained_below else lowest
            total += self.trained * (work.forward(0, top) + work.backward(first, top) + work.weights(lowest, top))
            total += self.trained * again * work.again(first, top, frozen=False)
        return total


class _Work:
    """FLOPs of a batch, by direction; layers are counted from `start` (perhaps within one) to `end`."""

    def __init__(self, shape: Shape, lengths: Lengths, of: Pass, all_positions: bool) -> None:
        self.shape = shape
        self.tokens = lengths.rows * lengths.width
        self.attended = lengths.rows * lengths.width**2 * shape.attention
        self.fused = "fused" in of.losses
        projected = lengths.rows * (lengths.width - 1) if self.fused and all_positions else lengths.labels
        # For hidden states the head is asked for one position a row, which is nothing.
        self.head = 0 if "hidden" in of.losses else 2 * projected * shape.head.total

    def layers(self, start: float, end: int) -> float:
        return 2 * self.tokens * self._weights(start, end, "total") + 4 * self.attended * (end - start)

    def again(self, start: float, end: int, *, frozen: bool) -> float:
        """A checkpointed stretch run forward once more, in each layer up to the last thing that was kept."""
        kept = self.shape.layers[round(start) : end]
        spared = sum(layer.last for layer in kept if frozen or not layer.last_adapted)
        return self.layers(start, end) - 2 * self.tokens * spared

    def forward(self, start: float, end: int) -> float:
        return self.layers(start, end) + self.head

    def backward(self, start: float, end: int) -> float:
        # The fused head makes its logits a second time.
        products = 2 * self.tokens * self._weights(start, end, "total") + 8 * self.attended * (end - start)
        return products + self.head * (2 if self.fused else 1)

    def weights(self, start: int, end: int) -> float:
        head = self.head if self.shape.head.trained else 0
        return 2 * self.tokens * self._weights(start, end, "trained") + head

    def _weights(self, start: float, end: int, which: str) -> float:
        counts = [getattr(layer, which) for layer in self.shape.layers[int(start) : end]]
        cut = (start - int(start)) * counts[0] if counts else 0
        return sum(counts) - cut


def prefix_of(sites: Sequence[Site], stream: str) -> int:
    """
    Layers whose output an attack at some sites does not change, so that they run once an attack.

    Args:
        sites (sequence of `Site`):
            Resolved sites, in the order in which they run.
        stream (`str`):
            `"layer"` or `"mlp"`.

    Returns:
        `int`.
    """
    first = sites[0]
    return 0 if isinstance(first, str) else first + (stream == "layer")


def attack_passes(training: Any, terms: Sequence[tuple[str, str, int]], depth: int) -> list[Pass]:
    """
    The search for one micro-batch's perturbation.

    Args:
        training ([`~trl_robust.trainers.lat_arguments.AttackArguments`]):
            Settings.
        terms (sequence of `tuple`):
            Terms of the attack's loss: rows they are taken on, kind of loss, and how often each row stands in a pass.
        depth (`int`):
            Layers of the model.

    Returns:
        `list` of [`Pass`]; empty if nothing is searched for.
    """
    if not training.attacks or training.attack_objective == "refusal_direction":
        return []
    candidates = resolve_sites(training.attack_sites, depth)
    below = mean_prefix(training, candidates)
    steps = 0 if training.attack_objective == "random" else training.attack_steps
    found = []
    for share, loss, rows in terms:
        one = Pass("attack", share, (loss,), rows=rows, below=below)
        if training.attack_site_choice == "gradient":
            found.append(replace(one, whole=1, back=1, below=prefix_of(candidates, training.attack_stream)))
        # The first pass fills the cache. The last one only measures the loss; with no step to take it is the first,
        # but for a random perturbation, whose loss is measured before as well.
        measures = 1 if steps or training.attack_objective == "random" else 0
        found.append(replace(one, whole=1, resumed=max(steps - 1, 0) + measures, back=steps))
    return found


def mean_prefix(training: Any, candidates: Sequence[Site]) -> float:
    """
    Layers below the first attacked site; the mean over all choices where sites are chosen anew in every attack.

    Args:
        training ([`~trl_robust.trainers.lat_arguments.AttackArguments`]):
            Settings.
        candidates (sequence of `Site`):
            Resolved sites.

    Returns:
        `float`.
    """
    count = len(candidates) if training.attack_site_choice == "all" else training.attack_num_sites
    prefixes = [
        prefix_of(chosen, training.attack_stream) for chosen in combinations(candidates, min(count, len(candidates)))
    ]
    return sum(prefixes) / len(prefixes)
