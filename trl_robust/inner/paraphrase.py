"""Latent adversarial paraphrasing: the longest perturbation of a prompt that the loss hardly notices (2503.01345)."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..objectives import PreferenceLoss, label_logits
from ..threat.positions import Positions, ranks
from ..threat.sites import Site, base_model, decoder_layers, parse_site, resolve_sites
from .injection import CachedPrefix, Perturbation, attack_mode
from .lagrangian import ConstrainedSearch, Found
from .lagrangian_settings import preset_settings
from .observing import observed
from .terms import Term, completion_term, preference_term, selected_by

SPREAD = ("lambda", "length", "relative_norm", "loss_change")
"""What is logged with its 5th and 95th percentile over the rows as well."""


@dataclass
class Paraphrase(Perturbation):
    """
    The perturbations that [`find_paraphrase`] found. Rows do not influence one another.

    Args:
        log_lambda (`torch.Tensor` of shape `(B,)`):
            Logarithms of the multipliers.
        clean_losses (`torch.Tensor` of shape `(B,)`):
            The loss of every row without a perturbation, `J0`.
        perturbed_losses (`torch.Tensor` of shape `(B,)`):
            The loss under it.
        feasible (`torch.Tensor` of shape `(B,)`):
            Whether the two are within epsilon of one another.
        scales (`torch.Tensor` of shape `(B,)`):
            Length at the end, over that after the last step: below 1 where a row was shortened to be feasible.
        nonfinite (`torch.Tensor` of shape `(B,)`):
            Rows whose search met something that is not finite; they keep the longest feasible perturbation before it.
        relative_norms (`torch.Tensor` of shape `(B,)`):
            L2 norm of a row's perturbation, as a share of that of the hidden states it is added to; over several
            layers the root of the sum of the squared shares.
        cast_lost (`float`):
            Share of the perturbation's entries that vanish where it is added in the activations' dtype.
        history (`dict[str, list[float]]`):
            Means over rows, one entry a step, of the state in which the step begins: `lambda`, `norm` (as the
            settings count it), `length` (L2), `rms`, `token_norm`, `relative_norm`, `loss`, `loss_change`,
            `loss_change_abs`, `violation`, `feasible`, `lagrangian`, `norm_gradient` and `loss_gradient` (lengths of
            the Lagrangian's two gradients), `cosine` (of perturbation and loss gradient), `top1_share` and
            `top10_share` (of the energy, in the first and the first tenth of the tokens), `capped_share`,
            `lambda_clamped`; some with `_p5` and `_p95`. With several layers `length` and `token_norm` are counted in
            the RMS of each layer, and there is no `rms`.

    The other fields are [`Perturbation`]'s; `losses` are means of the loss before every step and at the end.
    """

    log_lambda: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    clean_losses: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    perturbed_losses: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    feasible: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    scales: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    nonfinite: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    relative_norms: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    cast_lost: float = 0.0
    history: dict[str, list[float]] = field(default_factory=dict)

    @property
    def delta(self) -> torch.Tensor:
        """The perturbation of shape `(B, P, H)`, where there is one layer; with several see `deltas`."""
        if len(self.deltas) > 1:
            raise ValueError(f"There is a perturbation at each of {list(self.deltas)}; take them from `deltas`.")
        return next(iter(self.deltas.values()))


def find_paraphrase(
    model: nn.Module,
    batch: Mapping[str, torch.Tensor],
    *,
    layer: str | int | float | Sequence[str | int | float],
    epsilon: float = 0.05,
    steps: int = 8,
    preset: str = "robust",
    positions: Positions = "prompt",
    generator: torch.Generator | None = None,
    preference: PreferenceLoss | None = None,
    start_log_lambda: float | None = None,
    **overrides: Any,
) -> Paraphrase:
    """
    Searches, for every row, the longest perturbation of its hidden states that leaves its loss within epsilon.

    In contrast to [`~trl_robust.find_perturbation`] the loss is not what is attacked but what is kept (2503.01345, Eq.
    3): `max ||delta|| s.t. |J(delta) - J(0)| <= epsilon`, by descent of the Lagrangian in delta and ascent in the
    logarithm of its multiplier (Eq. 6-8). `J` is the mean negative log-likelihood of a row's labelled tokens, so that
    epsilon = 0.05 is a perplexity 1.051 times as high at most. Evaluation mode, frozen parameters, float32; no
    gradient, no hook and no change of mode is left behind. Tokens on which the loss does not depend (the last labelled
    one and all after it) are never perturbed: the norm would grow there for nothing.

    Args:
        model (`nn.Module`):
            A transformers causal language model or a `PeftModel`, outside distributed wrappers.
        batch (`Mapping[str, torch.Tensor]`):
            `input_ids`, `attention_mask`, `labels` of shape `(B, T)`. With a preference also `away_input_ids`,
            `away_attention_mask`, `away_labels` (the rejected completions) and `ref_log_probs`, `away_ref_log_probs`
            of shape `(B,)`.
        layer (`str`, `int`, `float` or a sequence):
            Where: `"embedding"`, the index of a decoder layer, or a fraction of the depth. With several layers the
            norm is `sqrt(sum_l ||delta_l||^2 / sigma_l^2)`, `sigma_l` the RMS of the row's hidden states at layer `l`,
            under one multiplier (ours).
        epsilon (`float`, *optional*, defaults to `0.05`):
            How far the loss may move, in nats a token.
        steps (`int`, *optional*, defaults to `8`):
            Steps of the search; 0 gives a perturbation of zero.
        preset (`str`, *optional*, defaults to `"robust"`):
            `"robust"`, or `"paper"` and `"paper_rms"`: the two readings of the paper's loop (lap.md 6).
        positions (`str`, *optional*, defaults to `"prompt"`):
            Which tokens: `"prompt"`, `"completion"`, `"all"`, `"last_user"` or `"all_user"`.
        generator (`torch.Generator`, *optional*):
            Source of the start, on the CPU.
        preference ([`~trl_robust.objectives.PreferenceLoss`], *optional*):
            Makes `J` the preference loss of a pair, which shares one perturbation (ours; the paper has none).
        start_log_lambda (`float`, *optional*):
            Logarithm of the multiplier to begin with, in place of the preset's.
        **overrides:
            Fields of [`~trl_robust.inner.LagrangianSettings`], in place of the preset's.

    Returns:
        [`Paraphrase`] with `delta`, `log_lambda` and `history`.

    Raises:
        `ValueError`: an unknown setting or choice, a missing key, or a batch without a token to perturb.

    Example:

    ```python
    >>> found = find_paraphrase(model, batch, layer=0.625, epsilon=0.05, steps=8)
    >>> with found.installed(model):
    ...     reworded = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    ```
    """
    settings = preset_settings(preset, overrides)
    if not 0 < epsilon < math.inf:
        raise ValueError(f"`epsilon` is {epsilon}; it must be a finite number above 0.")
    if steps < 0:
        raise ValueError(f"`steps` is {steps}; it must be at least 0.")
    layers = [layer] if isinstance(layer, str | int | float) else list(layer)
    sites = resolve_sites([parse_site(site) for site in layers], len(decoder_layers(model)))
    with torch.enable_grad(), attack_mode(model):
        rows = _PerturbedRows(model, batch, preference, sites, positions)
        scales = rows.scales(relative=settings.optimizer == "normalized")
        start = {
            site: settings.init_scale * rows.rms(site) / scales[site] * row_noise(batch, hidden.float(), generator)
            for site, hidden in rows.hidden.items()
        }
        search = ConstrainedSearch(
            lambda deltas: rows.losses({site: deltas[site] * scales[site] for site in sites}),
            rows.clean,
            start if steps else {site: torch.zeros_like(part) for site, part in start.items()},
            rows.selected,
            epsilon=epsilon,
            settings=settings,
            caps={site: settings.token_cap * rows.token_norms[site] / scales[site][..., 0] for site in sites},
            log_lambda=start_log_lambda,
            starts_clean=True,
            losses_of=lambda deltas, chosen: rows.losses_of(
                {site: (deltas[site] * scales[site])[chosen] for site in sites}, chosen
            ),
        )
        with rows.perturbation.installed(model, copies=rows.term.copies):
            found = search.run(steps)
    return rows.result(found, {site: found.deltas[site] * scales[site] for site in sites}, scales)


def row_noise(
    batch: Mapping[str, torch.Tensor], like: torch.Tensor, generator: torch.Generator | None
) -> torch.Tensor:
    """
    Standard normal values that are a row's own: they depend on its tokens and the generator, not on the other rows.

    So neither the order of rows nor how they are split among batches and processes changes what is drawn for a row.

    Args:
        batch (`Mapping[str, torch.Tensor]`):
            `input_ids` and `attention_mask`.
        like (`torch.Tensor` of shape `(B, P, H)`):
            Shape, dtype and device.
        generator (`torch.Generator`, *optional*):
            Source, on the CPU.

    Returns:
        `torch.Tensor` of shape `(B, P, H)`, by rank.
    """
    base = int(torch.randint(2**31, (), generator=generator))
    drawn = []
    for tokens, mask in zip(batch["input_ids"].cpu(), batch["attention_mask"].cpu().bool(), strict=True):
        own = torch.Generator().manual_seed(base ^ zlib.crc32(repr(tokens[mask].tolist()).encode()))
        # In blocks, so that the first values do not depend on how many there are.
        blocks = [torch.randn(64, like.shape[-1], generator=own) for _ in range(0, like.shape[1], 64)]
        drawn.append(torch.cat(blocks)[: like.shape[1]])
    return torch.stack(drawn).to(like)


class _PerturbedRows:
    """The rows of a batch, their hidden states as they are, and their losses under a perturbation."""

    def __init__(
        self,
        model: nn.Module,
        batch: Mapping[str, torch.Tensor],
        preference: PreferenceLoss | None,
        sites: Sequence[Site],
        positions: Positions,
    ) -> None:
        self.model, self.batch, self.preference, self.sites = model, batch, preference, tuple(sites)
        self.passes = 0.0
        self.term = term = self._term_of(batch)
        chosen = selected_by([term], positions)
        self.selected = chosen & _before_last_label(term, chosen.shape[1])
        if not self.selected.any():
            raise ValueError(
                f"No token of the batch may be perturbed with positions={positions!r}: the rows have none there on "
                "which the loss depends. Choose other positions, or check the prompts."
            )
        first = self.sites[0]
        self.prefix = CachedPrefix(model, -1 if first == "embedding" else int(first))
        self.hidden: dict[Site, torch.Tensor] = {}
        shape = (*self.selected.shape, base_model(model).config.get_text_config().hidden_size)
        zeros = {site: torch.zeros(shape, device=self.selected.device) for site in self.sites}
        self.perturbation = Perturbation(zeros, self.selected)
        # The very code path of the perturbed passes, so that what differs is only the perturbation.
        seen = observed(model, self.sites, "layer", self._see)
        with seen, self.perturbation.installed(model, copies=term.copies), torch.no_grad():
            self.clean = self.losses(zeros)
        self.token_norms = {
            site: torch.linalg.vector_norm(states.float(), dim=-1) * self.selected
            for site, states in self.hidden.items()
        }
        self.tokens = self.selected.sum(-1).clamp(min=1)

    def losses(self, deltas: Mapping[Site, torch.Tensor]) -> torch.Tensor:
        """The loss of every row under some perturbations, inside their `installed` block."""
        self.perturbation.deltas = dict(deltas)
        cost = len(self.selected) * self.term.copies * self.prefix.share_run
        self.passes += 2 * cost if torch.is_grad_enabled() else cost  # with its backward pass
        with self.prefix.resume_from():
            found = label_logits(*self._inputs(self.term))
        return self.term.row_losses(found).to(self.selected.device)

    def losses_of(self, deltas: Mapping[Site, torch.Tensor], chosen: torch.Tensor) -> torch.Tensor:
        """The loss of some rows under perturbations of these rows, inside the `installed` block of all of them."""
        count, copies = len(self.selected), self.term.copies
        rows = torch.cat([chosen + copy * count for copy in range(copies)])
        own = {key: value for key, value in self.batch.items() if isinstance(value, torch.Tensor)}
        term = self._term_of({key: value[chosen.to(value.device)] for key, value in own.items()})
        perturbation = Perturbation(dict(deltas), self.selected[chosen])
        prefix = self.prefix.of_rows(rows)
        self.passes += len(rows) * prefix.share_run
        with self.perturbation.disabled(), perturbation.installed(self.model, copies=copies), prefix.resume_from():
            found = label_logits(*self._inputs(term))
        return term.row_losses(found).to(self.selected.device)

    def _term_of(self, batch: Mapping[str, torch.Tensor]) -> Term:
        if self.preference is None:
            return completion_term(batch)
        return preference_term(batch, self.preference, "`preference` is given")

    def _inputs(self, term: Term) -> tuple:
        return self.model, term.batch["input_ids"], term.batch["attention_mask"], term.batch["labels"]

    def _see(self, site: Site, states: torch.Tensor) -> None:
        """Keeps hidden states by rank."""
        mask = self.term.batch["attention_mask"].bool()
        rank = ranks(mask)
        count, width = self.selected.shape
        real = (mask & (rank < width))[:count].to(states.device)  # of a pair, the first has the prompt as well
        rows, places = real.nonzero(as_tuple=True)
        kept = states.new_zeros(count, width, states.shape[-1])
        kept[rows, rank.to(states.device)[rows, places]] = states.detach()[rows, places]
        self.hidden[site] = kept.to(self.selected.device)  # a model may lie on several devices, a search on one

    def rms(self, site: Site) -> torch.Tensor:
        """RMS of a row's hidden states at the perturbed tokens, of shape `(B, 1, 1)`."""
        mean_square = self.token_norms[site].square().sum(-1) / self.tokens / self.hidden[site].shape[-1]
        return mean_square.sqrt().clamp(min=1e-12).reshape(-1, 1, 1)

    def scales(self, *, relative: bool) -> dict[Site, torch.Tensor]:
        """The unit of length at every site, of shape `(B, 1, 1)`: perturbations are searched for in these units."""
        scales = {}
        for site in self.sites:
            unit = self.rms(site) if len(self.sites) > 1 or relative else torch.ones_like(self.rms(site))
            if relative:
                coordinates = (self.tokens * self.hidden[site].shape[-1]).to(unit).sqrt().reshape(-1, 1, 1)
                unit = unit * coordinates
            scales[site] = unit
        return scales

    def result(self, found: Found, deltas: dict[Site, torch.Tensor], scales: dict[Site, torch.Tensor]) -> Paraphrase:
        """What was found, with what is to be known of it."""
        paraphrase = Paraphrase(deltas, self.selected)
        sizes = torch.stack([_row_norm(delta) / _row_norm(self._chosen(site)) for site, delta in deltas.items()])
        paraphrase.relative_norms = sizes.square().sum(0).sqrt()
        paraphrase.log_lambda, paraphrase.scales = found.log_lambda, found.scales
        paraphrase.clean_losses, paraphrase.perturbed_losses = self.clean, found.losses
        paraphrase.feasible, paraphrase.nonfinite = found.feasible, found.nonfinite
        paraphrase.forward_passes = self.passes
        for site, delta in deltas.items():
            lengths = torch.linalg.vector_norm(delta, dim=-1)
            paraphrase.norms[site] = (lengths.sum() / self.selected.sum()).item()
        paraphrase.cast_lost = self._cast_lost(deltas)
        if found.records:
            paraphrase.history = self._history(found.records, scales)
        paraphrase.losses = [*paraphrase.history.get("loss", []), found.losses.mean().item()]
        return paraphrase

    def _chosen(self, site: Site) -> torch.Tensor:
        return self.hidden[site].float() * self.selected.unsqueeze(-1)

    def _cast_lost(self, deltas: dict[Site, torch.Tensor]) -> float:
        lost = total = 0
        for site, delta in deltas.items():
            states = self.hidden[site]
            real = delta != 0
            lost += int(((states + delta.to(states.dtype) == states) & real).sum())
            total += int(real.sum())
        return lost / max(total, 1)

    def _history(self, records: dict[str, torch.Tensor], scales: dict[Site, torch.Tensor]) -> dict[str, list[float]]:
        """Means over rows, in the hidden states' own units where there is one layer."""
        site = self.sites[0]
        unit, chosen = scales[site].flatten(), _row_norm(self._chosen(site))
        # The units of several layers are in proportion to their hidden states, so that one of them tells the share.
        relative = records["length"] * unit / chosen
        records = {**records, "relative_norm": relative}
        if len(self.sites) == 1:
            records |= {name: records[name] * unit for name in ("length", "token_norm")}
            records["rms"] = records["length"] / (self.tokens * self.hidden[site].shape[-1]).sqrt()
        found = {name: values.mean(-1) for name, values in records.items()}
        for name in SPREAD:
            for label, share in (("p5", 0.05), ("p95", 0.95)):
                found[f"{name}_{label}"] = records[name].float().nanquantile(share, dim=-1)
        names = list(found)
        values = torch.stack([found[name].float() for name in names]).tolist()
        return dict(zip(names, values, strict=True))


def _row_norm(values: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(values.flatten(1), dim=-1).clamp(min=1e-12)


def _before_last_label(term: Term, width: int) -> torch.Tensor:
    """Ranks before the last labelled token, in any copy of a row: on the others no loss depends."""
    batch = term.batch
    rank = ranks(batch["attention_mask"])
    last = torch.where(batch["labels"] != -100, rank, -1).max(-1).values
    last = torch.stack(last.chunk(term.copies)).max(0).values
    return torch.arange(width, device=last.device) < last.unsqueeze(-1)
