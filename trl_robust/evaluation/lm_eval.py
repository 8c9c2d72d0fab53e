"""Benchmarks of lm-eval (`pip install 'trl-robust[eval]'`) on a model that is loaded already."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from ..attacks import Subject

METRICS = ("acc", "exact_match")
"""What counts as a task's accuracy: the first of these that it reports."""


class MissingLmEvalError(ImportError):
    """lm-eval is not installed."""


def check_installed() -> None:
    """
    Stops early where lm-eval is needed and not there.

    Raises:
        [`MissingLmEvalError`]: saying how to install it.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise MissingLmEvalError(
            "Benchmarks are run with lm-eval, which is not installed: pip install 'trl-robust[eval]'. Without it, "
            "leave `lm_eval` out."
        )


def accuracies(
    subject: Subject,
    tasks: Sequence[str],
    *,
    num_fewshot: int | None = None,
    limit: int | None = None,
    task_folder: str | None = None,
) -> dict[str, dict[str, Any]]:
    """
    Accuracy of a model on tasks of lm-eval. The caller's random generators are left alone.

    Args:
        subject ([`~trl_robust.attacks.Subject`]):
            The model.
        tasks (sequence of `str`):
            Names of tasks or groups, such as `mmlu`.
        num_fewshot (`int`, *optional*):
            Examples in the prompt; the task's own number by default. Tasks that fix it at 0 keep it.
        limit (`int`, *optional*):
            Only so many rows of every task.
        task_folder (`str`, *optional*):
            Folder with further task files, beside those of lm-eval.

    Returns:
        `dict`: for every task `name`, `value`, `standard_error`, `n`, `version`, `num_fewshot` and `lm_eval`, the
        version of the library.

    Raises:
        [`MissingLmEvalError`]: lm-eval is not installed.
        `ValueError`: a task that lm-eval does not have, or that reports no accuracy.

    Example:

    ```python
    >>> accuracies(Subject.load("runs/mine"), ["mmlu"], limit=20)["mmlu"]["value"]
    ```
    """
    check_installed()
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    known = TaskManager(include_path=task_folder)
    if missing := [task for task in tasks if not known.match_tasks([task])]:
        raise ValueError(
            f"lm-eval has no task {', '.join(missing)}. Correct the name, or give the folder of its file as "
            "`task_folder`."
        )
    model = HFLM(pretrained=subject.model, tokenizer=subject.tokenizer, batch_size=subject.batch_size)
    found = simple_evaluate(
        model,
        tasks=list(tasks),
        num_fewshot=num_fewshot,
        limit=limit,
        task_manager=known,
        log_samples=False,
        bootstrap_iters=100,  # means have a closed form; other metrics are resampled
        # It would seed the global generators; the order of few-shot examples has a seed of its own.
        random_seed=None,
        numpy_random_seed=None,
        torch_random_seed=None,
    )
    return {task: _accuracy(task, found) for task in tasks}


def _accuracy(task: str, found: Mapping[str, Any]) -> dict[str, Any]:
    values = found["results"].get(task, {})
    for metric in METRICS:
        for name, value in values.items():
            if name.partition(",")[0] == metric and isinstance(value, int | float):
                error = values.get(f"{metric}_stderr,{name.partition(',')[2]}")
                return {
                    "name": f"{metric} on {task}",
                    "value": float(value),
                    "standard_error": float(error) if isinstance(error, int | float) else None,
                    "n": _count(task, found),
                    "version": found["versions"].get(task),
                    "num_fewshot": found["n-shot"].get(task),
                    "lm_eval": version("lm_eval"),
                }
    raise ValueError(f"The task {task} reports {', '.join(values) or 'nothing'}, and no accuracy ({METRICS}).")


def _count(task: str, found: Mapping[str, Any]) -> int:
    """Rows of a task, or of all the tasks of a group."""
    counts, members = found.get("n-samples", {}), [task]
    for member in members:
        members += found.get("group_subtasks", {}).get(member, [])
    return sum(counts[member]["effective"] for member in dict.fromkeys(members) if member in counts)
