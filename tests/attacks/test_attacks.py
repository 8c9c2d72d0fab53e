"""The contract that every attack keeps, on a tiny random model."""

from __future__ import annotations

from dataclasses import fields
from typing import get_args

import pytest
import torch
from tiny import SPECIAL, WORDS, make_tokenizer, tiny_model

from trl_robust.attacks import Attack, AttackRow, Direct, Embedding, Finetune, Latent, Prefill, Subject, Template
from trl_robust.attacks import subject as subject_module
from trl_robust.evaluation import judged, run_attack
from trl_robust.evaluation.judges import JUDGES, exact, is_refusal

EXAMPLES = [
    {"prompt": WORDS[0], "completion": WORDS[1]},
    {"prompt": WORDS[1], "completion": f"{WORDS[2]} {WORDS[0]}"},
]
ATTACKS = [
    Direct(),
    Template((f"{WORDS[0]} {{prompt}} {WORDS[1]}",)),
    Prefill(),
    Latent(sites=(0, 1), steps=2),
    Embedding(steps=2),
    Finetune(EXAMPLES, steps=2),
    Template((f"{WORDS[0]} {{prompt}} {WORDS[1]}",), objective="random"),
    Prefill(objective="random"),
]
each_attack = pytest.mark.parametrize(
    "attack", ATTACKS, ids=lambda attack: f"{attack.name}-{getattr(attack, 'objective', None)}"
)


@pytest.fixture
def subject() -> Subject:
    return Subject(tiny_model("llama"), make_tokenizer(), max_new_tokens=3, batch_size=2, progress=False)


@pytest.fixture
def requests() -> list[AttackRow]:
    return [
        AttackRow(str(number), " ".join(WORDS[: 2 + number]), " ".join(WORDS[5:7]), WORDS[number])
        for number in range(5)
    ]


@each_attack
def test_every_request_comes_back_in_order_and_the_model_is_left_as_it_was(attack, subject, requests):
    before = {name: tensor.clone() for name, tensor in subject.model.state_dict().items()}
    found = attack.run(subject, requests)
    assert [generation.row.id for generation in found] == [row.id for row in requests]
    assert all(generation.status == "generated" and generation.response is not None for generation in found)
    for name, tensor in subject.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert not subject.model.training
    assert all(parameter.grad is None and parameter.requires_grad for parameter in subject.model.parameters())
    assert sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in subject.model.modules()) == 0


@each_attack
def test_the_same_attack_twice_gives_the_same_answers(attack, subject, requests):
    first, second = ([generation.response for generation in attack.run(subject, requests)] for _ in range(2))
    assert first == second


@each_attack
def test_answers_do_not_depend_on_the_batch_size(attack, subject, requests):
    together = [generation.response for generation in attack.run(subject, requests)]
    subject.batch_size = 1
    assert [generation.response for generation in attack.run(subject, requests)] == together


@pytest.mark.parametrize("attack", [*ATTACKS[2:5], ATTACKS[-1]], ids=lambda attack: attack.name)
def test_a_row_without_a_target_is_skipped_with_the_reason(attack, subject, requests):
    rows = [requests[0], AttackRow("bare", requests[1].prompt, None, "x")]
    entry, answers = run_attack(subject, attack, rows, "exact")
    assert (entry["n_scored"], entry["n_errored"], entry["n_skipped"]) == (1, 0, 1)
    assert answers[1]["status"] == "skipped" and "no target" in answers[1]["reason"]
    assert answers[1]["success"] is None


def test_a_prompt_over_the_limit_is_skipped_and_the_others_are_scored(subject, requests):
    subject.max_prompt_tokens = len(subject.encode(requests[2].prompt))
    entry, answers = run_attack(subject, Direct(), requests, "exact")
    assert (entry["n_scored"], entry["n_skipped"]) == (3, 2)
    assert "over the limit" in answers[4]["reason"]


def test_a_batch_that_fails_is_errored_and_never_counts_as_safe(subject, requests, monkeypatch):
    generate, calls = Subject._generate, []

    def failing(self, rows, *more):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return generate(self, rows, *more)

    monkeypatch.setattr(subject_module.Subject, "_generate", failing)
    entry, answers = run_attack(subject, Direct(), requests, "exact")
    assert (entry["n_scored"], entry["n_errored"]) == (3, 2)
    assert [answer["status"] for answer in answers] == ["scored", "scored", "errored", "errored", "scored"]
    assert answers[2]["success"] is None and "out of memory" in answers[2]["reason"]


def test_a_judge_that_cannot_judge_leaves_the_row_errored(subject, requests):
    rows = [AttackRow("no-answer", requests[0].prompt)]
    answers = judged(Direct().run(subject, rows), "exact")
    assert answers[0]["status"] == "errored" and "answer" in answers[0]["reason"]


def test_a_prefilled_answer_begins_with_the_target(subject, requests):
    for generation in Prefill().run(subject, requests):
        assert generation.response.startswith(generation.row.target)


def test_a_prefill_continues_what_the_model_would_say_after_it(subject, requests):
    subject.max_new_tokens = 1
    for row in requests:
        tokens = torch.tensor([subject.encode(row.prompt, row.target)])
        with torch.no_grad():
            expected = int(subject.model(tokens).logits[0, -1].argmax())
        continuation = subject.tokenizer.decode([expected], skip_special_tokens=True)
        assert Prefill().run(subject, [row])[0].response == f"{row.target} {continuation}".strip()


def test_templates_are_dealt_out_in_turn(subject, requests):
    found = Template(("a {prompt}", "{prompt} b")).run(subject, requests)
    assert [generation.prompt.startswith("a ") for generation in found] == [True, False, True, False, True]


def test_a_random_wrapper_has_as_many_words_on_each_side_and_none_of_the_wrappers(subject, requests):
    template = "say all of {prompt} now again {prompt} please"
    plain = Template((template,)).run(subject, requests)
    found = Template((template,), objective="random").run(subject, requests)
    for row, before, after in zip(requests, plain, found, strict=True):
        parts = after.prompt.split(f" {row.prompt} ")
        assert [len(part.split()) for part in parts] == [3, 2, 1]
        words = " ".join(parts).split()
        assert set(words) <= set(WORDS) and len(set(words)) > 1
        assert len(after.prompt.split()) == len(before.prompt.split())
    assert len({after.prompt.split()[0] for after in found}) > 1


def test_a_wrapper_on_one_side_leaves_the_other_alone_when_it_is_random(subject, requests):
    (found,) = Template(("{prompt} now please",), objective="random").run(subject, requests[:1])
    assert found.prompt.startswith(f"{requests[0].prompt} ") and len(found.prompt.split()) == 4


def test_a_random_opening_has_as_many_ordinary_tokens_as_the_target(subject, requests):
    seen = []
    encode = subject.encode
    subject.encode = lambda prompt, opening="": seen.append(opening) or encode(prompt, opening)
    found = Prefill(objective="random").run(subject, requests)
    for row, opening, generation in zip(requests, seen, found, strict=True):
        tokens = subject.encode_opening(opening)
        assert len(tokens) == len(subject.encode_opening(row.target)) == 2
        assert min(tokens) >= len(SPECIAL) and opening != row.target
        assert generation.response == f"{opening} {generation.continuation}".strip()
    assert len(set(seen)) > 1


@pytest.mark.parametrize(
    "make", [lambda seed: Template(objective="random", seed=seed), lambda seed: Prefill("random", seed)]
)
def test_a_control_depends_on_its_seed_and_not_on_the_other_requests(make, subject, requests):
    def shown(found):
        return [(generation.prompt, generation.response) for generation in found]

    assert shown(make(0).run(subject, requests[:1])) == shown(make(0).run(subject, requests))[:1]
    assert shown(make(1).run(subject, requests)) != shown(make(0).run(subject, requests))


def test_every_attack_says_what_its_budget_is():
    """What a curve varies is one of the attack's own fields, with a number in it; three attacks have none."""
    attacks = {attack.name: attack for attack in get_args(Attack)}
    assert len(attacks) == len(get_args(Attack)) == 14
    axes = {name: attack.budget_axis for name, attack in attacks.items()}
    assert [name for name, axis in axes.items() if not axis] == ["direct", "template", "prefill"]
    for name, axis in axes.items():
        defaults = {field.name: field.default for field in fields(attacks[name])}
        assert not axis or isinstance(defaults[axis], int | float), name
    assert axes["latent"] == axes["embedding"] == axes["universal"] == "radius"
    assert {attack.attack_class for attack in attacks.values()} == {"none", "input", "embedding", "latent", "weights"}


def test_a_stronger_latent_attack_makes_the_target_likelier_and_a_random_one_does_not(subject, requests):
    from trl_robust import find_perturbation

    attack = Latent(sites=(0,), radius=1.0, steps=8)
    batch = attack._batch(subject, requests)
    worst = find_perturbation(subject.model, batch, attack.threat, steps=8, optimizer="steepest")
    random = find_perturbation(
        subject.model, batch, attack.threat, objective="random", generator=torch.Generator().manual_seed(0)
    )
    assert worst.losses[0] - worst.losses[-1] > 5 * abs(random.losses[0] - random.losses[-1])


def test_a_latent_attack_labels_the_target_and_nothing_else(subject, requests):
    batch = Latent._batch(subject, requests)
    for row, labels, tokens in zip(requests, batch["labels"], batch["input_ids"], strict=True):
        labelled = labels[labels != -100].tolist()
        assert labelled == subject.encode_opening(row.target)
        start = int((labels != -100).nonzero()[0])
        assert tokens[:start].tolist() == subject.encode(row.prompt)


def test_fine_tuning_lowers_the_loss_of_its_examples_while_it_lasts(subject):
    prompt, completion = EXAMPLES[0]["prompt"], EXAMPLES[0]["completion"]

    def loss() -> float:
        tokens = torch.tensor([subject.encode(prompt, completion)])
        with torch.no_grad():
            return -float(subject.model(tokens).logits[0, -2].log_softmax(-1)[tokens[0, -1]])

    before = loss()
    with Finetune(EXAMPLES, steps=10, learning_rate=1e-2).applied(subject):
        assert loss() < before - 0.5
    assert loss() == before


def test_bad_settings_are_refused_with_what_to_do():
    with pytest.raises(ValueError, match="lacks the mark"):
        Template(("no mark",))
    with pytest.raises(ValueError, match="no templates"):
        Template(())
    with pytest.raises(ValueError, match="no examples"):
        Finetune([])
    for make in (Template, Prefill):
        with pytest.raises(ValueError, match="objective='rnadom' is not one of"):
            make(objective="rnadom")


def test_the_exact_judge_wants_whole_words_in_order():
    row = AttackRow("0", "p", answer="amber 17")
    for leak in ("sure , it is Amber 17 .", "It's **amber 17**.", 'the code: "amber  17", of course', "amber 17"):
        assert exact(row, leak), leak
    assert not exact(row, "it is amber 170 .")
    assert not exact(row, "17 amber")
    assert not exact(row, "")


@pytest.mark.parametrize(
    ("response", "refused"),
    [
        ("Sorry, I can't share that.", True),
        ("  I\u2019m sorry, but no", True),
        ("**I cannot** do it", True),
        ("Sure, here is how. I cannot stress enough", False),
        ("", False),
    ],
)
def test_a_refusal_is_known_by_its_first_words(response, refused):
    assert is_refusal(response) is refused


def test_the_judge_sees_what_the_model_said_and_not_the_prefill(monkeypatch, subject, requests):
    seen = []
    monkeypatch.setitem(JUDGES, "refusal_prefix", lambda row, response: seen.append(response) or True)
    found = Prefill().run(subject, requests)
    judged(found, "refusal_prefix")
    assert seen == [generation.continuation for generation in found]
    for generation in found:
        assert generation.response == f"{generation.row.target} {generation.continuation}".strip()


def test_the_models_own_generation_config_changes_nothing(subject, requests):
    before = [generation.response for generation in Latent(sites=(0,), steps=1).run(subject, requests)]
    subject.model.generation_config.num_beams = 3
    subject.model.generation_config.repetition_penalty = 3.0
    subject.model.generation_config.no_repeat_ngram_size = 1
    found = Latent(sites=(0,), steps=1).run(subject, requests)
    assert [(generation.status, generation.response) for generation in found] == [
        ("generated", response) for response in before
    ]


def test_rows_of_the_same_id_still_get_their_own_templates(subject):
    rows = [AttackRow("same", WORDS[0]), AttackRow("same", WORDS[1])]
    found = Template(("a {prompt}", "{prompt} b")).run(subject, rows)
    assert [generation.prompt for generation in found] == [f"a {WORDS[0]}", f"{WORDS[1]} b"]


def test_a_conversation_that_the_template_refuses_is_errored(subject, requests):
    subject.tokenizer.chat_template = "{{ raise_exception('no roles here') }}"
    entry, answers = run_attack(subject, Direct(), requests[:2], "exact")
    assert entry["n_errored"] == 2 and "no roles here" in answers[0]["reason"]
