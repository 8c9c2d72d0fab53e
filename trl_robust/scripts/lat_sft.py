"""Latent adversarial training on SFT: `trl-robust lat-sft --config RECIPE.yaml [--key value ...]`.

Also under a launcher, with the same recipe:
`accelerate launch -m trl_robust.scripts.lat_sft --config RECIPE.yaml`, `torchrun -m trl_robust.scripts.lat_sft ...`
"""

from __future__ import annotations

import math
import os
import sys
import time
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, ProgressCallback
from trl import get_peft_config, get_quantization_config

from ..cli import exit_code, fault_of, shows_help
from ..data import content_hash
from ..recipes import Recipe, load_recipe, recipe_text, resolved_recipe
from ..recipes.describe import help_text
from ..recipes.launching import launch
from ..recipes.rows import SHARES, load_share, named
from ..trainers import LATSFTTrainer
from .interruption import Interrupted, StopAtSignal
from .run_folder import RECIPE, RUN, checkpoint_to_resume, hardware, versions, write_json

VERB = "lat-sft"


def main(argv: list[str], *, launched: bool = False) -> int:
    """
    Trains as a recipe says.

    Args:
        argv (`list[str]`):
            `--config RECIPE.yaml` and `--key value` overrides.
        launched (`bool`, *optional*, defaults to `False`):
            Whether a launcher has started this process; options for `accelerate launch` are then behind it.

    Returns:
        `int`: exit code.
    """
    if shows_help(argv):
        print(help_text(VERB))
        return 0
    recipe = load_recipe(VERB, argv)
    if recipe.launch and not launched:
        # One refusal before anything is started, not one from every process.
        checkpoint_to_resume(recipe)
        return launch(__name__, recipe)
    run(recipe)
    return 0


def run(recipe: Recipe, *, quiet: bool = False) -> LATSFTTrainer:
    """
    Trains, and writes everything that `design/api.md` section 6 lists into `output_dir`.

    Args:
        recipe ([`Recipe`]):
            Settings as [`~trl_robust.recipes.load_recipe`] returns them.
        quiet (`bool`, *optional*, defaults to `False`):
            Whether to leave out the losses, and the progress bar as well where there is no terminal.

    Returns:
        [`LATSFTTrainer`]: after training.

    Raises:
        [`RecipeError`]: the folder holds an earlier run, or the settings and the model do not go together.
        [`~trl_robust.data.DataError`]: data that cannot be used.
        [`Interrupted`]: SIGINT or SIGTERM; a checkpoint is left.
    """
    args = recipe.training
    folder = Path(str(args.output_dir))
    checkpoint = checkpoint_to_resume(recipe)
    os.environ.update(recipe.environment)
    resolved = recipe_text(resolved_recipe(recipe))  # before the trainer changes anything
    for note in recipe.notes if not quiet and args.process_index == 0 else []:
        print(note, file=sys.stderr)

    rows = {share: load_share(recipe, share) for share in SHARES}
    trainer = _make_trainer(recipe, rows, quiet)
    if trainer.is_world_process_zero():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RUN).unlink(missing_ok=True)  # of the run that is gone on with: it is not finished any more
        (folder / RECIPE).write_text(resolved, encoding="utf-8")

    started = time.perf_counter()
    with StopAtSignal() as stop:
        trainer.add_callback(stop)
        trainer.train(resume_from_checkpoint=checkpoint)
    seconds = time.perf_counter() - started
    if stop.stopped and trainer.state.global_step < trainer.state.max_steps:
        trainer.end()
        raise Interrupted(
            f"Stopped after update {trainer.state.global_step}; its checkpoint is in {folder}. To go on: the same "
            "command with `--resume_from_checkpoint true`."
        )

    trainer.save_model(args.output_dir)
    trainer.save_state()
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=recipe.script.dataset_name)
    trainer.create_model_card(dataset_name=recipe.script.dataset_name)  # last: saving writes PEFT's over it
    record = {
        "schema": 1,
        "verb": recipe.verb,
        "finished": True,
        "versions": versions(),
        "model": recipe.model.model_name_or_path,
        "seed": args.seed,
        "data_seed": args.data_seed if args.data_seed is not None else args.seed,
        "datasets": {share: _describe(recipe, share) for share in SHARES if rows[share] is not None},
        "hardware": hardware(args.world_size),
        "phases": {
            "train": {
                "seconds": round(seconds, 2),
                "updates": trainer.state.global_step,
                "forward_passes": trainer.forward_passes,
            }
        },
        "losses": _last_values(trainer.state.log_history),
        "resumed_from": checkpoint,
        "output_dir": args.output_dir,
    }
    if trainer.is_world_process_zero():
        write_json(folder / RUN, record)
        if not quiet:
            print(f"Trained in {seconds:.0f} s, up to update {trainer.state.global_step}. Written to {folder}.")
    trainer.end()
    return trainer


def _make_trainer(recipe: Recipe, rows: dict[str, Any], quiet: bool) -> LATSFTTrainer:
    """The trainer, with what its construction refuses put to the user."""
    args, model = recipe.training, recipe.model
    loading: dict[str, Any] = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        "trust_remote_code": args.trust_remote_code,
    }
    args.model_init_kwargs = loading | dict(args.model_init_kwargs or {})  # type: ignore[arg-type]
    try:
        trainer = LATSFTTrainer(
            model=os.path.expanduser(str(model.model_name_or_path)),
            args=args,
            train_dataset=rows["train"],
            eval_dataset=rows["evaluation"],
            benign_dataset=rows["benign"],
            quantization_config=get_quantization_config(model),
            peft_config=get_peft_config(model),
        )
    except (ValueError, OSError, ImportError) as error:
        raise fault_of(error, recipe.source) from error
    if quiet:
        for callback in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(callback)
        if sys.stderr.isatty():
            trainer.add_callback(BarOnly())
    return trainer


class BarOnly(ProgressCallback):
    """The progress bar without the lines of losses."""

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        """Prints nothing."""


def _describe(recipe: Recipe, share: str) -> dict[str, Any]:
    """Where a share of the data came from, and a hash of its rows."""
    rows = load_share(recipe, share)
    sources = named(recipe, share) or named(recipe, "train")
    names = [f"{source.path}:{source.split}" for _, source in sources]
    return {"name": ", ".join(names), "rows": len(rows) if rows is not None else 0, "sha256": content_hash(rows)}


def _last_values(history: list[dict[str, float]]) -> dict[str, float | None]:
    """The last value of every loss that was logged, by name; JSON has no word for those that are not finite."""
    last: dict[str, float | None] = {}
    for entry in history:
        for name, value in entry.items():
            if "loss" in name or name == "boundary_fraction":
                last[name] = value if math.isfinite(value) else None
    return last


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(sys.argv[1:], launched=True)))
