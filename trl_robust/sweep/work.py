"""What a worker does: build an organism, or train a model, measure it and keep what came out."""

from __future__ import annotations

import gc
import json
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers.trainer import TRAINER_STATE_NAME

from ..attacks import Subject
from ..evaluation import write_results
from ..organism import OrganismSettings, build_organism
from ..recipes import recipe_text, resolved_recipe
from ..scripts.quiet import quiet
from ..scripts.run_folder import RECIPE, RUN, write_json
from ..scripts.seal import run as select
from ..scripts.training import run as train
from .evaluate_keys import Evaluation
from .measures import measure, suite_of
from .serving import ERROR, TRAINING, Say
from .stages import SELECTS, Stage

STARTED, DONE = "settings.json", "cell.json"
"""Written first and last into the folder of a cell's run. Without the last it is not finished."""
EARLIER = "first"
"""The first of two stages: its folder in that of the run, and its settings in the run's identity, which has those of
the last stage as `training`."""
MODEL, HARMLESS, WORDINGS, LOG = "model", "harmless.jsonl", "wordings.jsonl", "log.txt"
WEIGHTS, SELECTOR = (".safetensors", ".bin"), "selector.safetensors"
"""Files of weights; what a selection is made of is none and stays."""
CURVES = "lap_curves.jsonl"
"""What a search for paraphrases writes on request, beside the weights."""
BUILDING, MEASURING = "building the organism", "measuring"
"""Stages of a piece of work beside training, as a progress bar shows them."""


@dataclass(frozen=True)
class OrganismWork:
    """
    Builds the organism of a seed, unless it is there.

    Args:
        folder (`Path`):
            Where.
        seed (`int`):
            Its seed.
        settings ([`~trl_robust.organism.OrganismSettings`]):
            Its settings.
    """

    folder: Path
    seed: int
    settings: OrganismSettings

    @property
    def title(self) -> str:
        return f"organism, seed {self.seed}"

    @property
    def log(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.log")

    def run(self, say: Say) -> None:
        """Builds it; `say` is told the stage."""
        say(BUILDING)
        build_organism(self.folder, self.seed, settings=self.settings, progress=False)


@dataclass(frozen=True)
class CellWork:
    """
    Trains a cell with a seed and measures the model.

    Args:
        name (`str`):
            The cell.
        seed (`int`):
            Seed.
        folder (`Path`):
            Where everything of it goes.
        stages (`tuple` of [`~trl_robust.sweep.stages.Stage`]):
            One training, or two of which the second takes what the first leaves.
        trains (`bool`):
            Whether there is something to train, or only the model to measure that the stage names.
        identity (`dict`):
            All that decides what comes out, for [`fingerprint`].
        fingerprint (`str`):
            Its fingerprint.
        evaluation ([`Evaluation`]):
            How the model is measured.
        organism (`Path`, *optional*):
            The seed's organism.
        keep_model (`bool`):
            Whether the weights stay.
    """

    name: str
    seed: int
    folder: Path
    stages: tuple[Stage, ...]
    trains: bool
    identity: dict[str, Any] = field(repr=False)
    fingerprint: str
    evaluation: Evaluation = field(repr=False)
    organism: Path | None
    keep_model: bool

    @property
    def title(self) -> str:
        return f"{self.name}, seed {self.seed}"

    @property
    def log(self) -> Path:
        return self.folder / LOG

    def run(self, say: Say) -> None:
        """Trains and measures; `say` is told the stage. What an earlier attempt has trained is used."""
        started = time.perf_counter()
        earlier = self._claim()
        recipe = self.stages[-1].recipe(this_machine=True)
        model: str | Path = str(recipe.model.model_name_or_path)
        with quiet():
            if self.trains:
                say(TRAINING)
                model = self._train(earlier)
                _release_memory()
            trained = time.perf_counter()
            say(MEASURING)
            subject = Subject.load(
                model,
                dtype=self.evaluation.dtype,
                trust_remote_code=recipe.training.trust_remote_code,
                max_new_tokens=self.evaluation.max_new_tokens,
                batch_size=self.evaluation.batch_size,
                max_prompt_tokens=self.evaluation.max_prompt_tokens,
                progress=False,
            )
            suite = suite_of(self.evaluation, self.organism, recipe.benign.system_prompt)
            found = measure(subject, suite, self.evaluation)
            del subject
            _release_memory()
        for name, rows in ((HARMLESS, found.harmless), (WORDINGS, found.wordings)):
            if rows or name == HARMLESS:
                lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
                (self.folder / name).write_text(lines, encoding="utf-8")
        generations = [{"model": self.name, **row} for row in found.generations]
        write_results(self.folder, [{"name": self.name, **found.entry}], generations, seed=self.seed)
        if self.trains:
            for name in (RECIPE, RUN, TRAINER_STATE_NAME, CURVES):
                if (self.folder / MODEL / name).is_file():
                    shutil.copyfile(self.folder / MODEL / name, self.folder / name)
        record = {
            "schema": 1,
            "cell": self.name,
            "seed": self.seed,
            "fingerprint": self.fingerprint,
            "settings": self.identity,
            "seconds": {
                TRAINING: round(trained - started, 1),
                MEASURING: round(time.perf_counter() - trained, 1),
            },
        }
        write_json(self.folder / DONE, record)
        clean(self.folder, self.keep_model)

    def _claim(self) -> dict[str, Any]:
        """Marks the folder as this run's; returns the settings of an earlier attempt, empty if there was none."""
        started = self.folder / STARTED
        earlier = json.loads(started.read_text(encoding="utf-8")) if started.is_file() else {"settings": {}}
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / ERROR).unlink(missing_ok=True)
        write_json(started, {"cell": self.name, "seed": self.seed, "settings": self.identity})
        return earlier["settings"]

    def _train(self, earlier: dict[str, Any]) -> Path:
        """Goes through the stages; what an earlier attempt has finished, or begun with the same settings, is used."""
        first, model = self.folder / EARLIER, self.folder / MODEL
        if len(self.stages) > 1:
            same = _but(earlier, "training", "evaluation") == _but(self.identity, "training", "evaluation")
            if not _run_stage(self.stages[0], first, same):
                shutil.rmtree(model, ignore_errors=True)  # it took what is there no more
            _release_memory()
        same = _but(earlier, "evaluation") == _but(self.identity, "evaluation")
        _run_stage(self.stages[-1].after(first), model, same)
        return model


def _run_stage(stage: Stage, folder: Path, same: bool) -> bool:
    """Trains, goes on at a checkpoint, or finds the stage finished, which is what is returned."""
    recipe = stage.recipe(check=True, this_machine=True, output_dir=str(folder))
    written = folder / RECIPE
    same = same and written.is_file()
    same = same and written.read_text(encoding="utf-8") == recipe_text(resolved_recipe(recipe))
    if same and (folder / RUN).is_file():
        return True
    if same and any(folder.glob("checkpoint-*/trainer_state.json")):
        recipe = stage.recipe(check=True, this_machine=True, output_dir=str(folder), resume_from_checkpoint="true")
    elif folder.exists():
        shutil.rmtree(folder)  # inside a folder that is marked as ours
    (select if stage.verb == SELECTS else train)(recipe, quiet=True)
    return False


def _release_memory() -> None:
    """Gives back what the trainer held on a GPU: its reference cycles keep the model until they are collected."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _but(identity: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: part for name, part in identity.items() if name not in names}


def clean(folder: Path, keep_model: bool) -> None:
    """
    Removes what a finished run does not keep.

    Args:
        folder (`Path`):
            Folder of the run.
        keep_model (`bool`):
            Whether the weights stay.
    """
    if keep_model or not (folder / DONE).is_file():
        return
    if (folder / MODEL).is_dir():
        shutil.rmtree(folder / MODEL)
    for path in (folder / EARLIER).glob("checkpoint-*"):
        shutil.rmtree(path)
    for path in (folder / EARLIER).glob("*"):
        if path.suffix in WEIGHTS and path.name != SELECTOR:
            path.unlink()
