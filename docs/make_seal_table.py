"""Makes the tables of docs/seal.md: which rows make the organism forget to refuse, with all baselines.

    python docs/make_seal_table.py --folder runs/seal

Every selection is made, and the organism fine-tuned on what it keeps, twice a seed. Some five minutes a seed on
one core. Whatever is finished is read, not run again; `--arms "all rows" SEAL` runs a part.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from seal_study import (
    ARMS,
    BEFORE,
    NONE,
    ORACLE,
    OWN,
    RUNS,
    SUBJECT,
    TRANSFERRED,
    Found,
    Run,
    agreement,
    run,
    run_transfer,
)

from trl_robust.sweep.statistics import difference_of

PAGE = Path(__file__).with_name("seal.md")
SEEN = range(5)
"""Seeds that were looked at while settings were chosen; the others were run once, with what was chosen."""

COLUMNS = {
    "AUROC": "auroc",
    "unsafe kept": "unsafe",
    "direct": "direct",
    "other wordings": "wordings",
    "role play": "wrapped",
    "prefill": "prefill",
    "new style": "style",
    "right": "right",
    "look-alikes refused": "refused",
}


def value_of(measured: Run, name: str) -> float | None:
    """A figure of one training: a share, or what was counted."""
    value = measured.get(name)
    return value.count("1") / len(value) if isinstance(value, str) else value


def over_runs(runs: Sequence[Run], name: str) -> dict[str, float]:
    """For every request the share of the trainings in which it counts."""
    return {
        f"{place:02}": mean(float(one) for one in ones)
        for place, ones in enumerate(zip(*(r[name] for r in runs), strict=True))
    }


def table(seeds: dict[int, Found]) -> str:
    """Markdown: every selection's mean over seeds with the range, by seed, and SEAL against every other."""
    arms = [arm for arm in (BEFORE, *ARMS) if all(arm in found for found in seeds.values())]
    lines = [*_means(seeds, arms, COLUMNS), "", *_by_seed(seeds, arms), "", *_differences(seeds, arms, SUBJECT)]
    return "\n".join(lines)


def transfer_table(seeds: dict[int, Found], agreements: Sequence[dict[str, float]] = ()) -> str:
    """Markdown: the larger organism, with its own selector and with that of the smaller one."""
    arms = [BEFORE, NONE, ORACLE, OWN, TRANSFERRED]
    columns = {**COLUMNS, "Spearman": "rho", "Jaccard of kept": "jaccard"}
    lines = [*_means(seeds, arms, columns), "", *_by_seed(seeds, arms)]
    if agreements:
        cells = [_cell([one[name] for one in agreements], name) for name in ("same", "other", "itself")]
        lines += [
            "",
            "| rank correlation of two selectors | |",
            "|---|---|",
            f"| of the two models, trained with the same seed | {cells[0]} |",
            f"| of the two models, trained with different seeds | {cells[1]} |",
            f"| of one model, trained with different seeds | {cells[2]} |",
        ]
    return "\n".join(lines)


def _means(seeds: dict[int, Found], arms: Sequence[str], columns: dict[str, str]) -> list[str]:
    runs = {len(found[arm]) for found in seeds.values() for arm in arms if arm != BEFORE}
    lines = [
        f"Seeds {', '.join(map(str, seeds))}; {' or '.join(map(str, runs))} selections and trainings each; each cell "
        "the mean over seeds (lowest-highest seed).",
        "",
        "| rows | " + " | ".join([*columns, "passes"]) + " |",
        "|---" * (len(columns) + 2) + "|",
    ]
    for arm in arms:
        cells = [_cell([_over(found[arm], name) for found in seeds.values()], name) for name in columns.values()]
        passes = [one.get("passes") for found in seeds.values() for one in found[arm]]
        known = [one for one in passes if one is not None]
        lines.append(f"| {arm} | " + " | ".join([*cells, f"{mean(known):.0f}" if known else ""]) + " |")
    return lines


def _over(runs: Sequence[Run], name: str) -> float | None:
    values = [value_of(one, name) for one in runs]
    known = [value for value in values if value is not None]
    return mean(known) if known else None


def _cell(values: Sequence[float | None], name: str) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return ""
    digits = 1 if name == "unsafe" else 2
    low, middle, high = (f"{value:.{digits}f}" for value in (min(known), mean(known), max(known)))
    return f"{middle} ({low}-{high})"


def _by_seed(seeds: dict[int, Found], arms: Sequence[str]) -> list[str]:
    names = {
        "AUROC": ("auroc", 3),
        "unsafe kept": ("unsafe", 1),
        "direct": ("direct", 2),
        "role play": ("wrapped", 2),
    }
    lines = [
        f"By seed ({', '.join(map(str, seeds))}):",
        "",
        "| rows | " + " | ".join(names) + " |",
        "|---" * (len(names) + 1) + "|",
    ]
    for arm in arms:
        cells = []
        for name, digits in names.values():
            values = [_over(found[arm], name) for found in seeds.values()]
            cells.append(" / ".join("" if value is None else f"{value:.{digits}f}" for value in values).strip(" /"))
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return lines


def _differences(seeds: dict[int, Found], arms: Sequence[str], subject: str) -> list[str]:
    others = [arm for arm in arms if arm not in (BEFORE, subject)] if subject in arms else []
    lines = [
        "Secrets told, SEAL minus the other; below 0 SEAL is better. Fresh seeds are those that nobody looked at "
        "while settings were chosen. In brackets 95 % intervals of a paired bootstrap over seeds and requests:",
        "",
        "| other | direct, all seeds | fresh seeds | role play, all seeds | fresh seeds |",
        "|---|---|---|---|---|",
    ]
    for arm in others:
        cells = []
        for name in ("direct", "wrapped"):
            ours, theirs = (
                {seed: over_runs(found[which], name) for seed, found in seeds.items()} for which in (subject, arm)
            )
            fresh = [{seed: one[seed] for seed in one if seed not in SEEN} for one in (ours, theirs)]
            cells += [_shown(difference_of(ours, theirs)), _shown(difference_of(*fresh)) if fresh[0] else ""]
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return lines


def _shown(estimate: Any) -> str:
    low, high = estimate["interval"]
    return f"{estimate['value']:+.2f} ({low:+.2f}, {high:+.2f})"


def write(mark: str, text: str) -> None:
    """Puts a table between its marks in the page."""
    start, end = f"<!-- {mark}: make_seal_table.py -->", f"<!-- end of {mark} -->"
    head, rest = PAGE.read_text(encoding="utf-8").split(start)
    tail = rest.split(end)[1]
    PAGE.write_text(f"{head}{start}\n{text}\n{end}{tail}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/seal"))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(8)))
    parser.add_argument("--runs", type=int, default=RUNS)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--transfer_seeds", type=int, nargs="*", default=[0, 1, 2, 5, 6, 7])
    args = parser.parse_args()
    found = {seed: run(args.folder, seed, args.arms, args.runs) for seed in args.seeds}
    if set(args.arms) == set(ARMS):
        write("table", table(found))
    if args.transfer_seeds:
        transferred = {seed: run_transfer(args.folder, seed, args.runs) for seed in args.transfer_seeds}
        agreements = [agreement(args.folder, seed, args.runs) for seed in args.transfer_seeds] if args.runs > 1 else []
        write("transfer", transfer_table(transferred, agreements))


if __name__ == "__main__":
    main()
