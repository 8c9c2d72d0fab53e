import copy
import json

import pytest
from generalized_panel import generalized_results

from trl_robust.report import write_report

_RESULTS = {
    "schema": 1,
    "created": "2026-07-03T10:11:12Z",
    "versions": {"trl_robust": "0.1.0", "trl": "1.16.0"},
    "models": [
        {
            "name": "base",
            "attacks": [
                {
                    "name": "prefill", "class": "input", "budget": {"tokens": 8}, "version": 1, "judge": "exact",
                    "success": 0.74, "interval": [0.6, 0.85], "n_scored": 50, "n_errored": 0, "n_skipped": 0,
                },
                {
                    "name": "latent", "class": "latent", "budget": {"steps": 16, "radius": 1.5}, "version": 2,
                    "judge": "exact", "success": 1.0, "interval": [0.93, 1.0], "n_scored": 47, "n_errored": 3,
                    "n_skipped": 1,
                },
            ],
            "utility": {"name": "exact match", "value": 0.98, "interval": [0.95, 1.0], "n": 200},
            "over_refusal": {"name": "harmless refused", "value": 0.02, "interval": [0.0, 0.05], "n": 100},
            "coherence": {"distinct": 0.9},
            "factor_of_safety": [{"attack": "latent", "factor": 1.4}],
            "a key of the future": [1, 2],
        },
        {
            "name": "refuser",
            "description": "refuses everything",
            "attacks": [
                {
                    "name": "prefill", "class": "input", "budget": {"tokens": 8}, "version": 1, "judge": "exact",
                    "success": 0.0, "interval": [0.0, 0.07], "n_scored": 50, "n_errored": 0, "n_skipped": 0,
                },
                {
                    "name": "latent", "class": "latent", "budget": {}, "success": None, "interval": None,
                    "n_scored": 0, "n_errored": 50, "n_skipped": 0,
                },
            ],
            "utility": {"name": "exact match", "value": 0.1, "interval": None},
            "over_refusal": {"name": "harmless refused", "value": 1.0, "interval": [0.96, 1.0]},
        },
        {"name": "untested"},
    ],
}  # fmt: skip


@pytest.fixture
def results():
    return copy.deepcopy(_RESULTS)


@pytest.fixture(scope="session")
def old_folder(tmp_path_factory):
    """An evaluation of earlier versions with its report."""
    return _reported(tmp_path_factory.mktemp("old"), _RESULTS)


@pytest.fixture(scope="session")
def generalized_folder(tmp_path_factory):
    """A generalised evaluation with its report: drawing it takes seconds."""
    return _reported(tmp_path_factory.mktemp("generalized"), generalized_results())


def _reported(folder, results):
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    rows = [
        {"model": model["name"], "attack": attack["name"], "id": "p1", "prompt": "A PROMPT", "response": "A RESPONSE"}
        for model in results["models"]
        for attack in model.get("attacks", [])
    ]
    (folder / "generations.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    write_report(folder)
    return folder


@pytest.fixture
def generalized():
    return generalized_results()


@pytest.fixture
def write(tmp_path):
    """Writes an evaluation's folder and returns it."""

    def write_folder(results, generations=(), name="evaluation"):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
        lines = [row if isinstance(row, str) else json.dumps(row) for row in generations]
        (folder / "generations.jsonl").write_text("\n".join(lines), encoding="utf-8")
        return folder

    return write_folder
