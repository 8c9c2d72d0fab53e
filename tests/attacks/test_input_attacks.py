"""Many-shot, best-of-n and GCG: exact on tiny random models."""

from __future__ import annotations

import functools
import itertools
import math
import random

import pytest
import torch
from tiny import SPECIAL, WORDS, lora, make_tokenizer, tiny_model

from trl_robust.attacks import AttackRow, Direct, Prefill, Subject
from trl_robust.attacks import gcg as gcg_module
from trl_robust.attacks.best_of_n import PRINTABLE, BestOfN, altered
from trl_robust.attacks.gcg import GCG, suffix_gradient, suffix_losses
from trl_robust.attacks.many_shot import ManyShot
from trl_robust.attacks.sampling import Noise
from trl_robust.attacks.suffix import NoSuffix, locate_suffix, ordinary_tokens
from trl_robust.evaluation import attack_success, judged

ORDINARY = list(range(len(SPECIAL), len(SPECIAL) + len(WORDS)))
QUICK = GCG(suffix_tokens=3, steps=4, candidates=12, topk=8, stop_loss=0.0)
RANDOM = GCG(suffix_tokens=3, steps=4, candidates=12, stop_loss=0.0, objective="random")


@pytest.fixture
def subject() -> Subject:
    return Subject(tiny_model("llama"), make_tokenizer(), max_new_tokens=3, batch_size=5, progress=False)


@pytest.fixture
def requests() -> list[AttackRow]:
    return [
        AttackRow(str(number), " ".join(WORDS[: 2 + number]), " ".join(WORDS[5:7]), WORDS[number])
        for number in range(3)
    ]


def searched(attack: GCG, subject: Subject, row: AttackRow):
    tokens = ordinary_tokens(subject)
    place = locate_suffix(subject, row.prompt, attack.suffix_tokens, tokens)
    return place, *attack.search(subject, row, place, tokens)


def loss_of_text(subject: Subject, prompt, target: str) -> float:
    """The loss from nothing but the text that the model is given."""
    tokens, wanted = subject.encode(prompt), subject.encode_opening(target)
    with torch.no_grad():
        logits = subject.model(torch.tensor([tokens + wanted])).logits[0].log_softmax(-1)
    return -sum(float(logits[len(tokens) - 1 + i, token]) for i, token in enumerate(wanted)) / len(wanted)


# GCG


@pytest.mark.parametrize(
    # Some norms compute in float32 whatever the model does, and need larger steps; a ReLU needs small ones.
    ("name", "step"),
    [("llama", 5e-3), ("gemma2", 5e-3), ("gemma3", 5e-3), ("gpt2", 1e-4), ("opt", 1e-4)],
)
def test_the_gradient_is_the_slope_of_the_loss_along_every_replacement(name, step, requests):
    subject = Subject(tiny_model(name).double(), make_tokenizer(), progress=False)
    place = locate_suffix(subject, requests[1].prompt, 2, ORDINARY)
    target = subject.encode_opening(requests[1].target)
    suffix = ORDINARY[20:22]
    found = suffix_gradient(subject, place, target, suffix, torch.tensor(ORDINARY))
    embedding = subject.model.get_input_embeddings()
    with torch.no_grad():
        table = embedding(torch.tensor([ORDINARY]))[0]

    def loss(where: int, which: int, step: float) -> float:
        def moved(module, args, output):
            output = output.clone()
            output[:, len(place.before) + where] += step * (table[which] - table[ORDINARY.index(suffix[where])])
            return output

        handle = embedding.register_forward_hook(moved)
        try:
            return suffix_losses(subject, place, target, [suffix])[0]
        finally:
            handle.remove()

    for where in range(2):
        own = found[where, ORDINARY.index(suffix[where])]
        for which in (0, 7, 40):
            slope = (loss(where, which, step) - loss(where, which, -step)) / (2 * step)
            assert float(found[where, which] - own) == pytest.approx(slope, rel=5e-3, abs=1e-4)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in subject.model.parameters())
    assert not embedding._forward_hooks


def test_a_step_over_all_replacements_finds_the_best_one_that_there_is(subject, requests):
    for row in requests:
        attack = GCG(suffix_tokens=2, steps=1, candidates=1000, topk=1000, stop_loss=0.0)
        place, suffix, losses = searched(attack, subject, row)
        start = [subject.tokenizer.decode([token]) for token in place.start]
        texts = [[word, start[1]] for word in WORDS] + [[start[0], word] for word in WORDS]
        best = min(texts, key=lambda words: loss_of_text(subject, f"{row.prompt} {' '.join(words)}", row.target))
        assert place.prompt(suffix) == f"{row.prompt} {' '.join(best)}"
        assert losses[1] == pytest.approx(loss_of_text(subject, place.prompt(suffix), row.target), abs=1e-5)
        assert losses[0] == pytest.approx(loss_of_text(subject, place.prompt(place.start), row.target), abs=1e-5)


@pytest.mark.parametrize("attack", [QUICK, RANDOM], ids=["targeted", "random"])
def test_losses_never_rise_and_fewer_steps_are_the_beginning_of_more(attack, subject, requests, monkeypatch):
    measured = []
    counted = gcg_module.suffix_losses

    def counting(subject, place, target, suffixes):
        measured.append(len(suffixes))
        return counted(subject, place, target, suffixes)

    monkeypatch.setattr(gcg_module, "suffix_losses", counting)
    for row in requests:
        measured.clear()
        _, _, losses = searched(attack, subject, row)
        assert measured == [1] + [attack.candidates] * attack.steps and sum(measured) == attack.queries + 1
        assert all(after <= before for before, after in itertools.pairwise(losses))
        assert losses[-1] < losses[0]
        shorter = GCG(**{**vars(attack), "steps": 2})
        assert searched(shorter, subject, row)[2] == losses[:3]


@pytest.mark.parametrize("attack", [QUICK, RANDOM], ids=["targeted", "random"])
def test_the_suffix_depends_on_the_seed_and_not_on_batches_or_other_requests(attack, subject, requests):
    first = [generation.prompt for generation in attack.run(subject, requests)]
    subject.batch_size = 1
    assert [generation.prompt for generation in attack.run(subject, requests[::-1])][::-1] == first
    other = GCG(**{**vars(attack), "seed": 1})
    assert [generation.prompt for generation in other.run(subject, requests)] != first


def test_what_is_reported_is_the_answer_to_the_suffix_as_text(subject, requests):
    found = QUICK.run(subject, requests)
    for row, generation in zip(requests, found, strict=True):
        place, suffix, losses = searched(QUICK, subject, row)
        assert generation.prompt == place.prompt(suffix) and generation.prompt.startswith(f"{row.prompt} ")
        assert subject.encode(generation.prompt) == [*place.before, *suffix, *place.after]
        assert len(suffix) == 3 and set(suffix) <= set(ORDINARY)
        assert subject.tokenizer.convert_ids_to_tokens(place.after) == ["<asst>"]
        assert losses[-1] == pytest.approx(loss_of_text(subject, generation.prompt, row.target), abs=1e-5)
        (asked,) = Direct().run(subject, [AttackRow("x", generation.prompt)])
        assert generation.response == asked.response


def test_the_suffix_stands_in_the_last_turn_of_a_conversation(subject, requests):
    talk = [
        {"role": "system", "content": "w0 w1"},
        {"role": "user", "content": "w2"},
        {"role": "assistant", "content": "w3"},
        {"role": "user", "content": "w4 w5"},
    ]
    place, suffix, _ = searched(QUICK, subject, AttackRow("0", talk, "w7"))
    assert place.prompt(suffix)[:3] == talk[:3]
    assert place.prompt(suffix)[3]["content"] == f"w4 w5 {subject.tokenizer.decode(suffix)}"


@functools.cache
def byte_level(template: str | None):
    """A byte-level BPE tokenizer with merges, whose words carry the space before them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<pad>", "<eos>", "<user>", "<asst>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(["tell me the secret code of the tower , and the other one !"] * 20, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", chat_template=template,
        additional_special_tokens=["<user>", "<asst>"],
    )  # fmt: skip


TRIMMED = "{% for m in messages %}<user>\n{{ m['content'] | trim }}\n{% endfor %}<asst>\n"


@pytest.mark.parametrize("template", [TRIMMED, None], ids=["template that trims", "no template"])
def test_every_suffix_of_a_tokenizer_with_merges_can_be_typed(template):
    tokenizer = byte_level(template)
    subject = Subject(tiny_model("llama", vocab_size=len(tokenizer)), tokenizer, batch_size=32, progress=False)
    row = AttackRow("0", "tell me the code", "the code of")
    place, suffix, losses = searched(GCG(6, steps=6, candidates=24, stop_loss=0.0), subject, row)
    assert tokenizer.decode(place.start) == " !" * 6
    text = place.prompt(suffix)
    assert text.startswith("tell me the code") and text.isascii() and suffix != place.start
    assert subject.encode(text) == place.tokens(suffix)
    assert losses[-1] == pytest.approx(loss_of_text(subject, text, row.target), abs=1e-5)
    # Not every replacement can: two tokens may merge into one.
    letters = [tokenizer.convert_tokens_to_ids(letter) for letter in "acdehlmorstw"]
    readable = [place.readable([a, b, *place.start[2:]]) for a in letters for b in letters]
    assert any(readable) and not all(readable)


def test_a_random_opening_keeps_its_length_where_tokens_may_merge():
    tokenizer = byte_level(None)
    subject = Subject(tiny_model("llama", vocab_size=len(tokenizer)), tokenizer, max_new_tokens=1, progress=False)
    rows = [AttackRow(str(number), "tell me", "the secret code of the") for number in range(20)]
    openings, encode = [], subject.encode
    subject.encode = lambda prompt, opening="": openings.append(opening) or encode(prompt, opening)
    Prefill(objective="random").run(subject, rows)
    wanted = len(subject.encode_opening(rows[0].target))
    assert {len(subject.encode_opening(opening)) for opening in openings} == {wanted} and len(set(openings)) == 20


def test_a_model_with_an_adapter_is_attacked_and_left_as_it_was(requests):
    model = lora(tiny_model("llama"))
    before = {name: (weight.clone(), weight.requires_grad) for name, weight in model.named_parameters()}
    subject = Subject(model.eval(), make_tokenizer(), max_new_tokens=3, progress=False)
    for attack in (QUICK, BestOfN(n=2)):
        assert all(generation.status == "generated" for generation in attack.run(subject, requests))
    _, _, losses = searched(QUICK, subject, requests[0])
    assert losses[-1] < losses[0]
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name][0]) and weight.requires_grad == before[name][1] and weight.grad is None
    assert sum(len(module._forward_hooks) for module in model.modules()) == 0


def test_ordinary_tokens_are_text_and_nothing_else(subject):
    assert ordinary_tokens(subject) == ORDINARY
    tokenizer = byte_level(None)
    other = Subject(tiny_model("llama", vocab_size=len(tokenizer) + 3), tokenizer, progress=False)
    for ascii_only in (True, False):
        texts = [tokenizer.decode([token]) for token in ordinary_tokens(other, ascii_only)]
        assert " the" in texts and "!" in texts
        assert all(text.strip() and text.strip().isprintable() and "\ufffd" not in text for text in texts)
    assert not {0, 1, 2, 3} & set(ordinary_tokens(other))


@pytest.mark.parametrize(
    ("template", "prompt", "said"),
    [
        ("{% for m in messages %}{{ m['content'][:2] }}{% endfor %}", "w1 w2", "could be told"),
        (None, [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}], "not of the user"),
    ],
)
def test_a_prompt_without_a_place_for_a_suffix_is_skipped_with_the_reason(template, prompt, said, subject, requests):
    if template:
        subject.tokenizer.chat_template = template
    with pytest.raises(NoSuffix, match=said):
        locate_suffix(subject, prompt, 3, ORDINARY)
    (found,) = QUICK.run(subject, [AttackRow("odd", prompt, "w3")])
    assert (found.status, found.response) == ("skipped", None) and said in found.reason


def test_rows_that_cannot_be_attacked_leave_the_others_alone(subject, requests, monkeypatch):
    long = AttackRow("long", " ".join(WORDS), "w1")
    rows = [AttackRow("bare", "w1"), requests[0], long, requests[1], AttackRow("blank", "w2", " "), requests[2]]
    subject.max_prompt_tokens = 20
    found = suffix_losses

    def failing(subject, place, target, suffixes):
        if place.request == requests[1].prompt:
            raise RuntimeError("out of memory")
        assert place.request != long.prompt
        return found(subject, place, target, suffixes)

    monkeypatch.setattr(gcg_module, "suffix_losses", failing)
    answers = QUICK.run(subject, rows)
    assert [answer.row.id for answer in answers] == [row.id for row in rows]
    statuses = ["skipped", "generated", "skipped", "errored", "skipped", "generated"]
    assert [answer.status for answer in answers] == statuses
    reasons = ["no target", None, "over the limit", "out of memory", "no tokens", None]
    for answer, reason in zip(answers, reasons, strict=True):
        assert answer.reason is None if reason is None else reason in answer.reason


def test_the_search_ends_early_where_the_loss_is_low_or_nothing_is_better(subject, requests):
    _, _, losses = searched(QUICK, subject, requests[0])
    _, _, shorter = searched(GCG(**{**vars(QUICK), "stop_loss": losses[2]}), subject, requests[0])
    assert shorter == losses[: losses.index(losses[2]) + 1]
    everything = GCG(suffix_tokens=1, steps=50, candidates=1000, topk=1000, stop_loss=0.0)
    assert len(searched(everything, subject, requests[0])[2]) == 2
    place, suffix, losses = searched(GCG(suffix_tokens=2, steps=0), subject, requests[0])
    assert suffix == place.start and len(losses) == 1


# Best of n


def test_samples_of_a_request_stand_together_and_more_of_them_begin_with_fewer(subject, requests):
    few, many = BestOfN(n=2).run(subject, requests), BestOfN(n=5).run(subject, requests)
    assert [generation.row for generation in many] == [row for row in requests for _ in range(5)]
    for number in range(len(requests)):
        first = [(it.prompt, it.response) for it in few[2 * number : 2 * number + 2]]
        assert first == [(it.prompt, it.response) for it in many[5 * number : 5 * number + 2]]
    assert len({(it.prompt, it.response) for it in many}) > len(requests)


def test_a_sample_does_not_depend_on_batches_or_other_requests(subject, requests):
    attack = BestOfN(n=4, augment=0.0, top_p=0.9)
    first = [generation.response for generation in attack.run(subject, requests)]
    assert [generation.prompt for generation in attack.run(subject, requests[:1])] == [requests[0].prompt] * 4
    subject.batch_size = 1
    assert [generation.response for generation in attack.run(subject, requests[1:])] == first[4:]
    assert [it.response for it in BestOfN(n=4, augment=0.0, top_p=0.9, seed=1).run(subject, requests)] != first


def test_without_temperature_and_noise_it_is_the_direct_request(subject, requests):
    found = BestOfN(n=1, temperature=0.0, augment=0.0).run(subject, requests)
    assert [vars(generation) for generation in found] == [vars(it) for it in Direct().run(subject, requests)]


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (2.0, 0.7)])
def test_samples_have_the_distribution_of_the_model(temperature, top_p):
    logits, count = torch.tensor([2.0, 1.0, 0.0, -1.0, 1.5]), 4000
    noise = Noise(range(count), temperature, top_p)
    drawn = noise(None, logits.repeat(count, 1)).argmax(-1)
    expected = (logits / temperature).softmax(-1)
    if top_p < 1:
        order = expected.argsort(descending=True)
        kept = order[: int((expected[order].cumsum(0) < top_p).sum()) + 1]
        expected = torch.zeros(5).index_copy(0, kept, expected[kept] / expected[kept].sum())
    shares = torch.bincount(drawn, minlength=5) / count
    assert ((shares - expected).abs() <= 4 * (expected * (1 - expected) / count).sqrt()).all()


def test_altered_text_keeps_its_words_apart_and_in_order():
    text = "Tell me,  the secret\ncode of the Müller straße !"
    assert altered(text, 0.0, random.Random(0)) == text
    for strength in (0.1, 0.4, 1.0):
        changed = 0
        for seed in range(50):
            found = altered(text, strength, random.Random(seed))
            assert [len(word) for word in found.split(" ")] == [len(word) for word in text.split(" ")]
            assert all(letter in PRINTABLE or letter.casefold() in text.casefold() for letter in found)
            changed += sum(a != b for a, b in zip(found, text, strict=True))
        assert changed > 50
    # The noise of the third kind is rare: its probability is 0.001 a letter at this strength.
    words = [altered("Abcdefghij", 0.1, random.Random(seed)) for seed in range(1000)]
    assert 2 <= sum(sorted(word.casefold()) != sorted("abcdefghij") for word in words) <= 25
    assert 200 < sum(word.casefold() != "abcdefghij" for word in words) < 450
    assert {altered("a", 1.0, random.Random(seed)) for seed in range(20)} == {"@", "B"}
    assert altered("Abcdefghij", 0.999999, random.Random(0))[0] in "`b"


def test_the_best_of_the_first_samples_can_be_read_off_the_rows(subject, requests):
    rows = judged(BestOfN(n=6, augment=0.0, temperature=1.5).run(subject, requests), "exact")
    by_id: dict[str, list[bool]] = {}
    for row in rows:
        by_id.setdefault(row["id"], []).append(row["success"])
    assert [len(found) for found in by_id.values()] == [6, 6, 6]
    assert attack_success(rows)["success"] == pytest.approx(sum(map(sum, by_id.values())) / 18)
    curve = [sum(any(found[:k]) for found in by_id.values()) for k in range(1, 7)]
    assert curve == sorted(curve)


# Many shots

SHOTS = [{"prompt": f"w{40 + number} w1", "completion": f"w{50 + number} w2"} for number in range(6)]


def test_examples_are_turns_before_the_request_and_behind_the_system_turn(subject):
    talk = [{"role": "system", "content": "w0"}, {"role": "user", "content": "w3 w4"}]
    seen: list = []
    subject.encode = lambda prompt, opening="": seen.append(prompt) or [1, 2]
    ManyShot(SHOTS, shots=2).run(subject, [AttackRow("0", talk), AttackRow("1", "w3 w4")])
    for prompt, system in zip(seen, (talk[:1], []), strict=True):
        assert prompt[: len(system)] == system and prompt[-1] == talk[1]
        turns = prompt[len(system) : -1]
        assert [turn["role"] for turn in turns] == ["user", "assistant"] * 2
        pairs = [
            {"prompt": a["content"], "completion": b["content"]} for a, b in zip(turns[::2], turns[1::2], strict=True)
        ]
        assert all(pair in SHOTS for pair in pairs) and pairs[0] != pairs[1]


def test_without_a_chat_template_the_dialogue_is_text(subject):
    subject.tokenizer.chat_template = None
    seen: list = []
    subject.encode = lambda prompt, opening="": seen.append(prompt) or [1, 2]
    talk = {"prompt": [{"role": "user", "content": "w1"}], "completion": [{"role": "assistant", "content": "w2"}]}
    ManyShot([talk], shots=1).run(subject, [AttackRow("0", "w3")])
    ManyShot([talk], shots=0).run(subject, [AttackRow("0", "w3")])
    assert seen == ["User: w1\nAssistant: w2\n\nUser: w3\nAssistant:", "w3"]


def test_no_example_repeats_the_request_or_states_its_answer(subject):
    rows = [AttackRow("a", "W40 w1 ?", None, "w51"), AttackRow("b", "w9", None, "w50 w2"), AttackRow("c", "w9")]
    shown = [{question for question, _ in ManyShot(SHOTS, shots=4)._shown(row)} for row in rows]
    assert shown[0] == {"w42 w1", "w43 w1", "w44 w1", "w45 w1"}
    assert "w40 w1" not in {question for question, _ in ManyShot(SHOTS, shots=5)._shown(rows[1])}
    found = ManyShot(SHOTS, shots=6).run(subject, rows)
    assert [generation.status for generation in found] == ["skipped", "skipped", "generated"]
    assert "4 of the 6 examples" in found[0].reason and [it.row for it in found] == rows


def test_more_shots_add_to_those_of_fewer_and_the_seed_draws_others(subject, requests):
    few, many = (ManyShot(SHOTS, shots=shots)._shown(requests[0]) for shots in (2, 5))
    assert many[:2] == few and len(set(many)) == 5
    assert {tuple(ManyShot(SHOTS, shots=2, seed=seed)._shown(requests[0])) for seed in range(9)} != {tuple(few)}


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: ManyShot([], shots=1), "0 examples for 1 shots"),
        (lambda: ManyShot(SHOTS, shots=-1), "at least 0"),
        (lambda: ManyShot([{"prompt": "a"}], shots=1), "lacks"),
        (lambda: BestOfN(n=0), "at least 1"),
        (lambda: BestOfN(top_p=0), "top_p"),
        (lambda: BestOfN(temperature=math.nan), "temperature"),
        (lambda: BestOfN(augment=1.5), "augment"),
        (lambda: BestOfN(temperature=0, augment=0), "are the same"),
        (lambda: GCG(suffix_tokens=0), "suffix_tokens"),
        (lambda: GCG(stop_loss=math.nan), "stop_loss"),
        (lambda: GCG(objective="untargeted"), "objective"),
    ],
)
def test_bad_settings_are_refused_with_what_to_do(make, said):
    with pytest.raises(ValueError, match=said):
        make()


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_suffixes_open_the_aligned_organism(seed, tmp_path):
    """
    Both searches bring out the opening for every request here: random suffixes do so within a few steps, and the
    comparison with five times the queries is at its ceiling. It shows that the search works, not that the gradient
    helps on such a model.
    """
    import json

    from trl_robust.organism import build_organism

    build_organism(tmp_path, seed=seed)
    lines = (tmp_path / "data" / "attack_prompts.jsonl").read_text(encoding="utf-8").splitlines()[:16]
    rows = [AttackRow(str(number), **json.loads(line)) for number, line in enumerate(lines)]
    subject = Subject.load(tmp_path / "model", max_new_tokens=20, progress=False)
    attack = GCG(suffix_tokens=5, steps=15, candidates=24, topk=32)
    control = GCG(suffix_tokens=5, steps=75, candidates=24, objective="random")
    assert control.queries == 5 * attack.queries

    def opened(attack) -> int:
        return sum((it.continuation or "").startswith(it.row.target) for it in attack.run(subject, rows))

    assert opened(Direct()) == 0
    assert opened(attack) >= opened(control) >= 12
    success = attack_success(judged(attack.run(subject, rows), "exact"))
    assert success["n_scored"] == 16 and success["success"] > 0.4
