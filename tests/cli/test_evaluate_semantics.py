"""`trl-robust evaluate --suite semantics`."""

import json

import pytest
from recipe_parts import write_rows
from tiny import completion_data

from trl_robust.cli import main


def evaluate(*words) -> int:
    return main(["evaluate", "--suite", "semantics", *(str(word) for word in words)])


def test_a_model_is_checked_and_the_verdicts_are_printed(workplace, tmp_path, capsys):
    data = write_rows(tmp_path / "rows.jsonl", [dict(row) for row in completion_data(4)])
    words = ["--model", workplace / "model", "--data", data, "--layer", "1", "--steps", "2", "--max_new_tokens", "4"]
    assert evaluate(*words, "--output_dir", tmp_path / "out") == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    [model] = results["models"]
    assert model["attacks"] == [] and model["semantics"]["sites"] == ["1"]
    assert set(model["semantics"]["checks"]) == {"paraphrase", "random", "untargeted"}
    assert model["semantics"]["checks"]["paraphrase"]["feasible"]["value"] == 1.0
    assert "does the meaning stay?" in " ".join(capsys.readouterr().out.split())
    pairs = (tmp_path / "out" / "human_rating.jsonl").read_text().splitlines()
    assert len(pairs) == len((tmp_path / "out" / "human_rating_key.jsonl").read_text().splitlines()) > 0
    assert evaluate(*words, "--output_dir", tmp_path / "out") == 1  # never written over
    assert "nothing is written over" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--epsilon", "0", "--steps", "0"], ("`epsilon` is 0", "`steps` is 0")),
        (["--layer", "9"], ("Layer 9 does not exist",)),
        (["--judge", "exact"], ("`--judge` (command line) is not a key",)),
        (["--positions", "all"], ("`positions` (command line) is 'all'",)),
    ],
)
def test_wrong_arguments_are_told_with_exit_code_1(workplace, tmp_path, words, said, capsys):
    data = write_rows(tmp_path / "rows.jsonl", [dict(row) for row in completion_data(4)])
    found = evaluate("--model", workplace / "model", "--data", data, "--output_dir", tmp_path / "out", *words)
    assert found == 1
    err = capsys.readouterr().err
    assert all(part in err for part in said)
