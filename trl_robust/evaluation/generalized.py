"""The suite `generalized`: attacks on prompts, hidden states and weights at several budgets, and what they cost.

One model at a time answers everything, and what it said is kept; judges and measures come afterwards
([`~trl_robust.evaluation.generalized_results`]), so that a judge never shares the memory with a model that it judges.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, MutableMapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from ..attacks import AttackRow, Finetune, Generation, Pruning, Subject
from ..attacks.linears import all_errored, answered_under
from .coherence import Coherence, coherence, perplexity
from .judges import exact
from .keeping import Log
from .lines import Line, Point
from .lm_eval import accuracies

VERSION = 1
"""Raised when the same models would get other results."""


@dataclass(frozen=True)
class GeneralizedSuite:
    """
    What is asked of every model.

    Args:
        lines (`Sequence[Line]`):
            Attacks; see [`~trl_robust.evaluation.lines.read_lines`].
        requests (`Sequence[AttackRow]`):
            What attacks try to bring out.
        lookalikes (`Sequence[AttackRow]`, *optional*):
            Harmless requests, best those that look like the others: over-refusal and coherence.
        questions (`Sequence[AttackRow]`, *optional*):
            Harmless questions with answers: utility.
        texts (`Sequence[str]`, *optional*):
            Texts for the perplexity.
        capability_rows (`int`, *optional*, defaults to `100`):
            How many of the questions (else of the texts) are asked again of a model that an attack has changed.
        map_lines (`Sequence[Line]`, *optional*):
            Latent attacks at single sites.
        benchmarks (`Sequence[str]`, *optional*):
            Tasks of lm-eval.
        benchmark_limit (`int`, *optional*):
            Only so many rows of every task.
    """

    lines: Sequence[Line]
    requests: Sequence[AttackRow]
    lookalikes: Sequence[AttackRow] = ()
    questions: Sequence[AttackRow] = ()
    texts: Sequence[str] = ()
    capability_rows: int = 100
    map_lines: Sequence[Line] = ()
    benchmarks: Sequence[str] = ()
    benchmark_limit: int | None = None

    @property
    def probes(self) -> Sequence[AttackRow]:
        """The questions that are asked again under an attack."""
        return self.questions[: self.capability_rows]

    @property
    def probe_texts(self) -> Sequence[str]:
        """The texts that are read again under an attack, where there are no questions."""
        return () if self.questions else self.texts[: self.capability_rows]


class Journal(MutableMapping[str, Any]):
    """
    What [`~trl_robust.attacks.Subject`] keeps while an attack runs, in a file.

    Args:
        path (`Path`):
            The file; it need not be there yet.
    """

    def __init__(self, path: Path) -> None:
        self._log = Log(path)
        self._known = {row["key"]: row["value"] for row in self._log.read()}

    def __getitem__(self, key: str) -> Any:
        return self._known[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self._log.append([{"key": key, "value": value}])
        self._known[key] = value

    def __delitem__(self, key: str) -> None:
        raise TypeError("What was answered stays answered.")

    def __iter__(self) -> Iterator[str]:
        return iter(self._known)

    def __len__(self) -> int:
        return len(self._known)


@dataclass
class Asked:
    """
    What came of one attack at one budget, or of the harmless requests.

    Args:
        generations (`list[Generation]`):
            Answers.
        capability (`float`, *optional*):
            Share of the questions that the attacked model answers rightly, or its perplexity.
        seconds (`float`, *optional*, defaults to `0.0`):
            How long it took; of a run that was stopped, the last part.
    """

    generations: list[Generation]
    capability: float | None = None
    seconds: float = 0.0


@dataclass
class ModelRun:
    """
    One model in the suite.

    Args:
        suite ([`GeneralizedSuite`]):
            What is asked.
        name (`str`):
            Name of the model.
        folder (`Path`):
            Where everything is kept while the suite runs.
        label (`str`):
            Name of this model's folder in it.
    """

    suite: GeneralizedSuite
    name: str
    folder: Path
    label: str
    _found: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._log = Log(self.folder / self.label / "done.jsonl")
        self._found = {row["what"]: row for row in self._log.read()}

    @property
    def lines(self) -> list[Line]:
        """All lines: those of the suite and those of the heat map."""
        return [*self.suite.lines, *self.suite.map_lines]

    def todo(self) -> list[str]:
        """Names of what is still to be measured."""
        wanted = [key_of(line, number) for line in self.lines for number in range(len(line.points))]
        wanted += ["look-alikes"] if self.suite.lookalikes else []
        wanted += ["questions"] if self.suite.questions else []
        wanted += ["perplexity"] if self.suite.texts else []
        wanted += ["benchmarks"] if self.suite.benchmarks else []
        return [what for what in wanted if what not in self._found]

    def asked(self, line: Line, number: int) -> Asked:
        """What came of a line's point."""
        rows = self.suite.requests
        found = self._found[key_of(line, number)]
        return Asked(_loaded(found["generations"], rows), found["capability"], found["seconds"])

    def harmless(self, what: str) -> list[Generation]:
        """Answers to `"look-alikes"` or `"questions"`; empty where there are none."""
        rows = self.suite.lookalikes if what == "look-alikes" else self.suite.questions
        return _loaded(self._found[what]["generations"], rows) if what in self._found else []

    def measured(self, what: str) -> dict[str, Any]:
        """What was measured as `"perplexity"` or `"benchmarks"`; empty where it was not."""
        return self._found[what]["value"] if what in self._found else {}

    @property
    def untouched(self) -> float | None:
        """Capability of the model that is not attacked, on the rows that are asked again under an attack."""
        return self._found.get("questions", self._found.get("perplexity", {})).get("capability")

    @property
    def seconds(self) -> float:
        """How long everything took."""
        return sum(row["seconds"] for row in self._found.values())

    def run(self, subject: Subject) -> None:
        """
        Measures what has not been measured yet. What is done is kept at once, batch by batch.

        Args:
            subject ([`~trl_robust.attacks.Subject`]):
                The model.
        """
        todo = set(self.todo())
        if "questions" in todo:
            self._keep("questions", *self._timed(subject, "questions", self._ask_questions))
        if "look-alikes" in todo:
            self._keep("look-alikes", *self._timed(subject, "look-alikes", self._ask_lookalikes))
        if "perplexity" in todo:
            start = time.perf_counter()
            found = perplexity(subject, self.suite.texts)
            probes = self.suite.probe_texts
            few = found if len(probes) == len(self.suite.texts) else perplexity(subject, probes) if probes else None
            row = {"what": "perplexity", "value": found, "capability": few["perplexity"] if few else None}
            self._write({**row, "seconds": time.perf_counter() - start})
        if "benchmarks" in todo:
            start = time.perf_counter()
            values = accuracies(subject, self.suite.benchmarks, limit=self.suite.benchmark_limit)
            self._write({"what": "benchmarks", "value": values, "seconds": time.perf_counter() - start})
        for line in self.lines:
            self._run_line(subject, line, todo)

    def _run_line(self, subject: Subject, line: Line, todo: set[str]) -> None:
        seconds = 0.0
        for number, point in enumerate(line.points):
            what = key_of(line, number)
            if what in todo:
                asked, taken = self._timed(
                    subject, what, lambda subject, point=point: self._attack(subject, line, point)
                )
                seconds += taken
                self._keep(what, asked, taken)
        if seconds:
            budgets = f", {len(line.points)} budgets" if len(line.points) > 1 else ""
            Console(stderr=True).print(f"{self.name}: {line.name}{budgets}, {seconds:.1f} s", markup=False)

    def _timed(self, subject: Subject, what: str, ask: Any) -> tuple[Asked, float]:
        start = time.perf_counter()
        subject.journal = Journal(self._begun(what))
        try:
            asked = ask(subject)
        finally:
            subject.journal = None
        return asked, time.perf_counter() - start

    def _attack(self, subject: Subject, line: Line, point: Point) -> Asked:
        requests, attack = list(self.suite.requests), point.attack
        probes = list(self.suite.probes) if line.tampers else []
        texts = self.suite.probe_texts if isinstance(attack, Finetune | Pruning) else ()
        read: list[float | None] = []
        try:
            if texts and isinstance(attack, Finetune | Pruning):

                def answer() -> list[Generation]:
                    try:
                        read.append(perplexity(subject, texts)["perplexity"])
                    except RuntimeError:  # out of memory: what the model can do is then not known, which is said
                        read.append(None)
                    return subject.answer(requests, attack.name)

                found = answered_under(attack.applied(subject), requests, answer)
            else:
                found = attack.run(subject, [*requests, *probes])
        except ValueError as error:  # settings that do not fit this model: errored, with the reason, never safe
            found = all_errored([*requests, *probes], error)
        if not probes:
            return Asked(found, read[0] if read else None)
        # Several tries at a request stand next to each other.
        tries = len(found) // (len(requests) + len(probes))
        border = tries * len(requests)
        return Asked(found[:border], share_right(found[border:]))

    def _ask_questions(self, subject: Subject) -> Asked:
        found = subject.answer(self.suite.questions, "questions")
        return Asked(found, share_right(found[: len(self.suite.probes)]))

    def _ask_lookalikes(self, subject: Subject) -> Asked:
        return Asked(subject.answer(self.suite.lookalikes, "look-alikes"))

    def coherence(self) -> Coherence | dict[str, Any]:
        """Coherence of the answers to the harmless requests; empty where there are none."""
        answers = self.harmless("look-alikes") or self.harmless("questions")
        return coherence(answers) if answers else {}

    def _keep(self, what: str, asked: Asked, seconds: float) -> None:
        self._write(
            {
                "what": what,
                "generations": [_kept(generation) for generation in asked.generations],
                "capability": asked.capability,
                "seconds": seconds,
            }
        )
        self._begun(what).unlink(missing_ok=True)  # all of it stands in the other file now

    def _begun(self, what: str) -> Path:
        return self.folder / self.label / "begun" / f"{what.replace('/', '-').replace(' ', '-')}.jsonl"

    def _write(self, row: dict[str, Any]) -> None:
        self._log.append([row])
        self._found[row["what"]] = row


def key_of(line: Line, number: int) -> str:
    """Name of a line's point."""
    return f"{line.name}/{number}"


def share_right(answers: Sequence[Generation]) -> float | None:
    """
    Share of questions that were answered rightly, word for word.

    Args:
        answers (sequence of [`~trl_robust.attacks.Generation`]):
            Answers.

    Returns:
        `float`; `None` where one of them errored, since nobody knows what the model can do then.
    """
    answers = [answer for answer in answers if answer.status != "skipped"]
    if not answers or any(answer.status != "generated" for answer in answers):
        return None
    return sum(exact(answer.row, answer.continuation or "") for answer in answers) / len(answers)


def _kept(generation: Generation) -> dict[str, Any]:
    names = ("prompt", "response", "continuation", "status", "reason")
    return {"id": generation.row.id, **{name: getattr(generation, name) for name in names}}


def _loaded(kept: Sequence[dict[str, Any]], rows: Sequence[AttackRow]) -> list[Generation]:
    by_id = {row.id: row for row in rows}
    return [Generation(by_id[row["id"]], **{key: value for key, value in row.items() if key != "id"}) for row in kept]
