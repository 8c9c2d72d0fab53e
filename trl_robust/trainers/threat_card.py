from __future__ import annotations

from typing import Any

from ..threat import ThreatModel


def threat_section(args: Any, threat: ThreatModel) -> str:
    """
    The model card's section on what the model was trained against.

    Args:
        args ([`AttackArguments`]):
            Settings of the run.
        threat ([`ThreatModel`]):
            The threat model, calibrated if it was relative.

    Returns:
        `str`: Markdown.
    """
    if not args.attacks:
        attack = "No attack: the same training without perturbations."
    elif args.attack_objective == "refusal_direction":
        attack = (
            f"The refusal direction was removed from the hidden states of `{args.attack_positions}` tokens after "
            f"{_sites(args, threat)} in {args.refusal_direction_prob:.0%} of the micro-batches."
        )
    else:
        search = (
            "a random point of the boundary"
            if args.attack_objective == "random"
            else f"{args.attack_objective}, {args.attack_steps} steps of {args.attack_optimizer}"
        )
        ball = f"an {args.attack_norm} ball of radius {args.attack_radius:g} ({args.attack_radius_unit}, one ball a "
        attack = (
            f"Perturbations of the hidden states of `{args.attack_positions}` tokens at {_sites(args, threat)}, "
            f"inside {ball}{args.attack_ball}); search: {search}."
        )
    weights = ", ".join(f"{name} {weight:g}" for name, weight in args.weights(True).items())
    faithful = " Trained as the reference code does, its defects included (`faithful`)." if args.faithful else ""
    return (
        f"\n\n## Threat model\n\nTrained with trl-robust. {attack} Weights of the loss: {weights}; "
        f"{args.updates_per_attack} update(s) an attack.{faithful}\n\nA model that withstands these "
        "perturbations has been tested against these perturbations. Attacks of another kind may still succeed.\n"
    )


def _sites(args: Any, threat: ThreatModel) -> str:
    sites = f"the sites {', '.join(f'`{site}`' for site in threat.sites)} (`{args.attack_stream}`)"
    if args.attack_site_choice == "all":
        return sites
    how = "at random" if args.attack_site_choice == "random" else "by the size of the gradient"
    return f"{args.attack_num_sites} of {sites}, chosen {how} for every attack"
