"""Makes the table of docs/lat.md: the quickstart on several seeds, with all its controls.

    python docs/make_lat_table.py --folder runs/quickstart-seeds --seeds 0 1 2 3 4

About five minutes a seed on two CPU cores. Seeds that are finished are read, not run again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean

from trl_robust.scripts.quickstart import BEFORE, HELD_OUT, TRAINED, run

PAGE = Path(__file__).with_name("lat.md")
START, END = "<!-- table: make_lat_table.py -->", "<!-- end of table -->"
COLUMNS = ("direct", *HELD_OUT, "mean of four", "finetune", "utility", "over-refusal")


def measures(model: dict) -> dict[str, float]:
    """The columns of the table for one model of a `results.json`."""
    found = {attack["name"]: attack["success"] for attack in model["attacks"]}
    found["mean of four"] = mean(found[name] for name in HELD_OUT)
    found["utility"], found["over-refusal"] = model["utility"]["value"], model["over_refusal"]["value"]
    return found


def table(seeds: dict[int, dict]) -> str:
    """Markdown: every model's mean over seeds with the range, then before and after by seed."""
    by_model: dict[str, list[dict[str, float]]] = {}
    for results in seeds.values():
        for model in results["models"]:
            by_model.setdefault(model["name"], []).append(measures(model))
    lines = [
        f"Seeds {', '.join(map(str, seeds))}; each cell the mean over seeds (lowest-highest). 40 requests a seed and "
        "attack.",
        "",
        "| model | " + " | ".join(COLUMNS) + " |",
        "|---" * (len(COLUMNS) + 1) + "|",
    ]
    for name, rows in by_model.items():
        cells = []
        for column in COLUMNS:
            values = [row[column] for row in rows]
            cells.append(f"{mean(values):.2f} ({min(values):.2f}-{max(values):.2f})")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", "By seed, before -> after latent adversarial training:", ""]
    shown = ("mean of four", "finetune", "utility", "over-refusal")
    lines += ["| seed | " + " | ".join(shown) + " |", "|---" * (len(shown) + 1) + "|"]
    for number, seed in enumerate(seeds):
        before, after = by_model[BEFORE][number], by_model[TRAINED][number]
        cells = [f"{before[column]:.3f} -> {after[column]:.3f}" for column in shown]
        lines.append(f"| {seed} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/quickstart-seeds"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    args = parser.parse_args()
    seeds = {}
    for seed in args.seeds:
        folder = args.folder / f"seed-{seed}"
        done = folder / "results.json"
        seeds[seed] = json.loads(done.read_text(encoding="utf-8")) if done.is_file() else run(folder, seed)
    head, rest = PAGE.read_text(encoding="utf-8").split(START)
    tail = rest.split(END)[1]
    PAGE.write_text(f"{head}{START}\n{table(seeds)}\n{END}{tail}", encoding="utf-8")


if __name__ == "__main__":
    main()
