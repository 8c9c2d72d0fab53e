import ast
import sys
from pathlib import Path

import pytest

import trl_robust.report
from trl_robust.report.reading import parse_results, read_results, side_by_side


class TestParseResults:
    def test_unknown_keys_and_missing_parts_are_no_error(self, results):
        parsed = parse_results(results)
        assert parsed.attack_names == ["prefill", "latent"]
        assert parsed.models[2].attacks == {} and parsed.models[2].utility is None

    def test_a_newer_schema_is_refused_with_a_way_out(self, results):
        results["schema"] = 2
        with pytest.raises(ValueError, match=r"schema 2.*reads schemas 1 to 1.*upgrade"):
            parse_results(results)

    @pytest.mark.parametrize("schema", [0, "1", None, True])
    def test_a_schema_that_never_was_is_refused(self, results, schema):
        results["schema"] = schema
        with pytest.raises(ValueError, match="schema"):
            parse_results(results)

    def test_results_without_a_schema_are_read_as_the_first(self, results):
        del results["schema"]
        assert len(parse_results(results).models) == 3

    @pytest.mark.parametrize("content", [[], {}, {"models": {}}, "x", None])
    def test_something_else_than_results_is_refused(self, content):
        with pytest.raises(ValueError, match="list `models`"):
            parse_results(content)

    @pytest.mark.parametrize(
        ("key", "value", "message"),
        [
            ("success", "high", "success is 'high'"),
            ("success", 74, r"must lie in \[0, 1\]"),
            ("interval", [0.1], "interval"),
            ("n_errored", -1, "n_errored is -1"),
            ("name", "", "with a `name`"),
        ],
    )
    def test_a_wrong_value_is_named_with_its_model(self, results, key, value, message):
        results["models"][0]["attacks"][0][key] = value
        with pytest.raises(ValueError, match=message) as error:
            parse_results(results)
        assert "base" in str(error.value)

    def test_not_a_number_counts_as_no_score(self, results):
        results["models"][0]["attacks"][0]["success"] = float("nan")
        assert parse_results(results).models[0].attacks["prefill"].success is None

    def test_one_attack_at_two_budgets_makes_two_columns(self, results):
        attacks = results["models"][0]["attacks"]
        attacks.append({**attacks[1], "budget": {"steps": 64}})
        assert list(parse_results(results).models[0].attacks) == [
            "prefill",
            "latent (steps=16, radius=1.5)",
            "latent (steps=64)",
        ]

    def test_one_attack_twice_is_refused_and_not_overwritten(self, results):
        results["models"][0]["attacks"] *= 2
        with pytest.raises(ValueError, match="twice"):
            parse_results(results)


class TestWarnings:
    @pytest.mark.parametrize(
        ("over_refusal", "utility", "expected"),
        [
            (0.5, 0.9, []),
            (0.51, 0.9, ["refuses 0.51 of harmless prompts"]),
            (0.5, 0.89, ["utility only 0.89"]),
            (None, None, []),
        ],
    )
    def test_marks_models_whose_low_success_means_little(self, results, over_refusal, utility, expected):
        results["models"][0] |= {"over_refusal": {"value": over_refusal}, "utility": {"value": utility}}
        assert parse_results(results).models[0].warnings == expected


class TestReadResults:
    def test_a_folder_without_results_says_which_folder_to_give(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="trl-robust evaluate"):
            read_results(tmp_path)

    def test_half_a_file_is_no_traceback_of_json(self, tmp_path):
        (tmp_path / "results.json").write_text('{"models": [')
        with pytest.raises(ValueError, match="not valid JSON"):
            read_results(tmp_path)


class TestSideBySide:
    def test_only_names_that_clash_get_their_folder(self, results):
        other = {**results, "models": [{"name": "base"}, {"name": "lat"}], "versions": {"trl": "1.16.0", "peft": "1"}}
        merged = side_by_side({"a": parse_results(results), "b": parse_results(other)})
        assert [model.name for model in merged.models] == ["base (a)", "refuser", "untested", "base (b)", "lat"]
        assert merged.versions == {"trl_robust": "0.1.0", "trl": "1.16.0", "peft": "1"}

    def test_versions_that_differ_are_both_named(self, results):
        other = {**results, "versions": {"trl": "1.17.0"}}
        merged = side_by_side({"a": parse_results(results), "b": parse_results(other)})
        assert merged.versions["trl"] == "1.16.0 (a), 1.17.0 (b)"


def test_the_report_imports_nothing_else_of_the_package():
    files = sorted(Path(trl_robust.report.__file__).parent.glob("*.py"))
    assert len(files) > 10
    allowed = set(sys.stdlib_module_names) | {"matplotlib", "numpy", "rich"}
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert all(name.name.split(".")[0] in allowed for name in node.names), file
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                assert node.module.split(".")[0] in allowed, file
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 1, file
