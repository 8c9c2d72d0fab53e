"""The load of a latent attack: how far real attacks on prompts move the hidden states that it perturbs (lat.md 11.3).

A factor of safety divides what breaks a model by what the model has to bear. What breaks it under a latent attack is a
relative radius; what it has to bear is measured here in the same unit.

Which tokens are compared. An attacked prompt has other tokens than the direct request, so positions have to be paired.
They are paired from the end, where the answer begins and where both prompts end alike (the chat template's opening of
the answer, and the request itself where an attack wrote something before it).

- `"shared"` (the default): the longest run of equal tokens at the end of both. The same token stands at the same
  distance from the answer in both prompts, so all that moved it is what the attack put elsewhere: this is what a
  perturbation of hidden states stands for. At the embedding nothing moves, since the tokens are the same.
- `"last"`: the last token alone, from whose state the answer is read.
- `"aligned"`: all tokens of the shorter prompt, equal or not. Where they differ, most of the distance says that
  another word stands there. The only choice for the embedding; an upper bound elsewhere.

The load counts the whole displacement, not only the part of it that breaks a model: a perturbation that is searched
for needs less. So a factor below 1 does not say that a model breaks in use, and one above 1 says a lot.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict

import numpy as np
import torch
from jinja2 import TemplateError

from ..attacks import Generation, Subject
from ..attacks.subject import Prompt
from ..inner import attack_mode, hidden_after
from ..inner.observing import observed
from ..threat import ThreatModel
from ..threat.sites import Site, Stream
from .correlation import bootstrap

Compared = Literal["shared", "last", "aligned"]
COMPARED: tuple[Compared, ...] = ("shared", "last", "aligned")
QUANTILES = (0.1, 0.5, 0.9)


class SiteLoad(TypedDict):
    """Displacements at one site, in multiples of `unit`, the median norm of the direct requests' hidden states."""

    unit: float
    mean: float
    interval: list[float] | None
    quantiles: dict[str, float]
    largest: float
    mean_over_tokens: float
    mean_unsuccessful: float | None


class LatentLoad(TypedDict):
    """What [`latent_load`] returns; can be written as JSON."""

    load: float | None
    interval: list[float] | None
    site: str | int | None
    load_is: str
    tokens: Compared
    mean_tokens: float | None
    sites: dict[str, SiteLoad]
    n: int
    n_unsuccessful: int
    n_left_out: int
    left_out: dict[str, int]
    why: str | None


@dataclass
class _Pair:
    """A direct request and what became of it, as tokens."""

    direct: list[int]
    attacked: list[int]
    succeeded: bool
    count: int
    moved: dict[Site, np.ndarray] = field(default_factory=dict)


def latent_load(
    subject: Subject,
    generations: Sequence[Generation],
    judged: Sequence[Mapping[str, Any]],
    threat: ThreatModel,
    *,
    prompts: Sequence[Prompt] | None = None,
    tokens: Compared = "shared",
    threshold: float = 0.5,
    seed: int = 0,
) -> LatentLoad:
    """
    How far successful attacks on prompts move the hidden states at the sites of a threat, per request.

    For every request the hidden states under the attacked prompt less those under the direct request are taken at the
    compared tokens (see the module's text), and the *largest* of their L2 norms over the tokens is divided by the
    median norm at the site: the smallest relative radius whose token balls hold the displacement. The mean over
    successful requests at the site where it is largest is the load.

    The unit is the one of `radius_unit="relative"` with `positions="prompt"`: the median L2 norm of the unperturbed
    hidden states over all tokens of all direct requests, successful or not.

    Args:
        subject ([`~trl_robust.attacks.Subject`]):
            The model. Only its forward passes are needed.
        generations (sequence of [`~trl_robust.attacks.Generation`]):
            What an attack on prompts gave for this model.
        judged (sequence of `Mapping`):
            The same, judged, in the same order.
        threat ([`~trl_robust.ThreatModel`]):
            Sites and stream; positions, ball and radius do not matter.
        prompts (sequence of `str` or `list[dict]`, *optional*):
            The prompts as the model got them. Without them, the text of each generation stands for its last user turn,
            which is right for attacks that change nothing else; give them for attacks that add turns.
        tokens (`str`, *optional*, defaults to `"shared"`):
            `"shared"`, `"last"` or `"aligned"`.
        threshold (`float`, *optional*, defaults to `0.5`):
            Success from which on a request counts as broken.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the bootstrap over requests.

    Returns:
        [`LatentLoad`]. Requests that were not scored, whose prompt is unchanged (a prefilled answer), too long, or
        without a common token at the end are left out and counted by reason. `mean_unsuccessful` is the same mean over
        requests on which the attack failed: where it is as large, the distance is not what breaks the model. Without
        a successful request `load` is `None`, and `why` says so.

    Raises:
        `ValueError`: lists of different lengths, or unknown `tokens`.
        `FloatingPointError`: hidden states that are not finite.
    """
    if tokens not in COMPARED:
        raise ValueError(f"tokens={tokens!r} is unknown; choose one of {list(COMPARED)}.")
    lengths = {len(generations), len(judged), len(generations if prompts is None else prompts)}
    if len(lengths) > 1:
        raise ValueError(f"Generations, judged rows and prompts have lengths {sorted(lengths)}; give one each.")
    sites = threat.resolve_sites(subject.model)
    found = LatentLoad(
        load=None,
        interval=None,
        site=None,
        load_is=_what_it_is(tokens),
        tokens=tokens,
        mean_tokens=None,
        sites={},
        n=0,
        n_unsuccessful=0,
        n_left_out=0,
        left_out={},
        why=None,
    )
    pairs: list[_Pair] = []
    for number, generation in enumerate(generations):
        given = _as_given(generation) if prompts is None else prompts[number]
        pair = _paired(subject, generation, judged[number], given, tokens, threshold)
        if isinstance(pair, str):
            found["left_out"][pair] = found["left_out"].get(pair, 0) + 1
        else:
            pairs.append(pair)
    found["n"] = sum(pair.succeeded for pair in pairs)
    found["n_unsuccessful"], found["n_left_out"] = len(pairs) - found["n"], len(generations) - len(pairs)
    if not found["n"]:
        found["why"] = "no request was broken by a prompt that can be compared with the direct one"
        return found
    direct = _direct_tokens(subject, generations)
    units = _median_norms(subject, direct, sites, threat.stream)
    _measure(subject, pairs, sites, threat.stream)
    broken = [pair for pair in pairs if pair.succeeded]
    for site in sites:
        found["sites"][str(site)] = _site_load(site, units[site], pairs, seed)
    worst = max(sites, key=lambda site: found["sites"][str(site)]["mean"])
    found["site"] = worst
    found["load"], found["interval"] = (
        found["sites"][str(worst)]["mean"],
        found["sites"][str(worst)]["interval"],
    )
    found["mean_tokens"] = float(np.mean([pair.count for pair in broken]))
    if found["load"] == 0:
        found["why"] = "the compared tokens did not move; at the embedding compare `aligned` tokens"
    return found


def common_end(first: Sequence[int], second: Sequence[int]) -> int:
    """
    Length of the longest run of equal tokens at the end of two prompts.

    Args:
        first, second (sequence of `int`):
            Tokens.

    Returns:
        `int`.
    """
    count = 0
    for one, other in zip(reversed(first), reversed(second), strict=False):
        if one != other:
            break
        count += 1
    return count


def _what_it_is(tokens: Compared) -> str:
    where = {
        "shared": "the tokens at the end that both prompts have in common",
        "last": "the last token of the prompt",
        "aligned": "all tokens of the shorter prompt, aligned at the end",
    }[tokens]
    return (
        f"mean over successful requests of the largest displacement among {where}, attacked prompt against direct "
        "request, over the median norm of the direct requests' hidden states at the site"
    )


def _as_given(generation: Generation) -> Prompt:
    prompt = generation.row.prompt
    return (
        generation.prompt if isinstance(prompt, str) else [*prompt[:-1], {**prompt[-1], "content": generation.prompt}]
    )


def _paired(
    subject: Subject,
    generation: Generation,
    row: Mapping[str, Any],
    given: Prompt,
    tokens: Compared,
    threshold: float,
) -> _Pair | str:
    """The tokens of both prompts, or why they cannot be compared."""
    if row.get("status") != "scored" or row.get("success") is None:
        return "not scored"
    if given == generation.row.prompt:
        return "the prompt is unchanged"
    try:
        direct, attacked = subject.encode(generation.row.prompt), subject.encode(given)
    except (TemplateError, ValueError):
        return "refused by the chat template"
    if max(len(direct), len(attacked)) > subject.max_prompt_tokens:
        return "over the limit of tokens"
    shared = common_end(direct, attacked)
    count = min(len(direct), len(attacked)) if tokens == "aligned" else min(shared, 1) if tokens == "last" else shared
    if not count:
        return "no token in common at the end"
    return _Pair(direct, attacked, float(row["success"]) >= threshold, count)


def _direct_tokens(subject: Subject, generations: Sequence[Generation]) -> list[list[int]]:
    """Tokens of all direct requests that fit, each once."""
    found = {}
    for generation in generations:
        try:
            tokens = subject.encode(generation.row.prompt)
        except (TemplateError, ValueError):
            continue
        if len(tokens) <= subject.max_prompt_tokens:
            found[generation.row.id, tuple(tokens)] = tokens
    return list(found.values())


def _ends(
    subject: Subject, rows: Sequence[tuple[list[int], int]], sites: Sequence[Site], stream: Stream, description: str
) -> list[dict[Site, torch.Tensor]]:
    """Hidden states of every row at its last `count` tokens: float32 tensors of shape `(count, H)`."""
    found: list[dict[Site, torch.Tensor]] = []
    highest = max((site for site in sites if site != "embedding"), default=0)
    for start in subject.track(range(0, len(rows), subject.batch_size), description):
        part = rows[start : start + subject.batch_size]
        states: dict[Site, torch.Tensor] = {}

        def see(site: Site, seen: torch.Tensor, states: dict[Site, torch.Tensor] = states) -> None:
            states[site] = seen

        batch = {
            "input_ids": subject.pad([tokens for tokens, _ in part], "left"),
            "attention_mask": subject.pad([[1] * len(tokens) for tokens, _ in part], "left", 0),
        }
        with torch.no_grad(), attack_mode(subject.model), observed(subject.model, sites, stream, see):
            hidden_after(subject.model, batch, int(highest))
        for number, (_, count) in enumerate(part):
            # Padding stands on the left, so the end of a prompt is the end of its row.
            found.append({site: seen[number, -count:].float().cpu() for site, seen in states.items()})
            if not all(ends.isfinite().all() for ends in found[-1].values()):
                raise FloatingPointError("Hidden states are not finite; load the model in bfloat16 or float32.")
    return found


def _median_norms(
    subject: Subject, direct: Sequence[list[int]], sites: Sequence[Site], stream: Stream
) -> dict[Site, float]:
    ends = _ends(subject, [(tokens, len(tokens)) for tokens in direct], sites, stream, "direct requests")
    return {
        site: torch.cat([torch.linalg.vector_norm(row[site], dim=-1) for row in ends]).median().item()
        for site in sites
    }


def _measure(subject: Subject, pairs: Sequence[_Pair], sites: Sequence[Site], stream: Stream) -> None:
    """Puts the displacement of every compared token into the pairs."""
    direct = _ends(subject, [(pair.direct, pair.count) for pair in pairs], sites, stream, "direct requests")
    attacked = _ends(subject, [(pair.attacked, pair.count) for pair in pairs], sites, stream, "attacked prompts")
    for pair, before, after in zip(pairs, direct, attacked, strict=True):
        for site in sites:
            pair.moved[site] = torch.linalg.vector_norm(after[site] - before[site], dim=-1).double().numpy()


def _site_load(site: Site, unit: float, pairs: Sequence[_Pair], seed: int) -> SiteLoad:
    largest = np.array([pair.moved[site].max() for pair in pairs if pair.succeeded]) / unit
    failed = [pair.moved[site].max() / unit for pair in pairs if not pair.succeeded]
    means = [pair.moved[site].mean() / unit for pair in pairs if pair.succeeded]
    interval = (
        bootstrap(lambda rows: float(largest[rows].mean()), len(largest), seed=seed) if len(largest) > 1 else None
    )
    return SiteLoad(
        unit=unit,
        mean=float(largest.mean()),
        interval=interval,
        quantiles={
            f"{share:g}": float(value) for share, value in zip(QUANTILES, np.quantile(largest, QUANTILES), strict=True)
        },
        largest=float(largest.max()),
        mean_over_tokens=float(np.mean(means)),
        mean_unsuccessful=float(np.mean(failed)) if failed else None,
    )
