"""Is a small change of the loss enough for the meaning to stay? Checks of what LAP's search finds (lap.md 14, Q3).

Three perturbations of equal length at every token are compared: LAP's paraphrase, one in a random direction, and one
that was searched for to raise the loss (vanilla LAT). Edits that change the meaning, such as another row's question,
go through the same checks and must fail them: a check that they pass as well says nothing, and is called so.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..attacks import Subject
from ..attacks.subject import Prompt
from ..threat.sites import Site
from .correlation import bootstrap
from .distance import query_span, representations, with_wording
from .semantic_changes import EDIT, SEARCHES, Changes
from .semantic_measures import (
    Entailment,
    Thresholds,
    agrees,
    answer_similarity,
    energy_share,
    principal_directions,
    random_shares,
    verdict,
)
from .semantic_rows import SemanticRow, SemanticSettings, edited_prompts
from .suite import write_results

VERSION = 1
CHECKS = ("token_kl", "agreement", "similarity", "entailment", "feasible", "paraphrase_energy")


def semantic_checks(
    subject: Subject,
    rows: Sequence[SemanticRow],
    settings: SemanticSettings | None = None,
    *,
    entailment: Entailment | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """
    Checks whether perturbations keep the meaning of requests.

    (a) token KL of the completion, clean against perturbed; (b) the answer generated *under* the perturbation against
    the clean one: agreement, similarity, entailment both ways; (c) the share of the perturbation's energy in the
    directions in which real paraphrases differ, against that of a random direction; (d) whether the loss constraint
    is met, on a forward pass of its own; (e) the same for edits that change the meaning.

    Args:
        subject ([`~trl_robust.attacks.Subject`]):
            The model.
        rows (sequence of [`SemanticRow`]):
            Requests; those over the model's limit are skipped and counted.
        settings ([`SemanticSettings`], *optional*):
            Settings.
        entailment ([`Entailment`], *optional*):
            An NLI classifier; without one that check is not measured.

    Returns:
        `tuple`: the `semantics` entry of the model in `results.json`, with `checks` (kind of perturbation -> check ->
        `value`, `interval`, `threshold`, `passes`, `control`, `verdict`), and the records, one for every row and kind.

    Raises:
        `ValueError`: no row can be used, or a setting that the searches refuse.
    """
    settings = settings or SemanticSettings()
    sites = settings.sites(subject.model)
    limit = subject.max_prompt_tokens
    usable = [row for row in rows if row.completion.strip() and len(subject.encode(row.prompt)) <= limit]
    if not usable:
        raise ValueError(f"None of the {len(rows)} rows has a completion, and a prompt of at most {limit} tokens.")
    edits = edited_prompts(usable)
    records = Changes(subject, usable, edits, settings).records()
    _compare_answers(subject, usable, records, entailment)
    scored = {
        kind: [record for record in records if record["kind"] == kind and record["status"] == "scored"]
        for kind in (*SEARCHES, EDIT)
    }
    meaning = _Directions(subject, usable, edits, settings, sites)
    kinds = {kind: _aggregate(part, settings) | meaning.of_perturbation(part) for kind, part in scored.items()}
    kinds[EDIT] |= meaning.of_edits()
    for record in records:
        record.pop("vectors", None)
    entry = {
        "version": VERSION,
        "sites": [str(site) for site in sites],
        "settings": {name: value for name, value in asdict(settings).items() if name != "thresholds"},
        "thresholds": asdict(settings.thresholds),
        "n_rows": len(usable),
        "n_skipped": len(rows) - len(usable),
        "n_errored": sum(record["status"] == "errored" for record in records),
        "real_paraphrases": meaning.real(),
        "kinds": kinds,
        "checks": {
            kind: {name: _check(name, kinds[kind], kinds[EDIT], settings.thresholds) for name in CHECKS}
            for kind in SEARCHES
        },
    }
    return entry, records


def _compare_answers(
    subject: Subject, rows: Sequence[SemanticRow], records: list[dict[str, Any]], entailment: Entailment | None
) -> None:
    """Adds to every record how its answer compares with the clean one."""
    answers = {row.id: row.answer for row in rows}
    scored = [record for record in records if record["status"] == "scored"]
    for kind in (*SEARCHES, EDIT):
        part = [record for record in scored if record["kind"] == kind]
        clean, changed = [record["clean"] for record in part], [record["changed"] for record in part]
        similar = answer_similarity(subject, clean, changed) if part else []
        both: list[list[float] | None] = [None] * len(part)
        if entailment is not None and part:
            # With the question before them: a short answer alone says too little to entail anything.
            first = [f"{record['prompt']} {text}" for record, text in zip(part, clean, strict=True)]
            second = [f"{record['prompt']} {text}" for record, text in zip(part, changed, strict=True)]
            ways = entailment.probabilities(first, second), entailment.probabilities(second, first)
            both = [list(pair) for pair in zip(*ways, strict=True)]
        for record, similarity, pair in zip(part, similar, both, strict=True):
            record["agreement"] = agrees(record["clean"], record["changed"], answers[record["id"]])
            record["similarity"], record["entailment"] = similarity, pair


def _aggregate(records: Sequence[Mapping[str, Any]], settings: SemanticSettings) -> dict[str, Any]:
    """Means over rows with their bootstrap intervals."""

    def mean(values: Sequence[float | None]) -> dict[str, Any]:
        known = np.array([value for value in values if value is not None], dtype=float)
        if not len(known):
            return {"value": None, "interval": None, "n": 0}
        interval = bootstrap(lambda rows: float(known[rows].mean()), len(known), seed=settings.seed, size=1000)
        return {"value": float(known.mean()), "interval": interval, "n": len(known)}

    changes = [record["loss_change"] for record in records]
    both_ways = [record["entailment"] and float(min(record["entailment"]) > 0.5) for record in records]
    return {
        "token_kl": mean([record["token_kl"] for record in records]),
        "agreement": mean([float(record["agreement"]) for record in records]),
        "similarity": mean([record["similarity"] for record in records]),
        "entailment": mean(both_ways),
        "feasible": mean([float(record["feasible"]) for record in records]),
        "loss_change": mean(changes),
        "loss_change_abs": mean([abs(change) for change in changes]),
        "loss_change_abs_p95": float(np.quantile(np.abs(changes), 0.95)) if changes else None,
    }


class _Directions:
    """The directions in which real paraphrases differ at each site, and what lies in them."""

    def __init__(
        self,
        subject: Subject,
        rows: Sequence[SemanticRow],
        edits: Sequence[Prompt | None],
        settings: SemanticSettings,
        sites: tuple[Site, ...],
    ) -> None:
        self.settings, self.sites = settings, sites
        prompts: list[tuple[int, Prompt]] = []
        for number, row in enumerate(rows):
            prompts += [(number, with_wording(row.prompt, text)) for text in row.paraphrases]
        self.owners = torch.tensor([number for number, _ in prompts], dtype=torch.long)
        changed = [(number, edit) for number, edit in enumerate(edits) if edit is not None]
        self.differences = self._differences(subject, rows, prompts)
        self.edits = self._differences(subject, rows, changed) if prompts else {}
        found = {site: principal_directions(part, settings.top_k) for site, part in self.differences.items()}
        self.directions = {site: part for site, part in found.items() if part is not None}

    def _differences(
        self, subject: Subject, rows: Sequence[SemanticRow], others: Sequence[tuple[int, Prompt]]
    ) -> dict[Site, torch.Tensor]:
        """Hidden states of other requests less those of the rows they belong to."""
        if not others:
            return {}
        prompts = [*(row.prompt for row in rows), *(prompt for _, prompt in others)]
        spans = [query_span(subject, prompt) for prompt in prompts] if self.settings.pooling == "mean_query" else None
        tokens = [subject.encode(prompt) for prompt in prompts]
        found = representations(subject, tokens, self.sites, spans=spans).states
        owners = torch.tensor([number for number, _ in others])
        return {site: states[len(rows) :] - states[owners] for site, states in found.items()}

    def of_perturbation(self, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Share of perturbations, against random directions, and their length in units of real paraphrases'."""
        vectors = {
            site: torch.cat([record["vectors"][site] for record in records])
            for site in self.sites
            if records and "vectors" in records[0]
        }
        relative = {}
        for site, part in vectors.items():
            if site in self.differences and (unit := self.differences[site].norm(dim=-1).mean().item()) > 0:
                relative[str(site)] = part.norm(dim=-1).mean().item() / unit
        return {"paraphrase_energy": self._share(vectors), "norm_in_paraphrase_distances": relative or None}

    def of_edits(self) -> dict[str, Any]:
        """The same of edits that change the meaning."""
        return {"paraphrase_energy": self._share(self.edits)}

    def real(self) -> dict[str, Any] | None:
        """Share of real paraphrases in the directions of *other* rows' paraphrases: what could be reached."""
        values = []
        for part in self.differences.values():
            for half in (0, 1):
                held_out = self.owners % 2 == half
                directions = principal_directions(part[~held_out], self.settings.top_k)
                if directions is not None and held_out.any():
                    values.append(energy_share(part[held_out], directions))
        known = [value for value in values if value is not None]
        if not known:
            return None
        counts = {str(site): found.shape[1] for site, found in self.directions.items()}
        return {"value": float(np.mean(known)), "num_directions": counts, "n": len(self.owners)}

    def _share(self, vectors: Mapping[Site, torch.Tensor]) -> dict[str, Any]:
        """Mean over sites of the share of energy, and the interval in which a random direction's lies."""
        shares, chance = [], []
        for site, directions in self.directions.items():
            share = energy_share(vectors[site], directions) if site in vectors else None
            if share is not None:
                shares.append(share)
                chance.append(random_shares(vectors[site], directions.shape[1], seed=self.settings.seed))
        if not shares:
            return {"value": None, "interval": None, "n": 0}
        upper = self.settings.thresholds.random_quantile
        low, high = np.quantile(np.mean(chance, axis=0), [1 - upper, upper])
        return {
            "value": float(np.mean(shares)),
            "interval": None,
            "random": float(np.mean(chance)),
            "random_interval": [float(low), float(high)],
            "n": len(shares),
        }


def _check(name: str, found: Mapping[str, Any], control: Mapping[str, Any], thresholds: Thresholds) -> dict[str, Any]:
    """One check of one kind of perturbation."""

    def limit(measured: Mapping[str, Any]) -> float | None:
        if name != "paraphrase_energy":
            return getattr(thresholds, name)
        return measured[name]["random_interval"][1] if measured[name]["value"] is not None else None

    def passes(measured: Mapping[str, Any]) -> bool | None:
        value, bound = measured[name]["value"], limit(measured)
        if value is None or bound is None:
            return None
        return value <= bound if name == "token_kl" else value >= bound

    return {
        **found[name],
        "threshold": limit(found),
        "passes": passes(found),
        "control": control[name]["value"],
        "control_passes": passes(control),
        "verdict": verdict(passes(found), passes(control)),
    }


def run_semantics(
    models: Mapping[str, str | Path],
    rows: Sequence[SemanticRow],
    *,
    output_dir: str | Path,
    settings: SemanticSettings | None = None,
    nli_model: str | None = None,
    max_new_tokens: int = 64,
    batch_size: int = 16,
    max_prompt_tokens: int = 1024,
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """
    The suite `semantics`: [`semantic_checks`] of one or more models, written as an evaluation.

    Args:
        models (`Mapping`):
            Name -> folder or hub id of a model or an adapter.
        rows (sequence of [`SemanticRow`]):
            Requests, see [`~trl_robust.evaluation.semantic_rows.semantic_rows`].
        output_dir (`str` or `Path`):
            Where `results.json` (with `semantics` in every model's entry), `generations.jsonl`, `human_rating.jsonl`
            and `human_rating_key.jsonl` go.
        settings ([`SemanticSettings`], *optional*):
            Settings of search and checks.
        nli_model (`str`, *optional*):
            An NLI classifier for entailment both ways.
        max_new_tokens, batch_size, max_prompt_tokens (`int`, *optional*, default to 64, 16 and 1024):
            Of the generation.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Weight dtype.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether the models' own code may run.

    Returns:
        `dict`: what stands in `results.json`.

    Raises:
        `OSError`: there is no such model.
        `ValueError`: no row can be used, or a setting that is refused.
    """
    settings = settings or SemanticSettings()
    entailment = None if nli_model is None else Entailment.load(nli_model, dtype=dtype, batch_size=batch_size)
    entries, generations, pairs = [], [], []
    for name, path in models.items():
        subject = Subject.load(
            path,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            max_prompt_tokens=max_prompt_tokens,
        )
        entry, records = semantic_checks(subject, rows, settings, entailment=entailment)
        entries.append({"name": name, "attacks": [], "semantics": {**entry, "nli_model": nli_model}})
        pairs += [{"model": name, **record} for record in records if record["status"] == "scored"]
        for record in records:
            shown = {key: value for key, value in record.items() if key != "changed"}
            generations.append(
                {"model": name, "attack": f"semantics {record['kind']}", "response": record["changed"], **shown}
            )
    folder = Path(output_dir)
    results = write_results(folder, entries, generations, seed=settings.seed)
    write_human_rating(folder, pairs, seed=settings.seed)
    return results


def write_human_rating(folder: Path, records: Sequence[Mapping[str, Any]], *, seed: int = 0) -> None:
    """
    Writes pairs of answers for people to rate, and, in a file of its own, which answer is which.

    Args:
        folder (`Path`):
            Where `human_rating.jsonl` and `human_rating_key.jsonl` go.
        records (sequence of `Mapping`):
            Records of [`semantic_checks`], edits among them: raters who call these the same are not reading.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the order of the pairs, and of the answers in a pair.
    """
    generator = random.Random(seed)
    order = list(records)
    generator.shuffle(order)
    shown, key = [], []
    for number, record in enumerate(order):
        first = generator.choice(("clean", "changed"))
        second = "changed" if first == "clean" else "clean"
        shown.append(
            {"pair": number, "prompt": record["prompt"], "answer_a": record[first], "answer_b": record[second]}
        )
        key.append({"pair": number, "a": first, **{name: record.get(name) for name in ("model", "id", "kind")}})
    for name, lines in (("human_rating.jsonl", shown), ("human_rating_key.jsonl", key)):
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (folder / name).write_text(text, encoding="utf-8")
