"""The suite `prompts` of `trl-robust evaluate`: how answers hold over several wordings of each question."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .judging import loaded

if TYPE_CHECKING:
    from .evaluate import EvaluateArguments


def prompts(args: EvaluateArguments) -> None:
    """
    The suite `prompts`: answers, judges, measures, writes and prints.

    Args:
        args ([`EvaluateArguments`]):
            Arguments.
    """
    from ..data.loading import load_rows
    from ..evaluation.alpaca import read_outputs
    from ..evaluation.keeping import settings_fault
    from ..evaluation.prompt_suite import ModelRun
    from ..evaluation.wordings import cases_of
    from ..recipes import RecipeError

    names = [str(name) for name in args.model or []]
    rows = load_rows(str(args.data), split=args.data_split)
    if args.max_cases is not None:
        rows = rows.select(range(min(args.max_cases, len(rows))))
    cases = cases_of(rows, str(args.data), read_outputs(args.references) if args.references else None)
    check_columns(args, cases)
    check_models(args, names)
    judge = None if args.judge in ("reward", "llm") else make_judge(args)
    suite = make_suite(args, cases)
    place = args.folder / "progress"
    if fault := settings_fault(place, settings_of(args, suite, names)):
        raise RecipeError([fault])
    runs = [ModelRun(suite, name, place, f"{number:02d}") for number, name in enumerate(names)]
    try:
        for run in runs:
            if run.unanswered or run.without_posix:
                run.answer(load_model(args, run.name))
        if args.judge in ("reward", "llm"):
            judge = make_judge(args)  # only now, when no model that is judged takes up memory any more
        for run in runs:
            if judge is not None:
                run.score(judge)
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(
            f"Interrupted. What is done stands in {args.folder}; the same command goes on from there."
        ) from stop
    finish(args, runs, judge)


def check_columns(args: EvaluateArguments, cases: list[Any]) -> None:
    """
    Refuses cases that lack what the judge needs.

    Args:
        args ([`EvaluateArguments`]):
            Arguments.
        cases (`list` of [`~trl_robust.evaluation.wordings.Case`]):
            Cases.

    Raises:
        [`~trl_robust.data.DataError`]: naming them.
    """
    from ..data import DataError

    column = {"exact": "answer", "reward": "reference", "llm": "reference", "endpoint": "reference"}.get(
        str(args.judge)
    )
    if column is None:
        return
    lacking = [case.id for case in cases if not getattr(case, column)]
    if not lacking:
        return
    what = {
        "answer": (
            "Add an `answer` to every row, which a right response states word for word, or choose another judge "
            "(`reward`, `llm`, `endpoint`)."
        ),
        "reference": (
            "Add a `reference` to every row, the baseline's answer to the original question, or give the baseline's "
            "outputs in AlpacaEval's form with `--references`."
        ),
    }
    raise DataError(
        f"The judge {args.judge} needs the column `{column}`, and {len(lacking)} of {len(cases)} cases in {args.data} "
        f"have none (the first is {lacking[0]}). {what[column]}"
    )


def check_models(args: EvaluateArguments, names: list[str]) -> None:
    """
    Refuses models that cannot be there, before the first of them has worked for hours.

    Args:
        args ([`EvaluateArguments`]):
            Arguments.
        names (`list[str]`):
            Models.

    Raises:
        [`~trl_robust.recipes.RecipeError`]: naming them.
    """
    from ..data.loading import is_local, where_looked
    from ..recipes import RecipeError

    wanted = [("model", name) for name in names]
    if args.judge in ("reward", "llm"):
        wanted.append(("judge_model", str(args.judge_model)))
    faults = [
        f"`{key}` {name} is not there: {where_looked(name)} Correct the path, or give a hub id."
        for key, name in wanted
        if is_local(name) and not Path(name).expanduser().is_dir()
    ]
    if faults:
        raise RecipeError(faults)


def make_suite(args: EvaluateArguments, cases: list[Any]) -> Any:
    """What is asked, as the arguments have it ([`~trl_robust.evaluation.prompt_suite.PromptSuite`])."""
    from ..evaluation.prompt_suite import PromptSuite
    from ..evaluation.sampling import Sampling

    temperature = 0.0 if args.greedy else 1.0 if args.temperature is None else args.temperature
    sampling = Sampling(temperature, 0.9 if args.top_p is None else args.top_p, args.seed)
    return PromptSuite(cases, sampling, args.samples_of_original, args.posix)


def settings_of(args: EvaluateArguments, suite: Any, names: list[str]) -> dict[str, Any]:
    """Everything that settles the answers, so that a run is not gone on with under other settings."""
    from ..evaluation.prompt_suite import VERSION, fingerprint_of_cases

    return {
        "version": VERSION,
        "models": {name: weights_of(Path(name).expanduser()) for name in names},
        "data": fingerprint_of_cases(suite.cases),
        "sampling": asdict(suite.sampling),
        "samples_of_original": args.samples_of_original,
        "max_new_tokens": args.max_new_tokens,
        "max_prompt_tokens": args.max_prompt_tokens,
        "dtype": args.dtype,
    }


def weights_of(folder: Path) -> list[list[Any]]:
    """
    Size and time of a model's files here: weights that were trained anew in the same folder are another model.

    Args:
        folder (`Path`):
            The model's folder.

    Returns:
        `list`: name, size and time of every file; empty where there is no such folder.
    """
    kinds = ("*.safetensors", "*.bin", "*.json")
    files = sorted(path for kind in kinds for path in folder.glob(kind)) if folder.is_dir() else []
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]


def load_model(args: EvaluateArguments, name: str) -> Any:
    """
    Loads a model.

    Args:
        args ([`EvaluateArguments`]):
            Arguments.
        name (`str`):
            Folder or hub id.

    Returns:
        [`~trl_robust.attacks.Subject`].

    Raises:
        [`~trl_robust.recipes.RecipeError`]: it cannot be loaded.
    """
    from ..attacks import Subject

    return loaded(
        "model",
        name,
        lambda: Subject.load(
            name,
            dtype=args.dtype,
            trust_remote_code=args.trust_remote_code,
            max_new_tokens=args.max_new_tokens,
            batch_size=args.batch_size,
            max_prompt_tokens=args.max_prompt_tokens,
        ),
    )


def make_judge(args: EvaluateArguments) -> Any:
    """
    The judge that the arguments describe.

    Args:
        args ([`EvaluateArguments`]):
            Arguments.

    Returns:
        A judge, or `None` without one.

    Raises:
        [`~trl_robust.recipes.RecipeError`]: it cannot be loaded.
        [`~trl_robust.data.DataError`]: annotations that are none.
    """
    from ..attacks import Subject
    from ..evaluation.alpaca import read_annotations
    from ..evaluation.llm_judges import EndpointJudge, LLMJudge
    from ..evaluation.preference_judges import AnnotationsJudge, ExactJudge, RewardJudge

    name, code = str(args.judge_model), args.judge_trust_remote_code
    if args.judge == "exact":
        return ExactJudge()
    if args.judge == "annotations":
        found, annotators = read_annotations(str(args.judge_annotations))
        return AnnotationsJudge(found, source=str(args.judge_annotations), annotators=annotators)
    if args.judge == "endpoint":
        return loaded(
            "judge_url",
            str(args.judge_url),
            lambda: EndpointJudge(
                str(args.judge_url),
                name,
                key_variable=args.judge_key_env,
                seed=args.seed,
                timeout=args.judge_timeout or 60.0,
            ),
        )
    if args.judge == "reward":
        return loaded(
            "judge_model",
            name,
            lambda: RewardJudge.load(
                name,
                tau=args.judge_tau or 1.0,
                batch_size=args.batch_size,
                dtype=args.dtype,
                trust_remote_code=code,
            ),
        )
    if args.judge == "llm":
        subject = loaded(
            "judge_model",
            name,
            lambda: Subject.load(name, dtype=args.dtype, trust_remote_code=code, batch_size=args.batch_size),
        )
        # Two answers of full length and their question; what does not fit the judge is errored, not cut.
        subject.max_prompt_tokens = getattr(subject.model.config, "max_position_embeddings", None) or 8192
        return LLMJudge(subject, seed=args.seed, source=name)
    return None


def finish(args: EvaluateArguments, runs: list[Any], judge: Any) -> None:
    """
    Writes the files of an evaluation and prints the outcome.

    Args:
        args ([`EvaluateArguments`]):
            Arguments.
        runs (`list` of [`~trl_robust.evaluation.prompt_suite.ModelRun`]):
            Models that have answered.
        judge:
            Who judged, or `None`.
    """
    from rich.console import Console

    from ..evaluation.alpaca import OUTPUTS, write_outputs
    from ..evaluation.prompt_suite import compared
    from ..evaluation.rankings import ranking_agreement
    from ..evaluation.suite import write_results
    from ..report.prompts import prompts_table, write_prompts_report

    entries = []
    for run in runs:
        entry = run.entry(judge, seed=args.seed)
        if judge is not None and run is not runs[0]:
            entry["compared"] = compared(runs[0], run, seed=args.seed)
        entries.append({"name": run.name, "attacks": [], "prompts": entry})
        questions = [case.question for case in run.suite.cases]
        write_outputs(args.folder / OUTPUTS, run.name, questions, [run.responses(case) for case in run.suite.cases])
    more: dict[str, Any] = {"suite": args.suite, "seed": args.seed, "generation": generation_of(args)}
    if judge is not None and len(runs) > 1:
        more["ranking_agreement"] = ranking_agreement([run.matrix() for run in runs], seed=args.seed)
    rows = [row for run in runs for row in run.generations(judge is not None)]
    results = write_results(args.folder, entries, rows, **more)
    page = write_prompts_report(args.folder, show_generations=args.show_generations)
    console = Console()
    console.print(prompts_table(results))
    for run, entry in zip(runs, entries, strict=True):
        counts = ", ".join(
            f"{count} {name.removeprefix('n_')}"
            for name, count in entry["prompts"]["counts"].items()  # type: ignore[index]
        )
        console.print(f"{run.name}: {counts}", markup=False)
    for reason in sorted({row["reason"] for row in rows if row["reason"]})[:5]:
        console.print(f"  {reason}", markup=False)
    if judge is None:
        console.print(
            "There is no judge: only agreement, POSIX and lengths were measured, and nothing says which answers are "
            "good. Name one with `--judge`."
        )
    console.print(f"Report: {page}", markup=False)


def generation_of(args: EvaluateArguments) -> dict[str, Any]:
    """How answers were made, for `results.json`."""
    return {
        "data": args.data,
        "temperature": 0.0 if args.greedy else 1.0 if args.temperature is None else args.temperature,
        "top_p": None if args.greedy else 0.9 if args.top_p is None else args.top_p,
        "max_new_tokens": args.max_new_tokens,
        "max_prompt_tokens": args.max_prompt_tokens,
        "samples_of_original": args.samples_of_original,
        "dtype": args.dtype,
    }
