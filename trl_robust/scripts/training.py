"""What every training verb does: a recipe is read, the model is trained as it says, and everything is written.

`trl-robust lat-sft --config RECIPE.yaml [--key value ...]`, and the same for the other verbs. Also under a launcher,
with the same recipe: `accelerate launch -m trl_robust.scripts.lat_sft --config RECIPE.yaml`, `torchrun -m ...`.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import AutoPeftModelForCausalLM, PeftConfig
from transformers import AutoTokenizer, PrinterCallback, ProgressCallback
from trl import get_peft_config, get_quantization_config

from ..cli import fault_of, shows_help
from ..data import content_hash, prompt_inside, take_prompt_out
from ..recipes import Recipe, load_recipe, recipe_text, resolved_recipe
from ..recipes.checking import has_tokenizer
from ..recipes.describe import help_text
from ..recipes.launching import launch
from ..recipes.lengths import fitting_rows
from ..recipes.rows import SHARES, load_share, named
from ..recipes.shares import is_adapter
from ..trainers import LAPDPOTrainer, LAPSFTTrainer, LATDPOTrainer, LATRMUTrainer, LATSFTTrainer, SEALTrainer
from .interruption import Interrupted, StopAtSignal
from .run_folder import RECIPE, RUN, checkpoint_to_resume, hardware, versions, write_json

TRAINERS: dict[str, Any] = {
    "lat-sft": LATSFTTrainer,
    "lat-dpo": LATDPOTrainer,
    "lat-rmu": LATRMUTrainer,
    "lap-sft": LAPSFTTrainer,
    "lap-dpo": LAPDPOTrainer,
    "seal": SEALTrainer,
}
"""Training verbs, and their trainers."""


def main(verb: str, argv: list[str], *, launched: bool = False, execute: Callable[[Recipe], Any] | None = None) -> int:
    """
    Trains as a recipe says.

    Args:
        verb (`str`):
            Training verb.
        argv (`list[str]`):
            `--config RECIPE.yaml` and `--key value` overrides.
        launched (`bool`, *optional*, defaults to `False`):
            Whether a launcher has started this process; options for `accelerate launch` are then behind it.
        execute (`Callable`, *optional*):
            What is done with the recipe; [`run`] if not given.

    Returns:
        `int`: exit code.
    """
    if shows_help(argv):
        print(help_text(verb))
        return 0
    recipe = load_recipe(verb, argv)
    if recipe.launch and not launched:
        # One refusal before anything is started, not one from every process.
        checkpoint_to_resume(recipe)
        return launch(f"trl_robust.scripts.{verb.replace('-', '_')}", recipe)
    (execute or run)(recipe)
    return 0


def run(recipe: Recipe, *, quiet: bool = False, finish: Callable[[Any], dict[str, Any]] = lambda trainer: {}) -> Any:
    """
    Trains, and writes everything that `design/api.md` section 6 lists into `output_dir`.

    Args:
        recipe ([`Recipe`]):
            Settings as [`~trl_robust.recipes.load_recipe`] returns them.
        quiet (`bool`, *optional*, defaults to `False`):
            Whether to leave out the losses, and the progress bar as well where there is no terminal.
        finish (`Callable`, *optional*):
            Called with the trainer in the main process when everything but `run.json` is written; what it returns is
            written into it.

    Returns:
        The trainer of the recipe's verb, after training.

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
    dropped = _drop_long(recipe, rows) if recipe.benign.drop_long else {}
    trainer = _make_trainer(recipe, rows, quiet)
    reference = trainer.reference if isinstance(trainer, LATDPOTrainer | LAPDPOTrainer) else None
    if reference is not None and not quiet and trainer.is_world_process_zero():
        print(f"Reference: {reference}.", file=sys.stderr)
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
        **({"reference": reference} if reference is not None else {}),
        "seed": args.seed,
        "data_seed": args.data_seed if args.data_seed is not None else args.seed,
        "datasets": {share: _describe(recipe, share) for share in SHARES if rows[share] is not None},
        **({"dropped_rows": dropped} if dropped else {}),
        "hardware": hardware(args.world_size),
        "phases": {
            "train": {
                "seconds": round(seconds, 2),
                "updates": trainer.state.global_step,
                "forward_passes": trainer.forward_passes,
            }
        },
        "losses": _last_values(trainer.state.log_history),
        **trainer.run_summary,
        "resumed_from": checkpoint,
        "output_dir": args.output_dir,
    }
    if trainer.is_world_process_zero():
        write_json(folder / RUN, record | finish(trainer))
        if not quiet:
            print(f"Trained in {seconds:.0f} s, up to update {trainer.state.global_step}. Written to {folder}.")
    trainer.end()
    return trainer


def _drop_long(recipe: Recipe, rows: dict[str, Any]) -> dict[str, int]:
    """Leaves out rows whose prompt fills the length; how many, by share."""
    args = recipe.training
    if args.max_length is None:
        return {}
    path = Path(os.path.expanduser(str(recipe.model.model_name_or_path)))
    name = str(path)
    if is_adapter(path) and not has_tokenizer(path):
        name = str(PeftConfig.from_pretrained(str(path)).base_model_name_or_path)
    revision = None if is_adapter(path) else recipe.model.model_revision
    tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=args.trust_remote_code)
    if (template := getattr(args, "chat_template_path", None)) is not None:
        as_text = str(template).endswith((".jinja", ".j2"))
        tokenizer.chat_template = (
            Path(template).read_text(encoding="utf-8")
            if as_text
            else AutoTokenizer.from_pretrained(template).chat_template
        )
    dropped = {}
    for share, given in rows.items():
        if given is not None and prompt_inside(given):
            given = take_prompt_out(given, share)
        if given is None or "prompt" not in given.column_names:
            continue
        kept = fitting_rows(given, tokenizer, args.max_length)
        dropped[share] = len(given) - len(kept)
        rows[share] = recipe.loaded[share] = given.select(kept)
        if dropped[share] and args.process_index == 0:
            what = f"{dropped[share]} of {len(given)} {share} rows are left out (`drop_long`)"
            print(f"{what}: their prompts fill `max_length` {args.max_length}.", file=sys.stderr)
    return dropped


def _make_trainer(recipe: Recipe, rows: dict[str, Any], quiet: bool) -> Any:
    """The trainer, with what its construction refuses put to the user."""
    args, model = recipe.training, recipe.model
    loading: dict[str, Any] = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        "trust_remote_code": args.trust_remote_code,
    }
    loading |= dict(args.model_init_kwargs or {})  # type: ignore[arg-type]
    path = os.path.expanduser(str(model.model_name_or_path))
    settings: dict[str, Any] = {"args": args, "train_dataset": rows["train"], "eval_dataset": rows["evaluation"]}
    for share in ("benign", "safe"):
        if rows[share] is not None:
            settings[f"{share}_dataset"] = rows[share]
    try:
        if is_adapter(Path(path)):
            settings |= _adapter(path, {**loading, "quantization_config": get_quantization_config(model)})
        else:
            args.model_init_kwargs = loading
            settings |= {
                "model": path,
                "quantization_config": get_quantization_config(model),
                "peft_config": get_peft_config(model),
            }
        trainer = TRAINERS[recipe.verb](**settings)
    except (ValueError, OSError, ImportError) as error:
        raise fault_of(error, recipe.source) from error
    if quiet:
        for callback in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(callback)
        if sys.stderr.isatty():
            trainer.add_callback(BarOnly())
    return trainer


def _adapter(path: str, loading: dict[str, Any]) -> dict[str, Any]:
    """An adapter that is to be trained further, with its base model, and the tokenizer beside it if there is one."""
    loading = {name: value for name, value in loading.items() if value is not None}
    if isinstance(name := loading.get("dtype", "float32"), str) and name != "auto":
        loading["dtype"] = getattr(torch, name)
    device = PartialState().device
    if device.type != "cpu":
        loading.setdefault("device_map", {"": device})
    loading.pop("revision", None)  # of the adapter, not of its base
    found: dict[str, Any] = {"model": AutoPeftModelForCausalLM.from_pretrained(path, is_trainable=True, **loading)}
    if has_tokenizer(Path(path)):
        found["processing_class"] = AutoTokenizer.from_pretrained(path)
    return found


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
