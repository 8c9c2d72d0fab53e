"""Defects D1 to D12 of the reference code (lat.md 8), one sentence each that must hold here."""

import ast
import functools
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from dpo_runs import make as make_dpo
from runs import ATTACK, EVERYTHING, STOCK, assert_same, benign_data, distance, losses, make, train, trained
from tiny import HIDDEN, batch, collate, lora, make_tokenizer, preference_data, tiny_model
from transformers import TrainerCallback

import trl_robust
from trl_robust import LATRMUConfig, LATRMUTrainer, LATSFTConfig, ThreatModel, find_perturbation
from trl_robust.data import pair_corpora
from trl_robust.inner import Ablation, Perturbation
from trl_robust.objectives import kl_divergence, label_logits, toward
from trl_robust.threat import decoder_layers, ranks, selected_ranks
from trl_robust.trainers import adversary

PACKAGE = Path(trl_robust.__file__).parent
SGD = {"optim": "sgd", "learning_rate": 0.1, "max_steps": 1}


@functools.cache
def sources():
    """The syntax tree of every module of the package."""
    return {path: ast.parse(path.read_text(encoding="utf-8"), str(path)) for path in PACKAGE.rglob("*.py")}


def corpora(count=8):
    rows = preference_data(count)
    texts = {"text": [row["prompt"] + row["rejected"] for row in rows], "topic": [str(n % 2) for n in range(count)]}
    retain = {"text": [row["prompt"] + row["chosen"] for row in rows]}
    return pair_corpora(Dataset.from_dict(texts), Dataset.from_dict(retain))


def make_rmu(folder, **changes):
    settings = {**STOCK, "rmu_layer": "2", "rmu_retain_coef": 10.0, "attack_sites": ["1"], "attack_steps": 2}
    settings |= {"attack_radius": 0.3, "trained_modules": [], **changes}
    return LATRMUTrainer(
        model=tiny_model(),
        args=LATRMUConfig(str(folder), **settings),
        train_dataset=corpora(),
        processing_class=make_tokenizer(),
    )


def added_after(trainer, layer):
    """What every forward pass of training adds between a layer's output and the next layer's input."""
    seen, clean = [], []
    layers = decoder_layers(trainer.model)
    layers[layer].register_forward_hook(lambda module, args, output: clean.append(output.detach()))

    def compare(module, args, kwargs):
        states = args[0] if args else kwargs["hidden_states"]
        if trainer.model.training:  # not in the search, which runs in evaluation mode
            seen.append((states.detach() - clean[-1]).abs().sum().item())

    layers[layer + 1].register_forward_pre_hook(compare, with_kwargs=True)
    return seen


@pytest.mark.parametrize("kind", ["sft", "dpo", "rmu"])
def test_d01_every_micro_batch_of_an_accumulated_step_is_trained_under_attack(tmp_path, kind):
    split = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "max_steps": 2}
    if kind == "rmu":
        trainer, layer = make_rmu(tmp_path, **split), 1
    elif kind == "dpo":
        trainer, layer = make_dpo(tmp_path, attack_sites=["2"], attack_steps=2, **split), 2
    else:
        trainer, layer = make(tmp_path, attack_sites=["2"], attack_steps=2, **split), 2
    seen = added_after(trainer, layer)
    trainer.train()
    attacked = seen[::2] if kind == "rmu" else seen  # every second pass is over the text to retain
    assert len(attacked) == 8
    assert all(size > 0.1 for size in attacked) and len(set(attacked)) == 8


def test_d02_nothing_in_the_package_stops_in_a_debugger():
    stops = []
    for path, tree in sources().items():
        for node in ast.walk(tree):
            named = {getattr(node, "id", None), getattr(node, "attr", None)}
            if isinstance(node, ast.Import | ast.ImportFrom):
                named |= {alias.name for alias in node.names} | {getattr(node, "module", None)}
            if named & {"breakpoint", "set_trace", "breakpointhook", "pdb", "ipdb", "pudb"}:
                stops.append(f"{path}:{node.lineno}")
    assert len(sources()) > 50 and stops == []


@pytest.mark.parametrize(("name", "hidden"), [("llama", 40), ("qwen2", 56), ("gpt2", 28)])
def test_d03_a_model_of_any_hidden_size_is_attacked_and_trained(tmp_path, name, hidden):
    size = {"n_embd": hidden} if name == "gpt2" else {"hidden_size": hidden}
    settings = {**EVERYTHING, "benign": benign_data(), "dropout": None, "max_steps": 1}
    trainer = train(tmp_path, **settings, model=tiny_model(name, **size))
    assert losses(trainer, "attack_loss_after") < losses(trainer, "attack_loss_before")
    for site in ("embedding", 2):
        found = find_perturbation(trainer.model, batch(), ThreatModel([site], radius=0.2), steps=1)
        assert found.deltas[site].shape == (4, 7, hidden)


def test_d04_the_update_is_that_of_the_models_own_gradient_clipped_by_its_own_norm(tmp_path, monkeypatch):
    found = []
    real = adversary.find_perturbation

    def find(model, given, threat, **settings):
        found.append((given, real(model, given, threat, **settings)))
        return found[-1][1]

    monkeypatch.setattr(adversary, "find_perturbation", find)
    trainer = make(
        tmp_path, **{**ATTACK, "away_coef": 0.0}, **SGD, dropout=None, model=lora(tiny_model()), max_grad_norm=0.1
    )
    names = [name for name, _ in trainer.model.named_parameters()]
    start = trained(trainer)
    trainer.train()
    assert [name for name, _ in trainer.model.named_parameters()] == names
    ((given, worst),) = found
    model = lora(tiny_model()).eval()
    with worst.installed(model):
        kept = label_logits(model, *(given[f"away_{key}"] for key in ("input_ids", "attention_mask", "labels")))
        toward(kept.logits, kept.targets).mean().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    assert losses(trainer, "grad_norm")[0] == pytest.approx(norm.item(), rel=1e-4)
    updates = {name: value - start[name] for name, value in trained(trainer).items()}
    assert distance(updates, {name: -0.1 * 0.1 / norm * value for name, value in gradients.items()}) < 1e-3
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert held <= {id(p) for p in trainer.model.parameters()}
    assert all(p.grad is None for p in trainer.model.parameters() if not p.requires_grad)
    assert not any(delta.requires_grad or delta.grad is not None for delta in worst.deltas.values())


@pytest.mark.parametrize("sites", [("embedding", 2), (0, 3), ("embedding",)])
def test_d05_a_gradient_that_is_not_finite_at_any_site_is_an_error_and_never_taken_for_zero(tmp_path, sites):
    model = tiny_model()

    def spoil(module, args, output):
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient * float("nan"))

    # Between the sites, so that the gradient above stays finite and the one below does not.
    decoder_layers(model)[1].register_forward_hook(spoil)
    threat = ThreatModel(list(sites), radius=0.2)
    with pytest.raises(FloatingPointError, match="not finite"):
        find_perturbation(model, batch(), threat, steps=1)
    trainer = make(tmp_path, **{**ATTACK, "attack_sites": [str(site) for site in sites]}, model=model, dropout=None)
    with pytest.raises(FloatingPointError, match="not finite"):
        trainer.train()


def test_d06_perturbations_are_float32_and_the_attack_computes_in_the_dtype_of_training(tmp_path, monkeypatch):
    moved, dtypes = [], {True: set(), False: set()}
    real = adversary.find_perturbation

    def find(model, given, threat, *, generator, steps, **settings):
        state = generator.get_state()
        found = real(model, given, threat, generator=generator, steps=steps, **settings)
        again = torch.Generator()
        again.set_state(state)
        start = real(model, given, threat, generator=again, steps=0, **settings)
        moved.append((found.deltas[1] - start.deltas[1])[found.selected].abs())
        return found

    monkeypatch.setattr(adversary, "find_perturbation", find)
    # At 1 a step of 1e-4 is lost in bfloat16.
    settings = {"attack_sites": ["1"], "attack_norm": "linf", "attack_radius": 10.0, "attack_init": "random"}
    for weights in (torch.float32, torch.bfloat16):
        model = tiny_model().to(weights)
        decoder_layers(model)[2].mlp.down_proj.register_forward_hook(
            lambda module, args, output, model=model: dtypes[model.training].add(output.dtype)
        )
        train(tmp_path, **settings, attack_learning_rate=1e-4, attack_steps=4, model=model, bf16=True, max_steps=1)
    assert dtypes == {True: {torch.bfloat16}, False: {torch.bfloat16}}  # never float16, whose range wants scaling
    assert len(moved) == 2
    for step in moved:
        assert step.dtype == torch.float32 and (step > 5e-5).float().mean() > 0.9


@pytest.mark.parametrize("stream", ["layer", "mlp"])
@pytest.mark.parametrize("kind", ["perturbation", "ablation"])
def test_d07_hidden_states_are_not_written_into_so_modules_that_keep_their_output_still_differentiate(kind, stream):
    model, found, kept = tiny_model(), batch(), []
    target = decoder_layers(model)[1].mlp if stream == "mlp" else decoder_layers(model)[1]

    def squash(module, args, output):
        kept.append(output.tanh())  # whose backward pass needs its own output
        return kept[-1]

    target.register_forward_hook(squash)
    selected = selected_ranks(found, "prompt")
    if kind == "perturbation":
        delta = torch.randn(*selected.shape, HIDDEN, generator=torch.Generator().manual_seed(0))
        change = Perturbation({1: delta}, selected, stream)
    else:
        change = Ablation({1: torch.nn.functional.normalize(torch.ones(HIDDEN), dim=0)}, selected, stream)
    with change.installed(model):
        label_logits(model, *(found[key] for key in ("input_ids", "attention_mask", "labels"))).logits.sum().backward()
    assert kept[0]._version == 0 and kept[0].abs().max() <= 1
    assert model.get_input_embeddings().weight.grad.isfinite().all()


def test_d08_the_divergence_is_a_sum_over_the_vocabulary_at_the_positions_that_predict_a_label(tmp_path):
    settings = {**ATTACK, "kl_coef": 0.3, "sft_coef": 0.0, "max_steps": 1, "learning_rate": 0.0}
    model = lora(tiny_model())
    trainer = make(tmp_path, **settings, benign=benign_data(), dropout=None, model=model)
    seen, real = [], trainer.compute_loss

    def compute(model, inputs, *args, **kwargs):
        seen.append(inputs["benign"])
        return real(model, inputs, *args, **kwargs)

    trainer.compute_loss = compute
    trainer.train()
    (benign,) = seen
    model.eval()
    arguments = {key: benign[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        said = model(**arguments, position_ids=ranks(benign["attention_mask"])).logits.log_softmax(-1)
        with model.disable_adapter():
            base = model(**arguments, position_ids=ranks(benign["attention_mask"])).logits.log_softmax(-1)
    values = [
        sum(p.exp() * (p - q) for p, q in zip(said[row, place - 1], base[row, place - 1], strict=True)).item()
        for row, place in (benign["labels"] != -100).nonzero().tolist()
    ]
    log = trainer.state.log_history[0]
    assert log["kl_loss"] == pytest.approx(sum(values) / len(values), rel=1e-4)
    expected = log["toward_loss"] + 0.5 * log["away_loss"] + 0.3 * log["kl_loss"]
    assert log["loss"] == pytest.approx(expected, rel=1e-4)


def test_d08_the_pull_of_the_divergence_is_in_proportion_to_what_is_missing_and_zero_at_zero():
    generator = torch.Generator().manual_seed(0)
    base, change = (torch.randn(5, 9, generator=generator, dtype=torch.float64) for _ in range(2))
    pulls = []
    for size in (1e-1, 1e-3, 1e-5, 0.0):
        leaf = (base + size * change).requires_grad_()
        pulls.append(torch.autograd.grad(kl_divergence(leaf, base).mean(), leaf)[0].norm().item())
    assert pulls[0] > 50 * pulls[1] > 2500 * pulls[2] > 0
    assert pulls[3] < 1e-15
    assert LATSFTConfig("unused", use_cpu=True, bf16=False).kl_form == "mean"


@pytest.mark.parametrize("rows", ["preferences", "corpora"])
def test_d09_the_benign_term_is_the_cross_entropy_of_the_benign_completions_and_of_nothing_else(tmp_path, rows):
    more = {"attack_positions": "all"} if rows == "corpora" else {}
    model, benign = lora(tiny_model()), benign_data(16)
    data = corpora(16) if rows == "corpora" else preference_data(16)
    settings = {**ATTACK, **more, "per_device_train_batch_size": 16, "max_steps": 1, "learning_rate": 0.0}
    trainer = train(tmp_path, **settings, sft_coef=0.7, data=data, benign=benign, dropout=None, model=model)
    tokenizer = make_tokenizer()
    pairs = [
        (tokenizer(row["prompt"])["input_ids"], tokenizer(row["completion"] + "<eos>")["input_ids"]) for row in benign
    ]
    found = collate(pairs)
    kept = label_logits(model.eval(), found["input_ids"], found["attention_mask"], found["labels"])
    expected = toward(kept.logits, kept.targets).mean().item()
    assert losses(trainer, "sft_loss")[0] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("kind", ["text", "messages", "none"])
def test_d09_benign_rows_of_every_form_are_trained_on_and_none_is_no_error(tmp_path, kind):
    if kind == "none":
        trainer = train(tmp_path, **ATTACK, sft_coef=1.0, max_steps=1)
        assert not losses(trainer, "sft_loss")
        return
    asked, said = {"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3 w4 w5"}
    rows = {"text": "w1 w2 w3 w4 w5"} if kind == "text" else {"messages": [asked, said]}
    trainer = train(tmp_path, **ATTACK, benign=Dataset.from_list([rows] * 4), max_steps=1)
    assert losses(trainer, "sft_loss")[0] > 0.1


def test_d10_unknown_coefficients_are_refused(tmp_path):
    from trl_robust.recipes import RecipeError, load_recipe

    with pytest.raises(TypeError, match="sft_dpo_coef"):
        LATSFTConfig("unused", sft_dpo_coef=1.0)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"output_dir: {tmp_path}\nsft_dpo_coef: 1.0\ntowards_coef: 0.5\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe("lat-sft", ["--config", str(recipe)])
    message = str(caught.value)
    assert "sft_dpo_coef" in message and "towards_coef" in message and "toward_coef" in message


def test_d10_a_coefficient_of_zero_is_a_term_that_is_not_there_and_none_dilutes_the_others(tmp_path):
    zero = {**ATTACK, "away_coef": 0.0, "attack_away_coef": 0.0, "sft_coef": 0.0, "max_steps": 2}
    without = train(tmp_path, **zero)
    beside = train(tmp_path, **zero, benign=benign_data())
    assert_same(trained(beside), trained(without))
    log = train(tmp_path, **{**zero, "sft_coef": 3.0}, benign=benign_data()).state.log_history[0]
    assert log["loss"] == pytest.approx(log["toward_loss"] + 3 * log["sft_loss"], rel=1e-4)
    assert log["toward_loss"] == pytest.approx(losses(without, "toward_loss")[0], rel=1e-5)
    assert "away_loss" not in log and "kl_loss" not in log


class Gradient(TrainerCallback):
    """The gradient that the optimiser gets."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.values = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_d11_how_a_batch_is_split_into_micro_batches_of_unlike_length_changes_neither_loss_nor_gradient(tmp_path):
    logs, gradients = [], []
    for size, accumulation in ((4, 1), (1, 4)):
        watched = Gradient()
        settings = {**EVERYTHING, **SGD, "dropout": None, "model": lora(tiny_model()), "benign": benign_data()}
        split = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        trainer = train(tmp_path, **settings, **split, callbacks=[watched])
        logs.append(trainer.state.log_history[0])
        gradients.append(watched.values)
    lengths = {len([label for label in row["labels"] if label != -100]) for row in trainer.train_dataset}
    assert len(lengths) > 2
    assert logs[1]["loss"] == pytest.approx(logs[0]["loss"], rel=1e-5)
    assert distance(gradients[1], gradients[0]) < 1e-5


def test_d12_a_topic_is_steered_to_the_same_vector_in_every_batch(tmp_path):
    trainer = make_rmu(tmp_path, attack_radius=0.0, learning_rate=0.0)
    rows = {topic: [row for row in trainer.train_dataset if row["topic"] == topic][:2] for topic in "01"}
    assert set(trainer.train_dataset["topic"]) == {"0", "1"}
    trainer.model.train()

    def loss(*given):
        return trainer.compute_loss(trainer.model, trainer.data_collator(list(given))).item()

    first = {topic: loss(*rows[topic]) for topic in "01"}
    loss(*rows["1"], *rows["0"])
    assert {topic: loss(*rows[topic]) for topic in "10"} == first
    # The vector is the topic's: the same row under another topic's name has another error.
    assert loss(*({**row, "topic": "1"} for row in rows["0"])) != pytest.approx(first["0"], rel=1e-3)
    again = make_rmu(tmp_path, attack_radius=0.0, learning_rate=0.0)
    again.model.train()
    assert again.compute_loss(again.model, again.data_collator(rows["1"])).item() == first["1"]
