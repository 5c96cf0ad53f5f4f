"""How products are cut: what is kept of devices can be read, and what is chosen fits."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed here")

from msi.kernels.triton.tiles import TUNED, Tiles, choose, default_tiles, expected_rows, file_name, tiles_for
from tests.kernels.compiled import SHARED_BYTES

FILES = sorted(TUNED.glob("*.json"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_what_was_measured_of_a_device_is_found(path):
    kept = json.loads(path.read_text())
    assert file_name(kept["device"]) == path.stem
    for shape in kept["shapes"]:
        dtype = getattr(torch, shape["dtype"])
        tiles = tiles_for(kept["device"], shape["hidden"], shape["inner"], dtype, 0)
        assert [one.rows for one in tiles] == sorted(one["rows"] for one in shape["tiles"])
        assert {one.gate_up.splits for one in tiles} == {1}
        assert tiles != tiles_for("another", shape["hidden"], shape["inner"], dtype, SHARED_BYTES[90])


@pytest.mark.parametrize("shared_bytes", SHARED_BYTES.values())
def test_a_device_that_nobody_measured_has_the_shared_memory(shared_bytes):
    for tiles in default_tiles(torch.bfloat16, shared_bytes):
        for product, num_weights in ((tiles.gate_up, 2), (tiles.down, 1)):
            of_a_stage = 2 * product.block_k * (tiles.block_m + num_weights * product.block_n)
            assert 2 <= product.num_stages <= shared_bytes // of_a_stage


def test_tiles_are_chosen_by_rows_and_the_last_are_for_all_others():
    product = default_tiles(torch.float32, 0)[0].down
    few, more = Tiles(16, 16, product, product), Tiles(128, 128, product, product)
    assert [choose((few, more), rows) for rows in (0.0, 16.0, 16.5, 1e6)] == [few, few, more, more]


@pytest.mark.parametrize(("num_experts", "k", "wanted"), [(8, 2, 25.0), (1, 8, 100.0), (128, 8, 6.25)])
def test_rows_that_an_expert_can_expect(num_experts, k, wanted):
    """Of a hundred: with all experts here they spread over them; the only expert here is what they came for."""
    assert expected_rows(100, k, num_experts, 128 if num_experts != 8 else 8) == pytest.approx(wanted, rel=0.01)
