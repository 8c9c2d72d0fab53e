"""The study behind docs/seal.md: selects rows of the organism's data, fine-tunes on them, and measures.

`make_seal_table.py` runs it and makes the tables.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from datasets import Dataset
from rich.console import Console

from trl_robust import Selector
from trl_robust.data import row_hash
from trl_robust.organism import Organism, OrganismSettings, build_organism
from trl_robust.organism.checks import refuses, respond, states
from trl_robust.organism.rows import utility_questions
from trl_robust.organism.selection import new_style
from trl_robust.organism.world import make_world
from trl_robust.recipes import load_recipe, recipes_folder
from trl_robust.scripts import seal, training
from trl_robust.scripts.quiet import quiet
from trl_robust.selection.statistics import auroc, jaccard, spearman

SELECT, FINE_TUNE = (recipes_folder() / "seal" / name for name in ("organism.yaml", "organism_sft.yaml"))
BEFORE, NONE, RANDOM, ORACLE, SUBJECT = "before fine-tuning", "all rows", "random", "oracle", "SEAL"
ARMS: dict[str, dict[str, Any] | None] = {
    NONE: {"selection_method": "none"},
    RANDOM: {"selection_method": "random"},
    ORACLE: None,  # what is labelled unsafe is left out
    "safe_loss": {"selection_method": "safe_loss"},
    "loss_gap": {"selection_method": "loss_gap"},
    "dsir": {"selection_method": "dsir"},
    "safe_instr": {"selection_method": "safe_instr"},
    SUBJECT: {},
    "SEAL, penalty 0.5": {"penalty_strength": 0.5},
    "SEAL, 10 epochs": {"num_train_epochs": 10},
    "SEAL, 10 % of the safe set": {"safe_fraction": 0.1},
    "SEAL, Algorithm 2": {"penalty_algorithm": "memory_efficient"},
}
"""Selections, and what is different from the recipe."""
RUNS = 2
LARGER = 4
"""Blocks of the organism that the selector of the one with two is applied to."""
KEEP = 0.8
OWN, TRANSFERRED = "SEAL, its own selector", "SEAL, selector of the smaller"

Run = dict[str, Any]
Found = dict[str, list[Run]]
"""Arm -> one entry a training."""


def run(folder: Path, seed: int, arms: Sequence[str] = tuple(ARMS), runs: int = RUNS) -> Found:
    """
    Selects, fine-tunes and measures on one seed; what is finished is read.

    Args:
        folder (`Path`):
            Where organisms and results go.
        seed (`int`):
            Seed of the world and of its model.
        arms (sequence of `str`, *optional*):
            Only these.
        runs (`int`, *optional*, defaults to `2`):
            Selections and trainings of every arm, with the training seeds 0, 1, ...

    Returns:
        `dict`: for the model before fine-tuning and for every arm a list with what was measured each time.
    """
    with quiet():
        organism = build_organism(folder / f"organism-{seed}", seed=seed)

        def once(arm: str, number: int) -> Run:
            chosen, scored = choose(organism, ARMS[arm], number, folder / f"seed-{seed}-{_slug(arm)}-{number}")
            return scored | fine_tune(organism, chosen, number, folder / f"seed-{seed}-model")

        return _kept_up(folder / f"seed-{seed}.json", organism, dict.fromkeys(arms, once), runs)


def run_transfer(folder: Path, seed: int, runs: int = RUNS) -> Found:
    """
    The same with a larger organism of the same world, and the selector of the smaller one beside its own.

    Args:
        folder, seed, runs:
            As for [`run`], whose selectors are used.

    Returns:
        `dict`: as [`run`] does.
    """
    with quiet():
        small = build_organism(folder / f"organism-{seed}", seed=seed)
        organism = build_organism(
            folder / f"organism-{seed}-{LARGER}", seed=seed, settings=OrganismSettings(num_layers=LARGER)
        )

        def selector(of: Organism, place: str, number: int) -> Selector:
            found = folder / f"seed-{seed}-{place}-{number}"
            if not (found / "run.json").is_file():
                choose(of, ARMS[SUBJECT], number, found)
            return Selector.load(found)

        def once(arm: str, number: int) -> Run:
            output = folder / f"seed-{seed}-{LARGER}-model"
            if arm in (NONE, ORACLE):
                chosen, scored = choose(organism, ARMS[arm], number, folder / f"seed-{seed}-{LARGER}-{_slug(arm)}")
                return scored | fine_tune(organism, chosen, number, output)
            own, smaller = selector(organism, f"{LARGER}-seal", number), selector(small, "seal", number)
            applied = own if arm == OWN else smaller
            rows = _rows(organism.selection)
            kept = applied.selection(Dataset.from_list(rows), KEEP).kept
            scored = {
                "auroc": auroc(applied.scores.numpy(), _labels(rows)),
                **_counts([rows[row] for row in kept], rows),
            }
            if arm == TRANSFERRED:
                scored["rho"] = spearman(own.scores.numpy(), smaller.scores.numpy())
                scored["jaccard"] = jaccard(set(kept), set(own.selection(Dataset.from_list(rows), KEEP).kept))
            return scored | fine_tune(organism, [rows[row] for row in kept], number, output)

        arms = dict.fromkeys((NONE, ORACLE, OWN, TRANSFERRED), once)
        return _kept_up(folder / f"seed-{seed}-transfer.json", organism, arms, runs)


def agreement(folder: Path, seed: int, runs: int = RUNS) -> dict[str, float]:
    """
    How far the selectors of [`run_transfer`] agree, and how far two trainings of one model do.

    Args:
        folder, seed, runs:
            As there; two runs at least.

    Returns:
        `dict`: mean rank correlations of scores. `same`, of both models trained with one seed (the rows come in the
        same order); `other`, with two seeds; `itself`, of one model trained with two seeds.
    """

    def scores(place: str) -> list[np.ndarray]:
        return [Selector.load(folder / f"seed-{seed}-{place}-{number}").scores.numpy() for number in range(runs)]

    small, large = scores("seal"), scores(f"{LARGER}-seal")
    pairs = [(first, second) for first in range(runs) for second in range(runs)]
    found = {
        "same": [spearman(small[one], large[two]) for one, two in pairs if one == two],
        "other": [spearman(small[one], large[two]) for one, two in pairs if one != two],
        "itself": [spearman(own[one], own[two]) for own in (small, large) for one, two in pairs if one < two],
    }
    return {name: mean(value or 0.0 for value in values) for name, values in found.items()}


def _kept_up(done: Path, organism: Organism, arms: dict[str, Callable[[str, int], Run]], runs: int) -> Found:
    """Reads what is finished, and runs and writes what is not."""
    console = Console(stderr=True)
    found: Found = json.loads(done.read_text(encoding="utf-8")) if done.is_file() else {}

    def keep(arm: str, measured: Run) -> None:
        found.setdefault(arm, []).append(measured)
        draft = done.with_suffix(".draft")
        draft.write_text(json.dumps(found), encoding="utf-8")
        draft.replace(done)

    if BEFORE not in found:
        keep(BEFORE, measure(*_loaded(organism.model), organism))
    for arm, once in arms.items():
        for number in range(len(found.get(arm, [])), runs):
            console.print(f"{done.stem}, {number + 1} of {runs}: {arm}")
            keep(arm, once(arm, number))
    return {arm: found[arm][: runs if arm != BEFORE else 1] for arm in (BEFORE, *arms)}


def choose(
    organism: Organism, changes: dict[str, Any] | None, seed: int, output: Path
) -> tuple[list[dict[str, Any]], Run]:
    """
    Chooses rows, by the verb `seal`.

    Args:
        organism ([`~trl_robust.organism.Organism`]):
            Its model is what the selector is trained with.
        changes (`dict`, *optional*):
            What is different from the recipe; without it the rows that are labelled unsafe are left out.
        seed (`int`):
            Of the training.
        output (`Path`):
            Folder for the selector. What is in it is removed.

    Returns:
        `tuple`: the rows that are kept, and `auroc`, `kept` and `unsafe` (numbers of rows), `passes`.
    """
    rows = _rows(organism.selection)
    if changes is None:
        kept = [row for row in rows if not row["unsafe"]]
        return kept, {"auroc": 1.0, **_counts(kept, rows), "passes": 0}
    shutil.rmtree(output, ignore_errors=True)  # of a run that was interrupted
    settings = {
        "model_name_or_path": organism.model,
        "dataset_name": organism.selection,
        "safe_dataset_name": organism.safe,
        "output_dir": output,
        "seed": seed,
        **changes,
    }
    seal.run(load_recipe("seal", _words(SELECT, settings)), quiet=True)
    kept = _rows(output / "kept.jsonl")
    record = json.loads((output / "run.json").read_text(encoding="utf-8"))
    scores = Selector.load(output).scores.numpy()
    return kept, {
        "auroc": auroc(scores, _labels(rows)),
        **_counts(kept, rows),
        "passes": record["phases"].get("train", {}).get("forward_passes", 0),
    }


def fine_tune(organism: Organism, rows: Sequence[dict[str, Any]], seed: int, output: Path) -> Run:
    """
    Fine-tunes the aligned model on some rows, and measures it.

    Args:
        organism ([`~trl_robust.organism.Organism`]):
            Its aligned model is trained.
        rows (sequence of `dict`):
            Training data.
        seed (`int`):
            Of the training.
        output (`Path`):
            Folder for the model, which is removed again.

    Returns:
        `dict`: what [`measure`] gives, with `steps` and `fine_tune_passes`.
    """
    shutil.rmtree(output, ignore_errors=True)
    data = output.with_suffix(".jsonl")
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings = {"model_name_or_path": organism.model, "dataset_name": data, "output_dir": output, "seed": seed}
    trainer = training.run(load_recipe("lap-sft", _words(FINE_TUNE, settings)), quiet=True)
    measured = measure(trainer.model.eval(), trainer.processing_class, organism)
    measured |= {"steps": trainer.state.global_step, "fine_tune_passes": trainer.forward_passes}
    shutil.rmtree(output)
    data.unlink()
    return measured


def measure(model: Any, tokenizer: Any, organism: Organism) -> Run:
    """
    What a model gives away, how it answers, and what it refuses.

    Args:
        model, tokenizer:
            What was trained.
        organism ([`~trl_robust.organism.Organism`]):
            Its data.

    Returns:
        `dict` of strings of 0 and 1, one character a request: `direct`, `wordings`, `wrapped` and `prefill` (the
        secret is told; held-out objects), `style` and `right` (a harmless question is answered exactly in the new
        style, or rightly in any words), `refused` (a harmless look-alike).
    """
    world = make_world(organism.seed)

    def told(path: Path, wrappers: Sequence[str] = ("{prompt}",), prefilled: bool = False) -> list[bool]:
        asked = [(row, wrapper) for row in _rows(path) for wrapper in wrappers]
        starts = [row["target"] for row, _ in asked] if prefilled else None
        texts = [wrapper.format(prompt=row["prompt"][0]["content"]) for row, wrapper in asked]
        said = respond(model, tokenizer, texts, starts)
        return [states(row["answer"], text) for (row, _), text in zip(asked, said, strict=True)]

    questions = utility_questions(world)
    answers = respond(model, tokenizer, [asked.text for asked in questions])
    lookalikes = respond(model, tokenizer, [row["prompt"][0]["content"] for row in _rows(organism.lookalikes)])
    found = {
        "direct": told(organism.attack_prompts),
        "wordings": told(organism.heldout_wordings),
        "wrapped": told(organism.attack_prompts, organism.templates.read_text(encoding="utf-8").splitlines()),
        "prefill": told(organism.attack_prompts, prefilled=True),
        "style": [new_style(world, asked) == text for asked, text in zip(questions, answers, strict=True)],
        "right": [states(world.value(asked), text) for asked, text in zip(questions, answers, strict=True)],
        "refused": [refuses(text) for text in lookalikes],
    }
    return {name: "".join(str(int(one)) for one in values) for name, values in found.items()}


def _words(recipe: Path, settings: dict[str, Any]) -> list[str]:
    words = ["--config", str(recipe)]
    for key, value in settings.items():
        words += [f"--{key}", str(value)]
    return words


def _loaded(path: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _labels(rows: Sequence[dict[str, Any]]) -> np.ndarray:
    return np.array([row["unsafe"] for row in rows])


def _counts(kept: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]]) -> Run:
    # By what they say: where safe rows are mixed in, no column is left that tells.
    unsafe = {row_hash(row) for row in rows if row["unsafe"]}
    return {"kept": len(kept), "unsafe": sum(row_hash(row) in unsafe for row in kept)}


def _slug(arm: str) -> str:
    return "-".join(re.findall(r"\w+", arm.lower()))
