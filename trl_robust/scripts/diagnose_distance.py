"""`trl-robust diagnose-distance`: whether wordings that lie far from the original inside a model lose more."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from .inputs import folder_fault, seed_fault

if TYPE_CHECKING:
    from ..attacks import Subject
    from ..evaluation.wordings import Case

RESULT = "distance.json"
"""The file that says that a folder is complete."""


@dataclass
class DistanceArguments:
    """
    Arguments of `trl-robust diagnose-distance`. What a scorer does not use is refused, not ignored.

    Args:
        model (`str`):
            Model or adapter: a folder or a hub id.
        data (`str`):
            Cases of RobustAlpacaEval's form: rows of `instruction`, `paraphrases` and, where there are such, `index`,
            `answer` (what a right answer states) and `reference` (a whole right answer).
        data_split (`str`, *optional*, defaults to `"train"`):
            Its split.
        output_dir (`str`, *optional*, defaults to `"distance"`):
            Where results go. A run that stopped goes on there when the same command is given again.
        scorer (`str`, *optional*, defaults to `"exact"`):
            `exact` (the answer is stated), `reward` (a reward model), `loglik` (mean log-likelihood of the reference
            given each wording; no judge and no generation) or `file` (scores that you have).
        reward_model (`str`, *optional*):
            For `reward`: any sequence-classification model with one output.
        scores (`str`, *optional*):
            For `file`: JSON lines of `index` and `scores`, one entry a wording, the original first.
        layers (`list[str]`, *optional*):
            Where distances are taken: layers counted from 0, fractions of the depth, `embedding`. By default after
            block `round(L / 2)` of `L`, the paper's, which is the layer of one number less.
        pooling (`str`, *optional*, defaults to `"last"`):
            `last`: the last token of the full prompt; `mean_query`: a mean over the wording's own tokens.
        distance (`str`, *optional*, defaults to `"l2"`):
            The one that is drawn. All three are reported.
        average_over (`str`, *optional*, defaults to `"all"`):
            Pairs behind the average distance: `all`, or `paraphrases`, without the original.
        template (`str`, *optional*):
            A text file with the mark `{prompt}`, in place of the chat template.
        system_prompt (`str`, *optional*):
            System message.
        responses (`int`, *optional*, defaults to `1`):
            Answers to each wording; 4 or more separate luck of the decoding from an effect of the wording.
        greedy (`bool`, *optional*, defaults to `True`):
            The likeliest token each time; nucleus sampling if false.
        temperature, top_p (`float`, *optional*, default to `1.0` and `0.9`):
            Of the sampling.
        max_new_tokens (`int`, *optional*, defaults to `256`):
            Length of an answer.
        max_prompt_tokens (`int`, *optional*, defaults to `1024`):
            Cases with a longer prompt are skipped and counted.
        max_cases (`int`, *optional*):
            Only the first ones.
        batch_size (`int`, *optional*, defaults to `16`):
            Prompts at a time.
        resamples (`int`, *optional*, defaults to `2000`):
            Size of the bootstraps.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Weight dtype.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether the models' own code may run.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the sampling and the bootstraps.
    """

    model: str | None = field(default=None, metadata={"help": "Model or adapter: a folder or a hub id."})
    data: str | None = field(default=None, metadata={"help": "Cases: `instruction`, `paraphrases`, `index`."})
    data_split: str = field(default="train", metadata={"help": "Split of the data."})
    output_dir: str = field(default="distance", metadata={"help": "Where results go."})
    scorer: Literal["exact", "reward", "loglik", "file"] = field(default="exact", metadata={"help": "Who scores."})
    reward_model: str | None = field(default=None, metadata={"help": "reward: a sequence-classification model."})
    scores: str | None = field(default=None, metadata={"help": "file: JSON lines of `index` and `scores`."})
    layers: list[str] | None = field(default=None, metadata={"help": "Where; half the depth by default."})
    pooling: Literal["last", "mean_query"] = field(default="last", metadata={"help": "What stands for a prompt."})
    distance: Literal["l2", "cosine", "token_normalised"] = field(default="l2", metadata={"help": "Which is drawn."})
    average_over: Literal["all", "paraphrases"] = field(default="all", metadata={"help": "Pairs of the average."})
    template: str | None = field(default=None, metadata={"help": "File with the mark {prompt}."})
    system_prompt: str | None = field(default=None, metadata={"help": "System message."})
    responses: int = field(default=1, metadata={"help": "Answers to each wording."})
    greedy: bool = field(default=True, metadata={"help": "The likeliest token each time."})
    temperature: float = field(default=1.0, metadata={"help": "Of the sampling."})
    top_p: float = field(default=0.9, metadata={"help": "Of the sampling."})
    max_new_tokens: int = field(default=256, metadata={"help": "Length of an answer in tokens."})
    max_prompt_tokens: int = field(default=1024, metadata={"help": "Cases with longer prompts are skipped."})
    max_cases: int | None = field(default=None, metadata={"help": "Only the first ones."})
    batch_size: int = field(default=16, metadata={"help": "Prompts at a time."})
    resamples: int = field(default=2000, metadata={"help": "Size of the bootstraps."})
    dtype: str = field(
        default="auto",
        metadata={"help": "Weight dtype.", "choices": ["auto", "bfloat16", "float16", "float32"]},
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Whether the models' own code may run."})
    seed: int = field(default=0, metadata={"help": "Seed of the sampling and the bootstraps."})

    def __post_init__(self) -> None:
        if problems := self.faults():
            raise ValueError("\n".join(problems))

    def faults(self) -> list[str]:
        """Everything that is wrong with the arguments, one sentence each."""
        problems = [
            f"`{name}` is missing; {what}."
            for name, what in (("model", "name a model folder or hub id"), ("data", "name a file of cases"))
            if getattr(self, name) is None
        ]
        for name, owner in (("reward_model", "reward"), ("scores", "file")):
            given = getattr(self, name) is not None
            if given and self.scorer != owner:
                problems.append(f"`{name}` belongs to the scorer {owner}, not to {self.scorer}; remove it.")
            if not given and self.scorer == owner:
                problems.append(f"`{name}` is missing; the scorer {owner} needs it.")
        answers = self.scorer in ("exact", "reward")
        if not answers and (self.responses != 1 or not self.greedy):
            problems.append(f"`responses` and `greedy` belong to scorers of answers; {self.scorer} generates none.")
        elif self.responses > 1 and self.greedy:
            problems.append("`responses` is above 1, and greedy decoding gives one answer. Set `--greedy false`.")
        for name, default in (("temperature", 1.0), ("top_p", 0.9)):
            if self.greedy and getattr(self, name) != default:
                problems.append(f"`{name}` belongs to sampling. Set `--greedy false`, or remove it.")
        if not self.temperature > 0:
            problems.append(f"`temperature` is {self.temperature}; it must be above 0.")
        if not 0 < self.top_p <= 1:
            problems.append(f"`top_p` is {self.top_p}; it must be above 0 and at most 1.")
        for name in ("responses", "max_new_tokens", "max_prompt_tokens", "max_cases", "batch_size", "resamples"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                problems.append(f"`{name}` is {getattr(self, name)}; it must be at least 1.")
        folder = Path(self.output_dir)
        found = (folder_fault(folder), seed_fault(self.seed))
        problems += [fault for fault in found if fault is not None]
        if (folder / RESULT).exists():
            problems.append(f"`output_dir` {folder} holds results, and nothing is written over. Name another folder.")
        return problems


def main(argv: list[str]) -> int:
    """
    Runs the diagnostic.

    Args:
        argv (`list[str]`):
            Words after the verb.

    Returns:
        `int`: exit code.
    """
    from ..cli import fault_of
    from ..data import DataError, content_hash, load_rows
    from ..evaluation.answer_scores import RewardModel, read_scores
    from ..evaluation.distance import RenderedSubject, Rendering, sites_of
    from ..evaluation.wordings import cases_of
    from ..recipes import RecipeError
    from ..recipes.flat import load_arguments
    from .distance_run import run
    from .quiet import quiet

    args: DistanceArguments = load_arguments(DistanceArguments, argv, prog="trl-robust diagnose-distance")
    with quiet():
        rows = load_rows(str(args.data), split=args.data_split)
        cases = cases_of(rows, str(args.data))[: args.max_cases]
        given = read_scores(Path(args.scores), cases) if args.scores is not None else None
        if args.scorer in ("exact", "loglik"):
            _check_answers(args, cases)
        try:
            rendering = Rendering(_template(args.template), args.system_prompt)
            subject = RenderedSubject.of(load_subject(args), rendering)
            sites = sites_of(subject.model, args.layers)  # an unknown layer stops here
            if args.system_prompt is not None and not subject.tokenizer.chat_template:
                raise RecipeError(["`system_prompt` needs a chat template, and the tokenizer has none."])
            reward = None
            if args.reward_model is not None:
                reward = RewardModel.load(
                    args.reward_model,
                    dtype=args.dtype,
                    trust_remote_code=args.trust_remote_code,
                    batch_size=args.batch_size,
                )
        except OSError as error:
            reason = " ".join(str(error).split())
            raise RecipeError([f"A model could not be loaded, from here or from the hub: {reason}"]) from error
        except (RecipeError, DataError):
            raise
        except ValueError as error:
            raise fault_of(error, "The command line") from error
        run(args, subject, cases, sites, reward=reward, given=given, data_sha256=content_hash(rows))
    return 0


def load_subject(args: DistanceArguments) -> Subject:
    """
    Loads the model.

    Args:
        args ([`DistanceArguments`]):
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


def _check_answers(args: DistanceArguments, cases: list[Case]) -> None:
    from ..data import DataError

    exact = args.scorer == "exact"
    if missing := [case.id for case in cases if not (case.answer or (case.reference and not exact))]:
        raise DataError(
            f"The scorer {args.scorer} needs an `answer` in every case of {args.data}"
            + ("" if exact else " (or a `reference`)")
            + f", and {len(missing)} of {len(cases)} have none, the first is case {missing[0]}. Add them, or choose "
            "the scorer reward, which needs none."
        )


def _template(path: str | None) -> str | None:
    from ..data import DataError

    if path is None:
        return None
    if not Path(path).is_file():
        raise DataError(f"There is no file {path} (`template`).")
    return Path(path).read_text(encoding="utf-8")


if __name__ == "__main__":
    from ..cli import exit_code

    sys.exit(exit_code(lambda: main(sys.argv[1:])))
