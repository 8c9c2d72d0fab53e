"""A model behind an address as the subject of attacks on prompts."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from .endpoint import Endpoint, EndpointError, text_of
from .journal import Journaled
from .request import request_of
from .sampling import Sampling
from .subject import AttackRow, Generation, Prompt

if TYPE_CHECKING:
    from . import Attack

CHUNK = 16
"""Requests between two steps of the progress bar."""


@dataclass
class Served(Journaled):
    """
    A model behind an address with OpenAI's chat completions: a local server or a hosted one.

    It stands in place of [`Subject`] for attacks that only ask. A call that fails for good leaves its request
    errored, with the reason.

    Args:
        url (`str`):
            Base URL, such as `http://localhost:8000/v1`.
        model (`str`):
            Name of the model there.
        key_variable (`str`, *optional*):
            Environment variable that holds the API key. The key is never written anywhere.
        max_new_tokens (`int`, *optional*, defaults to `64`):
            Length of an answer.
        timeout (`float`, *optional*, defaults to `60.0`):
            Seconds for one call.
        retries (`int`, *optional*, defaults to `3`):
            Further tries.
        pause (`float`, *optional*, defaults to `1.0`):
            Seconds before the second try; twice as long before each further one.
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show progress bars.
        journal (`MutableMapping`, *optional*):
            As in [`Subject`].

    Raises:
        `ValueError`: no such URL, or the variable is not set.
    """

    url: str = field(repr=False)
    model: str
    key_variable: str | None = field(default=None, repr=False)
    max_new_tokens: int = 64
    timeout: float = 60.0
    retries: int = 3
    pause: float = 1.0
    progress: bool = True
    journal: MutableMapping[str, Any] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self._endpoint = Endpoint(
            self.url,
            self.model,
            key_variable=self.key_variable,
            timeout=self.timeout,
            retries=self.retries,
            pause=self.pause,
        )

    @property
    def chat(self) -> bool:
        """Whether prompts are conversations: here they always are."""
        return True

    def answer(
        self,
        rows: Sequence[AttackRow],
        description: str,
        *,
        prompt_of: Callable[[int, AttackRow], Prompt] = lambda number, row: row.prompt,
        opening_of: Callable[[AttackRow], str] = lambda row: "",
        needs_target: bool = False,
        sampling: Sampling | None = None,
    ) -> list[Generation]:
        """
        Has the model answer requests, a few at a time; see [`Subject.answer`].

        Greedy is temperature 0 here, and a row's seed goes along with the request; how far the server keeps to them is
        its own affair.

        Args:
            rows (sequence of [`AttackRow`]):
                Requests.
            description (`str`):
                What the progress bar says.
            prompt_of, opening_of, needs_target, sampling (*optional*):
                As in [`Subject.answer`]. Rows with an opening are skipped: chat completions take none.

        Returns:
            `list` of [`Generation`], in the order of `rows`.
        """
        found, waiting = [], []
        for number, row in enumerate(rows):
            prompt = prompt_of(number, row)
            generation = Generation(row, request_of(prompt))
            found.append(generation)
            if needs_target and not row.target:
                generation.status, generation.reason = "skipped", "the row has no target"
            elif opening_of(row):
                generation.status = "skipped"
                generation.reason = "a served model takes no beginning of its answer"
            else:
                messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
                waiting.append((generation, messages, self._settings(row, sampling)))

        def reply(number: int) -> tuple[str | None, str | None]:
            _, messages, settings = waiting[number]
            # Request by request: a call may cost money, and is not made again for the sake of its neighbours.
            return self.remembered([description, number, messages, settings], partial(self._asked, messages, settings))

        for start in self.track(range(0, len(waiting), CHUNK), description):
            numbers = range(start, min(start + CHUNK, len(waiting)))
            for number, (text, reason) in zip(numbers, self._endpoint.at_once(reply, numbers), strict=True):
                generation = waiting[number][0]
                if text is None:
                    generation.status, generation.reason = "errored", reason
                else:
                    generation.response = generation.continuation = text
        return found

    def _settings(self, row: AttackRow, sampling: Sampling | None) -> dict[str, Any]:
        if sampling is None:
            return {"max_tokens": self.max_new_tokens, "temperature": 0.0}
        # Servers take seeds of 32 bits.
        seed = sampling.seed_of(row) % 2**31
        drawn = {"temperature": sampling.temperature, "top_p": sampling.top_p, "seed": seed}
        return {"max_tokens": self.max_new_tokens, **drawn}

    def _asked(self, messages: list[dict[str, str]], settings: dict[str, Any]) -> tuple[str | None, str | None]:
        """What the model says, or why it says nothing."""
        try:
            return self._endpoint.ask(messages, text_of, **settings), None
        except EndpointError as error:
            return None, f"endpoint: {error}"


def served_fault(attack: Attack) -> str | None:
    """
    Why an attack cannot be run on a served model.

    Args:
        attack ([`~trl_robust.attacks.Attack`]):
            The attack.

    Returns:
        `str`: one sentence, or `None` where it can.
    """
    if attack.attack_class not in ("none", "input") or attack.name == "gcg":
        return "it needs the model's weights, and a served model shows none; leave it out."
    if attack.name == "prefill":
        return "it begins the model's answer, which chat completions do not take; leave it out."
    if getattr(attack, "objective", None) == "random":
        return "its random words are the tokenizer's, and a served model shows none; leave it out."
    return None
