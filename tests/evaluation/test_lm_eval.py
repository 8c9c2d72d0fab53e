"""Benchmarks through lm-eval, on a task of six rows; skipped where lm-eval is not installed."""

import importlib.util
import json

import pytest
import torch

from trl_robust.attacks import Subject
from trl_robust.evaluation import lm_eval as ours

ROWS = [{"question": f"w{i} w{i + 1}", "choices": ["w3", "w4"], "label": i % 2} for i in range(6)]
TASK = """\
task: tiny_facts
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 3}}
"""
GROUP = """\
group: tiny_group
task: [tiny_facts]
aggregate_metric_list: [{metric: acc, weight_by_size: true}]
metadata: {version: 2}
"""


def test_without_lm_eval_the_message_says_what_to_install(monkeypatch, llama, tokenizer):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'trl-robust\[eval\]'"):
        ours.accuracies(Subject(llama, tokenizer), ["mmlu"])


@pytest.fixture
def tasks(tmp_path):
    pytest.importorskip("lm_eval")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "task.yaml").write_text(TASK.format(rows=tmp_path / "rows.jsonl"))
    (tmp_path / "group.yaml").write_text(GROUP)
    return str(tmp_path)


def expected(model, tokenizer) -> float:
    """The share of rows whose right choice is the likelier next token."""
    right = 0
    for row in ROWS:
        tokens = torch.tensor([tokenizer(row["question"])["input_ids"]])
        with torch.no_grad():
            logits = model(tokens).logits[0, -1]
        ids = [tokenizer.convert_tokens_to_ids(choice) for choice in row["choices"]]
        right += int(logits[ids].argmax()) == row["label"]
    return right / len(ROWS)


def test_the_accuracy_of_a_task_is_that_of_the_models_own_logits(tasks, llama, tokenizer):
    state = torch.get_rng_state()
    found = ours.accuracies(Subject(llama, tokenizer, batch_size=2), ["tiny_facts"], task_folder=tasks)
    assert found["tiny_facts"]["value"] == pytest.approx(expected(llama, tokenizer))
    assert {name: found["tiny_facts"][name] for name in ("name", "n", "num_fewshot")} == {
        "name": "acc on tiny_facts", "n": 6, "num_fewshot": 0,
    }  # fmt: skip
    assert str(found["tiny_facts"]["version"]) == "3" and found["tiny_facts"]["standard_error"] > 0
    assert torch.equal(state, torch.get_rng_state())


def test_a_group_counts_the_rows_of_its_tasks_and_an_unknown_task_is_named(tasks, llama, tokenizer):
    subject = Subject(llama, tokenizer, batch_size=2)
    found = ours.accuracies(subject, ["tiny_group"], task_folder=tasks, limit=4)
    assert found["tiny_group"]["n"] == 4 and 0 <= found["tiny_group"]["value"] <= 1
    with pytest.raises(ValueError, match="lm-eval has no task tiny_fact"):
        ours.accuracies(subject, ["tiny_fact"], task_folder=tasks)
