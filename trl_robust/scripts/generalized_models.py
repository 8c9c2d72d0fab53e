"""The models of the suite `generalized`: which ones, as what they are loaded, and what cannot be run on them."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..attacks import Subject
    from ..attacks.loading import Adapter
    from ..evaluation.generalized import GeneralizedSuite
    from .generalized_arguments import GeneralizedArguments

VARIANT_NAMES = {"adapter_off": "without adapter", "merged": "merged", "4bit": "4-bit"}


@dataclass(frozen=True)
class Target:
    """
    A model as it is attacked.

    Args:
        name (`str`):
            Its name in the results.
        path (`str`):
            Folder, hub id, or name at a server.
        variant (`str`, *optional*, defaults to `"as_is"`):
            See [`GeneralizedArguments`].
    """

    name: str
    path: str
    variant: str = "as_is"


def targets_of(args: GeneralizedArguments) -> list[Target]:
    """Every model in every variant."""
    found = []
    for name, path in args.models:
        for variant in args.variants:
            shown = name if variant == "as_is" else f"{name} ({VARIANT_NAMES[variant]})"
            found.append(Target(shown, path, variant))
    return found


def check_models(args: GeneralizedArguments, targets: list[Target]) -> None:
    """
    Refuses models that cannot be there, before the first of them has worked for hours.

    Args:
        args ([`GeneralizedArguments`]):
            Arguments.
        targets (`list` of [`Target`]):
            Models.

    Raises:
        [`~trl_robust.recipes.RecipeError`]: naming them.
    """
    from ..data.loading import is_local, where_looked
    from ..recipes import RecipeError

    if args.model_url is not None:
        return
    faults = []
    for target in targets:
        folder = Path(target.path).expanduser()
        if is_local(target.path) and not folder.is_dir():
            faults.append(f"`model` {target.path} is not there: {where_looked(target.path)} Correct the path.")
        elif target.variant in ("adapter_off", "merged") and folder.is_dir():
            if (folder / "adapter_config.json").is_file():
                continue
            faults.append(f"`variants` asks for {target.variant}, and {target.path} holds no adapter.")
    if faults:
        raise RecipeError(list(dict.fromkeys(faults)))


def load(args: GeneralizedArguments, target: Target) -> Any:
    """
    Loads a model, or connects to it.

    Args:
        args ([`GeneralizedArguments`]):
            Arguments.
        target ([`Target`]):
            The model.

    Returns:
        [`~trl_robust.attacks.Subject`], or [`~trl_robust.attacks.served.Served`].

    Raises:
        [`~trl_robust.recipes.RecipeError`]: it cannot be loaded.
    """
    from ..attacks import Subject
    from .judging import loaded

    adapters: dict[str, Adapter] = {"adapter_off": "off", "merged": "merged"}
    limits = {
        "max_new_tokens": args.max_new_tokens,
        "batch_size": args.batch_size,
        "max_prompt_tokens": args.max_prompt_tokens,
    }
    if args.model_url is not None:
        from ..attacks.served import Served

        url, key = args.model_url, args.model_key_env
        return loaded(
            "model_url",
            target.path,
            lambda: Served(url, target.path, key_variable=key, max_new_tokens=args.max_new_tokens),
        )
    return loaded(
        "model",
        target.path,
        lambda: Subject.load(
            target.path,
            dtype=args.dtype,
            trust_remote_code=args.trust_remote_code,
            load_in_4bit=target.variant == "4bit",
            adapter=adapters.get(target.variant, "on"),
            **limits,
        ),
    )


def check_attacks(suite: GeneralizedSuite, subject: Subject, target: Target) -> None:
    """
    Refuses attacks that cannot be run on a model, before the first of them has worked for hours.

    Args:
        suite ([`~trl_robust.evaluation.generalized.GeneralizedSuite`]):
            The suite.
        subject ([`~trl_robust.attacks.Subject`]):
            The model.
        target ([`Target`]):
            What it is called.

    Raises:
        [`~trl_robust.recipes.RecipeError`]: naming them.
    """
    from ..recipes import RecipeError

    faults = []
    for line in [*suite.lines, *suite.map_lines]:
        for point in line.points:
            attack: Any = point.attack
            try:
                if hasattr(attack, "threat"):
                    attack.threat.resolve_sites(subject.model)
                if hasattr(attack, "check"):
                    attack.check(subject)
            except ValueError as error:
                faults.append(f"The attack `{line.name}` on {target.name}: {error}")
    if faults:
        raise RecipeError(list(dict.fromkeys(faults)))


def free() -> None:
    """Gives the memory of what is not used any more back to the device."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
