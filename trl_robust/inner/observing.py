"""Reading hidden states off a running model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from ..threat.sites import Site, Stream, decoder_layers, hidden_states, mlp_of
from .injection import hand_on, shadow


@contextmanager
def observed(
    model: nn.Module, sites: Iterable[Site], stream: Stream, see: Callable[[Site, torch.Tensor], None]
) -> Iterator[None]:
    """
    Shows the hidden states at some sites in every forward pass inside the `with` block.

    Args:
        model (`nn.Module`):
            The model, outside distributed wrappers.
        sites (iterable of `Site`):
            Resolved sites.
        stream (`str`):
            `"layer"` or `"mlp"`.
        see (`Callable`):
            Called with a site and its hidden states, of shape `(B, T, H)`.
    """
    layers = decoder_layers(model)
    with ExitStack() as hooks:
        for site in sites:
            if site == "embedding":
                hook = layers[0].register_forward_pre_hook(
                    lambda module, args, kwargs: see("embedding", args[0] if args else kwargs["hidden_states"]),
                    with_kwargs=True,
                )
            else:
                module = mlp_of(layers[site]) if stream == "mlp" else layers[site]
                hook = module.register_forward_hook(
                    lambda module, args, output, site=site: see(site, hidden_states(output))
                )
            hooks.callback(hook.remove)
        yield


def hidden_after(
    model: nn.Module, batch: Mapping[str, torch.Tensor], layer: int, call: nn.Module | None = None
) -> torch.Tensor:
    """
    Hidden states after a layer, with whatever is installed applied, the layers above left out.

    Args:
        model (`nn.Module`):
            The model, outside distributed wrappers.
        batch (`Mapping[str, torch.Tensor]`):
            `input_ids` and `attention_mask` of shape `(B, T)`.
        layer (`int`):
            Index of a decoder layer.
        call (`nn.Module`, *optional*):
            What is called: the distributed wrapper around the model, where there is one.

    Returns:
        `torch.Tensor` of shape `(B, T, H)`, part of the graph.
    """
    layers = decoder_layers(model)
    found: list[Any] = []
    with ExitStack() as undo:
        # Last in line: it must see what a perturbation at this layer made of the output.
        hook = layers[layer].register_forward_hook(lambda module, args, output: found.append(output))
        undo.callback(hook.remove)
        for above in layers[layer + 1 :]:
            shadow(above, hand_on(lambda: isinstance(found[0], tuple)), undo)
        positions = (batch["attention_mask"].long().cumsum(-1) - 1).clamp(min=0)
        (model if call is None else call)(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            position_ids=positions,
            logits_to_keep=1,
            use_cache=False,
        )
    return hidden_states(found[0])
