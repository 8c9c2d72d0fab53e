"""A judge whose verdicts are kept, so that an evaluation that was killed asks it nothing twice."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from ..attacks.subject import Prompt
from .judge_forms import ResponseJudge, ResponseVerdict
from .keeping import Log, fingerprint

AT_ONCE = 32
"""Answers between two writes."""


class KeptJudge:
    """
    A judge with a memory. The same answer to the same request is judged once; what could not be judged is tried again
    by the next run.

    Args:
        judge ([`ResponseJudge`]):
            The judge.
        folder (`Path`):
            Where its verdicts are kept.
    """

    def __init__(self, judge: ResponseJudge, folder: Path) -> None:
        self.name, self.version = judge.name, judge.version
        self._judge: ResponseJudge | None = judge
        self._settings = judge.settings()
        asked = fingerprint([judge.name, judge.version, self._settings])
        self._log = Log(folder / f"verdicts-{judge.name}-{asked[:12]}.jsonl")
        self._known = {row["answer"]: ResponseVerdict(row["score"], None, row["details"]) for row in self._log.read()}

    def settings(self) -> dict[str, Any]:
        """Those of the judge."""
        return self._settings

    def forget(self) -> None:
        """Lets go of the judge's model; from then on only what is known can be asked for."""
        self._judge = None

    def judge(self, answers: Sequence[tuple[Prompt, str]]) -> list[ResponseVerdict]:
        """One verdict for each pair of a request and a response, in their order."""
        keys = [fingerprint([prompt, response]) for prompt, response in answers]
        found = {key: self._known[key] for key in keys if key in self._known}
        waiting = list({key: pair for key, pair in zip(keys, answers, strict=True) if key not in found}.items())
        for start in _track(range(0, len(waiting), AT_ONCE), f"judge {self.name}"):
            batch = waiting[start : start + AT_ONCE]
            assert self._judge is not None
            for (key, _), verdict in zip(batch, self._judge.judge([pair for _, pair in batch]), strict=True):
                found[key] = verdict
                if verdict.score is not None:
                    self._known[key] = verdict
                    self._log.append([{"answer": key, "score": verdict.score, "details": dict(verdict.details)}])
        return [found[key] for key in keys]


def _track(steps: Sequence[int], description: str) -> Iterable[int]:
    console = Console(stderr=True)
    return track(steps, description, console=console, disable=not console.is_terminal, transient=True)
