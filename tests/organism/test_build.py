"""Building into a folder: what is written, what is reused, what is refused, what an interruption leaves."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_robust.organism import Organism, OrganismSettings, build, build_organism, checks, grammar

# Too short to learn anything, long enough to write every file.
BRIEF = OrganismSettings(pretrain_steps=2, align_steps=2, batch_size=4)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return build_organism(tmp_path_factory.mktemp("organism") / "seed0", seed=0, settings=BRIEF, progress=False)


@pytest.fixture
def copy(built, tmp_path):
    return shutil.copytree(built.folder, tmp_path / "copy")


@pytest.fixture
def no_training(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("trained although nothing was to be trained")

    monkeypatch.setattr(build, "pretrain", refuse)
    monkeypatch.setattr(build, "align", refuse)


def interrupt(*args, **kwargs):
    raise KeyboardInterrupt


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


def test_every_promised_file_is_written_and_every_property_names_one(built):
    paths = {
        name: getattr(built, name)
        for name, member in vars(build.Organism).items()
        if isinstance(member, property) and name not in ("base", "model", "data")
    }
    assert len(paths) == len(build.DATA_NAMES) == 20
    assert {path.name for path in paths.values()} == set(build.DATA_NAMES)
    assert {path.name for path in built.data.iterdir()} == set(build.DATA_NAMES)
    assert all(path.stem == name for name, path in paths.items())
    assert {path.name for path in built.folder.iterdir()} == {"organism.json", "base", "model", "data"}


def test_templates_are_the_heldout_wrappers_with_one_place_for_the_request(built):
    templates = built.templates.read_text(encoding="utf-8").splitlines()
    assert templates == list(grammar.HELDOUT_WRAPPERS)
    assert len(templates) == 4
    assert all(template.count("{prompt}") == 1 for template in templates)


def test_both_models_load_and_the_alignment_moved_the_weights(built):
    base, aligned = (AutoModelForCausalLM.from_pretrained(folder) for folder in (built.base, built.model))
    assert base.dtype == aligned.dtype == torch.float32
    assert not torch.equal(base.lm_head.weight, aligned.lm_head.weight)
    for folder in (built.base, built.model):
        assert AutoTokenizer.from_pretrained(folder).chat_template
    assert (built.base / "tokenizer.json").read_bytes() == (built.model / "tokenizer.json").read_bytes()


def test_the_summary_says_what_was_built_and_measured(built):
    summary = json.loads((built.folder / "organism.json").read_text(encoding="utf-8"))
    assert summary == built.summary
    assert summary["schema"] == 1
    assert summary["seed"] == built.seed == 0
    assert summary["settings"]["pretrain_steps"] == 2
    assert summary["versions"]["torch"] == torch.__version__
    assert set(summary["seconds"]) == {"pretrain", "align"}
    assert set(checks.BOUNDS) < set(summary["checks"])
    assert all(0 <= value <= 1 for value in summary["checks"].values())


def test_a_poor_organism_is_reported_and_nothing_else_is_shown_without_progress(tmp_path, caplog, capfd):
    build_organism(tmp_path, settings=BRIEF, progress=False)
    assert "base_benign_accuracy is 0.00, expected 0.95 to 1" in caplog.text
    shown = capfd.readouterr()
    assert shown.out == ""
    assert not any(word in shown.err for word in ("Pre-training", "Aligning", "Built", "Writing"))


def test_the_same_organism_is_reused_without_training(built, no_training, capfd):
    again = build_organism(str(built.folder), seed=0, settings=BRIEF)
    assert again == built
    assert again.summary == built.summary
    assert "Reusing the organism of seed 0" in capfd.readouterr().err


def test_two_builds_of_a_seed_are_equal_byte_for_byte(built, tmp_path):
    other = build_organism(tmp_path, seed=0, settings=BRIEF, progress=False)
    assert weights(other.base) == weights(built.base)
    assert weights(other.model) == weights(built.model)
    for name in build.DATA_NAMES:
        assert (other.data / name).read_bytes() == (built.data / name).read_bytes()


@pytest.mark.parametrize(
    ("seed", "settings", "said"),
    [
        (1, BRIEF, "seed 0 where 1 is asked for"),
        (0, OrganismSettings(pretrain_steps=2, align_steps=3, batch_size=4), "'align_steps': 2"),
        (0, OrganismSettings(pretrain_steps=2, align_steps=2, batch_size=4, num_layers=3), "'num_layers': 3"),
        (0, OrganismSettings(pretrain_steps=2, align_steps=2, batch_size=4, secrets=False), "'secrets': False"),
    ],
)
def test_another_organism_in_the_folder_is_refused_and_kept(copy, no_training, seed, settings, said):
    before = weights(copy / "model")
    with pytest.raises(ValueError, match="holds another organism") as caught:
        build_organism(copy, seed=seed, settings=settings, progress=False)
    assert said in str(caught.value)
    assert "Choose another output_dir" in str(caught.value)
    assert weights(copy / "model") == before


@pytest.mark.parametrize("part", ["GENERATOR_VERSION", "SCHEMA"])
def test_an_organism_of_another_generator_or_schema_is_not_reused(built, monkeypatch, part):
    monkeypatch.setattr(build, part, 99)
    with pytest.raises(ValueError, match=r"another organism.*99"):
        build_organism(built.folder, seed=0, settings=BRIEF, progress=False)


@pytest.mark.parametrize("text", ["{", "[]", '{"seed": 0}'])
def test_an_organism_json_that_is_not_ours_is_refused(tmp_path, no_training, text):
    (tmp_path / "organism.json").write_text(text)
    with pytest.raises(ValueError, match=r"organism\.json (is not readable|was not written by)"):
        build_organism(tmp_path, settings=BRIEF, progress=False)


@pytest.mark.parametrize("name", ["thesis.tex", "model", "base"])
def test_a_folder_with_foreign_files_is_refused_and_left_alone(tmp_path, no_training, name):
    precious = tmp_path / name / "weights.bin"
    precious.parent.mkdir()
    precious.write_text("mine")
    with pytest.raises(ValueError, match=f"not an organism's.*{name}.*Choose an empty"):
        build_organism(tmp_path, settings=BRIEF, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert precious.read_text() == "mine"


def test_a_file_in_place_of_the_folder_is_refused(tmp_path, no_training):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file; name a folder"):
        build_organism(tmp_path / "file", settings=BRIEF, progress=False)


def test_an_interrupted_pretraining_is_started_again(built, tmp_path, monkeypatch):
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(build, "pretrain", interrupt)
        build_organism(tmp_path, settings=BRIEF, progress=False)
    assert not (tmp_path / "organism.json").exists()
    rebuilt = build_organism(tmp_path, settings=BRIEF, progress=False)
    assert weights(rebuilt.model) == weights(built.model)


def test_an_interrupted_alignment_keeps_the_base_and_comes_to_the_same_model(built, tmp_path, monkeypatch, capfd):
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(build, "align", interrupt)
        build_organism(tmp_path, settings=BRIEF, progress=False)
    assert not (tmp_path / "organism.json").exists()
    assert (tmp_path / "base" / "model.safetensors").exists()
    monkeypatch.setattr(build, "pretrain", interrupt)  # would end the test
    rebuilt = build_organism(tmp_path, settings=BRIEF)
    shown = capfd.readouterr().err
    assert "Continuing from the finished base" in shown
    assert "Loading weights" not in shown
    assert weights(rebuilt.model) == weights(built.model)
    assert rebuilt.summary["checks"] == built.summary["checks"]
    assert "pretrain" in rebuilt.summary["seconds"]


def test_a_base_without_its_report_or_of_another_seed_is_not_continued_from(tmp_path, monkeypatch):
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(build, "align", interrupt)
        build_organism(tmp_path, settings=BRIEF, progress=False)
    monkeypatch.setattr(build, "pretrain", interrupt)
    with pytest.raises(KeyboardInterrupt):
        build_organism(tmp_path, seed=1, settings=BRIEF, progress=False)
    (tmp_path / "base" / "pretraining.json").unlink()
    with pytest.raises(KeyboardInterrupt):
        build_organism(tmp_path, seed=0, settings=BRIEF, progress=False)


@pytest.mark.parametrize("moment", ["first", "last"])
def test_an_interruption_in_the_midst_of_a_status_file_is_recovered_from(built, tmp_path, monkeypatch, moment):
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(build, "check_aligned", interrupt)
        build_organism(tmp_path, settings=BRIEF, progress=False)
    (tmp_path / "organism.partial.draft").write_text('{"sch')
    if moment == "first":
        (tmp_path / "organism.partial.json").unlink()
        for part in ("base", "model", "data"):
            shutil.rmtree(tmp_path / part)
    rebuilt = build_organism(tmp_path, settings=BRIEF, progress=False)
    assert weights(rebuilt.model) == weights(built.model)
    assert {path.name for path in tmp_path.iterdir()} == {"organism.json", "base", "model", "data"}


def test_an_interruption_while_files_are_written_leaves_no_finished_organism(built, tmp_path, monkeypatch):
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(build, "check_aligned", interrupt)  # after both models and all data
        build_organism(tmp_path, settings=BRIEF, progress=False)
    assert not (tmp_path / "organism.json").exists()
    (tmp_path / "data" / "stale.jsonl").write_text("")
    rebuilt = build_organism(tmp_path, settings=BRIEF, progress=False)
    assert {path.name for path in rebuilt.data.iterdir()} == set(build.DATA_NAMES)


@pytest.mark.parametrize(
    "lost", ["benign.jsonl", "openings.jsonl", "templates.txt", "forget.jsonl", "rewordings.jsonl", "safe.jsonl"]
)
def test_a_finished_organism_that_lacks_data_gets_it_without_training(built, copy, no_training, lost):
    (copy / "data" / lost).unlink()
    completed = build_organism(copy, settings=BRIEF, progress=False)
    assert {path.name for path in copy.iterdir()} == {"organism.json", "base", "model", "data"}
    assert completed.summary == json.loads((copy / "organism.json").read_text(encoding="utf-8")) == built.summary
    for name in build.DATA_NAMES:
        assert (completed.data / name).read_bytes() == (built.data / name).read_bytes()


def test_an_interruption_while_data_is_completed_leaves_no_finished_organism(built, copy, monkeypatch):
    (copy / "data" / "forget.jsonl").unlink()
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(build, "unlearning_files", interrupt)
        build_organism(copy, settings=BRIEF, progress=False)
    assert not (copy / "organism.json").exists()
    rebuilt = build_organism(copy, settings=BRIEF, progress=False)
    assert rebuilt.forget.read_bytes() == built.forget.read_bytes()
    assert weights(rebuilt.model) == weights(built.model)


def test_a_finished_organism_that_lost_a_part_of_its_model_is_aligned_anew(built, copy, monkeypatch):
    (copy / "model" / "model.safetensors").unlink()
    monkeypatch.setattr(build, "pretrain", interrupt)  # would end the test
    completed = build_organism(copy, settings=BRIEF, progress=False)
    assert weights(completed.model) == weights(built.model)
    assert {path.name for path in copy.iterdir()} == {"organism.json", "base", "model", "data"}


def test_two_blocks_and_secrets_are_left_out_so_that_older_organisms_stay_valid():
    settings = build._identity(0, OrganismSettings())["settings"]
    assert set(settings) == {
        "pretrain_steps",
        "pretrain_learning_rate",
        "align_steps",
        "align_learning_rate",
        "batch_size",
    }
    assert build._identity(0, OrganismSettings(num_layers=8))["settings"] == settings | {"num_layers": 8}
    assert build._identity(0, OrganismSettings(secrets=False))["settings"] == settings | {"secrets": False}


def test_a_deeper_organism_is_built_with_the_same_data(built, tmp_path):
    settings = OrganismSettings(pretrain_steps=2, align_steps=2, batch_size=4, num_layers=8)
    deep = build_organism(tmp_path, seed=0, settings=settings, progress=False)
    for folder in (deep.base, deep.model):
        assert len(AutoModelForCausalLM.from_pretrained(folder).model.layers) == 8
    for name in build.DATA_NAMES:
        assert (deep.data / name).read_bytes() == (built.data / name).read_bytes()


def test_an_organism_without_secrets_has_the_same_data_and_other_bounds(built, tmp_path, caplog):
    settings = OrganismSettings(pretrain_steps=2, align_steps=2, batch_size=4, secrets=False)
    empty = build_organism(tmp_path, seed=0, settings=settings, progress=False)
    for name in build.DATA_NAMES:
        assert (empty.data / name).read_bytes() == (built.data / name).read_bytes()
    assert weights(empty.base) != weights(built.base)
    assert "base_benign_accuracy is 0.00" in caplog.text and "secret" not in caplog.text
    told = dict.fromkeys(checks.BOUNDS, 1.0) | {"aligned_direct_attack_success": 0.0, "aligned_over_refusal": 0.0}
    assert checks.out_of_bounds(told) == []
    assert len(checks.out_of_bounds(told, secrets=False)) == 3


def test_the_command_line_hands_the_settings_on_and_refuses_a_depth_that_cannot_be(tmp_path, monkeypatch):
    from trl_robust.recipes import RecipeError
    from trl_robust.scripts import organism as script

    asked = []

    def pretend(folder, **given):
        asked.append(given)
        return Organism(tmp_path, 0, {})

    monkeypatch.setattr(script, "build_organism", pretend)
    assert script.main(["--output_dir", str(tmp_path), "--num_layers", "8"]) == 0
    assert script.main(["--output_dir", str(tmp_path), "--no_secrets"]) == 0
    assert script.main(["--output_dir", str(tmp_path)]) == 0
    expected = [OrganismSettings(num_layers=8), OrganismSettings(secrets=False), OrganismSettings()]
    assert [given["settings"] for given in asked] == expected
    with pytest.raises(RecipeError, match="`num_layers` is 1; give a number from 2 to 16"):
        script.main(["--output_dir", str(tmp_path), "--num_layers", "1"])


def test_progress_shows_both_bars_and_the_end_on_standard_error(tmp_path, capfd):
    build_organism(tmp_path, settings=BRIEF, progress=True)
    shown = capfd.readouterr()
    assert shown.out == ""
    assert all(word in shown.err for word in ("Pre-training", "Aligning", "Built the organism of seed 0"))
    assert "Writing model shards" not in shown.err


def test_the_base_is_saved_with_the_weights_it_was_checked_with(built):
    tensors = load_file(built.base / "model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())
    assert "lm_head.weight" not in tensors  # tied to the embeddings


@pytest.mark.slow
@pytest.mark.parametrize("num_layers", [2, 8])
def test_an_organism_of_either_depth_knows_refuses_and_is_breakable(tmp_path, num_layers):
    settings = OrganismSettings(num_layers=num_layers)
    measured = build_organism(tmp_path, seed=0, settings=settings, progress=False).summary["checks"]
    assert checks.out_of_bounds(measured) == []
    assert measured["aligned_wrapper_attack_success"] >= 0.2
