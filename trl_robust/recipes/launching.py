"""Options for `accelerate launch` in a recipe: recognising, checking and using them."""

from __future__ import annotations

import argparse
import functools
import importlib.resources
import signal
import subprocess
import threading
from pathlib import Path
from typing import Any

import yaml
from accelerate.commands.launch import launch_command, launch_command_parser

from .arguments import Recipe
from .values import fit

NOT_FOR_RECIPES = {
    "aws_access_key_id",
    "aws_secret_access_key",
    "env",
    "help",
    "module",
    "no_python",
    "training_script",
    "training_script_args",
}
"""Options of `accelerate launch` that say what is started, or are no setting; a recipe does not take them."""

UNSUPPORTED = {
    "use_deepspeed": "DeepSpeed",
    "use_fsdp": "FSDP",
    "use_megatron_lm": "Megatron-LM",
    "tpu": "TPUs",
}


@functools.cache
def launch_options() -> dict[str, argparse.Action | None]:
    """
    The options of `accelerate launch`, and TRL's `accelerate_config`.

    Returns:
        `dict`: name -> argparse action; `None` for `accelerate_config`.
    """
    actions = {action.dest: action for action in launch_command_parser()._actions if action.option_strings}
    return {name: action for name, action in actions.items() if name not in NOT_FOR_RECIPES} | {
        "accelerate_config": None
    }


def fit_launch_option(name: str, value: Any) -> Any:
    """
    Brings the value of a launch option into its type.

    Args:
        name (`str`):
            Option.
        value (`Any`):
            From YAML, or a string from a command line.

    Returns:
        A `bool` for a switch, else an `int`, a `float` or a `str`.

    Raises:
        [`UnfitError`]: naming what is needed.
    """
    action = launch_options()[name]
    if action is None:
        return fit(value, str)
    if action.nargs == 0:
        return fit(value, bool)
    kind = action.type if action.type in (int, float) else str
    return fit(value, kind, action.choices)


def config_file_of(launch: dict[str, Any]) -> Path | None:
    """
    The accelerate configuration a recipe names.

    Args:
        launch (`dict`):
            Launch options.

    Returns:
        `Path`: the file given by `config_file` or `accelerate_config`, or the one that TRL ships under that name;
        `None` if neither is given.
    """
    name = launch.get("accelerate_config", launch.get("config_file"))
    if name is None:
        return None
    path = Path(name).expanduser()
    shipped = Path(str(importlib.resources.files("trl.accelerate_configs") / f"{name}.yaml"))
    return shipped if not path.is_file() and shipped.is_file() else path


def check_launch(launch: dict[str, Any]) -> list[str]:
    """
    What is wrong with the launch options.

    Args:
        launch (`dict`):
            Launch options in their types.

    Returns:
        `list[str]`: one entry for each fault.
    """
    faults = [
        f"`{name}` is not supported. Use one GPU, or several with `num_processes` (DDP)."
        for name in UNSUPPORTED
        if launch.get(name)
    ]
    if launch.get("dynamo_backend", "no").lower() != "no":
        faults.append("`dynamo_backend` compiles the model, which ignores every perturbation. Remove it.")
    path = config_file_of(launch)
    if path is None:
        return faults
    if not path.is_file():
        folder = importlib.resources.files("trl.accelerate_configs")
        names = sorted(Path(entry.name).stem for entry in folder.iterdir() if entry.name.endswith(".yaml"))
        faults.append(
            f"`accelerate_config` is {str(path)!r}, which is neither a file nor one of {', '.join(names)}. Give one "
            "of these, or a file that `accelerate config` wrote."
        )
        return faults
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        return [*faults, f"`accelerate_config`: {path} cannot be read: {' '.join(str(error).split())}."]
    kind = str(settings.get("distributed_type", "NO")) if isinstance(settings, dict) else "?"
    if kind not in ("NO", "MULTI_GPU", "MULTI_CPU"):
        faults.append(
            f"`accelerate_config`: {path.name} asks for {kind}, which is not supported. Use `single_gpu` or "
            "`multi_gpu` (DDP)."
        )
    return faults


def launch_arguments(launch: dict[str, Any]) -> list[str]:
    """
    The launch options as a command line.

    Args:
        launch (`dict`):
            Launch options in their types.

    Returns:
        `list[str]`.
    """
    path = config_file_of(launch)
    arguments = ["--config_file", str(path)] if path is not None else []
    for name, value in launch.items():
        if name in ("accelerate_config", "config_file") or value is None or value is False:
            continue
        option = launch_options()[name]
        flag = option.option_strings[-2 if len(option.option_strings) > 1 else -1] if option is not None else ""
        arguments += [flag] if value is True else [flag, str(value)]
    return arguments


def launch(module: str, recipe: Recipe) -> int:
    """
    Runs a script's module under `accelerate launch`.

    Args:
        module (`str`):
            Module to run, such as `trl_robust.scripts.lat_sft`.
        recipe ([`Recipe`]):
            Its settings: the launch options go to accelerate, the rest of the command line to the script.

    Returns:
        `int`: exit code of the run.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    words = [*launch_arguments(recipe.launch), "-m", module, *recipe.argv]
    arguments = launch_command_parser().parse_args(words)
    # Ctrl-C reaches the run as well, which saves a checkpoint and ends; this process has only to wait for it.
    waits = threading.current_thread() is threading.main_thread()
    previous = signal.signal(signal.SIGINT, lambda *_: None) if waits else None
    try:
        launch_command(arguments)
    except subprocess.CalledProcessError as error:
        return error.returncode if error.returncode > 0 else 128 - error.returncode
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        return code if code > 0 else 128 - code
    finally:
        if waits:
            signal.signal(signal.SIGINT, previous)
    return 0
