"""Attacks on embeddings, hidden states and weights: what they change, exactly, and that they leave nothing behind."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import HIDDEN, LAYERS, WORDS, lora, make_tokenizer, tiny_model

from trl_robust._compat import keep_4bit_differentiable
from trl_robust.attacks import AttackRow, Direct, Finetune, Subject
from trl_robust.attacks.direction import RefusalDirection, Subspace, leading_directions, save_directions
from trl_robust.attacks.finetune_grid import GRID, grid_attacks
from trl_robust.attacks.linears import block_linears, weight_of
from trl_robust.attacks.lora import ALPHA, DROPOUT, RANK, low_rank_adapter
from trl_robust.attacks.pruning import Pruning, pruned_mask, wanda_scores
from trl_robust.attacks.soft_suffix import SoftSuffix, Suffixed, _batch
from trl_robust.attacks.universal import Universal
from trl_robust.inner import Ablation, Perturbation, find_perturbation, refusal_directions
from trl_robust.inner.observing import observed
from trl_robust.threat import ThreatModel, vector_norms


def _rows(first: int, count: int = 6) -> list[dict]:
    return [
        {"prompt": " ".join(WORDS[first + i : first + i + 2 + i % 3]), "target": WORDS[7], "completion": WORDS[8]}
        for i in range(count)
    ]


EXAMPLES, HARMLESS = _rows(10), _rows(30)
ATTACKS = [
    SoftSuffix(tokens=3, steps=2, learning_rate=0.1),
    SoftSuffix(tokens=3, steps=2, learning_rate=0.1, objective="random"),
    Universal(EXAMPLES, sites=("embedding", 1), steps=2),
    Universal(EXAMPLES, sites=(1,), steps=2, alignment="end", tokens=4),
    Universal(EXAMPLES, sites=(0, 2), objective="random"),
    RefusalDirection(EXAMPLES, HARMLESS, directions=2),
    RefusalDirection(EXAMPLES, HARMLESS, replacement="harmless"),
    RefusalDirection(directions=2, objective="random"),
    Pruning(EXAMPLES, sparsity=0.5),
    Pruning(EXAMPLES, sparsity=0.5, objective="random"),
    Finetune(EXAMPLES, steps=2, method="lora", learning_rate=1e-2),
]
each_attack = pytest.mark.parametrize(
    "attack", ATTACKS, ids=[f"{number}-{attack.name}" for number, attack in enumerate(ATTACKS)]
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


def _bits(model) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone().view(torch.uint8) for name, tensor in model.state_dict().items()}


def _untouched(model, before: dict[str, torch.Tensor]) -> None:
    after = _bits(model)
    assert list(after) == list(before)
    assert [name for name in after if not torch.equal(after[name], before[name])] == []
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()) == 0


# What every attack keeps


@each_attack
def test_every_request_comes_back_and_the_model_is_as_it_was_bit_for_bit(attack, subject, requests):
    before = _bits(subject.model)
    found = attack.run(subject, requests)
    assert [generation.row.id for generation in found] == [row.id for row in requests]
    assert [generation.status for generation in found] == ["generated"] * 5
    _untouched(subject.model, before)
    assert all(parameter.requires_grad for parameter in subject.model.parameters())


@each_attack
def test_the_same_attack_twice_and_in_other_batches_gives_the_same_answers(attack, subject, requests):
    first = [generation.response for generation in attack.run(subject, requests)]
    subject.batch_size = 5
    assert [generation.response for generation in attack.run(subject, requests)] == first


@pytest.mark.parametrize("name", ["gpt2", "gemma3", "mixtral", "opt"])
def test_other_architectures_are_attacked_as_well(name, requests):
    subject = Subject(tiny_model(name), make_tokenizer(), max_new_tokens=2, batch_size=2, progress=False)
    before = _bits(subject.model)
    for attack in (*ATTACKS[:4], *ATTACKS[5:7], *ATTACKS[8:9], ATTACKS[10]):
        if name == "mixtral" and isinstance(attack, Pruning):
            continue
        assert [found.status for found in attack.run(subject, requests[:3])] == ["generated"] * 3
        _untouched(subject.model, before)


@each_attack
def test_what_a_curve_varies_is_a_field(attack):
    assert getattr(attack, attack.budget_axis) is not None
    assert attack.version == (2 if isinstance(attack, SoftSuffix) else 1)
    assert attack.attack_class in ("embedding", "latent", "weights")


@pytest.mark.parametrize(
    "attack",
    [
        SoftSuffix(tokens=3, steps=0),
        Universal(EXAMPLES, radius=0.0),
        RefusalDirection(EXAMPLES, HARMLESS, directions=0),
        Pruning(EXAMPLES, sparsity=0.0),
        Finetune(EXAMPLES, steps=0, method="lora"),
    ],
    ids=lambda attack: attack.name,
)
def test_at_budget_zero_an_attack_is_no_attack(attack, subject, requests):
    asked = requests
    if isinstance(attack, SoftSuffix):  # its tokens are there, as text
        text = Suffixed(subject.model, subject.tokenizer, tokens=3).text
        asked = [replace(row, prompt=f"{row.prompt} {text}") for row in requests]
    expected = [generation.response for generation in Direct().run(subject, asked)]
    assert [generation.response for generation in attack.run(subject, requests)] == expected


def test_a_search_that_fails_leaves_every_request_errored(subject, requests, monkeypatch):
    def failing(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Universal, "found", failing)
    monkeypatch.setattr(RefusalDirection, "found", failing)
    monkeypatch.setattr(Pruning, "_prune", failing)
    for attack in (ATTACKS[2], ATTACKS[5], ATTACKS[8], Finetune(EXAMPLES, steps=3, learning_rate=1e30, method="lora")):
        before = _bits(subject.model)
        found = attack.run(subject, requests)
        assert [generation.status for generation in found] == ["errored"] * 5
        assert all("could not be prepared" in generation.reason for generation in found)
        _untouched(subject.model, before)


# Soft suffix


def test_a_suffix_stands_at_the_end_of_the_user_turn_as_its_text_would(subject, requests):
    suffixed = Suffixed(subject.model, subject.tokenizer, tokens=4, init=WORDS[3])
    talk = [
        {"role": "user", "content": "w1"},
        {"role": "assistant", "content": "w2"},
        {"role": "user", "content": "w4"},
    ]
    for prompt in ("w1 w2", "w3", "w3 w3 w3", talk):
        tokens, start, inside = suffixed.placed(prompt)
        longer = " w3 w3 w3 w3"
        text = (
            prompt + longer if isinstance(prompt, str) else [*prompt[:-1], {"role": "user", "content": "w4" + longer}]
        )
        assert inside and tokens == subject.encode(text)
        assert tokens[start : start + 4] == subject.encode_opening("w3 w3 w3 w3")
        assert tokens[:start] + tokens[start + 4 :] == subject.encode(prompt)
    found = SoftSuffix(tokens=4, steps=1, init=WORDS[3]).run(subject, requests[:1])
    assert found[0].prompt == f"{requests[0].prompt} [4 soft tokens at the end of the user turn]"


def test_where_the_user_turn_cannot_be_found_the_suffix_stands_before_the_answer(subject, requests):
    subject.tokenizer.chat_template = "{{ messages[0]['content'] }} <user> {{ messages[0]['content'] }} <asst>"
    tokens, start, inside = Suffixed(subject.model, subject.tokenizer, tokens=2, init="w3").placed("w1")
    assert not inside
    assert tokens == [*subject.encode("w1"), *subject.encode_opening("w3 w3")]
    assert start == len(subject.encode("w1"))
    found = SoftSuffix(tokens=2, steps=1).run(subject, requests[:1])
    assert found[0].prompt.endswith("[2 soft tokens right before the answer]")


def test_sign_steps_move_the_suffix_alone_and_make_the_target_likelier(subject, requests, monkeypatch):
    attack = SoftSuffix(tokens=3, steps=4, learning_rate=0.05)
    seen: list[Perturbation] = []

    def keeping(*args, **kwargs):
        seen.append(find_perturbation(*args, **kwargs))
        return seen[-1]

    monkeypatch.setattr("trl_robust.attacks.soft_suffix.find_perturbation", keeping)
    answers = attack.run(subject, requests[:2])
    suffixed = Suffixed(subject.model, subject.tokenizer, tokens=3)
    (worst,) = seen
    assert worst.losses[-1] < worst.losses[0] - 0.1
    delta = worst.deltas["embedding"]
    for number, row in enumerate(requests[:2]):
        tokens, start, _ = suffixed.placed(row.prompt)
        inside = delta[number, start : start + 3]
        assert inside.abs().max() <= 0.2 + 1e-6
        # Four steps up or down: 4, 2 or 0 of them are left.
        assert torch.allclose((inside / 0.1).round(), inside / 0.1, atol=1e-3)
        assert not delta[number, :start].any() and not delta[number, start + 3 :].any()
        # The same from the embeddings themselves.
        embedded = subject.model.get_input_embeddings()(torch.tensor([tokens])).detach()
        embedded[0, start : start + 3] += inside
        made = subject.model.generate(
            inputs_embeds=embedded, attention_mask=torch.ones(1, len(tokens)), max_new_tokens=3, do_sample=False
        )
        assert subject.tokenizer.decode(made[0], skip_special_tokens=True) == answers[number].response


def test_the_control_takes_as_many_steps_of_the_same_size_in_random_directions(subject, requests):
    attack = SoftSuffix(tokens=3, steps=5, learning_rate=0.05, objective="random")
    suffixed = Suffixed(subject.model, subject.tokenizer, tokens=3)
    delta = attack._random(suffixed, requests[:2]).deltas["embedding"]
    for number, row in enumerate(requests[:2]):
        start = suffixed.placed(row.prompt)[1]
        steps = delta[number, start : start + 3] / 0.05
        assert set(steps.round().int().flatten().tolist()) <= {-5, -3, -1, 1, 3, 5}
        assert torch.allclose(steps.round(), steps, atol=1e-4)
        assert abs(steps.mean()) < 1
        assert not delta[number, :start].any()


def test_a_soft_suffix_labels_the_target_and_nothing_else(subject, requests):
    suffixed = Suffixed(subject.model, subject.tokenizer, tokens=3)
    batch = _batch(suffixed, requests)
    for row, labels in zip(requests, batch["labels"], strict=True):
        assert labels[labels != -100].tolist() == subject.encode_opening(row.target)
    bare = SoftSuffix(tokens=3, steps=1).run(subject, [replace(requests[0], target=None)])
    assert bare[0].status == "skipped" and "no target" in bare[0].reason


# Universal perturbation


@pytest.mark.parametrize("norm", ["l1", "l2", "linf"])
@pytest.mark.parametrize("objective", ["targeted", "random"])
def test_a_universal_perturbation_stays_in_its_ball(norm, objective, subject):
    attack = Universal(
        EXAMPLES, sites=(0, 2), norm=norm, radius=0.7, radius_unit="absolute", steps=3, objective=objective
    )
    found = attack.found(subject)
    assert set(found) == {0, 2}
    for delta in found.values():
        assert delta.shape == (1, HIDDEN)
        size = vector_norms(delta.unsqueeze(0), norm)
        assert (size <= 0.7 * (1 + 1e-5)).all()
        if objective == "random":
            assert torch.allclose(size, torch.tensor(0.7))


def test_a_universal_perturbation_is_the_same_for_every_prompt(subject):
    found = {1: torch.randn(1, HIDDEN)}
    spread = Universal(EXAMPLES).spread(found, [3, 5], subject.device)
    assert spread.selected.tolist() == [[True] * 3 + [False] * 2, [True] * 5]
    for number, length in enumerate((3, 5)):
        assert torch.equal(spread.deltas[1][number, :length], found[1].expand(length, -1))
    ends = {1: torch.randn(4, HIDDEN)}
    spread = Universal(EXAMPLES, alignment="end", tokens=4).spread(ends, [3, 6], subject.device)
    assert spread.selected.tolist() == [[True] * 3 + [False] * 3, [False] * 2 + [True] * 4]
    assert torch.equal(spread.deltas[1][0, :3], ends[1][1:])
    assert torch.equal(spread.deltas[1][1, 2:], ends[1])
    assert not spread.deltas[1][1, :2].any()


@pytest.mark.parametrize("alignment", ["every", "end"])
def test_the_search_lowers_the_loss_of_the_examples_and_its_gradient_is_right(alignment, subject):
    attack = Universal(EXAMPLES, sites=(1,), radius=1.0, steps=8, alignment=alignment, tokens=2)
    rows = [AttackRow("", row["prompt"], row["target"]) for row in EXAMPLES]

    def loss(delta: torch.Tensor) -> float:
        """Mean over the examples, one at a time, without anything of the attack."""
        total = 0.0
        for row in rows:
            prompt, target = subject.encode(row.prompt), subject.encode_opening(row.target)
            end = len(prompt)
            start = 0 if alignment == "every" else end - 2

            def add(module, args, output, start=start, end=end):
                changed = output.clone()
                changed[:, start:end] += delta
                return changed

            handle = subject.model.model.layers[1].register_forward_hook(add)
            with torch.no_grad():
                logits = subject.model(torch.tensor([prompt + target])).logits[0]
            handle.remove()
            total -= logits[len(prompt) - 1 :].log_softmax(-1)[0, target[0]].item()
        return total / len(rows)

    found = attack.found(subject)[1]
    assert loss(found) < loss(torch.zeros_like(found)) - 0.3
    assert loss(found) < loss(replace(attack, objective="random").found(subject)[1]) - 0.3


def test_a_universal_perturbation_needs_no_target_where_it_is_applied(subject, requests):
    found = Universal(EXAMPLES, steps=1).run(subject, [replace(requests[0], target=None)])
    assert found[0].status == "generated"


# Refusal directions


def _orthonormal(rows: torch.Tensor) -> bool:
    return torch.allclose(rows @ rows.T, torch.eye(len(rows)), atol=1e-5)


def test_directions_are_orthonormal_and_more_of_them_contain_the_fewer(subject):
    batches = [
        [{"input_ids": torch.tensor([[*tokens, 0]]), "attention_mask": torch.ones(1, len(tokens) + 1).long(),
          "labels": torch.tensor([[-100] * len(tokens) + [0]])}
         for tokens in (subject.encode(row["prompt"]) for row in rows)]
        for rows in (EXAMPLES, HARMLESS)
    ]  # fmt: skip
    plain = refusal_directions(subject.model, *batches, ThreatModel(tuple(range(LAYERS))))
    many = RefusalDirection(EXAMPLES, HARMLESS, directions=4).found(subject)
    two = RefusalDirection(EXAMPLES, HARMLESS, directions=2).found(subject)
    one = RefusalDirection(EXAMPLES, HARMLESS).found(subject)
    for layer in range(LAYERS):
        assert many[layer].shape == (4, HIDDEN) and _orthonormal(many[layer])
        assert torch.allclose(one[layer][0], plain[layer], atol=1e-5)
        assert torch.allclose(many[layer][:1], one[layer], atol=1e-5)
        assert torch.allclose(many[layer][:2], two[layer], atol=1e-5)
    assert all(
        _orthonormal(rows) for rows in RefusalDirection(directions=4, objective="random").found(subject).values()
    )


def test_the_further_directions_are_those_of_the_largest_differences():
    first = torch.tensor([1.0, 0, 0, 0])
    differences = torch.tensor([[2.0, 0, 3, 0], [2, 0, -3, 0], [2, 1, 0, 0], [2, -1, 0, 0]])
    found = leading_directions(differences, first, 3)
    assert torch.allclose(found.abs(), torch.tensor([[1.0, 0, 0, 0], [0, 0, 1, 0], [0, 1, 0, 0]]), atol=1e-6)
    with pytest.raises(ValueError, match="give 3 directions, and 4 are asked for"):
        leading_directions(differences, first, 4)


@pytest.mark.parametrize("centred", [False, True])
def test_removal_leaves_nothing_along_the_directions_and_everything_across(centred, subject, requests):
    directions = RefusalDirection(EXAMPLES, HARMLESS, directions=3).found(subject)
    centers = {layer: torch.randn(HIDDEN) for layer in directions} if centred else {}
    rows = [subject.encode(row.prompt) for row in requests[:3]]
    width = max(map(len, rows)) + subject.max_new_tokens
    change = Subspace(directions, torch.ones(3, width, dtype=torch.bool), centers=centers)
    seen: list[tuple[int, torch.Tensor]] = []
    raw: list[tuple[int, torch.Tensor]] = []
    mask = subject.pad([[1] * len(row) for row in rows], "left", 0).bool()
    with (
        torch.no_grad(),
        observed(subject.model, range(LAYERS), "layer", lambda site, states: raw.append((site, states.clone()))),
        change.installed(subject.model),
        observed(subject.model, range(LAYERS), "layer", lambda site, states: seen.append((site, states.clone()))),
    ):
        subject._generate(rows, None, None)
    assert len(seen) == LAYERS * subject.max_new_tokens  # the answer's tokens as well
    for (site, after), (_, before) in zip(seen, raw, strict=True):
        if after.shape[1] > 1:
            after, before = after[mask], before[mask]
        basis = directions[site]
        expected = centers[site] @ basis.T if centred else torch.zeros(3)
        assert torch.allclose(after @ basis.T, expected.expand_as(after @ basis.T), atol=2e-5)
        across = torch.eye(HIDDEN) - basis.T @ basis
        assert torch.allclose(after @ across, before @ across, atol=2e-5)


def test_one_direction_is_the_ablation_of_the_trainers(subject, requests):
    found = RefusalDirection(EXAMPLES, HARMLESS).found(subject)
    selected = torch.ones(1, 20, dtype=torch.bool)
    tokens = torch.tensor([subject.encode(requests[0].prompt)])
    with torch.no_grad(), Ablation({site: rows[0] for site, rows in found.items()}, selected).installed(subject.model):
        expected = subject.model(tokens, attention_mask=torch.ones_like(tokens)).logits
    with torch.no_grad(), Subspace(found, selected).installed(subject.model):
        assert torch.allclose(
            subject.model(tokens, attention_mask=torch.ones_like(tokens)).logits, expected, atol=1e-4
        )


def test_directions_of_another_model_are_read_from_a_file(subject, requests, tmp_path):
    other = Subject(tiny_model("llama", seed=5), make_tokenizer(), progress=False)
    attack = RefusalDirection(EXAMPLES, HARMLESS, directions=3)
    theirs = attack.found(other)
    file = tmp_path / "directions.safetensors"
    save_directions(file, theirs)
    transferred = RefusalDirection(directions=2, transferred=str(file))
    for site, rows in transferred.found(subject).items():
        assert _orthonormal(rows)
        assert torch.allclose(rows.T @ rows, theirs[site][:2].T @ theirs[site][:2], atol=1e-5)
    assert all(generation.status == "generated" for generation in transferred.run(subject, requests))
    save_directions(file, attack.found(subject))
    own = [generation.response for generation in attack.run(subject, requests)]
    assert [
        generation.response
        for generation in RefusalDirection(directions=3, transferred=str(file)).run(subject, requests)
    ] == own


def test_a_file_of_directions_that_does_not_fit_is_refused(subject, tmp_path):
    def of(**directions) -> RefusalDirection:
        file = tmp_path / "some.safetensors"
        save_directions(file, directions)
        return RefusalDirection(directions=2, transferred=str(file))

    for stored, said in (
        ({"0": torch.eye(2, HIDDEN + 1)}, "of 25 numbers"),
        ({"9": torch.eye(2, HIDDEN)}, "has 4 layers"),
        ({"0": torch.eye(1, HIDDEN)}, "holds 1 directions of layer 0"),
        ({"0": torch.ones(2, HIDDEN)}, "independent directions"),
        ({"weight": torch.eye(2, HIDDEN)}, "under the number of a layer"),
    ):
        attack = of(**stored)
        for refused in (attack.found, attack.check):
            with pytest.raises(ValueError, match=said):
                refused(subject)
    with pytest.raises(ValueError, match="cannot be read"):
        RefusalDirection(transferred=str(tmp_path / "none.safetensors")).check(subject)


def test_too_few_requests_for_so_many_directions_are_known_before_anything_is_asked(subject):
    for attack, said in (
        (RefusalDirection(EXAMPLES, HARMLESS, directions=7), "6 pairs of requests give 6 directions, and 7 are asked"),
        (RefusalDirection(EXAMPLES, HARMLESS[:5], directions=7), "5 pairs of requests give 6 directions"),
        (RefusalDirection(directions=HIDDEN + 1, objective="random"), f"hidden states have {HIDDEN} numbers"),
    ):
        for refused in (attack.check, attack.found):
            with pytest.raises(ValueError, match=said):
                refused(subject)
    for attack in (
        RefusalDirection(EXAMPLES, HARMLESS, directions=6),
        RefusalDirection(EXAMPLES, HARMLESS[:5], directions=6),
        RefusalDirection(EXAMPLES[:1], HARMLESS[:1]),
        RefusalDirection(directions=HIDDEN, objective="random"),
    ):
        attack.check(subject)
        assert all(len(rows) == attack.directions for rows in attack.found(subject).values())


# Pruning


def test_the_score_of_a_weight_is_its_size_times_the_norm_of_its_input():
    weight = torch.tensor([[1.0, -2.0, 3.0], [4.0, 0.5, -1.0]])
    scores = wanda_scores(weight, torch.tensor([3.0, 1.0, 0.5]))
    assert scores.tolist() == [[3.0, 2.0, 1.5], [12.0, 0.5, 0.5]]
    assert pruned_mask(scores, 1 / 3).tolist() == [[False, False, True], [False, True, False]]
    assert pruned_mask(scores, 2 / 3).tolist() == [[False, True, True], [False, True, True]]
    assert not pruned_mask(scores, 0.0).any()


def test_blocks_are_pruned_in_turn_with_what_the_pruned_ones_below_put_out(subject):
    """Against a plain loop over blocks and single, unpadded prompts."""
    plain = tiny_model("llama")
    for block in plain.model.layers:
        linears = [module for module in block.modules() if isinstance(module, torch.nn.Linear)]
        inputs: dict = {id(module): [] for module in linears}
        hooks = [
            module.register_forward_hook(
                lambda module, args, output, store=inputs: store[id(module)].append(args[0][0])
            )
            for module in linears
        ]
        with torch.no_grad():
            for example in EXAMPLES:
                plain(torch.tensor([subject.encode(example["prompt"])]))
        for hook in hooks:
            hook.remove()
        for module in linears:
            scores = module.weight.detach().abs() * torch.cat(inputs[id(module)]).square().sum(0).sqrt()
            for row, score in zip(module.weight.data, scores, strict=True):
                row[score.argsort()[: round(0.4 * len(row))]] = 0
    dense = _bits(subject.model)
    with Pruning(EXAMPLES, sparsity=0.4).applied(subject):
        expected = plain.state_dict()
        for name, tensor in subject.model.state_dict().items():
            assert torch.equal(tensor, expected[name]), name
    _untouched(subject.model, dense)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("objective", ["wanda", "random"])
def test_every_output_of_every_linear_layer_loses_its_share_and_nothing_else_changes(name, objective):
    subject = Subject(tiny_model(name).bfloat16(), make_tokenizer(), batch_size=4, progress=False)
    dense = _bits(subject.model)
    inside = {id(layer.weight) for _, _, layer in block_linears(subject.model)}
    assert len(inside) == LAYERS * (4 if name == "gpt2" else 7)
    for sparsity in (0.1, 0.6):
        with Pruning(EXAMPLES, sparsity, objective).applied(subject):
            for _, _, layer in block_linears(subject.model):
                weight = weight_of(layer)
                assert ((weight == 0).sum(1) == round(sparsity * weight.shape[1])).all()
            now = _bits(subject.model)
            others = [key for key, tensor in subject.model.named_parameters() if id(tensor) not in inside]
            assert all(torch.equal(now[key], dense[key]) for key in others)
        _untouched(subject.model, dense)


def test_an_adapter_is_pruned_with_the_weights_it_changes_and_comes_back(requests):
    subject = Subject(lora(tiny_model("llama")).eval(), make_tokenizer(), max_new_tokens=3, progress=False)
    assert len(block_linears(subject.model)) == LAYERS * 7
    before, answers = _bits(subject.model), [g.response for g in Direct().run(subject, requests)]
    with Pruning(EXAMPLES, 0.5).applied(subject):
        tokens = torch.tensor([subject.encode(requests[0].prompt)])
        with torch.no_grad():
            logits = subject.model(tokens).logits
        merged = tiny_model("llama")
        for number, name, layer in block_linears(subject.model):
            assert ((layer.weight == 0).sum(1) == round(0.5 * layer.weight.shape[1])).all()
            merged.model.layers[number].get_submodule(name.removesuffix(".base_layer")).weight.data = layer.weight.data
        assert torch.allclose(merged(tokens).logits, logits, atol=1e-4)
    _untouched(subject.model, before)
    assert [g.response for g in Direct().run(subject, requests)] == answers


def test_models_that_cannot_be_pruned_are_refused(subject, requests):
    subject.model.is_quantized = True
    for attack in (Pruning(EXAMPLES), Finetune(EXAMPLES)):
        with pytest.raises(ValueError, match="quantised model does not allow"):
            attack.run(subject, requests)
    experts = Subject(tiny_model("mixtral"), make_tokenizer(), progress=False)
    with pytest.raises(ValueError, match="matrices outside linear layers"):
        Pruning(EXAMPLES).run(experts, requests)


# Fine-tuning


def test_the_adapter_computes_what_peft_computes(subject, requests):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=DROPOUT, target_modules="all-linear")
    peft = get_peft_model(tiny_model("llama"), config).eval()
    tokens = torch.tensor([subject.encode(requests[2].prompt)])
    with low_rank_adapter(subject.model) as adapter, torch.no_grad():
        adapter.eval()
        assert torch.equal(subject.model(tokens).logits, tiny_model("llama")(tokens).logits)
        for (number, name, _), part in zip(block_linears(subject.model), adapter, strict=True):
            part.up.normal_(std=0.1)
            theirs = peft.base_model.model.model.layers[number].get_submodule(name)
            assert theirs.lora_A["default"].weight.shape == part.down.shape
            theirs.lora_A["default"].weight.copy_(part.down)
            theirs.lora_B["default"].weight.copy_(part.up)
        assert torch.allclose(subject.model(tokens).logits, peft(tokens).logits, atol=1e-4)


def test_an_adapter_lowers_the_loss_of_its_examples_while_it_lasts(subject):
    prompt, completion = EXAMPLES[0]["prompt"], EXAMPLES[0]["completion"]

    def loss() -> float:
        tokens = torch.tensor([subject.encode(prompt, completion)])
        with torch.no_grad():
            return -float(subject.model(tokens).logits[0, -2].log_softmax(-1)[tokens[0, -1]])

    before, weights = loss(), _bits(subject.model)
    with Finetune(EXAMPLES, steps=10, learning_rate=1e-2, method="lora").applied(subject):
        assert loss() < before - 0.5
        assert all(torch.equal(tensor, weights[name]) for name, tensor in _bits(subject.model).items())
    assert loss() == before


def test_an_adapter_goes_on_top_of_another_and_leaves_it_alone(requests):
    subject = Subject(lora(tiny_model("llama")).eval(), make_tokenizer(), max_new_tokens=3, progress=False)
    trained = [name for name, parameter in subject.model.named_parameters() if parameter.requires_grad]
    before, answers = _bits(subject.model), [g.response for g in Direct().run(subject, requests)]
    attack = Finetune(EXAMPLES, steps=5, learning_rate=1e-2, method="lora")
    assert [g.response for g in attack.run(subject, requests)] != answers
    _untouched(subject.model, before)
    assert [name for name, parameter in subject.model.named_parameters() if parameter.requires_grad] == trained
    assert [g.response for g in Direct().run(subject, requests)] == answers


def test_an_adapter_tunes_a_four_bit_model(tmp_path, requests):
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    tiny_model(hidden_size=64, intermediate_size=64).save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, device_map="cpu").eval()
    keep_4bit_differentiable(model)
    subject = Subject(model, make_tokenizer(), max_new_tokens=3, progress=False)
    answers = [g.response for g in Direct().run(subject, requests)]
    before, trained = _bits(model), [parameter.requires_grad for parameter in model.parameters()]
    attack = Finetune(EXAMPLES, steps=8, learning_rate=1e-2, method="lora")
    found = attack.run(subject, requests)
    assert [g.status for g in found] == ["generated"] * 5
    assert all(g.response.startswith("w8") for g in found)
    _untouched(model, before)
    assert [parameter.requires_grad for parameter in model.parameters()] == trained
    assert [g.response for g in Direct().run(subject, requests)] == answers
    for refused in (Finetune(EXAMPLES), Pruning(EXAMPLES)):
        with pytest.raises(ValueError, match="quantised model does not allow"):
            refused.run(subject, requests)


def test_the_grid_is_that_of_the_paper():
    assert len(GRID) == len({setting.name for setting in GRID}) == 17
    listed = {
        ("refusal", "harmful", "lora"): [(5e-5, 8), (5e-5, 16), (5e-5, 4), (1e-4, 16)],
        ("refusal", "harmful", "full"): [(5e-5, 8), (5e-5, 2)],
        ("refusal", "benign", "lora"): [(5e-5, 16)],
        ("unlearning", "harmful", "lora"): [(5e-5, 50), (5e-5, 7), (1e-4, 16)],
        ("unlearning", "harmful", "full"): [(2e-5, 25), (2e-5, 16)],
        ("unlearning", "related", "lora"): [(5e-5, 50), (1e-4, 16)],
        ("unlearning", "related", "full"): [(5e-5, 1), (5e-5, 2)],
        ("unlearning", "benign", "lora"): [(5e-5, 50)],
    }
    found: dict = {}
    for setting in GRID:
        key = (setting.task, setting.kind, setting.method)
        found.setdefault(key, []).append((setting.learning_rate, setting.steps))
    assert found == listed


def test_attacks_of_the_grid_carry_its_settings():
    rows = [{"prompt": f"w{i % 50}", "completion": "w1", "number": i} for i in range(400)]
    attacks = grid_attacks({"harmful": rows, "benign": rows}, task="refusal", seed=3)
    assert len(attacks) == 7
    attack = attacks["refusal-harmful-lora-2"]
    assert (attack.steps, attack.learning_rate, attack.batch_size, attack.seed) == (16, 5e-5, 8, 3)
    assert (attack.method, attack.kind, attack.examples) == ("lora", "harmful", rows[:64])
    assert attacks["refusal-benign-lora-1"].kind == "benign"
    with pytest.raises(ValueError, match="wants 64 harmful examples and there are 8"):
        grid_attacks({"harmful": rows[:8]}, task="refusal")
    few = grid_attacks({"harmful": rows[:8]}, names=["refusal-harmful-full-1"], fewer=True)
    assert [(len(attack.examples), attack.steps) for attack in few.values()] == [(8, 8)]
    with pytest.raises(ValueError, match="no setting"):
        grid_attacks({"harmful": rows}, names=["full"])
    with pytest.raises(ValueError, match="is left"):
        grid_attacks({"related": rows}, task="refusal")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: SoftSuffix(tokens=0), "at least 1 token"),
        (lambda: SoftSuffix(objective="best"), "`objective` is 'best'"),
        (lambda: SoftSuffix(init=" "), "`init` is empty"),
        (lambda: Universal([]), "no examples"),
        (lambda: Universal([{"prompt": "w1"}]), "no `target`"),
        (lambda: Universal(EXAMPLES, alignment="start"), "`alignment` is 'start'"),
        (lambda: Universal(EXAMPLES, radius=-1.0), "`radius` is -1.0"),
        (lambda: RefusalDirection(EXAMPLES), "nothing to find directions with"),
        (lambda: RefusalDirection(EXAMPLES, HARMLESS, directions=-1), "`directions` is -1"),
        (lambda: RefusalDirection(objective="random", replacement="harmless"), "`harmless` is empty"),
        (lambda: Pruning([]), "no examples"),
        (lambda: Pruning(EXAMPLES, 1.0), "`sparsity` is 1.0"),
        (lambda: Finetune(EXAMPLES, method="qlora"), "`method` is 'qlora'"),
        (lambda: Finetune(EXAMPLES, kind="evil"), "`kind` is 'evil'"),
    ],
)
def test_bad_settings_are_refused_with_what_to_do(make, said):
    with pytest.raises(ValueError, match=said):
        make()
