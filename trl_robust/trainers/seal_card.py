from __future__ import annotations

from typing import Any

ALGORITHMS = {
    "auxiliary": "Algorithm 1: a second adapter, trained on the weighted data alone, stands for what the data by "
    "itself could reach",
    "memory_efficient": "Algorithm 2, without the auxiliary model: rows are in effect ranked by their loss under a "
    "model that is mostly trained on the safe set",
}


def selection_card(args: Any, model: str, rows: int, safe_rows: int) -> str:
    """
    The README of a selector's folder.

    Args:
        args ([`SEALConfig`]):
            Settings of the run.
        model (`str`):
            The model that rows were judged with.
        rows (`int`):
            Number of rows that were ranked.
        safe_rows (`int`):
            Size of the safe set.

    Returns:
        `str`: Markdown.
    """
    head = (
        "---\nlibrary_name: trl-robust\ntags:\n- trl-robust\n- seal\n---\n\n# A data selector\n\n"
        f"Scores for {rows} rows of one dataset, learned with {model or 'a model'} by trl-robust "
        "([SEAL](https://huggingface.co/papers/2410.07471)). No model is in this folder.\n\n```python\n"
        'from trl_robust import Selector\n\nkept = Selector.load("THIS_FOLDER").select(dataset, keep='
        f"{args.keep_fraction:g})\n```\n\nRows are found by a hash of their text: any copy of the dataset will do, in "
        "any order, for any model; rows that were not scored are refused.\n\n## How rows were ranked\n\n"
    )
    how = {
        "safe_loss": f"By their loss under the model after training on the {safe_rows} safe rows alone (a baseline).",
        "loss_gap": f"By the difference of two losses: of the model trained on the {safe_rows} safe rows and on all "
        "rows alike, and of one trained on all rows alone (a baseline, without a selector).",
    }
    if args.selection_method in how:
        return head + how[args.selection_method] + "\n"
    step = f", plus {args.penalty_increment:g} at every later epoch" if args.penalty_increment else ""
    return (
        f"{head}{ALGORITHMS[args.penalty_algorithm]}. Penalty {args.penalty_strength:g}{step}; selector "
        f"`{args.selector_function}`, {args.selector_optimizer}; safe set of {safe_rows} rows.\n\nA selector is "
        "hygiene, not a guarantee: rows written in the style of the safe set can pass it. Look at the report beside "
        "this file.\n"
    )
