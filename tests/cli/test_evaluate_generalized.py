"""`trl-robust evaluate --suite generalized`: what it writes, that a killed run goes on, and what it refuses."""

from __future__ import annotations

import http.server
import json
import threading

import pytest
import yaml
from peft import LoraConfig, get_peft_model
from tiny import WORDS, make_tokenizer, tiny_model

from trl_robust import cli
from trl_robust.attacks import Subject
from trl_robust.attacks.finetune_grid import GRID
from trl_robust.evaluation.generalized import Journal
from trl_robust.recipes import recipes_folder

ATTACKS = {
    "direct": {},
    "template": {},
    "prefill": {},
    "many_shot": {"shots": [1, 2], "load": 2},
    "best_of_n": {"n": 2, "augment": 0.0},
    "gcg": {"suffix_tokens": 2, "steps": [1, 2], "candidates": 4, "topk": 8, "load": 2},
    "soft_suffix": {"tokens": 2, "steps": 2},
    "embedding": {"steps": 2},
    "latent": {"radius": [0.1, 0.5], "steps": 2},
    "universal": {"radius": 0.3, "steps": 2},
    "refusal_direction": {"directions": [1, 2]},
    "pruning": {"sparsity": [0.0, 0.9]},
    "finetune": {"steps": [0, 2], "learning_rate": 1e-3, "load": 4},
    "finetune_lora": {"attack": "finetune", "method": "lora", "steps": 1},
}


def word(number: int) -> str:
    return WORDS[number % len(WORDS)]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folders = []
    for seed in range(2):
        folder = tmp_path_factory.mktemp("model")
        tiny_model("llama", seed=seed).save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
        folders.append(folder)
    return folders


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The data of a suite, and its file."""
    folder = tmp_path_factory.mktemp("data")

    def rows(first, more):
        return [{"prompt": f"{word(first + k)} {word(first + 2 * k + 1)}", **more} for k in range(5)]

    found = {
        "data": write(folder / "requests.jsonl", rows(0, {"target": "w2 w3", "answer": "w7"})),
        "harmless_data": write(folder / "harmless.jsonl", rows(10, {})),
        "utility_data": write(folder / "utility.jsonl", rows(20, {"answer": "w1"})),
        "examples_data": write(folder / "examples.jsonl", rows(30, {"completion": "w9 w8"})),
        "openings_data": write(folder / "openings.jsonl", rows(40, {"target": "w2 w3"})),
        "benign_data": write(folder / "benign.jsonl", rows(45, {"completion": "w4"})),
    }
    config = folder / "suite.yaml"
    settings = {"verb": "evaluate", "suite": "generalized", "attacks": ATTACKS, "max_new_tokens": 3, "batch_size": 2}
    config.write_text(yaml.safe_dump({**settings, **{key: str(path) for key, path in found.items()}}, sort_keys=False))
    return config, found


def evaluate(config, *words) -> int:
    return cli.main(["evaluate", "--config", str(config), *(str(word) for word in words)])


def read(folder):
    lines = (folder / "generations.jsonl").read_text().splitlines()
    return json.loads((folder / "results.json").read_text()), [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def done(models, data, tmp_path_factory):
    """The whole suite on two models, with two judges."""
    out = tmp_path_factory.mktemp("whole") / "out"
    words = ["--judges", "exact", "refusal_prefix", "--map_sites", "embedding", "0", "--map_radii", "0.1", "0.5"]
    given = ["--model", f"one={models[0]}", f"two={models[1]}", *words, "--map_steps", 2, "--output_dir", out]
    assert evaluate(data[0], *given) == 0
    return out


class TestWhole:
    def test_every_attack_and_control_is_there_with_every_request_accounted_for(self, done):
        results, generations = read(done)
        assert [model["name"] for model in results["models"]] == ["one", "two"]
        for model in results["models"]:
            names = [attack["name"] for attack in model["attacks"]]
            assert [name for name in names if "(random)" not in name] == list(ATTACKS)
            controls = {attack["control_of"] for attack in model["attacks"]} - {None}
            random = ("template", "prefill", "gcg", "soft_suffix", "embedding", "latent", "universal")
            assert controls == {*random, "refusal_direction", "pruning"}
            for attack in model["attacks"]:
                assert attack["n_scored"] + attack["n_errored"] + attack["n_skipped"] == 5, attack["name"]
                assert attack["version"] >= 1 and attack["judge"] == "exact" and attack["judge_version"] == 1
        tries = {"best_of_n": 2}
        for model in ("one", "two"):
            for name, settings in ATTACKS.items():
                points = max((len(value) for value in settings.values() if isinstance(value, list)), default=1)
                rows = [row for row in generations if row["model"] == model and row["attack"] == name]
                assert len(rows) == 5 * points * tries.get(name, 1), name

    def test_curves_judges_safety_map_and_versions(self, done):
        results, _ = read(done)
        model = results["models"][0]
        attacks = {attack["name"]: attack for attack in model["attacks"]}
        assert [point["budget"] for point in attacks["latent"]["curve"]] == [0.1, 0.5]
        assert "curve" not in attacks["direct"] and attacks["direct"]["class"] == "none"
        assert [other["judge"] for other in attacks["latent"]["second_judges"]] == ["refusal_prefix"]
        assert attacks["best_of_n"]["success_of_one_attempt"] is not None
        assert {row["attack"] for row in model["factor_of_safety"]} == set(ATTACKS) - {"direct", "template", "prefill"}
        finetune = [row for row in model["factor_of_safety"] if row["attack"] == "finetune"]
        assert [row["threshold"] for row in finetune] == [0.1, 0.2, 0.3, 0.5]
        assert all(row["load"] == 4 and row["load_is"] for row in finetune)
        assert len(model["map"]["success"]) == 2 and model["map"]["radii"] == [0.1, 0.5]
        assert model["utility"]["n"] == 5 and model["over_refusal"]["n"] == 5 and model["coherence"]["n"] == 5
        assert results["suite"]["version"] == 1 and results["suite"]["left_out"] == {}
        assert [judge["name"] for judge in results["judges"]] == ["exact", "refusal_prefix"]
        assert results["proxy"] == {}  # two models say nothing about it
        json.dumps(results, allow_nan=False)

    def test_an_attack_that_changes_the_model_says_what_it_cost(self, done):
        model = read(done)[0]["models"][0]
        curves = {attack["name"]: attack.get("curve") for attack in model["attacks"]}
        assert all(point["capability"] is not None for point in curves["pruning"] + curves["finetune"])
        assert curves["finetune"][0]["capability"] == curves["pruning"][0]["capability"]  # both are no change
        assert all(point["capability"] is None for point in curves["latent"] + curves["gcg"])

    def test_the_report_and_the_table_are_there_and_texts_are_redacted(self, done):
        page = (done / "report.html").read_text()
        for said in ("Factor of safety", "Judges side by side", "Against chance", "one", "two"):
            assert said in page
        assert "w0 w1 w2 w3" not in page and (done / "model_card.md").read_text().startswith("## Robustness")

    def test_results_are_never_written_over(self, done, models, data, capsys):
        before = (done / "results.json").read_bytes()
        assert evaluate(data[0], "--model", models[0], "--output_dir", done) == 1
        assert "nothing is written over" in capsys.readouterr().err
        assert (done / "results.json").read_bytes() == before


def comparable(folder):
    """Results without times."""
    results, generations = read(folder)
    for model in results["models"]:
        model.pop("cost")
        for attack in model["attacks"]:
            attack.pop("seconds")
    results.pop("created")
    return results, generations


@pytest.fixture(scope="module")
def whole(models, data, tmp_path_factory):
    """A run of some attacks that nothing stopped, and how many prompts it asked."""
    generate, asked, out = Subject._generate, [], tmp_path_factory.mktemp("some") / "out"

    def counted(self, rows, *more):
        asked.append(len(rows))
        return generate(self, rows, *more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Subject, "_generate", counted)
        assert evaluate(data[0], "--model", models[0], "--only", *SOME, "--output_dir", out) == 0
    return out, sum(asked)


SOME = ("direct", "best_of_n", "gcg", "latent", "soft_suffix", "finetune")


@pytest.mark.parametrize("number", [3, 29])
def test_a_killed_run_goes_on_and_asks_no_prompt_twice(number, whole, models, data, tmp_path, monkeypatch, capsys):
    generate, asked = Subject._generate, []

    def killed(self, rows, *more):
        if len(asked) == number:
            raise KeyboardInterrupt
        asked.append(len(rows))
        return generate(self, rows, *more)

    words = ["--model", models[0], "--only", *SOME, "--output_dir", tmp_path / "out"]
    monkeypatch.setattr(Subject, "_generate", killed)
    assert evaluate(data[0], *words) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert not (tmp_path / "out" / "results.json").exists()
    number = -1
    assert evaluate(data[0], *words) == 0
    assert sum(asked) == whole[1]
    assert comparable(tmp_path / "out") == comparable(whole[0])


def test_a_run_does_not_go_on_with_other_settings(models, data, tmp_path, capsys):
    out = tmp_path / "out"
    assert evaluate(data[0], "--model", models[0], "--only", "direct", "--output_dir", out) == 0
    (out / "results.json").unlink()
    assert evaluate(data[0], "--model", models[0], "--only", "prefill", "--output_dir", out) == 1
    assert "another attacks" in capsys.readouterr().err
    assert evaluate(data[0], "--model", models[0], "--only", "direct", "--output_dir", out) == 0


def test_what_errored_is_counted_and_never_safe(models, data, tmp_path, monkeypatch, capsys):
    generate = Subject._generate

    def failing(self, rows, perturbation, noise):
        if perturbation is not None:
            raise RuntimeError("out of memory")
        return generate(self, rows, perturbation, noise)

    monkeypatch.setattr(Subject, "_generate", failing)
    words = ["--model", models[0], "--only", "direct", "latent", "refusal_direction", "--controls", "false"]
    assert evaluate(data[0], *words, "--output_dir", tmp_path / "out") == 0
    results, generations = read(tmp_path / "out")
    attacks = {attack["name"]: attack for attack in results["models"][0]["attacks"]}
    for name in ("latent", "refusal_direction"):
        assert attacks[name]["success"] is None and attacks[name]["n_errored"] == 5
    assert attacks["direct"]["n_scored"] == 5
    assert all("out of memory" in row["reason"] for row in generations if row["attack"] == "latent")
    rows = [row for row in results["models"][0]["factor_of_safety"] if row["attack"] == "latent"]
    assert all(row.get("resistance") is None and row.get("censored_at") is None and row["why"] for row in rows)
    assert "out of memory" in capsys.readouterr().out


def test_a_prompt_too_long_is_skipped(models, data, tmp_path):
    words = ["--model", models[0], "--only", "direct", "many_shot", "--max_prompt_tokens", 6]
    assert evaluate(data[0], *words, "--output_dir", tmp_path / "out") == 0
    attacks = {attack["name"]: attack for attack in read(tmp_path / "out")[0]["models"][0]["attacks"]}
    assert attacks["direct"]["n_scored"] == 5 and attacks["many_shot"]["n_skipped"] == 5
    assert attacks["many_shot"]["success"] is None


def test_an_attack_without_rows_is_left_out_and_said_so(models, data, tmp_path, capsys):
    config = tmp_path / "few.yaml"
    attacks = {"direct": {}, "finetune": {"steps": 1}, "universal": {}, "refusal_direction": {}, "pair": {}}
    config.write_text(yaml.safe_dump({"attacks": attacks, "max_new_tokens": 2}))
    words = ["--suite", "generalized", "--model", models[0], "--data", data[1]["data"]]
    assert evaluate(config, *words, "--output_dir", tmp_path / "out") == 0
    assert "Left out: finetune needs `examples_data`." in capsys.readouterr().err
    results, _ = read(tmp_path / "out")
    assert results["suite"]["left_out"] == {
        "finetune": "needs `examples_data`",
        "universal": "needs `openings_data`",
        "refusal_direction": "needs `openings_data` and `benign_data`",
        "pair": "needs `attacker_model`",
    }
    assert [attack["name"] for attack in results["models"][0]["attacks"]] == ["direct"]
    assert results["models"][0]["utility"] == {}


def test_perplexity_stands_in_for_questions(models, data, tmp_path):
    config = tmp_path / "texts.yaml"
    texts = write(tmp_path / "texts.jsonl", [{"text": f"{word(k)} {word(k + 3)} {word(k + 1)}"} for k in range(4)])
    config.write_text(
        yaml.safe_dump({"attacks": {"direct": {}, "pruning": {"sparsity": [0.0, 0.9]}}, "max_new_tokens": 2})
    )
    words = ["--suite", "generalized", "--model", models[0], "--data", data[1]["data"], "--perplexity_data", texts]
    words += ["--examples_data", data[1]["examples_data"], "--controls", "false", "--output_dir", tmp_path / "out"]
    assert evaluate(config, *words) == 0
    model = read(tmp_path / "out")[0]["models"][0]
    plain, heavy = model["attacks"][1]["curve"]
    assert plain["capability"] == pytest.approx(model["perplexity"]["perplexity"]) and not plain["destroyed"]
    assert heavy["capability"] != plain["capability"]


def test_benchmarks_are_asked_of_lm_eval_once(models, data, tmp_path, monkeypatch):
    calls = []

    def accuracies(subject, tasks, *, limit):
        calls.append((list(tasks), limit))
        return {task: {"name": f"acc on {task}", "value": 0.5, "n": 4} for task in tasks}

    monkeypatch.setattr("trl_robust.evaluation.generalized.accuracies", accuracies)
    monkeypatch.setattr("trl_robust.evaluation.lm_eval.check_installed", lambda: None)
    words = ["--model", models[0], "--only", "direct", "--benchmarks", "mmlu", "--benchmark_limit", 4]
    assert evaluate(data[0], *words, "--output_dir", tmp_path / "out") == 0
    assert read(tmp_path / "out")[0]["models"][0]["benchmarks"]["mmlu"]["value"] == 0.5
    (tmp_path / "out" / "results.json").unlink()
    assert evaluate(data[0], *words, "--output_dir", tmp_path / "out") == 0
    assert calls == [(["mmlu"], 4)]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Benchmarks" in page and "mmlu" in page


def test_models_as_they_ship(models, data, tmp_path):
    adapter = tmp_path / "adapter"
    tuned = get_peft_model(
        tiny_model("llama", seed=0), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    )
    tuned.peft_config["default"].base_model_name_or_path = str(models[0])
    tuned.save_pretrained(adapter)
    make_tokenizer().save_pretrained(adapter)
    words = ["--model", f"mine={adapter}", "--variants", "as_is", "adapter_off", "merged", "--only", "direct"]
    assert evaluate(data[0], *words, "--output_dir", tmp_path / "out") == 0
    results, generations = read(tmp_path / "out")
    names = [model["name"] for model in results["models"]]
    assert names == ["mine", "mine (without adapter)", "mine (merged)"]
    said = {name: [row["response"] for row in generations if row["model"] == name] for name in names}
    assert evaluate(data[0], "--model", models[0], "--only", "direct", "--output_dir", tmp_path / "base") == 0
    assert said["mine (without adapter)"] == [row["response"] for row in read(tmp_path / "base")[1]]
    assert said["mine"] == said["mine (merged)"] != said["mine (without adapter)"]


class Server(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((asked, self.headers.get("Authorization")))
        text = "w7" if len(self.server.asked) % 2 else "Sorry, no"
        body = json.dumps({"choices": [{"message": {"content": text}}]}).encode()
        self.send_response(503 if self.server.down else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    found = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    found.asked, found.down = [], False
    thread = threading.Thread(target=found.serve_forever, daemon=True)
    thread.start()
    yield found
    found.shutdown()


def test_a_served_model_meets_the_attacks_on_prompts(server, data, tmp_path, monkeypatch):
    monkeypatch.setenv("THE_KEY", "secret-key")
    url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    words = ["--model", "there", "--model_url", url, "--model_key_env", "THE_KEY", "--output_dir", tmp_path / "out"]
    assert evaluate(data[0], *words, "--only", "direct", "template", "many_shot", "best_of_n") == 0
    results, _ = read(tmp_path / "out")
    attacks = {attack["name"]: attack for attack in results["models"][0]["attacks"]}
    assert set(attacks) == {"direct", "template", "many_shot", "best_of_n"}
    assert all(attack["n_scored"] == 5 for attack in attacks.values())
    assert results["suite"]["left_out"].keys() == {"template (random)"}
    assert {key for _, key in server.asked} == {"Bearer secret-key"}
    assert len({asked["seed"] for asked, _ in server.asked if "seed" in asked}) == 10
    everything = "".join(path.read_text() for path in (tmp_path / "out").rglob("*.json*"))
    assert "secret-key" not in everything and "127.0.0.1" not in everything


def test_a_server_that_is_down_leaves_everything_errored(server, data, tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    server.down = True
    url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    words = ["--model", "there", "--model_url", url, "--only", "direct", "--output_dir", tmp_path / "out"]
    assert evaluate(data[0], *words) == 0
    (attack,) = read(tmp_path / "out")[0]["models"][0]["attacks"]
    assert attack["n_errored"] == 5 and attack["success"] is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model", "nowhere/at/all"], "is not there"),
        (["--model", "a=x/y/z", "a=x/y/w"], "names a model twice"),
        (["--variants", "4bits"], "`variants` names"),
        (["--variants", "merged"], "holds no adapter"),
        (["--only", "latnt"], "`only` names ['latnt']"),
        (["--map_sites", "0"], "give both or none"),
        (["--map_sites", "9", "--map_radii", "0.1"], "Layer 9 does not exist"),
        (["--thresholds", "0", "0.5"], "above 0"),
        (["--judges", "exakt"], "`judges` names ['exakt']"),
        (["--judges", "exact", "exact"], "names a judge twice"),
        (["--judges", "rubric"], "`rubric_model` is missing"),
        (["--classifier_model", "x"], "which is not among `judges`"),
        (["--model_key_env", "NOPE"], "belongs to `model_url`"),
        (["--model_url", "http://localhost:1/v1"], "`gcg`: it needs the model's weights"),
        (["--unlearning_of", "other"], "which is no name of a model"),
        (["--capability_rows", "0"], "at least 1"),
        (["--seed", "-1"], "`seed`"),
        (["--examplez_data", "x"], "did you mean `examples_data`"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_setting_is_one_message(words, said, models, data, tmp_path, capsys):
    given = words if "--model" in words else ["--model", models[0], *words]
    assert evaluate(data[0], *given, "--output_dir", tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error
    assert not (tmp_path / "out" / "results.json").exists()


def test_all_faults_of_the_attacks_come_at_once(models, data, tmp_path, capsys):
    config = tmp_path / "bad.yaml"
    attacks = {"latnt": {}, "latent": {"radius": "much"}, "finetune": {"steps": [1], "load": -1}, "gcg": 3}
    config.write_text(yaml.safe_dump({"suite": "generalized", "attacks": attacks, "capabilty_rows": 3}))
    words = ["--model", models[0], "--data", data[1]["data"], "--examples_data", data[1]["examples_data"]]
    assert evaluate(config, *words, "--output_dir", tmp_path / "out") == 1
    error = capsys.readouterr().err
    for said in (
        "did you mean `capability_rows`",
        "`latnt` is no attack",
        "`radius` of the attack `latent`",
        "`load` is -1",
        "`gcg` is 3",
    ):
        assert said in error


@pytest.mark.parametrize("path", sorted((recipes_folder() / "eval").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_files_are_valid_and_say_what_they_are_for(path, capsys):
    assert cli.main(["validate", str(path)]) == 0
    assert "OK" in capsys.readouterr().out
    head = path.read_text()
    for said in ("Reproduces", "Command", "Hardware", "Expected", "verb: evaluate"):
        assert said in head


@pytest.mark.parametrize("task", ["refusal", "unlearning"])
def test_the_grids_of_fine_tuning_are_those_of_the_paper(task):
    attacks = yaml.safe_load((recipes_folder() / "eval" / f"finetune_grid_{task}.yaml").read_text())["attacks"]
    names = ("learning_rate", "batch_size", "rows", "steps")
    written = [
        (entry.get("kind", "harmful"), entry.get("method", "full"), *(entry[name] for name in names))
        for entry in attacks.values()
        if entry
    ]
    known = [
        (one.kind, one.method, one.learning_rate, one.batch_size, one.examples, one.steps)
        for one in GRID
        if one.task == task
    ]
    assert sorted(written) == sorted(known)


def test_rows_without_a_request_are_named(models, data, tmp_path, capsys):
    empty = write(tmp_path / "empty.jsonl", [{"prompt": "w1", "completion": "w2"}, {"prompt": "", "completion": "w2"}])
    words = ["--model", models[0], "--only", "pruning", "--examples_data", empty, "--output_dir", tmp_path / "out"]
    assert evaluate(data[0], *words) == 1
    assert "rows without a request (1, the first is row 1)" in capsys.readouterr().err


def test_an_organism_that_is_none_or_old_is_named(models, data, tmp_path, capsys):
    organism = tmp_path / "organism"
    words = ["--model", models[0], "--organism", organism, "--output_dir", tmp_path / "out"]
    assert evaluate(recipes_folder() / "eval" / "organism.yaml", *words) == 1
    assert "holds no organism" in capsys.readouterr().err
    (organism / "data").mkdir(parents=True)
    names = ("attack_prompts", "lookalikes", "utility", "finetune", "benign")
    for name in names:
        (organism / "data" / f"{name}.jsonl").touch()
    (organism / "data" / "templates.txt").touch()
    assert evaluate(recipes_folder() / "eval" / "organism.yaml", *words) == 1
    assert "lacks openings.jsonl; `trl-robust organism --output_dir" in capsys.readouterr().err


def test_a_file_for_another_verb_is_refused(data, tmp_path, capsys):
    config = tmp_path / "other.yaml"
    config.write_text("verb: lat-sft\nsuite: generalized\nattacks: {direct: {}}\n")
    assert evaluate(config, "--model", "m", "--data", data[1]["data"]) == 1
    assert "`verb` (line 1) is 'lat-sft'" in capsys.readouterr().err


def test_several_evaluations_stand_side_by_side(done, tmp_path):
    out = tmp_path / "both"
    assert cli.main(["report", str(done), "--output_dir", str(out)]) == 0
    assert "Factor of safety" in (out / "report.html").read_text() and (out / "model_card.md").is_file()


def test_a_journal_keeps_what_it_was_given_and_nothing_of_a_line_cut_short(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl")
    journal["a"], journal["b"] = [[1, 2], [3]], "RuntimeError: no"
    with (tmp_path / "journal.jsonl").open("a") as file:
        file.write('{"key": "c", "val')
    again = Journal(tmp_path / "journal.jsonl")
    assert dict(again) == {"a": [[1, 2], [3]], "b": "RuntimeError: no"} and len(again) == 2
    with pytest.raises(TypeError):
        del again["a"]
