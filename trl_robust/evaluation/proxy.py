"""Whether resistance to generalised attacks stands for resistance to attacks on prompts, over several models.

Attacks on hidden states and weights are stronger than anything a deployment allows. They are of use only if the
models that resist them resist prompts as well, which a panel of models can show (2502.05209; lat.md 11.3): a rank
correlation, the error of predicting attacks on prompts that the prediction has not seen, and how often the generalised
attack is the stronger one. Models are what is drawn: with few of them little can be said, and every result says how
little.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import permutations
from typing import Literal, TypedDict

import numpy as np

from .correlation import RESAMPLES, bootstrap, detectable, ranks, spearman
from .isotonic import monotone_map
from .metrics import attack_success

LEAST_MODELS = 4
EXACT_MODELS = 7
"""Up to so many models, all orders of them are gone through; 7 have 5040."""
RANDOM_ORDERS = 10_000

Of = Literal["success", "resistance"]
"""What was measured under the generalised attack: success falls with a good defence, resistance rises."""

Numbers = Sequence[float | None]


class ProxyCorrelation(TypedDict):
    """What [`proxy_correlation`] returns."""

    rho: float | None
    interval: list[float] | None
    p: float | None
    smallest_p: float | None
    null: list[float] | None
    detectable: float | None
    n: int
    n_left_out: int
    why: str | None


class PredictionError(TypedDict):
    """What [`leave_one_attack_out`] returns."""

    error: float | None
    interval: list[float] | None
    baseline: float | None
    gain: float | None
    gain_interval: list[float] | None
    attacks: dict[str, float]
    leave_model_out: bool
    n: int
    n_left_out: int
    why: str | None


class ConservativeRate(TypedDict):
    """What [`conservative_rate`] returns."""

    rate: float | None
    interval: list[float] | None
    exceptions: list[int]
    largest_excess: float | None
    n: int
    n_left_out: int
    why: str | None


class ProxyStudy(TypedDict):
    """What [`proxy_study`] returns; can be written as JSON."""

    of: Of
    models: list[str]
    attacks: list[str]
    correlations: dict[str, ProxyCorrelation]
    prediction: PredictionError
    prediction_of_new_models: PredictionError
    conservative: ConservativeRate | None
    n: int
    note: str


def proxy_correlation(
    generalised: Numbers, prompt: Numbers, *, seed: int = 0, num_resamples: int = RESAMPLES
) -> ProxyCorrelation:
    """
    Spearman's correlation over models of a generalised measure with success of attacks on prompts.

    The interval is a percentile bootstrap over models. p is two-sided, of the permutation test: the share of the
    orders of the models whose correlation is at least as large; all orders up to 7 models, 10,000 random ones beyond.
    Few models have few orders, so `smallest_p` is the least p that any result could have had, `null` holds the range
    of 95 % of the orders, and `detectable` the true correlation that so many models find with a probability of 80 %
    (`None` below 5 models).

    Args:
        generalised (sequence of `float`):
            One number a model: success of, or resistance to, a generalised attack. Infinity is a censored resistance
            and ranks above all others; `None` is a model that was not measured.
        prompt (sequence of `float`):
            Success of attacks on prompts, for the same models.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the bootstrap and of the random orders.
        num_resamples (`int`, *optional*, defaults to `2000`):
            Size of the bootstrap.

    Returns:
        [`ProxyCorrelation`]. With fewer than 4 models, or where one side has one value only, `rho` is `None` and `why`
        says so. A good proxy has a `rho` near 1 for success and near -1 for resistance.

    Raises:
        `ValueError`: lists of different lengths.
    """
    x, y, missing = _both(generalised, [prompt])
    n = len(x)
    result = ProxyCorrelation(
        rho=None,
        interval=None,
        p=None,
        smallest_p=None,
        null=None,
        detectable=None,
        n=n,
        n_left_out=missing,
        why=_too_few(n),
    )
    if result["why"]:
        return result
    first, second = ranks(x), ranks(y[0])
    for name, column in (("the generalised measure", first), ("success of attacks on prompts", second)):
        if np.ptp(column) == 0:
            result["why"] = f"{name} is the same for all {n} models"
            return result
    found = spearman(first, second, seed=seed, resamples=num_resamples)
    assert found["rho"] is not None  # both sides vary
    nulls = _null(first, second, seed)
    # The order as drawn is one of all orders; of random ones it has to be added.
    extra = 0 if n <= EXACT_MODELS else 1
    result["rho"], result["interval"] = found["rho"], found["interval"]
    sizes = np.abs(nulls)
    result["p"] = float((np.sum(sizes >= abs(found["rho"]) - 1e-9) + extra) / (len(nulls) + extra))
    result["smallest_p"] = float((np.sum(sizes >= sizes.max() - 1e-9) + extra) / (len(nulls) + extra))
    if extra:  # random orders hardly ever meet the best one
        result["smallest_p"] = 1 / (len(nulls) + 1)
    result["null"] = [float(end) for end in np.quantile(nulls, [0.025, 0.975])]
    result["detectable"] = detectable(n)
    return result


def leave_one_attack_out(
    generalised: Numbers,
    prompt: Mapping[str, Numbers],
    *,
    of: Of,
    leave_model_out: bool = False,
    seed: int = 0,
) -> PredictionError:
    """
    Error of predicting an attack on prompts from the generalised measure, by a map fitted to the other attacks.

    For every attack on prompts in turn, a monotone map (rising for success, falling for resistance) is fitted to the
    success of all others on all models, and read for the one left out. `error` is the mean absolute difference over
    attacks and models. `baseline` is that of the same prediction without the generalised measure, the mean success of
    the other attacks, and `gain` is baseline less error: at or below 0 the measure says nothing about new attacks.

    Args:
        generalised (sequence of `float`):
            One number a model, as in [`proxy_correlation`].
        prompt (`Mapping[str, Sequence[float]]`):
            Success of every attack on prompts, for the same models. At least two attacks.
        of (`str`):
            `"success"` or `"resistance"`: what `generalised` is.
        leave_model_out (`bool`, *optional*, defaults to `False`):
            Whether the model that is predicted is left out of the fit as well: new attack and new model at once.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the bootstrap over models (with the maps as they were fitted).

    Returns:
        [`PredictionError`]: `attacks` has the error of each attack left out. With fewer than 4 models or 2 attacks
        `error` is `None` and `why` says so.

    Raises:
        `ValueError`: lists of different lengths, or an unknown `of`.
    """
    rising = _rising(of)
    names = list(prompt)
    x, table, missing = _both(generalised, [prompt[name] for name in names])
    n = len(x)
    result = PredictionError(
        error=None,
        interval=None,
        baseline=None,
        gain=None,
        gain_interval=None,
        attacks={},
        leave_model_out=leave_model_out,
        n=n,
        n_left_out=missing,
        why=_too_few(n),
    )
    if len(names) < 2:
        result["why"] = f"{len(names)} attacks on prompts; one is left out, so at least 2 are needed"
    if result["why"]:
        return result
    errors, plain = np.zeros((2, len(names), n))
    for number in range(len(names)):
        others = np.delete(table, number, axis=0)
        for fitted, read in _folds(n, leave_model_out):
            places, heights = np.tile(x[fitted], len(others)), others[:, fitted].ravel()
            predicted = monotone_map(places, heights, x[read], rising=rising)
            errors[number, read] = np.abs(predicted - table[number, read])
            plain[number, read] = np.abs(heights.mean() - table[number, read])
    of_models, gains = errors.mean(0), (plain - errors).mean(0)
    result["error"], result["baseline"], result["gain"] = (
        float(errors.mean()),
        float(plain.mean()),
        float(gains.mean()),
    )
    result["interval"] = bootstrap(lambda rows: float(of_models[rows].mean()), n, seed=seed)
    result["gain_interval"] = bootstrap(lambda rows: float(gains[rows].mean()), n, seed=seed)
    result["attacks"] = {name: float(row.mean()) for name, row in zip(names, errors, strict=True)}
    return result


def conservative_rate(generalised: Numbers, prompt: Mapping[str, Numbers], *, seed: int = 0) -> ConservativeRate:
    """
    Share of models on which a generalised attack succeeds at least as often as the strongest attack on prompts.

    There, whoever passes the generalised test passes the others as well: it errs on the safe side.

    Args:
        generalised (sequence of `float`):
            Success of the generalised attack at its reference budget, one number a model.
        prompt (`Mapping[str, Sequence[float]]`):
            Success of every attack on prompts, for the same models.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the bootstrap over models (Wilson's interval where all models agree).

    Returns:
        [`ConservativeRate`]: `exceptions` are the numbers of the models where an attack on prompts was stronger, and
        `largest_excess` by how much at most. With fewer than 4 models `rate` is `None` and `why` says so.

    Raises:
        `ValueError`: lists of different lengths.
    """
    kept = _kept(generalised, list(prompt.values()))
    result = ConservativeRate(
        rate=None,
        interval=None,
        exceptions=[],
        largest_excess=None,
        n=len(kept),
        n_left_out=len(generalised) - len(kept),
        why=_too_few(len(kept)) if prompt else "there is no attack on prompts",
    )
    if result["why"]:
        return result
    excess = {
        number: max(float(row[number]) for row in prompt.values()) - float(generalised[number])  # type: ignore[arg-type]
        for number in kept
    }
    found = attack_success([value <= 1e-9 for value in excess.values()], seed=seed)
    result["rate"], result["interval"] = found["success"], found["interval"]
    result["exceptions"] = [number for number, value in excess.items() if value > 1e-9]
    result["largest_excess"] = max(0.0, *excess.values())
    return result


def proxy_study(
    models: Sequence[str],
    generalised: Numbers,
    prompt: Mapping[str, Numbers],
    *,
    of: Of,
    success: Numbers | None = None,
    seed: int = 0,
) -> ProxyStudy:
    """
    Everything that a panel of models says about one generalised measure.

    Args:
        models (sequence of `str`):
            Names.
        generalised (sequence of `float`):
            One number a model, as in [`proxy_correlation`].
        prompt (`Mapping[str, Sequence[float]]`):
            Success of every attack on prompts, for the same models.
        of (`str`):
            `"success"` or `"resistance"`: what `generalised` is.
        success (sequence of `float`, *optional*):
            Where `generalised` is a resistance: the attack's success at its reference budget, for the conservative
            rate, which compares success with success.
        seed (`int`, *optional*, defaults to `0`):
            Seed.

    Returns:
        [`ProxyStudy`]: correlations with every attack on prompts, with the largest of them (`"largest"`) and with
        their mean (`"mean"`); prediction errors; the conservative rate, numbers of models turned into their order in
        `models`; `n`, models that were measured throughout.

    Raises:
        `ValueError`: lists of different lengths, an unknown `of`, or an attack named `"largest"` or `"mean"`.
    """
    _rising(of)
    if clash := {"largest", "mean"} & set(prompt):
        raise ValueError(
            f"An attack cannot be named {sorted(clash)[0]!r}; these names stand for all attacks together."
        )
    if len(models) != len(generalised):
        raise ValueError(f"There are {len(models)} models and {len(generalised)} measures; give one each.")
    columns: dict[str, Numbers] = dict(prompt)
    if prompt:
        together = list(zip(*prompt.values(), strict=True))
        columns["largest"] = [None if None in row else max(row) for row in together]  # type: ignore[type-var]
        columns["mean"] = [None if None in row else math.fsum(row) / len(row) for row in together]  # type: ignore[arg-type]
    reference = generalised if of == "success" else success
    n = len(_kept(generalised, list(prompt.values())))
    return ProxyStudy(
        of=of,
        models=list(models),
        attacks=list(prompt),
        correlations={name: proxy_correlation(generalised, column, seed=seed) for name, column in columns.items()},
        prediction=leave_one_attack_out(generalised, prompt, of=of, seed=seed),
        prediction_of_new_models=leave_one_attack_out(generalised, prompt, of=of, leave_model_out=True, seed=seed),
        conservative=None if reference is None else conservative_rate(reference, prompt, seed=seed),
        n=n,
        note=_note(n),
    )


def _note(n: int) -> str:
    if n < LEAST_MODELS:
        return f"{n} models are too few to say anything; at least {LEAST_MODELS} are needed."
    found = detectable(n)
    power = "" if found is None else f", and a true correlation below {found:.2f} would mostly be missed"
    return (
        f"Intervals are over {n} models{power}. Models that share a base or a training set are not independent, which "
        "no interval here knows."
    )


def _too_few(n: int) -> str | None:
    return None if n >= LEAST_MODELS else f"{n} models; at least {LEAST_MODELS} are needed"


def _rising(of: Of) -> bool:
    if of not in ("success", "resistance"):
        raise ValueError(f"of={of!r} is unknown; choose 'success' or 'resistance'.")
    return of == "success"


def _folds(n: int, leave_model_out: bool) -> list[tuple[np.ndarray, np.ndarray]]:
    """Models that are fitted and models that are predicted from them."""
    everyone = np.arange(n)
    if not leave_model_out:
        return [(everyone, everyone)]
    return [(np.delete(everyone, number), everyone[number : number + 1]) for number in range(n)]


def _kept(first: Numbers, others: Sequence[Numbers]) -> list[int]:
    """Numbers of the models that were measured throughout."""
    lengths = {len(first), *(len(column) for column in others)}
    if len(lengths) > 1:
        raise ValueError(
            f"The measures have lengths {sorted(lengths)}; give one number a model, None where there is none."
        )
    columns = [first, *others]
    return [
        number
        for number in range(len(first))
        if all(column[number] is not None and not math.isnan(float(column[number])) for column in columns)  # type: ignore[arg-type]
    ]


def _both(first: Numbers, others: Sequence[Numbers]) -> tuple[np.ndarray, np.ndarray, int]:
    kept = _kept(first, others)
    x = np.array([first[number] for number in kept], dtype=float)
    table = np.array([[column[number] for number in kept] for column in others], dtype=float)
    if not np.isfinite(table).all():
        raise ValueError(
            "Success of an attack on prompts is infinite; only a resistance may be (where it is censored)."
        )
    return x, table, len(first) - len(kept)


def _null(first: np.ndarray, second: np.ndarray, seed: int) -> np.ndarray:
    """Correlations of all orders of the models, or of random ones."""
    n = len(first)
    if n <= EXACT_MODELS:
        orders = np.array(list(permutations(range(n))))
    else:
        orders = np.random.default_rng(seed).permuted(np.tile(np.arange(n), (RANDOM_ORDERS, 1)), axis=1)
    centred = [column - column.mean() for column in (first, second)]
    scale = np.sqrt((centred[0] @ centred[0]) * (centred[1] @ centred[1]))
    return centred[0][orders] @ centred[1] / scale
