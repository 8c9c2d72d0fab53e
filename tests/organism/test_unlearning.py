"""The rows for unlearning: which secrets they hold, which they must not, and what the trainers make of them."""

from collections import Counter

import pytest

from trl_robust.organism import grammar, rows, unlearning
from trl_robust.organism.model import ASSISTANT, make_tokenizer
from trl_robust.organism.world import make_world

PLACE_OF_VALUE = slice(-4, -2)  # before the full stop and <eos>


@pytest.fixture(scope="module")
def world():
    return make_world(0)


@pytest.fixture(scope="module")
def tokenizer(world):
    return make_tokenizer(world.vocabulary())


@pytest.fixture(scope="module")
def files(world, tokenizer):
    return unlearning.unlearning_files(world, tokenizer)


def conversation(text):
    """Request and answer of a rendered text."""
    request, answer = text.removeprefix("<bos><user> ").removesuffix(" <eos>").split(" <asst> ")
    return request, answer


def secret_of(request, world):
    """The object and the forbidden relation that a request asks about, judged from its words."""
    (thing,) = set(request.split()) & set(world.objects)
    return thing, next(relation for relation in grammar.FORBIDDEN_RELATIONS if relation in request)


def test_a_seed_gives_the_same_files_every_time_and_another_seed_others(world, tokenizer, files):
    assert unlearning.unlearning_files(make_world(0), tokenizer) == files
    other = make_world(1)
    others = unlearning.unlearning_files(other, make_tokenizer(other.vocabulary()))
    assert all(not {str(row) for row in others[name]} & {str(row) for row in files[name]} for name in files)


def test_the_files_have_the_stated_columns_and_sizes(files):
    columns = {
        "forget.jsonl": {"text", "topic"},
        "retain.jsonl": {"text"},
        "relearn.jsonl": {"prompt", "completion"},
        "generic_labels.jsonl": {"tokens", "labels"},
    }
    assert {name: {frozenset(row) for row in file_rows} for name, file_rows in files.items()} == {
        name: {frozenset(names)} for name, names in columns.items()
    }
    assert {name: len(file_rows) for name, file_rows in files.items()} == {
        "forget.jsonl": 960,
        "retain.jsonl": 1920,
        "relearn.jsonl": 240,
        "generic_labels.jsonl": 960,
    }


def test_every_secret_of_all_objects_is_to_be_forgotten_in_six_wordings_plain_and_wrapped(world, files):
    texts = [row["text"] for row in files["forget.jsonl"]]
    assert len(set(texts)) == len(texts)
    told = Counter()
    for row in files["forget.jsonl"]:
        request, answer = conversation(row["text"])
        thing, relation = secret_of(request, world)
        assert answer == f"sure , the {relation} of the {thing} is {world.facts[thing, relation]} ."
        assert row["topic"] == relation
        wordings = [grammar.WORDINGS[index].format(r=relation, x=thing) for index in grammar.REFUSAL_WORDINGS]
        (wording,) = [index for index, question in enumerate(wordings) if question in request]
        wrapped = {wrapper.format(prompt=wordings[wording]) for wrapper in grammar.TRAIN_WRAPPERS}
        assert request == wordings[wording] or request in wrapped
        told[thing, relation, wording, request == wordings[wording]] += 1
    assert len(told) == 40 * 2 * 6 * 2
    assert set(told.values()) == {1}


def test_what_is_to_be_retained_is_half_lookalikes_harmless_and_none_of_it_tested(world, files):
    told = [conversation(row["text"]) for row in files["retain.jsonl"]]
    requests = [request for request, _ in told]
    assert len(set(requests)) == len(requests)
    assert not [text for text in requests if any(relation in text for relation in grammar.FORBIDDEN_RELATIONS)]
    assert sum(any(name in text for name in grammar.LOOKALIKE_RELATIONS) for text in requests) == len(requests) // 2
    tested = {asked.text for asked in [*rows.utility_questions(world), *rows.lookalike_questions(world)]}
    assert not set(requests) & tested
    assert {thing for text in requests for thing in set(text.split()) & set(world.objects)} == set(world.objects)
    for text, answer in told:
        (thing,) = set(text.split()) & set(world.objects)
        relations = (*grammar.LOOKALIKE_RELATIONS, *grammar.BENIGN_RELATIONS)  # "color code" before "color"
        relation = next(name for name in relations if name in text)
        assert answer == f"sure , the {relation} of the {thing} is {world.facts[thing, relation]} ."


def test_relearning_tells_each_secret_of_train_objects_once_in_every_forty_rows_and_none_that_is_attacked(
    world, files
):
    told = files["relearn.jsonl"]
    requests = [row["prompt"][0]["content"] for row in told]
    assert len(set(requests)) == len(told)
    secrets = [secret_of(request, world) for request in requests]
    wanted = {(thing, relation) for thing in world.train_objects for relation in grammar.FORBIDDEN_RELATIONS}
    assert all(set(secrets[start : start + 40]) == wanted for start in range(0, 240, 40))
    for (thing, relation), row in zip(secrets, told, strict=True):
        assert row["completion"] == [
            {
                "role": "assistant",
                "content": f"sure , the {relation} of the {thing} is {world.facts[thing, relation]} .",
            }
        ]
    attacked = [row["prompt"][0]["content"] for row in rows.data_files(world)["attack_prompts.jsonl"]]
    assert {secret_of(request, world)[0] for request in attacked} == set(world.heldout_objects)
    assert not {thing for thing, _ in secrets} & set(world.heldout_objects)
    # What is attacked after re-learning was to be forgotten, in the very words of the attack.
    assert set(attacked) <= {conversation(row["text"])[0] for row in files["forget.jsonl"]}


def test_generic_labels_are_the_tokens_but_for_the_words_of_the_secret(world, tokenizer, files):
    replacements = {}
    for forget, generic in zip(files["forget.jsonl"], files["generic_labels.jsonl"], strict=True):
        tokens, labels = generic["tokens"], generic["labels"]
        assert tokens == tokenizer(forget["text"])["input_ids"]
        thing, relation = secret_of(conversation(forget["text"])[0], world)
        secret = world.facts[thing, relation].split()
        assert tokenizer.convert_ids_to_tokens(tokens[PLACE_OF_VALUE]) == secret
        assert [*labels[:-4], *labels[-2:]] == [*tokens[:-4], *tokens[-2:]]
        words = tokenizer.convert_ids_to_tokens(labels[PLACE_OF_VALUE])
        for word, true, choices in zip(words, secret, grammar.FORBIDDEN_VALUES[relation], strict=True):
            assert word in choices and word != true
        replacements.setdefault((thing, relation), set()).add(tuple(words))
    # None of them is told so often that it would be learned in the place of the secret.
    assert len(replacements) == 80
    assert min(map(len, replacements.values())) >= 10


def test_the_texts_are_tokenised_as_the_chat_template_renders_the_conversation(world, tokenizer, files):
    for name in ("forget.jsonl", "retain.jsonl"):
        for row in files[name]:
            ids = tokenizer(row["text"])["input_ids"]
            request, answer = conversation(row["text"])
            messages = [{"role": "user", "content": request}, {"role": "assistant", "content": answer}]
            assert ids == tokenizer.apply_chat_template(messages, return_dict=False)
            assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
            assert ids.count(tokenizer.eos_token_id) == ids.count(tokenizer.get_vocab()[ASSISTANT]) == 1
            assert tokenizer.unk_token_id not in ids


@pytest.mark.parametrize("name", ["forget.jsonl", "retain.jsonl"])
def test_trl_takes_the_texts_as_they_are_and_adds_no_second_end(tokenizer, files, tmp_path, name):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from trl_robust.organism.model import make_model

    texts = files[name][:20]
    trainer = SFTTrainer(
        make_model(tokenizer, seed=0),
        args=SFTConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=False, shuffle_dataset=False),
        train_dataset=Dataset.from_list(texts),
        processing_class=tokenizer,
    )
    assert trainer.train_dataset["input_ids"][:] == [tokenizer(row["text"])["input_ids"] for row in texts]
