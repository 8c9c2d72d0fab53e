"""What a run's folder holds besides the weights: whether it may be written to, where to go on, `run.json`."""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers.trainer import TRAINER_STATE_NAME

from .. import __version__
from ..recipes import Recipe, RecipeError
from ..recipes.resolved import HEADER
from .inputs import folder_fault

RUN = "run.json"
RECIPE = "recipe.yaml"
README = "README.md"
LIBRARIES = ("torch", "trl", "transformers", "peft", "accelerate", "datasets")


def checkpoint_to_resume(recipe: Recipe) -> str | None:
    """
    Where a run starts: nowhere in an empty folder, or at a checkpoint; never over an earlier run.

    Args:
        recipe ([`~trl_robust.recipes.Recipe`]):
            Settings; `resume_from_checkpoint` is `true` for the last checkpoint of the folder, or a checkpoint's path.

    Returns:
        `str`: path of the checkpoint, or `None` to start afresh.

    Raises:
        [`~trl_robust.recipes.RecipeError`]: the folder holds an earlier run, or the checkpoint is not there.
    """
    folder, resume = Path(str(recipe.training.output_dir)), recipe.training.resume_from_checkpoint
    fault = folder_fault(folder)
    if fault:
        raise RecipeError([fault], recipe.source)
    found: Path | None = None
    if resume is None or resume.lower() == "false":
        fault = _earlier_run(folder)
    elif resume.lower() == "true":
        # A checkpoint whose saving was cut short has no state yet.
        steps = [path for path in folder.glob("checkpoint-*") if (path / TRAINER_STATE_NAME).is_file()]
        found = max(steps, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
        if found is None:
            fault = (
                f"`resume_from_checkpoint` is true, and `output_dir` {folder} has no checkpoint. Remove it to start "
                "afresh, or correct `output_dir`."
            )
    else:
        found = Path(resume).expanduser()
        if not (found / TRAINER_STATE_NAME).is_file():
            fault = (
                f"`resume_from_checkpoint` is {resume}, which is not a checkpoint (no {TRAINER_STATE_NAME} in "
                f"{found.absolute()}). Give the path of a `checkpoint-N` folder, or `true` for the last one."
            )
        elif found.resolve().parent != folder.resolve():
            fault = _earlier_run(folder)
    if fault:
        raise RecipeError([fault], recipe.source)
    return str(found) if found is not None else None


def _earlier_run(folder: Path) -> str | None:
    """Why a run must not start in a folder: what it would write over."""
    marks = (RUN, "checkpoint-*", "*.safetensors", "*.bin", "config.json")
    found = sorted(path.name for mark in marks for path in folder.glob(mark))
    ours = (folder / RECIPE).is_file() and (folder / RECIPE).read_bytes().startswith(HEADER.encode())
    foreign = [] if ours else [name for name in (RECIPE, README) if (folder / name).exists()]
    if not found and foreign:
        return (
            f"`output_dir` {folder} holds {' and '.join(foreign)} that trl-robust did not write; nothing is written "
            "over. Name another folder."
        )
    if not found:
        return None
    more = "" if len(found) == 1 else f" and {len(found) - 1} more"
    return (
        f"`output_dir` {folder} holds an earlier run or a model ({found[0]}{more}); nothing is written over. Name "
        "another folder, or go on with `--resume_from_checkpoint true`."
    )


def versions() -> dict[str, str]:
    """
    Versions of everything that decides a run's numbers.

    Returns:
        `dict`: library -> version.
    """
    return {
        "trl_robust": __version__,
        "python": platform.python_version(),
        **{name: version(name) for name in LIBRARIES},
    }


def hardware(processes: int) -> dict[str, Any]:
    """
    What the run had to work with.

    Args:
        processes (`int`):
            Number of processes.

    Returns:
        `dict`.
    """
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return {
        "cpu_count": os.cpu_count(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "processes": processes,
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    """
    Writes a file that is either there in full or not at all.

    Args:
        path (`Path`):
            Where.
        content (`dict`):
            What.
    """
    draft = path.with_name(f".{path.name}.partial")
    draft.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    draft.replace(path)
