from __future__ import annotations

from ..threat import ThreatModel
from .lat_sft_config import LATSFTConfig


def threat_section(args: LATSFTConfig, threat: ThreatModel) -> str:
    """
    The model card's section on what the model was trained against.

    Args:
        args ([`LATSFTConfig`]):
            Settings of the run.
        threat ([`ThreatModel`]):
            The threat model, calibrated if it was relative.

    Returns:
        `str`: Markdown.
    """
    if not args.attacks:
        attack = "No attack: the same training without perturbations."
    else:
        search = (
            "a random point of the boundary"
            if args.attack_objective == "random"
            else f"{args.attack_objective}, {args.attack_steps} steps of {args.attack_optimizer}"
        )
        attack = (
            f"Perturbations of the hidden states of `{args.attack_positions}` tokens at the sites "
            f"{', '.join(f'`{site}`' for site in threat.sites)} (`{args.attack_stream}`), inside an "
            f"{args.attack_norm} ball of radius {args.attack_radius:g} ({args.attack_radius_unit}, one ball a "
            f"{args.attack_ball}); search: {search}."
        )
    weights = ", ".join(f"{name} {getattr(args, f'{name}_coef'):g}" for name in ("toward", "away", "sft", "kl"))
    return (
        f"\n\n## Threat model\n\nTrained with trl-robust. {attack} Weights of "
        f"the loss: {weights}; {args.updates_per_attack} update(s) an attack.\n\nA model that withstands these "
        "perturbations has been tested against these perturbations. Attacks of another kind may still succeed.\n"
    )
