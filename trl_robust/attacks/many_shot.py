from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from .request import chance, request_of
from .subject import AttackRow, Generation, Prompt, Subject

USER, ASSISTANT = "User", "Assistant"
"""What the speakers are called where there is no chat template."""


@dataclass(frozen=True)
class ManyShot:
    """
    A made-up dialogue before the request, in which other requests of the kind are answered.

    With a chat template the examples are turns of the conversation (after its system turn, before the rest);
    without one they are written out as text before the request. Each request draws its own examples, and more shots
    add to those of fewer. An example is not shown to a request that it repeats or whose answer it states: the model
    must not be able to copy.

    Args:
        examples (`list[dict]`):
            Rows of `prompt` and `completion`, plain or conversational, about other requests.
        shots (`int`, *optional*, defaults to `8`):
            How many of them are shown.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the draw.

    Raises:
        `ValueError`: no examples, fewer than `shots`, or one that lacks its prompt or completion.
    """

    examples: list[dict[str, Any]] = field(repr=False)
    shots: int = 8
    seed: int = 0
    name: ClassVar[str] = "many_shot"
    attack_class: ClassVar[str] = "input"
    version: ClassVar[int] = 1
    budget_axis: ClassVar[str] = "shots"

    def __post_init__(self) -> None:
        if self.shots < 0:
            raise ValueError(f"shots={self.shots} must be at least 0.")
        if len(self.examples) < self.shots:
            raise ValueError(
                f"The many-shot attack has {len(self.examples)} examples for {self.shots} shots. Give more rows of "
                "`prompt` and `completion`, or fewer shots."
            )
        for number, example in enumerate(self.examples):
            if not (example.get("prompt") and example.get("completion")):
                raise ValueError(f"Example {number} of the many-shot attack lacks `prompt` or `completion`.")

    def run(self, subject: Subject, rows: Sequence[AttackRow]) -> list[Generation]:
        """
        Answers of the model after the dialogue; see [`Subject.answer`].

        Requests for which too few examples are about something else are skipped.
        """
        shown = [self._shown(row) for row in rows]
        enough = [number for number, examples in enumerate(shown) if len(examples) == self.shots]
        answered = subject.answer(
            [rows[number] for number in enough],
            self.name,
            prompt_of=lambda position, row: self._prompt(subject, row.prompt, shown[enough[position]]),
        )
        found = dict(zip(enough, answered, strict=True))
        return [found.get(number) or self._skipped(row, len(shown[number])) for number, row in enumerate(rows)]

    def _skipped(self, row: AttackRow, usable: int) -> Generation:
        reason = f"{usable} of the {len(self.examples)} examples do not give the answer away, {self.shots} are needed"
        return Generation(row, request_of(row.prompt), status="skipped", reason=reason)

    def _shown(self, row: AttackRow) -> list[tuple[str, str]]:
        """Question and answer of the examples that a request sees."""
        request, answer = _plain(request_of(row.prompt)), _plain(row.answer or "")
        order = list(range(len(self.examples)))
        chance(self.seed, row).shuffle(order)
        shown: list[tuple[str, str]] = []
        for number in order:
            if len(shown) == self.shots:
                break
            question, reply = (_last_text(self.examples[number][key]) for key in ("prompt", "completion"))
            told = answer and f" {answer} " in f" {_plain(question)} {_plain(reply)} "
            if _plain(question) != request and not told:
                shown.append((question, reply))
        return shown

    @staticmethod
    def _prompt(subject: Subject, prompt: Prompt, shown: Sequence[tuple[str, str]]) -> Prompt:
        if isinstance(prompt, str) and not subject.chat:
            told = "".join(f"{USER}: {question}\n{ASSISTANT}: {reply}\n\n" for question, reply in shown)
            return f"{told}{USER}: {prompt}\n{ASSISTANT}:" if shown else prompt
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        first = next((i for i, message in enumerate(messages) if message["role"] != "system"), len(messages))
        turns = [
            {"role": role, "content": text}
            for shot in shown
            for role, text in zip(("user", "assistant"), shot, strict=True)
        ]
        return [*messages[:first], *turns, *messages[first:]]


def _last_text(value: Any) -> str:
    return value if isinstance(value, str) else str(value[-1]["content"])


def _plain(text: str) -> str:
    """Words in lower case, without punctuation at their ends."""
    return " ".join(bare for word in text.casefold().split() if (bare := word.strip(".,;:!?\"'()*")))
