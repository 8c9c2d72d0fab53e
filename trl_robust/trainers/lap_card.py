from __future__ import annotations

from typing import Any

from ..inner import preset_settings


def paraphrase_section(args: Any) -> str:
    """
    The model card's section on the perturbations that the model was trained under.

    Args:
        args ([`ParaphraseArguments`]):
            Settings of the run.

    Returns:
        `str`: Markdown.
    """
    head = "\n\n## Latent adversarial paraphrasing\n\nTrained with trl-robust. "
    if not args.attacks:
        return head + "No perturbations: the same training without them, as a control.\n"
    share = {
        "mix": f"{args.lap_adv_prob:.0%} of the updates",
        "adv_only": "All updates",
        "both": "All updates, with the unperturbed loss added,",
    }[args.branch]
    settings = preset_settings(args.lap_preset, args.overrides)
    search = {
        "paraphrase": f"the longest within {args.lap_epsilon:g} nats of the unperturbed loss that "
        f"{args.lap_steps} steps found (preset `{args.lap_preset}`, {settings.optimizer} at "
        f"{settings.learning_rate:g}, lambda from {settings.lambda_init:g}, alpha {settings.alpha:g})",
        "random": f"random ones of the norms that a search within {args.lap_epsilon:g} nats came to: a control",
        "untargeted": f"those that raise the loss most inside a ball of {args.lap_radius:g} x the median norm of the "
        "hidden states: a control",
    }[args.lap_search]
    sites = ", ".join(f"`{site}`" for site in args.lap_layers)
    return (
        f"{head}{share} were made under perturbations of the hidden states of `{args.lap_positions}` tokens at "
        f"{sites}: {search}.\n\nThat a perturbation leaves the loss as it is does not say that it leaves the meaning "
        "as it is. Whether the model answers other wordings equally well is to be measured on wordings.\n"
    )
