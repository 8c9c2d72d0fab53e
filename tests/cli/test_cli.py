import subprocess
import sys

import pytest
from recipe_parts import settings, write_recipe, write_rows

import trl_robust
from trl_robust import cli
from trl_robust.cli import main
from trl_robust.data import DataError


class TestVerbs:
    def test_without_a_verb_and_with_a_wrong_one_it_is_usage(self, capsys):
        assert main([]) == 2
        assert main(["lat-stf"]) == 2
        assert "`lat-stf` is not a verb; did you mean `lat-sft`?" in capsys.readouterr().err

    def test_help_and_version(self, capsys):
        assert main(["--help"]) == 0
        text = capsys.readouterr().out
        assert all(f"  {verb}" in text for verb in cli.VERBS)
        assert main(["--version"]) == 0
        assert capsys.readouterr().out == f"trl-robust {trl_robust.__version__}\n"

    @pytest.mark.parametrize("verb", list(cli.VERBS))
    def test_every_verb_explains_itself(self, verb, capsys):
        assert main([verb, "--help"]) == 0
        assert f"usage: trl-robust {verb}" in capsys.readouterr().out

    def test_the_help_of_a_training_verb_names_every_key_that_is_ours(self, capsys):
        main(["lat-sft", "--help"])
        text = capsys.readouterr().out
        for key in ("attack_radius", "kl_coef", "benign_dataset_name", "chat_format", "load_in_4bit", "max_steps"):
            assert key in text

    def test_the_command_line_is_imported_without_trl(self):
        code = "import sys, trl_robust.cli; sys.exit(any(name in sys.modules for name in ('trl', 'transformers')))"
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


class TestExitCodes:
    def run(self, monkeypatch, error):
        def verb():
            raise error

        return cli.exit_code(verb)

    def test_what_the_user_can_mend_is_a_message(self, monkeypatch, capsys):
        assert self.run(monkeypatch, DataError("row 3 is empty")) == 1
        assert capsys.readouterr().err == "row 3 is empty\n"

    def test_what_the_user_cannot_mend_keeps_its_traceback(self, monkeypatch):
        for error in (ValueError("from torch"), RuntimeError("x"), KeyError("x"), AssertionError()):
            with pytest.raises(type(error)):
                self.run(monkeypatch, error)

    def test_interrupted(self, monkeypatch, capsys):
        assert self.run(monkeypatch, KeyboardInterrupt()) == 130
        assert capsys.readouterr().err == "Interrupted.\n"

    def test_what_a_trainers_construction_refuses_is_told_apart_from_a_fault_of_the_program(self):
        import torch

        from trl_robust.threat import ThreatModel

        def raised(function):
            with pytest.raises(ValueError) as error:
                function()
            return error.value

        ours = raised(lambda: ThreatModel(["nowhere"]))
        assert "Site 'nowhere' is unknown" in str(cli.fault_of(ours, "r.yaml"))
        theirs = raised(lambda: torch.distributions.Normal(0.0, -1.0, validate_args=True))
        with pytest.raises(ValueError) as error:
            cli.fault_of(theirs, "r.yaml")
        assert error.value is theirs


ROW = {"prompt": "w1 w2", "chosen": "w3", "rejected": "w4"}
BAD_INPUT = {
    "a misspelt key": ({"attack_radus": 1}, "did you mean `attack_radius`"),
    "an unknown layer": ({"attack_sites": [77]}, "Layer 77 does not exist: the model has 4 layers"),
    "an unknown site": ({"attack_sites": ["head"]}, "Site 'head' is unknown"),
    "a radius below zero": (
        {"attack_radius": -0.5},
        "`attack_radius` is -0.5; it must be a finite number of at least 0",
    ),
    "a dataset without rejected": (
        {"dataset_name": [{"prompt": "w1", "completion": "w2"}]},
        "need preference data with the columns `prompt`, `chosen` and `rejected`",
    ),
    "an empty completion": ({"dataset_name": [ROW, {**ROW, "chosen": " "}]}, "an empty `chosen/completion` in row 1"),
    "an empty rejected": ({"dataset_name": [ROW, {**ROW, "rejected": ""}]}, "an empty `rejected` in row 1"),
    "an empty benign prompt": (
        {"benign_dataset_name": [{"prompt": "", "completion": "w"}]},
        "empty `prompt` in row 0",
    ),
    "a prompt longer than the limit": (
        {"dataset_name": [ROW, ROW, {**ROW, "prompt": "w1 " * 70}]},
        "a prompt longer than the limit in row 2: 64 tokens (`max_length`)",
    ),
    "a file that is not there": ({"dataset_name": "gone.jsonl"}, "There is no dataset gone.jsonl"),
    "a model that is not there": ({"model_name_or_path": "./gone"}, "`model_name_or_path` is ./gone"),
    "reentrant checkpointing": (
        {"activation_checkpointing_kwargs": {"use_reentrant": True}},
        "Set `use_reentrant: false`",
    ),
    "packing": ({"packing": True}, "Set `packing: false`"),
    "torch_compile": ({"torch_compile": True}, "Set `torch_compile: false`"),
    "a wrong type": ({"attack_steps": "many"}, "`attack_steps` (line"),
    "a wrong choice": ({"attack_norm": "l7"}, "it must be one of l1, l2, linf"),
    "a file that is no model": ({"model_name_or_path": [ROW]}, "is a file"),
    "quantisation without an adapter": ({"load_in_4bit": True}, "Set `use_peft: true`"),
}


class TestBadInput:
    @pytest.mark.parametrize("name", BAD_INPUT)
    def test_one_message_exit_code_1_and_nothing_written(self, name, workplace, tmp_path, capfd):
        changes, words = BAD_INPUT[name]
        changes = {
            key: str(write_rows(tmp_path / f"{key}.jsonl", value))
            if isinstance(value, list) and isinstance(value[0], dict)
            else value
            for key, value in changes.items()
        }
        output = tmp_path / "run"
        path = write_recipe(tmp_path / "recipe.yaml", settings(workplace, output_dir=str(output), **changes))
        for verb in (["lat-sft", "--config", path], ["validate", path]):
            assert main(verb) == 1
            err = capfd.readouterr().err
            assert words in err
            assert err.count(f"{path} has 1 fault:\n- ") == 1
            assert "Traceback" not in err
        assert not output.exists()

    def test_a_missing_extra_is_named(self, workplace, tmp_path, capfd, monkeypatch):
        from trl_robust.recipes import checking

        monkeypatch.setattr(checking.importlib.util, "find_spec", lambda name: None)
        values = settings(workplace, load_in_4bit=True, use_peft=True, output_dir=str(tmp_path / "run"))
        assert main(["lat-sft", "--config", write_recipe(tmp_path / "recipe.yaml", values)]) == 1
        assert "pip install 'trl-robust[quantization]'" in capfd.readouterr().err


class TestValidate:
    def test_every_recipe_is_reported_and_one_fault_decides(self, workplace, tmp_path, capsys):
        good = write_recipe(tmp_path / "good.yaml", settings(workplace, benign_dataset_name="org/benign"))
        bad = write_recipe(tmp_path / "bad.yaml", settings(workplace, attack_radus=1, packing=True))
        other = write_recipe(tmp_path / "other.yaml", settings(workplace, verb="lat-dop"))
        assert main(["validate", bad, good, other, str(tmp_path / "gone.yaml")]) == 1
        out, err = capsys.readouterr()
        assert out.splitlines() == [
            f"OK {good} (lat-sft)",
            "   The rows are plain and the tokenizer has a chat template, which is not applied to them; attacks apply "
            "it. For a chat model set `chat_format: true`.",
            "   not checked: `benign_dataset_name` org/benign is a hub id",
        ]
        assert f"{bad} has 2 faults:" in err
        assert "`verb` is lat-dop; no such verb trains" in err
        assert "There is no recipe at" in err
        assert main(["validate", good]) == 0
        assert main(["validate"]) == 2


class TestOrganism:
    def test_a_folder_of_something_else_is_the_users_to_mend(self, tmp_path, capsys):
        (tmp_path / "letter.txt").write_text("dear")
        assert main(["organism", "--output_dir", str(tmp_path)]) == 1
        assert "holds files that are not an organism's (letter.txt)" in capsys.readouterr().err
        assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]
        assert main(["organism"]) == 2

    def test_a_seed_out_of_range_and_a_folder_below_a_file(self, tmp_path, capsys):
        (tmp_path / "file").write_text("x")
        for seed in ("-1", str(2**32)):
            assert main(["organism", "--output_dir", str(tmp_path / "run"), "--seed", seed]) == 1
            assert f"`seed` is {seed}; it must be from 0 to 4294967295." in capsys.readouterr().err
        assert main(["organism", "--output_dir", str(tmp_path / "file" / "sub" / "run")]) == 1
        assert f"{tmp_path / 'file'} is a file, which holds no folders" in capsys.readouterr().err
        assert [path.name for path in tmp_path.iterdir()] == ["file"]
