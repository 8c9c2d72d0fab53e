"""Defects D19 to D24 of the reference code (lat.md 8), one sentence each that must hold here."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from dpo_runs import make as make_dpo
from runs import ATTACK, make, train, weights
from test_defects import PACKAGE, sources
from tiny import (
    HIDDEN,
    batch,
    collate,
    lora,
    make_tokenizer,
    preference_data,
    rows,
    shared_model,
    tiny_model,
)
from transformers import TrainerCallback

from trl_robust import (
    LATDPOConfig,
    LATRMUConfig,
    LATSFTConfig,
    ThreatModel,
    find_perturbation,
)
from trl_robust.attacks import AttackRow, Latent, Subject
from trl_robust.data import as_conversation
from trl_robust.inner import Ablation, CachedPrefix, Perturbation
from trl_robust.objectives import label_logits, toward
from trl_robust.threat import selected_ranks


def prompts_of(trainer):
    """Tokens of the prompts as they are trained."""
    if "prompt_ids" in trainer.train_dataset.column_names:
        return [row["prompt_ids"] for row in trainer.train_dataset]
    return [
        [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label == -100]
        for row in trainer.train_dataset
    ]


@pytest.mark.parametrize("maker", [make, make_dpo], ids=["sft", "dpo"])
@pytest.mark.parametrize("kind", ["conversations", "made conversations", "with a system prompt"])
def test_d19_an_attack_feeds_the_tokens_that_a_prompt_was_trained_with(tmp_path, maker, kind):
    data = preference_data(6, conversational=kind == "conversations")
    if kind != "conversations":
        data = as_conversation(data, "w9 w9 w9" if kind == "with a system prompt" else None)
    trainer = maker(tmp_path, **({**ATTACK, "away_coef": 0.0} if maker is make else {}), data=data)
    subject = Subject(trainer.model, make_tokenizer())
    fed = [subject.encode(row["prompt"]) for row in data]
    assert prompts_of(trainer) == fed
    assert all(tokens[-1] == subject.tokenizer.convert_tokens_to_ids("<asst>") for tokens in fed)
    if kind == "with a system prompt":
        system = subject.tokenizer.convert_tokens_to_ids("w9")
        assert all(tokens.count(system) >= 3 for tokens in fed)
    # A plain request is one user turn.
    if kind == "made conversations":
        assert [subject.encode(row["prompt"]) for row in preference_data(6)] == fed
    # The attack that searches feeds them too, and the opening it draws the model to right behind.
    attack_rows = [AttackRow(str(n), row["prompt"], "w7 w8") for n, row in enumerate(data)]
    found = Latent._batch(subject, attack_rows)
    for row, tokens in enumerate(fed):
        real = found["input_ids"][row][found["attention_mask"][row].bool()].tolist()
        assert real == [*tokens, *subject.encode_opening("w7 w8")]


def test_d19_a_plain_prompt_of_a_tokenizer_without_a_template_is_fed_as_it_was_trained(tmp_path):
    data, tokenizer = preference_data(6), make_tokenizer()
    tokenizer.chat_template = None
    trainer = make(tmp_path, **ATTACK, data=data)
    subject = Subject(trainer.model, tokenizer)
    assert prompts_of(trainer) == [subject.encode(row["prompt"]) for row in data]


def test_d20_padding_on_the_left_gives_the_attack_and_the_loss_of_padding_on_the_right(llama):
    threat = ThreatModel(["embedding", 2], radius=0.3)
    found = []
    for side in ("right", "left"):
        given = batch(side=side, away=True)
        worst = find_perturbation(llama, given, threat, steps=3, away_coef=0.5, optimizer="steepest")
        with worst.installed(llama), torch.no_grad():
            kept = label_logits(llama, given["input_ids"], given["attention_mask"], given["labels"])
        found.append((worst, toward(kept.logits, kept.targets)))
    (right, one), (left, other) = found
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    for site in right.deltas:
        torch.testing.assert_close(right.deltas[site], left.deltas[site], rtol=1e-3, atol=1e-3)


def test_d20_generation_under_a_perturbation_is_the_same_with_a_cache_in_chunks_and_without(llama):
    prompts = collate([(prompt, []) for prompt, _, _ in rows()], "left")
    selected = selected_ranks(batch(), "prompt")
    generator = torch.Generator().manual_seed(0)
    deltas = {site: 0.5 * torch.randn(*selected.shape, HIDDEN, generator=generator) for site in ("embedding", 1, 3)}
    given = Perturbation(deltas, selected)
    keys = {key: prompts[key] for key in ("input_ids", "attention_mask")}
    keys |= {"max_new_tokens": 6, "min_new_tokens": 6}
    clean = llama.generate(**keys)
    with given.installed(llama):
        whole = llama.generate(**keys, use_cache=False)
        assert not torch.equal(whole, clean)
        for more in ({}, {"prefill_chunk_size": 3}):
            assert torch.equal(llama.generate(**keys, **more), whole)
        # Rows in another order than the perturbation's would get a neighbour's: refused, not guessed.
        for more in ({"num_return_sequences": 2, "do_sample": True}, {"num_beams": 2}):
            with pytest.raises(RuntimeError, match="8 rows reached a perturbation of 4 rows"):
                llama.generate(**keys, **more)
        with pytest.raises(RuntimeError, match="two-dimensional attention mask"):
            llama.generate(**keys, cache_implementation="static")
    one = collate([(rows()[0][0], [])])
    alone = Perturbation({site: delta[:1] for site, delta in deltas.items()}, selected[:1])
    with alone.installed(llama):
        keys |= {key: one[key] for key in ("input_ids", "attention_mask")}
        shortest = llama.generate(**keys)
    assert torch.equal(shortest[0], whole[0, -shortest.shape[1] :])


@pytest.mark.parametrize("name", ["llama", "gpt2"])  # relative and absolute positions
def test_d20_positions_are_counted_from_the_first_real_token(name):
    model, left = shared_model(name), batch(side="left")
    kept = label_logits(model, left["input_ids"], left["attention_mask"], left["labels"])
    for row, (prompt, completion, _) in enumerate(rows()):
        one = collate([(prompt, completion)])
        alone = label_logits(model, one["input_ids"], one["attention_mask"], one["labels"])
        torch.testing.assert_close(alone.logits, kept.logits[kept.rows == row], rtol=1e-4, atol=1e-4)


def test_d21_a_model_trained_whole_is_trained_whole_and_the_optimiser_holds_what_is_trained(tmp_path):
    trainer = make(tmp_path, **{**ATTACK, "attack_steps": 1}, dropout=None, max_steps=1)
    start = weights(trainer)
    trainer.train()
    same = {name for name, value in weights(trainer).items() if torch.equal(value, start[name])}
    assert same == set()  # embedding, head and the last norm among them
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} <= set(start)

    def held(trainer):
        return {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}

    assert held(trainer) == {id(p) for p in trainer.model.parameters()}
    part = make(tmp_path, **{**ATTACK, "attack_steps": 1}, dropout=None, max_steps=1, trained_layers=["1"])
    part.train()
    assert held(part) == {id(p) for p in part.model.parameters() if p.requires_grad}
    assert held(part) == {id(p) for p in part.model.model.layers[1].parameters()}


IMPORT_ALL = """
import pkgutil, importlib, socket, sys
def refuse(*args, **kwargs): raise OSError("the network was asked")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
import trl_robust
names = [m.name for m in pkgutil.walk_packages(trl_robust.__path__, "trl_robust.") if not m.name.endswith("__main__")]
for name in names: importlib.import_module(name)
print(len(names))
"""


def test_d22_every_module_is_imported_without_the_network():
    done = subprocess.run([sys.executable, "-c", IMPORT_ALL], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 50


def test_d22_there_is_no_star_import_no_bare_except_and_no_exception_is_swallowed():
    found = []
    for path, tree in sources().items():
        for node in ast.walk(tree):
            star = isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names)
            handler = isinstance(node, ast.ExceptHandler)
            wide = handler and (node.type is None or getattr(node.type, "id", "") in ("Exception", "BaseException"))
            silent = wide and all(isinstance(line, ast.Pass) for line in node.body)
            if star or silent or (handler and node.type is None):
                found.append(f"{path}:{node.lineno}")
    assert found == []


def test_d22_every_dependency_is_a_released_package_with_a_lowest_version():
    project = PACKAGE.parent / "pyproject.toml"
    if not project.is_file():
        pytest.skip("the package is not run from a checkout")
    needed = tomllib.loads(project.read_text(encoding="utf-8"))["project"]["dependencies"]
    assert len(needed) > 5
    assert [line for line in needed if not re.fullmatch(r"[A-Za-z0-9_-]+>=[0-9.]+(,<[0-9.]+)?", line)] == []


@pytest.mark.parametrize("kind", ["perturbation", "ablation", "cached prefix"])
def test_d23_names_modules_and_saved_weights_are_the_same_while_hidden_states_are_changed(tmp_path, kind):
    model, found = lora(tiny_model()), batch()
    selected = selected_ranks(found, "prompt")
    deltas = {site: torch.ones(*selected.shape, HIDDEN) for site in ("embedding", 1)}
    direction = torch.nn.functional.normalize(torch.ones(HIDDEN), dim=0)
    change = {
        "perturbation": lambda: Perturbation(deltas, selected).installed(model),
        "ablation": lambda: Ablation({"embedding": direction, 1: direction}, selected).installed(model),
        "cached prefix": CachedPrefix(model, 1).resume_from,
    }[kind]
    if kind == "cached prefix":
        with change():  # the first pass fills the cache, the one below resumes from it
            model(input_ids=found["input_ids"], attention_mask=found["attention_mask"])

    def shape_of():
        return (
            [(name, id(parameter)) for name, parameter in model.named_parameters()],
            [(name, id(module), type(module)) for name, module in model.named_modules()],
            list(model.state_dict()),
        )

    before, values = shape_of(), {name: value.clone() for name, value in model.state_dict().items()}
    with change():
        model(input_ids=found["input_ids"], attention_mask=found["attention_mask"])
        assert shape_of() == before
        assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
        model.save_pretrained(tmp_path / "during")
    model.save_pretrained(tmp_path / "after")
    names = sorted(path.name for path in (tmp_path / "during").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "after").iterdir())
    saved = [(tmp_path / moment / "adapter_model.safetensors").read_bytes() for moment in ("during", "after")]
    assert saved[0] == saved[1]


class Counters(TrainerCallback):
    """How many steps AdamW thinks it has made, after every update."""

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        self.seen = [*getattr(self, "seen", []), *{int(entry["step"]) for entry in optimizer.state.values()}]


def test_d24_the_optimiser_keeps_its_state_from_attack_to_attack_unless_it_is_to_forget_it(tmp_path):
    for changes, expected in (({}, [1, 2, 3, 4]), ({"reset_optimizer": True}, [1, 2, 1, 2])):
        counters = Counters()
        settings = {**ATTACK, "attack_steps": 1, "updates_per_attack": 2, **changes}
        train(tmp_path, **settings, max_steps=4, callbacks=[counters])
        assert counters.seen == expected
    for config in (LATSFTConfig, LATDPOConfig, LATRMUConfig):
        defaults = config("unused", use_cpu=True, bf16=False)
        assert not (defaults.reset_optimizer or defaults.faithful or defaults.resets_optimizer)


@pytest.mark.parametrize("number", range(1, 25))
def test_every_defect_has_a_test(number):
    names = [
        node.name
        for path in Path(__file__).parent.glob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef)
    ]
    assert [name for name in names if name.startswith(f"test_d{number:02}_")]
