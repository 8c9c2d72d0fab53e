"""The refusal direction: what an adversary removes who takes no step at all (2409.20089)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from ..objectives import label_logits
from ..threat.model import ThreatModel
from ..threat.positions import selected_tokens
from ..threat.sites import Site
from .injection import attack_mode
from .observing import observed

SAME = 1e-5
"""Two means are the same when they differ by less than this share of their length: by rounding."""


def refusal_directions(
    model: nn.Module,
    harmful: Sequence[Mapping[str, torch.Tensor]],
    harmless: Sequence[Mapping[str, torch.Tensor]],
    threat: ThreatModel,
) -> dict[Site, torch.Tensor]:
    """
    Direction in which the hidden states of harmful requests differ from those of harmless ones, at every site.

    The difference of the mean hidden states at the last prompt token, divided by its length. A site where there is no
    difference has no direction: the embedding, where every prompt ends in the same token of a chat template.

    Args:
        model (`nn.Module`):
            The model, outside distributed wrappers.
        harmful (sequence of `Mapping[str, torch.Tensor]`):
            Batches with `input_ids`, `attention_mask` and `labels`, whose prompts are harmful requests.
        harmless (sequence of `Mapping[str, torch.Tensor]`):
            The same of harmless requests.
        threat ([`ThreatModel`]):
            Sites and stream.

    Returns:
        `dict[Site, torch.Tensor]`: float32 unit vectors of shape `(H,)`, of the sites that have one.

    Raises:
        `ValueError`: rows without a prompt, or no difference between the two kinds of requests at any site.
    """
    means = [_mean_states(model, batches, threat) for batches in (harmful, harmless)]
    directions = {}
    for site, mean in means[0].items():
        difference = mean - means[1][site]
        length = torch.linalg.vector_norm(difference)
        if length > SAME * torch.linalg.vector_norm(mean):
            directions[site] = difference / length
    if not directions:
        raise ValueError(
            f"Harmful and harmless requests have the same mean hidden states at {', '.join(map(str, means[0]))}, so "
            "there is no refusal direction. Give benign rows whose prompts are not those of the training rows, and "
            "sites above the embedding."
        )
    return directions


def _mean_states(
    model: nn.Module, batches: Sequence[Mapping[str, torch.Tensor]], threat: ThreatModel
) -> dict[Site, torch.Tensor]:
    """Mean hidden state at the last prompt token, by site."""
    seen: dict[Site, list[torch.Tensor]] = {site: [] for site in threat.resolve_sites(model)}
    last = torch.zeros(0)

    def keep(site: Site, states: torch.Tensor) -> None:
        rows = torch.arange(states.shape[0], device=states.device)
        seen[site].append(states.detach()[rows, last.to(states.device)].float())

    with observed(model, seen, threat.stream, keep), attack_mode(model), torch.no_grad():
        for batch in batches:
            prompt = selected_tokens(batch, "prompt")
            if not prompt.any(-1).all():
                raise ValueError("The refusal direction is read off the last prompt token, and a row has no prompt.")
            width = prompt.shape[1]
            last = (prompt * torch.arange(1, width + 1, device=prompt.device)).argmax(-1)
            label_logits(model, batch["input_ids"], batch["attention_mask"], batch["labels"])
    return {site: torch.cat(states).mean(0) for site, states in seen.items()}
