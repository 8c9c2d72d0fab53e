"""The suite `prompts`: every wording of every case is answered and judged; a run that was killed goes on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from ..attacks import Subject
from .alpaca import length_controlled_win_rate
from .consistency import answer_agreement, posix_of_case, prompt_sensitivity, summed_posix
from .keeping import Log, fingerprint
from .preference_judges import JudgedAnswer, PreferenceJudge, Verdict
from .robustness import paired_robustness, prompt_robustness, same_prompt_null, win_rate
from .sampling import Answer, Request, Sampling, sample_answers
from .wordings import Case

VERSION = 1
"""Raised when the same answers would be measured in another way."""

JUDGED_AT_ONCE = 32
"""Answers between two writes of the judge's scores."""

SCALE = (0.0, 1.0)
"""Every judge here scores between these."""


@dataclass(frozen=True)
class PromptSuite:
    """
    What is asked, and how it is answered.

    Args:
        cases (`Sequence[Case]`):
            Questions in several wordings.
        sampling ([`Sampling`]):
            How answers are drawn.
        samples_of_original (`int`, *optional*, defaults to `1`):
            Answers to the original wording, for [`same_prompt_null`]; the first is that of wording 0.
        with_posix (`bool`, *optional*, defaults to `True`):
            Whether POSIX is measured: `wordings ** 2` forward passes a case.
    """

    cases: Sequence[Case]
    sampling: Sampling
    samples_of_original: int = 1
    with_posix: bool = True

    def requests(self) -> list[Request]:
        """Every prompt that is to be answered, once each."""
        return [
            Request(key_of(case, wording, sample), case.wordings[wording])
            for case in self.cases
            for wording in range(len(case.wordings))
            for sample in range(self.samples_of_original if wording == 0 else 1)
        ]


def key_of(case: Case, wording: int, sample: int = 0) -> str:
    """Name of one answer; its random numbers come from it."""
    return f"{case.id}/{wording}/{sample}"


@dataclass
class ModelRun:
    """
    One model in the suite.

    Args:
        suite ([`PromptSuite`]):
            What is asked.
        name (`str`):
            Name of the model.
        folder (`Path`):
            Where answers and scores are kept.
        label (`str`):
            Part of the names of this model's files.
    """

    suite: PromptSuite
    name: str
    folder: Path
    label: str
    answers: dict[str, Answer] = field(default_factory=dict)
    posix: dict[str, float | None] = field(default_factory=dict)
    verdicts: dict[str, Verdict] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._answer_log = Log(self.folder / f"answers-{self.label}.jsonl")
        self._posix_log = Log(self.folder / f"posix-{self.label}.jsonl")
        # What errored is tried again: the memory or the judge that was missing may be there now.
        found = [Answer(**row) for row in self._answer_log.read()]
        self.answers = {answer.key: answer for answer in found if answer.status != "errored"}
        given = {case.id: self._num_answers(case) for case in self.suite.cases}
        self.posix = {
            row["id"]: row["posix"]
            for row in self._posix_log.read()
            if row["posix"] is not None and row["answers"] == given.get(row["id"])
        }

    @property
    def unanswered(self) -> list[Request]:
        """Requests that have no answer yet."""
        return [request for request in self.suite.requests() if request.key not in self.answers]

    @property
    def without_posix(self) -> list[Case]:
        """Cases whose POSIX is still to be measured."""
        return [case for case in self.suite.cases if case.id not in self.posix] if self.suite.with_posix else []

    def responses(self, case: Case) -> list[str | None]:
        """What the model said to each wording of a case."""
        found = [self.answers.get(key_of(case, wording)) for wording in range(len(case.wordings))]
        return [answer.response if answer is not None else None for answer in found]

    def _num_answers(self, case: Case) -> int:
        return sum(response is not None for response in self.responses(case))

    def answer(self, subject: Subject) -> None:
        """
        Has the model answer what it has not answered yet, and measures POSIX.

        Args:
            subject ([`~trl_robust.attacks.Subject`]):
                The model.
        """

        def write(answers: list[Answer]) -> None:
            self._answer_log.append([asdict(answer) for answer in answers])
            self.answers |= {answer.key: answer for answer in answers}

        if waiting := self.unanswered:
            sample_answers(subject, waiting, self.suite.sampling, write, f"{self.name}: answers")
        cases = self.without_posix
        for number in subject.track(range(len(cases)), f"{self.name}: POSIX"):
            case = cases[number]
            value, reason = None, None
            try:
                value = posix_of_case(subject, case.wordings, self.responses(case))
            except RuntimeError as error:  # out of memory for one case; without a value it is counted as excluded
                reason = f"{type(error).__name__}: {error}"
            row = {"id": case.id, "posix": value, "answers": self._num_answers(case), "reason": reason}
            self._posix_log.append([row])
            self.posix[case.id] = value

    def score(self, judge: PreferenceJudge) -> None:
        """
        Judges the answers that this judge has not scored yet. The judge sees the original question.

        Args:
            judge ([`PreferenceJudge`]):
                The judge.
        """
        log = Log(self.folder / f"scores-{self.label}-{fingerprint(_judge_entry(judge))[:12]}.jsonl")
        # A score belongs to the text it was given for: an answer that errored at first may be another one now.
        known = {(row["key"], row["response"]): row["score"] for row in log.read() if row["score"] is not None}
        waiting = []
        for case, key in self._keys():
            answer = self.answers.get(key)
            if answer is None or answer.status != "generated":
                continue
            if (score := known.get((key, _digest(answer.response)))) is not None:
                self.verdicts[key] = Verdict(score)
            else:
                seen = JudgedAnswer(case.question, answer.response or "", case.answer, case.reference)
                waiting.append((key, seen))
        starts = range(0, len(waiting), JUDGED_AT_ONCE)
        for start in _track(starts, f"{self.name}: judge {judge.name}"):
            batch = waiting[start : start + JUDGED_AT_ONCE]
            verdicts = judge.judge([seen for _, seen in batch])
            log.append(
                [
                    {"key": key, "response": _digest(seen.response), "score": verdict.score, "reason": verdict.reason}
                    for (key, seen), verdict in zip(batch, verdicts, strict=True)
                ]
            )
            self.verdicts |= {key: verdict for (key, _), verdict in zip(batch, verdicts, strict=True)}

    def matrix(self) -> list[list[float | None]]:
        """Scores in cases x wordings, `None` where there is none."""
        return [
            [self._score_of(key_of(case, wording)) for wording in range(len(case.wordings))]
            for case in self.suite.cases
        ]

    def samples(self) -> list[list[float | None]]:
        """Scores of the answers to the original wording."""
        numbers = range(self.suite.samples_of_original)
        return [[self._score_of(key_of(case, 0, sample)) for sample in numbers] for case in self.suite.cases]

    def _score_of(self, key: str) -> float | None:
        verdict = self.verdicts.get(key)
        return verdict.score if verdict is not None else None

    def _keys(self) -> Iterable[tuple[Case, str]]:
        for case in self.suite.cases:
            for wording in range(len(case.wordings)):
                for sample in range(self.suite.samples_of_original if wording == 0 else 1):
                    yield case, key_of(case, wording, sample)

    def entry(self, judge: PreferenceJudge | None, *, seed: int = 0) -> dict[str, Any]:
        """
        Everything measured, for `results.json`.

        Args:
            judge ([`PreferenceJudge`], *optional*):
                Who judged; without one only what needs no judge is measured.
            seed (`int`, *optional*, defaults to `0`):
                Seed of the bootstrap.

        Returns:
            `dict`.
        """
        cases = self.suite.cases
        responses = [self.responses(case) for case in cases]
        found: dict[str, Any] = {
            "version": VERSION,
            "judge": None if judge is None else _judge_entry(judge),
            "counts": self._counts(judge is not None),
            "agreement": answer_agreement(responses, seed=seed),
            "length": _lengths(responses),
        }
        if self.suite.with_posix:
            per_case = [self.posix.get(case.id) for case in cases]
            posix: dict[str, Any] = dict(summed_posix(per_case, responses, seed=seed))
            posix.pop("cases")  # they stand below, case by case
            found["posix"] = posix
        if judge is not None:
            found |= self._scored(judge, seed)
        found["cases"] = self._by_case(judge is not None)
        return found

    def _scored(self, judge: PreferenceJudge, seed: int) -> dict[str, Any]:
        matrix = self.matrix()
        found: dict[str, Any] = {
            "robustness": prompt_robustness(matrix, scale=SCALE, seed=seed),
            "sensitivity": prompt_sensitivity(matrix, scale=SCALE, seed=seed),
            "same_prompt_null": None,
        }
        if self.suite.samples_of_original > 1:
            found["same_prompt_null"] = same_prompt_null(matrix, self.samples(), scale=SCALE, seed=seed)
        if judge.needs == "answer":
            return found
        found["win_rate"] = win_rate([row[0] for row in matrix])
        if all(case.reference for case in self.suite.cases):
            found["length_controlled"] = {
                "original": self._length_controlled([(case, 0) for case in self.suite.cases]),
                "all_wordings": self._length_controlled(
                    [(case, wording) for case in self.suite.cases for wording in range(len(case.wordings))]
                ),
            }
        return found

    def _length_controlled(self, places: list[tuple[Case, int]]) -> Any:
        scores, lengths, references = [], [], []
        for case, wording in places:
            answer = self.answers.get(key_of(case, wording))
            scores.append(self._score_of(key_of(case, wording)))
            lengths.append(len(answer.response or "") if answer is not None else 0)
            references.append(len(case.reference or ""))
        return length_controlled_win_rate(scores, lengths, references)

    def _by_case(self, judged: bool) -> list[dict[str, Any]]:
        rows = []
        for case, scores, samples in zip(self.suite.cases, self.matrix(), self.samples(), strict=True):
            row: dict[str, Any] = {"id": case.id}
            if judged:
                row["scores"] = scores
                if self.suite.samples_of_original > 1:
                    row["samples"] = samples
            if self.suite.with_posix:
                row["posix"] = self.posix.get(case.id)
            rows.append(row)
        return rows

    def _counts(self, judged: bool) -> dict[str, int]:
        counts = dict.fromkeys(("scored" if judged else "answered", "errored", "skipped"), 0)
        for row in self.generations(judged):
            counts["answered" if row["status"] == "generated" else row["status"]] += 1
        return {f"n_{name}": count for name, count in counts.items()}

    def generations(self, judged: bool) -> list[dict[str, Any]]:
        """
        The rows of `generations.jsonl`.

        Args:
            judged (`bool`):
                Whether there was a judge; what it did not score is then errored.

        Returns:
            `list[dict]`: `model`, `id`, `question` (the original), `wording` (its number), `sample`, `prompt`,
            `response`, `status`, `score` and `reason`.
        """
        rows = []
        for case, key in self._keys():
            _, wording, sample = key.rsplit("/", 2)
            answer = self.answers.get(key) or Answer(key, None, "errored", "not answered")
            status, score, reason = answer.status, None, answer.reason
            if judged and status == "generated":
                verdict = self.verdicts.get(key) or Verdict(None, "not judged")
                status, score, reason = verdict.status, verdict.score, verdict.reason
            rows.append(
                {
                    "model": self.name,
                    "id": case.id,
                    "question": case.question,
                    "wording": int(wording),
                    "sample": int(sample),
                    "prompt": case.wordings[int(wording)],
                    "response": answer.response,
                    "status": status,
                    "score": score,
                    "reason": reason,
                }
            )
        return rows


def compared(first: ModelRun, other: ModelRun, *, seed: int = 0) -> dict[str, Any]:
    """
    Paired differences of two models that were judged alike, for `results.json`.

    Args:
        first, other ([`ModelRun`]):
            The models; differences are `other` minus `first`.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the bootstrap.

    Returns:
        `dict`: `baseline` (name of the first), and what [`paired_robustness`] gives.
    """
    return {"baseline": first.name, **paired_robustness(first.matrix(), other.matrix(), scale=SCALE, seed=seed)}


def fingerprint_of_cases(cases: Sequence[Case]) -> str:
    """What the wordings are, as SHA-256. Answers and references may be corrected between two runs."""
    return fingerprint([[case.id, *case.wordings] for case in cases])


def _judge_entry(judge: PreferenceJudge) -> dict[str, Any]:
    return {"name": judge.name, "version": judge.version, **judge.settings()}


def _digest(text: str | None) -> str:
    return hashlib.sha256((text or "").encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _lengths(responses: Sequence[Sequence[str | None]]) -> dict[str, float | None]:
    """Mean characters and words of the answers to the original wording, and to all wordings."""
    original = [case[0] for case in responses if case[0] is not None]
    all_of_them = [text for case in responses for text in case if text is not None]
    found: dict[str, float | None] = {}
    for name, texts in (("original", original), ("all_wordings", all_of_them)):
        found[f"characters_{name}"] = sum(map(len, texts)) / len(texts) if texts else None
        found[f"words_{name}"] = sum(len(text.split()) for text in texts) / len(texts) if texts else None
    return found


def _track(steps: Sequence[int], description: str) -> Iterable[int]:
    console = Console(stderr=True)
    return track(steps, description, console=console, disable=not console.is_terminal, transient=True)
