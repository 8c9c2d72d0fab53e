"""Language models as judges, by the protocol of AlpacaEval 2: one token, `m` or `M`, and its probability.

The judge sees the original question and two answers named `m` and `M`; which of them is the model's is drawn by a
seed. The preference is `P(model's) / (P(m) + P(M))` among the five most likely tokens; a name that is not among them
counts 0, and where neither is there, the answer is errored. The text of the prompt is ours, so rates do not compare to
published ones.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from jinja2 import TemplateError

from ..attacks import Subject
from ..attacks.endpoint import Endpoint, EndpointError
from .preference_judges import JudgedAnswer, Verdict

TOP = 5
"""How many of the most likely tokens are looked at."""

SYSTEM = (
    "You compare two answers to one instruction and name the better one. Judge as careful people would: an answer is "
    "better where it does what was asked, is right, and is clear. Length and order do not matter."
)

TEMPLATE = """Here is an instruction, and two answers to it from different models, named m and M.

<instruction>
{question}
</instruction>

<answer name="m">
{first}
</answer>

<answer name="M">
{second}
</answer>

Which answer is better? Reply with its name alone, m or M, and nothing else."""


def judge_prompt(answer: JudgedAnswer, seed: int) -> tuple[str, str]:
    """
    The prompt for one comparison, and the name that the model's answer has in it.

    Args:
        answer ([`JudgedAnswer`]):
            The comparison; it has a reference.
        seed (`int`):
            With the texts, it settles the order.

    Returns:
        `tuple`: the prompt, and `"m"` or `"M"`.
    """
    text = "\0".join((str(seed), answer.question, answer.response, str(answer.reference)))
    ours_first = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[0] % 2 == 0
    first, second = (answer.response, answer.reference) if ours_first else (answer.reference, answer.response)
    # Not str.format on what was filled in already: answers may hold braces.
    return TEMPLATE.format(question=answer.question, first=first, second=second), "m" if ours_first else "M"


def preference_of(top: Sequence[tuple[str, float]], ours: str) -> Verdict:
    """
    Preference for the model's answer from the most likely tokens.

    Args:
        top (`Sequence[tuple[str, float]]`):
            Tokens with their log-probabilities.
        ours (`str`):
            Name of the model's answer, `"m"` or `"M"`.

    Returns:
        [`Verdict`]: errored where neither name is among them.
    """
    mass = {"m": 0.0, "M": 0.0}
    for token, log_probability in top:
        # A tokenizer may have the name with and without a space before it.
        if (name := token.strip()) in mass:
            mass[name] += math.exp(log_probability)
    total = sum(mass.values())
    if not (math.isfinite(total) and total > 0):
        said = ", ".join(repr(token) for token, _ in top)
        return Verdict(None, f"the judge named neither m nor M among its {TOP} most likely tokens ({said})")
    return Verdict(mass[ours] / total)


class LLMJudge:
    """
    A model on this machine as judge.

    Args:
        subject ([`~trl_robust.attacks.Subject`]):
            The judge. Without a chat template, the prompt is given as plain text.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the order.
        source (`str`, *optional*):
            What the results call the model.
    """

    name: ClassVar[str] = "llm"
    version: ClassVar[int] = 1
    needs: ClassVar[Literal["answer", "reference"] | None] = "reference"

    def __init__(self, subject: Subject, *, seed: int = 0, source: str = "") -> None:
        self.subject, self.seed, self.source = subject, seed, source

    def settings(self) -> dict[str, Any]:
        """Model and seed."""
        return {"model": self.source, "seed": self.seed}

    def judge(self, answers: Sequence[JudgedAnswer]) -> list[Verdict]:
        """One verdict an answer."""
        found: list[Verdict] = [Verdict(None, "the case has no `reference` answer")] * len(answers)
        waiting: list[tuple[int, list[int], str]] = []
        for number, answer in enumerate(answers):
            if answer.reference:
                text, ours = judge_prompt(answer, self.seed)
                tokens = self._encode(text)
                if len(tokens) > self.subject.max_prompt_tokens:
                    reason = f"the judge's prompt of {len(tokens)} tokens is over {self.subject.max_prompt_tokens}"
                    found[number] = Verdict(None, reason)
                else:
                    waiting.append((number, tokens, ours))
        for start in range(0, len(waiting), self.subject.batch_size):
            batch = waiting[start : start + self.subject.batch_size]
            try:
                tops = self._top([tokens for _, tokens, _ in batch])
            except RuntimeError as error:  # out of memory
                for number, _, _ in batch:
                    found[number] = Verdict(None, f"{type(error).__name__}: {error}")
                continue
            for (number, _, ours), top in zip(batch, tops, strict=True):
                found[number] = preference_of(top, ours)
        return found

    def _encode(self, text: str) -> list[int]:
        if not self.subject.tokenizer.chat_template:
            return self.subject.encode(f"{SYSTEM}\n\n{text}\n\n")
        try:
            return self.subject.encode([{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}])
        except TemplateError:  # some, such as Gemma's, take no system turn
            return self.subject.encode(f"{SYSTEM}\n\n{text}")

    @torch.no_grad()
    def _top(self, rows: list[list[int]]) -> list[list[tuple[str, float]]]:
        tokens = self.subject.pad(rows, "left")
        mask = self.subject.pad([[1] * len(row) for row in rows], "left", 0)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        output = self.subject.model(
            input_ids=tokens, attention_mask=mask, position_ids=positions, logits_to_keep=1, use_cache=False
        )
        best = output.logits[:, -1].float().log_softmax(-1).topk(TOP)
        return [
            [(self.subject.tokenizer.decode([token]), value) for token, value in zip(ids, values, strict=True)]
            for ids, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]


class EndpointJudge:
    """
    Any endpoint with OpenAI's chat completions and `top_logprobs` as judge: a local server or a hosted one.

    A call that fails (no connection, timeout, status 408, 409, 429 or 5xx, an answer without log-probabilities) is
    tried again; one that still fails is errored.

    Args:
        url (`str`):
            Base URL, such as `http://localhost:8000/v1`.
        model (`str`):
            Name of the model there.
        key_variable (`str`, *optional*):
            Environment variable that holds the API key. The key is never written anywhere.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the order.
        timeout (`float`, *optional*, defaults to `60.0`):
            Seconds for one call.
        retries (`int`, *optional*, defaults to `3`):
            Further tries.
        pause (`float`, *optional*, defaults to `1.0`):
            Seconds before the second try; twice as long before each further one.

    Raises:
        `ValueError`: no such URL, or the variable is not set.
    """

    name: ClassVar[str] = "endpoint"
    version: ClassVar[int] = 1
    needs: ClassVar[Literal["answer", "reference"] | None] = "reference"

    def __init__(
        self,
        url: str,
        model: str,
        *,
        key_variable: str | None = None,
        seed: int = 0,
        timeout: float = 60.0,
        retries: int = 3,
        pause: float = 1.0,
    ) -> None:
        self.endpoint = Endpoint(url, model, key_variable=key_variable, timeout=timeout, retries=retries, pause=pause)
        self.seed = seed

    def settings(self) -> dict[str, Any]:
        """Host, model and seed."""
        return {**self.endpoint.settings(), "seed": self.seed}

    def judge(self, answers: Sequence[JudgedAnswer]) -> list[Verdict]:
        """One verdict an answer; four calls at a time."""
        return self.endpoint.at_once(self._verdict, answers)

    def _verdict(self, answer: JudgedAnswer) -> Verdict:
        if not answer.reference:
            return Verdict(None, "the case has no `reference` answer")
        text, ours = judge_prompt(answer, self.seed)
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]
        settings = {"max_tokens": 1, "temperature": 1.0, "logprobs": True, "top_logprobs": TOP}
        try:
            return preference_of(self.endpoint.ask(messages, _top_of, **settings), ours)
        except EndpointError as error:
            return Verdict(None, f"endpoint: {error}")


def _top_of(content: bytes) -> list[tuple[str, float]]:
    """The most likely first tokens of a chat completion."""
    try:
        first = json.loads(content)["choices"][0]["logprobs"]["content"][0]
        return [(str(item["token"]), float(item["logprob"])) for item in first["top_logprobs"]]
    except (ValueError, KeyError, IndexError, TypeError) as error:
        shown = content[:200].decode("utf-8", "replace")
        raise EndpointError(f"the reply holds no log-probabilities: {shown}", again=True) from error
