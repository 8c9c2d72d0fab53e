"""What distances between wordings say about the scores of answers: correlations, their controls, their power."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from .correlation import (
    RESAMPLES,
    bootstrap,
    detectable,
    paired_test,
    pearson,
    power,
    ranks,
    shuffled_rhos,
    spearman,
)

PAPER = {"rho": 0.362, "interval": [0.16, 0.53], "p": 3e-4, "n": 95, "average": 17.80, "worst": 20.59}
"""2503.01345, Figure 2, recomputed from its plotted points: Llama-2-13b-chat, after block 20 of 40, last token, l2."""
ENOUGH_RESPONSES = 4
SIDES = ("the distance", "the drop")
AverageOver = Literal["all", "paraphrases"]


def judged_case(measured: Mapping[str, Any], scores: Sequence[Sequence[float]]) -> dict[str, Any]:
    """
    A case with its scores: which wording is the worst, and how much is lost there.

    Args:
        measured (`Mapping`):
            What [`~trl_robust.evaluation.distance.measure_case`] found.
        scores (sequence of sequences of `float`):
            For every wording, the original first, the scores of its answers.

    Returns:
        `dict`: `measured` with `scores`, `original_score`, `worst` (the paraphrase with the lowest mean score; the
        first of several), `worst_score`, `drop` (original less worst), `included` (whether `drop` is above
        0), and `tied` (whether another paraphrase scores as low).

    Raises:
        `ValueError`: scores that are not finite, or not one entry a wording.
    """
    if len(scores) != len(measured["num_tokens"]):
        raise ValueError(f"{len(scores)} scores for {len(measured['num_tokens'])} wordings")
    means = np.array([np.mean(entry) for entry in scores])
    if not np.isfinite(means).all():
        raise ValueError("a score is not finite")
    worst = 1 + int(means[1:].argmin())
    drop = float(means[0] - means[worst])
    return {
        **measured,
        "scores": [list(map(float, entry)) for entry in scores],
        "original_score": float(means[0]),
        "worst": worst,
        "worst_score": float(means[worst]),
        "drop": drop,
        "included": drop > 0,
        "tied": int(np.sum(means[1:] == means[worst])) > 1,
    }


def site_statistics(
    cases: Sequence[Mapping[str, Any]],
    site: str,
    metric: str,
    *,
    average_over: AverageOver = "all",
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> dict[str, Any]:
    """
    The diagnostic at one site by one metric, with its controls.

    Args:
        cases (sequence of `Mapping`):
            Cases as [`judged_case`] gives them.
        site, metric (`str`):
            Which of their distances.
        average_over (`str`, *optional*, defaults to `"all"`):
            Pairs behind the average distance: `"all"` (55 of 11 wordings) or `"paraphrases"` (45, without the
            original).
        seed (`int`, *optional*, defaults to `0`):
            Seed of all that is drawn.
        resamples (`int`, *optional*, defaults to `2000`):
            Size of the bootstraps.

    Returns:
        `dict`: `spearman` (drop against worst distance over included cases), `pearson`, `slope`, `partial` (length
        and edit distance of the worst wording held fixed), `selection_free` (all pairs of a distance and a loss,
        clusters drawn by case), `within_case` (mean over cases of the correlation within a case), `shuffled`
        (distances exchanged between cases), the mean distances, and the paired tests.
    """
    included = [case for case in cases if case["included"]]
    kept: dict[str, Any] = {"seed": seed, "resamples": resamples}

    def distances(case: Mapping[str, Any]) -> Mapping[str, Any]:
        return case["distances"][site][metric]

    drops = np.array([case["drop"] for case in included])
    worst = np.array([distances(case)["to_original"][case["worst"] - 1] for case in included])
    found: dict[str, Any] = {"spearman": spearman(worst, drops, names=SIDES, **kept)}
    straight = len(included) > 2 and np.ptp(worst) > 0
    found["pearson"] = _number(pearson(worst, drops)) if straight else None
    found["slope"], found["intercept"] = map(float, np.polyfit(worst, drops, 1)) if straight else (None, None)
    length = np.log([case["num_tokens"][case["worst"]] for case in included])
    edits = np.array([case["edit_distance"][case["worst"] - 1] for case in included])
    # A control that never varies explains nothing, and would cost a degree of freedom.
    controls = {
        name: values
        for name, values in (("log_length", length), ("edit_distance", edits))
        if len(values) and np.ptp(values) > 0
    }
    found["partial"] = {
        **spearman(worst, drops, controls=list(controls.values()), names=SIDES, **kept),
        "controls": list(controls),
    }
    found["selection_free"] = selection_free(cases, site, metric, **kept)
    found["within_case"] = _within_cases(cases, site, metric, **kept)
    found["shuffled"] = _shuffled(worst, drops, found["spearman"]["rho"], seed)
    key = "average" if average_over == "all" else "average_paraphrases"
    averages = np.array([distances(case)[key] for case in included], dtype=float)
    from_original = np.array([np.mean(distances(case)["to_original"]) for case in included])
    found["worst_distance"] = _mean(worst)
    found["average_distance"] = _mean(averages)
    found["average_from_original"] = _mean(from_original)
    found["worst_against_average"] = paired_test(worst, averages, seed=seed)
    # The original may lie apart from its paraphrases whichever of them is the worst: the average over all pairs then
    # is smaller than *any* distance from the original. Against this one it is the worst wording that matters.
    found["worst_against_average_from_original"] = paired_test(worst, from_original, seed=seed)
    return found


def selection_free(
    cases: Sequence[Mapping[str, Any]], site: str, metric: str, *, seed: int = 0, resamples: int = RESAMPLES
) -> dict[str, Any]:
    """
    Correlation over all pairs of a paraphrase's distance and its loss, so that nothing was chosen by its score.

    Args:
        cases (sequence of `Mapping`):
            All scored cases, those without a drop as well.
        site, metric (`str`):
            Which distances.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the bootstrap over cases.
        resamples (`int`, *optional*, defaults to `2000`):
            Its size.

    Returns:
        [`~trl_robust.evaluation.correlation.Correlation`] with `n` pairs, `n_cases`, and `naive_interval`: what the
        interval would be if pairs of one case were independent, to show what the clusters are worth.
    """
    distances, losses, labels = [], [], []
    for number, case in enumerate(cases):
        distances += case["distances"][site][metric]["to_original"]
        losses += [case["original_score"] - float(np.mean(entry)) for entry in case["scores"][1:]]
        labels += [number] * (len(case["scores"]) - 1)
    found = spearman(distances, losses, clusters=labels, names=SIDES, seed=seed, resamples=resamples)
    naive = spearman(distances, losses, seed=seed, resamples=min(resamples, 500))
    return {**found, "n_cases": len(cases), "naive_interval": naive["interval"]}


def decoding_noise(cases: Sequence[Mapping[str, Any]], *, seed: int = 0, draws: int = 200) -> dict[str, Any] | None:
    """
    How much of what looks like an effect of the wording is luck of the decoding.

    Args:
        cases (sequence of `Mapping`):
            Scored cases with several scores a wording.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the exchange.
        draws (`int`, *optional*, defaults to `200`):
            Exchanges a case.

    Returns:
        `None` where no wording has two scores. Otherwise `dict`: `within` (variance of the scores of one wording,
        mean over cases), `between` (variance of the wordings' true means: that of their averages, less what `within`
        puts into it; may be slightly negative), `share_between`, `drop` (mean over all cases of original less worst)
        and `drop_by_luck` (the same after answers were exchanged between the wordings of a case: what decoding alone
        gives), `responses`, and `enough` (at least 4 of them).
    """
    usable = [case for case in cases if min(map(len, case["scores"])) >= 2]
    if not usable:
        return None
    generator = np.random.default_rng(seed)
    within, between, drops, luck = [], [], [], []
    for case in usable:
        responses = min(map(len, case["scores"]))
        table = np.array([entry[:responses] for entry in case["scores"]])
        within.append(table.var(axis=1, ddof=1).mean())
        between.append(table.mean(1).var(ddof=1) - within[-1] / responses)
        drops.append(case["drop"])
        exchanged = generator.permuted(np.tile(table.ravel(), (draws, 1)), axis=1).reshape(draws, *table.shape).mean(2)
        luck.append((exchanged[:, 0] - exchanged[:, 1:].min(1)).mean())
    noise, signal = float(np.mean(within)), float(np.mean(between))
    fewest = min(min(map(len, case["scores"])) for case in usable)
    return {
        "within": noise,
        "between": signal,
        "share_between": signal / (signal + noise) if signal + noise > 0 else None,
        "drop": float(np.mean(drops)),
        "drop_by_luck": float(np.mean(luck)),
        "responses": fewest,
        "enough": fewest >= ENOUGH_RESPONSES,
        "n_cases": len(usable),
    }


def power_note(n: int) -> dict[str, Any]:
    """
    What so many cases can show.

    Args:
        n (`int`):
            Cases that enter the correlation.

    Returns:
        `dict`: `n`, `detectable_rho` (found with 80 % probability at 5 %), `power_at_paper` (probability of finding
        the paper's correlation) and `note`, a sentence.
    """
    smallest, chance = detectable(n), power(PAPER["rho"], n)  # type: ignore[arg-type]
    if smallest is None or chance is None:
        note = f"{n} cases are too few for a correlation; use all 100 of RobustAlpacaEval."
    else:
        note = (
            f"{n} cases find a correlation of {smallest:.2f} or more four times in five (5 % level), and one of "
            f"{PAPER['rho']} as in the paper with probability {chance:.2f}. An interval that contains 0 is no "
            "evidence of no effect."
        )
    return {"n": n, "detectable_rho": smallest, "power_at_paper": chance, "note": note}


def summary(
    cases: Sequence[Mapping[str, Any]],
    sites: Sequence[str],
    metrics: Sequence[str],
    *,
    average_over: AverageOver = "all",
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> dict[str, Any]:
    """
    All numbers of the diagnostic.

    Args:
        cases (sequence of `Mapping`):
            Scored cases as [`judged_case`] gives them.
        sites, metrics (sequence of `str`):
            What was measured.
        average_over, seed, resamples:
            As in [`site_statistics`].

    Returns:
        `dict`: `n_scored`, `n_included`, `n_excluded` (no paraphrase scores below the original), `n_tied` (included,
        with several worst wordings), `mean_drop`, `power`, `decoding_noise`, and `sites` (site -> metric ->
        [`site_statistics`]).
    """
    included = [case for case in cases if case["included"]]
    return {
        "n_scored": len(cases),
        "n_included": len(included),
        "n_excluded": len(cases) - len(included),
        "n_tied": sum(case["tied"] for case in included),
        "mean_drop": _mean([case["drop"] for case in included]),
        "power": power_note(len(included)),
        "decoding_noise": decoding_noise(cases, seed=seed),
        "sites": {
            site: {
                metric: site_statistics(cases, site, metric, average_over=average_over, seed=seed, resamples=resamples)
                for metric in metrics
            }
            for site in sites
        },
    }


def _within_cases(
    cases: Sequence[Mapping[str, Any]], site: str, metric: str, *, seed: int, resamples: int
) -> dict[str, Any]:
    """Mean over cases of the rank correlation between the distances and the losses of one case's paraphrases."""
    rhos = []
    for case in cases:
        distances = case["distances"][site][metric]["to_original"]
        losses = [case["original_score"] - float(np.mean(entry)) for entry in case["scores"][1:]]
        if len(losses) > 2 and np.ptp(distances) > 0 and np.ptp(losses) > 0:
            rhos.append(pearson(ranks(distances), ranks(losses)))
    values = np.array(rhos)
    interval = None
    if len(values) > 1:
        interval = bootstrap(lambda rows: float(values[rows].mean()), len(values), seed=seed, size=resamples)
    return {"rho": _mean(values), "interval": interval, "n_cases": len(values)}


def _shuffled(worst: np.ndarray, drops: np.ndarray, rho: float | None, seed: int) -> dict[str, Any]:
    """The control: distances exchanged between cases, where the correlation should vanish."""
    if rho is None:
        return {"mean": None, "interval": None, "p": None}
    null = shuffled_rhos(worst, drops, seed=seed)
    low, high = np.quantile(null, [0.025, 0.975])
    beyond = (np.sum(np.abs(null) >= abs(rho) - 1e-12) + 1) / (len(null) + 1)
    return {"mean": float(null.mean()), "interval": [float(low), float(high)], "p": float(beyond)}


def _mean(values: Sequence[float] | np.ndarray) -> float | None:
    return float(np.mean(values)) if len(values) and np.isfinite(values).all() else None


def _number(value: float) -> float | None:
    return value if np.isfinite(value) else None
