"""Adding perturbations to a running model, with hooks that leave nothing behind.

What a reader should know first:
- A hook is a pure function of stored tensors: it returns a new tensor, writes nothing in place, counts nothing.
- Layers are hooked as objects, which transformers runs once, outside the checkpointed region. A hook on an MLP runs
  inside it, and once more when the region is recomputed.
- Perturbations are stored by rank (see `threat.positions`), so that they fit any padding and both completions of a
  prompt. The ranks of a forward pass are read off its attention mask just before it starts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import nn

from ..threat.positions import ranks
from ..threat.sites import Site, Stream, decoder, decoder_layers, hidden_states, mlp_of


class Change(ABC):
    """A change of the hidden states of one batch, which hooks apply: a [`Perturbation`] or an [`Ablation`]."""

    selected: torch.Tensor
    stream: Stream
    _enabled: bool = True

    @property
    @abstractmethod
    def sites(self) -> tuple[Site, ...]:
        """Where the hidden states are changed."""

    @abstractmethod
    def _changed(self, states: torch.Tensor, site: Site, running: _RunningForward) -> torch.Tensor:
        """The hidden states that come out where `states` went in."""

    @contextmanager
    def installed(self, model: nn.Module, *, copies: int = 1) -> Iterator[Self]:
        """
        Applies the change to every forward pass of the batch inside the `with` block, generation included.

        The rows of a forward pass must be the rows of the batch, in the same order; their padding and completions may
        differ. Hooks are removed on leaving the block, also after an exception. Keep the block open until `backward`
        is done: with checkpointing, part of the forward pass runs again there.

        Args:
            model (`nn.Module`):
                The model, outside distributed wrappers.
            copies (`int`, *optional*, defaults to `1`):
                How often the rows of the batch stand below one another in a forward pass: 2 in DPO, whose batches hold
                the chosen completions of all rows and then the rejected ones.

        Raises:
            `RuntimeError`: a forward pass with another number of rows, or without a two-dimensional attention mask.
        """
        layers = decoder_layers(model)
        running = _RunningForward(self.selected, copies)
        with ExitStack() as hooks:
            hook = decoder(model).register_forward_pre_hook(running.start, with_kwargs=True)
            hooks.callback(hook.remove)
            for site in self.sites:
                if site == "embedding":
                    hook = layers[0].register_forward_pre_hook(self._input_hook(site, running), with_kwargs=True)
                else:
                    module = mlp_of(layers[site]) if self.stream == "mlp" else layers[site]
                    hook = module.register_forward_hook(self._output_hook(site, running))
                hooks.callback(hook.remove)
            yield self

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Forward passes inside this block run without the change, and may be of any batch."""
        before, self._enabled = self._enabled, False
        try:
            yield
        finally:
            self._enabled = before

    def _input_hook(self, site: Site, running: _RunningForward) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            if not self._enabled:
                return None
            if args:
                return (self._changed(args[0], site, running), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": self._changed(kwargs["hidden_states"], site, running)}

        return hook

    def _output_hook(self, site: Site, running: _RunningForward) -> Any:
        def hook(module: nn.Module, args: tuple, output: Any) -> Any:
            if not self._enabled:
                return None
            changed = self._changed(hidden_states(output), site, running)
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        return hook


@dataclass
class Perturbation(Change):
    """
    Perturbations of the hidden states of one batch, and how they were found.

    Args:
        deltas (`dict[Site, torch.Tensor]`):
            For every site a float32 tensor of shape `(B, P, H)`: `P` ranks, see `threat.positions`.
        selected (`torch.Tensor` of shape `(B, P)`):
            Ranks that are perturbed.
        stream (`str`, *optional*, defaults to `"layer"`):
            `"layer"` or `"mlp"`.
        losses (`list[float]`, *optional*):
            The attack's loss, a mean over rows: before every step and after the last. The attack descends it, so for
            an untargeted attack it is *minus* the cross-entropy.
        boundary_fraction (`dict[Site, float]`, *optional*):
            Share of the balls on whose boundary the perturbation lies.
        norms (`dict[Site, float]`, *optional*):
            Mean L2 norm over perturbed tokens.
        forward_passes (`float`, *optional*):
            What the search cost, in forward passes of one row through the whole model (a backward pass to the
            perturbation counts as one more, a resumed pass by the share of layers it runs).
    """

    deltas: dict[Site, torch.Tensor]
    selected: torch.Tensor
    stream: Stream = "layer"
    losses: list[float] = field(default_factory=list)
    boundary_fraction: dict[Site, float] = field(default_factory=dict)
    norms: dict[Site, float] = field(default_factory=dict)
    forward_passes: float = 0.0

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(self.deltas)

    def _changed(self, states: torch.Tensor, site: Site, running: _RunningForward) -> torch.Tensor:
        return states + running.placed(self.deltas[site], states)


@dataclass
class Ablation(Change):
    """
    Removal of one direction from the hidden states of one batch: `h - r r.h` (2409.20089), the zero-step adversary.

    Args:
        directions (`dict[Site, torch.Tensor]`):
            For every site a float32 unit vector of shape `(H,)`.
        selected (`torch.Tensor` of shape `(B, P)`):
            Ranks from which it is removed.
        stream (`str`, *optional*, defaults to `"layer"`):
            `"layer"` or `"mlp"`.
    """

    directions: dict[Site, torch.Tensor]
    selected: torch.Tensor
    stream: Stream = "layer"

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(self.directions)

    def _changed(self, states: torch.Tensor, site: Site, running: _RunningForward) -> torch.Tensor:
        direction = self.directions[site].to(states.device)
        along = (states.float() @ direction).unsqueeze(-1) * direction
        return states - (along * running.mask(states)).to(states.dtype)


class _RunningForward:
    """Where the ranks of a perturbation lie in the forward pass that is running."""

    def __init__(self, selected: torch.Tensor, copies: int = 1) -> None:
        self.selected = selected
        self.copies = copies
        self.rank: torch.Tensor | None = None
        self.applies: torch.Tensor | None = None

    def start(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Forward pre-hook of the decoder: reads the attention mask."""
        tokens = kwargs.get("input_ids", args[0] if args else None)
        tokens = kwargs["inputs_embeds"] if tokens is None else tokens
        width = tokens.shape[1]
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        if mask is None:
            cache = kwargs.get("past_key_values")
            past = cache.get_seq_length() if cache is not None else 0
            mask = torch.ones(tokens.shape[0], past + width, dtype=torch.long, device=tokens.device)
        if mask.dim() != 2:
            self.rank = self.applies = None  # `add` says so, if a perturbation was to be added
            return
        width_of_delta = self.selected.shape[1]
        # During generation the mask covers the tokens in the cache as well; the last ones are those that run now.
        rank = ranks(mask)[:, -width:]
        self.rank = rank.clamp(max=width_of_delta - 1)
        if tokens.shape[0] != self.selected.shape[0] * self.copies:
            self.applies = None
            return
        selected = self.selected.to(rank.device).repeat(self.copies, 1).gather(1, self.rank)
        self.applies = selected & (rank < width_of_delta) & mask[:, -width:].bool()

    def placed(self, delta: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """The delta of shape `(B, P, H)` put where it belongs in `states` of shape `(B * copies, T, H)`, else zero."""
        applies = self.mask(states)
        assert self.rank is not None  # `mask` has looked
        index = self.rank.to(states.device).unsqueeze(-1).expand(-1, -1, states.shape[-1])
        return (delta.to(states.device).repeat(self.copies, 1, 1).gather(1, index) * applies).to(states.dtype)

    def mask(self, states: torch.Tensor) -> torch.Tensor:
        """Which tokens of `states` are changed: `(B * copies, T, 1)`."""
        if self.rank is None or self.applies is None:
            raise RuntimeError(
                f"A forward pass over {states.shape[0]} rows reached a perturbation of {self.selected.shape[0]} rows"
                + (f" x {self.copies}" if self.copies > 1 else "")
                + ", or came without a two-dimensional attention mask. Run the perturbed batch itself, or wrap other "
                "batches in `with perturbation.disabled():`."
            )
        return self.applies.to(states.device).unsqueeze(-1)


class CachedPrefix:
    """
    Runs the layers up to and including `last` once, and from then on only those above (lat.md 7).

    The layers below the first perturbation give the same result in every step of an attack. The model is still called
    as a whole, so masks, rotary embeddings, the final norm and the head stay its own affair; the lower layers merely
    hand on what they get, and layer `last` returns what it returned in the first pass. Valid while the weights, the
    mode and the batch stay what they were.

    Args:
        model (`nn.Module`):
            The model, outside distributed wrappers.
        last (`int`):
            Index of the last layer to skip; -1 to skip none.
    """

    def __init__(self, model: nn.Module, last: int) -> None:
        self.layers = decoder_layers(model)
        self.last = last
        self.output: Any = None

    @property
    def share_run(self) -> float:
        """Share of the layers that the next pass runs."""
        return 1.0 if self.output is None or self.last < 0 else 1 - (self.last + 1) / len(self.layers)

    def of_rows(self, rows: torch.Tensor) -> CachedPrefix:
        """
        The same for some rows of the batch.

        Args:
            rows (`torch.Tensor`):
                Their numbers.

        Returns:
            [`CachedPrefix`]: filled if this one is.
        """
        part = CachedPrefix.__new__(CachedPrefix)
        part.layers, part.last, part.output = self.layers, self.last, self.output
        if isinstance(self.output, tuple):
            part.output = (self.output[0][rows.to(self.output[0].device)], *self.output[1:])
        elif self.output is not None:
            part.output = self.output[rows.to(self.output.device)]
        return part

    @contextmanager
    def resume_from(self) -> Iterator[None]:
        """The first pass inside this block fills the cache; each later one resumes from it."""
        with ExitStack() as undo:
            if self.last >= 0 and self.output is None:
                # First in line: it must see the layer's output before a perturbation is added to it.
                hook = self.layers[self.last].register_forward_hook(self._capture, prepend=True)
                undo.callback(hook.remove)
            elif self.last >= 0:
                as_tuple = isinstance(self.output, tuple)
                for layer in self.layers[: self.last]:
                    shadow(layer, hand_on(lambda: as_tuple), undo)
                shadow(self.layers[self.last], lambda *args, **kwargs: self.output, undo)
            yield

    def _capture(self, module: nn.Module, args: tuple, output: Any) -> Any:
        detached = hidden_states(output).detach()
        self.output = (detached, *output[1:]) if isinstance(output, tuple) else detached
        return self.output


def shadow(layer: nn.Module, forward: Callable[..., Any], undo: ExitStack) -> None:
    """Has a layer run `forward` in place of its own until `undo` is closed."""
    # An attribute of the instance hides the method of the class. accelerate's device hooks do the same, so theirs
    # must come back.
    before = layer.__dict__.get("forward")
    undo.callback(lambda: layer.__dict__.pop("forward") if before is None else setattr(layer, "forward", before))
    layer.forward = forward


def hand_on(as_tuple: Callable[[], bool]) -> Callable[..., Any]:
    """A layer that hands on what it gets, in the form in which its like return it."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        states = args[0] if args else kwargs["hidden_states"]
        return (states,) if as_tuple() else states

    return forward


@contextmanager
def attack_mode(model: nn.Module) -> Iterator[None]:
    """
    Evaluation mode (no dropout, which would make two passes differ) with the parameters frozen, restored on leaving.

    A model that checkpoints activations goes on doing so: its decoder layers, and nothing inside them, stay marked as
    training, which is what transformers looks at. Not so where the layers themselves apply dropout (OPT, Falcon).

    Args:
        model (`nn.Module`):
            The model, outside distributed wrappers.
    """
    modes = [(module, module.training) for module in model.modules()]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    layers = decoder_layers(model)
    own_dropout = getattr(layers[0], "dropout", 0) or getattr(getattr(layers[0], "config", None), "hidden_dropout", 0)
    checkpointing = getattr(layers[0], "gradient_checkpointing", False) and layers[0].training and not own_dropout
    model.eval()
    if checkpointing:
        for layer in layers:
            layer.training = True
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter in trained:
            parameter.requires_grad_(True)
