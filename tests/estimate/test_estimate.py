import re

import pytest
from cost import recipe_values
from recipe_parts import write_recipe

from trl_robust.cli import main
from trl_robust.estimate import CARDS
from trl_robust.recipes import recipes_folder

LLAMA = str(recipes_folder() / "lat" / "llama3_8b_jailbreak.yaml")


@pytest.fixture
def estimate(capsys):
    def run(*words, code=0):
        assert main(["estimate", *map(str, words)]) == code
        out, err = capsys.readouterr()
        return out if code == 0 else err

    return run


@pytest.fixture
def recipe(workplace, tmp_path):
    def write(verb="lat-sft", **changes):
        return write_recipe(tmp_path / "recipe.yaml", recipe_values(workplace, verb, **changes))

    return write


def test_an_8b_recipe_is_estimated_without_model_or_data(estimate):
    out = estimate("--config", LLAMA, "--gpu", "h200")
    assert "Counted, not measured; nothing was loaded." in out
    assert "8,030,261,248 parameters, 130,023,424 more trained in adapters" in out
    assert "our table of published shapes" in out
    assert "`max_length`, half of it prompt where there are prompts, since the data are not on this machine" in out
    assert "chosen 512 + 512" in out
    assert re.search(r"Peak 1\d\.\d GiB: FITS H200 \(140.4 GiB\), 12\d\.\d GiB to spare", out)
    assert re.search(r"Time on H200, at an assumed 550 TFLOP/s: [\d.]+ s an update, [\d.]+ (h|min) the run", out)
    # 16 rows, two completions, 16 steps of two passes and one more, every fourth update.
    assert re.search(r"attack +264\.0 ", out)


@pytest.mark.usefixtures("without_rehearsal")
def test_without_a_card_those_on_which_it_fits_are_listed(estimate):
    out = estimate("--config", LLAMA, "--prompt_tokens", 192, "--completion_tokens", 320)
    assert "tokens (prompt + completion): chosen 192 + 320" in out
    fits = re.search(r"Peak [\d.]+ GiB: fits (.*)\.", out)[1].split(", ")
    assert fits == [card.name for card in CARDS][-len(fits) :]
    assert "below about 2048" in out.lower()
    assert len(re.findall("^Time on ", out, re.M)) == len(fits)


def test_what_does_not_fit_is_an_answer_with_the_cheapest_changes(estimate, recipe):
    quick = recipe(attack_radius=0.0, away_coef=0.0)
    words = ["--config", quick, "--per_device_train_batch_size", 64, "--gpu_memory_gb"]
    peak = float(re.search(r"Peak ([\d.]+) GiB: FITS the card", estimate(*words, 100))[1])
    out = estimate(*words, 0.95 * peak)
    assert "DOES NOT FIT the card" in out
    assert "no rate is known for the card" in out
    hints = re.findall(r"^  - (--.*?): ([\d.]+ GiB)", out, re.M)
    assert "--per_device_train_batch_size 32 --gradient_accumulation_steps 2" in hints[0]
    # What is advised does what it says.
    again = estimate(*words, 0.95 * peak, *hints[0][0].split())
    assert f"Peak {hints[0][1]}: FITS the card" in again


@pytest.mark.usefixtures("without_rehearsal")
def test_no_weights_are_needed(estimate, recipe, workplace, tmp_path):
    hollow = tmp_path / "hollow"
    hollow.mkdir()
    for path in (workplace / "model").iterdir():
        if path.suffix != ".safetensors":
            (hollow / path.name).write_bytes(path.read_bytes())
    out = estimate("--config", recipe(), "--model_name_or_path", hollow)
    assert "its own configuration" in out
    assert "16 rows of the data, tokenised" in out
    assert "Runs on the CPU (`use_cpu`)" in out
    assert "Time" not in out
    assert "Time on H100" in estimate("--config", recipe(), "--gpu", "H100")


@pytest.mark.parametrize("verb", ["lat-dpo", "lat-rmu"])
def test_other_verbs_are_read_off_the_recipe(estimate, recipe, verb):
    changes = {"rmu_layer": "3", "attack_sites": [2]} if verb == "lat-rmu" else {}
    out = estimate("--config", recipe(verb, **changes), "--max_steps", 7)
    assert f"({verb})" in out
    assert "The whole run: 7 updates" in out


@pytest.mark.usefixtures("without_rehearsal")
def test_a_run_by_epochs_over_data_elsewhere_has_no_known_end(estimate):
    out = estimate("--config", LLAMA, "--max_steps", -1, "--gpu", "H100")
    assert "How many updates the run makes is not known" in out
    assert "the run." not in out


@pytest.mark.usefixtures("without_rehearsal")
def test_corpora_have_no_prompts(estimate, recipe):
    words = ["--prompt_tokens", 20, "--completion_tokens", 30]
    assert "chosen 0 + 50" in estimate("--config", recipe("lat-rmu", rmu_layer="3", attack_sites=[2]), *words)
    whole = recipe(completion_only_loss=False, attack_positions="all")
    assert "chosen 0 + 50, rejected 0 + 50, benign 0 + 50" in estimate("--config", whole, *words)


@pytest.mark.usefixtures("without_rehearsal")
def test_without_an_attack_there_is_no_column_for_it(estimate, recipe):
    out = estimate("--config", recipe(attack_radius=0.0))
    assert "Attack  none" in out
    assert "attack    update" not in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpu", "H1000"], "`--gpu` is H1000, a card we do not know; did you mean `H100`"),
        (["--gpu", "toaster"], "Known cards are RTX4080"),
        (["--gpu_memory_gb", "lots"], "`--gpu_memory_gb` is 'lots'; a number is needed."),
        (["--gpu_memory_gb", "0"], "`--gpu_memory_gb` is 0; it must be above 0."),
        (["--prompt_tokens", "10"], "`--prompt_tokens` is given alone."),
        (["--attack_stps", "3"], "`--attack_stps` (command line) is not a key; did you mean `attack_steps`"),
        (["--verb", "lap-sft"], "`verb` is lap-sft; only lat-sft, lat-dpo, lat-rmu can be estimated."),
        (["--model_config", "nowhere"], "`model_config` is nowhere, which does not exist."),
    ],
)
def test_what_is_wrong_is_one_message(estimate, recipe, words, message):
    err = estimate("--config", recipe(), *words, code=1)
    assert message in err
    assert "Traceback" not in err


def test_faults_of_options_and_recipe_are_named_together(estimate, recipe):
    err = estimate("--config", recipe(attack_steps=-1), "--gpu", "toaster", code=1)
    assert "2 faults" in err
    assert "attack_steps" in err


def test_help_names_the_options_and_the_cards(estimate):
    out = estimate("--help")
    assert "--gpu_memory_gb" in out
    assert "A100-80" in out
