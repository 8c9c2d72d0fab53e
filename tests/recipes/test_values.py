from typing import Any, Literal

import pytest
from transformers.trainer_utils import SaveStrategy
from trl.scripts.utils import DatasetConfig

from trl_robust.recipes.values import UnfitError, fit, nearest


@pytest.mark.parametrize(
    "value, hint, expected",
    [
        ("1e-4", float, 1e-4),  # what PyYAML makes of 1e-4
        ("1e3", int, 1000),
        (16.0, int, 16),
        (10, float, 10),
        ("8", int | str | None, 8),
        ("auto", int | str | None, "auto"),
        (None, int | None, None),
        ("none", int | None, None),
        ("none", None | str | list[str], "none"),  # `report_to: none` is a word, not nothing
        (["wandb"], None | str | list[str], ["wandb"]),
        ("yes", bool, True),
        ("0", bool, False),
        (False, bool | None, False),
        (["embedding", 8, 0.5, -1], list[str], ["embedding", "8", "0.5", "-1"]),
        ("embedding", list[str], ["embedding"]),
        (3, str | None, "3"),
        ("cosine", SaveStrategy | str, None),
        (False, SaveStrategy | str, "no"),  # what YAML makes of an unquoted `no`
        ("{use_reentrant: false}", dict[str, Any] | str | None, {"use_reentrant": False}),
        ("file.json", dict | str | None, "file.json"),
        (False, str | None | Literal[False], False),
        ([{"path": "x", "split": "a"}], list[DatasetConfig], [{"path": "x", "split": "a"}]),
    ],
)
def test_a_value_is_brought_into_its_fields_type(value, hint, expected):
    if expected is None and value is not None and value != "none":
        with pytest.raises(UnfitError):
            fit(value, hint)
        return
    found = fit(value, hint)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    "value, hint, words",
    [
        ("many", int, "a whole number is needed"),
        (1.5, int, "a whole number is needed"),
        (True, int, "a whole number is needed"),
        (".nan", float, "a number is needed"),
        (float("nan"), float, "a number is needed"),
        (float("inf"), int, "a whole number is needed"),
        ("maybe", bool, "true or false is needed"),
        (2, bool, "true or false is needed"),
        (None, int, "a whole number is needed, or remove the key"),
        (True, str, "in quotes"),
        ({"a": 1}, list[str], "a list is needed"),
        (["a", ["b"]], list[str], "entry 2 does not fit: text is needed"),
        ("{a: ", dict | str, "starts as a mapping"),
        ([{"pth": "x"}], list[DatasetConfig], "entry 1 does not fit: `pth` is not a key there; did you mean `path`?"),
        ([{"split": "x"}], list[DatasetConfig], "the key `path` is missing"),
        ([{"path": "x", "fraction": "much"}], list[DatasetConfig], "of `fraction`, a number is needed"),
        ("stps", SaveStrategy | str, "one of no, steps, epoch, best"),
    ],
)
def test_a_value_that_does_not_fit_is_refused_with_what_would(value, hint, words):
    with pytest.raises(UnfitError) as error:
        fit(value, hint)
    assert words in str(error.value)


def test_a_value_outside_its_choices_is_refused():
    with pytest.raises(UnfitError, match="one of l1, l2, linf"):
        fit("l3", str, ["l1", "l2", "linf"])


def test_only_names_as_near_as_the_nearest_are_suggested():
    assert nearest("num_proceses", ["num_processes", "main_process_ip"]) == "; did you mean `num_processes`?"
    assert nearest("adam_beta3", ["adam_beta1", "adam_beta2"]) == "; did you mean `adam_beta2` or `adam_beta1`?"
    assert nearest("zzz", ["learning_rate"]) == ""


def test_none_is_a_value_where_it_is_one_of_the_choices():
    choices = ("none", "random")
    assert fit("none", Literal["none", "random"], choices) == "none"
    assert fit("none", Literal["none", "random"] | None, choices) == "none"
    assert fit(None, Literal["none", "random"] | None, choices) is None
    with pytest.raises(UnfitError):
        fit("None", Literal["none", "random"], choices)
