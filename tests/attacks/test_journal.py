"""Every attack, stopped in the middle and run again: the same answers, and nothing asked twice."""

from __future__ import annotations

import json
from collections import Counter
from typing import get_args

import pytest
import torch
from tiny import WORDS, make_tokenizer, tiny_model

from trl_robust.attacks import (
    GCG,
    PAIR,
    Attack,
    AttackRow,
    BestOfN,
    Direct,
    Embedding,
    Finetune,
    Latent,
    LocalAttacker,
    ManyShot,
    Prefill,
    Pruning,
    RefusalDirection,
    SoftSuffix,
    Subject,
    Template,
    Universal,
)
from trl_robust.attacks import latent as latent_module
from trl_robust.attacks import pair as pair_module
from trl_robust.attacks import soft_suffix as soft_suffix_module

ROWS = [
    AttackRow(str(number), " ".join(WORDS[: 2 + number % 4]), " ".join(WORDS[5:7]), WORDS[number])
    for number in range(5)
]
EXAMPLES = [
    {"prompt": f"{WORDS[20 + i]} {WORDS[21 + i]}", "target": WORDS[7], "completion": WORDS[8]} for i in range(4)
]
HARMLESS = [{"prompt": f"{WORDS[30 + i]} {WORDS[31 + i]}"} for i in range(4)]
GREEDY = {"suffix_tokens": 2, "steps": 2, "candidates": 4, "topk": 4, "stop_loss": 0.0}


def _subject(seed: int = 0) -> Subject:
    return Subject(tiny_model("llama", seed=seed), make_tokenizer(), max_new_tokens=3, batch_size=2, progress=False)


class Scripted:
    """An attacker that never writes the same twice, as one behind an address may."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def reply(self, messages):
        start = sum(self.calls)
        self.calls.append(len(messages))
        return [f"<request>{WORDS[(start + i) % len(WORDS)]} w1</request>" for i in range(len(messages))]


ATTACKS = {
    "direct": lambda: Direct(),
    "template": lambda: Template((f"{WORDS[0]} {{prompt}} {WORDS[1]}",)),
    "template, random": lambda: Template((f"{WORDS[0]} {{prompt}} {WORDS[1]}",), objective="random"),
    "prefill": lambda: Prefill(),
    "prefill, random": lambda: Prefill(objective="random"),
    "many_shot": lambda: ManyShot(EXAMPLES, shots=2),
    "best_of_n": lambda: BestOfN(n=2),
    "gcg": lambda: GCG(**GREEDY),
    "gcg, random": lambda: GCG(**GREEDY, objective="random"),
    "pair": lambda: PAIR(Scripted(), streams=2, iterations=2),
    "soft_suffix": lambda: SoftSuffix(tokens=2, steps=2, learning_rate=0.1),
    "soft_suffix, random": lambda: SoftSuffix(tokens=2, steps=2, learning_rate=0.1, objective="random"),
    "embedding": lambda: Embedding(steps=2),
    "latent": lambda: Latent(sites=(1,), steps=2),
    "latent, random": lambda: Latent(sites=(1,), radius=2.0, objective="random"),
    "universal": lambda: Universal(EXAMPLES, sites=(1,), steps=2),
    "refusal_direction": lambda: RefusalDirection(EXAMPLES, HARMLESS),
    "pruning": lambda: Pruning(EXAMPLES, sparsity=0.5),
    "pruning, random": lambda: Pruning(EXAMPLES, sparsity=0.5, objective="random"),
    "finetune": lambda: Finetune(EXAMPLES, steps=2, learning_rate=1e-2),
    "finetune, lora": lambda: Finetune(EXAMPLES, steps=2, learning_rate=1e-2, method="lora"),
}
each_attack = pytest.mark.parametrize("make", ATTACKS.values(), ids=list(ATTACKS))


def test_the_table_holds_every_attack():
    names = {attack.name for attack in get_args(Attack)}
    assert {make().name for make in ATTACKS.values()} == names and len(names) == 14


class Kept(dict):
    """A journal that keeps text, as a file does."""

    def __setitem__(self, key, value):
        assert key not in self
        super().__setitem__(key, json.dumps(value))

    def __getitem__(self, key):
        return json.loads(super().__getitem__(key))


class Killed(BaseException):
    """The process ends."""


@pytest.fixture
def model_calls(monkeypatch):
    """Batches that a model has answered. `kill_at` ends the run instead of the call of that number."""
    generate = Subject._generate

    class Calls(list):
        kill_at = -1

    calls = Calls()

    def watched(self, rows, *more):
        if len(calls) == calls.kill_at:
            raise Killed
        found = generate(self, rows, *more)
        calls.append((id(self.model), tuple(map(tuple, rows))))
        return found

    monkeypatch.setattr(Subject, "_generate", watched)
    return calls


def _shown(found) -> list[dict]:
    return [vars(generation) for generation in found]


def _run_in_two(attack, subject, rows, calls, kill_at) -> tuple[list[dict], Kept]:
    """Runs until the kill, and again with what was kept until then."""
    journal = subject.journal = Kept()
    calls.clear()
    calls.kill_at = kill_at
    with pytest.raises(Killed):
        attack.run(subject, rows)
    calls.kill_at = -1
    return _shown(attack.run(subject, rows)), journal


def _untouched(model, before) -> bool:
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
    same = all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    return same and not hooks and not model.training


@each_attack
def test_a_stopped_attack_goes_on_to_the_same_answers_and_asks_nothing_twice(make, model_calls):
    subject = _subject()
    before = {name: tensor.clone() for name, tensor in subject.model.state_dict().items()}
    whole = _shown(make().run(subject, ROWS))
    every = Counter(model_calls)
    assert len(model_calls) >= 3 and all(generation["status"] == "generated" for generation in whole)
    for kill_at in (1, len(model_calls) - 1):
        attack = make()
        found, journal = _run_in_two(attack, subject, ROWS, model_calls, kill_at)
        assert found == whole
        assert Counter(model_calls) == every
        assert _untouched(subject.model, before)
        # All is there: nothing is asked any more.
        model_calls.kill_at = len(model_calls)
        subject.journal = Kept(journal)
        assert _shown(attack.run(subject, ROWS)) == whole


@pytest.mark.parametrize(
    ("module", "attack"),
    [
        (latent_module, Latent(sites=(1,), steps=2)),
        (soft_suffix_module, SoftSuffix(tokens=2, steps=2)),
    ],
    ids=["latent", "soft_suffix"],
)
def test_what_is_answered_is_not_searched_again(module, attack, model_calls, monkeypatch):
    search, searched = module.find_perturbation, []
    monkeypatch.setattr(module, "find_perturbation", lambda *a, **k: searched.append(1) or search(*a, **k))
    _run_in_two(attack, _subject(), ROWS, model_calls, 2)
    # Three batches, and the one during whose answer it ended once more.
    assert len(searched) == 4


def test_a_failure_stands_in_the_journal_like_an_answer_and_a_kill_does_not(model_calls, monkeypatch):
    subject = _subject()
    subject.journal, generate = Kept(), Subject._generate
    failures = [RuntimeError("out of memory"), KeyboardInterrupt()]

    def failing(self, rows, *more):
        if failures:
            raise failures.pop(0)
        return generate(self, rows, *more)

    monkeypatch.setattr(Subject, "_generate", failing)
    with pytest.raises(KeyboardInterrupt):
        Direct().run(subject, ROWS)
    assert len(subject.journal) == 1
    found = Direct().run(subject, ROWS)
    assert [generation.status for generation in found] == ["errored"] * 2 + ["generated"] * 3
    assert found[0].reason == "RuntimeError: out of memory" and len(model_calls) == 2


def test_without_a_journal_nothing_is_kept(model_calls):
    subject = _subject()
    for _ in range(2):
        Direct().run(subject, ROWS)
    assert len(model_calls) == 6 and "journal" not in repr(subject)


def test_a_batch_of_other_rows_is_not_taken_for_the_one_that_was_answered(model_calls):
    subject = _subject()
    subject.journal = Kept()
    Direct().run(subject, ROWS)
    other = [AttackRow("x", f"{WORDS[9]} {WORDS[8]}"), *ROWS[1:]]
    found = Direct().run(subject, other)
    assert len(model_calls) == 4
    subject.journal = None
    assert _shown(found) == _shown(Direct().run(subject, other))


def test_batches_of_equal_prompts_are_told_apart(model_calls):
    subject, attack = _subject(), BestOfN(n=4, augment=0.0, temperature=2.0)
    whole = _shown(attack.run(subject, ROWS[:1]))
    assert len({it["response"] for it in whole}) == 4
    subject.journal = Kept()
    assert _shown(attack.run(subject, ROWS[:1])) == whole and len(subject.journal) == 2


# GCG


def test_a_suffix_is_searched_once(monkeypatch):
    attack, searched, search = GCG(**GREEDY), [], GCG.search
    ending: list[BaseException | None] = [None, RuntimeError("out of memory"), Killed()]

    def watched(self, subject, row, *more):
        searched.append(row.id)
        if ending and (error := ending.pop(0)):
            raise error
        return search(self, subject, row, *more)

    whole = _shown(attack.run(_subject(), ROWS))
    monkeypatch.setattr(GCG, "search", watched)
    subject = _subject()
    subject.journal = Kept()
    with pytest.raises(Killed):
        attack.run(subject, ROWS)
    found = _shown(attack.run(subject, ROWS))
    assert searched == ["0", "1", "2", "2", "3", "4"]
    # One that failed stays failed, so that the others are asked in the batches that they were asked in.
    assert (found[1]["status"], found[1]["reason"]) == ("errored", "RuntimeError: out of memory")
    assert [it["prompt"] for it in found[2:]] == [it["prompt"] for it in whole[2:]]
    assert found[0] == whole[0]


def test_rows_of_one_name_and_prompt_have_suffixes_for_their_own_targets():
    rows = [AttackRow("same", "w1 w2", target) for target in ("w3 w4", "w9 w8", "w15 w20")]
    subject = _subject()
    whole = [generation.prompt for generation in GCG(**GREEDY).run(subject, rows)]
    subject.journal = Kept()
    assert [generation.prompt for generation in GCG(**GREEDY).run(subject, rows)] == whole
    assert len(set(whole)) > 1


# PAIR


def test_replies_of_the_attacker_are_kept_portion_by_portion(model_calls, monkeypatch):
    monkeypatch.setattr(pair_module, "PORTION", 4)
    subject, attacker = _subject(), Scripted()
    whole = _shown(PAIR(attacker, streams=2, iterations=2).run(subject, ROWS))
    assert attacker.calls[:3] == [4, 4, 2]
    stopped, reply = Scripted(), Scripted.reply

    def dying(self, messages):
        if len(self.calls) == 1:
            monkeypatch.setattr(Scripted, "reply", reply)
            raise Killed
        return reply(self, messages)

    monkeypatch.setattr(Scripted, "reply", dying)
    subject.journal = Kept()
    attack = PAIR(stopped, streams=2, iterations=2)
    with pytest.raises(Killed):
        attack.run(subject, ROWS)
    assert len(subject.journal) == 1
    assert _shown(attack.run(subject, ROWS)) == whole
    assert stopped.calls == attacker.calls


def test_an_attacker_on_this_machine_is_not_asked_twice_either(model_calls, monkeypatch):
    # A tiny model writes no marks, and every reply of it is to be tried.
    monkeypatch.setattr(pair_module, "_written", lambda reply: reply or None)
    other = _subject(seed=3)

    def attack() -> PAIR:
        return PAIR(LocalAttacker(other), streams=2, iterations=2)

    # Tiny models do not refuse: only the first iteration would be asked.
    monkeypatch.setattr(pair_module, "_refused", lambda generation: True)
    subject = _subject()
    whole = _shown(attack().run(subject, ROWS[:3]))
    every = Counter(model_calls)
    assert {model for model, _ in every} == {id(subject.model), id(other.model)}
    for kill_at in range(1, len(model_calls)):
        found, _ = _run_in_two(attack(), subject, ROWS[:3], model_calls, kill_at)
        assert found == whole and Counter(model_calls) == every
    assert other.journal is None


def test_why_the_attacker_failed_is_known_after_the_run_was_stopped(model_calls):
    class Mute:
        problem = None

        def reply(self, messages):
            self.problem = "HTTP 401"
            return [None] * len(messages)

    subject = _subject()
    subject.journal = Kept()
    whole = _shown(PAIR(Mute(), streams=1, iterations=1).run(subject, ROWS))
    assert all("(HTTP 401)" in it["reason"] for it in whole)
    later = Mute()
    later.reply = None  # is not asked
    assert _shown(PAIR(later, streams=1, iterations=1).run(subject, ROWS)) == whole
