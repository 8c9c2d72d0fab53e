"""Checks of whether a perturbation keeps the meaning: their measures by hand, and that they can fail."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from tiny import HIDDEN, VOCABULARY, WORDS, make_tokenizer, shared_model, tiny_model
from transformers import LlamaConfig, LlamaForSequenceClassification

from trl_robust.attacks import Subject
from trl_robust.data import DataError
from trl_robust.evaluation import semantic_changes
from trl_robust.evaluation.semantic_changes import EDIT, SEARCHES, Changes
from trl_robust.evaluation.semantic_measures import (
    Entailment,
    Thresholds,
    agrees,
    answer_similarity,
    energy_share,
    principal_directions,
    random_shares,
    verdict,
)
from trl_robust.evaluation.semantic_rows import SemanticRow, SemanticSettings, edited_prompts, semantic_rows
from trl_robust.evaluation.semantics import CHECKS, run_semantics, semantic_checks
from trl_robust.inner import Perturbation
from trl_robust.threat import selected_ranks

SETTINGS = SemanticSettings(layer=1, steps=3, top_k=2)


def subject_of(batch_size: int = 3) -> Subject:
    return Subject(shared_model("llama"), make_tokenizer(), max_new_tokens=4, batch_size=batch_size, progress=False)


def rows_of(count: int = 5, paraphrases: int = 2) -> list[SemanticRow]:
    generator = np.random.default_rng(0)

    def sentence() -> str:
        return " ".join(generator.choice(WORDS, size=generator.integers(3, 6)).tolist())

    return [
        SemanticRow(str(number), sentence(), sentence(), tuple(sentence() for _ in range(paraphrases)))
        for number in range(count)
    ]


@pytest.fixture(scope="module")
def checked():
    return semantic_checks(subject_of(), rows_of(), SETTINGS)


# Measures


def test_the_principal_directions_of_a_plane_hold_all_of_it_and_nothing_else():
    generator = torch.Generator().manual_seed(0)
    plane = torch.linalg.qr(torch.randn(16, 2, generator=generator).double()).Q
    differences = torch.randn(20, 2, generator=generator).double() @ plane.T
    found = principal_directions(differences, 4)
    assert found.shape == (16, 2)  # no more than there are
    assert energy_share(differences, found) == pytest.approx(1)
    inside, outside = plane[:, 0], torch.linalg.qr(torch.cat([plane, torch.eye(16).double()], 1)).Q[:, 5]
    assert energy_share(inside, found) == pytest.approx(1) and energy_share(outside, found) == pytest.approx(
        0, abs=1e-9
    )
    # Equal parts of both, by Pythagoras.
    assert energy_share(inside + outside, found) == pytest.approx(0.5)
    assert energy_share(torch.zeros(3, 16), found) is None
    assert principal_directions(torch.zeros(3, 16), 2) is None


def test_a_random_direction_has_its_share_by_dimension_and_real_draws_lie_in_the_interval():
    vectors = torch.ones(5, 40)
    shares = random_shares(vectors, 10)
    assert shares.mean() == pytest.approx(10 / 40, abs=0.005)
    generator = torch.Generator().manual_seed(1)
    directions = torch.linalg.qr(torch.randn(40, 10, generator=generator).double()).Q
    drawn = [energy_share(torch.randn(5, 40, generator=generator), directions) for _ in range(400)]
    low, high = np.quantile(shares, [0.025, 0.975])
    assert 0.92 < np.mean([low < share < high for share in drawn]) < 0.98


def test_one_long_vector_among_many_short_ones_decides_the_width_of_the_interval():
    lengths = torch.tensor([10.0, 0.1, 0.1, 0.1]).unsqueeze(-1)
    even = random_shares(torch.ones(4, 40), 10).std()
    assert random_shares(lengths * torch.ones(4, 40), 10).std() == pytest.approx(2 * even, rel=0.1)


@pytest.mark.parametrize(
    ("clean", "other", "answer", "same"),
    [
        ("The code is red.", "the  code is RED", None, True),
        ("The code is red.", "The code is blue.", None, False),
        ("It is red.", "Red, I think", "red", True),
        ("It is red.", "It is blue", "red", False),
        ("no idea", "not sure", "red", False),  # both wrong, each in its own way
        ("", "", None, True),
    ],
)
def test_answers_agree_in_words_or_in_what_they_have_to_state(clean, other, answer, same):
    assert agrees(clean, other, answer) is same


def test_the_same_answer_is_alike_and_another_rows_answer_is_not():
    clean = ["w1 w2", "w3 w4", "w5 w6", "w7 w8"]
    subject = subject_of()
    assert answer_similarity(subject, clean, clean) == pytest.approx([1] * 4)
    assert np.mean(answer_similarity(subject, clean, clean[1:] + clean[:1])) < 0.2
    assert answer_similarity(subject, clean, ["", "w3 w4", "w5 w6", "w7 w8"])[0] == 0
    assert answer_similarity(subject, ["w1"] * 3, ["w1", "w2", "w3"]) == [None] * 3


def test_a_check_that_a_change_of_meaning_passes_says_nothing():
    assert verdict(True, False) == "pass" and verdict(False, False) == verdict(False, True) == "fail"
    assert verdict(True, True) == verdict(True, None) == "uninformative"
    assert verdict(None, False) == "not measured"


# Rows


def test_edits_are_the_rows_own_or_the_next_request_with_another_completion():
    rows = [
        SemanticRow("0", "a", "x"),
        SemanticRow("1", "b", "x", edit="other b"),
        SemanticRow("2", [{"role": "user", "content": "c"}], "y", edit="other c"),
    ]
    assert edited_prompts(rows) == [rows[2].prompt, "other b", [{"role": "user", "content": "other c"}]]
    assert edited_prompts([SemanticRow("0", "a", "x"), SemanticRow("1", "b", "x")]) == [None, None]


def test_rows_are_read_plain_and_conversational_and_bad_ones_are_named():
    data = Dataset.from_list(
        [{"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]}]
    )
    assert semantic_rows(data, "data")[0].completion == "b"
    plain = Dataset.from_list([{"prompt": "a", "completion": "b", "paraphrases": ["c", "d"], "answer": "b"}])
    assert semantic_rows(plain, "data")[0] == SemanticRow("0", "a", "b", ("c", "d"), None, "b")
    with pytest.raises(DataError, match="row 1"):
        semantic_rows(Dataset.from_list([{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": ""}]), "d")
    with pytest.raises(DataError, match="no column 'completion'"):
        semantic_rows(Dataset.from_list([{"prompt": "a"}]), "data")


# The checks


def test_every_check_has_a_number_a_threshold_its_control_and_a_verdict(checked):
    entry, records = checked
    assert set(entry["checks"]) == set(SEARCHES)
    for by_check in entry["checks"].values():
        assert set(by_check) == set(CHECKS)
        for name, check in by_check.items():
            assert {"value", "interval", "threshold", "passes", "control", "control_passes", "verdict"} <= set(check)
            assert (check["value"] is None) == (name == "entailment")
            assert check["verdict"] == verdict(check["passes"], check["control_passes"])
    assert len(records) == 5 * 4 and {record["kind"] for record in records} == {*SEARCHES, EDIT}
    assert json.loads(json.dumps(entry, allow_nan=False)) == entry
    assert json.loads(json.dumps(records, allow_nan=False)) == records


def test_the_constraint_is_measured_by_a_pass_of_its_own_and_edits_break_it(checked):
    entry, records = checked
    found = entry["checks"]["paraphrase"]["feasible"]
    assert found["value"] == 1 and found["verdict"] == "pass" and found["control"] == 0
    for record in records:
        assert record["feasible"] == (abs(record["loss_change"]) <= 0.05 + 1e-4)


def test_meaning_changing_edits_fail_the_checks_of_the_answers(checked):
    entry, _ = checked
    for name in ("token_kl", "agreement", "similarity", "feasible"):
        assert entry["checks"]["paraphrase"][name]["control_passes"] is False, name


def test_all_three_perturbations_have_the_same_length_at_every_token():
    subject = subject_of()
    measuring = Changes(subject, rows_of(), [None] * 5, SETTINGS)
    rows = rows_of()
    found = measuring._perturbations(measuring._encoded(rows, [row.prompt for row in rows]))
    lengths = [change.deltas[1].norm(dim=-1) for change in found.values()]
    assert lengths[0].max() > 0
    for other in lengths[1:]:
        torch.testing.assert_close(other, lengths[0], rtol=1e-4, atol=1e-7)
    directions = [
        torch.nn.functional.normalize(change.deltas[1][change.selected], dim=-1) for change in found.values()
    ]
    assert (directions[0] * directions[1]).sum(-1).abs().mean() < 0.5


@pytest.mark.parametrize("size", [0.0, 50.0])
def test_no_perturbation_passes_all_checks_and_a_huge_one_fails_them(size, monkeypatch):
    """Nothing is built to pass: what the checks say follows the size of the perturbation."""

    def fixed(self, batch):
        prompt = selected_ranks(batch, "prompt")
        delta = torch.randn(*prompt.shape, HIDDEN, generator=torch.Generator().manual_seed(0))
        change = Perturbation({1: size * delta * prompt.unsqueeze(-1)}, prompt)
        return dict.fromkeys(SEARCHES, change)

    monkeypatch.setattr(Changes, "_perturbations", fixed)
    entry, _ = semantic_checks(subject_of(), rows_of(), SETTINGS)
    for name in ("token_kl", "agreement", "similarity", "feasible"):
        assert entry["checks"]["paraphrase"][name]["passes"] is (size == 0), name
    value = entry["kinds"]["paraphrase"]["token_kl"]["value"]
    assert value == pytest.approx(0, abs=1e-9) if size == 0 else value > 0.3


def test_energy_in_the_paraphrases_directions_is_found_where_it_is_put(monkeypatch):
    subject, rows = subject_of(), rows_of()
    tokens = [[subject.encode(text) for text in (row.prompt, row.paraphrases[0])] for row in rows]
    from trl_robust.evaluation.distance import representations

    states = [representations(subject, pair, [1]).states[1] for pair in tokens]
    towards = torch.stack([pair[1] - pair[0] for pair in states]).float()
    number = iter(range(0, 5, 3))

    def real(self, batch):
        start = next(number)
        part = towards[start : start + 3].unsqueeze(1)
        change = Perturbation({1: part}, torch.ones(len(part), 1, dtype=torch.bool))
        noise = Perturbation(
            {1: torch.randn(part.shape, generator=torch.Generator().manual_seed(start))}, change.selected
        )
        return {"paraphrase": change, "random": noise, "untargeted": noise}

    monkeypatch.setattr(Changes, "_perturbations", real)
    entry, _ = semantic_checks(subject, rows, SemanticSettings(layer=1, steps=1, top_k=6))
    found = entry["checks"]["paraphrase"]["paraphrase_energy"]
    assert found["value"] > 0.75 > found["random_interval"][1] and found["passes"]
    assert entry["checks"]["random"]["paraphrase_energy"]["value"] < 0.5
    # Edits lie in the same directions here, so passing proves little, and the verdict says so.
    assert found["verdict"] == ("uninformative" if found["control_passes"] else "pass")
    # A step of the length of a paraphrase is one paraphrase distance long, about.
    assert entry["kinds"]["paraphrase"]["norm_in_paraphrase_distances"]["1"] == pytest.approx(1, abs=0.3)


def test_rows_without_paraphrases_leave_the_share_of_energy_unmeasured():
    entry, _ = semantic_checks(subject_of(), rows_of(3, paraphrases=0), SETTINGS)
    assert entry["checks"]["paraphrase"]["paraphrase_energy"]["verdict"] == "not measured"
    assert entry["real_paraphrases"] is None


def test_without_edits_nothing_is_proved():
    rows = [SemanticRow(str(number), f"w{number} w9", "w1 w2") for number in range(3)]
    entry, records = semantic_checks(subject_of(), rows, SETTINGS)
    assert EDIT not in {record["kind"] for record in records}
    assert entry["checks"]["paraphrase"]["feasible"]["verdict"] == "uninformative"


def test_splitting_the_rows_into_batches_changes_no_loss_under_the_paraphrase(checked):
    _, records = semantic_checks(subject_of(batch_size=5), rows_of(), SETTINGS)
    for one, other in zip(*([r for r in part if r["kind"] == EDIT] for part in (checked[1], records)), strict=True):
        assert one["loss_change"] == pytest.approx(other["loss_change"], abs=1e-5)
        assert one["token_kl"] == pytest.approx(other["token_kl"], abs=1e-5)


def test_a_batch_that_fails_leaves_its_rows_errored_and_uncounted(monkeypatch):
    answer = Subject.answer

    def failing(self, requests, description, **more):
        found = answer(self, requests, description, **more)
        if more.get("perturb"):
            found[0].status, found[0].continuation, found[0].reason = "errored", None, "out of memory"
        return found

    monkeypatch.setattr(semantic_changes.Subject, "answer", failing)
    entry, _ = semantic_checks(subject_of(), rows_of(), SETTINGS)
    assert entry["n_errored"] == 2 * 3 and entry["kinds"]["paraphrase"]["agreement"]["n"] == 3


def test_an_nli_model_is_asked_both_ways(tmp_path):
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_labels=3, pad_token_id=0, id2label={0: "contradiction", 1: "ENTAILMENT", 2: "neutral"},
    )  # fmt: skip
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    judge = Entailment.load(str(tmp_path))
    assert judge.label == 1 and all(0 < p < 1 for p in judge.probabilities(["w1", "w2 w3"], ["w4 w5", "w6"]))
    entry, records = semantic_checks(subject_of(), rows_of(3), SETTINGS, entailment=judge)
    assert all(len(record["entailment"]) == 2 for record in records)
    assert entry["checks"]["paraphrase"]["entailment"]["value"] is not None
    config.id2label = {0: "a", 1: "b", 2: "c"}
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="exactly one must be called entailment"):
        Entailment.load(str(tmp_path))


def test_the_suite_writes_results_and_blinded_pairs(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    results = run_semantics(
        {"tiny": tmp_path / "model"}, rows_of(4), output_dir=tmp_path / "out", settings=SETTINGS, max_new_tokens=3
    )
    assert results["models"][0]["name"] == "tiny" and set(results["models"][0]["semantics"]["checks"]) == set(SEARCHES)
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == results
    pairs, key, generations = (
        [json.loads(line) for line in (tmp_path / "out" / name).read_text().splitlines()]
        for name in ("human_rating.jsonl", "human_rating_key.jsonl", "generations.jsonl")
    )
    assert len(pairs) == len(key) == len(generations) == 16
    assert set(pairs[0]) == {"pair", "prompt", "answer_a", "answer_b"}  # nothing that gives it away
    assert {line["a"] for line in key} == {"clean", "changed"}
    records = {(row["id"], row["kind"]): row for row in generations}
    for pair, line in zip(pairs, key, strict=True):
        record = records[line["id"], line["kind"]]
        clean, changed = record["clean"], record["response"]
        expected = (clean, changed) if line["a"] == "clean" else (changed, clean)
        assert (pair["answer_a"], pair["answer_b"]) == expected


def test_thresholds_decide_and_are_written_down():
    strict = SemanticSettings(layer=1, steps=3, top_k=2, thresholds=Thresholds(token_kl=0.0))
    entry, _ = semantic_checks(subject_of(), rows_of(3), strict)
    found = entry["checks"]["paraphrase"]["token_kl"]
    assert found["threshold"] == entry["thresholds"]["token_kl"] == 0.0 and found["verdict"] == "fail"


def test_no_usable_row_is_refused():
    with pytest.raises(ValueError, match="None of the 1 rows"):
        semantic_checks(subject_of(), [SemanticRow("0", "w1", " ")], SETTINGS)
