"""The recipes for SEAL that come with the package: read strictly, run at tiny size, with what their headers show."""

import json
import re
import shlex

import datasets
import pytest
import yaml
from jinja2 import Environment
from recipe_parts import make_workplace, write_recipe, write_rows
from tiny import completion_data, preference_data
from transformers import AutoTokenizer
from trl.scripts import sft as stock_sft

from trl_robust.cli import main
from trl_robust.recipes import VERBS, load_recipe, recipes_folder, verb_of
from trl_robust.recipes.flat import load_arguments
from trl_robust.scripts.select import SelectArguments
from trl_robust.selection.penalty import PenaltySchedule

FOLDER = recipes_folder() / "seal"
RECIPES = sorted(FOLDER.glob("*.yaml"))
SECOND = ["llama3_8b_sft", "merlinite_7b_sft", "organism_sft", "pythia_2b8_sft"]
FIRST = [
    "benign_openorca", "llama3_8b", "llama3_8b_paper", "merlinite_7b", "organism", "phi3_mini", "pythia_2b8",
    "pythia_2b8_paper", "your_data_cpu", "your_preferences",
]  # fmt: skip
TEMPLATE = FOLDER / "human_assistant.jinja"
ROWS = 8


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = make_workplace(tmp_path_factory.mktemp("seal"), hidden_size=32, intermediate_size=64)
    extra = [{"source": f"s{number % 3}", "unsafe": number % 4 == 0} for number in range(ROWS)]
    rows = [row | more for row, more in zip(completion_data(ROWS, 5), extra, strict=True)]
    write_rows(place / "rows.jsonl", rows)
    write_rows(place / "pairs.jsonl", list(preference_data(ROWS, 6)))
    write_rows(place / "safe.jsonl", list(completion_data(6, 8)))
    return place


def keys(name: str) -> dict:
    return yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))


def read(name: str):
    path = FOLDER / f"{name}.yaml"
    return load_recipe(verb_of(path), ["--config", str(path)], check=False, this_machine=False)


def header(name: str) -> str:
    return (FOLDER / f"{name}.yaml").read_text(encoding="utf-8").partition("\nverb:")[0]


def smaller(name: str, place, output) -> dict:
    """A shipped recipe at tiny size: its own keys, but for the model, the rows and the length."""
    values = keys(name) | {
        "model_name_or_path": str(place / "model"),
        "dataset_name": str(place / ("pairs.jsonl" if "preferences" in name else "rows.jsonl")),
        "output_dir": str(output),
        "num_train_epochs": 1,
        "max_steps": -1,
        "per_device_train_batch_size": ROWS // 2,
        "gradient_accumulation_steps": 1,
        "max_length": 64,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    if "safe_dataset_name" in values:
        values["safe_dataset_name"] = str(place / "safe.jsonl")
    if "chat_template_path" in values:
        assert values["chat_template_path"] == f"recipes/seal/{TEMPLATE.name}"
        values["chat_template_path"] = str(TEMPLATE)
    return values


def run(values: dict, folder, capsys) -> dict:
    file = write_recipe(folder / "recipe.yaml", values)
    assert main([values["verb"], "--config", file]) == 0, capsys.readouterr().err
    return json.loads((folder / "run" / "run.json").read_text(encoding="utf-8"))


def lines_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_recipes_are_found():
    assert sorted(path.stem for path in RECIPES) == sorted(FIRST + SECOND)
    assert {verb_of(FOLDER / f"{name}.yaml") for name in FIRST} == {"seal"}
    assert {(keys(name)["verb"], keys(name)["lap_branch"]) for name in SECOND} == {("lap-sft", "sft_only")}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_read_strictly_and_has_a_header(path):
    read(path.stem)
    text = path.read_text(encoding="utf-8")
    for word in ("# Reproduces ", "# Command ", "# Hardware ", f"trl-robust {verb_of(path)} --config recipes/seal/"):
        assert word in header(path.stem)
    if "use_cpu: true" not in text:
        for word in ("NOT RUN ON A GPU BY US YET", "# Published ", "# Obtained ", "# Our reading "):
            assert word in header(path.stem)
    if "chat_template_path" in keys(path.stem):
        assert "from the folder that holds `recipes`" in " ".join(header(path.stem).lower().replace("#", "").split())
    assert max(map(len, text.splitlines())) <= 119


@pytest.mark.filterwarnings("ignore:`penalty_algorithm:UserWarning")
@pytest.mark.parametrize("name", FIRST + SECOND)
def test_a_recipe_runs_two_steps(name, place, tmp_path, capsys):
    record = run(smaller(name, place, tmp_path / "run"), tmp_path, capsys)
    assert record["phases"]["train"]["updates"] == 2
    assert None not in record["losses"].values()  # none was infinite or not a number
    if name in SECOND:
        assert record["branches"]["updates"] == {"perturbed": 0, "plain": 2, "both": 0}
        return
    assert (
        record["kept"]["rows"] == int(keys(name)["keep_fraction"] * ROWS) == len(lines_of(tmp_path / "run/kept.jsonl"))
    )
    labels = json.loads((tmp_path / "run" / "selection.json").read_text(encoding="utf-8"))["labels"]
    assert (labels is None) == ("label_column" not in keys(name))
    assert (tmp_path / "run" / "report.html").is_file()


def commands(name: str) -> list[list[str]]:
    """The commands that a header shows, each as its words."""
    text = re.sub(r" \\\n# +", " ", header(name))
    shown = re.findall(r"trl-robust ([a-z][a-z-]+ --[^\n]*)", text.replace("`", "\n"))
    return [shlex.split(re.split(r"  +", words)[0].strip().rstrip(",;")) for words in shown]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_commands_that_a_header_shows_are_read(path, monkeypatch):
    monkeypatch.chdir(recipes_folder().parent)
    found = commands(path.stem)
    assert any(f"recipes/seal/{path.name}" in words for words in found)
    for verb, *words in found:
        if verb == "select":
            if "--selector" not in words:  # a part of one, such as a share
                words = [*words, "--selector", "runs/s", "--dataset_name", "rows.jsonl", "--output_dir", "runs/none"]
            load_arguments(SelectArguments, words, prog="trl-robust select")
        elif verb in VERBS:
            load_recipe(verb, words, check=False, this_machine=False)
        else:
            assert verb == "organism"


def variants(name: str) -> list[list[str]]:
    """Overrides in a line of their own."""
    text = re.sub(r" \\\n# +", " ", header(name))
    return [shlex.split(line.lstrip("# ")) for line in text.splitlines() if line.lstrip("# ").startswith("--")]


def test_the_variants_that_are_documented_are_read():
    shown = {name: variants(name) for name in ("llama3_8b", "phi3_mini")}
    methods = [words[1] for words in shown["llama3_8b"] if words[0] == "--selection_method"]
    assert methods == ["random", "safe_loss", "loss_gap", "dsir", "none", "safe_instr"]
    assert len(shown["llama3_8b"]) == 7 and len(shown["phi3_mini"]) == 1
    for name, lines in shown.items():
        for words in lines:
            config = ["--config", str(FOLDER / f"{name}.yaml")]
            recipe = load_recipe("seal", [*config, *words], check=False, this_machine=False)
            if name == "phi3_mini":  # what llama3_8b.yaml has
                training, other = recipe.training, read("llama3_8b").training
                assert training.describe() | {"seed": 42} == other.describe()
                assert recipe.model.use_peft


PAPER = {
    "selection_method": "seal", "selector_function": "softmax", "selector_optimizer": "adam", "keep_fraction": 0.8,
    "penalty_algorithm": "memory_efficient", "selector_average": False, "safe_fraction": 1.0,
}  # fmt: skip
COMMON = {
    "learning_rate": 1e-5, "max_length": 2048, "seed": 42, "bf16": True, "adam_beta1": 0.9, "adam_beta2": 0.95,
    "weight_decay": 0, "max_grad_norm": 1,
}  # fmt: skip
# epochs, micro-batch, schedule, adapter; of selectors also its learning rate, and gamma in every epoch
Q_V = (16, 16, 0.0, ["q_proj", "v_proj"])
PUBLISHED = {
    "llama3_8b_paper": (3, 1, "constant", Q_V, 5e-3, [0, 0.03, 0.06]),
    "merlinite_7b": (2, 4, "constant", None, 4e-3, [0, 0.02]),
    "phi3_mini": (3, 1, "constant", None, 4e-3, [0, 0.02, 0.04]),
    "pythia_2b8_paper": (2, 4, "constant", None, 4e-3, [0, 0.02]),
    "llama3_8b_sft": (2, 1, "constant", Q_V),
    "merlinite_7b_sft": (3, 4, "cosine", Q_V),
    "pythia_2b8_sft": (3, 4, "constant", None),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_hyperparameters(name):
    """papers/seal.md section 6."""
    epochs, micro, schedule, adapter, *selector = PUBLISHED[name]
    recipe = read(name)
    training, model = recipe.training, recipe.model
    assert {key: getattr(training, key) for key in COMMON} == COMMON
    assert (training.num_train_epochs, training.per_device_train_batch_size) == (epochs, micro)
    assert training.per_device_train_batch_size * training.gradient_accumulation_steps == 64
    assert training.lr_scheduler_type == schedule and (schedule == "constant") == (training.warmup_steps == 0)
    found = (model.lora_r, model.lora_alpha, model.lora_dropout, model.lora_target_modules) if model.use_peft else None
    assert found == adapter and not model.load_in_4bit
    assert model.dtype == ("bfloat16" if adapter else "float32")
    if selector:
        assert {key: getattr(training, key) for key in PAPER} == PAPER
        assert training.logits_learning_rate(64) == selector[0]
        gammas = [training.schedule.at(epoch, per_epoch=1, total=epochs) for epoch in range(epochs)]
        assert gammas == pytest.approx(selector[1], abs=1e-12)
        reference = PenaltySchedule.of_reference_code(1.0, training.penalty_increment)
        assert gammas == [reference.at(epoch, per_epoch=1, total=epochs) for epoch in range(epochs)]


def test_our_own_selector_is_algorithm_1_with_two_adapters_in_four_bits():
    training, model = read("llama3_8b").training, read("llama3_8b").model
    assert training.uses_auxiliary and training.selector_optimizer == "sgd"
    assert training.logits_learning_rate(64) == pytest.approx(5.33, abs=0.01)  # as its header says
    assert model.use_peft and model.load_in_4bit and model.bnb_4bit_quant_type == "nf4"
    assert read("pythia_2b8").training.uses_auxiliary and read("pythia_2b8").model.use_peft


@pytest.mark.parametrize(
    ("name", "of", "differing", "without"),
    [
        (
            "merlinite_7b",
            "phi3_mini",
            {"num_train_epochs": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 16},
            set(),
        ),
        (
            "benign_openorca",
            "llama3_8b",
            {"dataset_name": "openorca.jsonl", "safe_dataset_name": "alpaca.jsonl", "keep_fraction": 0.9},
            {"label_column", "source_column"},
        ),
        ("pythia_2b8_paper", "merlinite_7b", {"model_name_or_path": "pythia-2.8b-aligned"}, set()),
    ],
)
def test_a_recipe_to_compare_with_differs_in_what_its_header_says_alone(name, of, differing, without):
    expected = keys(of) | differing | {"output_dir": keys(name)["output_dir"]}
    assert keys(name) == {key: value for key, value in expected.items() if key not in without}


def code_of(name: str) -> str:
    """The Python that a header shows."""
    shown = [line.removeprefix("#").removeprefix(" " * 16) for line in header(name).splitlines()]
    start = shown.index("import json")
    end = next(number for number in range(start, len(shown)) if shown[number].startswith(" Hardware"))
    return "\n".join(shown[start:end])


def served(monkeypatch, tables: dict) -> None:
    """Has `load_dataset` give tables in place of the hub's."""
    monkeypatch.setattr(
        datasets, "load_dataset", lambda name, split, **more: datasets.Dataset.from_list(tables[name, *more.values()])
    )


def test_redorca_and_blueorca_are_made_as_the_header_shows(tmp_path, monkeypatch):
    orca = [
        {"conversations": [{"from": part, "value": f"{part} {number}"} for part in ("system", "human", "gpt")]}
        for number in range(100)
    ]
    orca[7]["conversations"][2]["value"] = " "  # an empty answer
    attempts = [
        {"transcript": f"\n\nHuman: ask {n}\n\nAssistant: tell {n}\n\nHuman: more\n\nAssistant: no", "rating": n % 5}
        for n in range(20)
    ]
    served(monkeypatch, {("Open-Orca/SlimOrca",): orca, ("Anthropic/hh-rlhf", "red-team-attempts"): attempts})
    monkeypatch.chdir(tmp_path)
    code = code_of("llama3_8b_paper")
    for published, small in (("22_400", "6"), ("89_600", "24"), ("201_600", "54"), ("210_000", "100")):
        assert published in code
        code = code.replace(published, small)
    exec(code, {})  # the code of our own recipe's header, as a user would run it
    red, blue = lines_of(tmp_path / "redorca.jsonl"), lines_of(tmp_path / "blueorca.jsonl")
    assert len(red) == 30 and len(blue) == 30
    assert {frozenset(row) for row in red} == {frozenset(("prompt", "completion", "source", "unsafe"))}
    unsafe = [row for row in red if row["unsafe"]]
    assert {row["prompt"] for row in unsafe} == {f"ask {n}" for n in (3, 4, 8, 9, 13, 14)}
    assert all(row["completion"] == row["prompt"].replace("ask", "tell") for row in unsafe)
    assert {row["source"] for row in unsafe} == {"red-team"}
    assert [row["unsafe"] for row in red] != sorted(row["unsafe"] for row in red)  # not in blocks
    benign = [row for row in red if not row["unsafe"]] + blue
    assert len({row["prompt"] for row in benign}) == 54  # nothing is in both
    assert all(row["completion"] == row["prompt"].replace("human", "gpt") != "gpt 7" for row in benign)
    assert 22_400 / (22_400 + 89_600) == 0.2 and 201_600 - 89_600 == 112_000  # seal.md 6


def test_the_rows_of_the_benign_experiment_are_made_as_the_header_shows(tmp_path, monkeypatch):
    alpaca = [{"instruction": f"do {n}", "input": "this" * (n % 2), "output": f"done {n}"} for n in range(30)]
    orca = [{"question": f"why {n}", "response": f"so {n}" if n else "", "system_prompt": "s"} for n in range(30)]
    served(monkeypatch, {("yahma/alpaca-cleaned",): alpaca, ("Open-Orca/OpenOrca",): orca})
    monkeypatch.chdir(tmp_path)
    code = code_of("benign_openorca")
    assert "49_900" in code
    exec(code.replace("49_900", "29"), {})  # likewise
    rows, safe = lines_of(tmp_path / "openorca.jsonl"), lines_of(tmp_path / "alpaca.jsonl")
    assert len(rows) == len(safe) == 29 and {frozenset(row) for row in rows + safe} == {
        frozenset(("prompt", "completion"))
    }
    assert all(row["completion"] == row["prompt"].replace("why", "so") for row in rows)
    assert {row["prompt"].partition("\n\n")[2] for row in safe} == {"", "this"}


def test_the_template_is_that_of_the_code_with_the_space_on_the_answers_side():
    turns = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": " question\n"},
        {"role": "assistant", "content": "answer"},
    ]
    template = Environment().from_string(TEMPLATE.read_text(encoding="utf-8"))
    text = template.render(messages=turns, bos_token="<s>", eos_token="</s>", add_generation_prompt=False)
    assert text == "<s>Human: question\nAssistant: answer</s>"
    prompt = template.render(messages=turns[:2], bos_token="<s>", eos_token="</s>", add_generation_prompt=True)
    assert prompt + " answer</s>" == text
    assert template.render(messages=turns[1:], bos_token=None, eos_token="") == "Human: question\nAssistant: answer"


def shown_command(name: str, verb: str, placeholders: dict) -> list[str]:
    (words,) = [words for words in commands(name) if words[0] == verb and "--config" not in words]
    return [placeholders.get(word, word) for word in words]


def test_the_whole_way_that_your_data_cpu_shows(place, tmp_path, capsys, monkeypatch):
    """Selector, rows, fine-tuning; and another share of the rows without training again."""
    monkeypatch.chdir(tmp_path)
    values = smaller("your_data_cpu", place, "runs/your-data-seal")
    assert main(["seal", "--config", write_recipe(tmp_path / "recipe.yaml", values)]) == 0, capsys.readouterr().err
    small = {"MODEL": str(place / "model"), "rows.jsonl": str(place / "rows.jsonl")}
    words = shown_command("your_data_cpu", "lap-sft", small)
    assert main([*words, "--max_steps", "1", "--report_to", "none"]) == 0, capsys.readouterr().err
    record = json.loads((tmp_path / "runs" / "your-data-seal-sft" / "run.json").read_text(encoding="utf-8"))
    assert record["datasets"]["train"]["rows"] == 6
    words = [words for words in commands("your_data_cpu") if words[0] == "select"][-1]
    assert main([small.get(word, word) for word in words]) == 0, capsys.readouterr().err
    assert len(lines_of(tmp_path / "runs" / "your-data-half" / "kept.jsonl")) == 4


def test_the_whole_way_that_your_preferences_shows(place, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values = smaller("your_preferences", place, "runs/your-preferences-seal")
    assert main(["seal", "--config", write_recipe(tmp_path / "recipe.yaml", values)]) == 0, capsys.readouterr().err
    words = shown_command("your_preferences", "lat-dpo", {"MODEL": str(place / "model")})
    assert main([*words, "--max_steps", "1", "--report_to", "none"]) == 0, capsys.readouterr().err
    record = json.loads((tmp_path / "runs" / "your-preferences-dpo" / "run.json").read_text(encoding="utf-8"))
    assert record["datasets"]["train"]["rows"] == 6


def test_lat_sft_takes_the_kept_rows_as_the_header_of_the_second_stage_shows(place, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kept = tmp_path / "runs" / "llama3-8b-seal" / "kept.jsonl"
    kept.parent.mkdir(parents=True)
    kept.write_text((place / "rows.jsonl").read_text(encoding="utf-8"), encoding="utf-8")
    small = {"meta-llama/Meta-Llama-3-8B-Instruct": str(place / "model"), "8": "1", "16": "2", "24": "3"}
    words = shown_command("llama3_8b_sft", "lat-sft", small)
    more = ["--max_steps", "1", "--use_cpu", "true", "--bf16", "false", "--report_to", "none"]
    assert main([*words, *more]) == 0, capsys.readouterr().err
    record = json.loads((tmp_path / "runs" / "llama3-8b-seal-lat" / "run.json").read_text(encoding="utf-8"))
    assert record["datasets"]["train"]["rows"] == ROWS and "attack_loss_after" in record["losses"]


def test_trls_own_sft_takes_the_kept_rows_as_the_header_of_the_second_stage_shows(place, tmp_path):
    shown = [line.removeprefix("#").removeprefix(" " * 16) for line in header("llama3_8b_sft").splitlines()]
    start = shown.index("datasets:")
    instead = yaml.safe_load("\n".join(shown[start : start + 4]))
    assert instead["datasets"][0]["columns"] == ["prompt", "completion"] and len(instead["datasets"][0]) == 3
    instead["datasets"][0]["data_files"] = str(place / "rows.jsonl")
    values = smaller("llama3_8b_sft", place, tmp_path / "sft") | instead | {"report_to": "none"}
    ours = ("verb", "lap_branch", "chat_format", "drop_long", "dataset_name")
    file = write_recipe(tmp_path / "sft.yaml", {key: value for key, value in values.items() if key not in ours})
    stock_sft.main(*stock_sft.make_parser().parse_args_and_config(["--config", file]))
    adapter = json.loads((tmp_path / "sft" / "adapter_config.json").read_text(encoding="utf-8"))
    assert adapter["r"] == 16 and sorted(adapter["target_modules"]) == ["q_proj", "v_proj"]
    assert AutoTokenizer.from_pretrained(tmp_path / "sft") is not None
