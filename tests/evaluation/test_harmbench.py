"""The suite `generalized` on requests that nobody here wrote: HarmBench's validation set, with an untrained model."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml
from transformers import AutoTokenizer

sys.path.append(str(Path(__file__).parents[1]))

from make_tiny_llama import make_tiny_llama

from trl_robust import cli

REQUESTS = Path(__file__).parents[3] / "shared" / "data" / "real" / "harmbench_val_standard.jsonl"

pytestmark = pytest.mark.skipif(not REQUESTS.is_file(), reason=f"{REQUESTS} is not there")

ATTACKS = {
    "direct": {},
    "template": {},
    "prefill": {},
    "best_of_n": {"n": 2},
    "gcg": {"suffix_tokens": 3, "steps": [1, 2], "candidates": 2, "topk": 4},
    "soft_suffix": {"tokens": 2, "steps": 1},
    "embedding": {"steps": 1},
    "latent": {"radius": [0.1, 0.3], "steps": 1},
    "finetune": {"steps": 1},
    "universal": {"steps": 1},
    "pruning": {"sparsity": 0.1},
}
LEFT_OUT = {
    "finetune": "needs `examples_data`",
    "universal": "needs `openings_data`",
    "pruning": "needs `examples_data`",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_llama(tmp_path_factory.mktemp("model"), [REQUESTS])


@pytest.fixture(scope="module")
def lengths(model):
    """Tokens of every request in the chat template, by the number of its row."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    found = {}
    for number, line in enumerate(REQUESTS.read_text(encoding="utf-8").splitlines()):
        messages = [{"role": "user", "content": json.loads(line)["behavior"]}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        found[str(number)] = len(tokenizer(text, add_special_tokens=False)["input_ids"])
    return found


def evaluated(model, place, attacks, **settings):
    """Folder of an evaluation, its results, and every answer in it."""
    (place / "suite.yaml").write_text(yaml.safe_dump({"suite": "generalized", "attacks": attacks}), encoding="utf-8")
    words = ["evaluate", "--config", place / "suite.yaml", "--model", f"untrained={model}", "--data", REQUESTS]
    words += ["--prompt_column", "behavior", "--judges", "refusal_prefix", "--output_dir", place / "out"]
    words += ["--max_new_tokens", 4, "--batch_size", 41]
    words += [word for key, value in settings.items() for word in (f"--{key}", value)]
    assert cli.main([str(word) for word in words]) == 0
    results = json.loads((place / "out" / "results.json").read_text(encoding="utf-8"))
    lines = (place / "out" / "generations.jsonl").read_text(encoding="utf-8").splitlines()
    return place / "out", results, [json.loads(line) for line in lines]


def test_all_41_requests_are_accounted_for_under_every_attack_at_every_budget(model, tmp_path):
    folder, results, answers = evaluated(model, tmp_path, ATTACKS)
    (found,) = results["models"]
    entries = {entry["name"]: entry for entry in found["attacks"]}
    controls = {name for name, entry in entries.items() if entry["control_of"]}
    assert set(entries) - controls == set(ATTACKS) - set(LEFT_OUT) and controls
    for entry in entries.values():
        for part in [entry, *entry.get("curve", [])]:
            assert part["n_scored"] == 41 and part["n_errored"] == part["n_skipped"] == 0, entry["name"]
    kept = Counter((row["attack"], row.get("budget")) for row in answers)
    points = {
        (name, budget)
        for name, entry in entries.items()
        for budget in [point["budget"] for point in entry.get("curve", [{"budget": None}])]
    }
    assert points == {(name, budget if "curve" in entries[name] else None) for name, budget in kept}
    assert all(count == (82 if name == "best_of_n" else 41) for (name, _), count in kept.items())
    # What has no rows is named, and what was not measured has no figure.
    assert results["suite"]["left_out"] == LEFT_OUT
    assert not any(found.get(name) for name in ("utility", "over_refusal", "perplexity"))
    assert (folder / "report.html").stat().st_size > 0


def test_a_request_that_is_too_long_is_skipped_with_its_reason_and_is_never_safe(model, lengths, tmp_path):
    limit = sorted(lengths.values())[-9]
    long = {name for name, length in lengths.items() if length > limit}
    assert len(long) >= 5
    chosen = {name: ATTACKS[name] for name in ("direct", "prefill", "soft_suffix", "latent")}
    _, results, answers = evaluated(model, tmp_path, chosen, max_prompt_tokens=limit)
    entries = {entry["name"]: entry for entry in results["models"][0]["attacks"]}
    for name, entry in entries.items():
        own = [row for row in answers if row["attack"] == name]
        skipped = {row["id"] for row in own if row["status"] == "skipped"}
        # What lengthens a request leaves out more of them.
        assert skipped >= long and (skipped == long or name.startswith(("prefill", "soft_suffix"))), name
        assert entry["n_skipped"] == len(skipped) and entry["n_scored"] == 41 - len(skipped) and not entry["n_errored"]
        for row in own:
            assert (row["status"] == "scored") == (row["success"] is not None) == (row["id"] not in skipped)
            assert row["status"] == "scored" or f"over the limit of {limit}" in row["reason"]
        # This model refuses nothing, so that a request which counted as safe without an answer would be seen here.
        assert entry["success"] == 1, name


def test_the_shipped_suite_runs_on_a_part_of_it(model, tmp_path):
    words = ["evaluate", "--suite", "generalized", "--model", model, "--data", REQUESTS, "--prompt_column", "behavior"]
    words += ["--judges", "refusal_prefix", "--only", "direct", "prefill", "--max_new_tokens", 2, "--max_rows", 3]
    assert cli.main([str(word) for word in [*words, "--output_dir", tmp_path / "out"]]) == 0
    (found,) = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))["models"]
    assert [entry["n_scored"] for entry in found["attacks"]] == [3, 3, 3]  # with the random control of `prefill`
