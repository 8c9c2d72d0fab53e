"""What `trl-robust diagnose-distance` does once its arguments, models and data stand: measure, score, write, print.

Measuring a case is what takes long, so every case is written down as soon as it is measured (`answers.jsonl`), and the
same command given again goes on behind it.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from ..data import is_local
from ..evaluation.answer_scores import RewardModel, answers_of, exact_scores, likelihood_scores
from ..evaluation.distance import METRICS, RenderedSubject, measure_case
from ..evaluation.distance_statistics import PAPER, judged_case, summary
from ..evaluation.sampling import Sampling
from ..evaluation.wordings import Case
from ..recipes import RecipeError
from ..report.distance import distance_tables, draw_distance
from ..report.figures import encode
from ..threat import decoder_layers
from .diagnose_distance import RESULT, DistanceArguments
from .run_folder import hardware, versions, write_json

SCHEMA = 1
VERSION = 1
"""Of the protocol: raised when the same model and data give other numbers."""
SETTINGS, ANSWERS, CASES = "settings.json", "answers.jsonl", "cases.jsonl"


def run(
    args: DistanceArguments,
    subject: RenderedSubject,
    cases: list[Case],
    sites: tuple,
    *,
    reward: RewardModel | None,
    given: dict[str, list[list[float]]] | None,
    data_sha256: str,
) -> dict[str, Any]:
    """
    Measures the cases, writes the folder and prints the table.

    Args:
        args ([`DistanceArguments`]):
            Arguments.
        subject ([`~trl_robust.evaluation.distance.RenderedSubject`]):
            The model.
        cases (`list` of [`~trl_robust.evaluation.wordings.Case`]):
            Cases.
        sites (`tuple`):
            Where distances are taken.
        reward ([`~trl_robust.evaluation.answer_scores.RewardModel`], *optional*):
            For the scorer `reward`.
        given (`dict`, *optional*):
            For the scorer `file`.
        data_sha256 (`str`):
            Of the data.

    Returns:
        `dict`: what stands in `distance.json`.
    """
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {**_identity(args), "sites": [str(site) for site in sites], "data_sha256": data_sha256}
    _start_or_go_on(folder, settings)
    rows = list(_scored(args, subject, cases, sites, folder, reward, given))
    scored = [row for row in rows if row["status"] == "scored"]
    depth = len(decoder_layers(subject.model))
    numbers = summary(
        scored,
        settings["sites"],
        METRICS,
        average_over=args.average_over,
        seed=args.seed,
        resamples=args.resamples,
    )
    result = {
        "schema": SCHEMA,
        "version": VERSION,
        "model": str(args.model),
        "n_cases": len(cases),
        "n_skipped": sum(row["status"] == "skipped" for row in rows),
        "n_errored": sum(row["status"] == "errored" for row in rows),
        **numbers,
        "main": {"site": settings["sites"][-1], "distance": args.distance},
        "blocks": {
            str(site): "embedding" if site == "embedding" else f"after block {int(site) + 1} of {depth}"
            for site in sites
        },
        "last_token": _counted(token for row in scored for token in row["last_tokens"]),
        "rendering": subject.rendering.described(subject),
        "paper": PAPER,
        "settings": {**settings, "max_cases": args.max_cases, "resamples": args.resamples},
        "versions": versions(),
        "hardware": hardware(1),
    }
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / CASES).write_text(text, encoding="utf-8")
    figure = encode(draw_distance(result, scored, args.distance, seed=args.seed), "png")
    (folder / "distance.png").write_bytes(figure)
    # Last: it says that the folder is complete.
    write_json(folder / RESULT, result)
    console = Console()
    for table in distance_tables(result):
        console.print(table)
    console.print(
        f"{result['n_scored']} cases scored, {result['n_excluded']} of them excluded (no wording is worse than the "
        f"original), {result['n_skipped']} skipped, {result['n_errored']} errored; scorer: {args.scorer}"
    )
    for reason in sorted({row["reason"] for row in rows if row["reason"]})[:5]:
        console.print(f"  {reason}", markup=False)
    if result["n_errored"]:
        console.print(f"Remove {folder / RESULT} and give the same command to try what errored again.")
    if (noise := result["decoding_noise"]) is not None:
        few = "" if noise["enough"] else f" ({noise['responses']} answers a wording are few; 4 or more are wanted)"
        console.print(
            f"decoding: variance {noise['within']:.3g} within a wording, {noise['between']:.3g} between wordings; "
            f"drop {noise['drop']:.3g}, by luck alone {noise['drop_by_luck']:.3g}{few}"
        )
    console.print(result["power"]["note"])
    console.print(f"Written to {folder}")
    return result


def _scored(
    args: DistanceArguments,
    subject: RenderedSubject,
    cases: list[Case],
    sites: tuple,
    folder: Path,
    reward: RewardModel | None,
    given: dict[str, list[list[float]]] | None,
) -> Iterator[dict[str, Any]]:
    """One row a case for `cases.jsonl`. What was measured before an interruption is read, not measured again."""
    sampling = Sampling(0.0 if args.greedy else args.temperature, args.top_p, args.seed)
    known = _answered(folder)
    for number in subject.track(range(len(cases)), "cases"):
        case = cases[number]
        row: dict[str, Any] = {"index": case.id, "status": "scored", "reason": None}
        try:
            measured = known.get(case.id)
            if measured is None:
                measured = measure_case(subject, case, sites, pooling=args.pooling)
                if args.scorer == "loglik":
                    measured["scores"] = likelihood_scores(subject, case)
                elif given is None:
                    measured["answers"] = answers_of(subject, case, responses=args.responses, sampling=sampling)
                with (folder / ANSWERS).open("a", encoding="utf-8") as file:
                    file.write(json.dumps(measured, ensure_ascii=False) + "\n")
            measured = dict(measured)
            answers = measured.pop("answers", None)
            if given is not None:
                scores = given[case.id]
            elif answers is None:
                scores = measured.pop("scores")
            else:
                scores = exact_scores(case, answers) if reward is None else reward.scores(case, answers)
            row |= judged_case(measured, scores)
        except (RuntimeError, FloatingPointError) as error:
            # Out of memory and numerical failures of one case: counted, and not written down as measured.
            row |= {"status": "errored", "reason": f"{type(error).__name__}: {error}"}
        except ValueError as error:
            row |= {"status": "skipped", "reason": str(error)}
        yield row


def _identity(args: DistanceArguments) -> dict[str, Any]:
    """The settings that decide what is measured: a run may go on only where they are the same."""
    rest = {"output_dir", "max_cases", "resamples", "batch_size"}
    found = {name: value for name, value in dataclasses.asdict(args).items() if name not in rest}
    path = Path(str(args.model)).expanduser()
    if is_local(str(args.model)) and path.is_dir():
        # A model that was trained again in the same folder is another model.
        weights = sorted(path.glob("*.safetensors"))
        found["weights"] = {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in weights}
    return found


def _start_or_go_on(folder: Path, settings: dict[str, Any]) -> None:
    if not (folder / SETTINGS).exists():
        if taken := [name for name in (ANSWERS, CASES) if (folder / name).exists()]:
            raise RecipeError([f"`output_dir` {folder} holds {taken[0]} of something else. Name another folder."])
        write_json(folder / SETTINGS, settings)
        return
    before = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    now = json.loads(json.dumps(settings))
    if other := sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name)):
        raise RecipeError(
            [
                f"`output_dir` {folder} holds part of a run with other settings ({', '.join(other)}). Give the same "
                "ones to go on, or name another folder."
            ]
        )


def _answered(folder: Path) -> dict[str, dict[str, Any]]:
    """Cases of an earlier run of the same command, by index. A line that was cut short is taken off the file."""
    path, found, whole = folder / ANSWERS, {}, []
    if not path.exists():
        return {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break
        found[row["index"]] = row
        whole.append(line + "\n")
    path.write_text("".join(whole), encoding="utf-8")
    return found


def _counted(tokens: Iterator[str], most: int = 10) -> dict[str, int]:
    return dict(Counter(tokens).most_common(most))
