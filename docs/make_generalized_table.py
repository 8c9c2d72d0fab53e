"""Makes the tables of docs/generalized.md: eight models of one organism, attacked by every attack of the suite.

    python docs/make_generalized_table.py --folder runs/generalized --seeds 0 1 2

Builds the organism, trains it in six ways, and evaluates all of them: about eight minutes a seed on two CPU cores.
What is finished is not done again. `--write` puts the tables into docs/generalized.md; without it they are printed.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import time
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console

from trl_robust.cli import main as trl_robust
from trl_robust.organism import Organism, build_organism
from trl_robust.recipes import recipes_folder
from trl_robust.scripts.quickstart import ARMS, AWAY, PLAIN

PAGE = Path(__file__).with_name("generalized.md")
START, END = "<!-- table: make_generalized_table.py -->", "<!-- end of table -->"
STEPS = 120
"""Updates of every defence, as in recipes/quickstart.yaml: 16 forbidden and 32 benign rows each."""


def lap_rows(organism: Organism, path: Path, seed: int) -> Path:
    """The rows that refusal training sees, in one file: 16 refusals and 32 benign answers in every 48."""

    def read(file: Path) -> list[dict[str, Any]]:
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]

    draw = random.Random(seed)
    rows = read(organism.harmful_prompt_completion)[: 16 * STEPS]
    rows += draw.sample(read(organism.benign), 32 * STEPS)
    draw.shuffle(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def trained(folder: Path, name: str, verb: str, recipe: str, **changes: Any) -> Path:
    """Runs a recipe with other settings, unless that was done; gives its folder."""
    output = folder / "runs" / name
    if (output / "run.json").is_file():
        return output
    shutil.rmtree(output, ignore_errors=True)  # of a run that was interrupted
    settings = {"output_dir": output, **changes}
    words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    start = time.perf_counter()
    if code := trl_robust([verb, "--config", str(recipes_folder() / recipe), *words]):
        raise SystemExit(code)
    Console(stderr=True).print(f"{name}: trained in {time.perf_counter() - start:.0f} s")
    return output


def models(folder: Path, seed: int) -> tuple[Organism, dict[str, Path]]:
    """Builds and trains the models of one seed; what is finished is read."""
    organism = build_organism(folder / "organism", seed=seed)
    common = {"model_name_or_path": organism.model, "seed": seed}
    lat = {
        **common,
        "dataset_name": organism.harmful_preferences,
        "benign_dataset_name": organism.benign,
    }
    rows = lap_rows(organism, folder / "runs" / "lap-rows.jsonl", seed)
    lap = {
        **common,
        "dataset_name": rows,
        "max_steps": STEPS,
        "per_device_train_batch_size": 48,
        "learning_rate": 5e-4,
    }
    selection = {**common, "dataset_name": organism.selection}
    found = {
        "base": organism.base,
        "aligned": organism.model,
        "refusal training": trained(folder, "refusal-training", "lat-sft", "quickstart.yaml", **lat, **ARMS[PLAIN][1]),
        "refusal training + away": trained(folder, "away", "lat-sft", "quickstart.yaml", **lat, **ARMS[AWAY][1]),
        "LAT": trained(folder, "lat", "lat-sft", "quickstart.yaml", **lat),
        "LAP": trained(folder, "lap", "lap-sft", "lap/organism.yaml", **lap),
        "fine-tuned": trained(folder, "fine-tuned", "lap-sft", "seal/organism_sft.yaml", **selection),
    }
    seal = trained(folder, "seal", "seal", "seal/organism.yaml", **selection, safe_dataset_name=organism.safe)
    kept = {**common, "dataset_name": seal / "kept.jsonl"}
    found["SEAL, fine-tuned"] = trained(folder, "seal-fine-tuned", "lap-sft", "seal/organism_sft.yaml", **kept)
    return organism, found


def evaluated(folder: Path, seed: int) -> dict[str, Any]:
    """The results of one seed."""
    output = folder / "evaluation"
    if not (output / "results.json").is_file():
        organism, found = models(folder, seed)
        words = ["--organism", str(organism.folder), "--output_dir", str(output), "--seed", str(seed)]
        named = [f"{name}={path}" for name, path in found.items()]
        recipe = recipes_folder() / "eval" / "organism.yaml"
        if code := trl_robust(["evaluate", "--config", str(recipe), "--model", *named, *words]):
            raise SystemExit(code)
    return json.loads((output / "results.json").read_text(encoding="utf-8"))


def table(seeds: dict[int, dict[str, Any]]) -> str:
    """Markdown: success of every attack, factors of safety, and the proxies; means over seeds with their range."""
    results = list(seeds.values())
    names = [model["name"] for model in results[0]["models"]]
    attacks = [one["name"] for one in results[0]["models"][0]["attacks"] if one["control_of"] is None]
    controls = [one["name"] for one in results[0]["models"][0]["attacks"] if one["control_of"]]

    def row_of(label: str, value: Any) -> str:
        return f"| {label} | " + " | ".join(value(number) for number in range(len(names))) + " |"

    def success(name: str, number: int) -> str:
        found = [next(a for a in one["models"][number]["attacks"] if a["name"] == name) for one in results]
        return shown([one["success"] for one in found])

    head = "| | " + " | ".join(names) + " |\n" + "|---" * (len(names) + 1) + "|"
    many = len(seeds) > 1
    lines = [
        f"Seed{'s' if many else ''} {', '.join(map(str, seeds))}; 40 requests an attack and seed"
        + ("; mean over seeds (lowest-highest)." if many else ".")
        + " Success is the best so far at the largest budget that leaves the model intact; - where every budget "
        "destroyed it, and the number of seeds where some did not.",
        "",
        head,
        *(row_of(name, lambda number, name=name: success(name, number)) for name in attacks),
        *(row_of(name, lambda number, name=name: success(name, number)) for name in controls),
        row_of("utility", lambda number: shown([one["models"][number]["utility"]["value"] for one in results])),
        row_of(
            "over-refusal", lambda number: shown([one["models"][number]["over_refusal"]["value"] for one in results])
        ),
        "",
        "Budget at which an attack breaks half of the requests (resistance), and that over what the model has to bear "
        "(factor of safety); > where no budget did:",
        "",
        head,
    ]
    for attack in dict.fromkeys(row["attack"] for row in results[0]["models"][0]["factor_of_safety"]):
        lines.append(row_of(attack, lambda number, attack=attack: resisted(results, number, attack)))
    lines += ["", f"Over the {len(names)} models" + (", by seed:" if many else ":"), ""]
    lines += ["| generalised measure | rho with the largest prompt attack | error left out (without) | conservative |"]
    lines += ["|---|---|---|---|"]
    for measure in results[0]["proxy"]:
        found = [one["proxy"][measure] for one in results if measure in one["proxy"]]
        lines.append(
            f"| {measure} | {'; '.join(correlation(one) for one in found)} | "
            f"{'; '.join(error(one) for one in found)} | {'; '.join(rate(one) for one in found)} |"
        )
    return "\n".join(lines)


def shown(values: list[float | None]) -> str:
    """Mean and range; a dash where nothing was scored."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    ends = f" ({min(known):.2f}-{max(known):.2f})" if len(known) > 1 else ""
    some = f", {len(known)} of {len(values)}" if len(known) < len(values) else ""
    return f"{mean(known):.2f}{ends}{some}"


def resisted(results: list[dict[str, Any]], number: int, attack: str) -> str:
    """Resistance at one half and the factor of safety, seed by seed."""
    cells = []
    for one in results:
        rows = one["models"][number]["factor_of_safety"]
        row = next((row for row in rows if row["attack"] == attack and row["threshold"] == 0.5), None)
        if row is None or (row.get("resistance") is None and row.get("censored_at") is None):
            cells.append("-")
            continue
        over = row["resistance"] is None
        value, factor = (row["censored_at"], row["factor_above"]) if over else (row["resistance"], row["factor"])
        mark = "> " if over else ""
        cells.append(f"{mark}{value:g}" + (f" ({mark}{factor:.2g})" if factor is not None else ""))
    return "; ".join(cells)


def correlation(study: dict[str, Any]) -> str:
    """Rank correlation with the strongest attack on prompts."""
    found = study["correlations"]["largest"]
    if found["rho"] is None:
        return "-"
    ends = f" ({found['interval'][0]:.2f}, {found['interval'][1]:.2f})" if found["interval"] else ""
    return f"{found['rho']:.2f}{ends}, p {found['p']:.3f}"


def error(study: dict[str, Any]) -> str:
    """Error of predicting an attack left out, and that without the measure."""
    found = study["prediction"]
    return "-" if found["error"] is None else f"{found['error']:.2f} ({found['baseline']:.2f})"


def rate(study: dict[str, Any]) -> str:
    """Share of models on which the measure errs on the safe side."""
    found = study["conservative"]
    return "-" if found is None or found["rate"] is None else f"{found['rate']:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/generalized"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    start = time.perf_counter()
    seeds = {seed: evaluated(args.folder / f"seed-{seed}", seed) for seed in args.seeds}
    text = table(seeds)
    Console(stderr=True).print(f"Done in {time.perf_counter() - start:.0f} s")
    if not args.write:
        print(text)
        return
    page = PAGE.read_text(encoding="utf-8")
    pattern = re.escape(START) + ".*?" + re.escape(END)
    PAGE.write_text(re.sub(pattern, lambda _: f"{START}\n{text}\n{END}", page, flags=re.DOTALL), encoding="utf-8")


if __name__ == "__main__":
    main()
