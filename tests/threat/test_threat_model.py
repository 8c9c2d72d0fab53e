"""The threat model itself."""

import dataclasses

import pytest

from trl_robust.threat import ThreatModel


def test_all_faults_are_listed_at_once():
    with pytest.raises(ValueError) as caught:
        ThreatModel(
            ["embeddings", 2.0],
            stream="attention",
            positions="prompts",
            norm="l0",
            radius=-1,
            radius_unit="percent",
            ball="row",
        )
    message = str(caught.value)
    for fault in (
        "`stream` is 'attention'; choose one of ['layer', 'mlp']",
        "`positions` is 'prompts'",
        "`norm` is 'l0'",
        "`radius_unit` is 'percent'",
        "`ball` is 'row'",
        "Site 'embeddings' is unknown",
        "Site 2.0 is a fraction",
        "`radius` is -1",
    ):
        assert fault in message


@pytest.mark.parametrize("radius", [-0.5, float("nan"), float("inf"), "1", None, True, {3: -1.0}])
def test_a_radius_that_is_no_finite_number_of_at_least_zero_is_refused(radius):
    with pytest.raises(ValueError, match=r"`radius` is .*; it must be a finite number of at least 0"):
        ThreatModel([3], radius=radius)


def test_no_sites_are_refused():
    with pytest.raises(ValueError, match="`sites` is empty"):
        ThreatModel([])


@pytest.mark.parametrize("site", ["embedding", 3, 0.5])
def test_one_site_needs_no_list(site):
    assert ThreatModel(site).sites == (site,)


def test_sites_are_resolved_in_a_model_and_in_a_depth(llama):
    threat = ThreatModel(["embedding", "0.5", -1])
    assert threat.resolve_sites(llama) == threat.resolve_sites(4) == ("embedding", 2, 3)


def test_every_site_may_have_a_radius_of_its_own():
    threat = ThreatModel(["embedding", 3], radius={"embedding": 0.5, 3: 2.0})
    assert (threat.radius_at("embedding"), threat.radius_at(3)) == (0.5, 2.0)
    with pytest.raises(KeyError):
        threat.radius_at(7)


def test_a_threat_is_zero_if_all_its_radii_are():
    assert ThreatModel([1], radius=0).is_zero
    assert ThreatModel([1, 2], radius={1: 0.0, 2: 0.0}).is_zero
    assert not ThreatModel([1, 2], radius={1: 0.0, 2: 0.1}).is_zero


def test_a_calibrated_radius_is_the_multiple_of_the_norm_and_absolute():
    threat = ThreatModel([0.5, "embedding"], radius=0.1, radius_unit="relative", norm="linf", ball="sequence")
    calibrated = threat.calibrated({"embedding": 5.0, 2: 20.0})
    assert calibrated.radius == {"embedding": 0.5, 2: 2.0}
    assert calibrated.radius_unit == "absolute" and calibrated.resolve_sites(4) == ("embedding", 2)
    assert (calibrated.norm, calibrated.ball) == ("linf", "sequence")
    assert calibrated.calibrated({"embedding": 7.0, 2: 7.0}) is calibrated


def test_a_threat_model_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ThreatModel([1]).radius = 5.0
