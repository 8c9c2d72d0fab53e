"""`trl-robust attack`: one attack on one model."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from ..inner.pgd import Optimizer
from ..threat.balls import Ball, Norm
from ..threat.model import RadiusUnit
from ..threat.sites import Stream
from .inputs import folder_fault

if TYPE_CHECKING:
    from ..attacks import Attack, AttackRow, Subject

ATTACKS = ("direct", "template", "prefill", "latent", "embedding", "finetune")


@dataclass
class AttackArguments:
    """
    Arguments of `trl-robust attack`. A key that an attack does not have is refused, not ignored.

    Args:
        model (`str`):
            Model or adapter to attack: a folder or a hub id.
        attack (`str`):
            `direct` (none), `template`, `prefill`, `latent`, `embedding` or `finetune`.
        data (`str`):
            Requests: a dataset with a `prompt` column, and with `target` (the opening that prefill, latent and
            embedding attacks bring out) and `answer` (what a successful response states) where there are such.
        data_split (`str`, *optional*, defaults to `"train"`):
            Its split.
        prompt_column, target_column, answer_column (`str`, *optional*):
            Names of these columns.
        max_rows (`int`, *optional*):
            Attack only the first rows.
        output_dir (`str`, *optional*):
            Where results and report go: a folder without results. By default `attack-results/ATTACK`, with a number
            behind it where that holds results already.
        judge (`str`, *optional*, defaults to `"auto"`):
            `exact` (the response states the answer), `refusal_prefix` (the response does not begin as refusals do; a
            weak judge), or `auto`: exact where every row has an answer.
        templates (`str`, *optional*):
            For `template`: a text file, one wrapper a line, with the mark `{prompt}`.
        attack_* (*optional*):
            For `latent` and `embedding`: sites, stream, positions, norm, radius, radius_unit, ball, steps,
            learning_rate, optimizer, objective (`targeted` or `random`), as in a training recipe.
        finetune_data (`str`, *optional*):
            For `finetune`: a dataset of `prompt` and `completion`, about other requests than `data`.
        finetune_steps, finetune_learning_rate, finetune_batch_size (*optional*):
            For `finetune`.
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
    judge: Literal["auto", "exact", "refusal_prefix"] = field(default="auto", metadata={"help": "Who judges."})
    templates: str | None = field(default=None, metadata={"help": "template: file with one wrapper a line."})
    attack_sites: list[str] | None = field(default=None, metadata={"help": "latent, embedding: where."})
    attack_stream: str | None = field(
        default=None, metadata={"help": "latent, embedding: what is perturbed.", "choices": list(get_args(Stream))}
    )
    attack_positions: str | None = field(
        default=None, metadata={"help": "latent, embedding: which tokens.", "choices": ["prompt", "completion", "all"]}
    )
    attack_norm: str | None = field(
        default=None, metadata={"help": "latent, embedding: norm of the ball.", "choices": list(get_args(Norm))}
    )
    attack_radius: float | None = field(default=None, metadata={"help": "latent, embedding: radius."})
    attack_radius_unit: str | None = field(
        default=None,
        metadata={"help": "latent, embedding: unit of the radius.", "choices": list(get_args(RadiusUnit))},
    )
    attack_ball: str | None = field(
        default=None,
        metadata={"help": "latent, embedding: one ball a token, or one a row.", "choices": list(get_args(Ball))},
    )
    attack_steps: int | None = field(default=None, metadata={"help": "latent, embedding: steps of the search."})
    attack_learning_rate: float | None = field(default=None, metadata={"help": "latent, embedding: of adamw."})
    attack_optimizer: str | None = field(
        default=None, metadata={"help": "latent, embedding: of the search.", "choices": list(get_args(Optimizer))}
    )
    attack_objective: str | None = field(
        default=None,
        metadata={
            "help": "latent, embedding: the worst perturbation, or a random one.",
            "choices": ["targeted", "random"],
        },
    )
    finetune_data: str | None = field(default=None, metadata={"help": "finetune: prompt-completion rows."})
    finetune_steps: int | None = field(default=None, metadata={"help": "finetune: optimiser steps."})
    finetune_learning_rate: float | None = field(default=None, metadata={"help": "finetune: learning rate."})
    finetune_batch_size: int | None = field(default=None, metadata={"help": "finetune: examples in a step."})
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
        owners = {"attack_": ("latent", "embedding"), "finetune_": ("finetune",), "templates": ("template",)}
        for prefix, attacks in owners.items():
            given = [name for name in self._given() if name.startswith(prefix)]
            if given and self.attack is not None and self.attack not in attacks:
                problems.append(f"{given} belong to the attacks {list(attacks)}, not to {self.attack!r}; remove them.")
        if self.attack == "finetune" and self.finetune_data is None:
            problems.append("`finetune_data` is missing; name a dataset of `prompt` and `completion` to fine-tune on.")
        at_least = dict.fromkeys(("max_rows", "max_new_tokens", "batch_size", "max_prompt_tokens"), 1)
        at_least |= {"finetune_batch_size": 1, "finetune_steps": 0, "attack_steps": 0, "attack_radius": 0, "seed": 0}
        for name, least in at_least.items():
            if getattr(self, name) is not None and getattr(self, name) < least:
                problems.append(f"`{name}` is {getattr(self, name)}; it must be at least {least}.")
        for name in ("attack_learning_rate", "finetune_learning_rate"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                problems.append(f"`{name}` is {getattr(self, name)}; it must be above 0.")
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

    def _given(self) -> dict[str, Any]:
        """Settings of an attack that were given, by the name of the argument."""
        return {
            name: getattr(self, name)
            for name in self.__dataclass_fields__
            if name.startswith(("attack_", "finetune_", "templates")) and getattr(self, name) is not None
        }


def main(argv: list[str]) -> int:
    from ..attacks import Finetune, Latent
    from ..cli import fault_of
    from ..data.loading import load_rows
    from ..recipes import RecipeError
    from ..recipes.flat import load_arguments
    from .quiet import quiet

    args: AttackArguments = load_arguments(AttackArguments, argv, prog="trl-robust attack")
    with quiet():
        columns = {"prompt": args.prompt_column, "target": args.target_column, "answer": args.answer_column}
        rows = attack_rows(load_rows(str(args.data), split=args.data_split), str(args.data), columns, args.max_rows)
        try:
            attack = build_attack(args)
            subject = load_subject(args)
            if isinstance(attack, Latent):
                attack.threat.resolve_sites(subject.model)  # an unknown layer stops here
            if isinstance(attack, Finetune):
                attack.check(subject)
        except OSError as error:
            reason = " ".join(str(error).split())
            raise RecipeError(
                [f"`model` {args.model} could not be loaded with its tokenizer, from here or from the hub: {reason}"]
            ) from error
        except ValueError as error:
            raise fault_of(error, "The command line") from error
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
    from ..attacks import Direct, Embedding, Finetune, Latent, Prefill, Template
    from ..data import DataError, as_prompt_completion
    from ..data.loading import load_rows

    given = {name.split("_", 1)[-1]: value for name, value in args._given().items()}
    if args.attack == "template":
        return Template() if args.templates is None else Template(read_templates(args.templates))
    if args.attack in ("latent", "embedding"):
        if "sites" in given:
            given["sites"] = tuple(given["sites"])
        return {"latent": Latent, "embedding": Embedding}[args.attack](**given, seed=args.seed)
    if args.attack == "finetune":
        dataset = as_prompt_completion(load_rows(str(given.pop("data"))), "fine-tuning")
        if not {"prompt", "completion"} <= set(dataset.column_names):
            raise DataError(f"{args.finetune_data} has {dataset.column_names}; `prompt` and `completion` are needed.")
        return Finetune(list(dataset), **given, seed=args.seed)
    return Direct() if args.attack == "direct" else Prefill()


def load_subject(args: AttackArguments) -> Subject:
    """
    Loads the model.

    Args:
        args ([`AttackArguments`]):
            Arguments.

    Returns:
        [`~trl_robust.attacks.Subject`].

    Raises:
        `OSError`: there is no such model.
    """
    from ..attacks import Subject

    return Subject.load(
        str(args.model),
        dtype=args.dtype,
        trust_remote_code=args.trust_remote_code,
        max_new_tokens=args.max_new_tokens,
        batch_size=args.batch_size,
        max_prompt_tokens=args.max_prompt_tokens,
    )


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

    from ..evaluation import run_attack, write_results
    from ..report import results_table, write_report

    judge = args.judge
    if judge == "auto":
        judge = "exact" if all(row.answer for row in rows) else "refusal_prefix"
    entry, generations = run_attack(subject, attack, rows, judge)
    folder = args.folder
    results = write_results(
        folder,
        [{"name": str(args.model), "attacks": [entry]}],
        [{"model": str(args.model), **row} for row in generations],
        seed=args.seed,
    )
    page = write_report(folder, show_generations=args.show_generations)
    console = Console()
    console.print(results_table(results))
    console.print(
        f"{entry['n_scored']} scored, {entry['n_errored']} errored, {entry['n_skipped']} skipped; judge: {judge}"
    )
    reasons = {row["reason"] for row in generations if row["reason"]}
    for reason in sorted(reasons)[:5]:
        console.print(f"  {reason}", markup=False)
    if judge == "refusal_prefix":
        console.print("This judge only looks at the first words: gibberish counts as success, a late refusal as well.")
    console.print(f"Report: {page}")
    return results


if __name__ == "__main__":
    from ..cli import main as cli_main

    sys.exit(cli_main(["attack", *sys.argv[1:]]))
