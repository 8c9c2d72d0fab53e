"""Running a training step on tensors without memory, to see how much it would keep.

What a reader should know first:
- The model's own code runs, on torch's fake tensors, which have a shape and a dtype and no content. Every tensor that
  would be allocated is counted until the last reference to it is gone, so that what autograd keeps, what checkpointing
  runs again and what is only needed for a moment are all seen, in any architecture.
- Weights, gradients and the optimiser's state are not counted here: they are known without running anything.
- All rows are as long as the longest, so no tensor depends on what is in a batch.
- Layers are alike, so a deep model is run with one and with two of its layers, and a straight line put through the two
  (`through_depths`).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode  # documented, in spite of its place
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..inner import Perturbation, attack_mode
from ..objectives import away, kl_divergence, toward
from ..threat.sites import base_model, decoder
from .lengths import Lengths
from .shapes import Blueprint

FUSED_TOKENS, FUSED_VOCABULARY = 4096, 32768
"""Size of the tiles in which TRL's fused head makes logits."""

FUSED_ON_CPU = 7
"""Tiles in float32 that are alive at once in it without Triton."""


@dataclass(frozen=True)
class Held:
    """
    Bytes that a phase needs besides what is always there.

    Args:
        layers (`float`):
            Activations of the decoder that wait for the backward pass.
        losses (`float`):
            Logits at labelled positions and what else the losses keep.
        stages (`tuple[float, ...]`, *optional*):
            The most that is there at any time, the two above included: in the forward pass of every term, and in its
            backward pass.
    """

    layers: float = 0.0
    losses: float = 0.0
    stages: tuple[float, ...] = (0.0,)

    @property
    def peak(self) -> float:
        return max(self.stages)


def through_depths(measure: Callable[[int], Held], depth: int) -> Held:
    """
    What a phase needs over some number of layers, from runs over few.

    Every stage has a line of its own: one that many layers wait in may be the worst only in a deep model.

    Args:
        measure (`Callable`):
            From a number of layers to [`Held`].
        depth (`int`):
            Number of layers.

    Returns:
        [`Held`].
    """
    if depth <= 2:
        return measure(depth)
    one, two = measure(1), measure(2)

    def line(low: float, high: float) -> float:
        return low + (high - low) * (depth - 1)

    stages = tuple(line(low, high) for low, high in zip(one.stages, two.stages, strict=True))
    return Held(line(one.layers, two.layers), line(one.losses, two.losses), stages)


class _Living(TorchDispatchMode):
    """
    Counts the bytes of all tensors made inside it that are still referred to.

    Args:
        known (iterable of `torch.Tensor`):
            Tensors that were there before, views of which are nothing new.
    """

    def __init__(self, known: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.now = 0
        self.stages = [0]
        self._known = [tensor.untyped_storage() for tensor in known]
        self._sizes: dict[int, int] = dict.fromkeys(map(id, self._known), 0)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor.untyped_storage())
        return result

    def next_stage(self, *_: Any) -> None:
        """From here on the peak is that of another stage; also a hook of a tensor."""
        self.stages.append(self.now)

    def _see(self, storage: torch.UntypedStorage) -> None:
        # Storages, not tensors: views share one, and autograd may hold it when no tensor of ours is left.
        key = id(storage)
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.now += self._sizes[key]
            self.stages[-1] = max(self.stages[-1], self.now)
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


class _FusedHead(torch.autograd.Function):
    """What TRL's fused head allocates: one tile of logits at a time, and the gradients in float32."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype, on_cpu: bool
    ) -> torch.Tensor:
        ctx.save_for_backward(hidden, weight)
        ctx.dtype, ctx.on_cpu = dtype, on_cpu
        _tile(hidden, weight, dtype, on_cpu)
        return hidden.new_zeros(hidden.shape[0], dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight = ctx.saved_tensors
        of_hidden = torch.zeros_like(hidden, dtype=torch.float32)
        of_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        _tile(hidden, weight, ctx.dtype, ctx.on_cpu)
        return of_hidden.to(hidden.dtype), None if of_weight is None else of_weight.to(weight.dtype), None, None


def _tile(hidden: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype, on_cpu: bool) -> None:
    # Its buffer is as wide as a tile also where the vocabulary is not.
    buffer = hidden.new_empty(min(hidden.shape[0], FUSED_TOKENS), FUSED_VOCABULARY, dtype=dtype)
    used = min(weight.shape[0], FUSED_VOCABULARY)
    part = weight[:used].to(dtype)
    # Without Triton the kernel is written in torch operations, each with a result in float32.
    results = [buffer[:, :used].to(torch.float32, copy=True) for _ in range(FUSED_ON_CPU if on_cpu else 0)]
    del buffer, part, results


@dataclass(frozen=True)
class Modes:
    """
    How a run computes.

    Args:
        autocast (`torch.dtype`, *optional*):
            Dtype of mixed precision; `None` without.
        checkpointing (`bool`):
            Whether activations are run again in the backward pass.
        on_cpu (`bool`):
            Whether it runs on the CPU, where TRL's fused head projects every position.
    """

    autocast: torch.dtype | None
    checkpointing: bool
    on_cpu: bool


class Rehearsal:
    """
    A model of fake tensors, and the phases of a step on it.

    Args:
        blueprint ([`Blueprint`]):
            What models are made of.
        modes ([`Modes`]):
            How the run computes.
    """

    def __init__(self, blueprint: Blueprint, modes: Modes) -> None:
        self.blueprint, self.modes = blueprint, modes
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._models: dict[int, Any] = {}
        self._found: dict[Any, Held] = {}

    def attack(self, depth: int, lengths: Lengths, loss: str, *, copies: int = 1) -> Held:
        """
        One step of the search on one of its terms.

        Args:
            depth (`int`):
                Layers above the first perturbed place.
            lengths ([`Lengths`]):
                Of the rows.
            loss (`str`):
                `"toward"` or `"away"`.
            copies (`int`, *optional*, defaults to `1`):
                How often a row of the perturbation stands in the batch.

        Returns:
            [`Held`], without the perturbations themselves.
        """

        def run(model: Any, living: _Living) -> Held:
            # At the embedding, since the layers below the first perturbed place are not run again.
            shape = lengths.rows // copies, lengths.ranks
            delta = torch.zeros(*shape, _hidden(model), requires_grad=True)
            perturbation = Perturbation({"embedding": delta}, torch.ones(shape).bool())
            with attack_mode(model), perturbation.installed(model, copies=copies), living:
                value, layers = self._loss(model, lengths, (loss,), living)
                losses = living.now - layers
                torch.autograd.grad(value, delta)
            return Held(layers, losses, tuple(living.stages))

        return self._once(("attack", depth, lengths, loss, copies), lambda: self._through(run, depth))

    def outer(self, depth: int, terms: Sequence[tuple[tuple[str, ...], Lengths]]) -> Held:
        """
        The forward and backward pass of a micro-batch, all of whose terms wait for one backward pass.

        Args:
            depth (`int`):
                Layers that run.
            terms (sequence of `tuple`):
                Losses and [`Lengths`] of each of its passes.

        Returns:
            [`Held`], without the gradients.
        """

        def run(model: Any, living: _Living) -> Held:
            layers = losses = 0
            values = []
            with living:
                for kinds, lengths in terms:
                    before = living.now
                    value, after_layers = self._loss(model, lengths, kinds, living)
                    value.register_hook(living.next_stage)  # its backward pass begins
                    values.append(value)
                    layers += after_layers - before
                    losses += living.now - after_layers
                    living.next_stage()
                torch.stack(values).sum().backward()
            return Held(layers, losses, tuple(living.stages))

        # Where only some layers are trained, no other number of layers can stand for all of them.
        exact = self.blueprint.trains_some_layers
        return self._once(
            ("outer", depth, tuple(terms)), lambda: self._on(depth, run) if exact else self._through(run, depth)
        )

    def _once(self, key: Any, find: Callable[[], Held]) -> Held:
        """Each question is answered once, since looking for changes asks the same again."""
        if key not in self._found:
            self._found[key] = find()
        return self._found[key]

    def _through(self, run: Callable[[Any, _Living], Held], depth: int) -> Held:
        return through_depths(lambda layers: self._on(layers, run), depth)

    def _on(self, depth: int, run: Callable[[Any, _Living], Held]) -> Held:
        if depth not in self._models:
            model = self.blueprint.model(depth)
            with self._fake:
                self._models[depth] = self._ready(model)
        with self._fake:
            model = self._models[depth]
            return run(model, _Living([*model.parameters(), *model.buffers()]))

    def _ready(self, model: Any) -> Any:
        """A model of the meta device on fake tensors, in training mode."""
        model.to_empty(device="cpu").train()
        if self.modes.checkpointing:
            # Without the state of random numbers, which fake tensors do not have.
            model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
            if hasattr(model, "peft_config"):
                model.enable_input_require_grads()
        for parameter in model.parameters():
            if parameter.requires_grad:
                # It is added to one that is counted elsewhere; in a dispatch mode torch would make a third.
                parameter.register_post_accumulate_grad_hook(_drop_gradient)
        return model

    def _loss(self, model: Any, lengths: Lengths, kinds: Sequence[str], living: _Living) -> tuple[torch.Tensor, int]:
        """The sum of some losses of one forward pass, and the bytes that live when its layers are through."""
        after_layers = [0]
        hook = decoder(model).register_forward_hook(lambda *_: after_layers.append(living.now))
        try:
            if kinds == ("fused",):
                return self._fused(model, lengths), after_layers[-1]
            if kinds == ("hidden",):
                return self._error(model, lengths), after_layers[-1]
            logits = self._logits(model, lengths)
        finally:
            hook.remove()
        targets = torch.zeros(logits.shape[0], dtype=torch.long)
        values = []
        for kind in kinds:
            if kind == "kl":
                with attack_mode(model), torch.no_grad():
                    reference = self._logits(model, lengths)
                values.append(kl_divergence(logits, reference).sum())
            else:
                values.append(LOSSES[kind](logits, targets).sum())
        return torch.stack(values).sum(), after_layers[-1]

    def _inputs(self, lengths: Lengths) -> dict[str, torch.Tensor]:
        tokens = torch.zeros(lengths.rows, lengths.width, dtype=torch.long)
        mask = torch.ones_like(tokens)
        return {"input_ids": tokens, "attention_mask": mask, "position_ids": mask.cumsum(-1) - 1}

    def _autocast(self) -> Any:
        return torch.autocast("cpu", self.modes.autocast) if self.modes.autocast else nullcontext()

    def _logits(self, model: Any, lengths: Lengths) -> torch.Tensor:
        """Logits at labelled positions, which are the last of every row here."""
        labelled = lengths.labels // lengths.rows
        kept = torch.arange(labelled) + (lengths.width - 1 - labelled)
        with self._autocast():
            logits = model(**self._inputs(lengths), logits_to_keep=kept, use_cache=False).logits
        if self.modes.autocast:
            logits = logits.float()  # as accelerate returns what a model in mixed precision puts out
        return logits.reshape(-1, logits.shape[-1])

    def _error(self, model: Any, lengths: Lengths) -> torch.Tensor:
        """The squared error of the last layer's hidden states, at real tokens alone, which are all of them here."""
        with self._autocast():
            hidden = decoder(model)(**self._inputs(lengths), use_cache=False).last_hidden_state
        chosen = hidden[torch.arange(lengths.rows)]
        return (chosen.float() - torch.zeros_like(chosen, dtype=torch.float32)).square().mean(-1).sum()

    def _fused(self, model: Any, lengths: Lengths) -> torch.Tensor:
        with self._autocast():
            hidden = decoder(model)(**self._inputs(lengths), use_cache=False).last_hidden_state[:, :-1]
        if not self.modes.on_cpu:
            hidden = hidden[:, -(lengths.labels // lengths.rows) :]
        weight = base_model(model).get_output_embeddings().weight
        dtype = self.modes.autocast or hidden.dtype
        return _FusedHead.apply(hidden.reshape(-1, hidden.shape[-1]), weight, dtype, self.modes.on_cpu).sum()


LOSSES = {"toward": toward, "away": away}


def _drop_gradient(parameter: torch.Tensor) -> None:
    parameter.grad = None


def _hidden(model: Any) -> int:
    return base_model(model).config.get_text_config().hidden_size
