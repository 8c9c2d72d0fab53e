"""How large hidden states are: the unit of a relative radius."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from ..objectives import label_logits
from ..threat.model import ThreatModel
from ..threat.positions import ranks, selected_ranks
from ..threat.sites import Site, decoder_layers, hidden_states, mlp_of
from .injection import attack_mode


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
    layers = decoder_layers(model)
    seen: dict[Site, list[torch.Tensor]] = {site: [] for site in threat.resolve_sites(model)}

    def keep(site: Site, states: torch.Tensor) -> None:
        seen[site].append(torch.linalg.vector_norm(states.detach().float(), dim=-1)[chosen.to(states.device)])

    hooks = []
    try:
        for site in seen:
            if site == "embedding":
                hooks.append(
                    layers[0].register_forward_pre_hook(
                        lambda module, args, kwargs: keep("embedding", args[0] if args else kwargs["hidden_states"]),
                        with_kwargs=True,
                    )
                )
            else:
                module = mlp_of(layers[site]) if threat.stream == "mlp" else layers[site]
                hooks.append(
                    module.register_forward_hook(
                        lambda module, args, output, site=site: keep(site, hidden_states(output))
                    )
                )
        with attack_mode(model), torch.no_grad():
            for batch in batches:
                selected = selected_ranks(batch, threat.positions)
                rank = ranks(batch["attention_mask"])
                inside = (rank < selected.shape[1]) & batch["attention_mask"].bool()
                chosen = inside & selected.gather(1, rank.clamp(max=max(selected.shape[1] - 1, 0)))
                label_logits(model, batch["input_ids"], batch["attention_mask"], batch["labels"])
    finally:
        for hook in hooks:
            hook.remove()
    return {site: torch.cat([norm.cpu() for norm in norms]).median().item() for site, norms in seen.items()}
