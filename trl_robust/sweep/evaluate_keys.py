"""The `evaluate` block of a grid, read strictly."""

from __future__ import annotations

import dataclasses
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_type_hints

from ..attacks import AttackRow
from ..data import DataError, load_rows
from ..evaluation.judges import JUDGE_VERSIONS, JudgeName
from ..evaluation.named import ATTACKS as ALL_ATTACKS
from ..evaluation.named import named_attack
from ..evaluation.organism_suite import BATCH, NEW_TOKENS, ORGANISM_ATTACKS
from ..evaluation.wordings import Case, cases_of
from ..organism.build import DATA_NAMES
from ..recipes.values import UnfitError, fit, nearest

ATTACKS = {name: ALL_ATTACKS[name] for name in ORGANISM_ATTACKS}
"""Attacks that a grid may name: those that need no more than requests, wrappers and rows to fine-tune on."""

USUAL = ("direct", "prefill")
"""Attacks that need nothing but requests."""


@dataclass
class RowsKeys:
    """
    A dataset of requests or questions.

    Parameters:
        path (`str`):
            A file, a folder or a hub id.
        config (`str`, *optional*):
            Its configuration, where it has several.
        split (`str`, *optional*, defaults to `"train"`):
            Its split.
        prompt_column, target_column, answer_column (`str`, *optional*):
            Names of the columns; the last two may be missing.
        max_rows (`int`, *optional*):
            Only the first rows.
    """

    path: str
    config: str | None = None
    split: str = "train"
    prompt_column: str = "prompt"
    target_column: str = "target"
    answer_column: str = "answer"
    max_rows: int | None = None

    def load(self, name: str, system_prompt: str | None = None) -> list[AttackRow]:
        """
        Loads the rows.

        Args:
            name (`str`):
                First part of their ids.
            system_prompt (`str`, *optional*):
                System message that the model was trained with.

        Returns:
            `list` of [`~trl_robust.attacks.AttackRow`].

        Raises:
            [`~trl_robust.data.DataError`]: it cannot be loaded, or has no such prompts.
        """
        dataset = load_rows(self.path, config=self.config, split=self.split)
        if self.prompt_column not in dataset.column_names:
            raise DataError(
                f"{self.path} has no column {self.prompt_column!r} but {dataset.column_names}. Name the right one as "
                "`prompt_column`."
            )
        found = []
        for number, row in enumerate(dataset):
            prompt = row[self.prompt_column]
            if not (isinstance(prompt, str) and prompt.strip()) and not isinstance(prompt, list):
                raise DataError(f"{self.path} has no request in row {number}. Remove the row, or name another column.")
            if system_prompt is not None and isinstance(prompt, str):
                prompt = [{"role": "system", "content": system_prompt}, {"role": "user", "content": prompt}]
            target, answer = row.get(self.target_column), row.get(self.answer_column)
            found.append(AttackRow(f"{name}-{number}", prompt, target, None if answer is None else str(answer)))
        return found[: self.max_rows]


@dataclass
class WordingsKeys:
    """
    Questions in several wordings, with the answer to each.

    Parameters:
        path (`str`):
            A file, a folder or a hub id: `instruction`, `paraphrases`, `answer` and, optionally, `index`.
        config (`str`, *optional*):
            Its configuration, where it has several.
        split (`str`, *optional*, defaults to `"train"`):
            Its split.
        max_rows (`int`, *optional*):
            Only the first questions.
    """

    path: str
    config: str | None = None
    split: str = "train"
    max_rows: int | None = None

    def load(self, folder: Path | None = None) -> list[Case]:
        """
        Loads the questions.

        Args:
            folder (`Path`, *optional*):
                Where the file lies, if it is an organism's.

        Returns:
            `list` of [`~trl_robust.evaluation.wordings.Case`].

        Raises:
            [`~trl_robust.data.DataError`]: it cannot be loaded, is of another form, or has questions without answers.
        """
        path = self.path if folder is None else str(folder / Path(self.path).name)
        cases = cases_of(load_rows(path, config=self.config, split=self.split), path)[: self.max_rows]
        if lacking := [case.id for case in cases if not case.answer]:
            raise DataError(
                f"{path} has no `answer` for {len(lacking)} of {len(cases)} questions, the first is {lacking[0]}. The "
                "judge is exact: give every question the words that a right response states, or measure the finished "
                "models with `trl-robust evaluate --suite prompts`, which has other judges."
            )
        return cases


@dataclass
class BenchmarkKeys:
    """
    Benchmarks of lm-eval.

    Parameters:
        tasks (`list[str]`):
            Names of tasks, such as `mmlu`.
        num_fewshot (`int`, *optional*):
            Examples in the prompt; the task's own number by default.
        limit (`int`, *optional*):
            Only so many rows of every task.
        task_folder (`str`, *optional*):
            Folder with further task files.
    """

    tasks: list[str]
    num_fewshot: int | None = None
    limit: int | None = None
    task_folder: str | None = None


@dataclass
class EvaluateKeys:
    """
    Keys of a grid's `evaluate`.

    Parameters:
        attacks (`dict`, *optional*):
            Name of an attack -> its settings, where they are not its defaults. By default all that an organism is
            attacked with, or `direct` and `prefill` elsewhere; none where `wordings` are given.
        mean_over (`list[str]`, *optional*):
            The attacks that the mean success is over; by default all but `direct`.
        requests (`RowsKeys` or `str`, *optional*):
            What the attacks ask for; an organism has its own.
        judge (`str`, *optional*):
            `exact` where requests have answers, or `refusal_prefix`, which is weak. The organism's is `exact`.
        compliance (`RowsKeys` or `str`, *optional*):
            Harmless requests that look harmful: the share that is not refused. An organism has its own.
        utility (`RowsKeys` or `str`, *optional*):
            Questions with answers: the share answered rightly, word for word. An organism has its own, measured where
            it is attacked; the name of another of its files is put in their place.
        wordings (`WordingsKeys` or `str`, *optional*):
            Questions in several wordings with answers: the share answered rightly, word for word, under all wordings
            (worst-case accuracy), on average, and under the first. With an organism one of its files.
        lm_eval (`BenchmarkKeys`, *optional*):
            Benchmarks, whose mean accuracy is the utility where `utility` names no questions.
        templates (`str`, *optional*):
            For the template attack: a text file, one wrapper a line, with the mark `{prompt}`.
        finetune (`RowsKeys` or `str`, *optional*):
            For the fine-tuning attack: `prompt` and `completion` about other requests.
        max_new_tokens, batch_size, max_prompt_tokens (`int`, *optional*):
            Of the generation.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Weight dtype.
    """

    attacks: dict | None = None
    mean_over: list[str] | None = None
    requests: RowsKeys | str | None = None
    judge: Literal["exact", "refusal_prefix"] | None = None
    compliance: RowsKeys | str | None = None
    utility: RowsKeys | str | None = None
    wordings: WordingsKeys | str | None = None
    lm_eval: BenchmarkKeys | None = None
    templates: str | None = None
    finetune: RowsKeys | str | None = None
    max_new_tokens: int | None = None
    batch_size: int | None = None
    max_prompt_tokens: int | None = None
    dtype: str = field(default="auto", metadata={"choices": ["auto", "bfloat16", "float16", "float32"]})

    def evaluation(self, organism: bool) -> tuple[Evaluation, list[str]]:
        """
        What the keys ask for, and what is wrong with them.

        Args:
            organism (`bool`):
                Whether the models are organisms.

        Returns:
            `tuple`: [`Evaluation`], and a sentence for every fault.
        """
        problems = self._faults(organism)
        usual = () if self.wordings is not None else ORGANISM_ATTACKS if organism else USUAL
        given = self.attacks if self.attacks is not None else dict.fromkeys(usual)
        attacks = {str(name): fit_attack(str(name), settings, problems) for name, settings in given.items()}
        mean_over = self.mean_over or [name for name in attacks if name != "direct"] or list(attacks)
        problems += [
            f"`mean_over` names `{name}`, which is not among the attacks{nearest(name, attacks) or '.'}"
            for name in mean_over
            if name not in attacks
        ]
        evaluation = Evaluation(
            organism=organism,
            attacks=attacks,
            mean_over=tuple(mean_over),
            judge=self.judge or "exact",
            requests=_rows(self.requests),
            compliance=_rows(self.compliance),
            utility=_rows(self.utility),
            wordings=_wordings(self.wordings),
            lm_eval=BenchmarkKeys(**self.lm_eval) if isinstance(self.lm_eval, dict) else self.lm_eval,
            templates=self.templates,
            finetune=_rows(self.finetune),
            max_new_tokens=self.max_new_tokens or (NEW_TOKENS if organism else 64),
            batch_size=self.batch_size or (BATCH if organism else 16),
            max_prompt_tokens=self.max_prompt_tokens or 1024,
            dtype=self.dtype,
        )
        return evaluation, problems

    def _faults(self, organism: bool) -> list[str]:
        problems = []
        attacks = bool(self.attacks) if self.attacks is not None else self.wordings is None
        if not attacks and self.wordings is None and self.utility is None and self.lm_eval is None:
            problems.append("`attacks` is empty; name at least one, such as `direct`.")
        if organism:
            own = ("requests", "judge", "compliance", "templates", "finetune")
            if given := [f"`{key}`" for key in own if getattr(self, key) is not None]:
                problems.append(f"{', '.join(given)}: the organism has its own. Remove them.")
            for key, part in (("wordings", _wordings(self.wordings)), ("utility", _rows(self.utility))):
                if part is not None and Path(part.path).name not in DATA_NAMES:
                    problems.append(
                        f"`{key}` is {part.path}; with `organism` it is one of the organism's files: "
                        f"{', '.join(DATA_NAMES)}."
                    )
        elif attacks:
            if self.requests is None:
                problems.append("`requests` is missing: name a dataset with a `prompt` column to attack with.")
            if self.judge is None:
                problems.append("`judge` is missing: `exact` where requests have an `answer`, or `refusal_prefix`.")
            if "finetune" in (self.attacks or {}) and self.finetune is None:
                problems.append("`finetune` is missing: the attack of that name needs rows to fine-tune on.")
        if self.templates is not None and not Path(self.templates).is_file():
            problems.append(f"`templates` is {self.templates}, which is no file.")
        for name in ("max_new_tokens", "batch_size", "max_prompt_tokens"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                problems.append(f"`{name}` is {getattr(self, name)}; it must be at least 1.")
        return problems


def _rows(given: RowsKeys | dict | str | None) -> RowsKeys | None:
    if isinstance(given, str):
        return RowsKeys(given)
    return RowsKeys(**given) if isinstance(given, dict) else given


def _wordings(given: WordingsKeys | dict | str | None) -> WordingsKeys | None:
    if isinstance(given, str):
        return WordingsKeys(given)
    return WordingsKeys(**given) if isinstance(given, dict) else given


def fit_attack(name: str, given: Any, problems: list[str]) -> dict[str, Any]:
    """
    An attack's settings in the types of its fields.

    Args:
        name (`str`):
            The attack.
        given (`Any`):
            As YAML gives them.
        problems (`list[str]`):
            Faults found so far; added to.

    Returns:
        `dict`.
    """
    if name not in ATTACKS:
        hint = nearest(name, ATTACKS) or f"; choose among {', '.join(ATTACKS)}."
        problems.append(f"`{name}` is no attack{hint}")
        return {}
    if given is not None and not isinstance(given, dict):
        problems.append(f"The attack `{name}` is {given!r}; its settings are a mapping, {{}} for the usual ones.")
        return {}
    hints, values = get_type_hints(ATTACKS[name]), {}
    own = {item.name for item in dataclasses.fields(ATTACKS[name])}
    for key, value in (given or {}).items():
        kind = list[str] if key == "sites" else hints.get(key)
        try:
            values[key] = fit(value, kind) if key in own and kind is not None else value
        except UnfitError as error:
            problems.append(f"`{key}` of the attack `{name}` is {value!r}; {error}.")
    try:
        attack = named_attack(name, values, examples=[{"prompt": "", "completion": ""}])
        if hasattr(attack, "threat"):
            _ = attack.threat  # its own checks
    except ValueError as error:
        problems.append(f"The attack `{name}`: {error}")
    return values


@dataclass(frozen=True)
class Evaluation:
    """
    How a model is measured; see [`EvaluateKeys`] for the fields.

    Args:
        organism (`bool`):
            Whether the models are organisms, whose data are used.
    """

    organism: bool
    attacks: dict[str, dict[str, Any]]
    mean_over: tuple[str, ...]
    judge: JudgeName
    requests: RowsKeys | None
    compliance: RowsKeys | None
    utility: RowsKeys | None
    wordings: WordingsKeys | None
    lm_eval: BenchmarkKeys | None
    templates: str | None
    finetune: RowsKeys | None
    max_new_tokens: int
    batch_size: int
    max_prompt_tokens: int
    dtype: str

    def identity(self) -> dict[str, Any]:
        """All that decides the figures, with the versions of attacks and judges."""
        # The mean is taken afterwards: another one needs no new run.
        values = {name: value for name, value in asdict(self).items() if name != "mean_over"}
        if self.wordings is None:
            del values["wordings"]  # so that runs which were finished before there were any stay finished
        versions = {name: ATTACKS[name].version for name in self.attacks}  # type: ignore[attr-defined]
        return values | {"attack_versions": versions, "judge_version": JUDGE_VERSIONS[self.judge]}

    def files(self) -> list[str]:
        """Names of what is read."""
        parts = (self.requests, self.compliance, self.utility, self.finetune, self.wordings)
        rows = [part.path for part in parts if part]
        return rows + ([self.templates] if self.templates else [])
