"""`trl-robust evaluate`: a suite of measurements on one model or several."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .evaluate_generalized import generalized
from .evaluate_prompts import prompts
from .evaluate_semantics import SemanticArguments, semantics
from .generalized_arguments import GeneralizedArguments
from .inputs import folder_fault, seed_fault

SHIPPED = ("generalized", "quick", "input", "unlearning")
"""Suites of attacks: settings of one and the same, each a file in `recipes/eval`."""

ALL_SUITES = ("prompts", "semantics", *SHIPPED)

PROMPT_JUDGES = ("exact", "reward", "llm", "endpoint", "annotations")

OWNERS = {
    "judge_model": ("reward", "llm", "endpoint"),
    "judge_tau": ("reward",),
    "judge_url": ("endpoint",),
    "judge_key_env": ("endpoint",),
    "judge_timeout": ("endpoint",),
    "judge_annotations": ("annotations",),
}
"""Which judges an argument is for."""


@dataclass
class EvaluateArguments:
    """
    Arguments of `trl-robust evaluate`.

    Args:
        suite (`str`, *optional*, defaults to `"prompts"`):
            `prompts`: how answers hold over several wordings of each question. The others have arguments of their own
            (`--suite generalized --help`): `generalized` attacks prompts, hidden states and weights; `quick`, `input`
            and `unlearning` are the same with other settings; `semantics` tests what a change of meaning changes.
        model (`list[str]`):
            Models or adapters: folders or hub ids. With several, each is compared with the first.
        data (`str`):
            Cases: a dataset with `instruction`, `paraphrases` (a list) and, optionally, `index`, `answer` (for the
            exact judge) and `reference` (the baseline's answer, for judges of preference).
        data_split (`str`, *optional*, defaults to `"train"`):
            Its split.
        max_cases (`int`, *optional*):
            Only the first cases.
        references (`str`, *optional*):
            A JSON file in AlpacaEval's form with the baseline's answers, found by `instruction`.
        output_dir (`str`, *optional*, defaults to `"evaluation-results/SUITE"`):
            Where results and report go: a folder without results. A run that was stopped goes on in its folder.
        judge (`str`, *optional*):
            `exact`, `reward`, `llm`, `endpoint` or `annotations`. Without one, only what needs no judge is measured.
        judge_model (`str`, *optional*):
            For `reward` and `llm` a folder or hub id, for `endpoint` the model's name there.
        judge_tau (`float`, *optional*):
            For `reward`: difference of rewards that counts as one logit; 1 by default.
        judge_url (`str`, *optional*):
            For `endpoint`: base URL, such as `http://localhost:8000/v1`.
        judge_key_env (`str`, *optional*):
            For `endpoint`: environment variable that holds the API key.
        judge_timeout (`float`, *optional*):
            For `endpoint`: seconds for a call; 60 by default.
        judge_annotations (`str`, *optional*):
            For `annotations`: file or folder that AlpacaEval wrote for our outputs.
        judge_trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether the judge model's own code may run.
        greedy (`bool`, *optional*, defaults to `False`):
            Whether the most likely token is always taken.
        temperature, top_p (`float`, *optional*):
            Of the sampling; 1.0 and 0.9 by default, as in the paper.
        samples_of_original (`int`, *optional*, defaults to `1`):
            Answers to the original wording. As many as there are wordings give the same-prompt null.
        posix (`bool`, *optional*, defaults to `True`):
            Whether POSIX is measured: `wordings ** 2` forward passes a case.
        max_new_tokens, batch_size, max_prompt_tokens (`int`, *optional*):
            Of the generation.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Weight dtype.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether the models' own code may run.
        show_generations (`bool`, *optional*, defaults to `False`):
            Whether the report shows questions and answers. They stand in `generations.jsonl` either way.
        seed (`int`, *optional*, defaults to `0`):
            Seed of sampling, of the order in which a judge sees two answers, and of the bootstrap.
    """

    suite: str = field(default="prompts", metadata={"help": f"What is measured: {', '.join(ALL_SUITES)}."})
    model: list[str] | None = field(default=None, metadata={"help": "Models: folders or hub ids."})
    data: str | None = field(default=None, metadata={"help": "Cases: a file, a folder or a hub id."})
    data_split: str = field(default="train", metadata={"help": "Split of the cases."})
    max_cases: int | None = field(default=None, metadata={"help": "Only the first cases."})
    references: str | None = field(default=None, metadata={"help": "Baseline's answers, as AlpacaEval writes them."})
    output_dir: str | None = field(default=None, metadata={"help": "Where results and report go."})
    judge: str | None = field(default=None, metadata={"help": "Who judges.", "choices": list(PROMPT_JUDGES)})
    judge_model: str | None = field(default=None, metadata={"help": "reward, llm, endpoint: the model."})
    judge_tau: float | None = field(default=None, metadata={"help": "reward: rewards that count as one logit."})
    judge_url: str | None = field(default=None, metadata={"help": "endpoint: base URL."})
    judge_key_env: str | None = field(default=None, metadata={"help": "endpoint: variable that holds the API key."})
    judge_timeout: float | None = field(default=None, metadata={"help": "endpoint: seconds for a call."})
    judge_annotations: str | None = field(default=None, metadata={"help": "annotations: file or folder."})
    judge_trust_remote_code: bool = field(default=False, metadata={"help": "Whether the judge's own code may run."})
    greedy: bool = field(default=False, metadata={"help": "Always take the most likely token."})
    temperature: float | None = field(default=None, metadata={"help": "Of the sampling; 1.0 by default."})
    top_p: float | None = field(default=None, metadata={"help": "Nucleus of the sampling; 0.9 by default."})
    samples_of_original: int = field(default=1, metadata={"help": "Answers to the original, for the null."})
    posix: bool = field(default=True, metadata={"help": "Whether POSIX is measured."})
    max_new_tokens: int = field(default=1024, metadata={"help": "Length of an answer in tokens."})
    batch_size: int = field(default=16, metadata={"help": "Prompts at a time."})
    max_prompt_tokens: int = field(default=1024, metadata={"help": "Longer prompts are skipped."})
    dtype: str = field(
        default="auto",
        metadata={"help": "Weight dtype.", "choices": ["auto", "bfloat16", "float16", "float32"]},
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Whether the models' own code may run."})
    show_generations: bool = field(default=False, metadata={"help": "Whether the report shows the texts."})
    seed: int = field(default=0, metadata={"help": "Seed of sampling, order and bootstrap."})

    def __post_init__(self) -> None:
        if problems := self.faults():
            raise ValueError("\n".join(problems))

    def faults(self) -> list[str]:
        """Everything that is wrong with the arguments, one sentence each."""
        problems = []
        if self.suite not in ALL_SUITES:
            problems.append(f"`suite` is {self.suite}; it must be one of {', '.join(ALL_SUITES)}.")
        if not self.model:
            problems.append("`model` is missing; name one model folder or hub id, or several.")
        elif len(set(self.model)) < len(self.model):
            problems.append("`model` names a model twice; name each once.")
        if self.data is None:
            problems.append("`data` is missing; name a dataset of `instruction` and `paraphrases`.")
        problems += self._judge_faults()
        at_least = dict.fromkeys(
            ("max_cases", "max_new_tokens", "batch_size", "max_prompt_tokens", "samples_of_original"), 1
        )
        for name, least in at_least.items():
            if getattr(self, name) is not None and getattr(self, name) < least:
                problems.append(f"`{name}` is {getattr(self, name)}; it must be at least {least}.")
        for name in ("judge_tau", "judge_timeout", "temperature"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < float("inf"):
                problems.append(f"`{name}` is {getattr(self, name)}; it must be above 0.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            problems.append(f"`top_p` is {self.top_p}; it must be above 0 and at most 1.")
        if self.greedy:
            if given := [name for name in ("temperature", "top_p") if getattr(self, name) is not None]:
                problems.append(f"`greedy` is given together with {given}; remove one or the other.")
            if self.samples_of_original > 1:
                problems.append("`samples_of_original` with `greedy` gives the same answer every time; remove one.")
        if (fault := seed_fault(self.seed)) is not None:
            problems.append(fault)
        if (fault := folder_fault(self.folder)) is not None:
            problems.append(fault)
        elif (self.folder / "results.json").exists():
            problems.append(
                f"`output_dir` {self.folder} holds results, and nothing is written over. Name another folder; or "
                "remove its results.json to judge the answers that it holds again."
            )
        return problems

    def _judge_faults(self) -> list[str]:
        problems = []
        for name, judges in OWNERS.items():
            if getattr(self, name) is not None and self.judge not in judges:
                which = "no `judge`" if self.judge is None else f"`judge` {self.judge}"
                problems.append(f"`{name}` belongs to the judges {list(judges)}, and there is {which}; remove it.")
        needed = {"reward": ["judge_model"], "llm": ["judge_model"], "annotations": ["judge_annotations"]}
        needed["endpoint"] = ["judge_url", "judge_model"]
        for name in needed.get(str(self.judge), []):
            if getattr(self, name) is None:
                problems.append(f"`{name}` is missing; `judge` {self.judge} needs it.")
        if self.judge_key_env is not None and not os.environ.get(self.judge_key_env):
            problems.append(
                # What was given may be the key itself, so the message does not repeat it.
                "`judge_key_env` names no environment variable that is set. Give the name of the variable that holds "
                "the key, not the key."
            )
        return problems

    @property
    def folder(self) -> Path:
        """`output_dir`, or the suite's own."""
        return Path(self.output_dir) if self.output_dir is not None else Path("evaluation-results") / self.suite


def main(argv: list[str]) -> int:
    """
    Measures as the arguments say.

    Args:
        argv (`list[str]`):
            `--suite` with one of the suites (`prompts` by default) and that suite's `--key value` arguments. Suites of
            attacks take their settings from `recipes/eval` unless `--config` names another file.

    Returns:
        `int`: exit code.

    Raises:
        [`~trl_robust.recipes.RecipeError`]: listing every fault of the arguments.
    """
    from ..recipes import recipes_folder
    from ..recipes.flat import load_arguments
    from .quiet import quiet

    suite, config = suite_of(argv)
    if suite in SHIPPED and config is None and not {"-h", "--help"} & set(argv):
        argv = ["--config", str(recipes_folder() / "eval" / f"{suite}.yaml"), *argv]
    cls, run = SUITES.get(suite, SUITES["prompts"])  # an unknown one is a fault of its arguments
    args: Any = load_arguments(cls, argv, prog=f"trl-robust evaluate --suite {suite}")
    with quiet():
        run(args)
    return 0


def suite_of(argv: list[str]) -> tuple[str, str | None]:
    """The suite that a command line, or the file given to its `--config`, asks for; and that file."""
    from ..recipes.reading import read_yaml, split_command_line

    words = split_command_line([word for word in argv if word not in ("-h", "--help")])[0]
    config = " ".join(words["config"].value) if "config" in words else None
    named = words["suite"].value if "suite" in words else None
    if named is None and config is not None:
        given = read_yaml(Path(config).expanduser())[0].get("suite")  # what is wrong with the file is said later
        named = [given.value] if given is not None else None
    return (str(named[0]) if named else "prompts"), config


def check_file(path: str) -> str:
    """
    Checks a file of this verb without its models and datasets.

    Args:
        path (`str`):
            The file.

    Returns:
        `str`: what it holds.

    Raises:
        [`~trl_robust.recipes.RecipeError`]: listing every fault.
    """
    from ..recipes.flat import load_arguments
    from ..recipes.reading import read_yaml
    from . import generalized_data

    suite, _ = suite_of(["--config", path])
    if suite in SHIPPED:
        lines = generalized_data.check_file(path)
        return f"suite {suite}, {sum(line.control_of is None for line in lines)} attacks"
    given, _ = read_yaml(Path(path).expanduser())
    argv = ["--config", path]
    for name in ("model", "data", "output_dir"):
        if name not in given:
            argv += [f"--{name}", name]
    load_arguments(SUITES.get(suite, SUITES["prompts"])[0], argv, prog="trl-robust evaluate")
    return f"suite {suite}"


SUITES: dict[str, tuple[type, Callable[[Any], None]]] = {
    "prompts": (EvaluateArguments, prompts),
    "semantics": (SemanticArguments, semantics),
    **dict.fromkeys(SHIPPED, (GeneralizedArguments, generalized)),
}
"""What can be measured, by its name: its arguments, and what measures it."""


if __name__ == "__main__":
    from ..cli import exit_code

    sys.exit(exit_code(lambda: main(sys.argv[1:])))
