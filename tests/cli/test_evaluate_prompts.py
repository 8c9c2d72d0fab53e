"""`trl-robust evaluate --suite prompts`: what it writes, that a killed run goes on, and what it refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from tiny import WORDS, make_tokenizer, tiny_model
from transformers import AutoModelForSequenceClassification, LlamaConfig

from trl_robust.cli import exit_code
from trl_robust.data import load_rows
from trl_robust.evaluation import prompt_robustness, prompt_suite, sampling
from trl_robust.evaluation.alpaca import read_outputs
from trl_robust.evaluation.preference_judges import ExactJudge
from trl_robust.evaluation.wordings import cases_of
from trl_robust.report import write_report
from trl_robust.report.prompts import write_prompts_report
from trl_robust.scripts import evaluate as script

# Beside the repository, never in it: the file has no licence.
REAL = Path(__file__).parents[3] / "shared" / "data" / "robust_alpaca_eval" / "RobustAlpacaEval.jsonl"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folders = []
    for seed in range(2):
        folder = tmp_path_factory.mktemp("model")
        tiny_model("llama", seed=seed).save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
        folders.append(folder)
    return folders


ROWS = [
    {
        "instruction": f"w{number} w1 w2", "paraphrases": [f"w{number} w{other}" for other in (3, 4, 5)],
        "index": 10 + number, "answer": "w35", "reference": "w1 w2",
    }
    for number in range(5)
]  # fmt: skip


@pytest.fixture
def data(tmp_path):
    return write(tmp_path / "data.jsonl", ROWS)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def evaluate(*words) -> int:
    argv = ["--suite", "prompts", "--max_new_tokens", "4", "--batch_size", "4", *(str(word) for word in words)]
    return exit_code(lambda: script.main(argv))


def results(folder) -> dict:
    return json.loads((folder / "results.json").read_text())


def generations(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "generations.jsonl").read_text().splitlines()]


def without_time(folder) -> dict:
    return {key: value for key, value in results(folder).items() if key != "created"}


def test_two_models_are_measured_and_compared(models, data, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["--model", *models, "--data", data, "--judge", "exact", "--samples_of_original", 4, "--posix", "true"]
    assert evaluate(*words, "--output_dir", out) == 0
    found = results(out)
    first, second = found["models"]
    assert (first["name"], first["attacks"]) == (str(models[0]), [])
    assert first["prompts"]["judge"] == {"name": "exact", "version": 1}
    assert first["prompts"]["counts"] == {"n_scored": 35, "n_errored": 0, "n_skipped": 0}  # 5 x (4 wordings + 3)
    rows = [row for row in generations(out) if row["model"] == str(models[0])]
    assert len(rows) == 35 and {row["wording"] for row in rows} == {0, 1, 2, 3}
    # The measures are those of the scores that stand beside the answers.
    matrix = [[row["score"] for row in rows if row["id"] == str(10 + i) and row["sample"] == 0] for i in range(5)]
    expected = prompt_robustness(matrix, scale=(0, 1))
    assert first["prompts"]["robustness"] == json.loads(json.dumps(expected))
    assert all(row["score"] == float("w35" in row["response"].split()) for row in rows)
    assert first["prompts"]["same_prompt_null"]["n_compared"] == 4
    assert "win_rate" not in first["prompts"] and first["prompts"]["posix"]["n_cases"] == 5
    assert "compared" not in first["prompts"] and second["prompts"]["compared"]["baseline"] == str(models[0])
    difference = second["prompts"]["robustness"]["best"] - first["prompts"]["robustness"]["best"]
    assert second["prompts"]["compared"]["differences"]["best"] == pytest.approx(difference)
    assert found["ranking_agreement"]["chance"] == 0.5
    page = (out / "report.html").read_text()
    assert "worst wording" in page and "Differences to" in page and "<script" not in page
    assert "w0 w1 w2" not in page  # texts only where they are asked for
    assert "w0 w1 w2" in write_prompts_report(out, show_generations=True).read_text()
    assert (out / "figures" / "prompt_ranges.png").stat().st_size > 1000
    assert len(list((out / "alpaca_eval").rglob("wording_0*.json"))) == 8
    assert "35 scored, 0 errored, 0 skipped" in capsys.readouterr().out
    # The report of attacks renders what this suite wrote.
    assert "No attack was run" in write_report(out).read_text()


class TestResume:
    def stopped_after(self, number, monkeypatch):
        """Makes the batch with this number end the process, and returns the prompts that were answered."""
        answered = []
        generate = sampling._generate

        def counted(subject, batch, settings):
            if len(answered) >= 4 * number:
                raise KeyboardInterrupt
            answered.extend(request.key for request, _ in batch)
            return generate(subject, batch, settings)

        monkeypatch.setattr(sampling, "_generate", counted)
        return answered

    def test_a_killed_run_goes_on_and_ends_as_one_that_was_not(self, models, data, tmp_path, monkeypatch, capsys):
        words = ["--model", models[0], "--data", data, "--judge", "exact", "--output_dir"]
        assert evaluate(*words, tmp_path / "whole") == 0
        out = tmp_path / "out"
        with monkeypatch.context() as patch:
            before = self.stopped_after(2, patch)
            assert evaluate(*words, out) == 130
        assert "goes on from there" in capsys.readouterr().err
        assert not (out / "results.json").exists()
        # A line that the kill cut short is no answer.
        with (out / "progress" / "answers-00.jsonl").open("a") as file:
            file.write('{"key": "14/3/0", "respo')
        with monkeypatch.context() as patch:
            after = self.stopped_after(100, patch)
            assert evaluate(*words, out) == 0
        assert len(before) == 8 and len(after) == 12 and not set(before) & set(after)
        assert without_time(out) == without_time(tmp_path / "whole")
        assert generations(out) == generations(tmp_path / "whole")

    def test_a_judge_that_was_stopped_goes_on_as_well(self, models, data, tmp_path, monkeypatch):
        words = ["--model", models[0], "--data", data, "--judge", "exact", "--output_dir", tmp_path / "out"]
        monkeypatch.setattr(prompt_suite, "JUDGED_AT_ONCE", 6)
        seen = []
        whole = ExactJudge.judge

        def counted(self, answers):
            if len(seen) == 12:
                seen.append("stopped")
                raise KeyboardInterrupt
            seen.extend(answers)
            return whole(self, answers)

        monkeypatch.setattr(ExactJudge, "judge", counted)
        assert evaluate(*words) == 130
        assert evaluate(*words) == 0
        assert len(seen) == 21  # 20 answers, each once
        assert results(tmp_path / "out")["models"][0]["prompts"]["counts"]["n_scored"] == 20

    def test_what_errored_is_tried_again_and_the_rest_is_kept(self, models, data, tmp_path, monkeypatch):
        out = tmp_path / "out"
        words = ["--model", models[0], "--data", data, "--judge", "exact", "--output_dir", out]
        generate, calls = sampling._generate, []

        def failing(subject, batch, settings):
            calls.append(batch)
            if len(calls) == 1:
                raise torch.OutOfMemoryError("no memory")
            return generate(subject, batch, settings)

        monkeypatch.setattr(sampling, "_generate", failing)
        assert evaluate(*words) == 0
        prompts = results(out)["models"][0]["prompts"]
        assert prompts["counts"] == {"n_scored": 16, "n_errored": 4, "n_skipped": 0}
        assert prompts["robustness"]["n_missing"] == 4
        assert {row["score"] for row in generations(out) if row["status"] == "errored"} == {None}
        (out / "results.json").unlink()
        assert evaluate(*words) == 0
        assert len(calls) == 6
        assert results(out)["models"][0]["prompts"]["counts"]["n_scored"] == 20

    def test_other_settings_in_the_same_folder_are_refused(self, models, data, tmp_path, monkeypatch, capsys):
        words = ["--model", models[0], "--data", data, "--output_dir", tmp_path / "out"]
        with monkeypatch.context() as patch:
            self.stopped_after(1, patch)
            assert evaluate(*words) == 130
        capsys.readouterr()
        assert evaluate(*words, "--seed", 1) == 1
        assert "another sampling" in capsys.readouterr().err


def test_without_a_judge_only_what_needs_none_is_measured(models, data, tmp_path, capsys):
    out = tmp_path / "out"
    assert evaluate("--model", models[0], "--data", data, "--output_dir", out, "--greedy") == 0
    assert "There is no judge" in capsys.readouterr().out
    prompts = results(out)["models"][0]["prompts"]
    assert prompts["judge"] is None and "robustness" not in prompts
    assert prompts["counts"]["n_answered"] == 20 and 0 < prompts["posix"]["posix"] < 10
    assert prompts["agreement"]["n_cases"] == 5 and prompts["length"]["characters_original"] > 0
    assert "There was no judge" in (out / "report.md").read_text()
    assert not list((out / "figures").iterdir())
    # The answers can be judged afterwards, and are not given again.
    (out / "results.json").unlink()
    assert evaluate("--model", models[0], "--data", data, "--output_dir", out, "--greedy", "--judge", "exact") == 0
    assert results(out)["models"][0]["prompts"]["counts"]["n_scored"] == 20


def test_a_reward_model_gives_win_rates_raw_and_length_controlled(models, data, tmp_path):
    config = LlamaConfig(
        vocab_size=64, hidden_size=24, intermediate_size=36, num_hidden_layers=1, num_attention_heads=4, num_labels=1,
        initializer_range=0.3,
    )  # fmt: skip
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "reward")
    make_tokenizer().save_pretrained(tmp_path / "reward")
    words = ["--model", models[0], "--data", data, "--judge", "reward", "--judge_model", tmp_path / "reward"]
    assert evaluate(*words, "--judge_tau", 0.5, "--posix", "false", "--output_dir", tmp_path / "out") == 0
    prompts = results(tmp_path / "out")["models"][0]["prompts"]
    assert prompts["judge"]["tau"] == 0.5 and "posix" not in prompts
    assert prompts["win_rate"]["win_rate"] == pytest.approx(100 * prompts["robustness"]["original"])
    controlled = prompts["length_controlled"]
    assert controlled["original"]["win_rate"] == pytest.approx(prompts["win_rate"]["win_rate"])
    assert controlled["original"]["instruction_difficulty"] is False
    assert math.isfinite(controlled["all_wordings"]["length_controlled_win_rate"])


def test_an_endpoint_that_is_not_there_errors_every_row_and_scores_none(models, data, tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)
    words = [
        "--model",
        models[0],
        "--data",
        data,
        "--posix",
        "false",
        "--max_cases",
        1,
        "--output_dir",
        tmp_path / "o",
    ]
    judge = ["--judge", "endpoint", "--judge_url", "http://127.0.0.1:1/v1", "--judge_model", "x", "--judge_timeout", 1]
    assert evaluate(*words, *judge) == 0
    prompts = results(tmp_path / "o")["models"][0]["prompts"]
    assert prompts["counts"] == {"n_scored": 0, "n_errored": 4, "n_skipped": 0}
    assert prompts["robustness"]["worst"] is None and prompts["win_rate"]["win_rate"] is None
    assert "4 answers errored" in (tmp_path / "o" / "report.md").read_text()


def test_alpaca_evals_files_go_out_and_come_back(models, data, tmp_path):
    out = tmp_path / "out"
    words = ["--model", models[0], "--data", data, "--output_dir", out]
    assert evaluate(*words) == 0
    for path in (out / "alpaca_eval").rglob("*.json"):
        rows = [
            {**row, "output_1": "base", "output_2": row.pop("output"), "preference": 1.75, "annotator": "judge"}
            for row in json.loads(path.read_text())
        ]
        place = tmp_path / "annotations" / path.stem
        place.mkdir(parents=True)
        (place / "annotations.json").write_text(json.dumps(rows))
    (out / "results.json").unlink()
    assert evaluate(*words, "--judge", "annotations", "--judge_annotations", tmp_path / "annotations") == 0
    prompts = results(out)["models"][0]["prompts"]
    assert (prompts["judge"]["annotators"], prompts["win_rate"]["win_rate"]) == (["judge"], 75)


def test_csv_and_json_and_parquet_and_folders_are_read(models, data, tmp_path):
    rows = [{key: value for key, value in row.items() if key != "paraphrases"} for row in ROWS]
    table = Dataset.from_list(
        [{**row, "paraphrases": json.dumps(ROWS[i]["paraphrases"])} for i, row in enumerate(rows)]
    )
    table.to_csv(tmp_path / "cases.csv")
    Dataset.from_list(ROWS).to_parquet(tmp_path / "cases.parquet")
    (tmp_path / "cases.json").write_text(json.dumps(ROWS))
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    expected = cases_of(load_rows(str(data)), "data")
    assert len(expected[0].wordings) == 4
    for name in ("cases.csv", "cases.parquet", "cases.json", "saved"):
        assert cases_of(load_rows(str(tmp_path / name)), name) == expected


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--judge", "exact", "--judge_tau", "2"], "belongs to the judges ['reward']"),
        (["--judge_url", "http://x"], "there is no `judge`"),
        (["--judge", "llm"], "`judge_model` is missing"),
        (["--judge", "endpoint", "--judge_url", "x", "--judge_model", "y"], "no address"),
        (["--judge", "gpt"], "judge"),
        (["--judge", "llm", "--judge_model", "./none"], "`judge_model` ./none is not there"),
        (["--judge", "annotations", "--judge_annotations", "none.json"], "no file none.json"),
        (["--references", "none.json"], "no file none.json"),
        (["--greedy", "--samples_of_original", "3"], "the same answer every time"),
        (["--greedy", "--top_p", "0.5"], "remove one or the other"),
        (["--top_p", "1.5"], "`top_p` is 1.5"),
        (["--temperature", "0"], "`temperature` is 0"),
        (["--suite", "promts"], "suite"),
        (["--sample_of_original", "3"], "did you mean `samples_of_original`"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_setting_is_one_message(words, said, models, data, tmp_path, capsys):
    out = tmp_path / "out"
    assert evaluate("--model", models[0], "--data", data, "--output_dir", out, *words) == 1
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error
    assert not out.exists()


def test_a_key_in_place_of_its_variable_is_not_repeated(models, data, capsys):
    words = ["--judge", "endpoint", "--judge_url", "http://x/v1", "--judge_model", "y", "--judge_key_env", "sk-1234"]
    assert evaluate("--model", models[0], "--data", data, *words) == 1
    error = capsys.readouterr().err
    assert "not the key" in error and "sk-1234" not in error


@pytest.mark.parametrize(
    ("rows", "words", "said"),
    [
        ([{"question": "w1"}], [], "no column 'instruction' and 'paraphrases'"),
        ([{"instruction": "w1", "paraphrases": []}], [], "`paraphrases` that are no list"),
        ([{"instruction": " ", "paraphrases": ["w1"]}], [], "`instruction` that is no text"),
        ([{"instruction": "w1", "paraphrases": ["w2"], "index": 1}] * 2, [], "an `index` twice"),
        ([{"instruction": "w1", "paraphrases": ["w2"]}], ["--judge", "exact"], "Add an `answer`"),
        (
            [{"instruction": "w1", "paraphrases": ["w2"]}],
            ["--judge", "endpoint", "--judge_url", "http://x/v1", "--judge_model", "y"],
            "`--references`",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_cases_that_are_none_are_one_message(rows, words, said, models, tmp_path, capsys):
    data = write(tmp_path / "cases.jsonl", rows)
    assert evaluate("--model", models[0], "--data", data, "--output_dir", tmp_path / "out", *words) == 1
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_models_that_are_not_there_are_named_at_once_and_results_are_not_written_over(models, data, tmp_path, capsys):
    assert evaluate("--model", models[0], tmp_path / "none", "--data", data, "--output_dir", tmp_path / "out") == 1
    assert "none is not there" in capsys.readouterr().err
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.json").write_text("{}")
    assert evaluate("--model", models[0], "--data", data, "--output_dir", tmp_path / "out") == 1
    assert "nothing is written over" in capsys.readouterr().err


def test_references_are_found_by_the_instruction(models, tmp_path):
    data = write(tmp_path / "cases.jsonl", [{"instruction": WORDS[0], "paraphrases": ["w2"]}])
    (tmp_path / "base.json").write_text(json.dumps([{"instruction": WORDS[0], "output": "w9", "generator": "base"}]))
    (case,) = cases_of(load_rows(str(data)), "data", read_outputs(tmp_path / "base.json"))
    assert case.reference == "w9" and case.id == "0"


@pytest.mark.skipif(not REAL.is_file(), reason="needs the file of RobustAlpacaEval, which is not ours to ship")
def test_the_real_file_has_eleven_wordings(models, tmp_path):
    out = tmp_path / "out"
    assert evaluate("--model", models[0], "--data", REAL, "--max_cases", 2, "--output_dir", out) == 0
    rows = generations(out)
    assert len(rows) == 22 and {row["wording"] for row in rows} == set(range(11))
    assert [row["id"] for row in rows[::11]] == ["0", "1"]
    assert results(out)["models"][0]["prompts"]["posix"]["n_cases"] == 2
