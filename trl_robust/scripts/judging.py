"""Judges of responses from the command line: which ones, and with which models."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from ..attacks import AttackRow
    from ..evaluation.judge_forms import JudgeForm
    from ..evaluation.suite import Judge

T = TypeVar("T")

JUDGE_NAMES = ("exact", "refusal_prefix", "classifier", "rubric")
WITH_MODEL = ("classifier", "rubric")
FORMS = ("yes_no", "safe_unsafe", "guard")


@dataclass
class JudgeArguments:
    """
    Arguments that name the judges.

    Args:
        judges (`list[str]`, *optional*):
            Who judges; the first decides, the others stand beside it with how far they agree. `exact`: the response
            states the row's answer; `refusal_prefix`: it does not begin as refusals do, a weak judge; `classifier`: a
            model that says whether it is harmful; `rubric`: StrongREJECT's three grades. By default exact where every
            row has an answer, else refusal_prefix.
        classifier_model (`str`, *optional*):
            Folder or hub id of the classifier.
        classifier_form (`str`, *optional*):
            How a causal classifier is asked: `yes_no` (as HarmBench's), `safe_unsafe`, or `guard` (its own chat
            template, as Llama Guard has one).
        classifier_template (`str`, *optional*):
            A text file with `{prompt}` and `{response}` to ask it with instead; it then says yes or no.
        classifier_opening (`str`, *optional*):
            What the classifier's answer begins with before the word (`\\n\\n` for Llama Guard 3).
        classifier_label (`str`, *optional*):
            Of a sequence-classification model, the label that means harm.
        rubric_model (`str`, *optional*):
            The grader: a folder or hub id, or its name behind `rubric_url`.
        rubric_url (`str`, *optional*):
            Base URL of an OpenAI-compatible server.
        rubric_key_env (`str`, *optional*):
            Environment variable that holds its API key.
        judge_batch_size (`int`, *optional*, defaults to `8`):
            Responses that a judge on this machine reads at a time.
        judge_trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether the judges' own code may run.
    """

    judges: list[str] | None = field(
        default=None, metadata={"help": f"Who judges, the first decides: {', '.join(JUDGE_NAMES)}."}
    )
    classifier_model: str | None = field(default=None, metadata={"help": "classifier: folder or hub id."})
    classifier_form: str | None = field(
        default=None, metadata={"help": "classifier: how a causal one is asked.", "choices": list(FORMS)}
    )
    classifier_template: str | None = field(default=None, metadata={"help": "classifier: file to ask it with."})
    classifier_opening: str | None = field(default=None, metadata={"help": "classifier: how its answer begins."})
    classifier_label: str | None = field(default=None, metadata={"help": "classifier: the label that means harm."})
    rubric_model: str | None = field(default=None, metadata={"help": "rubric: the grader."})
    rubric_url: str | None = field(default=None, metadata={"help": "rubric: base URL of its server."})
    rubric_key_env: str | None = field(default=None, metadata={"help": "rubric: variable that holds the key."})
    judge_batch_size: int = field(default=8, metadata={"help": "Responses that a judge reads at a time."})
    judge_trust_remote_code: bool = field(default=False, metadata={"help": "Whether judges' own code may run."})

    def judge_faults(self) -> list[str]:
        """What is wrong with these arguments, one sentence each."""
        problems = []
        judges = self.judges or []
        if unknown := [name for name in judges if name not in JUDGE_NAMES]:
            problems.append(f"`judges` names {unknown}; choose among {', '.join(JUDGE_NAMES)}.")
        if len(set(judges)) < len(judges):
            problems.append("`judges` names a judge twice; name each once.")
        for judge in WITH_MODEL:
            given = [
                name
                for name in self.__dataclass_fields__
                if name.startswith(f"{judge}_") and getattr(self, name) is not None
            ]
            if given and judge not in judges:
                problems.append(f"{given} belong to the judge {judge}, which is not among `judges`; add it there.")
            if judge in judges and getattr(self, f"{judge}_model") is None:
                problems.append(f"`{judge}_model` is missing; the judge {judge} needs it.")
        if self.classifier_form is not None and self.classifier_template is not None:
            problems.append("`classifier_form` and `classifier_template` both say how to ask; remove one.")
        if self.classifier_template is not None and not Path(self.classifier_template).is_file():
            problems.append(f"There is no file {self.classifier_template} (`classifier_template`).")
        if self.judge_batch_size < 1:
            problems.append(f"`judge_batch_size` is {self.judge_batch_size}; it must be at least 1.")
        return problems + address_faults(self, "rubric")


def address_faults(args: Any, *prefixes: str) -> list[str]:
    """
    What is wrong with addresses of servers, and with the names of variables that hold their API keys.

    Args:
        args:
            Arguments with `PREFIX_url` and `PREFIX_key_env`.
        *prefixes (`str`):
            What these two begin with.

    Returns:
        `list[str]`: one sentence each.
    """
    from ..attacks.endpoint import Endpoint

    problems = []
    for prefix in prefixes:
        url, variable = getattr(args, f"{prefix}_url"), getattr(args, f"{prefix}_key_env")
        if url is not None:
            try:
                Endpoint(url, "model")
            except ValueError as error:
                problems.append(str(error).replace("`url`", f"`{prefix}_url`"))
        if variable is None:
            continue
        if url is None:
            problems.append(f"`{prefix}_key_env` belongs to `{prefix}_url`, which is not given; remove it.")
        elif not os.environ.get(variable):
            # What was given may be the key itself, so the message does not repeat it.
            problems.append(
                f"`{prefix}_key_env` names no environment variable that is set. Give the name of the variable that "
                "holds the key, not the key."
            )
    return problems


def make_judges(args: JudgeArguments, rows: Sequence[AttackRow]) -> list[Judge]:
    """
    The judges that the arguments describe.

    Args:
        args ([`JudgeArguments`]):
            Arguments.
        rows (sequence of [`~trl_robust.attacks.AttackRow`]):
            Requests.

    Returns:
        `list` of judges: names of those that need no model, and judges with their models loaded.

    Raises:
        [`~trl_robust.recipes.RecipeError`]: one cannot be loaded, or needs answers that the rows do not have.
    """
    from ..recipes import RecipeError

    names = args.judges or ["exact" if all(row.answer for row in rows) else "refusal_prefix"]
    if "exact" in names and not any(row.answer for row in rows):
        raise RecipeError(["The judge `exact` looks for the answer of every row, and no row has one."])
    makers: dict[str, Callable[[JudgeArguments], Any]] = {"classifier": _classifier, "rubric": _rubric}
    return [makers[name](args) if name in makers else name for name in names]  # type: ignore[misc]


def _classifier(args: JudgeArguments) -> Any:
    from ..evaluation.judge_forms import FORMS as READY
    from ..evaluation.judge_forms import JudgeForm
    from ..evaluation.response_judges import ClassifierJudge
    from ..recipes import RecipeError

    def load() -> ClassifierJudge:
        form: JudgeForm = READY[args.classifier_form or "yes_no"]
        if args.classifier_template is not None:
            form = JudgeForm.read(args.classifier_template)
        if args.classifier_opening is not None:
            form = replace(form, opening=args.classifier_opening.replace("\\n", "\n"))
        label: str | int | None = args.classifier_label
        if isinstance(label, str) and label.isdecimal():
            label = int(label)
        return ClassifierJudge.load(
            str(args.classifier_model),
            form=form,
            label=label,
            batch_size=args.judge_batch_size,
            trust_remote_code=args.judge_trust_remote_code,
        )

    judge = loaded("classifier_model", str(args.classifier_model), load)
    ways = ["classifier_label"] if not judge.sequence else ["classifier_form", "classifier_template"]
    ways += ["classifier_opening"] if judge.sequence else []
    if unused := [name for name in ways if getattr(args, name) is not None]:
        what = "has labels and is not asked with a text" if judge.sequence else "answers with a word and has no labels"
        raise RecipeError([f"`classifier_model` {args.classifier_model} {what}; remove {unused}."])
    return judge


def _rubric(args: JudgeArguments) -> Any:
    from ..attacks import Subject
    from ..attacks.endpoint import Endpoint
    from ..evaluation.response_judges import RubricJudge

    name = str(args.rubric_model)
    if args.rubric_url is not None:
        url, key = args.rubric_url, args.rubric_key_env
        return loaded("rubric_url", name, lambda: RubricJudge(Endpoint(url, name, key_variable=key)))
    subject = loaded(
        "rubric_model",
        name,
        lambda: Subject.load(name, batch_size=args.judge_batch_size, trust_remote_code=args.judge_trust_remote_code),
    )
    judge = RubricJudge(subject, source=name)
    # Request, response and rubric; what does not fit the judge together with its reply is errored, not cut.
    positions = getattr(subject.model.config.get_text_config(), "max_position_embeddings", None) or 8192
    subject.max_prompt_tokens = max(positions - judge.max_new_tokens, 0)
    return judge


def loaded(key: str, name: str, load: Callable[[], T]) -> T:
    """
    What `load` gives; what is wrong with a name becomes a message.

    Args:
        key (`str`):
            The argument that names it.
        name (`str`):
            The name.
        load (`Callable`):
            Loads it.

    Returns:
        What `load` gives.

    Raises:
        [`~trl_robust.recipes.RecipeError`]: it cannot be loaded.
    """
    from ..cli import fault_of
    from ..recipes import RecipeError

    try:
        return load()
    except RecipeError:  # a part of it that has been named already
        raise
    except OSError as error:
        reason = " ".join(str(error).split())
        raise RecipeError(
            [f"`{key}` {name} could not be loaded with its tokenizer, from here or from the hub: {reason}"]
        ) from error
    except ImportError as error:
        reason = " ".join(str(error).split())
        raise RecipeError([f"`{key}` {name} needs a package that is not installed: {reason}"]) from error
    except ValueError as error:
        raise fault_of(error, "The command line") from error
