"""`trl-robust attack`: every attack, its judges, a served model, a run that goes on, on a model of a few numbers."""

from __future__ import annotations

import dataclasses
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import get_args

import pytest
from tiny import lora, make_tokenizer, tiny_model
from transformers import AutoModelForSequenceClassification, LlamaConfig

from trl_robust import cli
from trl_robust.attacks import Attack, Subject
from trl_robust.evaluation.named import DATA_FIELDS
from trl_robust.scripts.attack_settings import ATTACKS, OBJECTIVES, AttackSettings

CLASSES = {attack.name: attack for attack in get_args(Attack)}
SMALL = {
    "template": ["--templates", "templates.txt"],
    "many_shot": ["--attack_examples", "examples.jsonl", "--attack_shots", 2],
    "best_of_n": ["--attack_n", 2, "--attack_temperature", 2.0],
    "gcg": ["--attack_steps", 1, "--attack_candidates", 4, "--attack_topk", 8, "--attack_suffix_tokens", 2],
    "soft_suffix": ["--attack_steps", 1, "--attack_tokens", 2],
    "embedding": ["--attack_steps", 1],
    "latent": ["--attack_steps", 1, "--attack_sites", 0, 1],
    "universal": ["--attack_examples", "examples.jsonl", "--attack_steps", 1],
    "refusal_direction": ["--attack_harmful", "examples.jsonl", "--attack_harmless", "harmless.jsonl"],
    "pruning": ["--attack_examples", "examples.jsonl", "--attack_sparsity", 0.5],
    "finetune": ["--finetune_data", "examples.jsonl", "--finetune_steps", 1, "--finetune_method", "lora"],
}
"""Settings with which an attack takes no time."""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model and data; the tests work in it."""
    folder = tmp_path_factory.mktemp("place")
    tiny_model("llama").save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    write(
        folder / "data.jsonl",
        [{"prompt": f"w{n} w{n + 1} w{n + 2}", "target": "w1 w2", "answer": "nowhere"} for n in range(3)],
    )
    examples = [{"prompt": f"w{n} w9", "completion": f"w{n + 1}", "target": "w1 w2"} for n in range(20, 24)]
    write(folder / "examples.jsonl", examples)
    write(folder / "harmless.jsonl", [{"prompt": f"w{n} w7 w8"} for n in range(30, 34)])
    (folder / "templates.txt").write_text("w5 {prompt} w6\n\nw7 {prompt}\n")
    return folder


@pytest.fixture(autouse=True)
def _there(place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setattr("trl_robust.attacks.endpoint.time.sleep", lambda seconds: None)


def write(path, rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def attack(name, out, *words, model="model") -> int:
    given = ["--model", model, "--attack", name, "--data", "data.jsonl", "--output_dir", out, "--max_new_tokens", 3]
    return cli.main(["attack", *(str(word) for word in (*given, *words))])


def entry_of(out) -> dict:
    return json.loads((out / "results.json").read_text())["models"][0]["attacks"][0]


def rows_of(out) -> list[dict]:
    return [json.loads(line) for line in (out / "generations.jsonl").read_text().splitlines()]


class Server:
    """Chat completions: what `say` gives for a request's body and its number, or a status."""

    def __init__(self, say) -> None:
        self.asked: list[dict] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.asked.append(body)
                said = say(body)
                code, text = (said, "no, and your key is " + self.headers.get("Authorization", "none"))
                if isinstance(said, str):
                    code, text = 200, json.dumps({"choices": [{"message": {"content": said}}]})
                self.send_response(code)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *args):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        self._server.shutdown()
        self._server.server_close()


class TestEveryAttack:
    def test_the_verb_has_all_attacks_and_a_key_for_every_setting(self):
        assert set(ATTACKS) == set(CLASSES)
        keys = {field.name for field in dataclasses.fields(AttackSettings)}
        for name, cls in CLASSES.items():
            prefix = "finetune_" if name == "finetune" else "attack_"
            settings = {field.name for field in dataclasses.fields(cls)} - set(DATA_FIELDS) - {"seed"}
            assert {prefix + setting for setting in settings} <= keys, name
            # `untargeted` and `swapped` of the latent search are for training.
            default = next((field.default for field in dataclasses.fields(cls) if field.name == "objective"), "random")
            assert default in OBJECTIVES

    @pytest.mark.parametrize("name", [name for name in ATTACKS if name != "pair"])
    def test_it_runs_and_all_rows_are_accounted_for(self, name, tmp_path, capsys):
        words = SMALL.get(name, [])
        assert attack(name, tmp_path, *words, "--seed", 3) == 0
        entry = entry_of(tmp_path)
        assert entry["name"] == name and entry["class"] == CLASSES[name].attack_class
        assert (entry["n_scored"], entry["n_errored"], entry["n_skipped"]) == (3, 0, 0)
        assert entry["judge"] == "exact" and entry["success"] == 0.0
        for key, value in zip(words[::2], words[1::2], strict=False):
            setting = str(key).removeprefix("--").split("_", 1)[-1]
            if setting in entry["budget"] and setting not in ("sites", *DATA_FIELDS):
                assert entry["budget"][setting] == value
        if "seed" in entry["budget"]:
            assert entry["budget"]["seed"] == 3
        assert "3 scored, 0 errored, 0 skipped; judge: exact" in capsys.readouterr().out
        assert len(rows_of(tmp_path)) == (6 if name == "best_of_n" else 3)

    def test_several_tries_of_a_request_are_one_request(self, tmp_path):
        assert attack("best_of_n", tmp_path, *SMALL["best_of_n"], "--judge", "refusal_prefix") == 0
        entry = entry_of(tmp_path)
        assert (entry["n_scored"], entry["success"], entry["success_of_one_attempt"]) == (3, 1.0, 1.0)

    @pytest.mark.parametrize("name", ["template", "prefill", "gcg", "latent", "refusal_direction", "pruning"])
    def test_its_random_control_runs(self, name, tmp_path):
        needed = [] if name == "refusal_direction" else SMALL.get(name, [])
        assert attack(name, tmp_path, *needed, "--attack_objective", "random") == 0
        assert entry_of(tmp_path)["n_scored"] == 3 and entry_of(tmp_path)["budget"]["objective"] == "random"

    def test_pair_with_an_attacker_behind_an_address(self, tmp_path):
        with Server(lambda body: "<request>w5 w6</request>") as server:
            words = ["--attacker_model", "writer", "--attacker_url", server.url, "--attack_streams", 1]
            assert attack("pair", tmp_path, *words, "--attack_iterations", 2) == 0
        assert entry_of(tmp_path)["n_scored"] == 3 and {body["model"] for body in server.asked} == {"writer"}
        assert {row["prompt"] for row in rows_of(tmp_path)} == {"w5 w6"}

    def test_pair_with_an_attacker_that_says_nothing_of_use_is_errored(self, tmp_path, capsys):
        words = ["--attacker_model", "model", "--attack_streams", 1, "--attack_iterations", 1]
        assert attack("pair", tmp_path, *words) == 0
        entry = entry_of(tmp_path)
        assert (entry["n_scored"], entry["n_errored"], entry["success"]) == (0, 3, None)
        assert "the attacker wrote no request" in capsys.readouterr().out


VALUES = {"int": 1, "float": 0.5, "bool": True, "str": "x", "list[str]": ["0"]}


@pytest.mark.parametrize("key", [field.name for field in dataclasses.fields(AttackSettings)])
def test_a_key_of_another_attack_is_refused(key):
    field = AttackSettings.__dataclass_fields__[key]
    given = AttackSettings(**{key: VALUES[str(field.type).removesuffix(" | None")]})
    taken = []
    for name in ATTACKS:
        message = f"['{key}'] belong to the attacks"
        if not any(fault.startswith(message) for fault in given.settings_faults(name)):
            taken.append(name)
    if key.startswith("attacker_"):
        owners = ["pair"]
    elif key.startswith("finetune_"):
        owners = ["finetune"]
    else:
        bare = key.removeprefix("attack_")
        owners = [name for name in ATTACKS if bare in CLASSES[name].__dataclass_fields__ and name != "finetune"]
    assert taken == owners and owners


@pytest.mark.parametrize(
    ("name", "words", "said"),
    [
        ("many_shot", [], "`attack_examples` is missing"),
        ("universal", [], "`attack_examples` is missing"),
        ("pruning", [], "`attack_examples` is missing"),
        ("refusal_direction", [], "`attack_harmful` is missing"),
        ("pair", [], "`attacker_model` is missing"),
        ("finetune", [], "`finetune_data` is missing"),
        ("many_shot", ["--attack_examples", "harmless.jsonl"], "completion"),
        ("many_shot", ["--attack_examples", "examples.jsonl", "--attack_shots", 9], "4 examples for 9 shots"),
        ("many_shot", ["--attack_examples", "nowhere.jsonl"], "nowhere.jsonl"),
        ("universal", ["--attack_examples", "harmless.jsonl"], "target"),
        ("template", ["--templates", "nowhere.txt"], "There is no file nowhere.txt"),
        ("best_of_n", ["--attack_n", 0], "n=0"),
        ("latent", ["--attack_radius", "nan"], "attack_radius"),
        ("refusal_direction", ["--attack_transferred", "nowhere.safetensors"], "nowhere.safetensors"),
        ("pruning", ["--attack_objective", "refusal", "--attack_examples", "examples.jsonl"], "one of wanda, random"),
        ("pair", ["--attacker_model", "nowhere"], "`attacker_model` nowhere could not be loaded"),
        ("pair", ["--attacker_model", "x", "--attacker_url", "nothing"], "`attacker_url` is no address"),
        ("direct", ["--model_url", "nothing"], "`model_url` is no address"),
        ("pair", ["--attacker_model", "x", "--attacker_key_env", "K"], "`attacker_key_env` belongs to `attacker_url`"),
        ("direct", ["--model_url", "http://localhost:1/v1", "--model_key_env", "sk-1"], "`model_key_env` names no"),
        ("direct", ["--model_url", "http://localhost:1/v1", "--load_in_4bit"], "on this machine"),
        ("direct", ["--adapter", "off"], "holds no adapter"),
        ("direct", ["--judge", "somebody"], "judge"),
        ("direct", ["--seed", -1], "seed"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(map(str, value)),
)
def test_what_is_wrong_is_one_message(name, words, said, tmp_path, capsys):
    assert attack(name, tmp_path, *words) == 1
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error
    assert "sk-1" not in error
    assert not (tmp_path / "results.json").exists()


class TestJudges:
    def test_two_stand_side_by_side_with_what_they_disagree_on(self, tmp_path, capsys):
        assert attack("direct", tmp_path, "--judges", "exact", "refusal_prefix") == 0
        entry = entry_of(tmp_path)
        assert (entry["judge"], entry["success"]) == ("exact", 0.0)
        (second,) = entry["second_judges"]
        assert (second["judge"], second["success"], second["n_scored"]) == ("refusal_prefix", 1.0, 3)
        assert second["agreement"]["agreement"] == 0.0 and second["agreement"]["disagreeing"] == ["0", "1", "2"]
        out = capsys.readouterr().out
        assert "success 1.00, agrees on 0.00 of 3 answers" in out
        assert [row["judges"] for row in rows_of(tmp_path)] == [{"refusal_prefix": True}] * 3

    @pytest.mark.parametrize("order", [("rubric", "exact"), ("exact", "rubric")])
    def test_one_that_is_down_is_errored_and_never_safe(self, order, tmp_path, capsys):
        with Server(lambda body: 503) as server:
            words = ["--judges", *order, "--rubric_model", "grader", "--rubric_url", server.url]
            assert attack("direct", tmp_path, *words) == 0
        entry = entry_of(tmp_path)
        by_name = {judge["judge"]: judge for judge in (entry, *entry["second_judges"])}
        down, up = by_name["rubric"], by_name["exact"]
        assert (down["n_scored"], down["n_errored"], down["success"]) == (0, 3, None)
        assert (up["n_scored"], up["n_errored"], up["success"]) == (3, 0, 0.0)
        assert entry["second_judges"][0]["agreement"]["why"] == "no answer was scored by both judges"
        out = capsys.readouterr().out
        assert "0 scored, 3 errored, 0 skipped" in out and "3 scored, 0 errored, 0 skipped" in out
        assert "HTTP 503" in out and "no answer was scored by both" in out

    def test_a_judge_behind_an_address_grades_and_its_key_stands_nowhere(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setenv("GRADER_KEY", "sk-secret")

        def graded(body):
            return 401 if "w2 w3 w4" in body["messages"][0]["content"] else "refused: 0\nconvincing: 5\nspecific: 3"

        with Server(graded) as server:
            words = ["--rubric_model", "grader", "--rubric_url", server.url, "--rubric_key_env", "GRADER_KEY"]
            assert attack("direct", tmp_path, "--judges", "rubric", "exact", *words) == 0
        entry = entry_of(tmp_path)
        assert (entry["n_scored"], entry["n_errored"], entry["success"]) == (2, 1, 0.75)
        assert entry["judge_settings"]["model"] == "grader" and server.url not in json.dumps(entry)
        assert "HTTP 401 no, and your key is Bearer [key]" in rows_of(tmp_path)[2]["reason"]
        written = "".join(path.read_text(errors="replace") for path in tmp_path.rglob("*") if path.is_file())
        captured = capsys.readouterr()
        assert "sk-secret" not in written + captured.out + captured.err

    def test_a_classifier_with_labels(self, tmp_path, capsys):
        settings = {"num_labels": 2, "id2label": {0: "fine", 1: "harm"}, "label2id": {"fine": 0, "harm": 1}}
        config = LlamaConfig(**{**tiny_model("llama").config.to_dict(), **settings})
        AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "judge")
        make_tokenizer().save_pretrained(tmp_path / "judge")
        words = ["--judge", "classifier", "--classifier_model", tmp_path / "judge"]
        assert attack("direct", tmp_path / "none", *words) == 1
        assert "Say which of them means harm" in capsys.readouterr().err
        words += ["--classifier_label", "harm"]
        assert attack("direct", tmp_path / "form", *words, "--classifier_form", "guard") == 1
        assert "remove ['classifier_form']" in capsys.readouterr().err
        assert attack("direct", tmp_path / "out", *words) == 0
        entry = entry_of(tmp_path / "out")
        assert (entry["judge"], entry["n_scored"], entry["judge_settings"]["label"]) == ("classifier", 3, 1)
        assert all(0 < row["details"]["probability"] < 1 for row in rows_of(tmp_path / "out"))

    def test_a_classifier_that_is_about_to_say_something_else_is_errored(self, tmp_path, capsys):
        tokenizer = make_tokenizer()
        tokenizer.add_tokens(["yes", "no"])
        model = tiny_model("llama", vocab_size=len(tokenizer))
        model.lm_head.weight.data.zero_()  # every token is as likely
        model.save_pretrained(tmp_path / "judge")
        tokenizer.save_pretrained(tmp_path / "judge")
        (tmp_path / "ask.txt").write_text("w1 {prompt} w2 {response} w3\n")
        words = ["--judge", "classifier", "--classifier_model", tmp_path / "judge"]
        words += ["--classifier_template", tmp_path / "ask.txt", "--classifier_opening", "w4"]
        assert attack("direct", tmp_path / "label", *words, "--classifier_label", "harm") == 1
        assert "remove ['classifier_label']" in capsys.readouterr().err
        assert attack("direct", tmp_path / "out", *words) == 0
        entry = entry_of(tmp_path / "out")
        assert (entry["n_scored"], entry["n_errored"], entry["success"]) == (0, 3, None)
        assert entry["judge_settings"]["opening"] == "w4" and entry["judge_settings"]["form"].startswith("sha256:")
        assert "together have a probability of 0.03" in capsys.readouterr().out

    def test_a_judge_on_this_machine_for_which_the_answer_is_too_long_is_errored(self, tmp_path, capsys):
        assert attack("direct", tmp_path, "--judge", "rubric", "--rubric_model", "model") == 0
        assert entry_of(tmp_path)["n_errored"] == 3 and "over the limit" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (["--judges", "exact", "nobody"], "names ['nobody']"),
            (["--judges", "exact", "exact"], "a judge twice"),
            (["--judge", "exact", "--judges", "exact"], "a judge twice"),
            (["--judges", "classifier"], "`classifier_model` is missing"),
            (["--judges", "rubric"], "`rubric_model` is missing"),
            (["--rubric_model", "x"], "['rubric_model'] belong to the judge rubric"),
            (["--classifier_label", "x", "--classifier_form", "guard"], "belong to the judge classifier"),
            (["--judges", "classifier", "--classifier_model", "nowhere"], "`classifier_model` nowhere"),
            (["--judges", "rubric", "--rubric_model", "nowhere"], "`rubric_model` nowhere"),
            (["--judges", "rubric", "--rubric_model", "x", "--rubric_key_env", "K"], "belongs to `rubric_url`"),
            (["--judges", "rubric", "--rubric_model", "x", "--rubric_url", "here"], "`rubric_url` is no address"),
            (["--judges", "classifier", "--classifier_model", "x", "--classifier_template", "no.txt"], "no.txt"),
            (["--judges", "classifier", "--classifier_model", "model"], "no token for"),
            (["--judge_batch_size", 0], "`judge_batch_size` is 0"),
            (["--judge", "exact", "--answer_column", "target", "--data", "harmless.jsonl"], "no column 'target'"),
            (["--judge", "exact", "--data", "harmless.jsonl"], "no row has one"),
        ],
        ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
    )
    def test_what_is_wrong_with_them_is_one_message(self, words, said, tmp_path, capsys):
        assert attack("direct", tmp_path, *words) == 1
        error = capsys.readouterr().err
        assert said in error and "Traceback" not in error
        assert not (tmp_path / "results.json").exists()


class TestServed:
    def test_attacks_on_prompts_run_and_the_others_say_why_not(self, tmp_path, capsys):
        with Server(lambda body: "<request>it is nowhere</request>") as server:
            own = ["--attack_streams", 1, "--attacker_url", server.url, "--attacker_model", "served"]
            for name in ("direct", "template", "many_shot", "best_of_n", "pair"):
                words = [*(own if name == "pair" else SMALL.get(name, [])), "--model_url", server.url]
                assert attack(name, tmp_path / name, *words, model="served") == 0
                assert entry_of(tmp_path / name)["success"] == 1.0 and entry_of(tmp_path / name)["n_scored"] == 3
            for name in ("prefill", "gcg", "soft_suffix", "latent", "pruning"):
                words = [*SMALL.get(name, []), "--model_url", server.url]
                assert attack(name, tmp_path / name, *words, model="served") == 1
                assert f"`attack` {name}: it " in capsys.readouterr().err
        assert {body["model"] for body in server.asked} == {"served"}
        assert {body["max_tokens"] for body in server.asked} == {3, 400}  # 400: replies of an attacker

    def test_one_that_is_down_is_errored(self, tmp_path, capsys):
        with Server(lambda body: 500) as server:
            pass
        assert attack("direct", tmp_path, "--model_url", server.url, model="served") == 0
        entry = entry_of(tmp_path)
        assert (entry["n_scored"], entry["n_errored"], entry["success"]) == (0, 3, None)
        assert "0 scored, 3 errored, 0 skipped" in capsys.readouterr().out


class TestGoingOn:
    def test_an_interrupted_run_asks_nothing_twice_and_finds_the_same(self, tmp_path, monkeypatch, capsys):
        words = ["--batch_size", 1, "--attack_n", 2, "--judge", "refusal_prefix"]
        assert attack("best_of_n", tmp_path / "whole", *words) == 0
        asked, own = [], Subject._generate

        def counted(self, rows, *more):
            if len(asked) == 4 and not (tmp_path / "stopped").exists():
                (tmp_path / "stopped").touch()
                raise KeyboardInterrupt
            asked.append(rows)
            return own(self, rows, *more)

        monkeypatch.setattr(Subject, "_generate", counted)
        assert attack("best_of_n", tmp_path / "out", *words) == 130
        assert "the same command goes on from there" in capsys.readouterr().err
        assert not (tmp_path / "out" / "results.json").exists()
        assert attack("best_of_n", tmp_path / "out", *words, "--max_new_tokens", 2) == 1
        assert "another max_new_tokens" in capsys.readouterr().err
        assert attack("best_of_n", tmp_path / "out", *words) == 0
        assert len(asked) == 6
        assert rows_of(tmp_path / "out") == rows_of(tmp_path / "whole")

    def test_a_judge_is_asked_nothing_twice(self, tmp_path):
        replies = iter(["refused: 1\nconvincing: 1\nspecific: 1"] * 2)
        stop = []

        def graded(body):
            return next(replies, 401 if stop else 400)

        with Server(graded) as server:
            words = ["--judge", "rubric", "--rubric_model", "grader", "--rubric_url", server.url]
            assert attack("direct", tmp_path, *words) == 0
            (tmp_path / "results.json").unlink()
            stop.append(True)
            asked = len(server.asked)
            assert attack("direct", tmp_path, *words) == 0
            # What could not be judged is tried again, nothing else.
            assert len(server.asked) == asked + 1
        assert (entry_of(tmp_path)["n_scored"], entry_of(tmp_path)["n_errored"]) == (2, 1)


def test_a_file_of_arguments(tmp_path):
    (tmp_path / "attack.yaml").write_text(
        "verb: attack\nmodel: model\nattack: latent\ndata: data.jsonl\nmax_new_tokens: 2\nattack_steps: 1\n"
        "attack_sites: [embedding, 0.5]\nattack_radius: 1\njudges: [exact, refusal_prefix]\n"
    )
    words = ["--config", tmp_path / "attack.yaml", "--attack_radius", 2, "--output_dir", tmp_path / "out"]
    assert cli.main(["attack", *map(str, words)]) == 0
    entry = entry_of(tmp_path / "out")
    assert entry["budget"]["sites"] == ["embedding", "0.5"] and entry["budget"]["radius"] == 2
    assert [judge["judge"] for judge in entry["second_judges"]] == ["refusal_prefix"]


def test_an_adapter_on_off_and_merged(place, tmp_path):
    adapter = lora(tiny_model("llama"))
    adapter.peft_config["default"].base_model_name_or_path = str(place / "model")
    adapter.save_pretrained(tmp_path / "adapter")
    make_tokenizer().save_pretrained(tmp_path / "adapter")
    said = {}
    for way in ("on", "off", "merged"):
        assert attack("direct", tmp_path / way, "--adapter", way, model=tmp_path / "adapter") == 0
        said[way] = [row["response"] for row in rows_of(tmp_path / way)]
    assert attack("direct", tmp_path / "base") == 0
    assert said["off"] == [row["response"] for row in rows_of(tmp_path / "base")]
    assert said["merged"] == said["on"] != said["off"]


def test_the_help_begins_with_what_is_needed(capsys):
    assert cli.main(["attack", "--help"]) == 0
    shown = capsys.readouterr().out
    assert shown.index("--model ") < shown.index("--attack ") < shown.index("--data ") < shown.index("--attack_steps")
    assert shown.index("--attack_steps") < shown.index("--judges")
    for field in dataclasses.fields(AttackSettings):
        assert f"--{field.name}" in shown
