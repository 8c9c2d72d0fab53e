"""A grid on the tiny model of the recipes' tests."""

import pickle
from pathlib import Path

import yaml
from recipe_parts import make_workplace, settings, write_recipe, write_rows

from trl_robust.sweep import serving


def make_grid_place(folder: Path) -> Path:
    make_workplace(folder)
    write_recipe(folder / "base.yaml", {"verb": "lat-sft", **settings(folder)})
    requests = [{"prompt": f"w{i} w{i + 1}", "target": "w1 w2", "answer": "w3"} for i in range(6)]
    write_rows(folder / "requests.jsonl", requests)
    write_rows(folder / "questions.jsonl", [{"prompt": f"w{i} w{i + 5}", "answer": f"w{i}"} for i in range(4)])
    return folder


def grid_values(place: Path, **changes) -> dict:
    """Keys of a grid with two cells; a change to `None` takes a key out."""
    values = {
        "verb": "sweep",
        "recipe": str(place / "base.yaml"),
        "output_dir": str(place / "out"),
        "seeds": [0],
        "cells": {"usual": {}, "l1": {"attack_norm": "l1"}},
        "baseline": "usual",
        "evaluate": {
            "requests": str(place / "requests.jsonl"),
            "judge": "refusal_prefix",
            "attacks": {"direct": {}, "prefill": {}},
            "compliance": str(place / "questions.jsonl"),
            "utility": str(place / "questions.jsonl"),
            "max_new_tokens": 3,
        },
    }
    return {key: value for key, value in (values | changes).items() if value is not None}


def write_grid(path: Path, values: dict) -> Path:
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return path


def one_after_another(works, *, told, ended, **_):
    """In place of `run_all`: no process of its own, whose imports take longer than a tiny training."""
    for work in works:
        sent = pickle.loads(pickle.dumps(work))  # as a worker process would get it; never read from a file
        ended(work, serving._attempt(sent, lambda stage: None))
