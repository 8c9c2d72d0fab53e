"""`trl-robust select`: the rows of a dataset that a saved selector keeps."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, field
from datetime import date, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..selection.matching import Selection, Unscored, amount_faults
from .inputs import folder_fault, seed_fault

if TYPE_CHECKING:
    from datasets import Dataset

KEPT, SUMMARY = "kept.jsonl", "selection.json"
RESULTS = (KEPT, SUMMARY, "report.html", "report.md")
KEEP = 0.8


@dataclass
class SelectArguments:
    """
    Arguments of `trl-robust select`.

    Args:
        selector (`str`):
            Folder that `trl-robust seal` or `Selector.save` has written.
        dataset_name (`str`):
            The dataset that it was trained on, or any copy: in another order, with rows removed, with other columns.
        dataset_config (`str`, *optional*):
            Its configuration, where it has several.
        dataset_split (`str`, *optional*, defaults to `"train"`):
            Its split.
        output_dir (`str`):
            Where rows and report go: a folder without results.
        keep (`float`, *optional*):
            Share of the rows to keep; 0.8 if neither of the next two is given.
        count (`int`, *optional*):
            Number of rows to keep.
        threshold (`float`, *optional*):
            Least weight of the rows to keep; 1 is the mean over the selector's rows.
        weighted (`bool`, *optional*, defaults to `False`):
            Whether a column `weight` is written, of mean 1, by which lat-sft, lap-sft and SFT weigh the losses.
        source_column (`str`, *optional*):
            Column that says where a row comes from; the keep rate of every source is told.
        per_source (`bool`, *optional*, defaults to `False`):
            Whether the share or number is kept of every source by itself.
        label_column (`str`, *optional*):
            Column that is true in rows that had better not be kept, for the report alone.
        unscored (`str`, *optional*, defaults to `"refuse"`):
            What becomes of rows that the selector does not know or has never visited: `refuse` the dataset, `drop` or
            `keep` them.
        mix_dataset_name (`str`, *optional*):
            Safety demonstrations to append to what is kept.
        mix_dataset_config, mix_dataset_split (`str`, *optional*):
            Their configuration and split.
        mix_fraction (`float`, *optional*):
            How many, as a share of the rows kept; 0.03 by default.
        compare (`list[str]`, *optional*):
            Folders of other selectors, whose ranking the report compares.
        show_rows (`bool`, *optional*, defaults to `False`):
            Whether the report shows the text of rows.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the draw of demonstrations.
    """

    selector: str | None = field(default=None, metadata={"help": "Folder of the selector."})
    dataset_name: str | None = field(default=None, metadata={"help": "Rows: a file, a folder or a hub id."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the rows."})
    dataset_split: str = field(default="train", metadata={"help": "Split of the rows."})
    output_dir: str | None = field(default=None, metadata={"help": "Where rows and report go: a new folder."})
    keep: float | None = field(default=None, metadata={"help": "Share of the rows to keep; 0.8 by default."})
    count: int | None = field(default=None, metadata={"help": "Number of rows to keep."})
    threshold: float | None = field(default=None, metadata={"help": "Least weight of the rows to keep."})
    weighted: bool = field(default=False, metadata={"help": "Whether a column `weight` is written."})
    source_column: str | None = field(default=None, metadata={"help": "Column that says where a row comes from."})
    per_source: bool = field(default=False, metadata={"help": "Keep that share or number of every source."})
    label_column: str | None = field(default=None, metadata={"help": "Column that is true in rows not to keep."})
    unscored: Unscored = field(default="refuse", metadata={"help": "What becomes of rows without a score."})
    mix_dataset_name: str | None = field(default=None, metadata={"help": "Safety demonstrations to append."})
    mix_dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the demonstrations."})
    mix_dataset_split: str = field(default="train", metadata={"help": "Split of the demonstrations."})
    mix_fraction: float | None = field(
        default=None, metadata={"help": "How many, as a share of the rows kept; 0.03 by default."}
    )
    compare: list[str] | None = field(default=None, metadata={"help": "Folders of other selectors to compare with."})
    show_rows: bool = field(default=False, metadata={"help": "Whether the report shows the text of rows."})
    seed: int = field(default=0, metadata={"help": "Seed of the draw of demonstrations."})

    def __post_init__(self) -> None:
        if problems := self.faults():
            raise ValueError("\n".join(problems))

    def faults(self) -> list[str]:
        """Everything that is wrong with the arguments, one sentence or two each."""
        problems = [
            f"`{name}` is missing; {what}."
            for name, what in (
                ("selector", "name a folder that `trl-robust seal` has written"),
                ("dataset_name", "name the dataset to select from"),
                ("output_dir", "name a folder for the rows that are kept"),
            )
            if getattr(self, name) is None
        ]
        given = [name for name in ("keep", "count", "threshold") if getattr(self, name) is not None]
        if len(given) > 1:
            problems.append(f"{given} are given; each says how many rows are kept. Keep one.")
        else:
            problems += amount_faults(self.keep, self.count, self.threshold)
        problems += [
            f"`{name}` is 0, which keeps no row. Give more." for name in ("keep", "count") if getattr(self, name) == 0
        ]
        if self.per_source and self.source_column is None:
            problems.append("`per_source` needs `source_column`; name the column that says where a row comes from.")
        if self.per_source and self.threshold is not None:
            problems.append("`per_source` has no effect on a `threshold`, which is the same for all. Remove one.")
        if self.mix_dataset_name is None:
            problems += [
                f"`{name}` is given, and no `mix_dataset_name`. Name the demonstrations, or remove it."
                for name, plain in (
                    ("mix_fraction", None),
                    ("mix_dataset_config", None),
                    ("mix_dataset_split", "train"),
                )
                if getattr(self, name) != plain
            ]
        if self.mix_fraction is not None and not 0 < self.mix_fraction <= 1:
            problems.append(f"`mix_fraction` is {self.mix_fraction}; it must be above 0 and at most 1.")
        if len(set(self.compare or [])) < len(self.compare or []):
            problems.append("`compare` names a selector twice; name each once.")
        if (fault := seed_fault(self.seed)) is not None:
            problems.append(fault)
        return problems + self._folder_faults()

    def _folder_faults(self) -> list[str]:
        if self.output_dir is None:
            return []
        folder = Path(self.output_dir)
        if (fault := folder_fault(folder)) is not None:
            return [fault]
        if there := [name for name in RESULTS if (folder / name).exists()]:
            return [
                f"`output_dir` {folder} holds results ({', '.join(there)}), and nothing is written over. Name another "
                "folder."
            ]
        return []


def main(argv: list[str]) -> int:
    """
    Selects rows as the arguments say.

    Args:
        argv (`list[str]`):
            `--key value` arguments.

    Returns:
        `int`: exit code.

    Raises:
        [`~trl_robust.recipes.RecipeError`]: listing every fault of the arguments.
        [`~trl_robust.data.DataError`]: a selector or dataset that cannot be read, or that do not go together.
    """
    from ..recipes.flat import load_arguments
    from .quiet import quiet

    args: SelectArguments = load_arguments(SelectArguments, argv, prog="trl-robust select")
    with quiet():
        run(args)
    return 0


def run(args: SelectArguments) -> dict[str, Any]:
    """
    Writes the rows that are kept, `selection.json` and the report, and prints the outcome.

    Args:
        args ([`SelectArguments`]):
            Arguments.

    Returns:
        `dict`: what stands in `selection.json`.

    Raises:
        As [`main`]; no file is left then.
    """
    from ..data import DataError, add_row_hashes, content_hash, load_rows
    from ..data.hashing import ROW_HASH
    from ..report.selection import write_selection_report
    from ..selection import Selector
    from ..selection.baselines import mix_rows
    from ..selection.summary import summarize
    from .run_folder import versions, write_json

    selector = Selector.load(Path(str(args.selector)).expanduser())
    others = {name: Selector.load(Path(name).expanduser()) for name in args.compare or []}
    rows = load_rows(str(args.dataset_name), config=args.dataset_config, split=args.dataset_split)
    hashed = add_row_hashes(rows)  # once for all that follows
    how: dict[str, Any] = {
        "count": args.count,
        "threshold": args.threshold,
        "source_column": args.source_column if args.per_source else None,
        "unscored": args.unscored,
    }
    keep = KEEP if args.keep is None else args.keep
    chosen = selector.selection(hashed, keep, **how)
    if not chosen.kept:
        raise DataError(_none_kept(args, selector.weights().max().item()))
    kept = selector.select(hashed, keep, weighted=args.weighted, **how)
    if ROW_HASH not in rows.column_names:
        kept = kept.remove_columns(ROW_HASH)
    written = kept
    if args.mix_dataset_name is not None:
        safe = load_rows(args.mix_dataset_name, config=args.mix_dataset_config, split=args.mix_dataset_split)
        written = mix_rows(kept, safe, share=args.mix_fraction, seed=args.seed)
    summary = summarize(
        selector,
        hashed,
        chosen.kept,
        label_column=args.label_column,
        source_column=args.source_column,
        others=others,
    )
    summary |= {
        "mixed_in": len(written) - len(kept),
        "run": {
            "versions": versions(),
            "arguments": asdict(args),
            "dataset": {"rows": len(rows), "sha256": content_hash(rows)},
        },
    }
    folder = Path(str(args.output_dir))
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / KEPT, written)
    write_json(folder / SUMMARY, summary)
    page = write_selection_report(folder, show_rows=args.show_rows)
    _tell(chosen, summary, kept, written)
    print(f"Rows: {folder / KEPT}\nReport: {page}")
    return summary


def write_rows(path: Path, rows: Dataset) -> None:
    """
    Writes rows as JSON lines, with every value as it is: `Dataset.to_json` rounds numbers to 10 decimals.

    Args:
        path (`Path`):
            Where; it is either there in full or not at all.
        rows ([`~datasets.Dataset`]):
            What.

    Raises:
        [`~trl_robust.data.DataError`]: values that JSON does not have, such as images.
    """
    draft = path.with_name(f".{path.name}.partial")
    try:
        with draft.open("w", encoding="utf-8") as file:
            for row in rows:
                # JSON has no nan, and readers of JSON lines stumble over it.
                plain = {name: None if value != value else value for name, value in row.items()}
                file.write(json.dumps(plain, ensure_ascii=False, default=_in_json) + "\n")
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def _in_json(value: Any) -> str:
    from ..data import DataError

    if isinstance(value, date | time | timedelta | Decimal):  # a datetime is a date
        return str(value)
    raise DataError(
        f"The dataset has a value of type {type(value).__name__}, which JSON lines cannot hold. Remove its column."
    )


def _none_kept(args: SelectArguments, largest: float) -> str:
    if args.threshold is not None:
        return f"No row has a weight of {args.threshold} (`threshold`); the largest is {largest:.4g}. Lower it."
    return (
        "No row is kept: the dataset has too few rows for this share, or none of them has a score. Raise `keep`, or "
        "give a `count`."
    )


def _tell(chosen: Selection, summary: dict[str, Any], kept: Dataset, written: Dataset) -> None:
    """Prints what was kept, in a few lines."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console, rows = Console(), summary["rows"]
    lines = [f"{rows['kept']} of {rows['dataset']} rows are kept ({rows['kept'] / rows['dataset']:.1%})."]
    if chosen.threshold is not None:
        tied = f"; {chosen.tied} rows are tied there, kept or not" if chosen.tied > 1 else ""
        lines.append(f"Weight of the last one: {chosen.threshold:.4g}{tied}.")
    if chosen.unknown or chosen.unvisited:
        lines.append(
            f"Without a score: {len(chosen.unknown)} unknown to the selector, {len(chosen.unvisited)} never visited; "
            f"{rows['kept_without_score']} of them are kept."
        )
    if chosen.missing:
        lines.append(f"Rows that the selector knows and the dataset lacks: {chosen.missing}.")
    if len(written) > len(kept):
        lines.append(f"Demonstrations mixed in: {len(written) - len(kept)}.")
    if lost := [column for column in kept.column_names if column not in written.column_names]:
        lines.append(f"Columns that the demonstrations lack are left out: {', '.join(lost)}.")
    lines += summary["warnings"]
    for line in lines:
        console.print(line, markup=False, highlight=False)
    if summary["sources"]:
        table = Table("source", "rows", "kept", "keep rate")
        for name, found in summary["sources"].items():
            table.add_row(escape(name), str(found["rows"]), str(found["kept"]), f"{found['keep_rate']:.1%}")
        console.print(table)


if __name__ == "__main__":
    from ..cli import exit_code

    sys.exit(exit_code(lambda: main(sys.argv[1:])))
