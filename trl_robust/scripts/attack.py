"""`trl-robust attack`: one attack on one model."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .attack_settings import ATTACKS, AttackSettings
from .inputs import folder_fault
from .judging import JudgeArguments, loaded

if TYPE_CHECKING:
    from ..attacks import Attack, AttackRow, Generation, Subject
    from ..attacks.loading import Adapter


@dataclass
class AttackArguments(AttackSettings, JudgeArguments):
    """
    Arguments of `trl-robust attack`.

    Args:
        model (`str`):
            Model or adapter to attack: a folder or a hub id; with `model_url` its name there.
        attack (`str`):
            On prompts: `direct` (none), `template`, `prefill`, `many_shot`, `best_of_n`, `gcg`, `pair`; on embeddings
            `soft_suffix`, `embedding`; on hidden states `latent`, `universal`, `refusal_direction`; on weights
            `pruning`, `finetune`.
        data (`str`):
            Requests: a dataset with a `prompt` column, and with `target` (the opening that attacks bring out) and
            `answer` (what a successful response states) where there are such.
        data_split (`str`, *optional*, defaults to `"train"`):
            Its split.
        prompt_column, target_column, answer_column (`str`, *optional*):
            Names of these columns.
        max_rows (`int`, *optional*):
            Attack only the first rows.
        output_dir (`str`, *optional*):
            Where results and report go: a folder without results. By default `attack-results/ATTACK`, with a number
            behind it where that holds results already. A run that was stopped goes on in its folder.
        judge (`str`, *optional*):
            One of `judges`, where one is enough; `auto` is the default of these.
        model_url, model_key_env (`str`, *optional*):
            Base URL of an OpenAI-compatible server, and the environment variable that holds its key. Only attacks on
            prompts that need no weights run there.
        load_in_4bit (`bool`, *optional*, defaults to `False`):
            Whether the weights are brought into NF4.
        adapter (`str`, *optional*, defaults to `"on"`):
            What becomes of an adapter: `on`, `off` or `merged`.
        max_new_tokens, batch_size, max_prompt_tokens (`int`, *optional*):
            Of the generation.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Weight dtype.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether the model's own code may run.
        show_generations (`bool`, *optional*, defaults to `False`):
            Whether the report shows responses. They stand in `generations.jsonl` either way.
        seed (`int`, *optional*, defaults to `0`):
            Seed of what is random in an attack.
    """

    model: str | None = field(default=None, metadata={"help": "Model or adapter to attack: a folder or a hub id."})
    attack: str | None = field(default=None, metadata={"help": "Which attack.", "choices": list(ATTACKS)})
    data: str | None = field(default=None, metadata={"help": "Requests: a file, a folder or a hub id."})
    data_split: str = field(default="train", metadata={"help": "Split of the requests."})
    prompt_column: str = field(default="prompt", metadata={"help": "Column with the requests."})
    target_column: str = field(default="target", metadata={"help": "Column with the openings to bring out."})
    answer_column: str = field(default="answer", metadata={"help": "Column with the answers to look for."})
    max_rows: int | None = field(default=None, metadata={"help": "Attack only the first rows."})
    output_dir: str | None = field(default=None, metadata={"help": "Where results and report go: a new folder."})
    judge: str | None = field(default=None, metadata={"help": "Who judges, where one is enough."})
    model_url: str | None = field(default=None, metadata={"help": "A served model: base URL of the server."})
    model_key_env: str | None = field(default=None, metadata={"help": "A served model: variable with the key."})
    load_in_4bit: bool = field(default=False, metadata={"help": "Whether the weights are brought into NF4."})
    adapter: str = field(
        default="on", metadata={"help": "What becomes of an adapter.", "choices": ["on", "off", "merged"]}
    )
    max_new_tokens: int = field(default=64, metadata={"help": "Length of an answer in tokens."})
    batch_size: int = field(default=16, metadata={"help": "Requests at a time."})
    max_prompt_tokens: int = field(default=1024, metadata={"help": "Longer requests are skipped."})
    dtype: str = field(
        default="auto",
        metadata={"help": "Weight dtype.", "choices": ["auto", "bfloat16", "float16", "float32"]},
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Whether the model's own code may run."})
    show_generations: bool = field(default=False, metadata={"help": "Whether the report shows responses."})
    seed: int = field(default=0, metadata={"help": "Seed of what is random in an attack."})

    def __post_init__(self) -> None:
        if self.judge not in (None, "auto"):
            self.judges = [str(self.judge), *(self.judges or [])]
        if problems := self.faults():
            raise ValueError("\n".join(problems))

    def faults(self) -> list[str]:
        """Everything that is wrong with the arguments, one sentence each."""
        problems = [
            f"`{name}` is missing; {what}."
            for name, what in (
                ("model", "name a model folder or hub id"),
                ("attack", f"choose one of {list(ATTACKS)}"),
                ("data", "name a dataset of requests"),
            )
            if getattr(self, name) is None
        ]
        problems += self.settings_faults(self.attack) + self.judge_faults()
        at_least = dict.fromkeys(("max_rows", "max_new_tokens", "batch_size", "max_prompt_tokens"), 1) | {"seed": 0}
        for name, least in at_least.items():
            if getattr(self, name) is not None and getattr(self, name) < least:
                problems.append(f"`{name}` is {getattr(self, name)}; it must be at least {least}.")
        if self.model_url is not None and (self.load_in_4bit or self.adapter != "on"):
            problems.append("`load_in_4bit` and `adapter` are for models on this machine; remove them or `model_url`.")
        if self.model_key_env is not None and self.model_url is None:
            problems.append("`model_key_env` belongs to `model_url`, which is not given; remove it.")
        folder = self.folder
        if (fault := folder_fault(folder)) is not None:
            problems.append(fault)
        elif (folder / "results.json").exists():
            problems.append(f"`output_dir` {folder} holds results, and nothing is written over. Name another folder.")
        return problems

    @property
    def folder(self) -> Path:
        """`output_dir`, or the first folder of the default's that holds no results."""
        if self.output_dir is not None:
            return Path(self.output_dir)
        folder, number = Path("attack-results") / str(self.attack), 1
        while (folder / "results.json").exists():
            number += 1
            folder = folder.with_name(f"{self.attack}-{number}")
        return folder


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
        if not (_is_request(prompt) and isinstance(target, str | None) and isinstance(answer, str | None)):
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


def _is_request(prompt: Any) -> bool:
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
        if field_name == "templates":
            data[field_name] = None if args.templates is None else read_templates(args.templates)
        elif field_name == "attacker":
            data[field_name] = attacker_of(args)
        else:
            path = args.finetune_data if name == "finetune" else getattr(args, f"attack_{field_name}")
            data[field_name] = None if path is None else rows_for(name, path)
    if name == "pruning" and data["examples"] is None:
        data["examples"] = [{"prompt": ""}]  # the random control reads none
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
    from ..evaluation.lines import Line, Point
    from ..evaluation.suite import judged
    from ..report import results_table, write_report
    from .judging import make_judges

    judges = make_judges(args, rows)
    start = time.perf_counter()
    generations = kept_generations(args, subject, attack, rows)
    verdicts = [[judged(generations, judge)] for judge in judges]
    line = Line(attack.name, (Point(attack),))
    found = JudgedLine(line, [generations], verdicts, [None], None, time.perf_counter() - start)
    entry = line_entry(found, judges, args.seed)
    folder = args.folder
    results = write_results(
        folder,
        [{"name": str(args.model), "attacks": [entry]}],
        [{"model": str(args.model), "attack": attack.name, **row} for row in verdicts[0][0]],
        seed=args.seed,
    )
    page = write_report(folder, show_generations=args.show_generations)
    console = Console()
    console.print(results_table(results))
    console.print(
        f"{entry['n_scored']} scored, {entry['n_errored']} errored, {entry['n_skipped']} skipped; "
        f"judge: {entry['judge']}"
    )
    for other in entry.get("second_judges", []):
        success = "no score" if other["success"] is None else f"{other['success']:.2f}"
        agreement = other["agreement"]["agreement"]
        agree = "no answer scored by both" if agreement is None else f"agrees on {agreement:.2f} of the answers"
        console.print(f"judge {other['judge']}: {success}, {agree}, {other['n_errored']} errored")
    reasons = {row["reason"] for part in verdicts for row in part[0] if row["reason"]}
    for reason in sorted(reasons)[:5]:
        console.print(f"  {reason}", markup=False)
    if entry["judge"] == "refusal_prefix":
        console.print("This judge only looks at the first words: gibberish counts as success, a late refusal as well.")
    console.print(f"Report: {page}")
    return results


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
    from ..evaluation.generalized import Journal
    from ..evaluation.keeping import fingerprint, settings_fault
    from ..recipes import RecipeError
    from .evaluate_generalized import settings_of_attack
    from .evaluate_prompts import weights_of

    place = args.folder / "progress"
    settings = {
        "model": [str(args.model), weights_of(Path(str(args.model)).expanduser()), args.adapter, args.load_in_4bit],
        "attack": settings_of_attack(attack),
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
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(
            f"Interrupted. What is done stands in {args.folder}; the same command goes on from there."
        ) from stop


if __name__ == "__main__":
    from ..cli import main as cli_main

    sys.exit(cli_main(["attack", *sys.argv[1:]]))
