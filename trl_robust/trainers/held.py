"""Perturbations that a checkpoint keeps, for the updates still to be made against them."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ..inner import Perturbation
from ..threat.sites import Stream


def save_held(perturbations: list[Perturbation], path: Path) -> None:
    """
    Writes the perturbations of an accumulated batch.

    Args:
        perturbations (`list` of [`~trl_robust.inner.Perturbation`]):
            One for each micro-batch.
        path (`Path`):
            A safetensors file.
    """
    tensors = {}
    for number, held in enumerate(perturbations):
        tensors[f"{number}/selected"] = held.selected
        tensors.update({f"{number}/{site}": delta.contiguous() for site, delta in held.deltas.items()})
    save_file(tensors, path)


def load_held(path: Path, stream: Stream, device: torch.device) -> list[Perturbation]:
    """
    Reads what [`save_held`] wrote.

    Args:
        path (`Path`):
            The file; without it there are none.
        stream (`str`):
            `"layer"` or `"mlp"`.
        device (`torch.device`):
            Where the tensors go.

    Returns:
        `list` of [`~trl_robust.inner.Perturbation`].
    """
    found: dict[int, Perturbation] = {}
    tensors = load_file(path) if path.is_file() else {}
    for key, tensor in tensors.items():
        if key.endswith("/selected"):
            found[int(key.split("/")[0])] = Perturbation({}, tensor.to(device), stream)
    for key, tensor in tensors.items():
        number, site = key.split("/")
        if site != "selected":
            found[int(number)].deltas["embedding" if site == "embedding" else int(site)] = tensor.to(device)
    return [found[number] for number in sorted(found)]
