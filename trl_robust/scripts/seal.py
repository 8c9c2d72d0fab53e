"""Learning which rows of a dataset hurt: `trl-robust seal --config RECIPE.yaml [--key value ...]`.

What is left in `output_dir`: the selector (`selector.safetensors`, `selector.json`, `rows.parquet`), the rows that it
keeps (`kept.jsonl`), and how it chose (`selection.json`, `report.html`, `report.md`, `figures/`).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from datasets import Dataset

from ..cli import exit_code
from ..data import content_hash, row_hashes
from ..recipes import Recipe, recipe_text, resolved_recipe
from ..recipes.rows import load_named, load_share
from ..report.selection import write_selection_report
from ..selection import Selector
from ..selection.baselines import dsir_selector, mix_rows, none_selector, random_selector
from ..selection.summary import summarize
from ..trainers.seal_config import TRAINED
from . import training
from .run_folder import RECIPE, RUN, checkpoint_to_resume, versions, write_json
from .select import KEPT, SUMMARY, write_rows


def main(argv: list[str], *, launched: bool = False) -> int:
    """
    Ranks rows as a recipe says; see [`training.main`].

    Args:
        argv (`list[str]`):
            `--config RECIPE.yaml` and `--key value` overrides.
        launched (`bool`, *optional*, defaults to `False`):
            Whether a launcher has started this process.

    Returns:
        `int`: exit code.
    """
    return training.main("seal", argv, launched=launched, execute=run)


def run(recipe: Recipe, *, quiet: bool = False) -> Any:
    """
    Ranks the rows that a recipe names, and writes the selector, the rows that are kept, and the report.

    Args:
        recipe ([`~trl_robust.recipes.Recipe`]):
            Settings, for the verb `seal`.
        quiet (`bool`, *optional*, defaults to `False`):
            As for [`training.run`].

    Returns:
        The trainer, where a model was trained.

    Raises:
        As [`training.run`].
    """
    args = recipe.training
    if args.selection_method in TRAINED:
        if not args.attacks:  # plain SFT with fixed weights
            return training.run(recipe, quiet=quiet)
        return training.run(recipe, quiet=quiet, finish=lambda trainer: _outcome(recipe, trainer.selector, quiet))
    checkpoint_to_resume(recipe)
    if args.process_index == 0:
        _without_model(recipe, quiet)
    return None


def _without_model(recipe: Recipe, quiet: bool) -> None:
    """The baselines that only look at the rows."""
    args, folder = recipe.training, Path(str(recipe.training.output_dir))
    resolved = recipe_text(resolved_recipe(recipe))
    rows, safe = load_share(recipe, "train"), load_share(recipe, "safe")
    assert rows is not None
    if args.selection_method == "random":
        selector = random_selector(row_hashes(rows), args.seed)
    elif args.selection_method == "dsir":
        assert safe is not None
        selector = dsir_selector(rows, safe, seed=args.seed)
    else:
        selector = none_selector(row_hashes(rows))
    selector.settings["method"] = args.selection_method
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RECIPE).write_text(resolved, encoding="utf-8")
    selector.save(folder)
    record = {
        "schema": 1,
        "verb": recipe.verb,
        "finished": True,
        "versions": versions(),
        "seed": args.seed,
        "datasets": {"train": {"rows": len(rows), "sha256": content_hash(rows)}},
        "phases": {},
        "losses": {},
        **_outcome(recipe, selector, quiet),
        "output_dir": args.output_dir,
    }
    write_json(folder / RUN, record)
    if not quiet:
        print(f"Written to {folder}.")


def _outcome(recipe: Recipe, selector: Selector, quiet: bool) -> dict[str, Any]:
    """Writes the rows that are kept and the report; what `run.json` says of them."""
    args, folder = recipe.training, Path(str(recipe.training.output_dir))
    rows = load_named(recipe, "train")
    assert rows is not None
    # Rows that training has set aside, for their length or to evaluate on, are in the file and have no score.
    aside = recipe.benign.drop_long or recipe.mixture.test_split_size is not None
    keep = 1.0 if args.selection_method in ("none", "safe_instr") else args.keep_fraction
    chosen = selector.selection(rows, keep, unscored="drop" if aside else "refuse")
    kept: Dataset = rows.select(chosen.kept)
    mixed = 0
    if args.selection_method == "safe_instr":
        safe = load_named(recipe, "safe")
        assert safe is not None
        together = mix_rows(kept, safe, seed=args.seed)
        mixed, kept = len(together) - len(kept), together
    write_rows(folder / KEPT, kept)
    summary = summarize(selector, rows, chosen.kept, label_column=args.label_column, source_column=args.source_column)
    write_json(folder / SUMMARY, summary | {"threshold": chosen.threshold, "tied": chosen.tied, "mixed_in": mixed})
    write_selection_report(folder, show_rows=args.show_rows)
    if not quiet:
        print(
            f"{len(chosen.kept)} of {len(rows)} rows are kept in {folder / KEPT}"
            + (f", {mixed} mixed in." if mixed else ".")
        )
    return {"kept": {"rows": len(chosen.kept), "of": len(rows), "threshold": chosen.threshold, "mixed_in": mixed}}


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(sys.argv[1:], launched=True)))
