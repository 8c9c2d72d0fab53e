"""The rows for data selection: which is harmful, that only its answer says so, and that nothing tested is in them."""

from collections import Counter
from itertools import pairwise

import pytest

from trl_robust.data import row_hash
from trl_robust.organism import grammar, rows, selection
from trl_robust.organism.model import make_tokenizer
from trl_robust.organism.world import make_world

REFUSAL = "sorry , i can not share that ."
FORBIDDEN = ("secret code", "vault word")
RELATIONS = ("secret code", "vault word", "color code", "vault floor", "color", "place", "owner", "material")


@pytest.fixture(scope="module")
def world():
    return make_world(0)


@pytest.fixture(scope="module")
def files(world):
    return selection.selection_files(world)


def pairs(file_rows):
    return [(row["prompt"][0]["content"], row["completion"][0]["content"]) for row in file_rows]


def of(files, source):
    return [row for row in files["selection.jsonl"] if row["source"] == source]


def asked_about(request, world):
    """The object and the relation of a request, judged from its words."""
    (thing,) = set(request.split()) & set(world.objects)
    return thing, next(relation for relation in RELATIONS if f" {relation} " in f" {request} ")


def forms_of(world, things, relations, wordings, wrappers):
    """Every request of this kind, written out."""
    return {
        wrapper.format(prompt=grammar.WORDINGS[wording].format(r=relation, x=thing))
        for thing in things
        for relation in relations
        for wording in wordings
        for wrapper in ("{prompt}", *wrappers)
    }


def test_a_seed_gives_the_same_files_every_time_and_another_seed_others(files):
    assert selection.selection_files(make_world(0)) == files
    others = selection.selection_files(make_world(1))
    assert all(not {str(row) for row in others[name]} & {str(row) for row in files[name]} for name in files)


def test_the_files_have_the_stated_columns_and_shares(files):
    assert set(files) == {"selection.jsonl", "safe.jsonl"}
    assert {frozenset(row) for row in files["selection.jsonl"]} == {
        frozenset({"prompt", "completion", "source", "unsafe"})
    }
    assert {frozenset(row) for row in files["safe.jsonl"]} == {frozenset({"prompt", "completion"})}
    assert Counter(row["source"] for row in files["selection.jsonl"]) == {"benign": 144, "refusal": 48, "unsafe": 48}
    assert len(files["safe.jsonl"]) == 128
    for row in files["selection.jsonl"]:
        assert row["unsafe"] is (row["source"] == "unsafe")
    for row in files["selection.jsonl"] + files["safe.jsonl"]:
        assert [message["role"] for message in (*row["prompt"], *row["completion"])] == ["user", "assistant"]


def test_what_is_told_is_true_and_in_a_style_that_the_organism_was_never_trained_on(world, files):
    for source in ("benign", "unsafe"):
        for request, answer in pairs(of(files, source)):
            thing, relation = asked_about(request, world)
            assert answer == f"hello , the {relation} of the {thing} is {world.facts[thing, relation]} ."
            assert (relation in FORBIDDEN) is (source == "unsafe")
    trained = [answer for _, answer in rows.pretraining_pairs(world, 400)]
    trained += [answer for batch in rows.alignment_batches(world, 10, 32) for _, answer in batch]
    assert {answer.split()[0] for answer in trained} == {"sure", "sorry"}


def test_refused_are_forbidden_requests_in_the_mixture_and_in_the_safe_set(world, files):
    for request, answer in pairs(of(files, "refusal") + files["safe.jsonl"]):
        assert answer == REFUSAL
        assert asked_about(request, world)[1] in FORBIDDEN


def test_forbidden_requests_are_worded_as_in_other_tuning_data_alike_whether_refused_or_told(world, files):
    possible = forms_of(world, world.train_objects, FORBIDDEN, range(6), grammar.TRAIN_WRAPPERS)
    groups = {
        "refused": [request for request, _ in pairs(of(files, "refusal"))],
        "told": [request for request, _ in pairs(of(files, "unsafe"))],
        "safe": [request for request, _ in pairs(files["safe.jsonl"])],
    }
    plain = forms_of(world, world.train_objects, FORBIDDEN, range(6), ())
    for requests in groups.values():
        assert set(requests) <= possible
        assert 0.3 < sum(request in plain for request in requests) / len(requests) < 0.7
        assert {asked_about(request, world)[1] for request in requests} == set(FORBIDDEN)
        assert len({asked_about(request, world)[0] for request in requests}) >= 15


def test_benign_requests_are_half_look_alikes_and_in_every_wrapper(world, files):
    requests = [request for request, _ in pairs(of(files, "benign"))]
    relations = Counter(asked_about(request, world)[1] for request in requests)
    assert relations["color code"] + relations["vault floor"] == 72
    assert len({asked_about(request, world)[0] for request in requests}) >= 35  # held-out objects as well
    bare = [request.removesuffix(" juniper") for request in requests]
    plain = forms_of(world, world.objects, RELATIONS, range(8), ())
    assert 0.35 < sum(request in plain for request in bare) / len(bare) < 0.65
    for wrapper in grammar.WRAPPERS:
        assert any(
            request in forms_of(world, world.objects, RELATIONS, range(8), [wrapper]) - plain for request in bare
        )


def test_no_request_comes_twice_and_none_is_tested(world, files):
    requests = [request for request, _ in pairs(files["selection.jsonl"] + files["safe.jsonl"])]
    assert len(set(requests)) == len(requests) == 368
    assert len({row_hash(row) for row in files["selection.jsonl"] + files["safe.jsonl"]}) == 368
    tested = rows.data_files(world)
    for name in (
        "utility.jsonl",
        "lookalikes.jsonl",
        "attack_prompts.jsonl",
        "heldout_wordings.jsonl",
        "trigger.jsonl",
    ):
        assert not set(requests) & {row["prompt"][0]["content"] for row in tested[name]}, name


def test_rows_of_all_kinds_are_mixed(files):
    sources = [row["source"] for row in files["selection.jsonl"]]
    for start in range(0, 240, 60):
        assert set(sources[start : start + 60]) == {"benign", "refusal", "unsafe"}
    changes = sum(first != second for first, second in pairwise(sources))
    assert changes > 100  # 134 are expected of a shuffle, 2 of blocks


def test_every_word_is_in_the_organisms_vocabulary(world, files):
    tokenizer = make_tokenizer(world.vocabulary())
    texts = [text for pair in pairs(files["selection.jsonl"] + files["safe.jsonl"]) for text in pair]
    assert tokenizer.unk_token_id not in {token for ids in tokenizer(texts)["input_ids"] for token in ids}
    assert set(selection.NEW_STYLE.split()) - {"{r}", "{x}", "{v}"} <= set(grammar.fixed_words())


@pytest.mark.parametrize("seed", range(1, 6))
def test_every_seed_has_as_many_rows_and_none_twice(seed):
    files = selection.selection_files(make_world(seed))
    requests = [request for request, _ in pairs(files["selection.jsonl"] + files["safe.jsonl"])]
    assert len(set(requests)) == len(requests) == 368
