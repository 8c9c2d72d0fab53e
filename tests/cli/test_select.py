"""`trl-robust select`."""

import json
import random
import re
from datetime import datetime

import pytest
import torch
from datasets import Dataset
from recipe_parts import write_rows

from trl_robust.cli import main
from trl_robust.data import load_rows, row_hashes
from trl_robust.scripts import select as script
from trl_robust.selection import Selector, random_selector

ROWS = [
    {
        "prompt": f"question {number}",
        "completion": f"réponse / {number}",
        "source": "bad" if number % 5 == 0 else "[good]",
        "unsafe": number % 5 == 0,
        "share": number / 3,
    }
    for number in range(20)
]
# Bad rows rank last; of the others the later ones first.
SCORES = [(-1.0 if row["unsafe"] else 0.0) + number / 100 for number, row in enumerate(ROWS)]
SAFE = [{"prompt": f"harm {number}", "completion": "I cannot.", "topic": number} for number in range(8)]
FILES = {"kept.jsonl", "selection.json", "report.html", "report.md", "figures"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with rows, demonstrations and two selectors."""
    folder = tmp_path_factory.mktemp("select")
    write_rows(folder / "rows.jsonl", ROWS)
    write_rows(folder / "safe.jsonl", SAFE)
    hashes = row_hashes(Dataset.from_list(ROWS))
    Selector(torch.tensor(SCORES), hashes, settings={"method": "seal"}).save(folder / "selector")
    random_selector(hashes, 0).save(folder / "random")
    return folder


def select(place, out, *words, data="rows.jsonl", selector="selector") -> int:
    basics = ["--selector", place / selector, "--dataset_name", place / data, "--output_dir", out]
    return main(["select", *(str(word) for word in (*basics, *words))])


@pytest.fixture
def without_report(monkeypatch):
    """Most of a run's time goes into its figures."""
    monkeypatch.setattr("trl_robust.report.selection.write_selection_report", lambda folder, **options: folder)


def kept(out):
    return [json.loads(line) for line in (out / "kept.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.usefixtures("without_report")
class TestRows:
    def test_a_shuffled_and_converted_copy_keeps_the_same_rows(self, place, tmp_path):
        order = random.Random(1).sample(range(20), 20)
        talk = [
            {
                "prompt": [{"role": "user", "content": ROWS[number]["prompt"]}],
                "completion": [{"role": "assistant", "content": f" {ROWS[number]['completion']}\r\n"}],
                "nth": number,
            }
            for number in order
        ]
        write_rows(tmp_path / "talk.jsonl", talk)
        assert select(place, tmp_path / "plain", "--count", "7") == 0
        assert select(place, tmp_path / "talk", "--count", "7", data=tmp_path / "talk.jsonl") == 0
        numbers = [row["nth"] for row in kept(tmp_path / "talk")]
        assert numbers == [number for number in order if number in numbers]
        assert [ROWS[number] for number in sorted(numbers)] == kept(tmp_path / "plain")
        assert kept(tmp_path / "talk")[0] == talk[order.index(numbers[0])]

    def test_a_threshold(self, place, tmp_path):
        weights = Selector.load(place / "selector").weights().tolist()
        assert select(place, tmp_path / "out", "--threshold", repr(weights[11])) == 0
        assert [row["prompt"] for row in kept(tmp_path / "out")] == [
            f"question {number}" for number in range(20) if weights[number] >= weights[11]
        ]
        assert len(kept(tmp_path / "out")) == 8

    def test_weights_are_written_in_full_and_have_a_mean_of_1(self, place, tmp_path):
        assert select(place, tmp_path / "out", "--weighted", "true", "--keep", "0.5") == 0
        rows = kept(tmp_path / "out")
        selector = Selector.load(place / "selector")
        expected = selector.select(load_rows(str(place / "rows.jsonl")), 0.5, weighted=True)
        assert [row["weight"] for row in rows] == expected["weight"][:]
        assert sum(row["weight"] for row in rows) / 10 == pytest.approx(1, abs=1e-12)
        assert [{k: v for k, v in row.items() if k != "weight"} for row in rows] == [
            {k: v for k, v in row.items() if k != "weight"} for row in expected
        ]

    def test_a_share_of_every_source(self, place, tmp_path, capsys):
        words = ["--keep", "0.5", "--source_column", "source"]
        assert select(place, tmp_path / "all", *words, "--label_column", "unsafe") == 0
        assert not any(row["unsafe"] for row in kept(tmp_path / "all"))
        text = capsys.readouterr().out
        assert re.search(r"bad\s*│\s*4\s*│\s*0\s*│\s*0\.0%", text)
        assert re.search(r"\[good\]\s*│\s*16\s*│\s*10\s*│\s*62\.5%", text)
        assert json.loads((tmp_path / "all" / "selection.json").read_text())["labels"]["kept_labelled"] == 0
        assert select(place, tmp_path / "each", *words, "--per_source", "true") == 0
        sources = [row["source"] for row in kept(tmp_path / "each")]
        assert (sources.count("bad"), sources.count("[good]")) == (2, 8)

    def test_a_column_of_hashes_is_not_added_and_not_taken_away(self, place, tmp_path):
        hashes = row_hashes(Dataset.from_list(ROWS))
        other = [{"prompt": "another text", "row_hash": name} for name in hashes]
        write_rows(tmp_path / "hashed.jsonl", other)
        assert select(place, tmp_path / "out", data=tmp_path / "hashed.jsonl") == 0
        assert kept(tmp_path / "out") == [row for row, own in zip(other, ROWS, strict=True) if not own["unsafe"]]


@pytest.mark.usefixtures("without_report")
class TestUnscored:
    def test_changed_rows_are_refused_dropped_or_kept(self, place, tmp_path, capsys):
        rows = [ROWS[0] | {"completion": "changed"}, *ROWS[1:], {**ROWS[1], "prompt": "new"}]
        data = tmp_path / "changed.jsonl"
        write_rows(data, rows)
        assert select(place, tmp_path / "out", "--count", "5", data=data) == 1
        err = capsys.readouterr().err
        assert "2 of its 21 rows were not scored by this selector (2 rows (0, 20))" in err and "Traceback" not in err
        assert not (tmp_path / "out").exists()
        assert select(place, tmp_path / "drop", "--count", "5", "--unscored", "drop", data=data) == 0
        assert kept(tmp_path / "drop") == [ROWS[number] for number in (14, 16, 17, 18, 19)]
        text = capsys.readouterr().out
        assert "Without a score: 2 unknown to the selector, 0 never visited; 0 of them are kept." in text
        assert "Rows that the selector knows and the dataset lacks: 1." in text
        assert select(place, tmp_path / "keep", "--count", "5", "--unscored", "keep", data=data) == 0
        assert kept(tmp_path / "keep") == [rows[number] for number in (0, 14, 16, 17, 18, 19, 20)]


@pytest.mark.usefixtures("without_report")
class TestMixing:
    def test_demonstrations_are_appended_with_the_columns_that_both_have(self, place, tmp_path, capsys):
        words = ["--mix_dataset_name", place / "safe.jsonl", "--mix_fraction", "0.25"]
        assert select(place, tmp_path / "out", "--weighted", "true", *words) == 0
        rows = kept(tmp_path / "out")
        assert [row["prompt"] for row in rows[:16]] == [row["prompt"] for row in ROWS if not row["unsafe"]]
        assert len(rows) == 20 and all(row["completion"] == "I cannot." for row in rows[16:])
        assert all(set(row) == {"prompt", "completion", "weight"} for row in rows)
        assert [row["weight"] for row in rows[16:]] == [1.0] * 4
        assert len({row["prompt"] for row in rows[16:]}) == 4
        text = " ".join(capsys.readouterr().out.split())
        assert "Demonstrations mixed in: 4." in text
        assert "Columns that the demonstrations lack are left out: source, unsafe, share." in text
        assert json.loads((tmp_path / "out" / "selection.json").read_text())["mixed_in"] == 4

    def test_the_draw_is_of_the_seed(self, place, tmp_path):
        words = ["--mix_dataset_name", place / "safe.jsonl", "--mix_fraction", "0.2", "--seed"]
        drawn = []
        for name, seed in (("a", 0), ("b", 0), ("c", 1)):
            assert select(place, tmp_path / name, *words, seed) == 0
            drawn.append([row["prompt"] for row in kept(tmp_path / name)[16:]])
        assert drawn[0] == drawn[1] != drawn[2]

    def test_conversations_and_plain_text_are_not_mixed(self, place, tmp_path, capsys):
        talk = [{"prompt": [{"role": "user", "content": "x"}], "completion": [{"role": "assistant", "content": "y"}]}]
        write_rows(tmp_path / "talk.jsonl", talk)
        assert select(place, tmp_path / "out", "--mix_dataset_name", tmp_path / "talk.jsonl") == 1
        assert "Give both the same form" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


class TestReport:
    def test_four_fifths_are_kept_as_they_are_and_in_their_order(self, place, tmp_path, capsys):
        out = tmp_path / "a" / "out"
        assert select(place, out) == 0
        assert kept(out) == [row for row in ROWS if not row["unsafe"]]
        assert {path.name for path in out.iterdir()} == FILES
        found = json.loads((out / "selection.json").read_text())
        assert (found["rows"]["kept"], found["rows"]["dataset"], found["mixed_in"]) == (16, 20, 0)
        assert found["run"]["dataset"]["rows"] == 20 and found["run"]["arguments"]["keep"] is None
        text = capsys.readouterr().out
        assert "16 of 20 rows are kept (80.0%)." in text
        weights = Selector.load(place / "selector").weights()
        assert f"Weight of the last one: {weights[1]:.4g}." in text
        assert found["threshold"] == pytest.approx(weights[1].item(), rel=1e-12)

    def test_texts_are_shown_on_request_alone(self, place, tmp_path):
        assert select(place, tmp_path / "hidden") == 0
        assert "réponse" not in (tmp_path / "hidden" / "report.html").read_text(encoding="utf-8")
        assert select(place, tmp_path / "shown", "--show_rows", "true") == 0
        assert "réponse" in (tmp_path / "shown" / "report.html").read_text(encoding="utf-8")

    def test_other_selectors_are_compared(self, place, tmp_path):
        assert select(place, tmp_path / "out", "--compare", place / "random", place / "selector") == 0
        agreement = json.loads((tmp_path / "out" / "selection.json").read_text())["agreement"]
        assert agreement[str(place / "selector")]["jaccard"] == 1.0
        assert agreement[str(place / "random")]["jaccard"] < 1.0
        assert agreement[str(place / "random")]["method"] == "random"


class TestRefusals:
    def test_results_are_never_written_over(self, place, tmp_path, capsys):
        for name in ("kept.jsonl", "selection.json", "report.html"):
            out = tmp_path / name.replace(".", "-")
            out.mkdir()
            (out / name).write_text("mine")
            assert select(place, out) == 1
            assert f"holds results ({name}), and nothing is written over" in capsys.readouterr().err
            assert [(path.name, path.read_text()) for path in out.iterdir()] == [(name, "mine")]

    def test_all_faults_are_told_at_once(self, tmp_path, capsys):
        (tmp_path / "file").write_text("")
        words = "--kep 0.1 --keep 1.5 --per_source true --unscored ask --mix_fraction 0 --compare a a --seed -1"
        assert main(["select", *words.split(), "--output_dir", str(tmp_path / "file")]) == 1
        err = capsys.readouterr().err
        for fault in (
            "has 11 faults:",
            "`--kep` (command line) is not a key; did you mean `keep`?",
            "`unscored` (command line) is 'ask'",
            "`selector` is missing",
            "`dataset_name` is missing",
            "`keep` is 1.5; it is a share, from 0 to 1",
            "`per_source` needs `source_column`",
            "`mix_fraction` is given, and no `mix_dataset_name`",
            "`mix_fraction` is 0; it must be above 0 and at most 1",
            "`compare` names a selector twice",
            "`seed` is -1",
            f"`output_dir` is {tmp_path / 'file'}, which is a file",
        ):
            assert fault in err

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--keep", "0.5", "--count", "3"], "['keep', 'count'] are given; each says how many rows are kept"),
            (["--count", "0"], "`count` is 0, which keeps no row"),
            (["--count", "-2"], "`count` is -2; it must be at least 0"),
            (["--keep", "0.01"], "No row is kept: the dataset has too few rows for this share"),
            (["--threshold", "77"], "No row has a weight of 77 (`threshold`); the largest is 1."),
            (["--threshold", "nan"], "`threshold` (command line) is 'nan'; a number is needed"),
            (["--threshold", "1", "--per_source", "true", "--source_column", "source"], "has no effect on a `thresh"),
            (["--source_column", "origin"], "has no column 'origin'"),
            (["--source_column", "origin", "--per_source", "true"], "has no column 'origin' to select by"),
            (["--label_column", "source"], "The label `source` is neither true nor false"),
            (["--dataset_split", "test"], "has no split 'test'"),
            (["--compare", "gone"], "gone holds no selector"),
            (["--mix_dataset_name", "gone.jsonl"], "There is no dataset gone.jsonl"),
        ],
    )
    def test_one_fault_is_one_message_and_nothing_is_written(self, words, message, place, tmp_path, capsys):
        assert select(place, tmp_path / "out", *words) == 1
        err = capsys.readouterr().err
        assert message in err and "Traceback" not in err
        assert not (tmp_path / "out").exists()

    def test_a_selector_that_is_not_there_or_not_whole(self, place, tmp_path, capsys):
        assert select(place, tmp_path / "out", selector="rows.jsonl") == 1
        assert "holds no selector: selector.json, selector.safetensors, rows.parquet is not" in capsys.readouterr().err
        Selector.load(place / "selector").save(tmp_path / "broken")
        (tmp_path / "broken" / "rows.parquet").write_bytes(b"PAR1")
        assert select(place, tmp_path / "out", selector=tmp_path / "broken") == 1
        assert "cannot be read" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()

    def test_rows_that_hold_neither_text_nor_messages(self, place, tmp_path, capsys):
        write_rows(tmp_path / "numbers.jsonl", [{"prompt": 1, "completion": 2}])
        assert select(place, tmp_path / "out", data=tmp_path / "numbers.jsonl") == 1
        assert "`prompt` is a value of type int in row 0" in capsys.readouterr().err
        write_rows(tmp_path / "names.jsonl", [{"question": "x"}])
        assert select(place, tmp_path / "out", data=tmp_path / "names.jsonl") == 1
        assert "rows are known by `prompt` and `completion`" in capsys.readouterr().err


class TestWriting:
    def test_what_is_written_is_read_again_as_it_was(self, tmp_path):
        rows = Dataset.from_dict(
            {"prompt": ["a/b\n", "\u2028é"], "n": [1 / 3, float("nan")], "on": [datetime(2020, 1, 2), None]}
        )
        script.write_rows(tmp_path / "rows.jsonl", rows)
        assert (tmp_path / "rows.jsonl").read_text(encoding="utf-8").split("\n") == [
            '{"prompt": "a/b\\n", "n": 0.3333333333333333, "on": "2020-01-02 00:00:00"}',
            '{"prompt": "\u2028é", "n": null, "on": null}',
            "",
        ]

    def test_values_that_json_does_not_have_are_refused_and_no_file_is_left(self, tmp_path):
        with pytest.raises(ValueError, match="a value of type bytes, which JSON lines cannot hold"):
            script.write_rows(tmp_path / "rows.jsonl", Dataset.from_dict({"prompt": ["a"], "raw": [b"x"]}))
        assert list(tmp_path.iterdir()) == []
