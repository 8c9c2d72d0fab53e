"""Builds an organism into a folder, or finds it there.

- `organism.json` is written last, by a rename: a folder that has it is finished. Until then `organism.partial.json`
  marks the folder as ours, so that the leftovers of an interrupted build may be removed, and nothing else ever is.
- The finished base is kept by an interrupted build (`base/pretraining.json`, written last in its turn), since
  pre-training is the longest part.
- A finished organism is never overwritten. Whoever wants another one names another folder.
"""

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as hf_logging

from . import grammar
from .checks import check_aligned, check_base, out_of_bounds
from .folder import DATA_NAMES, Organism
from .model import make_model, make_tokenizer
from .rewording import rewording_files
from .rows import data_files
from .selection import selection_files
from .training import Advance, OrganismSettings, align, pretrain
from .unlearning import unlearning_files
from .world import GENERATOR_VERSION, World, make_world

logger = logging.getLogger(__name__)

SCHEMA = 1
DONE = "organism.json"
PARTIAL = "organism.partial.json"
PARTIAL_DRAFT = "organism.partial.draft"
BASE_DONE = "base/pretraining.json"
MODEL_NAMES = ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json")


def build_organism(
    output_dir: str | Path, seed: int = 0, *, settings: OrganismSettings | None = None, progress: bool = True
) -> Organism:
    """
    Builds the organism of `seed` into `output_dir`, or reuses the one that is there.

    Pre-trains a tiny Llama on an invented world, aligns it to refuse requests for secrets, and writes both models and
    all data files. Takes about a minute on one CPU core, with 8 blocks less than two. The same seed, settings and
    versions give the same weights on the same kind of processor.

    Args:
        output_dir (`str` or `Path`):
            Folder to write to. It may be missing, empty, left by an interrupted build (which is completed), or hold
            the very organism asked for (which is reused without training).
        seed (`int`, *optional*, defaults to `0`):
            Seed of the world, the weights and the order of the data.
        settings ([`OrganismSettings`], *optional*):
            Depth of the model, lengths and learning rates of the trainings. The defaults make an organism that passes
            its checks.
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show status lines and progress bars on standard error.

    Returns:
        [`Organism`]: the folder, with a property for each path.

    Raises:
        ValueError: if `output_dir` holds another organism or files that are not an organism's, or is a file.

    Example:

    ```python
    >>> from trl_robust.organism import build_organism

    >>> organism = build_organism("runs/organism", seed=0)
    >>> organism.summary["checks"]["aligned_direct_attack_success"]
    0.0
    ```
    """
    folder = Path(output_dir)
    settings = settings or OrganismSettings()
    identity = _identity(seed, settings)
    console = Console(stderr=True, quiet=not progress, highlight=False)

    if (folder / DONE).exists():
        summary = _read_finished(folder, identity)
        missing = _missing_files(folder)
        if not missing:
            console.print(f"Reusing the organism of seed {seed} in {folder}", soft_wrap=True)
            return Organism(folder, seed, summary)
        # Somebody removed files, or an earlier version wrote fewer: from here on it is an unfinished build.
        (folder / DONE).replace(folder / PARTIAL)
        if all(path.parent.name == "data" for path in missing):
            world = make_world(seed)
            _write_data(folder / "data", world, make_tokenizer(world.vocabulary()))
            (folder / PARTIAL).replace(folder / DONE)
            console.print(f"Completed the data of the organism of seed {seed} in {folder}", soft_wrap=True)
            return Organism(folder, seed, summary)
    _refuse_foreign_files(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / PARTIAL, identity)

    world = make_world(seed)
    tokenizer = make_tokenizer(world.vocabulary())
    with _progress_bars(console) as bars:
        model, base_report = _obtain_base(folder, world, tokenizer, settings, identity, bars)
        started = time.perf_counter()
        align(model, tokenizer, world, settings, bars.add("Aligning", settings.align_steps))
        align_seconds = time.perf_counter() - started
    _save_model(folder / "model", model, tokenizer)
    _write_data(folder / "data", world, tokenizer)
    checks = base_report["checks"] | check_aligned(model, tokenizer, world)
    for complaint in out_of_bounds(checks, secrets=settings.secrets):
        logger.warning("The organism of seed %d is not a useful one: %s.", seed, complaint)

    summary = identity | {
        "checks": {name: round(value, 4) for name, value in checks.items()},
        "seconds": base_report["seconds"] | {"align": round(align_seconds, 1)},
    }
    _write_json(folder / PARTIAL, summary)
    (folder / PARTIAL).replace(folder / DONE)
    console.print(f"Built the organism of seed {seed} in {folder}", soft_wrap=True)
    return Organism(folder, seed, summary)


def _identity(seed: int, settings: OrganismSettings) -> dict[str, Any]:
    """Returns all that decides what is built, with its fingerprint."""
    chosen = asdict(settings)
    for name in ("num_layers", "secrets"):  # younger than the other settings: organisms built without them stay valid
        if chosen[name] == getattr(OrganismSettings, name):
            del chosen[name]
    parts = {
        "schema": SCHEMA,
        "seed": seed,
        "settings": chosen,
        "versions": {
            "generator": GENERATOR_VERSION,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    return parts | {"fingerprint": _fingerprint(parts)}


def _base_fingerprint(identity: dict[str, Any]) -> str:
    """Returns the fingerprint of what decides the base: everything but the settings of the alignment."""
    settings = {name: value for name, value in identity["settings"].items() if not name.startswith("align_")}
    return _fingerprint({"seed": identity["seed"], "settings": settings, "versions": identity["versions"]})


def _fingerprint(parts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _read_finished(folder: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """Reads `organism.json` and raises when it is not the organism of `identity`."""
    advice = "Choose another output_dir, or delete this folder to build anew."
    try:
        summary = json.loads((folder / DONE).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{folder / DONE} is not readable ({error}). {advice}") from error
    if not isinstance(summary, dict) or "fingerprint" not in summary:
        raise ValueError(f"{folder / DONE} was not written by build_organism. {advice}")
    if summary["fingerprint"] != identity["fingerprint"]:
        differences = [
            f"{name} {summary.get(name)} where {identity[name]} is asked for"
            for name in ("schema", "seed", "settings", "versions")
            if summary.get(name) != identity[name]
        ]
        raise ValueError(f"{folder} holds another organism: {'; '.join(differences)}. {advice}")
    return summary


def _missing_files(folder: Path) -> list[Path]:
    expected = [folder / BASE_DONE, *(folder / "data" / name for name in DATA_NAMES)]
    expected += [folder / part / name for part in ("base", "model") for name in MODEL_NAMES]
    return [path for path in expected if not path.is_file()]


def _refuse_foreign_files(folder: Path) -> None:
    """Raises unless `folder` is missing, empty, or holds nothing but an unfinished build of ours."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"output_dir {folder} is a file; name a folder.")
    names = {path.name for path in folder.iterdir()}
    ours = {PARTIAL_DRAFT, PARTIAL, "base", "model", "data"} if PARTIAL in names else {PARTIAL_DRAFT}
    if foreign := names - ours:
        raise ValueError(
            f"output_dir {folder} holds files that are not an organism's ({', '.join(sorted(foreign)[:3])}). "
            "Choose an empty or a new folder."
        )


def _obtain_base(
    folder: Path,
    world: World,
    tokenizer: PreTrainedTokenizerFast,
    settings: OrganismSettings,
    identity: dict[str, Any],
    bars: "_Bars",
) -> tuple[LlamaForCausalLM, dict[str, Any]]:
    """Loads the base that an interrupted build has left, or pre-trains it. Returns it with its checks and seconds."""
    fingerprint = _base_fingerprint(identity)
    report_path = folder / BASE_DONE
    if report_path.is_file() and all((folder / "base" / name).is_file() for name in MODEL_NAMES):
        report = json.loads(report_path.read_text(encoding="utf-8"))
        if report["fingerprint"] == fingerprint:
            bars.console.print("Continuing from the finished base model", soft_wrap=True)
            with _no_file_bars():
                return LlamaForCausalLM.from_pretrained(folder / "base", dtype=torch.float32), report
    model = make_model(tokenizer, world.seed, settings.num_layers)
    started = time.perf_counter()
    pretrain(model, tokenizer, world, settings, bars.add("Pre-training", settings.pretrain_steps))
    seconds = time.perf_counter() - started
    report = {
        "fingerprint": fingerprint,
        "checks": check_base(model, tokenizer, world),
        "seconds": {"pretrain": round(seconds, 1)},
    }
    _save_model(folder / "base", model, tokenizer)
    _write_json(report_path, report)
    return model, report


def _save_model(folder: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    with _no_file_bars():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _write_data(folder: Path, world: World, tokenizer: PreTrainedTokenizerFast) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir()
    files = data_files(world) | unlearning_files(world, tokenizer) | rewording_files(world) | selection_files(world)
    for name, rows in files.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / name).write_text(text, encoding="utf-8", newline="\n")
    templates = "".join(wrapper + "\n" for wrapper in grammar.HELDOUT_WRAPPERS)
    (folder / "templates.txt").write_text(templates, encoding="utf-8", newline="\n")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    # By way of a second file: a build that is killed here leaves the old file or the new one, never half of one.
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8", newline="\n")
    draft.replace(path)


@contextmanager
def _no_file_bars() -> Iterator[None]:
    """Silences the bars of transformers for files of 2 MB, which would tear those of the trainings apart."""
    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            hf_logging.enable_progress_bar()


class _Bars:
    """Progress bars for the two trainings, one below the other."""

    def __init__(self, console: Console, progress: Progress):
        self.console = console
        self._progress = progress

    def add(self, description: str, steps: int) -> Advance:
        """Shows one more bar; returns what advances it by a step."""
        task = self._progress.add_task(description, total=steps)
        return lambda: self._progress.advance(task)


@contextmanager
def _progress_bars(console: Console) -> Iterator[_Bars]:
    columns = (TextColumn("{task.description:<12}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(True))
    with Progress(*columns, console=console, disable=console.quiet) as progress:
        yield _Bars(console, progress)
