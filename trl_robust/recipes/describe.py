"""The help of a training verb, made from the fields of its dataclasses."""

from __future__ import annotations

import dataclasses
import textwrap
from typing import Any

from .arguments import PARTS, VERBS


def help_text(verb: str) -> str:
    """
    What a training verb takes: our keys with what they do first, those of TRL by name.

    Args:
        verb (`str`):
            Training verb.

    Returns:
        `str`.
    """
    base = next(cls for cls in VERBS[verb].__mro__ if cls.__module__.startswith("trl."))
    inherited = {field.name for field in dataclasses.fields(base)}
    parts = {name: dataclasses.fields(part(verb)) for name, part in PARTS.items()}
    own = [field for field in parts["training"] if field.name not in inherited]
    blocks = [
        f"usage: trl-robust {verb} --config RECIPE.yaml [--key value ...]\n\n"
        "Every key can stand in the recipe or on the command line, which beats the recipe.",
        ("Selection:\n" if verb == "seal" else "Attack and defence:\n") + _explained(own),
        "Further data and the form of the rows:\n" + _explained(parts["benign"]),
        "Training data (TRL's ScriptArguments and DatasetMixtureConfig):\n"
        + _explained([*parts["script"], *parts["mixture"]]),
        "Model, adapters, quantisation (TRL's ModelConfig):\n" + _explained(parts["model"]),
        f"Training (TRL's {base.__name__}, which documents them):\n" + _wrapped(", ".join(sorted(inherited))),
        "Options of `accelerate launch`, such as num_processes, and accelerate_config start several processes.",
    ]
    return "\n\n".join(blocks)


def _wrapped(text: str) -> str:
    return textwrap.fill(text, width=100, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)


def _explained(fields: Any) -> str:
    lines = []
    for field in fields:
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        choices = field.metadata.get("choices")
        kind = f" {{{','.join(map(str, choices))}}}" if choices else ""
        shown = "" if default is None or default == [] else f" (default {default})"
        text = str(field.metadata.get("help", "")).replace("%%", "%")
        lines.append(f"  {field.name}{kind}{shown}\n{textwrap.indent(_wrapped(text), '    ')}")
    return "\n".join(lines)
