"""A low-rank adapter made of hooks: it changes no module and no weight, so there is nothing to put back."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .linears import block_linears, features

RANK, ALPHA, DROPOUT = 16, 32, 0.05
"""LoRA of the attacks in 2502.05209 (lat.md 11.1)."""


class LowRank(nn.Module):
    """
    What LoRA (2106.09685) adds to one linear layer: `alpha / r * B A dropout(x)`, computed in float32.

    Args:
        inputs, outputs (`int`):
            Features of the layer.
        device (`torch.device`):
            Where the layer is.
    """

    def __init__(self, inputs: int, outputs: int, device: torch.device) -> None:
        super().__init__()
        # Drawn on the CPU, so that every device starts from the same adapter.
        down = torch.empty(RANK, inputs)
        nn.init.kaiming_uniform_(down, a=math.sqrt(5))
        self.down = nn.Parameter(down.to(device))
        self.up = nn.Parameter(torch.zeros(outputs, RANK, device=device))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        dropped = F.dropout(states.float(), DROPOUT, self.training)
        return ALPHA / RANK * (dropped @ self.down.T @ self.up.T)


@contextmanager
def low_rank_adapter(model: nn.Module) -> Iterator[nn.ModuleList]:
    """
    Adds a new adapter to every linear layer of the decoder blocks; it is gone after the `with` block.

    Args:
        model (`nn.Module`):
            A causal language model, quantised or not, or a `PeftModel`, whose own adapters go on working.

    Yields:
        `nn.ModuleList` of [`LowRank`]: its parameters are what is to be trained. They add nothing at first.
    """
    layers = [layer for _, _, layer in block_linears(model)]
    adapter = nn.ModuleList(LowRank(*features(layer), layer.weight.device) for layer in layers)
    with ExitStack() as hooks:
        for layer, part in zip(layers, adapter, strict=True):
            hook = layer.register_forward_hook(_adding(part))
            hooks.callback(hook.remove)
        yield adapter


def _adding(part: nn.Module) -> Any:
    def hook(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        return output + part(args[0]).to(output.dtype)

    return hook
