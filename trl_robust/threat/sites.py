"""Where in a model an adversary may act: the embedding, the decoder layers, their MLPs."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any, Literal

import torch
from torch import nn

Site = Literal["embedding"] | int
"""A resolved site: `"embedding"`, or the index of a decoder layer counted from 0."""
Stream = Literal["layer", "mlp"]

MLP_NAMES = ("mlp", "feed_forward", "block_sparse_moe")
"""How the architectures of transformers name the MLP of a decoder layer."""


class UnsupportedModelError(TypeError):
    """The model has no recognisable stack of decoder layers, or no MLP in them."""


def base_model(model: Any) -> Any:
    """
    The causal language model below a PEFT wrapper, or the model itself.

    Args:
        model (`nn.Module`):
            A transformers model or a `PeftModel`.

    Returns:
        [`~transformers.PreTrainedModel`].
    """
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def decoder(model: nn.Module) -> nn.Module:
    """
    The module that holds the decoder layers, below any PEFT wrapper and any vision tower.

    Args:
        model (`nn.Module`):
            A transformers causal language model, or a `PeftModel` around one.

    Returns:
        `nn.Module`.

    Raises:
        `UnsupportedModelError`: the model offers no `get_decoder`.
    """
    base = base_model(model)
    if not hasattr(base, "get_decoder") or not hasattr(base, "config"):
        raise UnsupportedModelError(
            f"{type(base).__name__} is not a transformers causal language model. Pass the model as "
            "`AutoModelForCausalLM.from_pretrained` returns it, or a `PeftModel` around it."
        )
    return base.get_decoder()


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """
    The stack of decoder layers of a causal language model.

    Args:
        model (`nn.Module`):
            A transformers causal language model, or a `PeftModel` around one. Distributed wrappers must be off
            (`accelerator.unwrap_model`).

    Returns:
        `nn.ModuleList`: the layers, in the order in which they run.

    Raises:
        `UnsupportedModelError`: not exactly one stack of as many layers as the configuration says was found.
    """
    # Here, because `trl_robust.threat` is otherwise pure torch, and whoever has a model has transformers loaded.
    from transformers.modeling_layers import GradientCheckpointingLayer

    stack = decoder(model)
    base = base_model(model)
    depth = base.config.get_text_config().num_hidden_layers
    found = [
        module
        for module in stack.modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == depth
        and all(isinstance(layer, GradientCheckpointingLayer) for layer in module)
    ]
    if len(found) != 1:
        raise UnsupportedModelError(
            f"{type(base).__name__} has {len(found)} stacks of {depth} decoder layers where one was expected. Its "
            "layers cannot be perturbed; please open an issue with the name of the architecture."
        )
    return found[0]


def parse_site(site: str | int | float) -> Site | float:
    """
    Reads a site as a recipe or a command line writes it: `embedding`, a layer (`8`, `-1`) or a fraction (`0.5`).

    Args:
        site (`str`, `int` or `float`):
            What the user wrote. Whole numbers are layers, numbers with a point are fractions of the depth.

    Returns:
        `"embedding"`, an `int` or a `float`.

    Raises:
        `ValueError`: anything else, or a fraction outside `[0, 1]`.
    """
    if isinstance(site, str):
        text = site.strip()
        if text == "embedding":
            return "embedding"
        try:
            site = float(text) if any(mark in text for mark in ".eE") else int(text)
        except ValueError:
            site = text
    elif isinstance(site, Integral) and not isinstance(site, bool):
        site = int(site)  # also NumPy's
    if isinstance(site, bool) or not isinstance(site, int | float):
        raise ValueError(
            f"Site {site!r} is unknown. A site is `embedding`, the index of a layer (such as 8 or -1), or a fraction "
            "of the depth written with a point (such as 0.5)."
        )
    if isinstance(site, float) and not 0.0 <= site <= 1.0:
        raise ValueError(f"Site {site} is a fraction of the depth and must lie between 0.0 and 1.0.")
    return site


def resolve_sites(sites: Sequence[str | int | float], num_layers: int) -> tuple[Site, ...]:
    """
    Turns sites as written into the layers of a model of a given depth.

    A fraction `f` names layer `round(f * num_layers)`, at most the last: 0.25, 0.5, 0.75 and 0.94 are the published
    layers 8, 16, 24 and 30 of 32.

    Args:
        sites (sequence of `str`, `int` or `float`):
            Sites as written.
        num_layers (`int`):
            Number of decoder layers.

    Returns:
        `tuple`: the embedding first, then layers in ascending order. Sites that name the same layer, as fractions do
        in a shallow model, are one site.

    Raises:
        `ValueError`: a layer that the model does not have.
    """
    resolved: list[Site] = []
    for site in map(parse_site, sites):
        if isinstance(site, str):
            resolved.append(site)
            continue
        layer = min(round(site * num_layers), num_layers - 1) if isinstance(site, float) else site
        if not -num_layers <= layer < num_layers:
            raise ValueError(
                f"Layer {site} does not exist: the model has {num_layers} layers, numbered 0 to {num_layers - 1} "
                f"(or -{num_layers} to -1)."
            )
        resolved.append(layer % num_layers)
    return tuple(sorted(set(resolved), key=lambda site: -1 if isinstance(site, str) else site))


def mlp_of(layer: Any) -> nn.Module:
    """
    The MLP of a decoder layer.

    Args:
        layer (`nn.Module`):
            A decoder layer.

    Returns:
        `nn.Module`.

    Raises:
        `UnsupportedModelError`: the layer has no submodule of a known name.
    """
    for name in MLP_NAMES:
        if hasattr(layer, name):
            return getattr(layer, name)
    raise UnsupportedModelError(
        f"{type(layer).__name__} has no MLP under the names {list(MLP_NAMES)}. Use `stream='layer'`, which perturbs "
        "the residual stream after the layer."
    )


def hidden_states(output: torch.Tensor | tuple) -> torch.Tensor:
    """
    The hidden states in a layer's output, which is a tensor or, in some architectures, a tuple that starts with one.

    Args:
        output (`torch.Tensor` or `tuple`):
            What the layer returned.

    Returns:
        `torch.Tensor` of shape `(B, T, H)`.

    Raises:
        `UnsupportedModelError`: the tensor does not have three dimensions.
    """
    tensor = output[0] if isinstance(output, tuple) else output
    if tensor.dim() != 3:
        raise UnsupportedModelError(
            f"A site put out a tensor of shape {tuple(tensor.shape)}; (batch, tokens, hidden) was expected. Use "
            "`stream='layer'`: some architectures flatten the tokens inside their MLP."
        )
    return tensor
