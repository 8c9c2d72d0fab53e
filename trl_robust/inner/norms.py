"""How large hidden states are: the unit of a relative radius."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from ..objectives import label_logits
from ..threat.model import ThreatModel
from ..threat.positions import ranks, selected_ranks
from ..threat.sites import Site
from .injection import attack_mode
from .observing import observed


def median_norms(
    model: nn.Module, batches: Sequence[Mapping[str, torch.Tensor]], threat: ThreatModel
) -> dict[Site, float]:
    """
    Median L2 norm of the unperturbed hidden states at the sites of a threat, over the tokens that may be perturbed.

    Args:
        model (`nn.Module`):
            The model, outside distributed wrappers.
        batches (sequence of `Mapping[str, torch.Tensor]`):
            Batches with `input_ids`, `attention_mask` and `labels`.
        threat ([`ThreatModel`]):
            Sites, stream and positions.

    Returns:
        `dict[Site, float]`: the unit of a relative radius at every site.
    """
    seen: dict[Site, list[torch.Tensor]] = {site: [] for site in threat.resolve_sites(model)}

    def keep(site: Site, states: torch.Tensor) -> None:
        seen[site].append(torch.linalg.vector_norm(states.detach().float(), dim=-1)[chosen.to(states.device)])

    with observed(model, seen, threat.stream, keep), attack_mode(model), torch.no_grad():
        for batch in batches:
            selected = selected_ranks(batch, threat.positions)
            rank = ranks(batch["attention_mask"])
            inside = (rank < selected.shape[1]) & batch["attention_mask"].bool()
            chosen = inside & selected.gather(1, rank.clamp(max=max(selected.shape[1] - 1, 0)))
            label_logits(model, batch["input_ids"], batch["attention_mask"], batch["labels"])
    return {site: torch.cat([norm.cpu() for norm in norms]).median().item() for site, norms in seen.items()}
