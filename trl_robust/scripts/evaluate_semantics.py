"""`trl-robust evaluate --suite semantics`: does a perturbation that keeps the loss keep the meaning?"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .inputs import folder_fault, seed_fault

KINDS = ("paraphrase", "random", "untargeted")


@dataclass
class SemanticArguments:
    """
    Arguments of `trl-robust evaluate --suite semantics`.

    Args:
        suite (`str`, *optional*, defaults to `"semantics"`):
            This suite.
        model (`list[str]`):
            Models or adapters: folders or hub ids.
        data (`str`):
            Requests: a dataset with `prompt` and `completion` and, where there are such, `paraphrases` (a list),
            `edit` (the request with its meaning changed) and `answer`.
        data_split (`str`, *optional*, defaults to `"train"`):
            Its split.
        max_rows (`int`, *optional*):
            Only the first rows.
        output_dir (`str`, *optional*, defaults to `"evaluation-results/semantics"`):
            Where results go: a folder without results.
        layer (`list[str]`, *optional*, defaults to `["0.625"]`):
            Where the perturbations are: as `lap_layers` of a recipe.
        epsilon, steps, preset, positions (*optional*, default to 0.05, 8, `"robust"` and `"prompt"`):
            Of the search, as `lap_epsilon`, `lap_steps`, `lap_preset` and `lap_positions` (`prompt` or `last_user`).
        nli_model (`str`, *optional*):
            An NLI classifier, for entailment both ways. Without one that check is not made.
        max_new_tokens, batch_size, max_prompt_tokens (`int`, *optional*):
            Of the generation.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Weight dtype.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether the models' own code may run.
        seed (`int`, *optional*, defaults to `0`):
            Seed of all that is drawn.
    """

    suite: str = field(default="semantics", metadata={"help": "What is measured.", "choices": ["semantics"]})
    model: list[str] | None = field(default=None, metadata={"help": "Models: folders or hub ids."})
    data: str | None = field(default=None, metadata={"help": "Requests: a file, a folder or a hub id."})
    data_split: str = field(default="train", metadata={"help": "Split of the requests."})
    max_rows: int | None = field(default=None, metadata={"help": "Only the first rows."})
    output_dir: str | None = field(default=None, metadata={"help": "Where results go."})
    layer: list[str] = field(
        default_factory=lambda: ["0.625"], metadata={"help": "Where: embedding, layer indices, fractions."}
    )
    epsilon: float = field(default=0.05, metadata={"help": "How far the loss may move, in nats a token."})
    steps: int = field(default=8, metadata={"help": "Steps of the search."})
    preset: str = field(
        default="robust", metadata={"help": "Of the search.", "choices": ["robust", "paper", "paper_rms"]}
    )
    positions: str = field(
        default="prompt", metadata={"help": "Which tokens are perturbed.", "choices": ["prompt", "last_user"]}
    )
    nli_model: str | None = field(default=None, metadata={"help": "An NLI classifier: a folder or hub id."})
    max_new_tokens: int = field(default=64, metadata={"help": "Length of an answer in tokens."})
    batch_size: int = field(default=16, metadata={"help": "Rows at a time."})
    max_prompt_tokens: int = field(default=1024, metadata={"help": "Longer prompts are skipped."})
    dtype: str = field(
        default="auto",
        metadata={"help": "Weight dtype.", "choices": ["auto", "bfloat16", "float16", "float32"]},
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Whether the models' own code may run."})
    seed: int = field(default=0, metadata={"help": "Seed of all that is drawn."})

    def __post_init__(self) -> None:
        if problems := self.faults():
            raise ValueError("\n".join(problems))

    def faults(self) -> list[str]:
        """Everything that is wrong with the arguments, one sentence each."""
        from ..threat.sites import parse_site

        problems = []
        if not self.model:
            problems.append("`model` is missing; name one model folder or hub id, or several.")
        if self.data is None:
            problems.append("`data` is missing; name a dataset of `prompt` and `completion`.")
        for site in self.layer:
            try:
                parse_site(site)
            except ValueError as error:
                problems.append(f"layer: {error}")
        if not 0 < self.epsilon < float("inf"):
            problems.append(f"`epsilon` is {self.epsilon}; it must be above 0.")
        for name in ("max_rows", "steps", "max_new_tokens", "batch_size", "max_prompt_tokens"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                problems.append(f"`{name}` is {getattr(self, name)}; it must be at least 1.")
        if (fault := seed_fault(self.seed)) is not None:
            problems.append(fault)
        if (fault := folder_fault(self.folder)) is not None:
            problems.append(fault)
        elif (self.folder / "results.json").exists():
            problems.append(
                f"`output_dir` {self.folder} holds results, and nothing is written over. Name another folder."
            )
        return problems

    @property
    def folder(self) -> Path:
        """`output_dir`, or the suite's own."""
        return Path(self.output_dir) if self.output_dir is not None else Path("evaluation-results") / self.suite


def semantics(args: SemanticArguments) -> None:
    """
    Runs the suite, writes its files and prints the verdicts.

    Args:
        args ([`SemanticArguments`]):
            Arguments.

    Raises:
        [`~trl_robust.recipes.RecipeError`]: a model or a setting that cannot be.
        [`~trl_robust.data.DataError`]: data that cannot be used.
    """
    from rich.console import Console

    from ..cli import fault_of
    from ..data import load_rows
    from ..evaluation.semantic_rows import SemanticSettings, semantic_rows
    from ..evaluation.semantics import run_semantics

    dataset = load_rows(str(args.data), split=args.data_split)
    if args.max_rows is not None:
        dataset = dataset.select(range(min(args.max_rows, len(dataset))))
    settings = SemanticSettings(
        layer=args.layer,
        epsilon=args.epsilon,
        steps=args.steps,
        preset=args.preset,
        positions=args.positions,  # type: ignore[arg-type]  # the choices are checked
        seed=args.seed,
    )
    try:
        results = run_semantics(
            {name: name for name in args.model or []},
            semantic_rows(dataset, str(args.data)),
            output_dir=args.folder,
            settings=settings,
            nli_model=args.nli_model,
            max_new_tokens=args.max_new_tokens,
            batch_size=args.batch_size,
            max_prompt_tokens=args.max_prompt_tokens,
            dtype=args.dtype,
            trust_remote_code=args.trust_remote_code,
        )
    except (OSError, ValueError) as error:
        raise fault_of(error, "The command line") from error
    console = Console()
    for model in results["models"]:
        console.print(verdicts(model))
    console.print(
        f"Results: {args.folder / 'results.json'}\nFor people to rate, which is which in a file of its own: "
        f"{args.folder / 'human_rating.jsonl'}",
        markup=False,
    )


def verdicts(model: dict[str, Any]) -> Any:
    """
    The checks of one model as a table.

    Args:
        model (`dict`):
            Its entry in `results.json`.

    Returns:
        [`~rich.table.Table`].
    """
    from rich.table import Table

    found = model["semantics"]
    where = ", ".join(found["sites"])
    table = Table(title=f"{model['name']}: does the meaning stay? ({found['n_rows']} rows, {where})")
    table.add_column("check")
    for kind in KINDS:
        table.add_column(kind)
    for check in found["checks"][KINDS[0]]:
        cells = []
        for kind in KINDS:
            entry = found["checks"][kind][check]
            value = entry["value"]
            cells.append(entry["verdict"] if value is None else f"{value:.3g}: {entry['verdict']}")
        table.add_row(check, *cells)
    return table


if __name__ == "__main__":
    from ..cli import main as cli_main

    sys.exit(cli_main(["evaluate", "--suite", "semantics", *sys.argv[1:]]))
