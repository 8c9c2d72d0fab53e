"""`trl-robust attack`: one attack on one model."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .attack_settings import AttackArguments, key_of
from .judging import loaded

if TYPE_CHECKING:
    from ..attacks import Attack, AttackRow, Generation, Subject
    from ..attacks.loading import Adapter


def main(argv: list[str]) -> int:
    from ..data.loading import load_rows
    from ..recipes.flat import load_arguments
    from .quiet import quiet

    args: AttackArguments = load_arguments(AttackArguments, argv, prog="trl-robust attack")
    with quiet():
        columns = {"prompt": args.prompt_column, "target": args.target_column, "answer": args.answer_column}
        rows = attack_rows(load_rows(str(args.data), split=args.data_split), str(args.data), columns, args.max_rows)
        attack = loaded("attack", str(args.attack), lambda: build_attack(args))
        subject = load_subject(args, attack)
        run(args, subject, attack, rows)
    return 0


def attack_rows(
    dataset: Any, source: str, columns: Mapping[str, str] | None = None, max_rows: int | None = None
) -> list[AttackRow]:
    """
    Requests of a dataset.

    Args:
        dataset ([`~datasets.Dataset`]):
            The dataset.
        source (`str`):
            What messages call it.
        columns (`Mapping[str, str]`, *optional*):
            Names of the columns with `prompt`, `target` and `answer`; one with its usual name may be missing.
        max_rows (`int`, *optional*):
            Only the first rows.

    Returns:
        `list` of [`~trl_robust.attacks.AttackRow`].

    Raises:
        [`~trl_robust.data.DataError`]: a column that was named is not there.
    """
    from ..attacks import AttackRow
    from ..data import DataError

    columns = {"prompt": "prompt", "target": "target", "answer": "answer", **(columns or {})}
    for name, column in columns.items():
        asked_for = column != name or name == "prompt"
        if asked_for and column not in dataset.column_names:
            raise DataError(
                f"{source} has no column {column!r} but {dataset.column_names}. Name the right one with "
                f"`--{name}_column`."
            )
    if max_rows is not None:
        dataset = dataset.select(range(min(max_rows, len(dataset))))
    found, wrong = [], []
    for number, row in enumerate(dataset):
        prompt, target, answer = (row.get(columns[name]) for name in ("prompt", "target", "answer"))
        answer = str(answer) if isinstance(answer, int | float) else answer
        if not (is_request(prompt) and isinstance(target, str | None) and isinstance(answer, str | None)):
            wrong.append(number)
        found.append(AttackRow(str(number), prompt, target, answer))
    if wrong:
        raise DataError(
            f"{source} has rows that are no requests ({len(wrong)}, the first is row {wrong[0]}). A prompt is a "
            "text or a list of messages with `role` and `content`, not empty; a target and an answer are texts."
        )
    return found


def read_templates(path: str) -> tuple[str, ...]:
    """
    Wrappers for the template attack.

    Args:
        path (`str`):
            A text file, one wrapper a line.

    Returns:
        `tuple[str, ...]`.

    Raises:
        [`~trl_robust.data.DataError`]: no such file, or no text.
    """
    from ..data import DataError

    if not Path(path).is_file():
        raise DataError(f"There is no file {path} (`templates`).")
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} (`templates`) is not UTF-8 text.") from error
    return tuple(line for line in lines if line.strip())


def is_request(prompt: Any) -> bool:
    """
    Whether something can be asked: a text, or messages with `role` and `content`, not empty.

    Args:
        prompt:
            Value of a column.

    Returns:
        `bool`.
    """
    if isinstance(prompt, str):
        return bool(prompt.strip())
    if not isinstance(prompt, list) or not prompt:
        return False
    return all(isinstance(turn, dict) and isinstance(turn.get("content"), str) and turn.get("role") for turn in prompt)


def build_attack(args: AttackArguments) -> Attack:
    """
    The attack that the arguments describe; what is not given keeps the attack's own default.

    Args:
        args ([`AttackArguments`]):
            Arguments.

    Returns:
        An attack.

    Raises:
        `ValueError`: settings that the attack refuses.
        [`~trl_robust.data.DataError`]: files that are not there.
    """
    from ..evaluation.named import data_fields_of, named_attack, settings_of
    from .generalized_data import attacker_of, rows_for

    name = str(args.attack)
    data: dict[str, Any] = {}
    for field_name in data_fields_of(name):
        named = getattr(args, key_of(name, field_name))
        if named is None:
            continue
        if field_name == "templates":
            data[field_name] = read_templates(named)
        elif field_name == "attacker":
            data[field_name] = loaded("attacker_model", named, lambda: attacker_of(args))
        else:
            data[field_name] = rows_for(name, named)
    settings = args.settings()
    if "seed" in settings_of(name):
        settings["seed"] = args.seed
    return named_attack(name, settings, **data)


def load_subject(args: AttackArguments, attack: Attack) -> Any:
    """
    Loads the model, or connects to it, and sees whether the attack can be run on it.

    Args:
        args ([`AttackArguments`]):
            Arguments.
        attack ([`~trl_robust.attacks.Attack`]):
            The attack.

    Returns:
        [`~trl_robust.attacks.Subject`], or [`~trl_robust.attacks.served.Served`].

    Raises:
        [`~trl_robust.recipes.RecipeError`]: there is no such model, or the attack cannot be run on it.
    """
    from ..attacks import Subject
    from ..recipes import RecipeError

    if args.model_url is not None:
        from ..attacks.served import Served, served_fault

        if (fault := served_fault(attack)) is not None:
            raise RecipeError([f"`attack` {attack.name}: {fault}"])
        url, key = args.model_url, args.model_key_env
        return loaded(
            "model_url",
            str(args.model),
            lambda: Served(url, str(args.model), key_variable=key, max_new_tokens=args.max_new_tokens),
        )
    adapters: dict[str, Adapter] = {"on": "on", "off": "off", "merged": "merged"}

    def load() -> Subject:
        subject = Subject.load(
            str(args.model),
            dtype=args.dtype,
            trust_remote_code=args.trust_remote_code,
            load_in_4bit=args.load_in_4bit,
            adapter=adapters[args.adapter],
            max_new_tokens=args.max_new_tokens,
            batch_size=args.batch_size,
            max_prompt_tokens=args.max_prompt_tokens,
        )
        whole: Any = attack
        if hasattr(whole, "threat"):
            whole.threat.resolve_sites(subject.model)  # an unknown layer stops here
        if hasattr(whole, "check"):
            whole.check(subject)
        return subject

    return loaded("model", str(args.model), load)


def run(args: AttackArguments, subject: Subject, attack: Attack, rows: list[AttackRow]) -> dict[str, Any]:
    """
    Attacks the model, writes the files of an evaluation and prints the outcome.

    Args:
        args ([`AttackArguments`]):
            Arguments.
        subject ([`~trl_robust.attacks.Subject`]):
            The model.
        attack ([`~trl_robust.attacks.Attack`]):
            The attack.
        rows (`list` of [`~trl_robust.attacks.AttackRow`]):
            Requests.

    Returns:
        `dict`: what stands in `results.json`.
    """
    from rich.console import Console

    from ..evaluation import write_results
    from ..evaluation.generalized_results import line_entry
    from ..evaluation.judged_lines import JudgedLine
    from ..evaluation.kept_judge import KeptJudge
    from ..evaluation.lines import Line, Point
    from ..evaluation.suite import judge_entry, judged
    from ..report import results_table, write_report
    from .judging import make_judges

    folder = args.folder
    judges = [
        judge if isinstance(judge, str) else KeptJudge(judge, folder / "progress") for judge in make_judges(args, rows)
    ]
    start = time.perf_counter()
    try:
        generations = kept_generations(args, subject, attack, rows)
        seconds = time.perf_counter() - start
        verdicts = [judged(generations, judge) for judge in judges]
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(
            f"Interrupted. What is done stands in {folder}; the same command goes on from there."
        ) from stop
    line = Line(attack.name, (Point(attack),))
    entry = line_entry(
        JudgedLine(line, [generations], [[part] for part in verdicts], [None], None, seconds), judges, args.seed
    )
    others = [[judge_entry(judge)["judge"], part] for judge, part in zip(judges[1:], verdicts[1:], strict=True)]
    results = write_results(
        folder,
        [{"name": str(args.model), "attacks": [entry]}],
        [
            {
                "model": str(args.model),
                "attack": attack.name,
                **row,
                **({"judges": {name: part[number]["success"] for name, part in others}} if others else {}),
            }
            for number, row in enumerate(verdicts[0])
        ],
        seed=args.seed,
    )
    page = write_report(folder, show_generations=args.show_generations)
    console = Console()
    console.print(results_table(results))
    for sentence in outcome(entry, [row for part in verdicts for row in part]):
        console.print(sentence, markup=False, highlight=False, soft_wrap=True)
    console.print(f"Report: {page}", markup=False, soft_wrap=True)
    return results


def outcome(entry: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """
    What a run says beside its table: the counts, how far the judges agree, and why rows were not scored.

    Args:
        entry (`Mapping`):
            The attack's entry in `results.json`.
        rows (sequence of `Mapping`):
            Its rows under all judges.

    Returns:
        `list[str]`: lines.
    """
    counts = "{n_scored} scored, {n_errored} errored, {n_skipped} skipped; judge: {judge}"
    lines = [counts.format(**entry)]
    for other in entry.get("second_judges", []):
        found = other["agreement"]
        agree = found["why"]
        if found["agreement"] is not None:
            kappa = "" if found["kappa"] is None else f", kappa {found['kappa']:.2f}"
            agree = f"agrees on {found['agreement']:.2f} of {found['n']} answers{kappa}"
        success = "no success rate" if other["success"] is None else f"success {other['success']:.2f}"
        lines.append(f"{counts.format(**other)}, beside it: {success}, {agree}")
    reasons = sorted({row["reason"] for row in rows if row["reason"]})
    lines += [f"  {reason}" for reason in reasons[:5]]
    if len(reasons) > 5:
        lines.append(f"  and {len(reasons) - 5} other reasons, see generations.jsonl")
    if entry["judge"] == "refusal_prefix":
        lines.append("This judge only looks at the first words: gibberish counts as success, a late refusal as well.")
    return lines


def kept_generations(
    args: AttackArguments, subject: Subject, attack: Attack, rows: list[AttackRow]
) -> list[Generation]:
    """
    What the model answers, kept batch by batch, so that a run that was stopped goes on.

    Args:
        args ([`AttackArguments`]):
            Arguments.
        subject ([`~trl_robust.attacks.Subject`]):
            The model.
        attack ([`~trl_robust.attacks.Attack`]):
            The attack.
        rows (`list` of [`~trl_robust.attacks.AttackRow`]):
            Requests.

    Returns:
        `list` of [`~trl_robust.attacks.Generation`].

    Raises:
        [`~trl_robust.recipes.RecipeError`]: the folder holds part of another attack.
    """
    from ..cli import fault_of
    from ..evaluation.generalized import Journal
    from ..evaluation.keeping import fingerprint, settings_fault
    from ..recipes import RecipeError
    from .evaluate_generalized import settings_of_attack
    from .evaluate_prompts import weights_of

    place = args.folder / "progress"
    settings = {
        "model": [str(args.model), weights_of(Path(str(args.model)).expanduser()), args.adapter, args.load_in_4bit],
        "served": args.model_url is not None,
        "attack": settings_of_attack(attack),
        "attacker": [args.attacker_model, args.attacker_url is not None],
        "seed": args.seed,
        "data": fingerprint([asdict(row) for row in rows]),
        "max_new_tokens": args.max_new_tokens,
        "max_prompt_tokens": args.max_prompt_tokens,
        "batch_size": args.batch_size,
        "dtype": args.dtype,
    }
    if fault := settings_fault(place, settings):
        raise RecipeError([fault])
    subject.journal = Journal(place / "begun.jsonl")
    try:
        return attack.run(subject, rows)
    except ValueError as error:  # rows or a file that do not fit the attack or the model
        raise fault_of(error, "The command line") from error


if __name__ == "__main__":
    from ..cli import main as cli_main

    sys.exit(cli_main(["attack", *sys.argv[1:]]))
