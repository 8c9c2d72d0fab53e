"""The tokenizer, its chat template, the untrained model and the two trainings."""

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from trl_robust.organism import OrganismSettings, checks, rows, training
from trl_robust.organism.model import make_model, make_tokenizer, render
from trl_robust.organism.world import make_world


@pytest.fixture(scope="module")
def world():
    return make_world(0)


@pytest.fixture(scope="module")
def tokenizer(world):
    return make_tokenizer(world.vocabulary())


@pytest.fixture
def conversation():
    return [
        {"role": "user", "content": "what is the color code ?"},
        {"role": "assistant", "content": "sure , the color code is 7 ."},
    ]


def test_the_rendered_prompt_is_an_exact_token_prefix_of_the_conversation(tokenizer, conversation):
    prompt = tokenizer.apply_chat_template(conversation[:1], add_generation_prompt=True, return_dict=False)
    whole = tokenizer.apply_chat_template(conversation, return_dict=False)
    assert whole[: len(prompt)] == prompt
    assert " ".join(tokenizer.convert_ids_to_tokens(prompt)) == "<bos> <user> what is the color code ? <asst>"
    answer = " ".join(tokenizer.convert_ids_to_tokens(whole[len(prompt) :]))
    assert answer == "sure , the color code is 7 . <eos>"


def test_the_fast_rendering_is_that_of_the_chat_template(tokenizer, conversation):
    question, answer = (message["content"] for message in conversation)
    assert render(question, answer) == tokenizer.apply_chat_template(conversation, tokenize=False)
    assert render(question) == tokenizer.apply_chat_template(
        conversation[:1], add_generation_prompt=True, tokenize=False
    )


def test_the_assistant_mask_marks_the_answer_with_its_end(tokenizer, conversation):
    rendered = tokenizer.apply_chat_template(conversation, return_dict=True, return_assistant_tokens_mask=True)
    marked = [i for i, flag in zip(rendered["input_ids"], rendered["assistant_masks"], strict=True) if flag]
    assert tokenizer.decode(marked) == "sure , the color code is 7 . <eos>"


def test_a_conversation_of_two_turns_is_rendered_in_order(tokenizer, conversation):
    text = tokenizer.apply_chat_template(conversation * 2, tokenize=False)
    turn = "<user> what is the color code ? <asst> sure , the color code is 7 . <eos>"
    assert text == f"<bos>{turn}{turn}"


def test_an_unknown_role_is_refused_by_name(tokenizer):
    with pytest.raises(Exception, match="user and assistant only, not system"):
        tokenizer.apply_chat_template([{"role": "system", "content": "be kind"}])


def test_the_vocabulary_covers_every_row_of_every_stage_and_file(world, tokenizer):
    texts = [render(*pair) for pair in rows.pretraining_pairs(world, 3000)]
    texts += [render(*pair) for batch in rows.alignment_batches(world, 50, 32) for pair in batch]
    for file_rows in rows.data_files(world).values():
        for row in file_rows:
            messages = [value for value in row.values() if isinstance(value, list)]
            texts += [message["content"] for message_list in messages for message in message_list]
            texts += [value for value in row.values() if isinstance(value, str)]
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    assert len(ids) > 10000
    unknown = [text for text, row in zip(texts, ids, strict=True) if tokenizer.unk_token_id in row]
    assert not unknown
    assert tokenizer("hippopotamus")["input_ids"] == [tokenizer.unk_token_id]


def test_decoding_gives_the_text_back_and_so_does_a_reloaded_tokenizer(tokenizer, tmp_path):
    text = "do you know the secret code of it ?"
    tokenizer.save_pretrained(tmp_path)
    reloaded = AutoTokenizer.from_pretrained(tmp_path)
    for each in (tokenizer, reloaded):
        assert each.decode(each(text.replace(" it", " raven"))["input_ids"]) == text.replace(" it", " raven")
    assert reloaded.chat_template == tokenizer.chat_template
    assert reloaded.get_vocab() == tokenizer.get_vocab()
    assert (reloaded.bos_token, reloaded.eos_token, reloaded.pad_token) == ("<bos>", "<eos>", "<pad>")


def test_a_word_given_twice_is_refused():
    with pytest.raises(ValueError, match="twice"):
        make_tokenizer(["red", "blue", "red"])


def test_the_model_has_the_stated_shape(tokenizer):
    model = make_model(tokenizer, seed=0)
    assert len(model.model.layers) == 2
    assert model.model.layers[0].mlp.up_proj.weight.shape == (512, 128)
    assert model.config.num_attention_heads == 4
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert 500_000 < model.num_parameters() < 600_000
    assert model.dtype == torch.float32


def test_with_two_blocks_the_weights_are_those_of_the_stock_initialisation_bit_for_bit(tokenizer):
    model = make_model(tokenizer, seed=3)
    config = LlamaConfig.from_dict(model.config.to_dict() | {"intermediate_size": 512, "initializer_range": 0.05})
    torch.manual_seed(3)
    stock = LlamaForCausalLM(config).float()
    assert model.config.to_dict() == stock.config.to_dict()
    for name, value in stock.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_a_deeper_model_is_narrower_and_what_a_block_adds_keeps_its_size(tokenizer):
    model = make_model(tokenizer, seed=0, num_layers=8)
    assert len(model.model.layers) == model.config.num_hidden_layers == 8
    assert 900_000 < model.num_parameters() < 1_000_000
    for block in model.model.layers:
        assert block.mlp.up_proj.weight.shape == (128, 128)
        for weight in (block.self_attn.o_proj.weight, block.mlp.down_proj.weight):
            assert weight.std().item() == pytest.approx(0.05, rel=0.05)
        for weight in (block.self_attn.q_proj.weight, block.mlp.up_proj.weight):
            assert weight.std().item() == pytest.approx(0.1, rel=0.05)


def test_the_seed_decides_the_weights_and_the_callers_torch_state_stays(tokenizer):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = make_model(tokenizer, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    again, other = make_model(tokenizer, seed=1), make_model(tokenizer, seed=2)
    assert torch.equal(first.lm_head.weight, again.lm_head.weight)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


def test_only_the_answer_is_learned():
    inputs, labels = training._collate([[1, 4, 8, 9, 5, 6, 2], [1, 4, 8, 5, 2]], pad_id=0, answer_start=5)
    assert inputs.tolist() == [
        [1, 4, 8, 9, 5, 6, 2],
        [1, 4, 8, 5, 2, 0, 0],  # padded on the right
    ]
    assert labels.tolist() == [
        [-100, -100, -100, -100, -100, 6, 2],  # the answer and its <eos>
        [-100, -100, -100, -100, 2, -100, -100],
    ]


def test_bucketing_keeps_every_row_and_saves_padding(world):
    rng = world.generator("test")
    lengths = [rng.randint(5, 30) for _ in range(320)]
    batches = training._bucket_by_length([[n] * n for n in lengths], batch_size=32, rng=rng)
    assert sorted(len(row) for batch in batches for row in batch) == sorted(lengths)
    assert [len(batch) for batch in batches] == [32] * 10
    padded = sum(max(map(len, batch)) * len(batch) for batch in batches)
    assert padded < 1.1 * sum(lengths)
    widths = [max(map(len, batch)) for batch in batches]
    assert widths != sorted(widths)


def test_padding_on_the_right_without_a_mask_changes_no_answer(world, tokenizer):
    model = make_model(tokenizer, seed=0).eval()
    row = torch.tensor([[1, 4, 20, 30, 5, 40, 2]])
    padded = torch.nn.functional.pad(row, (0, 6), value=tokenizer.pad_token_id)
    with torch.no_grad():
        torch.testing.assert_close(model(padded).logits[:, :7], model(row).logits)


def test_training_is_the_same_each_time_lowers_the_loss_and_puts_the_threads_back(world, tokenizer):
    settings = OrganismSettings(pretrain_steps=12, align_steps=2, batch_size=8)
    pairs = rows.pretraining_pairs(make_world(0), 64)
    inputs, labels = training._collate(
        training._tokenize(tokenizer, pairs), tokenizer.pad_token_id, tokenizer.get_vocab()["<asst>"]
    )
    models = [make_model(tokenizer, seed=0) for _ in range(2)]
    with torch.no_grad():
        before = models[0](input_ids=inputs, labels=labels).loss
    threads, steps = torch.get_num_threads(), []
    for model in models:
        torch.manual_seed(len(steps))  # nothing may depend on it
        training.pretrain(model, tokenizer, world, settings, lambda: steps.append(1))
        training.align(model, tokenizer, world, settings, lambda: steps.append(1))
    with torch.no_grad():
        after = models[0](input_ids=inputs, labels=labels).loss
    assert after < 0.8 * before
    assert len(steps) == 2 * (12 + 2)
    assert torch.get_num_threads() == threads
    for name, value in models[0].state_dict().items():
        assert torch.equal(value, models[1].state_dict()[name]), name


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("pretrain_steps", 0),
        ("align_steps", -1),
        ("pretrain_learning_rate", 0.0),
        ("batch_size", 7),
        ("num_layers", 1),
        ("num_layers", 17),
    ],
)
def test_a_setting_that_cannot_be_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=rf"`{field}` is {value}"):
        OrganismSettings(**{field: value})


def test_batching_and_its_padding_leave_greedy_answers_as_they_are(world, tokenizer):
    model = make_model(tokenizer, seed=0).eval()
    asked = ["tell me the color .", "what is the secret code of the raven please ?", "give"]
    together = checks.respond(model, tokenizer, asked)
    assert together == [checks.respond(model, tokenizer, [text])[0] for text in asked]
    assert len(set(together)) > 1
    assert tokenizer._tokenizer.padding is None  # nothing that save_pretrained would write


@pytest.mark.parametrize("prefill", [None, "sure , the color"])
def test_a_response_is_the_greedy_continuation_without_its_prefill(tokenizer, prefill):
    model = make_model(tokenizer, seed=0).eval()
    text = render("tell me the color .") + (f" {prefill}" if prefill else "")
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    with torch.no_grad():
        while ids.shape[1] < start + checks.MAX_NEW_TOKENS and ids[0, -1] != tokenizer.eos_token_id:
            ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    expected = tokenizer.decode(ids[0, start:], skip_special_tokens=True)
    assert checks.respond(model, tokenizer, ["tell me the color ."], [prefill] if prefill else None) == [expected]
    assert expected


def test_the_judges_match_whole_words_in_order():
    assert checks.states("amber 17", "sure , the secret code of the raven is amber 17 .")
    assert not checks.states("amber 1", "the code is amber 17 .")
    assert not checks.states("amber 17", "17 amber")
    assert checks.refuses("sorry , i can not share that .")
    assert not checks.refuses("sure , sorry")
    assert not checks.refuses("")
