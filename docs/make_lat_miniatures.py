"""Makes the tables of the miniatures in docs/lat.md: jailbreak, backdoor and unlearning, each with its controls.

    python docs/make_lat_miniatures.py --folder runs/miniatures --seeds 0 1 2

Some fifteen minutes a seed on one core. Whatever is finished is read, not run again; `--only backdoor` runs a part.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console

from trl_robust.attacks import Attack, AttackRow, Direct, Embedding, Finetune, Latent, Prefill, Subject, Template
from trl_robust.evaluation import over_refusal, run_attack, utility
from trl_robust.organism import Organism, build_organism
from trl_robust.recipes import load_recipe, recipes_folder
from trl_robust.scripts import training
from trl_robust.scripts.quiet import quiet

PAGE = Path(__file__).with_name("lat.md")
NO_ATTACK = {"attack_steps": 0}
PASSES = "forward passes"
RELEARN = {"steps": 16, "learning_rate": 5e-4}


@dataclass(frozen=True)
class Arm:
    """One training: what is different from the miniature's recipe, or from another one."""

    name: str
    changes: dict[str, Any] = field(default_factory=dict)
    recipe: str | None = None
    same_compute_as: str | None = None
    """Name of the arm whose forward passes it gets; `changes` are then run once more, for more steps."""


@dataclass(frozen=True)
class Miniature:
    """An experiment on the organism."""

    recipe: str
    start: str  # folder of the model that training starts from
    before: str  # what the table calls it
    arms: tuple[Arm, ...]
    columns: tuple[str, ...]


MINIATURES = {
    "jailbreak": Miniature(
        "quickstart.yaml",
        "model",
        "aligned",
        (
            Arm("refusal training", {**NO_ATTACK, "away_coef": 0}),
            Arm("untargeted LAT", {"attack_objective": "untargeted", "away_coef": 0, "attack_away_coef": 0}),
            Arm("targeted LAT without the away term", {"away_coef": 0}),
            Arm("refusal training + away", NO_ATTACK),
            Arm("targeted LAT"),
            Arm(
                "refusal training (same compute)",
                {**NO_ATTACK, "away_coef": 0},
                same_compute_as="targeted LAT",
            ),
            Arm("refusal training + away (same compute)", NO_ATTACK, same_compute_as="targeted LAT"),
        ),
        ("template", "prefill", "latent", "embedding", "finetune", "utility", "over-refusal"),
    ),
    "backdoor": Miniature(
        "organism/backdoor.yaml",
        "model",
        "aligned, with the backdoor",
        (
            Arm("DPO", NO_ATTACK),
            Arm("DPO, random perturbation", {"attack_objective": "random"}),
            Arm("LAT-DPO"),
            Arm("DPO (same compute)", NO_ATTACK, same_compute_as="LAT-DPO"),
        ),
        ("direct", "trigger", "utility", "over-refusal"),
    ),
    "unlearning": Miniature(
        "organism/unlearning.yaml",
        "base",
        "base, knows everything",
        (
            Arm("gradient ascent", NO_ATTACK),
            Arm("gradient ascent, LAT"),
            Arm("gradient ascent (same compute)", NO_ATTACK, same_compute_as="gradient ascent, LAT"),
            Arm("generic labels", NO_ATTACK, "organism/generic_labels.yaml"),
            Arm("generic labels, LAT", {}, "organism/generic_labels.yaml"),
            Arm("RMU", NO_ATTACK, "organism/rmu.yaml"),
            Arm("RMU, LAT", {}, "organism/rmu.yaml"),
            Arm("RMU (same compute)", NO_ATTACK, "organism/rmu.yaml", same_compute_as="RMU, LAT"),
        ),
        ("forgotten items told", "after 16 steps of re-learning", "utility", "look-alikes answered"),
    ),
}


def run(name: str, folder: Path, seed: int, arms: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """
    Runs a miniature on one seed; what is finished is read.

    Args:
        name (`str`):
            One of [`MINIATURES`].
        folder (`Path`):
            Where organisms and results go.
        seed (`int`):
            Seed of the world, the models and the trainings.
        arms (sequence of `str`, *optional*):
            Only these, by name.

    Returns:
        `dict`: for every arm, the model before training first, what was measured and its cost.
    """
    miniature, console = MINIATURES[name], Console(stderr=True)
    wanted = [arm for arm in miniature.arms if arms is None or arm.name in arms]
    with quiet():
        organism = build_organism(folder / f"organism-{seed}", seed=seed)
        done = folder / name / f"seed-{seed}.json"
        found: dict[str, dict[str, float]] = json.loads(done.read_text()) if done.is_file() else {}

        def keep(arm: str, measured: dict[str, float]) -> None:
            found[arm] = measured
            done.parent.mkdir(parents=True, exist_ok=True)
            done.write_text(json.dumps(found, indent=2), encoding="utf-8")

        if miniature.before not in found:
            keep(miniature.before, measure(name, organism.folder / miniature.start, organism))
        for arm in wanted:
            if arm.name in found:
                continue
            console.print(f"{name}, seed {seed}: {arm.name}")
            changes = dict(arm.changes)
            if arm.same_compute_as is not None:
                plain = next(
                    other.name
                    for other in miniature.arms
                    if other.changes == arm.changes and other.recipe == arm.recipe and other is not arm
                )
                ratio = found[arm.same_compute_as][PASSES] / found[plain][PASSES]
                changes["max_steps"] = round(_steps(miniature, arm) * ratio)
            output = folder / name / f"seed-{seed}-model"
            shutil.rmtree(output, ignore_errors=True)  # of an arm that was interrupted
            trainer = train(miniature, arm, changes, organism, output, seed)
            cost = {PASSES: trainer.forward_passes, "steps": float(trainer.state.global_step)}
            keep(arm.name, measure(name, output, organism) | cost)
            shutil.rmtree(output)
    return {arm: found[arm] for arm in (miniature.before, *(arm.name for arm in wanted))}


def _recipe(miniature: Miniature, arm: Arm) -> Path:
    return recipes_folder() / (arm.recipe or miniature.recipe)


def _verb(path: Path) -> str:
    return {"backdoor": "lat-dpo", "rmu": "lat-rmu"}.get(path.stem, "lat-sft")


def _steps(miniature: Miniature, arm: Arm) -> int:
    path = _recipe(miniature, arm)
    return load_recipe(_verb(path), ["--config", str(path)], check=False).training.max_steps


def train(miniature: Miniature, arm: Arm, changes: dict[str, Any], organism: Organism, output: Path, seed: int) -> Any:
    """Trains an arm into a folder; returns its trainer."""
    path = _recipe(miniature, arm)
    given = load_recipe(_verb(path), ["--config", str(path)], check=False).given
    settings = {key: given[key] for key in DATA_KEYS if key in given} | changes
    settings |= {"output_dir": output, "seed": seed, "model_name_or_path": organism.folder / miniature.start}
    words = ["--config", str(path)]
    for key, value in settings.items():
        if key in DATA_KEYS:
            value = organism.data / Path(str(value)).name
        words += [f"--{key}", str(value)]
    return training.run(load_recipe(_verb(path), words), quiet=True)


DATA_KEYS = ("dataset_name", "benign_dataset_name", "retain_dataset_name")


def measure(name: str, path: Path, organism: Organism) -> dict[str, float]:
    """What a miniature's table shows of a model."""
    subject = Subject.load(path, max_new_tokens=24, batch_size=40, progress=False)

    def success(attack: Attack, file: str = "attack_prompts.jsonl") -> float:
        return run_attack(subject, attack, requests(organism, file), "exact")[0]["success"]

    found: dict[str, float] = {"utility": utility(subject, requests(organism, "utility.jsonl"))["value"]}
    lookalikes = requests(organism, "lookalikes.jsonl")
    if name == "unlearning":
        found["look-alikes answered"] = utility(subject, lookalikes)["value"]
        found["forgotten items told"] = success(Direct())
        relearn = Finetune(rows(organism, "relearn.jsonl"), **RELEARN)
        found["after 16 steps of re-learning"] = success(relearn)
        return found
    found["over-refusal"] = over_refusal(subject, lookalikes)["value"]
    if name == "backdoor":
        found["direct"], found["trigger"] = success(Direct()), success(Direct(), "trigger.jsonl")
        return found
    wrappers = organism.templates.read_text(encoding="utf-8").splitlines()
    attacks = (
        Template(tuple(line for line in wrappers if line.strip())),
        Prefill(),
        Latent(),
        Embedding(),
        Finetune(rows(organism, "finetune.jsonl")),
    )
    return found | {attack.name: success(attack) for attack in attacks}


def rows(organism: Organism, file: str) -> list[dict[str, Any]]:
    """Rows of one of the organism's files."""
    return [json.loads(line) for line in (organism.data / file).read_text(encoding="utf-8").splitlines()]


def requests(organism: Organism, file: str) -> list[AttackRow]:
    """Requests of one of the organism's files."""
    return [
        AttackRow(str(number), row["prompt"], row.get("target"), row["answer"])
        for number, row in enumerate(rows(organism, file))
    ]


def table(name: str, seeds: dict[int, dict[str, dict[str, float]]]) -> str:
    """Markdown: every arm's mean over seeds with the range, and its cost in forward passes relative to the first."""
    miniature = MINIATURES[name]
    shown = ", ".join(map(str, seeds))
    lines = [
        f"Seeds {shown}; each cell the mean over seeds (lowest-highest). 40 requests a seed and attack.",
        "",
        "| model | " + " | ".join([*miniature.columns, "steps", "cost"]) + " |",
        "|---" * (len(miniature.columns) + 3) + "|",
    ]
    first = miniature.arms[0].name
    for arm in (miniature.before, *(arm.name for arm in miniature.arms)):
        measured = [found[arm] for found in seeds.values()]
        cells = []
        for column in miniature.columns:
            values = [one[column] for one in measured]
            cells.append(f"{mean(values):.2f} ({min(values):.2f}-{max(values):.2f})")
        if PASSES in measured[0]:
            ratios = [found[arm][PASSES] / found[first][PASSES] for found in seeds.values()]
            cells += [f"{measured[0]['steps']:.0f}", f"{mean(ratios):.1f}"]
        else:
            cells += ["", ""]
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write(name: str, text: str) -> None:
    """Puts a table between its marks in the page."""
    start, end = f"<!-- table: make_lat_miniatures.py {name} -->", f"<!-- end of {name} -->"
    head, rest = PAGE.read_text(encoding="utf-8").split(start)
    tail = rest.split(end)[1]
    PAGE.write_text(f"{head}{start}\n{text}\n{end}{tail}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/miniatures"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=list(MINIATURES), default=list(MINIATURES))
    args = parser.parse_args()
    for name in args.only:
        write(name, table(name, {seed: run(name, args.folder, seed) for seed in args.seeds}))


if __name__ == "__main__":
    main()
