"""The checks of what this package leans on: what they find, and what they say."""

import warnings

import pytest
import torch
from torch import nn

from trl_robust import _compat


@pytest.fixture
def installed(monkeypatch):
    """Pretends that other versions are installed."""
    real = _compat.version

    def pretend(**versions):
        def look_up(name):
            if name in versions and versions[name] is None:
                raise _compat.PackageNotFoundError(name)
            return versions.get(name) or real(name)

        monkeypatch.setattr(_compat, "version", look_up)

    monkeypatch.delenv("TRL_ROBUST_ALLOW_UNTESTED", raising=False)
    return pretend


def test_the_versions_installed_here_are_tested_ones():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _compat.check_versions()


def test_every_library_outside_its_range_is_named_in_one_message_that_says_what_to_do(installed):
    installed(trl="1.17.0", transformers="5.22.2", peft=None, bitsandbytes=None)
    with pytest.raises(_compat.IncompatibleVersionError) as caught:
        _compat.check_versions()
    message = str(caught.value)
    assert "trl is 1.17.0; trl>=1.16,<1.17 is needed." in message
    assert "transformers is 5.22.2; transformers>=5.23,<5.24 is needed." in message
    assert "peft is not installed; peft>=0.21,<0.22 is needed." in message
    assert "bitsandbytes" not in message  # which may be absent
    assert "accelerate" not in message  # which fits
    assert "pip install -c constraints.txt" in message and "TRL_ROBUST_ALLOW_UNTESTED=1" in message
    assert isinstance(caught.value, ImportError)


@pytest.mark.parametrize("found", ["1.16.0", "1.16.5", "1.16.0.dev0", "1.16.1rc1"])
def test_every_patch_release_of_a_tested_version_is_allowed(installed, found):
    installed(trl=found)
    _compat.check_versions()


@pytest.mark.parametrize("found", ["1.15.9", "1.17.0.dev0", "2.0.0", "0.16.1"])
def test_any_other_release_is_refused(installed, found):
    installed(trl=found)
    with pytest.raises(_compat.IncompatibleVersionError, match=f"trl is {found}"):
        _compat.check_versions()


def test_who_asks_for_it_goes_on_with_a_warning(installed, monkeypatch):
    installed(trl="9.9.9")
    monkeypatch.setenv("TRL_ROBUST_ALLOW_UNTESTED", "1")
    with pytest.warns(UserWarning, match=r"trl is 9\.9\.9"):
        _compat.check_versions()


def test_the_ranges_are_those_that_the_package_declares():
    import tomllib
    from pathlib import Path

    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    declared = [*project["dependencies"], *project["optional-dependencies"]["quantization"]]
    for name, (first, beyond) in _compat.TESTED.items():
        assert f"{name}>={first},<{beyond}" in declared


def test_the_seams_hold_here():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _compat.check_seams()
    with torch.no_grad():
        assert _compat._layer_hook_fires_once()


def test_a_seam_that_is_gone_is_named(monkeypatch):
    from trl import SFTTrainer

    monkeypatch.delenv("TRL_ROBUST_ALLOW_UNTESTED", raising=False)
    monkeypatch.setattr(SFTTrainer, "compute_loss", lambda self, model, inputs: None)
    monkeypatch.setattr(_compat, "_layer_hook_fires_once", lambda: False)
    with pytest.raises(_compat.IncompatibleVersionError) as caught:
        _compat.check_seams()
    message = str(caught.value)
    assert "SFTTrainer.compute_loss no longer takes ['return_outputs', 'num_items_in_batch']" in message
    assert "hooks on decoder layers run inside the checkpointed region" in message


def test_the_probe_sees_a_hook_that_runs_again_in_the_backward_pass(monkeypatch):
    from transformers import modeling_layers

    class Inside(nn.Module):
        """As transformers before 5.23: the call is checkpointed, hooks and all."""

        def __call__(self, *args):
            if self.gradient_checkpointing:
                return self._gradient_checkpointing_func(super().__call__, *args)
            return super().__call__(*args)

    monkeypatch.setattr(modeling_layers, "GradientCheckpointingLayer", Inside)
    assert not _compat._layer_hook_fires_once()


def test_only_layers_that_can_be_repacked_are_touched():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].support_avx512bf16_for_cpu = True
    _compat.keep_4bit_differentiable(model)
    assert model[1].support_avx512bf16_for_cpu is False
    assert not hasattr(model[0], "support_avx512bf16_for_cpu")
