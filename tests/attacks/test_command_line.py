"""What `trl-robust attack` refuses: one message, exit code 1, nothing written."""

from __future__ import annotations

import json

import pytest
from tiny import WORDS, make_tokenizer, tiny_model

from trl_robust import cli


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model("llama").save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path):
    return write(tmp_path / "data.jsonl", [{"prompt": f"{word} {WORDS[0]}", "target": WORDS[1]} for word in WORDS[:3]])


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def attack(*words) -> int:
    return cli.main(["attack", *(str(word) for word in words)])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--attack_optimizer", "sgd"], "attack_optimizer"),
        (["--attack_objective", "untargeted"], "attack_objective"),
        (["--attack_positions", "last_user"], "attack_positions"),
        (["--attack_norm", "l7"], "attack_norm"),
        (["--attack_learning_rate", "0"], "above 0"),
        (["--attack_radius", "-1"], "at least 0"),
        (["--attack_sites", "9"], "Layer 9 does not exist"),
        (["--attack_sites", "everywhere"], "everywhere"),
        (["--finetune_steps", "3"], "belong to the attacks"),
        (["--dtype", "float8"], "dtype"),
        (["--batch_size", "0"], "at least 1"),
        (["--attack_stepz", "3"], "did you mean `attack_steps`"),
        (["--prompt_column", "request"], "no column 'request'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_setting_is_one_message(words, said, model, data, tmp_path, capsys):
    out = tmp_path / "out"
    given = ["--model", model, "--attack", "latent", "--data", data, "--output_dir", out, *words]
    assert attack(*given) == 1
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error
    assert not out.exists()


def test_all_faults_come_at_once(tmp_path, capsys):
    assert attack("--attack", "latnt", "--batch_size", "0", "--modle", "x") == 1
    error = capsys.readouterr().err
    for said in ("latnt", "batch_size", "did you mean `model`", "`data` is missing"):
        assert said in error


@pytest.mark.parametrize(
    "row", [{"prompt": None}, {"prompt": 3}, {"prompt": ""}, {"prompt": []}, {"prompt": "w1", "target": 3}], ids=str
)
def test_rows_that_are_no_requests_are_named(row, model, tmp_path, capsys):
    data = write(tmp_path / "data.jsonl", [row])
    assert attack("--model", model, "--attack", "direct", "--data", data, "--output_dir", tmp_path / "out") == 1
    assert "row 0" in capsys.readouterr().err


def test_results_are_never_written_over(model, data, tmp_path, capsys):
    words = ["--model", model, "--attack", "direct", "--data", data, "--max_new_tokens", 2]
    assert attack(*words, "--output_dir", tmp_path / "out") == 0
    before = (tmp_path / "out" / "results.json").read_text()
    assert attack(*words, "--output_dir", tmp_path / "out") == 1
    assert (tmp_path / "out" / "results.json").read_text() == before
    assert attack(*words, "--output_dir", data) == 1
    assert "nothing is written over" in capsys.readouterr().err


def test_without_a_folder_every_attack_gets_its_own(model, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("direct", "prefill", "direct"):
        assert attack("--model", model, "--attack", name, "--data", data, "--max_new_tokens", 2) == 0
    found = sorted(path.parent.name for path in tmp_path.glob("attack-results/*/results.json"))
    assert found == ["direct", "direct-2", "prefill"]


def test_a_model_that_is_not_there_is_named(data, tmp_path, capsys):
    assert attack("--model", tmp_path / "none", "--attack", "direct", "--data", data) == 1
    assert "`model`" in capsys.readouterr().err


def test_numbers_as_answers_are_taken_and_rows_of_one_id_stay_apart(model, tmp_path, capsys):
    data = write(tmp_path / "data.jsonl", [{"id": None, "prompt": WORDS[number], "answer": 17} for number in range(3)])
    assert attack("--model", model, "--attack", "direct", "--data", data, "--output_dir", tmp_path / "out") == 0
    lines = (tmp_path / "out" / "generations.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == ["0", "1", "2"]
    assert "3 scored, 0 errored, 0 skipped; judge: exact" in capsys.readouterr().out
