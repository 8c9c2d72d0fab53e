"""`trl-robust report`."""

import json
import shutil
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "report"))

from generalized_panel import generalized_results

from trl_robust.cli import main
from trl_robust.scripts import report as script

PROMPTS = {
    "schema": 1,
    "suite": "prompts",
    "models": [
        {
            "name": "m", "attacks": [],
            "prompts": {"judge": None, "counts": {"n_scored": 2}, "agreement": {"agreement": 0.5, "majority": 0.7}},
        }
    ],
}  # fmt: skip
CHECK = {"value": 0.5, "verdict": "pass"}
SEMANTICS = {
    "schema": 1,
    "models": [
        {
            "name": "m", "attacks": [],
            "semantics": {
                "n_rows": 3, "sites": ["1"],
                "checks": {kind: {"agreement": CHECK} for kind in ("paraphrase", "random", "untargeted")},
            },
        }
    ],
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """Writes a folder with a JSON file."""

    def write(content, name="evaluation", file="results.json"):
        path = tmp_path / name
        path.mkdir(exist_ok=True)
        (path / file).write_text(json.dumps(content), encoding="utf-8")
        return path

    return write


def small(name="base"):
    results = generalized_results()
    keep = ("direct", "template", "pruning")
    model = results["models"][0]
    model["attacks"] = [attack for attack in model["attacks"] if attack["name"] in keep]
    model["map"] = None
    return {**results, "models": [{**model, "name": name}]}


def report(*words):
    return main(["report", *map(str, words)])


class TestWritten:
    def test_one_folder_in_place(self, folder, capsys):
        place = folder(small())
        row = {"model": "base", "attack": "template", "id": "1", "prompt": "A PROMPT", "response": "A RESPONSE"}
        (place / "generations.jsonl").write_text(json.dumps(row), encoding="utf-8")
        assert report(place) == 0
        assert f"Report: {place / 'report.html'}" in capsys.readouterr().out.replace("\n", "")
        assert "A PROMPT" not in (place / "report.html").read_text(encoding="utf-8")
        assert {path.name for path in place.iterdir()} == {
            "results.json", "generations.jsonl", "report.html", "report.md", "model_card.md", "figures",
        }  # fmt: skip
        before = (place / "report.html").read_bytes()
        assert report(place, "--show_generations", "false") == 0
        assert (place / "report.html").read_bytes() == before
        assert report("--show_generations", "true", place) == 0
        assert "A PROMPT" in (place / "report.html").read_text(encoding="utf-8")

    def test_several_folders_side_by_side(self, folder, tmp_path):
        first, second = folder(small(), "first"), folder(small(), "second")
        assert report(first, second, "--output_dir", tmp_path / "both") == 0
        text = (tmp_path / "both" / "report.md").read_text(encoding="utf-8")
        assert "base (first)" in text and "base (second)" in text
        assert not (first / "report.html").exists() and not (tmp_path / "both" / "results.json").exists()
        # Made again in the same place.
        assert report(first, second, "--output_dir", tmp_path / "both") == 0

    def test_the_suite_prompts(self, folder):
        place = folder(PROMPTS)
        (place / "generations.jsonl").write_text('{"id": "1", "question": "q"}\n{"id": "2', encoding="utf-8")
        assert report(place) == 0
        assert "Prompt robustness" in (place / "report.html").read_text(encoding="utf-8")

    def test_the_suite_semantics_is_printed(self, folder, capsys):
        place = folder(SEMANTICS)
        assert report(place, folder(SEMANTICS, "other")) == 0
        out = capsys.readouterr().out
        assert out.count("does the meaning stay?") == 2 and "0.5: pass" in out
        assert [path.name for path in place.iterdir()] == ["results.json"]

    def test_a_selection(self, folder):
        place = folder({"schema": 1, "rows": {"dataset": 10, "kept": 8}}, file="selection.json")
        (place / "run.json").write_text("{}", encoding="utf-8")  # that of the training: the rows are of more interest
        assert report(place) == 0
        assert "8 of 10 rows are kept" in (place / "report.md").read_text(encoding="utf-8")

    def test_training_runs_side_by_side(self, folder, tmp_path):
        runs = [folder({"verb": "lat-sft", "seed": seed}, f"seed-{seed}", "run.json") for seed in (3, 4)]
        assert report(*runs, "--output_dir", tmp_path / "both") == 0
        assert "| seed | 3 | 4 |" in (tmp_path / "both" / "report.md").read_text(encoding="utf-8")

    def test_a_diagnosis_of_distance_is_drawn_and_printed(self, folder, monkeypatch, capsys):
        place = folder(
            {"schema": 1, "sites": {}, "settings": {"seed": 5}, "main": {"distance": "l2"}}, file="distance.json"
        )
        rows = [{"index": "1", "status": "scored"}, {"index": "2", "status": "errored"}]
        (place / "cases.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        asked = []
        monkeypatch.setattr(
            "trl_robust.report.distance.draw_distance", lambda *words, seed: asked.append((words, seed))
        )
        monkeypatch.setattr("trl_robust.report.distance.encode", lambda figure, form: b"PNG")
        assert report(place) == 0
        assert (place / "distance.png").read_bytes() == b"PNG"
        [((_, cases, metric), seed)] = asked
        assert (cases, metric, seed) == (rows[:1], "l2", 5)


class TestRefused:
    def refusal(self, capsys, *words):
        assert report(*words) == 1
        err = capsys.readouterr().err
        assert "Traceback" not in err
        return " ".join(err.split())

    def test_folders_with_nothing_to_report(self, folder, tmp_path, capsys):
        (tmp_path / "empty").mkdir()
        sweep = folder({}, "sweep", "sweep.json")
        err = self.refusal(capsys, tmp_path / "empty", tmp_path / "nowhere", sweep)
        assert "has 3 faults" in err and f"There is no folder {tmp_path / 'nowhere'}" in err
        assert "holds nothing to report, no `results.json`" in err and "holds a sweep. `trl-robust sweep`" in err

    def test_folders_of_different_kinds(self, folder, tmp_path, capsys):
        err = self.refusal(capsys, folder(small(), "a"), folder(PROMPTS, "b"), "--output_dir", tmp_path / "c")
        assert "hold different things (attacks, prompts). Report each kind by itself." in err

    def test_several_folders_need_a_place(self, folder, capsys):
        assert "`output_dir` is missing" in self.refusal(capsys, folder(small(), "a"), folder(small(), "b"))

    def test_the_place_must_not_be_an_evaluation(self, folder, tmp_path, capsys):
        first, second = folder(small(), "a"), folder(small(), "b")
        assert "Name another one" in self.refusal(capsys, first, second, "--output_dir", second)
        (tmp_path / "file").write_text("", encoding="utf-8")
        assert "which is a file" in self.refusal(capsys, first, second, "--output_dir", tmp_path / "file")

    def test_what_cannot_stand_side_by_side(self, folder, tmp_path, capsys):
        first, second = folder(PROMPTS, "a"), folder(PROMPTS, "b")
        assert "cannot stand side by side" in self.refusal(capsys, first, second, "--output_dir", tmp_path / "c")
        assert "Leave `output_dir` out" in self.refusal(capsys, first, "--output_dir", tmp_path / "c")
        assert "Leave `output_dir` out" in self.refusal(capsys, folder(SEMANTICS, "s"), "--output_dir", tmp_path / "c")

    def test_the_same_folder_twice(self, folder, tmp_path, capsys):
        place = folder(small())
        assert "given twice" in self.refusal(capsys, place, place, "--output_dir", tmp_path / "both")

    @pytest.mark.parametrize(
        ("content", "message"), [({"models": 3}, "list `models`"), ({"schema": 9, "models": []}, "schema 9")]
    )
    def test_results_that_cannot_be_read(self, folder, content, message, capsys):
        assert message in self.refusal(capsys, folder(content))

    def test_half_a_file(self, folder, capsys):
        place = folder({})
        (place / "results.json").write_text('{"models": [', encoding="utf-8")
        assert "not valid JSON" in self.refusal(capsys, place)

    def test_a_fault_of_the_program_keeps_its_traceback(self, folder, monkeypatch):
        def fail(*words, **options):
            raise TypeError("a fault")

        monkeypatch.setattr(script, "write", fail)
        with pytest.raises(TypeError, match="a fault"):
            report(folder(small()))


def test_an_old_folder_is_reported(folder):
    place = folder({"models": [{"name": "m", "attacks": [{"name": "a", "success": 0.5}]}]})
    assert report(place) == 0
    assert "0.50" in (place / "report.md").read_text(encoding="utf-8")
    shutil.rmtree(place / "figures")
    assert report(place) == 0 and (place / "figures" / "attack_success.png").is_file()
