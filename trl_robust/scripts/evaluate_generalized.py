"""The suite `generalized` of `trl-robust evaluate`: attacks at several budgets, and the factor of safety."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..evaluation.generalized import GeneralizedSuite, ModelRun
    from .generalized_arguments import GeneralizedArguments
    from .generalized_models import Target


def generalized(args: GeneralizedArguments) -> None:
    """
    The suite `generalized`: attacks, judges, measures, writes and prints.

    Args:
        args ([`GeneralizedArguments`]):
            Arguments.

    Raises:
        [`~trl_robust.recipes.RecipeError`]: what does not fit together, before anything is attacked.
    """
    from rich.console import Console

    from ..evaluation.generalized import ModelRun
    from ..evaluation.judged_lines import broken_by_prompts, judge_run, measure_loads, needs_load
    from ..evaluation.keeping import settings_fault
    from ..evaluation.kept_judge import KeptJudge
    from ..recipes import RecipeError
    from .generalized_models import check_attacks, check_models, free, load, targets_of
    from .judging import make_judges

    targets = targets_of(args)
    check_models(args, targets)
    suite, left_out = suite_of(args)
    for name, why in left_out.items():
        Console(stderr=True).print(f"Left out: {name} {why}.", markup=False)
    place = args.folder / "progress"
    if fault := settings_fault(place, settings_of(args, suite, targets)):
        raise RecipeError([fault])
    runs = [ModelRun(suite, target.name, place, f"{number:02d}") for number, target in enumerate(targets)]
    try:
        for run, target in zip(runs, targets, strict=True):
            if run.todo():
                subject = load(args, target)
                check_attacks(suite, subject, target)
                run.run(subject)
                del subject
                free()
        judges = [
            judge if isinstance(judge, str) else KeptJudge(judge, place) for judge in make_judges(args, suite.requests)
        ]
        lines = [judge_run(run, judges) for run in runs]
        forget_models(judges)
        free()
        loads: list[dict[str, Any]] = [{} for _ in runs]
        if args.model_url is None and any(needs_load(line) for line in suite.lines):
            for number, target in enumerate(targets):
                if not broken_by_prompts(lines[number]):
                    continue
                loads[number] = dict(measure_loads(load(args, target), lines[number], seed=args.seed))
                free()
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(
            f"Interrupted. What is done stands in {args.folder}; the same command goes on from there."
        ) from stop
    finish(args, targets, runs, judges, lines, loads, left_out)


def suite_of(args: GeneralizedArguments) -> tuple[GeneralizedSuite, dict[str, str]]:
    """
    What is asked of every model.

    Args:
        args ([`GeneralizedArguments`]):
            Arguments.

    Returns:
        `tuple`: [`~trl_robust.evaluation.generalized.GeneralizedSuite`], and the attacks that are left out for want of
        rows.

    Raises:
        [`~trl_robust.recipes.RecipeError`]: listing every fault of the attacks.
        [`~trl_robust.data.DataError`]: a dataset that is not there or lacks a column.
    """
    from ..evaluation.generalized import GeneralizedSuite
    from ..evaluation.lines import map_lines
    from ..evaluation.lm_eval import MissingLmEvalError, check_installed
    from ..recipes import RecipeError
    from .generalized_data import lines_of, requests_of, texts_of

    requests = requests_of(args, args.data)
    lines, left_out = lines_of(args)
    faults = []
    if args.model_url is not None:
        from ..attacks.served import served_fault

        kept = []
        for line in lines:
            if (fault := served_fault(line.attack)) is None:
                kept.append(line)
            elif line.control_of is not None:
                left_out[line.name] = "needs the tokenizer"
            else:
                faults.append(f"`{line.name}`: {fault}")
        lines = kept
    maps = []
    try:
        maps = map_lines(args.map_sites or [], args.map_radii or [], args.map_steps, args.seed)
        if args.benchmarks:
            check_installed()
    except (ValueError, MissingLmEvalError) as error:
        faults.append(str(error))
    if faults:
        raise RecipeError(faults)
    suite = GeneralizedSuite(
        lines,
        requests,
        requests_of(args, args.harmless_data),
        requests_of(args, args.utility_data, answers=True),
        texts_of(args.perplexity_data),
        args.capability_rows,
        maps,
        tuple(args.benchmarks or ()),
        args.benchmark_limit,
    )
    return suite, left_out


def settings_of(args: GeneralizedArguments, suite: GeneralizedSuite, targets: list[Target]) -> dict[str, Any]:
    """Everything that settles the answers, so that a run is not gone on with under other settings."""
    from ..evaluation.generalized import VERSION
    from ..evaluation.keeping import fingerprint
    from .evaluate_prompts import weights_of

    def rows(part: Any) -> str:
        return fingerprint([dataclasses.asdict(row) for row in part])

    attacks = {}
    for line in [*suite.lines, *suite.map_lines]:
        attacks[line.name] = [settings_of_attack(point.attack) for point in line.points]
    return {
        "version": VERSION,
        "models": {target.name: [target.variant, weights_of(Path(target.path).expanduser())] for target in targets},
        "model_url": args.model_url is not None,
        "attacker": [args.attacker_model, args.attacker_url is not None, args.seed],
        "attacks": attacks,
        "data": rows(suite.requests),
        "harmless_data": rows(suite.lookalikes),
        "utility_data": rows(suite.questions),
        "perplexity_data": fingerprint(list(suite.texts)),
        "capability_rows": args.capability_rows,
        "benchmarks": [list(suite.benchmarks), suite.benchmark_limit],
        "max_new_tokens": args.max_new_tokens,
        "max_prompt_tokens": args.max_prompt_tokens,
        "batch_size": args.batch_size,
        "dtype": args.dtype,
    }


def settings_of_attack(attack: Any) -> dict[str, Any]:
    """
    Name, version and all fields of an attack; rows by what they say, another model by its name.

    Args:
        attack ([`~trl_robust.attacks.Attack`]):
            The attack.

    Returns:
        `dict`.
    """
    from ..evaluation.keeping import fingerprint

    values = {item.name: getattr(attack, item.name) for item in dataclasses.fields(attack)}
    shown = {name: fingerprint(value) if isinstance(value, list) else value for name, value in values.items()}
    if "attacker" in shown:
        shown["attacker"] = type(values["attacker"]).__name__
    return {"name": attack.name, "version": attack.version, **shown}


def forget_models(judges: list[Any]) -> None:
    """Lets go of the models behind the judges: their verdicts are known, and the memory is needed."""
    for judge in judges:
        if not isinstance(judge, str):
            judge.forget()


def finish(
    args: GeneralizedArguments,
    targets: list[Target],
    runs: list[ModelRun],
    judges: list[Any],
    lines: list[list[Any]],
    loads: list[dict[str, Any]],
    left_out: dict[str, str],
) -> None:
    """
    Writes the files of an evaluation and prints the outcome.

    Args:
        args ([`GeneralizedArguments`]):
            Arguments.
        targets (`list` of [`Target`]):
            Models.
        runs (`list` of [`~trl_robust.evaluation.generalized.ModelRun`]):
            Their runs.
        judges (`list`):
            Who judged.
        lines (`list[list[JudgedLine]]`):
            Their judged lines.
        loads (`list[dict]`):
            Their loads.
        left_out (`dict[str, str]`):
            Attacks that were not run, and what they need.
    """
    from rich.console import Console

    from ..evaluation.generalized import VERSION
    from ..evaluation.generalized_results import generation_rows, model_entry, proxies
    from ..evaluation.suite import judge_entry, write_results
    from ..report import results_table, write_report

    entries = []
    for number, (target, run) in enumerate(zip(targets, runs, strict=True)):
        own = loads_for(number, targets, loads)
        entry = model_entry(run, lines[number], judges, own, thresholds=sorted(set(args.thresholds)), seed=args.seed)
        entries.append({**entry, "path": target.path, "variant": target.variant})
    if args.unlearning_of is not None:
        add_unlearning_scores(args, entries)
    rows = [row for number, run in enumerate(runs) for row in generation_rows(run, lines[number], judges)]
    shown = [
        {"name": one["judge"], "version": one["judge_version"], "settings": one["judge_settings"]}
        for one in map(judge_entry, judges)
    ]
    results = write_results(
        args.folder,
        entries,
        rows,
        seed=args.seed,
        suite={"name": args.suite, "version": VERSION, "settings": suite_settings(args), "left_out": left_out},
        judges=shown,
        proxy=proxies(entries, max(args.thresholds), seed=args.seed),
    )
    page = write_report(args.folder, show_generations=args.show_generations)
    console = Console()
    console.print(results_table(results))
    for entry in entries:
        counts = [sum(one[f"n_{what}"] for one in entry["attacks"]) for what in ("scored", "errored", "skipped")]
        console.print(
            f"{entry['name']}: {counts[0]} scored, {counts[1]} errored, {counts[2]} skipped, "
            f"{entry['cost']['seconds']:.0f} s",
            markup=False,
        )
    for reason in sorted({row["reason"] for row in rows if row["reason"]})[:5]:
        console.print(f"  {reason}", markup=False)
    if shown[0]["name"] == "refusal_prefix":
        console.print("This judge only looks at the first words: gibberish counts as success, a late refusal as well.")
    console.print(f"Report: {page}", markup=False)


def loads_for(number: int, targets: list[Target], loads: list[dict[str, Any]]) -> dict[str, Any]:
    """
    For every latent attack the load measured on this model; where no prompt broke it, the largest one measured.

    Args:
        number (`int`):
            Which model.
        targets (`list` of [`Target`]):
            Models.
        loads (`list[dict]`):
            Loads of all models by attack.

    Returns:
        `dict`: attack -> name of the model on which it was measured, and the load.
    """
    found = {}
    for name in dict.fromkeys(name for one in loads for name in one):
        own = loads[number].get(name)
        measured = [(targets[i].name, one[name]) for i, one in enumerate(loads) if name in one and one[name]["load"]]
        if own is not None and (own["load"] or not measured):
            found[name] = (targets[number].name, own)
        elif measured:
            found[name] = max(measured, key=lambda pair: pair[1]["load"])
    return found


def add_unlearning_scores(args: GeneralizedArguments, entries: list[dict[str, Any]]) -> None:
    """Puts the unlearning score into every entry but that of the model before unlearning."""
    from ..evaluation.unlearning import unlearning_score

    before = next(entry for entry in entries if entry["name"] == args.unlearning_of)
    for entry in entries:
        if entry is not before:
            entry["unlearning"] = unlearning_score(
                before, entry, forget_chance=args.forget_chance, utility_chance=args.utility_chance
            )


def suite_settings(args: GeneralizedArguments) -> dict[str, Any]:
    """What was asked, for `results.json`: everything but addresses and places."""
    names = ("attacks", "only", "controls", "thresholds", "capability_rows", "max_rows", "max_new_tokens", "dtype")
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}
