"""The linear layers of a model's decoder blocks, and changes of a model that may fail before anything is asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import nn

from ..threat import decoder_layers
from .subject import AttackRow, Generation


def block_linears(model: nn.Module) -> list[tuple[int, str, Any]]:
    """
    The linear layers of the decoder blocks, below any adapter: attention and MLP, not the embedding and the head.

    Args:
        model (`nn.Module`):
            A transformers causal language model or a `PeftModel`.

    Returns:
        `list` of (number of the block, name inside the block, layer), in the order of the blocks. An adapter's own
        matrices are left out; the layers that it wraps are in.

    Raises:
        `ValueError`: there are none (weights packed in a form of their own).
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from transformers.pytorch_utils import Conv1D

    found = []
    for number, block in enumerate(decoder_layers(model)):
        adapters = {
            id(part)
            for wrapper in block.modules()
            if isinstance(wrapper, BaseTunerLayer)
            for name in wrapper.adapter_layer_names
            for part in (getattr(wrapper, name).modules() if isinstance(getattr(wrapper, name), nn.Module) else ())
        }
        found += [
            (number, name, module)
            for name, module in block.named_modules()
            if isinstance(module, nn.Linear | Conv1D)
            and id(module) not in adapters
            # An adapter's layer may itself be a kind of linear layer; what it wraps comes by in its turn.
            and not isinstance(module, BaseTunerLayer)
        ]
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no linear layers in its decoder blocks: its weights are packed in a form of "
            "their own. Load the model unquantised, or with bitsandbytes."
        )
    return found


def features(layer: Any) -> tuple[int, int]:
    """Inputs and outputs of a linear layer, a quantised one or GPT-2's included."""
    return (layer.in_features, layer.out_features) if hasattr(layer, "in_features") else (layer.nx, layer.nf)


def weight_of(layer: Any) -> torch.Tensor:
    """The weight of a linear layer as a view of shape `(outputs, inputs)`; GPT-2 keeps it the other way round."""
    return layer.weight if isinstance(layer, nn.Linear) else layer.weight.T


def answered_under(
    change: AbstractContextManager[Any], rows: Sequence[AttackRow], answer: Callable[[], list[Generation]]
) -> list[Generation]:
    """
    Answers inside a change of the model; every row is errored where the change itself fails.

    Args:
        change (context manager):
            Changes the model on entering and puts it back on leaving, also after an exception.
        rows (sequence of [`AttackRow`]):
            Requests.
        answer (`Callable`):
            Gives the answers of the changed model.

    Returns:
        `list` of [`Generation`].
    """
    with ExitStack() as undo:
        try:
            undo.enter_context(change)
        except (RuntimeError, FloatingPointError) as error:
            return all_errored(rows, error)
        return answer()


def all_errored(rows: Sequence[AttackRow], error: Exception) -> list[Generation]:
    """Every request errored with one reason: an attack that could not be prepared says nothing about the model."""
    reason = f"the attack could not be prepared: {type(error).__name__}: {error}"
    return [
        Generation(
            row,
            row.prompt if isinstance(row.prompt, str) else str(row.prompt[-1]["content"]),
            status="errored",
            reason=reason,
        )
        for row in rows
    ]
