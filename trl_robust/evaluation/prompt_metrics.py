"""Win rate and prompt robustness as metrics that `evaluate` and a trainer take."""

from __future__ import annotations

from collections.abc import Sequence

import datasets
import evaluate
import numpy as np

from .case_scores import as_row
from .robustness import CVAR_LEVEL, MEASURES, RESAMPLES, Matrix, prompt_robustness, win_rate


class _LocalMetric(evaluate.Metric):
    """
    A metric that loads nothing from a hub and writes nothing to disk. It takes one list of scores a case, or flat
    scores; references are ignored, so that it can stand in `evaluate.combine` beside metrics that need them.
    """

    description = ""

    def __init__(self, *, keep_in_memory: bool = True, **kwargs) -> None:
        super().__init__(keep_in_memory=keep_in_memory, **kwargs)

    def _build_data_dir(self) -> str:
        # The parent creates a folder under ~/.cache at construction, even where it will never put a file in it.
        return self._data_dir_root if self.keep_in_memory else super()._build_data_dir()

    def _info(self) -> evaluate.MetricInfo:
        score = datasets.Value("float64")
        return evaluate.MetricInfo(
            description=self.description,
            citation="",
            inputs_description="predictions: scores, None or NaN where there is none; flat, or one list a case.",
            # Both forms, in this order: the first that fits the values is taken.
            features=[
                datasets.Features({"predictions": datasets.Sequence(score)}),
                datasets.Features({"predictions": score}),
            ],
        )


class WinRate(_LocalMetric):
    """
    [`win_rate`] as a local `evaluate.Metric`: nothing is loaded from a hub, and nothing is written to disk.

    `predictions` are preferences in [0, 1], `None` or NaN where there is none; or one list a case, of which the mean
    counts, so that the standard error is that over cases.

    `compute` returns floats only, as a trainer's `compute_metrics` needs them: `win_rate` and
    `win_rate_standard_error` (in percent, NaN where there are too few), `win_rate_n` and `win_rate_n_missing`.

    Args:
        keep_in_memory (`bool`, *optional*, defaults to `True`):
            Whether to hold the values in memory, as in [`AttackSuccess`].
        **kwargs:
            Further arguments of `evaluate.Metric`.

    Example:

    ```python
    >>> WinRate().compute(predictions=[1.0, 0.0, 0.5])["win_rate"]
    50.0
    ```
    """

    description = "Mean preference in percent, with its standard error."

    def _compute(self, *, predictions: Sequence[float | None] | Matrix) -> dict[str, float]:
        cases = [_mean(value) if _is_list(value) else value for value in predictions]  # type: ignore[arg-type]
        found = win_rate(cases)  # type: ignore[arg-type]
        return {
            "win_rate": _number(found["win_rate"]),
            "win_rate_standard_error": _number(found["standard_error"]),
            "win_rate_n": float(found["n"]),
            "win_rate_n_missing": float(found["n_missing"]),
        }


class PromptRobustness(_LocalMetric):
    """
    [`prompt_robustness`] as a local `evaluate.Metric`: nothing is loaded from a hub, and nothing is written to disk.

    `predictions` are one list of scores a case, wording 0 the original. With `num_wordings` they may be flat, case
    after case, so that the metric can stand in `evaluate.combine` beside metrics of single scores.

    `compute` returns floats only, as a trainer's `compute_metrics` needs them: `prompt_original`, `prompt_worst`,
    `prompt_best`, `prompt_average`, `prompt_std`, `prompt_gap`, `prompt_worst_3` and `prompt_cvar`, each also with
    `_low` and `_high` (NaN where there is none), `prompt_n_cases`, `prompt_n_excluded` and `prompt_n_missing`.

    Args:
        num_wordings (`int`, *optional*):
            Wordings of a case, for flat predictions.
        keep_in_memory (`bool`, *optional*, defaults to `True`):
            Whether to hold the values in memory, as in [`AttackSuccess`].
        **kwargs:
            Further arguments of `evaluate.Metric`.

    Example:

    ```python
    >>> PromptRobustness().compute(predictions=[[0.5, 0.0, 1.0], [1.0, 1.0, 1.0]])["prompt_worst"]
    0.5
    ```
    """

    description = "Original, worst, best and spread of a score over the wordings of each case, mean over cases."

    def __init__(self, *, num_wordings: int | None = None, keep_in_memory: bool = True, **kwargs) -> None:
        if num_wordings is not None and num_wordings < 2:
            raise ValueError(f"num_wordings={num_wordings} must be at least 2: the original and another wording.")
        self.num_wordings = num_wordings
        super().__init__(keep_in_memory=keep_in_memory, **kwargs)

    def _compute(
        self,
        *,
        predictions: Matrix | Sequence[float | None],
        cvar_level: float = CVAR_LEVEL,
        scale: tuple[float, float] | None = None,
        confidence: float = 0.95,
        num_resamples: int = RESAMPLES,
        bootstrap_seed: int = 0,
    ) -> dict[str, float]:
        estimate = prompt_robustness(
            self._cases(predictions),
            cvar_level=cvar_level,
            scale=scale,
            confidence=confidence,
            num_resamples=num_resamples,
            seed=bootstrap_seed,
        )
        found = {}
        for name in MEASURES:
            low, high = estimate["intervals"][name] or (np.nan, np.nan)
            found[f"prompt_{name}"] = _number(estimate[name])  # type: ignore[literal-required]
            found[f"prompt_{name}_low"], found[f"prompt_{name}_high"] = low, high
        counts = {name: float(estimate[name]) for name in ("n_cases", "n_excluded", "n_missing")}  # type: ignore[literal-required]
        return found | {f"prompt_{name}": count for name, count in counts.items()}

    def _cases(self, predictions: Matrix | Sequence[float | None]) -> Matrix:
        if all(_is_list(value) for value in predictions):
            return predictions  # type: ignore[return-value]
        width = self.num_wordings
        if width is None:
            raise ValueError(
                "The predictions are single scores, and nothing says which belong to one case. Give one list of "
                "scores a case, or PromptRobustness(num_wordings=...)."
            )
        if len(predictions) % width:
            raise ValueError(
                f"{len(predictions)} predictions do not divide into cases of num_wordings={width}. Give every case as "
                "many, None where there is no score."
            )
        return [predictions[start : start + width] for start in range(0, len(predictions), width)]  # type: ignore[misc]


def _is_list(value: object) -> bool:
    return isinstance(value, list | tuple | np.ndarray)


def _mean(row: Sequence[float | None]) -> float | None:
    values = as_row(row, 0)
    return None if np.isnan(values).all() else float(np.nanmean(values))


def _number(value: float | None) -> float:
    return np.nan if value is None else value
