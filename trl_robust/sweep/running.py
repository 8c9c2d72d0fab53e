"""A sweep from its grid to its table."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..recipes import RecipeError
from ..scripts.inputs import folder_fault
from ..scripts.interruption import Interrupted
from ..scripts.quiet import quiet
from .grid import Grid
from .locking import only_one
from .measures import check_evaluation
from .planning import Plan, make_plan, refuse_changed
from .serving import Outcome, Work
from .stages import before_the_first
from .table import tabulate
from .work import CellWork, OrganismWork, clean
from .workers import Worker, run_all
from .writing import plan_lines, terminal_table, write_all

TABLE_WIDTH = 120


def describe(grid: Grid, plan: Plan) -> list[str]:
    """
    What a sweep would do, for people.

    Args:
        grid ([`Grid`]):
            The grid.
        plan ([`Plan`]):
            Its plan.

    Returns:
        `list[str]`: lines.
    """
    shown = {cell.name: ", ".join(f"{key}={value}" for key, value in cell.own.items()) for cell in grid.cells}
    missing = plan.missing()
    return [
        *plan_lines(shown, plan.same),
        *plan.notes,
        f"{len(grid.cells)} cells x {len(grid.seeds)} seeds, {len(plan.same)} cells that cannot differ from others: "
        f"{len(plan.runs)} runs, {len(plan.runs) - len(missing)} finished, {len(missing)} to do.",
    ]


def run_sweep(grid: Grid, *, jobs: int | None = None) -> dict[str, Any]:
    """
    Runs what is missing of a grid, and writes its table and its picture.

    Args:
        grid ([`Grid`]):
            The grid.
        jobs (`int`, *optional*):
            Processes; as many as GPUs, or as cores where there is none.

    Returns:
        `dict`: what stands in `sweep.json`.

    Raises:
        [`~trl_robust.recipes.RecipeError`]: a finished run has other settings now, or nothing could be started.
        [`~trl_robust.scripts.interruption.Interrupted`]: SIGINT; finished runs stay.
    """
    console = Console(stderr=True, highlight=False)
    if (fault := folder_fault(grid.output_dir)) is not None:
        raise RecipeError([fault], str(grid.path))
    with only_one(grid.output_dir):
        plan = make_plan(grid)
        refuse_changed(plan)
        for run in plan.runs:
            clean(run.folder, run.keep_model)  # killed after its last file and before its weights were gone
        for line in describe(grid, plan):
            console.print(line, markup=False, soft_wrap=True)
        failed: dict[str, str] = {}
        try:
            _run_missing(grid, plan, jobs, failed, console)
        except KeyboardInterrupt as stop:
            done = len(plan.runs) - len(plan.missing())
            write_all(grid.output_dir, tabulate(grid, plan, failed))
            raise Interrupted(
                f"Stopped with {done} of {len(plan.runs)} runs finished. The same command goes on with the others."
            ) from stop
        table = tabulate(grid, plan, failed)
        write_all(grid.output_dir, table)
    _say_outcome(grid.output_dir, table, console)
    return table


def _run_missing(grid: Grid, plan: Plan, jobs: int | None, failed: dict[str, str], console: Console) -> None:
    missing = plan.missing()
    if not missing:
        return
    if grid.organism is None:
        # Faults that all cells share show here, not in every one of them after its imports.
        with quiet():
            check_evaluation(grid.evaluation)
        baseline = next(cell for cell in grid.cells if cell.name == grid.baseline)
        with quiet():
            for stage in before_the_first(grid.stages(baseline.settings, grid.seeds[0])):
                stage.recipe(check=True, this_machine=True)
    workers, threads, gpus = _share(jobs)
    seeds = {run.seed for run in missing}
    organisms = [work for work in plan.organisms if work.seed in seeds]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("starting", total=len(organisms) + len(missing))

        def told(busy: Sequence[Worker]) -> None:
            now = "; ".join(f"{worker.work.title}: {worker.stage}" for worker in busy if worker.stage)
            if now:
                progress.update(task, description=now if len(now) <= 80 else f"{now[:77]}...")

        def ended(work: Any, outcome: Outcome) -> None:
            progress.advance(task)
            if outcome.state != "done":
                failed[work.title] = outcome.reason or "it was stopped"
            done = int(progress.tasks[0].completed)
            word = outcome.state + (f": {outcome.reason}" if outcome.reason else "")
            console.print(
                f"[{done}/{len(organisms) + len(missing)}] {work.title}: {word}", markup=False, soft_wrap=True
            )

        def work_through(works: Sequence[Work]) -> None:
            run_all(works, jobs=workers, threads=threads, gpus=gpus, told=told, ended=ended)

        work_through(organisms)
        work_through(_with_organism(missing, organisms, failed))


def _with_organism(
    missing: Sequence[CellWork], organisms: Sequence[OrganismWork], failed: dict[str, str]
) -> list[CellWork]:
    """The runs whose organism is there; the others fail for that reason."""
    without = {work.seed: failed[work.title] for work in organisms if work.title in failed}
    failed |= {run.title: f"no organism: {without[run.seed]}" for run in missing if run.seed in without}
    return [run for run in missing if run.seed not in without]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _share(jobs: int | None) -> tuple[int, int | None, list[str]]:
    """Workers, threads of each (`None`: torch's own number), and the GPUs to share out."""
    count = torch.cuda.device_count()
    if count:
        named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        return jobs or count, None, named[:count] or [str(number) for number in range(count)]
    # One thread whatever the number of workers: the last digits depend on it, and the table must not.
    return jobs or _cores(), int(os.environ.get("OMP_NUM_THREADS", 1)), []


def _say_outcome(folder: Path, table: dict[str, Any], console: Console) -> None:
    out = Console()
    if not out.is_terminal:
        out = Console(width=TABLE_WIDTH)  # in a file or a log there is no narrow window to fit into
    out.print(terminal_table(table))
    for name, why in table["failed"].items():
        console.print(f"FAILED {name}: {why}", markup=False, soft_wrap=True)
    if table["failed"]:
        console.print("Its folder holds error.txt and log.txt. The same command tries again.", markup=False)
    console.print(f"Written to {folder / 'sweep.md'} and beside it.", markup=False, soft_wrap=True)
