"""Answers drawn at random, each from its own seed, so that no answer depends on what else is in the batch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jinja2 import TemplateError
from transformers import LogitsProcessor, LogitsProcessorList

from ..attacks import Subject

MASKED = float("-inf")


@dataclass(frozen=True)
class Sampling:
    """
    How answers are drawn.

    Args:
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature; 0 is greedy.
        top_p (`float`, *optional*, defaults to `0.9`):
            Nucleus: the most likely tokens that together have this probability.
        seed (`int`, *optional*, defaults to `0`):
            Seed; with the key of a request it settles the answer.
    """

    temperature: float = 1.0
    top_p: float = 0.9
    seed: int = 0


@dataclass(frozen=True)
class Request:
    """
    One prompt to be answered once.

    Args:
        key (`str`):
            Its name, from which its random numbers come: no two requests share one.
        prompt (`str`):
            The prompt.
    """

    key: str
    prompt: str


@dataclass(frozen=True)
class Answer:
    """
    What became of a request.

    Args:
        key (`str`):
            Name of the request.
        response (`str`, *optional*):
            What the model said.
        status (`str`):
            `"generated"`, `"errored"` or `"skipped"`.
        reason (`str`, *optional*):
            Why it was not answered.
    """

    key: str
    response: str | None
    status: str
    reason: str | None = None


class _Nucleus(LogitsProcessor):
    """
    Picks the next token of every row from the row's own uniform numbers, by the inverse of the nucleus' distribution.

    All other tokens are masked, so that greedy decoding takes the one that was picked. Drawing with torch's generator
    would make an answer depend on the other rows of its batch, and a resumed run would say something else.
    """

    def __init__(self, uniforms: torch.Tensor, width: int, sampling: Sampling) -> None:
        self.uniforms, self.width, self.sampling = uniforms, width, sampling

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if scores.isnan().any():
            raise FloatingPointError("the model's logits are not finite")
        if self.sampling.temperature == 0:
            return scores
        step = input_ids.shape[1] - self.width
        probabilities = (scores.float() / self.sampling.temperature).softmax(-1)
        ordered, tokens = probabilities.sort(dim=-1, descending=True, stable=True)
        cumulative = ordered.cumsum(-1)
        # A token is in the nucleus where those before it do not reach top_p; the first always is.
        kept = ordered * (cumulative - ordered < self.sampling.top_p)
        cumulative = kept.cumsum(-1)
        target = self.uniforms[:, step : step + 1] * cumulative[:, -1:]
        chosen = tokens.gather(-1, torch.searchsorted(cumulative, target, right=True).clamp(max=tokens.shape[-1] - 1))
        return torch.full_like(scores, MASKED).scatter(-1, chosen, 0.0)  # type: ignore[return-value]


def sample_answers(
    subject: Subject,
    requests: Sequence[Request],
    sampling: Sampling,
    write: Callable[[list[Answer]], None],
    description: str,
) -> None:
    """
    Has a model answer requests, batch by batch. Every request comes back: answered, skipped or errored.

    Args:
        subject ([`~trl_robust.attacks.Subject`]):
            The model.
        requests (`Sequence[Request]`):
            What is asked.
        sampling ([`Sampling`]):
            How answers are drawn.
        write (`Callable`):
            Takes the answers of each batch as soon as there are any.
        description (`str`):
            What the progress bar says.
    """
    waiting: list[tuple[Request, list[int]]] = []
    turned_away: list[Answer] = []
    for request in requests:
        try:
            tokens = subject.encode(request.prompt)
        except (TemplateError, ValueError) as error:  # a conversation that the chat template does not take
            turned_away.append(Answer(request.key, None, "errored", f"{type(error).__name__}: {error}"))
            continue
        if len(tokens) > subject.max_prompt_tokens:
            reason = f"{len(tokens)} tokens are over the limit of {subject.max_prompt_tokens}"
            turned_away.append(Answer(request.key, None, "skipped", reason))
        else:
            waiting.append((request, tokens))
    if turned_away:
        write(turned_away)
    # Prompts of like length together: less padding. The sort is stable, so a resumed run has the same batches.
    waiting.sort(key=lambda item: len(item[1]))
    for start in subject.track(range(0, len(waiting), subject.batch_size), description):
        batch = waiting[start : start + subject.batch_size]
        try:
            found = _generate(subject, batch, sampling)
        except (RuntimeError, ValueError, FloatingPointError) as error:
            # Out of memory and numerical failures of one batch; they are counted, never taken for answers.
            reason = f"{type(error).__name__}: {error}"
            write([Answer(request.key, None, "errored", reason) for request, _ in batch])
            continue
        texts = [subject.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in found]
        write([Answer(request.key, text, "generated") for (request, _), text in zip(batch, texts, strict=True)])


@torch.no_grad()
def _generate(subject: Subject, batch: list[tuple[Request, list[int]]], sampling: Sampling) -> list[list[int]]:
    rows = [tokens for _, tokens in batch]
    tokens = subject.pad(rows, "left")
    uniforms = torch.stack([_uniforms(request.key, sampling.seed, subject.max_new_tokens) for request, _ in batch])
    nucleus = _Nucleus(uniforms.to(subject.device), tokens.shape[1], sampling)
    output = subject.model.generate(
        input_ids=tokens,
        attention_mask=subject.pad([[1] * len(row) for row in rows], "left", 0),
        max_new_tokens=subject.max_new_tokens,
        pad_token_id=subject.pad_token_id,
        logits_processor=LogitsProcessorList([nucleus]),
        # Whatever the model's own generation config says, so that models can be compared.
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
    )
    return output[:, tokens.shape[1] :].tolist()


def _uniforms(key: str, seed: int, count: int) -> torch.Tensor:
    """Numbers in [0, 1) of one request, the same on every machine."""
    digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.rand(count, generator=generator)
