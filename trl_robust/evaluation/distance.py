"""How far a model's wordings of one question lie apart inside it: the measurement behind `diagnose-distance`.

A case is a question with its paraphrases (RobustAlpacaEval's form). Every wording is rendered with the model's own
template, run up to the layer that is looked at, and read off at one place of the prompt. What the distances say
about the scores of the answers stands in `distance_statistics`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypedDict

import torch

from ..attacks import Subject
from ..attacks.subject import Prompt
from ..inner import hidden_after
from ..inner.observing import observed
from ..threat import decoder_layers, resolve_sites
from ..threat.sites import Site
from .correlation import edit_distance
from .wordings import Case

Pooling = Literal["last", "mean_query"]
Metric = Literal["l2", "cosine", "token_normalised"]
METRICS: tuple[Metric, ...] = ("l2", "cosine", "token_normalised")
MARK = "{prompt}"


class CaseDistances(TypedDict):
    """Distances of one case at one site by one metric."""

    to_original: list[float]
    average: float
    average_paraphrases: float | None


@dataclass(frozen=True)
class Rendering:
    """
    How a wording becomes the prompt of a model.

    Args:
        template (`str`, *optional*):
            Text around the wording, with the mark `{prompt}`; the tokenizer's chat template if not given, or nothing
            where it has none.
        system_prompt (`str`, *optional*):
            System message, for the chat template.
    """

    template: str | None = None
    system_prompt: str | None = None

    def __post_init__(self) -> None:
        if self.template is not None and self.template.count(MARK) != 1:
            raise ValueError(f"The template has the mark {MARK} {self.template.count(MARK)} times; it needs it once.")
        if self.template is not None and self.system_prompt is not None:
            raise ValueError("`system_prompt` belongs to the chat template; write it into the template instead.")

    def encode(self, subject: Subject, query: str) -> list[int]:
        """Tokens of the full prompt, the generation prefix included."""
        if self.template is not None:
            # Not `Subject.encode`, which would put the chat template around it.
            return list(subject.tokenizer(self.template.replace(MARK, query))["input_ids"])
        return Subject.encode(subject, self._messages(query) if subject.tokenizer.chat_template else query)

    def described(self, subject: Subject) -> dict[str, Any]:
        """What has to be known to render the same prompts again."""
        tokenizer = subject.tokenizer
        if self.template is not None:
            kind, shown = "text", self.template
        elif tokenizer.chat_template:
            kind = "chat"
            shown = tokenizer.apply_chat_template(self._messages(MARK), add_generation_prompt=True, tokenize=False)
        else:
            kind, shown = "plain", MARK
        digest = hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest() if kind == "chat" else None
        return {
            "kind": kind, "rendered": shown, "chat_template_sha256": digest, "system_prompt": self.system_prompt,
        }  # fmt: skip

    def _messages(self, query: str) -> list[dict[str, str]]:
        system = [{"role": "system", "content": self.system_prompt}] if self.system_prompt is not None else []
        return [*system, {"role": "user", "content": query}]


@dataclass
class RenderedSubject(Subject):
    """
    A model whose plain prompts are rendered in a given way, wherever it is asked.

    Args:
        rendering ([`Rendering`], *optional*):
            From wording to prompt. The other fields are [`~trl_robust.attacks.Subject`]'s.
    """

    rendering: Rendering = Rendering()

    @classmethod
    def of(cls, subject: Subject, rendering: Rendering) -> RenderedSubject:
        """The same model with a rendering."""
        kept = {entry.name: getattr(subject, entry.name) for entry in fields(Subject)}
        return cls(**kept, rendering=rendering)

    def encode(self, prompt: Prompt, opening: str = "") -> list[int]:
        """Tokens of a request; see [`~trl_robust.attacks.Subject.encode`]."""
        if not isinstance(prompt, str):
            return super().encode(prompt, opening)
        return self.rendering.encode(self, prompt) + self.encode_opening(opening)


def query_span(subject: Subject, prompt: Prompt) -> tuple[int, int]:
    """
    Where the text of the last user turn lies in a tokenised prompt.

    The prompt is rendered a second time around another text, which begins and ends with other letters: what both share
    at the start and at the end is the template.

    Args:
        subject ([`~trl_robust.attacks.Subject`]):
            The model.
        prompt (`str` or `list[dict]`):
            The request.

    Returns:
        `tuple[int, int]`: index of the turn's first token, and of the one after its last.
    """
    text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    stand_in = ("B" if text[:1] != "B" else "C") + ("Y" if text[-1:] != "Y" else "Z")
    tokens, others = subject.encode(prompt), subject.encode(with_wording(prompt, stand_in))
    shortest = min(len(tokens), len(others))
    start = next((i for i in range(shortest) if tokens[i] != others[i]), shortest)
    end = next((i for i in range(shortest - start) if tokens[-1 - i] != others[-1 - i]), shortest - start)
    return start, len(tokens) - end


def with_wording(prompt: Prompt, text: str) -> Prompt:
    """
    A request with other words in its last user turn.

    Args:
        prompt (`str` or `list[dict]`):
            The request, plain or as messages that end with a user turn.
        text (`str`):
            The words.

    Returns:
        `str` or `list[dict]`.
    """
    return text if isinstance(prompt, str) else [*prompt[:-1], {**prompt[-1], "content": text}]


@dataclass
class Representations:
    """
    Hidden states that stand for prompts.

    Args:
        states (`dict[Site, torch.Tensor]`):
            For every site a float64 tensor of shape `(N, H)` on the CPU.
        token_norms (`dict[Site, torch.Tensor]`):
            For every site the median L2 norm of a prompt's tokens, of shape `(N,)`.
    """

    states: dict[Site, torch.Tensor] = field(default_factory=dict)
    token_norms: dict[Site, torch.Tensor] = field(default_factory=dict)


def default_layer(model: torch.nn.Module) -> int:
    """
    The layer of the paper, half the depth: the index of block `round(L / 2)` counted from one.

    Args:
        model (`nn.Module`):
            The model.

    Returns:
        `int`: 19 of 40, which is the state *after block 20*; one less than the block, since layers count from 0.
    """
    return max(round(len(decoder_layers(model)) / 2), 1) - 1


def sites_of(model: torch.nn.Module, layers: Sequence[str | int | float] | None) -> tuple[Site, ...]:
    """
    Sites as written, or the default.

    Args:
        model (`nn.Module`):
            The model.
        layers (sequence, *optional*):
            Layers counted from 0, fractions of the depth, or `embedding`.

    Returns:
        `tuple` of sites, the embedding first.

    Raises:
        `ValueError`: a layer that the model does not have.
    """
    return resolve_sites(layers or [default_layer(model)], len(decoder_layers(model)))


@torch.no_grad()
def representations(
    subject: Subject,
    tokens: Sequence[list[int]],
    sites: Sequence[Site],
    *,
    spans: Sequence[tuple[int, int]] | None = None,
    side: Literal["left", "right"] = "right",
) -> Representations:
    """
    Hidden states that stand for prompts: at the last token, or a mean over a span.

    Args:
        subject ([`Subject`]):
            The model. The layers above the highest site do not run.
        tokens (sequence of `list[int]`):
            Prompts.
        sites (sequence of `Site`):
            Where.
        spans (sequence of `tuple[int, int]`, *optional*):
            For a mean: first token of the span of every prompt, and the one after its last.
        side (`str`, *optional*, defaults to `"right"`):
            Side of the padding. Both give the same states up to rounding.

    Returns:
        [`Representations`], in the order of `tokens`.

    Raises:
        `FloatingPointError`: states that are not finite.
    """
    states: dict[Site, list[torch.Tensor]] = {site: [] for site in sites}
    norms: dict[Site, list[torch.Tensor]] = {site: [] for site in sites}
    highest = max((site for site in sites if site != "embedding"), default=0)
    for start in range(0, len(tokens), subject.batch_size):
        rows = tokens[start : start + subject.batch_size]
        mask = subject.pad([[1] * len(row) for row in rows], side, 0)
        rank = mask.cumsum(-1) - 1
        chosen = [(len(row) - 1, len(row)) for row in rows]
        if spans is not None:
            chosen = list(spans[start : start + subject.batch_size])
        first, beyond = torch.tensor(chosen, device=mask.device).unsqueeze(-1).unbind(1)
        inside = (rank >= first) & (rank < beyond) & mask.bool()

        def see(site: Site, found: torch.Tensor, mask: torch.Tensor = mask, inside: torch.Tensor = inside) -> None:
            exact, weight = found.double().cpu(), inside.double().cpu().unsqueeze(-1)
            states[site].append((exact * weight).sum(1) / weight.sum(1))
            length = torch.linalg.vector_norm(exact, dim=-1).masked_fill(~mask.bool().cpu(), torch.nan)
            norms[site].append(length.nanmedian(-1).values)

        with observed(subject.model, sites, "layer", see):
            hidden_after(subject.model, {"input_ids": subject.pad(rows, side), "attention_mask": mask}, int(highest))
    found = Representations()
    for site in sites:
        found.states[site], found.token_norms[site] = torch.cat(states[site]), torch.cat(norms[site])
        if not found.states[site].isfinite().all():
            raise FloatingPointError(f"Hidden states at {site} are not finite; load the model in bfloat16 or float32.")
    return found


def case_distances(states: torch.Tensor, token_norms: torch.Tensor, metric: Metric) -> CaseDistances:
    """
    Distances between the wordings of one case.

    Args:
        states (`torch.Tensor` of shape `(W, H)`):
            Hidden states, the original's first.
        token_norms (`torch.Tensor` of shape `(W,)`):
            Typical norm of a token in every wording.
        metric (`str`):
            `"l2"`; `"cosine"`: one minus the cosine; `"token_normalised"`: l2 divided by the mean of both wordings'
            typical token norms, so that sites and models with larger states can be compared.

    Returns:
        [`CaseDistances`]: `to_original` (`W - 1` numbers), `average` over all pairs, and `average_paraphrases` over
        the pairs without the original (`None` where there is one paraphrase).
    """
    between = torch.linalg.vector_norm(states.unsqueeze(0) - states.unsqueeze(1), dim=-1)
    if metric == "cosine":
        between = 1 - torch.nn.functional.cosine_similarity(states.unsqueeze(0), states.unsqueeze(1), dim=-1)
        between.fill_diagonal_(0)
    elif metric == "token_normalised":
        between = between / ((token_norms.unsqueeze(0) + token_norms.unsqueeze(1)) / 2)
    above = torch.triu(torch.ones_like(between, dtype=torch.bool), diagonal=1)
    without = between[1:, 1:][above[1:, 1:]]
    return CaseDistances(
        to_original=between[0, 1:].tolist(),
        average=between[above].mean().item(),
        average_paraphrases=without.mean().item() if len(without) else None,
    )


def measure_case(
    subject: RenderedSubject, case: Case, sites: Sequence[Site], *, pooling: Pooling = "last"
) -> dict[str, Any]:
    """
    What is known of a case before anything is answered.

    Args:
        subject ([`RenderedSubject`]):
            The model.
        case ([`~trl_robust.evaluation.wordings.Case`]):
            The case.
        sites (sequence of `Site`):
            Where.
        pooling (`str`, *optional*, defaults to `"last"`):
            `"last"`: the last token of the full prompt; `"mean_query"`: a mean over the wording's own tokens.

    Returns:
        `dict`: `index`, `num_tokens` (of every prompt), `edit_distance` (in words, from the original to every
        paraphrase, divided by the longer one's length), `last_tokens` and `distances` (site -> metric ->
        [`CaseDistances`]).

    Raises:
        `ValueError`: a prompt over the limit, or a wording without a token of its own.
    """
    tokens = [subject.encode(wording) for wording in case.wordings]
    if (longest := max(map(len, tokens))) > subject.max_prompt_tokens:
        raise ValueError(f"{longest} tokens are over the limit of {subject.max_prompt_tokens}")
    spans = None
    if pooling == "mean_query":
        spans = [query_span(subject, wording) for wording in case.wordings]
        if any(start >= end for start, end in spans):
            raise ValueError("a wording has no token of its own in the prompt, so `mean_query` has nothing to average")
    found = representations(subject, tokens, sites, spans=spans)
    words = [wording.split() for wording in case.wordings]
    return {
        "index": case.id,
        "num_tokens": [len(row) for row in tokens],
        "edit_distance": [edit_distance(words[0], other) / max(len(words[0]), len(other)) for other in words[1:]],
        "last_tokens": subject.tokenizer.convert_ids_to_tokens([row[-1] for row in tokens]),
        "distances": {
            str(site): {
                metric: case_distances(found.states[site], found.token_norms[site], metric) for metric in METRICS
            }
            for site in sites
        },
    }
