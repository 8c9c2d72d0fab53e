"""The recipes for LAP that come with the package: read strictly, and run for two steps at tiny size."""

import json

import pytest
import yaml
from jinja2 import Environment
from recipe_parts import layers_for, make_adapter, make_workplace, write_recipe, write_rows
from tiny import SPECIAL, WORDS
from transformers import AutoTokenizer
from trl.scripts import dpo as stock_dpo

from trl_robust.cli import main
from trl_robust.recipes import load_recipe, recipes_folder, verb_of
from trl_robust.recipes.rows import load_share

FOLDER = recipes_folder() / "lap"
RECIPES = sorted(FOLDER.glob("*.yaml"))
NAMES = [
    "dpo_after_lap", "lap_dpo_joint", "llama2_13b", "llama3_8b", "llama3_8b_paper", "mistral_7b", "organism",
    "your_data_cpu",
]  # fmt: skip
TEMPLATE = FOLDER / "simple_chat.jinja"


def ultrafeedback(count: int = 12) -> list[dict]:
    """Rows of HuggingFaceH4/ultrafeedback_binarized's form: a plain prompt, and conversations that hold it too."""
    rows = []
    for number in range(count):
        asked = {"role": "user", "content": f"w{number} w{number + 1} w{number + 2}"}
        chosen = [asked, {"role": "assistant", "content": f"w{number + 3} w{number}"}]
        rejected = [asked, {"role": "assistant", "content": f"w{number + 5}"}]
        if number == 3:
            rejected = chosen  # as there are some
        rows.append(
            {"prompt": asked["content"], "prompt_id": f"id{number}", "chosen": chosen, "rejected": rejected}
            | {"messages": chosen, "score_chosen": 8.0, "score_rejected": 4.0}
        )
    return rows


@pytest.fixture(scope="module")
def workplace_of(tmp_path_factory):
    """
    A workplace for a recipe, with a model as deep as it needs, without a chat template, as base models are, and an
    adapter of a first stage, which has one.
    """
    made = {}

    def of(recipe: str):
        layers = layers_for(keys(recipe))
        if layers not in made:
            made[layers] = place = make_workplace(
                tmp_path_factory.mktemp("lap"), num_hidden_layers=layers, hidden_size=32, intermediate_size=64
            )
            make_adapter(place / "adapter", place)
            for name, template in (("model", None), ("adapter", TEMPLATE.read_text(encoding="utf-8"))):
                tokenizer = AutoTokenizer.from_pretrained(place / name)
                tokenizer.chat_template = template
                (place / name / "chat_template.jinja").unlink(missing_ok=True)
                tokenizer.save_pretrained(place / name)
            write_rows(place / "ultrafeedback.jsonl", ultrafeedback())
        return made[layers]

    return of


def keys(name: str) -> dict:
    return yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))


def read(name: str):
    path = FOLDER / f"{name}.yaml"
    return load_recipe(verb_of(path), ["--config", str(path)], check=False, this_machine=False)


def smaller(name: str, workplace_of, output) -> dict:
    """A shipped recipe at tiny size: its own keys, but for the model, the rows and the length."""
    place = workplace_of(name)
    values = keys(name) | {
        "model_name_or_path": str(place / ("adapter" if "dpo" in name else "model")),
        "output_dir": str(output),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "lap_steps": 2,
        "max_length": 64,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    if "datasets" in values:
        (entry,) = values["datasets"]
        values["datasets"] = [entry | {"path": str(place / "ultrafeedback.jsonl"), "split": "train"}]
    else:
        values["dataset_name"] = str(place / "benign.jsonl")
        values["chat_format"] = False  # the model has no template
    if "chat_template_path" in values:
        assert values["chat_template_path"] == f"recipes/lap/{TEMPLATE.name}"
        values["chat_template_path"] = str(TEMPLATE)
    if values.get("lap_branch") == "mix":
        values["lap_adv_prob"] = 1.0  # two updates may be plain both
    return values


def run(values: dict, folder, capsys) -> dict:
    file = write_recipe(folder / "recipe.yaml", values)
    code = main([values["verb"], "--config", file])
    assert code == 0, capsys.readouterr().err
    return json.loads((folder / "run" / "run.json").read_text(encoding="utf-8"))


def test_the_recipes_are_found():
    assert [path.stem for path in RECIPES] == NAMES
    assert {path.stem: verb_of(path) for path in RECIPES if verb_of(path) != "lap-sft"} == {
        "dpo_after_lap": "lap-dpo", "lap_dpo_joint": "lap-dpo",
    }  # fmt: skip


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_read_strictly_and_has_a_header(path):
    load_recipe(verb_of(path), ["--config", str(path)], check=False, this_machine=False)
    text = path.read_text(encoding="utf-8")
    header = text.partition("\nverb:")[0]
    for word in ("# Reproduces ", "# Command ", "# Hardware ", f"trl-robust {verb_of(path)} --config recipes/lap/"):
        assert word in header
    if "use_cpu: true" not in text:
        for word in ("NOT RUN ON A GPU BY US YET", "# Published ", "# Obtained ", "# Our reading "):
            assert word in header


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_runs_two_steps(name, workplace_of, tmp_path, capsys):
    values = smaller(name, workplace_of, tmp_path / "run")
    record = run(values, tmp_path, capsys)
    assert record["phases"]["train"]["updates"] == 2
    plain = 2 if values.get("lap_branch") == "sft_only" else 0
    assert record["branches"]["updates"] == {"perturbed": 2 - plain, "plain": plain, "both": 0}
    assert None not in record["losses"].values()  # none was infinite or not a number
    assert (tmp_path / "run" / "lap_curves.jsonl").is_file() == bool(values.get("lap_curves"))
    if "chat_template_path" in values:  # the template is part of what was trained, and stays with it
        assert AutoTokenizer.from_pretrained(tmp_path / "run").chat_template == TEMPLATE.read_text(encoding="utf-8")
        assert f"chat_template_path: {TEMPLATE}" in (tmp_path / "run" / "recipe.yaml").read_text(encoding="utf-8")


def test_the_chosen_completions_are_taken_out_of_rows_of_ultrafeedbacks_own_form(workplace_of, tmp_path):
    values = smaller("llama3_8b", workplace_of, tmp_path / "run")
    file = write_recipe(tmp_path / "recipe.yaml", values)
    rows = load_share(load_recipe("lap-sft", ["--config", file], check=False, this_machine=False), "train")
    assert rows.column_names == ["chosen", "rejected"] and len(rows) == 12
    trainer = trained("llama3_8b", workplace_of, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    vocabulary = set(SPECIAL + WORDS)
    for row, given in zip(trainer.train_dataset, ultrafeedback(), strict=True):
        completion = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
        answer = given["chosen"][-1]["content"].split()
        assert tokenizer.convert_ids_to_tokens(completion)[: len(answer)] == answer
        prompt = tokenizer.convert_ids_to_tokens(row["input_ids"])[: -len(completion)]
        # The question stands in the prompt once, and the perturbed span is the question.
        assert [token for token in prompt if token in vocabulary and token.startswith("w")] == given["prompt"].split()
        start, end = row["last_user_span"]
        assert prompt[start:end] == given["prompt"].split()


def trained(name: str, workplace_of, folder):
    """The trainer of a recipe after two steps."""
    from trl_robust.scripts import training

    file = write_recipe(folder / "again.yaml", smaller(name, workplace_of, folder / "run"))
    return training.run(load_recipe(verb_of(FOLDER / f"{name}.yaml"), ["--config", file]), quiet=True)


TABLE_7 = {
    "max_length": 1024, "adam_beta1": 0.9, "adam_beta2": 0.95, "learning_rate": 1e-4, "warmup_steps": 0.1,
    "lr_scheduler_type": "cosine", "weight_decay": 0, "num_train_epochs": 1, "bf16": True,
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES[:-2])
def test_the_published_hyperparameters(name):
    """papers/lap.md section 5, the same for all models and for preference learning."""
    recipe = read(name)
    training, model = recipe.training, recipe.model
    assert {key: getattr(training, key) for key in TABLE_7} == TABLE_7
    assert training.per_device_train_batch_size * training.gradient_accumulation_steps == 32
    adapter = (model.lora_r, model.lora_alpha, model.lora_dropout, model.lora_target_modules)
    if recipe.verb == "lap-sft":
        assert model.use_peft and adapter == (64, 16, 0.05, ["gate_proj", "up_proj", "down_proj"])
        assert not model.load_in_4bit


def test_the_layers_are_the_papers_counted_from_0():
    """The paper counts hidden states, so that its l is our l - 1: 20 of 32, and 25 of 40 at the same depth."""
    assert read("llama3_8b").training.lap_layers == read("mistral_7b").training.lap_layers == ["19"]
    assert read("llama2_13b").training.lap_layers == ["24"]


@pytest.mark.parametrize(
    ("name", "of", "differing"),
    [
        ("llama3_8b_paper", "llama3_8b", {"lap_preset": "paper"}),
        ("mistral_7b", "llama3_8b", {"model_name_or_path": "mistralai/Mistral-7B-v0.3"}),
        ("llama2_13b", "llama3_8b", {"model_name_or_path": "meta-llama/Llama-2-13b-hf", "lap_layers": [24]}),
        (
            "lap_dpo_joint",
            "dpo_after_lap",
            {key: value for key, value in keys("llama3_8b").items() if key.startswith("lap_")},
        ),
    ],
)
def test_a_recipe_to_compare_with_differs_in_what_its_header_says_alone(name, of, differing):
    assert keys(name) == keys(of) | differing | {"output_dir": keys(name)["output_dir"]}


def controls() -> list[list[str]]:
    """The overrides that the end of llama3_8b.yaml documents."""
    text = (FOLDER / "llama3_8b.yaml").read_text(encoding="utf-8").partition("# The controls")[2]
    return [line[line.index("--lap") :].split() for line in text.splitlines() if "--lap" in line]


def test_the_controls_that_are_documented_are_read():
    found = controls()
    assert len(found) == 9
    told = " ".join(word for words in found for word in words)
    for key in ("sft_only", "match_compute", "random", "untargeted", "neftune", "lap_alpha 0", "both", "adv_only"):
        assert key in told
    for words in found:
        load_recipe("lap-sft", ["--config", str(FOLDER / "llama3_8b.yaml"), *words], check=False, this_machine=False)


def test_after_the_merge_that_the_header_shows_trls_own_dpo_goes_on(workplace_of, tmp_path, capsys, monkeypatch):
    """The paper's pipeline: LAP, then ordinary DPO. The lines are those of the header."""
    header = (FOLDER / "dpo_after_lap.yaml").read_text(encoding="utf-8").partition("\nverb:")[0]
    shown = [line.removeprefix("#").removeprefix(" " * 16) for line in header.splitlines()]
    lines = [line for line in shown if not line.startswith(" ")]
    start, end = lines.index("import torch"), lines.index("model_name_or_path: runs/llama3-8b-lap-merged")
    code, instead = "\n".join(lines[start:end]), yaml.safe_load("\n".join(lines[end:]))
    assert code.count("\n") == 6 and 'folder = "runs/llama3-8b-lap"' in code and len(instead) == 6
    monkeypatch.chdir(tmp_path)
    run(smaller("llama3_8b", workplace_of, tmp_path / "run"), tmp_path, capsys)
    (tmp_path / "runs").mkdir()
    (tmp_path / "run").rename(tmp_path / "runs" / "llama3-8b-lap")
    exec(code, {})  # the code of our own recipe's header, as a user would run it
    merged = tmp_path / "runs" / "llama3-8b-lap-merged"
    assert AutoTokenizer.from_pretrained(merged).chat_template == TEMPLATE.read_text(encoding="utf-8")
    values = smaller("dpo_after_lap", workplace_of, tmp_path / "dpo") | instead
    (entry,) = values["datasets"]
    values["datasets"] = [entry | {"path": "json", "data_files": entry["path"]}]  # as TRL names a file
    values = {key: value for key, value in values.items() if key not in ("verb", "drop_long") and "lap_" not in key}
    file = write_recipe(tmp_path / "dpo.yaml", values)
    stock_dpo.main(*stock_dpo.make_parser().parse_args_and_config(["--config", file]))
    adapter = json.loads((tmp_path / "dpo" / "adapter_config.json").read_text(encoding="utf-8"))
    assert adapter["base_model_name_or_path"] == instead["model_name_or_path"] and adapter["r"] == 64


def test_the_template_keeps_a_prompt_as_the_beginning_of_its_conversation():
    turns = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "first "},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "second"},
        {"role": "assistant", "content": "b"},
    ]
    template = Environment().from_string(TEMPLATE.read_text(encoding="utf-8"))
    text = template.render(messages=turns, bos_token="<s>", eos_token="</s>", add_generation_prompt=False)
    assert text == (
        "<s>### System:\ns\n\n### User:\nfirst\n\n### Assistant:\na</s>\n### User:\nsecond\n\n### Assistant:\nb</s>\n"
    )
    prompt = template.render(messages=turns[:4], bos_token="<s>", eos_token="</s>", add_generation_prompt=True)
    assert text == prompt + "b</s>\n"
    assert template.render(messages=turns[:1], bos_token=None, eos_token="</s>").startswith("### System")
