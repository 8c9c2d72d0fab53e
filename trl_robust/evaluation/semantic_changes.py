"""What perturbations and edits do to a model's losses and answers: the records behind the semantic checks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..attacks import AttackRow, Subject
from ..attacks.subject import Prompt
from ..inner import Perturbation, find_paraphrase, find_perturbation
from ..objectives import LabelLogits, kl_divergence, label_logits, toward
from ..threat import ThreatModel, vector_norms
from ..threat.sites import Site
from .distance import query_span
from .semantic_rows import SemanticRow, SemanticSettings

SEARCHES = ("paraphrase", "random", "untargeted")
EDIT = "edit"
"""The positive control, among the kinds of change."""
TOLERANCE = 1e-4
"""By how much a loss may be beyond epsilon: the search's own last pass and ours differ by rounding."""

Answered = tuple[str | None, str | None]
"""An answer, and the reason why there is none."""


class Changes:
    """
    What every kind of change does to every row, batch by batch.

    Args:
        subject ([`~trl_robust.attacks.Subject`]):
            The model.
        rows (sequence of [`SemanticRow`]):
            Requests.
        edits (sequence of `Prompt`):
            For every row a request that means something else, or `None`.
        settings ([`SemanticSettings`]):
            Settings of the searches.
    """

    def __init__(
        self,
        subject: Subject,
        rows: Sequence[SemanticRow],
        edits: Sequence[Prompt | None],
        settings: SemanticSettings,
    ) -> None:
        self.subject, self.rows, self.edits, self.settings = subject, rows, edits, settings
        self.sites = settings.sites(subject.model)
        self.generator = torch.Generator().manual_seed(settings.seed)

    def records(self) -> list[dict[str, Any]]:
        """
        A record for every row and kind of change.

        Returns:
            `list[dict]`: `id`, `kind`, `prompt`, `clean` and `changed` (answers), `status`, `reason`, `token_kl`,
            `loss`, `loss_change`, `feasible`, and, of perturbations, `delta_norm` (site -> mean over tokens) and
            `vectors` (site -> the perturbation at the perturbed tokens, a tensor).
        """
        found = []
        size = self.subject.batch_size
        for start in self.subject.track(range(0, len(self.rows), size), "semantic checks"):
            part = slice(start, start + size)
            found += self._batch(self.rows[part], self.edits[part])
        return found

    def _batch(self, rows: Sequence[SemanticRow], edits: Sequence[Prompt | None]) -> list[dict[str, Any]]:
        batch = self._encoded(rows, [row.prompt for row in rows])
        clean, answers = self._logits(batch), self._answers(rows, [row.prompt for row in rows])
        found: list[dict[str, Any]] = []
        for kind, change in self._perturbations(batch).items():
            with change.installed(self.subject.model):
                changed = self._logits(batch)
            after = self._answers(rows, [row.prompt for row in rows], change)
            records = self._compared(kind, rows, (clean, answers), (changed, after))
            for number, record in enumerate(records):
                chosen = change.selected[number]
                record["vectors"] = {site: delta[number][chosen].cpu() for site, delta in change.deltas.items()}
                record["delta_norm"] = {
                    str(site): vectors.norm(dim=-1).mean().item() for site, vectors in record["vectors"].items()
                }
            found += records
        kept = [number for number, edit in enumerate(edits) if edit is not None]
        if kept:
            changed_rows = [rows[number] for number in kept]
            prompts = [edit for edit in edits if edit is not None]
            clean = self._logits(self._encoded(changed_rows, [row.prompt for row in changed_rows]))
            changed = self._logits(self._encoded(changed_rows, prompts))
            before, after = [answers[number] for number in kept], self._answers(changed_rows, prompts)
            found += self._compared(EDIT, changed_rows, (clean, before), (changed, after))
        return found

    def _perturbations(self, batch: Mapping[str, torch.Tensor]) -> dict[str, Perturbation]:
        """The three perturbations, of the same length at every token."""
        settings, model = self.settings, self.subject.model
        paraphrase = find_paraphrase(
            model,
            batch,
            layer=list(self.sites),
            epsilon=settings.epsilon,
            steps=settings.steps,
            preset=settings.preset,
            positions=settings.positions,
            generator=self.generator,
            **settings.overrides,
        )
        drawn = {
            site: torch.randn(delta.shape, generator=self.generator).to(delta)
            for site, delta in paraphrase.deltas.items()
        }
        lengths = {
            site: vector_norms(delta, "l2", mask=paraphrase.selected) for site, delta in paraphrase.deltas.items()
        }
        radius = {site: max(length[paraphrase.selected].mean().item(), 1e-12) for site, length in lengths.items()}
        threat = ThreatModel(self.sites, positions=settings.positions, radius=radius)
        worst = find_perturbation(
            model, batch, threat, objective="untargeted", steps=settings.steps, optimizer="steepest"
        )
        return {
            "paraphrase": paraphrase,
            "random": Perturbation(_of_length(drawn, lengths), paraphrase.selected),
            "untargeted": Perturbation(_of_length(worst.deltas, lengths), paraphrase.selected),
        }

    def _encoded(self, rows: Sequence[SemanticRow], prompts: Sequence[Prompt]) -> dict[str, torch.Tensor]:
        """Prompts followed by the rows' completions, labels on these."""
        subject, end = self.subject, self.subject.tokenizer.eos_token_id
        prefixes = [subject.encode(prompt) for prompt in prompts]
        completions = [subject.encode_opening(row.completion) + ([] if end is None else [int(end)]) for row in rows]
        both = [prefix + completion for prefix, completion in zip(prefixes, completions, strict=True)]
        labels = [[-100] * len(prefix) + tail for prefix, tail in zip(prefixes, completions, strict=True)]
        batch = {
            "input_ids": subject.pad(both, "right"),
            "attention_mask": subject.pad([[1] * len(row) for row in both], "right", 0),
            "labels": subject.pad(labels, "right", -100),
        }
        if self.settings.positions == "last_user":
            spans = [query_span(subject, prompt) for prompt in prompts]
            batch["last_user_span"] = torch.tensor(spans, device=subject.device)
        return batch

    @torch.no_grad()
    def _logits(self, batch: Mapping[str, torch.Tensor]) -> LabelLogits:
        return label_logits(self.subject.model, batch["input_ids"], batch["attention_mask"], batch["labels"])

    def _answers(
        self, rows: Sequence[SemanticRow], prompts: Sequence[Prompt], change: Perturbation | None = None
    ) -> list[Answered]:
        requests = [AttackRow(row.id, prompt) for row, prompt in zip(rows, prompts, strict=True)]
        subject = replace(self.subject, progress=False)  # the bar over batches is enough
        perturb: Callable[[Any], Perturbation] | None = None if change is None else lambda _: change
        return [(one.continuation, one.reason) for one in subject.answer(requests, "answers", perturb=perturb)]

    def _compared(
        self,
        kind: str,
        rows: Sequence[SemanticRow],
        before: tuple[LabelLogits, list[Answered]],
        after: tuple[LabelLogits, list[Answered]],
    ) -> list[dict[str, Any]]:
        """Records of one kind, with all that follows from logits."""
        (clean, clean_answers), (changed, answers) = before, after
        # Both batches have the same completions in the same order, so their labelled positions correspond.
        divergence = clean.row_means(kl_divergence(clean.logits, changed.logits)).tolist()
        losses = [found.row_means(toward(found.logits, found.targets)).tolist() for found in (clean, changed)]
        found = []
        for number, row in enumerate(rows):
            (one, reason), (other, other_reason) = clean_answers[number], answers[number]
            change = losses[1][number] - losses[0][number]
            found.append(
                {
                    "id": row.id,
                    "kind": kind,
                    "prompt": row.prompt if isinstance(row.prompt, str) else row.prompt[-1]["content"],
                    "clean": one,
                    "changed": other,
                    "status": "errored" if reason or other_reason else "scored",
                    "reason": reason or other_reason,
                    "token_kl": divergence[number],
                    "loss": losses[1][number],
                    "loss_change": change,
                    "feasible": abs(change) <= self.settings.epsilon + TOLERANCE,
                }
            )
        return found


def _of_length(deltas: Mapping[Site, torch.Tensor], lengths: Mapping[Site, torch.Tensor]) -> dict[Site, torch.Tensor]:
    """Perturbations in the directions of some, of the lengths of others at every token."""
    return {
        site: torch.nn.functional.normalize(delta.float(), dim=-1, eps=1e-20) * lengths[site].unsqueeze(-1)
        for site, delta in deltas.items()
    }
