"""The model under attack, and how it is made to answer."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from jinja2 import TemplateError
from transformers import LogitsProcessor, LogitsProcessorList

from ..inner.injection import Change
from .journal import Journaled
from .loading import Adapter, load_model
from .sampling import Sampling

Prompt = str | list[dict[str, str]]


@dataclass(frozen=True)
class AttackRow:
    """
    One request.

    Args:
        id (`str`):
            Name of the row.
        prompt (`str` or `list[dict]`):
            The request, plain or as messages that end with a user turn.
        target (`str`, *optional*):
            The opening that an attack tries to bring out ("Sure, here is"). It must not contain the answer.
        answer (`str`, *optional*):
            What a response has to state for the attack to have succeeded, for the exact judge.
    """

    id: str
    prompt: Prompt
    target: str | None = None
    answer: str | None = None


@dataclass
class Generation:
    """
    What became of one request under one attack.

    Args:
        row ([`AttackRow`]):
            The request.
        prompt (`str`):
            What the model was given, as text.
        response (`str`, *optional*):
            What it answered; with a prefilled answer, the prefill and what follows it.
        continuation (`str`, *optional*):
            What the model itself said: the response without a prefill. This is what is judged.
        status (`str`, *optional*, defaults to `"generated"`):
            `"generated"`, `"errored"` or `"skipped"`; a judge turns the first into `"scored"`.
        reason (`str`, *optional*):
            Why it errored or was skipped.
    """

    row: AttackRow
    prompt: str
    response: str | None = None
    continuation: str | None = None
    status: Literal["generated", "scored", "errored", "skipped"] = "generated"
    reason: str | None = None


@dataclass
class Subject(Journaled):
    """
    A model under attack.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model, in evaluation mode.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        max_new_tokens (`int`, *optional*, defaults to `64`):
            Length of an answer.
        batch_size (`int`, *optional*, defaults to `16`):
            Requests at a time.
        max_prompt_tokens (`int`, *optional*, defaults to `1024`):
            Requests longer than this are skipped, with that reason.
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show progress bars.
        journal (`MutableMapping`, *optional*):
            Where what is done is kept, batch by batch, as values that can be written as JSON. An attack that was
            stopped and is run again with the same journal asks no prompt twice and gives the same answers.
    """

    model: Any
    tokenizer: Any
    max_new_tokens: int = 64
    batch_size: int = 16
    max_prompt_tokens: int = 1024
    progress: bool = True
    journal: MutableMapping[str, Any] | None = field(default=None, repr=False)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        dtype: str = "auto",
        trust_remote_code: bool = False,
        load_in_4bit: bool = False,
        adapter: Adapter = "on",
        **settings: Any,
    ) -> Subject:
        """
        Loads a model, or an adapter with its base model, from a folder or the hub.

        Args:
            path (`str` or `Path`):
                Model or adapter.
            dtype (`str`, *optional*, defaults to `"auto"`):
                Weight dtype.
            trust_remote_code (`bool`, *optional*, defaults to `False`):
                Whether the model's own code may run.
            load_in_4bit (`bool`, *optional*, defaults to `False`):
                Whether the weights are brought into NF4 (bitsandbytes).
            adapter (`str`, *optional*, defaults to `"on"`):
                What becomes of an adapter: `"on"`, `"off"` (the model below it), or `"merged"` into the weights.
            **settings:
                The other arguments of [`Subject`].

        Returns:
            [`Subject`].

        Raises:
            `ValueError`: no adapter where one is to be off or merged, or a merged model in 4 bits.
        """
        model = load_model(
            path, dtype=dtype, trust_remote_code=trust_remote_code, load_in_4bit=load_in_4bit, adapter=adapter
        )
        from transformers import AutoTokenizer

        return cls(model, AutoTokenizer.from_pretrained(str(path), trust_remote_code=trust_remote_code), **settings)

    @property
    def device(self) -> torch.device:
        """Device of the embedding, where tokens go in."""
        return self.model.get_input_embeddings().weight.device

    @property
    def pad_token_id(self) -> int:
        """Padding token, or another for tokenizers without one. It is masked either way."""
        known = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        return next(int(token) for token in known if token is not None)

    @property
    def chat(self) -> bool:
        """Whether prompts are conversations, through a chat template."""
        return bool(self.tokenizer.chat_template)

    def encode(self, prompt: Prompt, opening: str = "") -> list[int]:
        """
        Tokens of a request, ready for an answer, and of the answer's opening.

        A plain prompt is wrapped as one user turn where the tokenizer has a chat template.

        Args:
            prompt (`str` or `list[dict]`):
                The request.
            opening (`str`, *optional*):
                First words of the answer, put into the model's mouth.

        Returns:
            `list[int]`.
        """
        if isinstance(prompt, str) and self.chat:
            prompt = [{"role": "user", "content": prompt}]
        if isinstance(prompt, str):
            tokens = list(self.tokenizer(prompt)["input_ids"])
        else:
            rendered = self.tokenizer.apply_chat_template(
                prompt, add_generation_prompt=True, tokenize=True, return_dict=True
            )
            tokens = list(rendered["input_ids"])
        return tokens + self.encode_opening(opening)

    def encode_opening(self, opening: str) -> list[int]:
        """Tokens of the first words of an answer, without special tokens."""
        return list(self.tokenizer(opening, add_special_tokens=False)["input_ids"]) if opening else []

    def pad(self, rows: Sequence[list[int]], side: Literal["left", "right"], value: int | None = None) -> torch.Tensor:
        """Rows of tokens as one tensor of shape `(B, T)`, padded with `value` (the padding token)."""
        filler = self.pad_token_id if value is None else value
        width = max(map(len, rows))
        padded = [
            [filler] * (width - len(row)) + row if side == "left" else row + [filler] * (width - len(row))
            for row in rows
        ]
        return torch.tensor(padded, device=self.device)

    def answer(
        self,
        rows: Sequence[AttackRow],
        description: str,
        *,
        prompt_of: Callable[[int, AttackRow], Prompt] = lambda number, row: row.prompt,
        opening_of: Callable[[AttackRow], str] = lambda row: "",
        needs_target: bool = False,
        perturb: Callable[[Sequence[AttackRow]], Change] | None = None,
        sampling: Sampling | None = None,
    ) -> list[Generation]:
        """
        Has the model answer requests, batch by batch.

        Every request comes back: answered, skipped (too long, or without the target that the attack needs) or
        errored, with the reason. A failing batch does not stop the others.

        Args:
            rows (sequence of [`AttackRow`]):
                Requests.
            description (`str`):
                What the progress bar says.
            prompt_of (`Callable`, *optional*):
                What the model is asked, from the number of a row and the row, instead of the row's prompt.
            opening_of (`Callable`, *optional*):
                What is put into its mouth.
            needs_target (`bool`, *optional*, defaults to `False`):
                Whether rows without a target are skipped.
            perturb (`Callable`, *optional*):
                Gives the perturbation under which a batch of rows is answered.
            sampling ([`~trl_robust.attacks.sampling.Sampling`], *optional*):
                How answers are drawn; greedily without it.

        Returns:
            `list` of [`Generation`], in the order of `rows`.
        """
        found, waiting = [], []
        for number, row in enumerate(rows):
            prompt, opening = prompt_of(number, row), opening_of(row)
            generation = Generation(row, prompt if isinstance(prompt, str) else str(prompt[-1]["content"]))
            found.append(generation)
            if needs_target and not row.target:
                generation.status, generation.reason = "skipped", "the row has no target"
                continue
            try:
                tokens = self.encode(prompt, opening)
            except (TemplateError, ValueError) as error:  # a conversation that the chat template does not take
                generation.status, generation.reason = "errored", f"{type(error).__name__}: {error}"
                continue
            if len(tokens) > self.max_prompt_tokens:
                generation.status = "skipped"
                generation.reason = f"{len(tokens)} tokens are over the limit of {self.max_prompt_tokens}"
            else:
                waiting.append((generation, tokens, self.encode_opening(opening)))
        starts = range(0, len(waiting), self.batch_size)
        for start in self.track(starts, description):
            batch = waiting[start : start + self.batch_size]
            asked = [tokens for _, tokens, _ in batch]
            asking = [generation.row for generation, _, _ in batch]
            answers = self.remembered(
                [description, start, asked], partial(self._answered, asking, asked, perturb, sampling)
            )
            if isinstance(answers, str):
                for generation, _, _ in batch:
                    generation.status, generation.reason = "errored", answers
                continue
            for (generation, _, prefill), answer in zip(batch, answers, strict=True):
                generation.continuation = self.tokenizer.decode(answer, skip_special_tokens=True)
                generation.response = self.tokenizer.decode(prefill + answer, skip_special_tokens=True)
        return found

    def _answered(
        self,
        rows: Sequence[AttackRow],
        asked: list[list[int]],
        perturb: Callable[[Sequence[AttackRow]], Change] | None,
        sampling: Sampling | None,
    ) -> list[list[int]] | str:
        """Tokens of the answers of a batch, or why there are none."""
        try:
            return self._generate(
                asked, perturb(rows) if perturb else None, sampling.noise(rows) if sampling else None
            )
        except (RuntimeError, ValueError, FloatingPointError) as error:
            # Out of memory and numerical failures of one batch; they are counted, never taken for safety.
            return f"{type(error).__name__}: {error}"

    @torch.no_grad()
    def _generate(
        self, rows: list[list[int]], perturbation: Change | None, noise: LogitsProcessor | None
    ) -> list[list[int]]:
        tokens = self.pad(rows, "left")
        mask = self.pad([[1] * len(row) for row in rows], "left", 0)
        with perturbation.installed(self.model) if perturbation is not None else nullcontext():
            output = self.model.generate(
                input_ids=tokens,
                attention_mask=mask,
                max_new_tokens=self.max_new_tokens,
                pad_token_id=self.pad_token_id,
                # Greedy whatever the model's own generation config says, so that models can be compared.
                do_sample=False,
                num_beams=1,
                repetition_penalty=1.0,
                no_repeat_ngram_size=0,
                # The likeliest token under the noise is a sample.
                logits_processor=None if noise is None else LogitsProcessorList([noise]),
            )
        return output[:, tokens.shape[1] :].tolist()
