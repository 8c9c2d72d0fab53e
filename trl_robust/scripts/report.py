"""`trl-robust report`: the report of finished runs and evaluations, made again from their files."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from ..cli import exit_code
from .inputs import folder_fault

DESCRIPTION = """\
Makes the report again, from the files that a run or an evaluation has left. One folder: in place. Several evaluations:
side by side, in --output_dir. A folder is what the verbs attack, evaluate, quickstart, seal, select and the trainings
write."""


def make_parser() -> argparse.ArgumentParser:
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
            Folders, and `--output_dir` and `--show_generations` if wanted.

    Returns:
        `int`: exit code.

    Raises:
        [`~trl_robust.recipes.RecipeError`]: folders that hold nothing to report, or of different kinds.
    """
    from ..recipes import RecipeError

    args = make_parser().parse_args(_plain(argv))
    kinds = {folder: kind_of(folder) for folder in args.folders}
    faults = [f"{folder} holds nothing to report: {_EXPECTED}" for folder, kind in kinds.items() if kind is None]
    found = sorted({kind for kind in kinds.values() if kind is not None})
    if len(found) > 1:
        faults.append(f"These folders hold different things ({', '.join(found)}); report each kind by itself.")
    if len(args.folders) > 1:
        if found and found[0] in ("prompts", "selection"):
            faults.append(f"Only one folder of the kind `{found[0]}` can be reported at a time.")
        if args.output_dir is None:
            faults.append("`output_dir` is missing; several folders are reported in one of their own.")
    if args.output_dir is not None and (fault := folder_fault(args.output_dir)) is not None:
        faults.append(fault)
    if faults:
        raise RecipeError(faults)
    try:
        print(f"Report: {write(found[0], args.folders, args.output_dir, args.show_generations)}")
    except (FileNotFoundError, ValueError) as error:
        raise RecipeError([str(error)]) from error
    return 0


_EXPECTED = "it has no `results.json`, `selection.json` or `run.json`. Name the folder that a run or evaluation wrote."


def kind_of(folder: Path) -> str | None:
    """
    What a folder holds.

    Args:
        folder (`Path`):
            The folder.

    Returns:
        `str`: `"attacks"`, `"prompts"`, `"selection"` or `"run"`; `None` where it is nothing of these.
    """
    if (folder / "results.json").is_file():
        try:
            results: Any = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        except json.JSONDecodeError:
            return "attacks"  # whose reader says what is wrong
        return "prompts" if isinstance(results, dict) and results.get("suite") == "prompts" else "attacks"
    if (folder / "selection.json").is_file():
        return "selection"
    return "run" if (folder / "run.json").is_file() else None


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
        `Path` of `report.html`.
    """
    from ..report import write_report
    from ..report.prompts import write_prompts_report
    from ..report.runs import write_runs_report
    from ..report.selection import write_selection_report

    if kind == "attacks":
        return write_report(output or folders[0], sources=folders if output else None, show_generations=show)
    if kind == "prompts":
        return write_prompts_report(folders[0], show_generations=show)
    if kind == "selection":
        return write_selection_report(folders[0], show_rows=show)
    return write_runs_report(output or folders[0], folders)


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
