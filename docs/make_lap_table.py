"""Makes the tables of docs/lap.md: new facts told in one wording and asked for in others, with all controls.

    python docs/make_lap_table.py --folder runs/lap --seeds 0 1 2 3 4

Every cell is trained several times, since two trainings that differ in nothing but their order of rows differ a good
deal here. Some ten minutes a seed on one core. Whatever is finished is read, not run again; `--arms LAP SFT` runs a
part.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console

from trl_robust.organism import Organism, build_organism, grammar
from trl_robust.organism.checks import respond, states
from trl_robust.organism.rewording import new_facts, reworded_forms
from trl_robust.organism.world import make_world
from trl_robust.recipes import load_recipe, recipes_folder
from trl_robust.scripts import training
from trl_robust.scripts.quiet import quiet
from trl_robust.sweep.statistics import difference_of

PAGE = Path(__file__).with_name("lap.md")
RECIPE = recipes_folder() / "lap" / "organism.yaml"
BASE, SUBJECT = "before training, asked for the old values", "LAP"
ARMS: dict[str, dict[str, Any]] = {
    "SFT": {"lap_branch": "sft_only"},
    "SFT (same compute)": {"lap_match_compute": True},
    "NEFTune": {"lap_branch": "sft_only", "neftune_noise_alpha": 5},
    # The radius is the largest tried under which the new facts are still learned: at LAP's own length they are not.
    "untargeted LAT": {"lap_search": "untargeted", "lap_radius": 0.3},
    "random perturbation": {"lap_search": "random"},
    "norm growth alone": {"lap_lambda_init": 0, "lap_augmented": 0, "lap_backoff": "false"},
    "LAP, multiplier fixed": {"lap_alpha": 0},
    SUBJECT: {},
}
RUNS = 2
TUNED_ON = 0
"""The seed that settings were chosen on; the others were run once, with what was chosen."""
WATCHED = (
    "lambda_end", "loss_change_abs_end", "feasible_end", "backoff_scale", "relative_norm", "capped_share",
    "perturbed_loss",
)  # fmt: skip
"""What is kept of the search, as means over quarters of the training."""

Run = dict[str, Any]
Found = dict[str, list[Run]]
"""Arm -> one entry a training."""


def run(folder: Path, seed: int, arms: Sequence[str] = tuple(ARMS), runs: int = RUNS) -> Found:
    """
    Trains and measures on one seed; what is finished is read.

    Args:
        folder (`Path`):
            Where organisms and results go.
        seed (`int`):
            Seed of the world and of its base model.
        arms (sequence of `str`, *optional*):
            Only these.
        runs (`int`, *optional*, defaults to `2`):
            Trainings of every arm, with the training seeds 0, 1, ...

    Returns:
        `dict`: for the model before training and for every arm a list with what was measured after each training.
    """
    console = Console(stderr=True)
    with quiet():
        organism = build_organism(folder / f"organism-{seed}", seed=seed)
        done = folder / f"seed-{seed}.json"
        found: Found = json.loads(done.read_text(encoding="utf-8")) if done.is_file() else {}

        def keep(arm: str, measured: Run) -> None:
            found.setdefault(arm, []).append(measured)
            draft = done.with_suffix(".draft")
            draft.write_text(json.dumps(found), encoding="utf-8")
            draft.replace(done)

        if BASE not in found:
            world = make_world(seed)
            keep(BASE, measure(*_loaded(organism.base), organism, [world.facts[fact] for fact in new_facts(world)]))
        for arm in arms:
            for number in range(len(found.get(arm, [])), runs):
                console.print(f"Seed {seed}, training {number + 1} of {runs}: {arm}")
                keep(arm, train(organism, ARMS[arm], number, folder / f"seed-{seed}-model"))
    return {arm: found[arm][:runs] for arm in (BASE, *arms)}


def train(organism: Organism, changes: dict[str, Any], seed: int, output: Path) -> Run:
    """
    Trains one arm once, and measures it.

    Args:
        organism ([`~trl_robust.organism.Organism`]):
            Its base model is trained, on its data.
        changes (`dict`):
            What is different from the recipe.
        seed (`int`):
            Of the training.
        output (`Path`):
            Folder for the model, which is removed again.

    Returns:
        `dict`: what [`measure`] gives, with `steps`, `forward_passes`, and `search`, the curves of [`WATCHED`].
    """
    shutil.rmtree(output, ignore_errors=True)  # of a training that was interrupted
    settings = {"model_name_or_path": organism.base, "dataset_name": organism.rewording, "output_dir": output}
    words = ["--config", str(RECIPE)]
    for key, value in {**settings, "seed": seed, **changes}.items():
        words += [f"--{key}", str(value)]
    trainer = training.run(load_recipe("lap-sft", words), quiet=True)
    measured = measure(trainer.model.eval(), trainer.processing_class, organism)
    measured |= {"steps": trainer.state.global_step, "forward_passes": trainer.forward_passes}
    measured["search"] = _quarters(trainer.state.log_history)
    shutil.rmtree(output)
    return measured


def measure(model: Any, tokenizer: Any, organism: Organism, answers: Sequence[str] | None = None) -> Run:
    """
    Which facts a model states in which wording, and what it still knows.

    Args:
        model, tokenizer:
            What was trained.
        organism ([`~trl_robust.organism.Organism`]):
            Its data.
        answers (sequence of `str`, *optional*):
            What is right, one a case; the new values unless given.

    Returns:
        `dict`: `right`, for every case a string of 0 and 1, the original wording first; `kept`, the share of the other
        facts that are stated.
    """
    cases, kept = _rows(organism.rewordings), _rows(organism.rewording_kept)
    answers = answers or [case["answer"] for case in cases]
    asked = [
        (answer, text)
        for case, answer in zip(cases, answers, strict=True)
        for text in (case["instruction"], *case["paraphrases"])
    ]
    said = respond(model, tokenizer, [text for _, text in asked])
    right = "".join(str(int(states(answer, text))) for (answer, _), text in zip(asked, said, strict=True))
    width = len(right) // len(cases)
    other = respond(model, tokenizer, [row["prompt"][0]["content"] for row in kept])
    return {
        "right": [right[start : start + width] for start in range(0, len(right), width)],
        "kept": mean(states(row["answer"], text) for row, text in zip(kept, other, strict=True)),
    }


def _loaded(path: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _quarters(history: Sequence[dict[str, float]]) -> dict[str, list[float]]:
    """Means of what the search logged, over each quarter of the training."""
    last = max(entry["step"] for entry in history)
    found = {}
    for name in WATCHED:
        parts: list[list[float]] = [[], [], [], []]
        for entry in history:
            if name in entry:
                parts[min(3, 4 * (entry["step"] - 1) // last)].append(entry[name])
        if all(parts):
            found[name] = [mean(part) for part in parts]
    return found


# What the tables show

PLAIN = [True, *(wording in grammar.PLAIN_WORDINGS for wording, _ in reworded_forms())]


def measures(measured: Run) -> dict[str, float]:
    """The columns of the table for one training."""
    rows = measured["right"]
    plain = [[one for one, shown in zip(row, PLAIN, strict=True) if shown] for row in rows]
    return {
        "told wording": mean(row[0] == "1" for row in rows),
        "worst of 34": mean(worst_of(measured).values()),
        "worst of 10 plain": mean("0" not in row for row in plain),
        "average": mean(average_of(measured).values()),
        "other facts": measured["kept"],
    }


def worst_of(measured: Run) -> dict[str, float]:
    """For every case whether it is right in all wordings."""
    return {f"{number:02}": float("0" not in row) for number, row in enumerate(measured["right"])}


def average_of(measured: Run) -> dict[str, float]:
    """For every case in which share of the wordings it is right."""
    return {f"{number:02}": row.count("1") / len(row) for number, row in enumerate(measured["right"])}


def over_runs(runs: Sequence[Run], score: Any) -> dict[str, float]:
    """The mean of a score of every case over the trainings."""
    scores = [score(measured) for measured in runs]
    return {case: mean(one[case] for one in scores) for case in scores[0]}


def table(seeds: dict[int, Found]) -> str:
    """Markdown: every arm's mean over seeds with the range, LAP against every other, and what the search did."""
    arms = [arm for arm in (BASE, *ARMS) if all(arm in found for found in seeds.values())]
    columns = list(measures(next(iter(seeds.values()))[BASE][0]))
    runs = {len(found[arm]) for found in seeds.values() for arm in arms if arm != BASE}
    lines = [
        f"Seeds {', '.join(map(str, seeds))}, {' or '.join(map(str, runs))} trainings each; each cell the mean over "
        "seeds (lowest-highest seed). 80 cases a seed.",
        "",
        "| training | " + " | ".join([*columns, "steps", "cost"]) + " |",
        "|---" * (len(columns) + 3) + "|",
    ]
    for arm in arms:
        cells = []
        for column in columns:
            values = [mean(measures(one)[column] for one in found[arm]) for found in seeds.values()]
            cells.append(f"{mean(values):.2f} ({min(values):.2f}-{max(values):.2f})")
        cells += ["", ""]
        if "steps" in next(iter(seeds.values()))[arm][0]:
            costs = [
                sum(one["forward_passes"] for one in found[arm]) / sum(one["forward_passes"] for one in found["SFT"])
                for found in seeds.values()
            ]
            cells[-2:] = [
                f"{mean(one['steps'] for found in seeds.values() for one in found[arm]):.0f}",
                f"{mean(costs):.1f}",
            ]
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    lines += ["", *_differences(seeds, arms), "", *_search(seeds, arms)]
    return "\n".join(lines)


def _differences(seeds: dict[int, Found], arms: Sequence[str]) -> list[str]:
    pairs = [(SUBJECT, arm) for arm in arms if arm not in (BASE, SUBJECT)]
    pairs += [("random perturbation", "SFT")] if "random perturbation" in arms else []
    lines = [
        "One training minus another, by seed and over all; above 0 the first is better. In brackets 95 % intervals of "
        "a paired bootstrap, by seed over cases, over all over seeds and cases:",
        "",
        "| first | second | measure | "
        + " | ".join(f"seed {seed}" for seed in seeds)
        + f" | all | all but {TUNED_ON} |",
        "|---" * (len(seeds) + 5) + "|",
    ]
    for first, second in pairs:
        for name, score in (("worst of 34", worst_of), ("average", average_of)):
            ours, theirs = (
                {seed: over_runs(found[which], score) for seed, found in seeds.items()} for which in (first, second)
            )
            parts = [difference_of({seed: ours[seed]}, {seed: theirs[seed]}) for seed in seeds]
            fresh = [{seed: one[seed] for seed in one if seed != TUNED_ON} for one in (ours, theirs)]
            cells = [_shown(part) for part in (*parts, difference_of(ours, theirs), difference_of(*fresh))]
            lines.append(f"| {first} | {second} | {name} | " + " | ".join(cells) + " |")
    return lines


def _shown(estimate: Any) -> str:
    low, high = estimate["interval"]
    return f"{estimate['value']:+.2f} ({low:+.2f}, {high:+.2f})"


def _search(seeds: dict[int, Found], arms: Sequence[str]) -> list[str]:
    names = {
        "lambda_end": "multiplier at the end of the search", "loss_change_abs_end": "change of the loss",
        "feasible_end": "feasible rows", "backoff_scale": "backed off to", "relative_norm": "relative norm",
        "perturbed_loss": "loss trained on",
    }  # fmt: skip
    lines = [
        "What the search came to, in each quarter of the training (means over rows, trainings and seeds):",
        "",
        "| training | " + " | ".join(names.values()) + " |",
        "|---" * (len(names) + 1) + "|",
    ]
    for arm in arms:
        curves = [
            one["search"] for found in seeds.values() for one in found[arm] if one.get("search", {}).get("lambda_end")
        ]
        if curves:
            cells = []
            for name in names:
                quarters = [mean(curve[name][quarter] for curve in curves) for quarter in range(4)]
                cells.append(", ".join(f"{value:.2g}" for value in quarters))
            lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return lines


def write(text: str) -> None:
    """Puts the tables between their marks in the page."""
    start, end = "<!-- table: make_lap_table.py -->", "<!-- end of make_lap_table.py -->"
    head, rest = PAGE.read_text(encoding="utf-8").split(start)
    tail = rest.split(end)[1]
    PAGE.write_text(f"{head}{start}\n{text}\n{end}{tail}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/lap"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--runs", type=int, default=RUNS)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    args = parser.parse_args()
    found = {seed: run(args.folder, seed, args.arms, args.runs) for seed in args.seeds}
    if set(args.arms) == set(ARMS):
        write(table(found))


if __name__ == "__main__":
    main()
