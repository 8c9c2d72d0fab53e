"""`trl-robust report`: the report of finished runs and evaluations, made again from their files."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from ..cli import exit_code, fault_of
from .inputs import folder_fault

DESCRIPTION = """\
Makes the report again, from the files that a run or an evaluation has left. One folder: in place. Several
evaluations of attacks, or several training runs: side by side, in --output_dir. A folder is what one of the verbs
attack, evaluate, quickstart, select, diagnose-distance and the trainings has written."""

SIDE_BY_SIDE = ("attacks", "run")
"""Kinds of which several folders make one report."""

PRINTED = ("semantics",)
"""Kinds that have no page; what they found is printed."""

FILES = {"selection.json": "selection", "distance.json": "distance", "run.json": "run"}
"""Which file tells of which kind, besides `results.json`."""


def make_parser() -> argparse.ArgumentParser:
    """
    The verb's command line.

    Returns:
        `argparse.ArgumentParser`.
    """
    parser = argparse.ArgumentParser(
        prog="trl-robust report", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="folders of runs or evaluations")
    parser.add_argument(
        "--output_dir", type=Path, default=None, help="where the report goes; by default in the folder"
    )
    parser.add_argument("--show_generations", action="store_true", help="show texts, which are redacted otherwise")
    return parser


def main(argv: list[str]) -> int:
    """
    Writes the report.

    Args:
        argv (`list[str]`):
            Folders, and `--output_dir` and `--show_generations true` if wanted.

    Returns:
        `int`: exit code.

    Raises:
        [`~trl_robust.recipes.RecipeError`]: folders that hold nothing to report, or of different kinds.
    """
    args = make_parser().parse_args(_plain(argv))
    kinds = {folder: kind_of(folder) for folder in args.folders}
    if faults := faults_of(kinds, args.folders, args.output_dir):
        from ..recipes import RecipeError

        raise RecipeError(faults)
    kind = next(iter(kinds.values()))
    try:
        if kind in PRINTED:
            tell_semantics(args.folders)
        else:
            print(f"Report: {write(str(kind), args.folders, args.output_dir, args.show_generations)}")
    except (FileNotFoundError, ValueError) as error:
        raise fault_of(error, "The report") from error
    return 0


def kind_of(folder: Path) -> str | None:
    """
    What a folder holds.

    Args:
        folder (`Path`):
            The folder.

    Returns:
        `str`: `"attacks"`, `"prompts"`, `"semantics"`, `"selection"`, `"distance"` or `"run"`; `None` where it is
        nothing of these.
    """
    if (folder / "results.json").is_file():
        models = _models(folder)
        return next(
            (suite for suite in ("prompts", "semantics") if any(suite in model for model in models)), "attacks"
        )
    return next((kind for name, kind in FILES.items() if (folder / name).is_file()), None)


def faults_of(kinds: dict[Path, str | None], folders: list[Path], output: Path | None) -> list[str]:
    """
    Why folders cannot be reported together.

    Args:
        kinds (`dict[Path, str]`):
            Folders, and what [`kind_of`] says of them.
        folders (`list[Path]`):
            The folders as they were given.
        output (`Path`, *optional*):
            Where the report shall go.

    Returns:
        `list[str]`: one sentence or two each.
    """
    faults = [_nothing(folder) for folder, kind in kinds.items() if kind is None]
    found = sorted({kind for kind in kinds.values() if kind is not None})
    if len(found) > 1:
        faults.append(f"These folders hold different things ({', '.join(found)}). Report each kind by itself.")
    if len(found) != 1:
        return faults
    kind = found[0]
    if kind in PRINTED:
        return faults + ([] if output is None else [f"`{kind}` is printed, not written. Leave `output_dir` out."])
    if kind not in SIDE_BY_SIDE:
        if len(folders) > 1:
            faults.append(f"Folders of the kind `{kind}` cannot stand side by side. Report one at a time.")
        elif output is not None:
            faults.append(f"The report of `{kind}` is made in its own folder. Leave `output_dir` out.")
    elif output is None and len(folders) > 1:
        faults.append("`output_dir` is missing. Several folders are reported in one of their own: name it.")
    elif output is not None:
        if (fault := folder_fault(output)) is not None:
            faults.append(fault)
        elif kind_of(output) is not None and [path.resolve() for path in folders] != [output.resolve()]:
            faults.append(f"`output_dir` {output} is the folder of a run or an evaluation itself. Name another one.")
    return faults


def write(kind: str, folders: list[Path], output: Path | None, show: bool) -> Path:
    """
    Writes the report of folders of one kind.

    Args:
        kind (`str`):
            What [`kind_of`] gives.
        folders (`list[Path]`):
            The folders.
        output (`Path`, *optional*):
            Where to; by default into the only folder.
        show (`bool`):
            Whether texts are shown.

    Returns:
        `Path` of what was written.
    """
    from ..report import write_report
    from ..report.distance import distance_tables, read_distance, write_distance_figure
    from ..report.prompts import write_prompts_report
    from ..report.runs import write_runs_report
    from ..report.selection import write_selection_report

    if kind == "attacks":
        return write_report(output or folders[0], sources=folders if output else None, show_generations=show)
    if kind == "prompts":
        return write_prompts_report(folders[0], show_generations=show)
    if kind == "selection":
        return write_selection_report(folders[0], show_rows=show)
    if kind == "distance":
        _print(distance_tables(read_distance(folders[0])[0]))
        return write_distance_figure(folders[0])
    return write_runs_report(output or folders[0], folders)


def tell_semantics(folders: list[Path]) -> None:
    """
    Prints the verdicts of the suite `semantics`, which has no page.

    Args:
        folders (`list[Path]`):
            Its folders.
    """
    from .evaluate_semantics import verdicts

    for folder in folders:
        _print([verdicts(model) for model in _models(folder)])


def _print(tables: list[Any]) -> None:
    from rich.console import Console

    console = Console()
    for table in tables:
        console.print(table)


def _models(folder: Path) -> list[dict[str, Any]]:
    """Entries of a `results.json`; none where it cannot be read, which the report's reader puts into words."""
    try:
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    except json.JSONDecodeError:
        return []
    models = results.get("models") if isinstance(results, dict) else None
    return [model for model in models if isinstance(model, dict)] if isinstance(models, list) else []


def _nothing(folder: Path) -> str:
    if not folder.is_dir():
        return f"There is no folder {folder}. Correct the path."
    if (folder / "sweep.json").is_file():
        return f"{folder} holds a sweep. `trl-robust sweep` with its recipe tabulates finished runs again."
    return (
        f"{folder} holds nothing to report, no `results.json`, `selection.json`, `distance.json` or `run.json`. Name "
        "the folder that a run or an evaluation wrote."
    )


def _plain(argv: list[str]) -> list[str]:
    """A command line in which `--show_generations true`, as other verbs have it, is the bare switch."""
    words: list[str] = []
    for word in argv:
        if words and words[-1] == "--show_generations" and word.lower() in ("true", "false"):
            if word.lower() == "false":
                words.pop()
            continue
        words.append(word)
    return words


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(sys.argv[1:])))
