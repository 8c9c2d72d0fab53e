"""The strict loader: a YAML file and a command line -> dataclasses, or every fault at once."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, get_type_hints

import torch

from ..trainers.lap_arguments import ParaphraseArguments
from ..trainers.lat_arguments import AttackArguments
from .arguments import PARTS, VERBS, Recipe, RecipeError
from .checking import check_recipe
from .launching import check_launch, fit_launch_option, launch_options
from .reading import Given, read_yaml, split_command_line, without
from .values import UnfitError, fit, nearest

DEFAULT_VERB = "lat-sft"

RENAMED = {
    "torch_dtype": "Write `dtype`.",
    "model_name": "Write `model_name_or_path`.",
    "evaluation_strategy": "Write `eval_strategy`.",
    "max_seq_length": "Write `max_length`.",
    "warmup_ratio": "Write `warmup_steps` with a number below 1, a share of all steps.",
    "overwrite_output_dir": "Remove it: an earlier run is never written over. Name another `output_dir`.",
}
"""Names of earlier versions and of other tools, and what to do about them."""


def verb_of(path: Path) -> str:
    """
    The verb a recipe is for.

    Args:
        path (`Path`):
            The YAML file.

    Returns:
        `str`: its `verb:`, or `lat-sft` if it names none (or cannot be read; `load_recipe` says why).
    """
    given, _ = read_yaml(path)
    return str(given["verb"].value) if "verb" in given else DEFAULT_VERB


def load_recipe(verb: str, argv: list[str], *, check: bool = True, this_machine: bool = True) -> Recipe:
    """
    Reads and checks the settings of one run.

    Args:
        verb (`str`):
            The training verb, such as `lat-sft`.
        argv (`list[str]`):
            `--config RECIPE.yaml` and `--key value` overrides; the command line beats the file.
        check (`bool`, *optional*, defaults to `True`):
            Whether data and model on this machine are looked at as well ([`check_recipe`]).
        this_machine (`bool`, *optional*, defaults to `True`):
            Whether the run would be on this machine. With `False`, a recipe for a GPU is no fault where there is none.

    Returns:
        [`Recipe`].

    Raises:
        [`RecipeError`]: listing every fault.
    """
    words, faults = split_command_line(argv)
    path: Path | None = None
    given: dict[str, Given] = {}
    if (config := words.pop("config", None)) is not None:
        if len(config.value) == 1:
            path = Path(config.value[0]).expanduser()
            given, found = read_yaml(path)
            if not given and found:  # no file, or nothing that could be read: nothing else can be said
                raise RecipeError(faults + found, str(path))
            faults += found
        else:
            faults.append("`--config` needs the path of one recipe.")
    environment = _environment(given.pop("env", None), faults)
    if "verb" in given and (named := given.pop("verb").value) != verb:
        known = f"`trl-robust {named}`" if named in VERBS else f"no verb that trains (those are {', '.join(VERBS)})"
        faults.append(f"`verb` is {named}: this recipe is for {known}, not for `trl-robust {verb}`.")

    values, launch, faulty = _fit_all(verb, given | words, faults)
    parts = {name: _build(part(verb), values, faults, this_machine) for name, part in PARTS.items()}
    recipe = Recipe(
        verb=verb,
        path=path,
        **parts,
        given=values,
        launch=launch,
        environment=environment,
        argv=without(argv, set(launch)),
    )
    faults += check_launch(launch)
    if check:
        faults += check_recipe(recipe, faulty)
    if faults:
        raise RecipeError(list(dict.fromkeys(faults)), recipe.source)
    return recipe


def _environment(given: Given | None, faults: list[str]) -> dict[str, str]:
    if given is None:
        return {}
    if not isinstance(given.value, dict):
        faults.append(
            f"`env` ({given.place}) must be a mapping of environment variables, such as `HF_HUB_OFFLINE: 1`."
        )
        return {}
    return {str(key): str(value) for key, value in given.value.items()}


def _fit_all(verb: str, given: dict[str, Given], faults: list[str]) -> tuple[dict[str, Any], dict[str, Any], set[str]]:
    """Sorts the keys into fields and launch options, in the types these have; third, the keys that do not fit."""
    fields = {item.name: (item, part(verb)) for part in PARTS.values() for item in dataclasses.fields(part(verb))}
    hints = {name: hint for part in PARTS.values() for name, hint in get_type_hints(part(verb)).items()}
    values: dict[str, Any] = {}
    launch: dict[str, Any] = {}
    faulty: set[str] = set()
    for name, item in given.items():
        known = name
        if item.from_command_line and name not in fields and name.removeprefix("no_") in fields and not item.value:
            known, item = name.removeprefix("no_"), Given(False, item.place)  # `--no_packing`
        try:
            if known in fields:
                value = fit_word(item, hints[known], bare=True if known == "resume_from_checkpoint" else None)
                if known == "resume_from_checkpoint" and isinstance(value, bool):
                    value = "true" if value else None  # TRL's field is text; `true` means the last checkpoint
                values[known] = fit(value, hints[known], fields[known][0].metadata.get("choices"))
            elif name in launch_options():
                launch[name] = fit_launch_option(name, fit_word(item, bool))
            else:
                faults.append(unknown(name, item, [*fields, *launch_options()]))
        except UnfitError as error:
            faulty.add(known)
            end = "" if str(error).endswith("?") else "."
            faults.append(f"`{known}` ({item.place}) is {shown(item)}; {error}{end}")
    return values, launch, faulty


def fit_word(item: Given, hint: Any, bare: bool | None = None) -> Any:
    """
    The value of a key; on a command line one word is a value, several are a list, and none switches it on.

    Args:
        item ([`Given`]):
            As written.
        hint (`Any`):
            The field's type.
        bare (`bool`, *optional*):
            Whether the key may stand without a value although it is no switch.

    Returns:
        The value, not yet in the field's type.

    Raises:
        [`UnfitError`]: no value.
    """
    if not item.from_command_line:
        return item.value
    if len(item.value) == 0:
        if bare or "bool" in str(hint):
            return True
        raise UnfitError("a value is needed after it")
    return item.value[0] if len(item.value) == 1 else list(item.value)


def shown(item: Given) -> str:
    """
    A value as a message shows it.

    Args:
        item ([`Given`]):
            As written.

    Returns:
        `str`.
    """
    value = " ".join(item.value) if item.from_command_line else item.value
    text = "empty" if value is None or value == "" else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def unknown(name: str, item: Given, names: list[str]) -> str:
    """
    The fault of a key that is none, with the nearest name.

    Args:
        name (`str`):
            The key.
        item ([`Given`]):
            Where it stands.
        names (`list[str]`):
            The keys there are.

    Returns:
        `str`.
    """
    key = f"--{name}" if item.from_command_line else name
    if name in RENAMED:
        return f"`{key}` ({item.place}) is not a key here. {RENAMED[name]}"
    return f"`{key}` ({item.place}) is not a key{nearest(name, names) or '. Remove it.'}"


def _build(cls: type, values: dict[str, Any], faults: list[str], this_machine: bool) -> Any:
    """An instance of a dataclass from what was given; faults that its own checks find are added."""
    names = {item.name for item in dataclasses.fields(cls) if item.init}
    own = {name: value for name, value in values.items() if name in names}
    if "use_cpu" in names and not this_machine and not torch.accelerator.is_available():
        own |= {"use_cpu": True, "tf32": None}
    problem: Exception
    try:
        return cls(**own)
    except ValueError as error:
        problem = error
        faults += [_reworded(line) for line in str(error).splitlines() if line.strip()]
    except (ImportError, OSError) as error:  # a library or a file that a setting asks for
        problem = error
        faults.append(" ".join(str(error).split()))
    # As far as it goes, so that the data and the model can be checked as well.
    bare: Any = object.__new__(cls)
    for item in dataclasses.fields(cls):
        default = item.default if item.default_factory is dataclasses.MISSING else item.default_factory()
        object.__setattr__(bare, item.name, own.get(item.name, default))
    if isinstance(bare, AttackArguments | ParaphraseArguments) and not isinstance(problem, ValueError):
        faults += bare.faults()
    return bare


def _reworded(line: str) -> str:
    """A fault in the words of a recipe, where transformers has others."""
    if "support bf16/gpu" in line:
        return (
            "`bf16` (true unless set) needs a GPU with bfloat16, and this machine has none. Set `use_cpu: true` to "
            "train on the CPU."
        )
    if line.startswith("--tf32"):
        return "`tf32` needs a newer NVIDIA GPU than this machine has. Set `tf32: false`."
    return line
