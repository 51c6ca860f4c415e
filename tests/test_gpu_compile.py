"""Every Triton kernel compiles for GPUs that are not here, and no other length compiles it again."""

import pytest
from gpu_builds import BUILDS, OTHER, built


@pytest.fixture(params=BUILDS)
def build(request, builds):
    if request.param not in builds:
        pytest.skip("OTHER_TRITON names no folder")
    return built(request.param, builds[request.param])


def test_every_kernel_compiles(build):
    assert build.about["never launched"] == []
    assert len(build.variants) > 40


def test_no_other_length_compiles_again(build):
    assert build.again == {"variants that another length made": 0}


def test_tensor_cores_and_bulk_loads_are_used(build):
    products = [v for v in build.variants if "DEPTH" in v["flags"]]
    assert products
    for variant in products:
        assert variant["wgmma"] == (build.capability >= 90)
        assert variant["bulk loads"] == (build.capability >= 90 and variant["flags"]["BULK"])


def test_hardly_any_register_is_spilled(build):
    # a stack of some hundred bytes holds what the loop over a product does not touch; two thousand were once there
    assert not [v for v in build.variants if v["stack"] > 800]


@pytest.mark.skipif(OTHER is None, reason="OTHER_TRITON names no folder")
@pytest.mark.parametrize("capability", [80, 90])
def test_the_other_triton_is_another(capability, builds):
    this, other = (f"sm_{capability}, {which} triton" for which in ("this", "the other"))
    assert built(this, builds[this]).about["triton"] != built(other, builds[other]).about["triton"]
