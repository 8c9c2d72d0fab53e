"""What stands beside the figures: captions, and what they show in words."""

from __future__ import annotations

from .curve_figures import INTERVALS, curve_names, strongest
from .figures import compared_attacks, mean_success
from .reading import Results
from .tables import attack_cell, measure_cell

HOW_TO_READ = (
    "Every value is a share between 0 and 1 with its interval. Attack success counts the prompts on which the attack "
    "got what it was after; lower is safer. Rows that errored or were skipped are in no share: they are counted in "
    "the section on attacks."
)

MOST_BARS = 48
"""Bars up to which the figure of attack success shows all attacks; with more, the strongest of every class."""

MOST_NAMES = 6
"""Attacks up to which a caption names all of them."""

TITLES = {
    "attack_success": "Attack success by attack and model",
    "trade_off": "Mean attack success against utility and over-refusal",
    "curves": "Attack success against budget",
    "sites": "Success of latent attacks by site and radius",
}
"""Names of the figures, and what they show."""


def in_bars(results: Results) -> Results:
    """What the figure of attack success shows: all attacks, or the strongest of every class where they are many."""
    return strongest(results) if len(results.attack_names) * len(results.models) > MOST_BARS else results


def caption_of(name: str, results: Results) -> str:
    """
    Caption of a figure.

    Args:
        name (`str`):
            One of [`TITLES`].
        results ([`~trl_robust.report.reading.Results`]):
            Results.

    Returns:
        `str`.
    """
    if name == "attack_success":
        of = "attack" if in_bars(results) is results else "the strongest attack of every class on each model"
        return f"Attack success by {of}. Lines are intervals; the value stands at the right."
    if name == "curves":
        said = (
            "Success with at most that budget (line) and with exactly that budget (marks). A cross is a budget that "
            "destroyed the model, which lost more than 10 % of its capability: it is in no line. Grey dashes are the "
            "load that the factor of safety divides by; where every model has its own, its colour is at the top."
        )
        return said if len(results.models) > INTERVALS else f"{said} Bars are intervals."
    if name == "sites":
        n = max((model.site_map.n for model in results.models if model.site_map is not None), default=0)
        return f"Success of a latent attack at one site alone, by radius ({n} requests)."
    attacks = compared_attacks(results)
    named = ", ".join(attacks) if len(attacks) <= MOST_NAMES else f"{len(attacks)} attacks"
    missing = [model.name for model in results.models if mean_success(model, attacks) is None]
    return (
        f"Mean success over {named}, which every attacked model was scored on, against utility and "
        "over-refusal. A robust and useful model lies at the top left above and at the bottom left below."
        + (f" Not drawn, since not attacked: {', '.join(missing)}." if missing else "")
    )


def alt_of(name: str, results: Results) -> str:
    """
    What a figure shows, in words.

    Args:
        name (`str`):
            One of [`TITLES`].
        results ([`~trl_robust.report.reading.Results`]):
            Results.

    Returns:
        `str`.
    """
    said = []
    if name == "attack_success":
        shown = in_bars(results)
        for model in shown.models:
            scored = ((name, model.attacks[name]) for name in shown.attack_names if name in model.attacks)
            values = (f"{name} {' '.join(attack_cell(attack))}" for name, attack in scored)
            said.append(f"{model.name}: {', '.join(values)}.")
    elif name == "curves":
        said.append(f"A panel each for {', '.join(curve_names(results))}; the values stand in the tables.")
    elif name == "sites":
        for model in results.models:
            if (found := model.site_map) is not None:
                rows = zip(found.sites, found.success, strict=True)
                values = (f"{site} {', '.join('-' if v is None else f'{v:.2f}' for v in row)}" for site, row in rows)
                said.append(f"{model.name}: {'; '.join(values)}.")
    else:
        attacks = compared_attacks(results)
        for model in results.models:
            mean = mean_success(model, attacks)
            if mean is not None:
                utility, over_refusal = measure_cell(model.utility)[0], measure_cell(model.over_refusal)[0]
                said.append(f"{model.name}: mean success {mean:.2f}, utility {utility}, over-refusal {over_refusal}.")
    return f"{TITLES[name]}. {' '.join(said)}"
