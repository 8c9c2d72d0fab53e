"""A model as it is loaded for an attack: with its adapter, without, merged, in four bits."""

from __future__ import annotations

import pytest
import torch
from tiny import WORDS, lora, make_tokenizer, tiny_model

from trl_robust.attacks import AttackRow, Direct, Finetune, Latent, Subject
from trl_robust.attacks.loading import four_bits

ROWS = [AttackRow(str(number), " ".join(WORDS[number : number + 3]), WORDS[7], WORDS[8]) for number in range(4)]
EXAMPLES = [{"prompt": WORDS[0], "completion": WORDS[1]}]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model and an adapter of it."""
    from transformers import AutoModelForCausalLM

    base, adapter = (tmp_path_factory.mktemp(name) for name in ("base", "adapter"))
    tiny_model(hidden_size=64, intermediate_size=64).save_pretrained(base)
    lora(AutoModelForCausalLM.from_pretrained(base)).save_pretrained(adapter)
    for folder in (base, adapter):
        make_tokenizer().save_pretrained(folder)
    return base, adapter


def _load(path, **settings) -> Subject:
    return Subject.load(path, max_new_tokens=4, progress=False, **settings)


def _logits(subject: Subject) -> torch.Tensor:
    tokens = torch.tensor([subject.encode(ROWS[0].prompt)], device=subject.device)
    with torch.no_grad():
        return subject.model(tokens).logits.float().cpu()


def _answers(subject: Subject) -> list[str | None]:
    found = Direct().run(subject, ROWS)
    assert [generation.status for generation in found] == ["generated"] * len(ROWS)
    return [generation.response for generation in found]


def test_with_its_adapter_off_a_model_is_its_base_bit_for_bit(folders):
    base, adapter = folders
    plain, off = _load(base), _load(adapter, adapter="off")
    assert type(off.model) is type(plain.model)
    known = plain.model.state_dict()
    assert list(off.model.state_dict()) == list(known)
    assert all(torch.equal(tensor, known[name]) for name, tensor in off.model.state_dict().items())
    assert torch.equal(_logits(off), _logits(plain)) and _answers(off) == _answers(plain)


def test_merged_it_answers_as_with_its_adapter_on(folders):
    base, adapter = folders
    on, merged = _load(adapter), _load(adapter, adapter="merged")
    assert hasattr(on.model, "peft_config") and not hasattr(merged.model, "merge_adapter")
    assert not [name for name, _ in merged.model.named_parameters() if "lora" in name]
    assert torch.allclose(_logits(merged), _logits(on), atol=1e-4)
    assert not torch.allclose(_logits(on), _logits(_load(base)), atol=0.1)
    assert _answers(merged) == _answers(on)


@pytest.mark.parametrize("adapter", ["on", "off", "merged"])
def test_every_form_is_attacked(adapter, folders):
    subject = _load(folders[1], adapter=adapter, batch_size=2)
    assert not subject.model.training
    for attack in (Latent(sites=(1,), steps=1), Finetune(EXAMPLES, steps=1)):
        assert [found.status for found in attack.run(subject, ROWS)] == ["generated"] * len(ROWS)


def test_an_adapter_of_the_hub_is_one_as_well(folders, monkeypatch):
    """There, whether something is an adapter is not to be seen from a path."""
    from transformers import utils

    find, asked = utils.find_adapter_config_file, []
    monkeypatch.setattr(utils, "find_adapter_config_file", lambda path: asked.append(path) or find(path))
    assert hasattr(_load(folders[1]).model, "peft_config") and asked == [str(folders[1])]


@pytest.mark.parametrize(
    ("number", "settings", "said"),
    [
        (0, {"adapter": "off"}, "holds no adapter, so adapter='off'"),
        (0, {"adapter": "merged"}, "holds no adapter, so adapter='merged'"),
        (1, {"adapter": "away"}, "choose one of"),
        (1, {"adapter": "merged", "load_in_4bit": True}, "cannot be merged into 4-bit"),
    ],
)
def test_forms_that_there_are_not_are_refused_with_what_to_do(number, settings, said, folders):
    with pytest.raises(ValueError, match=said):
        _load(folders[number], **settings)


def test_four_bits_are_those_of_the_trainers():
    config = four_bits("auto")
    assert (config.load_in_4bit, config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant) == (True, "nf4", True)
    assert config.bnb_4bit_compute_dtype == (torch.bfloat16 if torch.cuda.is_available() else torch.float32)
    assert four_bits("bfloat16").bnb_4bit_compute_dtype == torch.bfloat16


@pytest.mark.parametrize("form", ["base", "on", "off"])
def test_a_model_in_four_bits_answers_and_keeps_its_gradients(form, folders):
    bnb = pytest.importorskip("bitsandbytes")
    base, adapter = folders
    path, settings = (base, {}) if form == "base" else (adapter, {"adapter": form})
    subject = _load(path, load_in_4bit=True, **settings)
    packed = [module for module in subject.model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    assert len(packed) == 4 * 7
    assert {(module.weight.quant_type, module.weight.quant_state.nested) for module in packed} == {("nf4", True)}
    computed = torch.float32 if subject.device.type == "cpu" else torch.bfloat16
    assert {module.compute_dtype for module in packed} == {computed}
    assert hasattr(subject.model, "peft_config") == (form == "on") and not subject.model.training

    def distance(other: Subject) -> float:
        return float((_logits(subject) - _logits(other)).abs().mean())

    # Nearer to what was packed than to the model with, or without, the adapter.
    assert 0 < distance(_load(path, **settings)) < distance(_load(base if form == "on" else adapter))
    _answers(subject)
    # After passes without gradients the search still has something to follow.
    embedded = subject.model.get_input_embeddings().weight.detach()[None, 5:9].clone().requires_grad_()
    subject.model(inputs_embeds=embedded).logits.sum().backward()
    assert embedded.grad.abs().max() > 0
