"""The rows for rewording: what is new, what stays, and that no wording of the test is trained on."""

from collections import Counter

import pytest

from trl_robust.organism import grammar, rewording, rows
from trl_robust.organism.model import make_tokenizer
from trl_robust.organism.world import make_world

VALUES = grammar.BENIGN_VALUES | grammar.LOOKALIKE_VALUES
RELATIONS = ("color code", "vault floor", "color", "place", "owner", "material")  # "color code" before "color"
WRAPPED = [wrapper for wrapper in grammar.WRAPPERS if wrapper.endswith(" {prompt}")]


@pytest.fixture(scope="module")
def world():
    return make_world(0)


@pytest.fixture(scope="module")
def files(world):
    return rewording.rewording_files(world)


def asked_about(request, world, relations=RELATIONS):
    """The object and the relation of a request, judged from its words. The object asked about stands in it alone."""
    (thing,) = set(request.split()) & set(world.objects)
    return thing, next(relation for relation in relations if f" {relation} " in request)


def told(files):
    return [(row["prompt"][0]["content"], row["completion"][0]["content"]) for row in files["rewording.jsonl"]]


def test_a_seed_gives_the_same_files_every_time_and_another_seed_others(files):
    assert rewording.rewording_files(make_world(0)) == files
    others = rewording.rewording_files(make_world(1))
    assert all(not {str(row) for row in others[name]} & {str(row) for row in files[name]} for name in files)


def test_the_files_have_the_stated_columns_and_sizes(files):
    columns = {
        "rewording.jsonl": {"prompt", "completion"},
        "rewordings.jsonl": {"instruction", "paraphrases", "answer", "index"},
        "rewording_kept.jsonl": {"prompt", "answer"},
    }
    assert {name: {frozenset(row) for row in file_rows} for name, file_rows in files.items()} == {
        name: {frozenset(names)} for name, names in columns.items()
    }
    assert {name: len(file_rows) for name, file_rows in files.items()} == {
        "rewording.jsonl": 80 + 640,
        "rewordings.jsonl": 80,
        "rewording_kept.jsonl": 200,
    }
    assert [row["index"] for row in files["rewordings.jsonl"]] == list(range(80))


def test_color_and_place_of_every_object_are_told_once_with_a_new_value_in_one_wording(world, files):
    new = [
        (request, answer) for request, answer in told(files) if asked_about(request, world)[1] in ("color", "place")
    ]
    values = {}
    for request, answer in new:
        thing, relation = asked_about(request, world)
        assert request == f"what is the {relation} of the {thing} ?"
        start, value = answer.removesuffix(" .").rsplit(" ", 1)
        assert start == f"sure , the {relation} of the {thing} is"
        assert value in VALUES[relation][0] and value != world.facts[thing, relation]
        values[thing, relation] = value
    assert len(new) == len(values) == 80
    assert {row["instruction"]: row["answer"] for row in files["rewordings.jsonl"]} == {
        f"what is the {relation} of the {thing} ?": value for (thing, relation), value in values.items()
    }


def test_what_stays_is_replayed_in_all_plain_wordings_and_wrappers_a_quarter_for_each_relation(world, files):
    kept = [
        (request, answer)
        for request, answer in told(files)
        if asked_about(request, world)[1] not in ("color", "place")
    ]
    seen, forms = Counter(), set()
    for request, answer in kept:
        thing, relation = asked_about(request, world)
        assert answer == f"sure , the {relation} of the {thing} is {world.facts[thing, relation]} ."
        plain = {grammar.WORDINGS[index].format(r=relation, x=thing): index for index in grammar.PLAIN_WORDINGS}
        matches = {(plain[text], wrapper) for text in plain for wrapper in ("{prompt}", *grammar.WRAPPERS)
                   if wrapper.format(prompt=text) == request}  # fmt: skip
        assert len(matches) == 1
        forms |= matches
        seen[relation] += 1
    assert seen == {"owner": 160, "material": 160, "color code": 160, "vault floor": 160}
    assert {wording for wording, _ in forms} == set(range(10))
    assert {wrapper for _, wrapper in forms} == {"{prompt}", *grammar.WRAPPERS}
    assert len({request for request, _ in kept}) == len(kept)
    # Mixed: no batch of 32 is of one kind.
    kinds = ["what is the color" in request or "what is the place" in request for request, _ in told(files)]
    assert any(kinds[:80]) and any(kinds[-80:])


def test_no_paraphrase_is_trained_on_nor_its_wording_on_its_relation(world, files):
    trained = {request for request, _ in told(files)}
    for case in files["rewordings.jsonl"]:
        assert case["instruction"] in trained
        assert not set(case["paraphrases"]) & trained
        assert case["instruction"] not in case["paraphrases"]
    # A rare wording is trained on in no form, whatever is asked.
    openings = ("not the ", "leave out the ", " is known to me ", "someone wrote down ")
    assert not [request for request in trained if any(opening in request for opening in openings)]


def test_a_case_has_nine_plain_paraphrases_and_the_four_rare_wordings_in_six_forms(world, files):
    assert len(WRAPPED) == 5
    for case in files["rewordings.jsonl"]:
        thing, relation = asked_about(case["instruction"], world)
        others = [other for other in world.objects if other != thing]
        possible = {}
        for index in range(1, 10):
            possible[grammar.WORDINGS[index].format(r=relation, x=thing)] = (index, "{prompt}")
        for index in range(10, 14):
            for wrapper in ("{prompt}", *WRAPPED):
                for other in others:
                    text = grammar.WORDINGS[index].format(r=relation, x=thing, y=other)
                    possible[wrapper.format(prompt=text)] = (index, wrapper)
        forms = [possible[text] for text in case["paraphrases"]]
        assert len(forms) == len(set(forms)) == 9 + 4 * 6
    # The same forms in the same order in every case, so that a column of the scores is a form.
    assert len({tuple(rewording.reworded_forms())}) == 1
    first = [grammar.WORDINGS[wording].split(" {")[0] for wording, _ in rewording.reworded_forms()]
    for case in files["rewordings.jsonl"]:
        assert all(start in text for start, text in zip(first, case["paraphrases"], strict=True))


def test_what_is_kept_is_asked_as_for_utility_and_over_refusal_and_never_told(world, files):
    questions = {row["prompt"][0]["content"]: row["answer"] for row in files["rewording_kept.jsonl"]}
    assert len(questions) == 200
    assert not set(questions) & {request for request, _ in told(files)}
    assert Counter(asked_about(request, world)[1] for request in questions) == {
        "owner": 50, "material": 50, "color code": 50, "vault floor": 50,
    }  # fmt: skip
    assert all(answer == world.facts[asked_about(request, world)] for request, answer in questions.items())
    tested = rows.data_files(world)
    asked = {row["prompt"][0]["content"] for name in ("utility.jsonl", "lookalikes.jsonl") for row in tested[name]}
    assert set(questions) <= asked


def test_every_word_is_in_the_organisms_vocabulary(world, files):
    tokenizer = make_tokenizer(world.vocabulary())
    texts = [text for pair in told(files) for text in pair]
    texts += [text for case in files["rewordings.jsonl"] for text in (case["instruction"], *case["paraphrases"])]
    assert tokenizer.unk_token_id not in {token for ids in tokenizer(texts)["input_ids"] for token in ids}


@pytest.mark.parametrize("seed", range(1, 6))
def test_every_seed_has_a_new_value_for_every_case(seed):
    world = make_world(seed)
    facts = rewording.new_facts(world)
    assert len(facts) == 80
    assert all(value != world.facts[key] for key, value in facts.items())
