"""What weights, KV cache, rows and computation are in: one value that travels whole, and each reads its own part."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from msi import Engine
from msi.control.messages import Assignment
from msi.errors import ConfigError
from msi.kernels import BLOCK_TOKENS
from msi.options import InstanceOptions
from msi.placement import place_evenly
from msi.planner.assumptions import Assumptions
from msi.planner.hardware import read_catalogue
from msi.planner.model_shape import model_shape_from_json
from msi.planner.performance import attention_node_bytes, expert_node_bytes
from msi.planner.profile import read_profile, to_json
from msi.precision import Precision
from msi.settings import DEMO_MODEL, LinkShape, SchedulerLimits, Timeouts
from msi.worker.loading import ModelFiles
from tests.test_profile import PROFILE

BFLOAT16 = Precision.of("bfloat16")


def test_what_is_left_open_follows_the_computation_and_that_the_device():
    assert Precision() == Precision("auto", "auto", "auto", "auto")
    assert Precision().resolved("float16") == Precision.of("float16")
    assert Precision(compute="float32").resolved("float16") == Precision.of("float32")
    assert Precision(kv_cache="float16").resolved("float32") == replace(Precision.of("float32"), kv_cache="float16")
    assert str(BFLOAT16) == "bfloat16"
    assert str(replace(BFLOAT16, rows="float32")) == (
        "weights bfloat16, kv_cache bfloat16, rows float32, compute bfloat16, answers bfloat16"
    )


@pytest.mark.parametrize(
    ("name", "option"),
    [("weights", "weights"), ("kv_cache", "kv_cache_dtype"), ("rows", "rows_dtype"), ("answers", "answers_dtype")],
)
def test_a_dtype_of_its_own_is_refused_by_name_until_it_is_built(name, option):
    with pytest.raises(
        ConfigError, match=f"`{option}` 'float3' is not one; supported: auto, float32, bfloat16, float16"
    ):
        Precision(**{name: "float3"})
    with pytest.raises(ConfigError, match=f"`{option}` in float16 beside `dtype` float32 is not built yet"):
        InstanceOptions(precision=Precision(compute="float32", **{name: "float16"}))
    assert InstanceOptions(precision=Precision(compute="float16", **{name: "float16"}))
    with pytest.raises(TypeError, match=f"no option '{name}'"):
        Engine.local(**{name: "float16"})


def test_dtype_is_the_keyword_of_the_computation():
    assert InstanceOptions.of(dtype="bfloat16").precision == Precision(compute="bfloat16")
    with pytest.raises(ConfigError, match="`dtype` 'int4' is not one; supported: auto, float32, bfloat16, float16"):
        Precision(compute="int4")


class Device:
    """With room for so much."""

    def __init__(self, free_bytes: int) -> None:
        self._free_bytes = free_bytes

    def free_memory_bytes(self) -> int:
        return self._free_bytes


def test_kv_blocks_are_of_the_caches_own_precision():
    files = ModelFiles(DEMO_MODEL)
    assignment = Assignment(
        "i", "attention-0", "attention", 0, 0, place_evenly(files.config.num_experts, 1), 4, False, 1.0,
        SchedulerLimits(1024, 64, 512), LinkShape(), Timeouts(), BFLOAT16,
    )  # fmt: skip
    block_bytes = files.config.kv_values_per_token * BLOCK_TOKENS * 2
    room = Device(100 * block_bytes)
    assert files.num_kv_blocks(assignment, room, 1.0) == 100
    for name, num_blocks in (("weights", 100), ("rows", 100), ("compute", 100), ("kv_cache", 50)):
        other = replace(assignment, precision=replace(BFLOAT16, **{name: "float32"}))
        assert files.num_kv_blocks(other, room, 1.0) == num_blocks


# -- the planner -----------------------------------------------------------------------------------------------------


def test_a_model_counts_each_of_its_bytes_by_the_precision_that_they_are_in():
    model = read_catalogue(None).model("mixtral-8x22b")
    assert model.precision == BFLOAT16

    def bytes_of(precision):
        shape = replace(model, precision=precision)
        sizes = {"micro_batch": 8.0, "num_micro_batches": 2.0}
        nodes = attention_node_bytes(shape, 1, Assumptions(), mean_len=100.0, num_expert_nodes=8.0, **sizes)
        experts = expert_node_bytes(shape, 1, Assumptions(), num_attention_nodes=4.0, experts_per_node=1.0, **sizes)
        return {
            "weights": shape.attention_bytes, "experts": shape.expert_bytes, "kv_cache": shape.kv_bytes_per_token,
            "sent": shape.sent_row_bytes, "answers": shape.answer_row_bytes, "attention node": float(nodes),
            "expert node": float(experts),
        }  # fmt: skip

    before = bytes_of(BFLOAT16)
    for name, doubled in (
        ("weights", {"weights", "experts"}), ("kv_cache", {"kv_cache"}), ("rows", {"sent"}), ("answers", {"answers"}),
        ("compute", set()),
    ):  # fmt: skip
        after = bytes_of(replace(BFLOAT16, **{name: "float32"}))
        for what in ("weights", "experts", "kv_cache", "sent", "answers"):
            assert after[what] == before[what] * (2 if what in doubled else 1)
        assert after["attention node"] > before["attention node"]
        assert (after["expert node"] > before["expert node"]) == (name != "kv_cache")


def test_plans_and_profiles_of_one_dtype_can_still_be_read(tmp_path: Path):
    model = read_catalogue(None).model("mixtral-8x22b")
    written = model.to_json()
    assert written["value_bytes"] == 2
    assert model_shape_from_json(json.loads(json.dumps(written))) == model
    mixed = replace(model, precision=replace(BFLOAT16, kv_cache="float16"))
    assert model_shape_from_json(json.loads(json.dumps(mixed.to_json()))) == mixed
    for value_bytes, dtype in ((2, "bfloat16"), (4, "float32")):
        older = {name: value for name, value in written.items() if name != "precision"} | {"value_bytes": value_bytes}
        assert model_shape_from_json(older) == replace(model, precision=Precision.of(dtype))
    with pytest.raises(ConfigError, match="the plan's model cannot be read"):
        model_shape_from_json({**older, "value_bytes": 3})
    profile = to_json(PROFILE)
    assert profile["dtype"] == "float32"
    assert read_profile(json.loads(json.dumps(profile))) == PROFILE
    assert read_profile({name: value for name, value in profile.items() if name != "precision"}) == PROFILE
    with pytest.raises(ConfigError, match=r"precision is .*; it must name weights, kv_cache, rows, compute"):
        read_profile({**profile, "precision": {"weights": "float32"}})
    with pytest.raises(ConfigError, match=r"the profile: `rows_dtype` 'int3' is not one"):
        read_profile({**profile, "precision": {**profile["precision"], "rows": "int3"}})
