"""`trl-robust diagnose-distance` from the command line: files, numbers, going on where a run stopped, refusals."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import VOCABULARY, WORDS, make_tokenizer, tiny_model
from transformers import LlamaConfig, LlamaForSequenceClassification

from trl_robust.cli import exit_code
from trl_robust.scripts import diagnose_distance, distance_run

REAL = Path(__file__).parents[2].parent / "shared" / "data" / "robust_alpaca_eval" / "RobustAlpacaEval.jsonl"


def save_reward_model(folder: Path, tokenizer, vocabulary: int, num_labels: int = 1, hidden: int = 24) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForSequenceClassification(
            LlamaConfig(
                vocab_size=vocabulary,
                hidden_size=hidden,
                intermediate_size=36,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=2048,
                initializer_range=0.2,
                num_labels=num_labels,
                pad_token_id=0,
            )
        ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny model, a tiny reward model, and six made-up cases of eleven wordings."""
    folder = tmp_path_factory.mktemp("place")
    tiny_model("llama").save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    save_reward_model(folder / "reward", make_tokenizer(), VOCABULARY)
    generator = np.random.default_rng(0)

    def sentence() -> str:
        return " ".join(generator.choice(WORDS, size=generator.integers(3, 8)).tolist())

    cases = [
        {
            "instruction": sentence(),
            "paraphrases": [sentence() for _ in range(10)],
            "index": 10 + number,
            "answer": WORDS[number],
        }
        for number in range(6)
    ]
    write_lines(folder / "cases.jsonl", cases)
    return folder


@pytest.fixture
def diagnose(place):
    def run(*words) -> int:
        given = ["--model", place / "model", "--data", place / "cases.jsonl", "--resamples", 20, "--max_new_tokens", 3]
        return exit_code(lambda: diagnose_distance.main([str(word) for word in (*given, *words)]))

    return run


def read(folder: Path) -> tuple[dict, list[dict]]:
    def refuse(name: str):
        raise ValueError(f"{name} is no JSON")

    text = (folder / "distance.json").read_text()
    return json.loads(text, parse_constant=refuse), lines(folder / "cases.jsonl")


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_scores_by_a_reward_model_give_the_files_and_their_numbers(diagnose, place, tmp_path, capsys):
    out = tmp_path / "out"
    layers = ("--layers", "embedding", 1, 0.75)
    assert diagnose("--scorer", "reward", "--reward_model", place / "reward", "--output_dir", out, *layers) == 0
    result, cases = read(out)
    assert {path.name for path in out.iterdir()} == {
        "settings.json", "answers.jsonl", "cases.jsonl", "distance.json", "distance.png"
    }  # fmt: skip
    assert list(result["sites"]) == ["embedding", "1", "3"] and result["blocks"]["1"] == "after block 2 of 4"
    assert result["last_token"] == {"<asst>": 66} and result["rendering"]["kind"] == "chat"
    assert result["n_scored"] == len(cases) == 6 and result["n_included"] == sum(case["included"] for case in cases)
    # Every number of a case can be worked out again from its scores.
    for case in cases:
        means = np.mean(case["scores"], axis=1)
        assert len(case["scores"]) == 11 and case["worst"] == 1 + means[1:].argmin()
        assert case["drop"] == pytest.approx(means[0] - means[1:].min())
    # At the embedding all prompts end in the same token: no distance, and no correlation.
    assert result["sites"]["embedding"]["l2"]["spearman"]["why"] == "the distance has one value only, 0"
    assert result["sites"]["1"]["l2"]["spearman"]["rho"] is not None
    printed = capsys.readouterr().out
    assert "after block 2 of 4" in printed and "6 cases scored" in printed and "Written to" in printed


def test_scores_of_a_file_reproduce_a_table_whose_correlation_is_known(diagnose, place, tmp_path):
    """Scores made up from the distances themselves: the farthest wording loses most, and the most where it is far."""
    first = tmp_path / "first"
    assert diagnose("--scorer", "exact", "--output_dir", first) == 0
    _, cases = read(first)
    rows = []
    for case in cases:
        distances = case["distances"]["1"]["l2"]["to_original"]
        rows.append({"index": case["index"], "scores": [0.0, *(-distance for distance in distances)]})
    scores = write_lines(tmp_path / "scores.jsonl", rows)
    assert diagnose("--scorer", "file", "--scores", scores, "--output_dir", tmp_path / "second") == 0
    result, again = read(tmp_path / "second")
    found = result["sites"]["1"]["l2"]
    assert found["spearman"]["rho"] == pytest.approx(1) and found["selection_free"]["rho"] == pytest.approx(1)
    assert found["within_case"]["rho"] == pytest.approx(1)
    for case in again:
        distances = case["distances"]["1"]["l2"]["to_original"]
        assert case["drop"] == pytest.approx(max(distances)) == pytest.approx(distances[case["worst"] - 1])


def test_the_likelihood_of_the_answer_needs_no_generation(diagnose, tmp_path, monkeypatch):
    monkeypatch.setattr(distance_run, "answers_of", None)
    assert diagnose("--scorer", "loglik", "--pooling", "mean_query", "--output_dir", tmp_path / "out") == 0
    _, cases = read(tmp_path / "out")
    assert all(score[0] < 0 for case in cases for score in case["scores"])


def test_several_sampled_answers_separate_luck_of_the_decoding(diagnose, place, tmp_path, capsys):
    out = tmp_path / "out"
    sampled = ("--scorer", "reward", "--reward_model", place / "reward", "--responses", 4, "--greedy", "false")
    assert diagnose(*sampled, "--output_dir", out, "--max_cases", 3) == 0
    result, cases = read(out)
    assert result["decoding_noise"]["responses"] == 4 and result["decoding_noise"]["within"] > 0
    assert all(len(entry) == 4 for case in cases for entry in case["scores"])
    assert "by luck alone" in capsys.readouterr().out.replace("\n", " ")


def test_a_run_that_stopped_goes_on_and_answers_nothing_twice(diagnose, place, tmp_path, monkeypatch, capsys):
    words = ("--scorer", "reward", "--reward_model", place / "reward", "--responses", 2, "--greedy", "false")
    assert diagnose(*words, "--output_dir", tmp_path / "whole") == 0
    asked, answer = [], distance_run.answers_of

    def stopping(subject, case, **settings):
        if len(asked) == 3:
            raise KeyboardInterrupt
        asked.append(case.id)
        return answer(subject, case, **settings)

    monkeypatch.setattr(distance_run, "answers_of", stopping)
    assert diagnose(*words, "--output_dir", tmp_path / "part") == 130
    with (tmp_path / "part" / "answers.jsonl").open("a") as file:
        file.write('{"index": "13", "num_tok')  # cut short in writing
    assert asked == ["10", "11", "12"]
    # Other settings are other answers.
    assert diagnose(*words, "--output_dir", tmp_path / "part", "--seed", 1) == 1
    assert "other settings (seed)" in capsys.readouterr().err

    def going_on(subject, case, **settings):
        asked.append(case.id)
        return answer(subject, case, **settings)

    monkeypatch.setattr(distance_run, "answers_of", going_on)
    assert diagnose(*words, "--output_dir", tmp_path / "part") == 0
    assert asked == ["10", "11", "12", "13", "14", "15"]
    assert read(tmp_path / "part")[1] == read(tmp_path / "whole")[1]
    assert lines(tmp_path / "part" / "answers.jsonl") == lines(tmp_path / "whole" / "answers.jsonl")
    assert diagnose(*words, "--output_dir", tmp_path / "part") == 1
    assert "nothing is written over" in capsys.readouterr().err


def test_a_case_that_fails_is_counted_and_tried_again(diagnose, place, tmp_path, monkeypatch):
    answer = distance_run.answers_of

    def failing(subject, case, **settings):
        if case.id == "12":
            raise RuntimeError("out of memory")
        return answer(subject, case, **settings)

    monkeypatch.setattr(distance_run, "answers_of", failing)
    assert diagnose("--scorer", "exact", "--output_dir", tmp_path / "out") == 0
    result, cases = read(tmp_path / "out")
    assert (result["n_scored"], result["n_errored"]) == (5, 1)
    assert cases[2] == {"index": "12", "status": "errored", "reason": "RuntimeError: out of memory"}
    monkeypatch.setattr(distance_run, "answers_of", answer)
    (tmp_path / "out" / "distance.json").unlink()
    assert diagnose("--scorer", "exact", "--output_dir", tmp_path / "out") == 0
    assert read(tmp_path / "out")[0]["n_scored"] == 6


def test_prompts_over_the_limit_are_skipped_and_counted(diagnose, place, tmp_path):
    assert diagnose("--scorer", "exact", "--output_dir", tmp_path / "out", "--max_prompt_tokens", 4) == 0
    result, cases = read(tmp_path / "out")
    assert result["n_skipped"] == 6 and result["n_scored"] == 0
    assert "over the limit of 4" in cases[0]["reason"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--scorer", "reward"], "`reward_model` is missing"),
        (["--scorer", "file"], "`scores` is missing"),
        (["--scores", "x.jsonl"], "belongs to the scorer file"),
        (["--responses", "4"], "Set `--greedy false`"),
        (["--temperature", "0.5"], "belongs to sampling"),
        (["--scorer", "loglik", "--greedy", "false"], "loglik generates none"),
        (["--layers", "9"], "Layer 9 does not exist"),
        (["--layers", "half"], "half"),
        (["--pooling", "first"], "pooling"),
        (["--scorer", "nobody"], "scorer"),
        (["--top_p", "0", "--greedy", "false"], "above 0 and at most 1"),
        (["--max_cases", "0"], "at least 1"),
        (["--template", "none.txt"], "There is no file none.txt"),
        (["--respones", "4"], "did you mean `responses`"),
        (["--data", "none.jsonl"], "none.jsonl"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_setting_is_one_message_and_nothing_is_written(words, said, diagnose, tmp_path, capsys):
    assert diagnose("--output_dir", tmp_path / "out", *words) == 1
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_cases_without_an_answer_are_named_when_the_scorer_needs_one(diagnose, tmp_path, capsys):
    data = write_lines(tmp_path / "data.jsonl", [{"instruction": "w1", "paraphrases": ["w2"], "index": 4}])
    for scorer in ("exact", "loglik"):
        assert diagnose("--data", data, "--scorer", scorer, "--output_dir", tmp_path / "out") == 1
        assert "the first is case 4" in capsys.readouterr().err


def test_a_reward_model_of_several_outputs_is_refused(diagnose, tmp_path, capsys):
    reward = save_reward_model(tmp_path / "reward", make_tokenizer(), VOCABULARY, num_labels=3)
    assert diagnose("--scorer", "reward", "--reward_model", reward, "--output_dir", tmp_path / "out") == 1
    assert "has 3 outputs" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(not REAL.is_file(), reason="needs RobustAlpacaEval, which the package does not hold")
def test_the_real_file_runs_through_with_all_its_hundred_questions(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    from make_tiny_llama import make_tiny_llama

    model = make_tiny_llama(tmp_path / "model", [REAL])
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    reward = save_reward_model(tmp_path / "reward", tokenizer, len(tokenizer))
    out = tmp_path / "out"
    words = ["--model", model, "--data", REAL, "--scorer", "reward", "--reward_model", reward, "--output_dir", out]
    words += ["--max_new_tokens", 8]
    assert exit_code(lambda: diagnose_distance.main([str(word) for word in words])) == 0
    result, cases = read(out)
    assert result["n_scored"] == 100 and result["n_skipped"] == result["n_errored"] == 0
    assert result["n_included"] + result["n_excluded"] == 100
    assert [case["index"] for case in cases] == [str(number) for number in range(100)]
    found = result["sites"]["1"]["l2"]
    assert found["selection_free"]["n"] == 1000 and found["spearman"]["n"] == result["n_included"]
    assert result["last_token"] == {"<|assistant|>": 1100}
    sys.stdout.write(capsys.readouterr().out)
