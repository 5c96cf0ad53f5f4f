"""The planner's performance model against numbers worked by hand and the paper's own tables."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from statistics import mean

import numpy as np
import pytest

from msi.planner import equations as eq
from msi.planner.assumptions import Assumptions
from msi.planner.hardware import Gpu, read_catalogue
from msi.planner.model_shape import LatentAttention, ModelShape, model_shape_from_json
from msi.planner.performance import (
    DeploymentCosts,
    Roofline,
    active_experts,
    attention_layer_s,
    attention_node_bytes,
    collective_s,
    context_len,
    expert_gemm_s,
    expert_layer_s,
    expert_node_bytes,
    gemm_s,
    kv_shards,
    nodes_per_token,
)
from msi.planner.pipeline import Stages

CATALOGUE = read_catalogue()

# Round numbers: 500 GB/s and 50 TFLOPS are reached, 50 GB/s within a node, at most 5 GB/s out of a GPU.
GPU = Gpu(
    name="toy",
    price=2.0,
    memory_bytes=1e9,
    memory_bytes_per_s=1e12,
    flops_per_s=100e12,
    power_w=100.0,
    network_bytes_per_s=10e9,
    intra_node_bytes_per_s=100e9,
    gpus_per_node=8,
)
GIVEN = Assumptions(
    compute=((1.0, 0.5),),
    memory=0.5,
    network=0.5,
    network_half_bytes=1000.0,
    network_latency_s=10e-6,
    tail=2.0,
    intra_node=0.5,
    collective_latency_s=5e-6,
    cross_node_latency_s=20e-6,
    attention_launch_s=3e-6,
    expert_launch_s=2e-6,
    memory_utilization=0.5,
    reserved_bytes=1e6,
)
# 30,000 values of projections and 400 of the router per layer, 60,000 per expert and layer, 100 KV values per token
MODEL = ModelShape(
    name="toy",
    num_layers=2,
    hidden_size=100,
    intermediate_size=200,
    num_experts=4,
    top_k=2,
    num_heads=10,
    num_kv_heads=5,
    head_dim=10,
    vocab_size=1000,
)


def exactly(value):
    return pytest.approx(value, rel=1e-12, abs=0)


# ------------------------------------------------------------------------------------------ the paper's tables, models


@pytest.mark.parametrize(
    ("name", "gb", "gb_per_s", "tflops"),
    [
        ("l20", 48.0, 864.0, 119.5),
        ("h800", 15.2, 649.7, 187.3),
        ("a800", 35.4, 902.2, 138.1),
        ("h20", 51.9, 2214.1, 80.0),
        ("l40s", 44.4, 800.0, 335.2),
    ],
)
def test_the_catalogue_gives_the_ratios_per_price_of_the_papers_table_3(name, gb, gb_per_s, tflops):
    gpu = CATALOGUE.gpu(name)
    assert gpu.memory_bytes / 1e9 / gpu.price == pytest.approx(gb, abs=0.06)
    assert gpu.memory_bytes_per_s / 1e9 / gpu.price == pytest.approx(gb_per_s, abs=0.06)
    assert gpu.flops_per_s / 1e12 / gpu.price == pytest.approx(tflops, abs=0.06)


def test_attention_is_cheapest_on_h20_and_experts_on_l40s():
    table_3 = [CATALOGUE.gpu(name) for name in ("l20", "h800", "a800", "h20", "l40s")]
    assert max(table_3, key=lambda gpu: gpu.memory_bytes_per_s / gpu.price).name == "h20"
    assert max(table_3, key=lambda gpu: gpu.memory_bytes / gpu.price).name == "h20"
    assert max(table_3, key=lambda gpu: gpu.flops_per_s / gpu.price).name == "l40s"


def test_power_and_links_are_those_of_the_papers_clusters():
    h20, l40s, a100 = (CATALOGUE.gpu(name) for name in ("h20", "l40s", "a800"))
    assert (h20.power_w, l40s.power_w) == (500, 350)
    assert h20.network_bytes_per_s == 4 * 400e9 / 8 / 8  # four NICs of 400 Gbit/s for eight GPUs
    assert l40s.network_bytes_per_s == 2 * 400e9 / 8 / 8
    assert a100.network_bytes_per_s == 200e9 / 8
    assert h20.intra_node_bytes_per_s == 900e9 / 2  # NVLink is quoted for both directions
    assert a100.intra_node_bytes_per_s == 400e9 / 2


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("mixtral-8x22b", 141),
        ("dbrx", 132),
        ("scaled-moe", 317),
        ("mixtral-8x7b", 46.7),
        ("qwen3-30b-a3b", 30.5),
        ("qwen3-235b-a22b", 235),
        ("deepseek-v3", 671),
    ],
)
def test_models_have_as_many_parameters_as_their_makers_say(name, billions):
    digits = 1 if isinstance(billions, float) else 0
    assert round(CATALOGUE.model(name).total_values / 1e9, digits) == billions


@pytest.mark.parametrize(
    ("name", "kv_bytes"),
    [
        ("mixtral-8x22b", 56 * 2 * 8 * 128 * 2),  # layers, keys and values, KV heads, head_dim, bf16
        ("dbrx", 40 * 2 * 8 * 128 * 2),
        ("scaled-moe", 48 * 2 * 8 * 128 * 2),
        ("mixtral-8x7b", 131_072),
        ("qwen3-30b-a3b", 98_304),
        ("qwen3-235b-a22b", 94 * 2 * 4 * 128 * 2),
        ("deepseek-v3", 61 * (512 + 64) * 2),  # one latent row, not two per head
    ],
)
def test_kv_bytes_per_token(name, kv_bytes):
    assert CATALOGUE.model(name).kv_bytes_per_token == kv_bytes


def test_the_values_of_a_model_add_up_by_hand():
    assert MODEL.projection_values == 100 * (100 + 50 + 50 + 100)  # q, k, v, output
    assert MODEL.kv_values == 100
    assert MODEL.attention_flops == 400
    assert MODEL.shared_values == 400
    assert MODEL.expert_values == 60_000
    assert MODEL.attention_bytes == 2 * (2 * 30_000 + 2 * 400 + 2 * 100_000)
    assert MODEL.expert_bytes == 2 * 2 * 60_000
    assert MODEL.total_values == 260_800 + 4 * 120_000
    assert replace(MODEL, is_tied=True).total_values == MODEL.total_values - 100_000


def test_latent_attention_by_hand():
    model = CATALOGUE.model("deepseek-v3")
    down_q, up_q, down_kv = 7168 * 1536, 1536 * 128 * (128 + 64), 7168 * (512 + 64)
    up_kv, output = 512 * 128 * (128 + 128), 128 * 128 * 7168
    assert model.projection_values == down_q + up_q + down_kv + up_kv + output == 187_105_280
    assert model.attention_flops == 2 * 128 * (512 + 64) + 2 * 128 * 512  # scores, then the weighted sum
    assert model.num_sparse_layers == 58
    assert model.shared_values == 7168 * 256 + 3 * 7168 * 2048
    assert model.expert_bytes == 58 * 3 * 7168 * 2048 * 2


def test_a_latent_query_of_rank_zero_is_one_matrix():
    latent = LatentAttention(q_lora_rank=0, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128)
    lite = replace(CATALOGUE.model("deepseek-v3"), hidden_size=2048, num_heads=16, latent=latent)  # DeepSeek-V2-Lite
    query, rest = 2048 * 16 * 192, 2048 * 576 + 512 * 16 * 256 + 16 * 128 * 2048
    assert lite.projection_values == query + rest


@pytest.mark.parametrize("name", CATALOGUE.models)
def test_a_model_comes_back_from_its_json(name):
    model = CATALOGUE.model(name)
    assert model_shape_from_json(model.to_json()) == model


# --------------------------------------------------------------------------------------- the equations, both versions


def test_eq_3_as_written_asks_for_more_micro_batches_than_it_takes():
    lopsided = Stages(attention_s=1.0, expert_s=0.5, comm_s=0.25)  # 2 (1 + 0.25) = 2.5; (1 + 0.5 + 0.5) / 1 = 2
    assert (eq.eq3_as_written(lopsided), eq.eq3_corrected(lopsided)) == (3, 2)
    even = Stages(1.0, 1.0, 0.5)  # T_c = T_f / 2: 3 exactly
    assert (eq.eq3_as_written(even), eq.eq3_corrected(even)) == (3, 3)
    slow = Stages(1.0, 1.0, 0.51)
    assert (eq.eq3_as_written(slow), eq.eq3_corrected(slow)) == (4, 4)
    free = Stages(2.0, 2.0, 0.0)
    assert (eq.eq3_as_written(free), eq.eq3_corrected(free)) == (2, 2)


def test_eq_4_by_hand():
    assert eq.eq4_bounds_s(Stages(1.0, 1.0, 0.4), 3, 10) == exactly((2.8 + 27, 30))


def test_eq_5_as_written_misses_a_pipeline_that_is_not_full():
    stages = Stages(1.0, 1.0, 0.4)
    assert eq.eq5_as_written_s(stages, 3, 10) == exactly(2.8 + 29)
    assert eq.eq5_corrected_s(stages, 3, 10) == exactly(2.8 + 29)
    assert eq.eq5_as_written_s(stages, 2, 10) == exactly(2.8 + 19)
    assert eq.eq5_corrected_s(stages, 2, 10) == exactly(10 * 2.8 + 1)


def test_eq_6_by_hand_with_one_utilisation_for_all_sizes():
    sizes = {
        "b_a": 64,
        "b_e": 128,
        "h": 1000,
        "K": 2,
        "tp_a": 2,
        "tp_e": 4,
        "W_a": 1e9,
        "W_e": 4e8,
        "util": lambda size: 0.5,
    }
    # 64,000 elements at 0.5 GB/s: 128 us; 32,000 at 0.2 GB/s: 160 us
    assert eq.eq6_as_written_s(**sizes) == exactly(160e-6)
    assert eq.eq6_as_written_s(**(sizes | {"W_e": 1e9})) == exactly(128e-6)
    assert eq.eq6_corrected_s(**sizes, E=8, value_bytes=2) == exactly(320e-6)


def test_eq_6_by_hand_where_utilisation_depends_on_the_message():
    sizes = {
        "b_a": 64,
        "b_e": 128,
        "h": 1000,
        "K": 2,
        "tp_a": 2,
        "tp_e": 4,
        "W_a": 1e9,
        "W_e": 4e8,
        "util": lambda size: size / (size + 16_000),
    }
    # as written: Util of 64,000 is 0.8, so 80 us; of 32,000 it is 2/3, so 120 us
    assert eq.eq6_as_written_s(**sizes) == exactly(120e-6)
    # corrected: a pair is 64 x 2/8 rows of 2,000 bytes; 16,000 per GPU sending (half: 256 us), 8,000 receiving (a
    # third: 480 us)
    assert eq.eq6_corrected_s(**sizes, E=8, value_bytes=2) == exactly(480e-6)
    assert eq.eq6_corrected_s(**(sizes | {"W_e": 4e9}), E=8, value_bytes=2) == exactly(256e-6)


def test_eq_7_holds_at_the_limit_itself():
    assert eq.eq7(0.15, 0.15)
    assert not eq.eq7(0.1501, 0.15)


def test_eq_8_by_hand():
    as_written = eq.eq8_as_written_bytes(m=3, b_a=10, s=100, h=1000, L=4, g=4, attention_values=500)
    assert as_written == 4 * 3 * 10 * 100 * 1000 + 1000
    corrected = eq.eq8_corrected_bytes(
        m=3, b_a=10, s=100, kv_bytes_per_token=3000, attention_bytes=1000, buffer_bytes=50
    )
    assert corrected == 9_001_050


def test_eq_8_as_written_and_corrected_agree_where_heads_fill_the_hidden_size():
    mixtral, qwen = CATALOGUE.model("mixtral-8x22b"), CATALOGUE.model("qwen3-30b-a3b")

    def per_token(model):
        L, g = model.num_layers, model.queries_per_kv_head
        return eq.eq8_as_written_bytes(m=1, b_a=1, s=1, h=model.hidden_size, L=L, g=g, attention_values=0)

    assert per_token(mixtral) == mixtral.kv_bytes_per_token
    assert per_token(qwen) == qwen.kv_bytes_per_token / 2  # 32 heads of 128 for a hidden size of 2048


def test_an_experts_gemm_has_three_matrices():
    assert eq.ffn_flops_as_written(10, 30, 7) == 7 * 2 * (10 * 30 + 30 * 10)
    assert eq.ffn_flops_corrected(10, 30, 7) == 7 * 2 * (10 * 60 + 30 * 10)


def test_the_balance_by_hand():
    assert eq.balance_as_written(k1=2.0, k3=1.0, E=8, K=2) == 8.0
    # T_a = 2 x 10 + 30 = 50; an attention node adds 10 x 2 / 8 = 2.5 pairs, T_e = 10 + 2.5 n_a
    assert eq.balance_corrected(2.0, 30.0, 1.0, 10.0, E=8, K=2, b_a=10) == 16.0
    assert eq.balance_corrected(2.0, 30.0, 1.0, 10.0, E=8, K=2, b_a=10, experts_per_node=2) == 8.0
    assert eq.balance_corrected(2.0, 0.0, 1.0, 0.0, E=8, K=2, b_a=123) == 8.0  # without k2 and k4: as written
    assert eq.balance_corrected(2.0, 30.0, 1.0, 51.0, E=8, K=2, b_a=10) == 0.0


def test_the_most_attention_nodes_that_experts_keep_up_with():
    assert [eq.largest_balanced(balance) for balance in (0.0, 0.3, 1.0, 7.9, 8.0, 3 * (1 - 1e-12))] == [
        1,
        1,
        1,
        7,
        8,
        3,
    ]


def test_throughput_per_cost_by_hand():
    # 50 tokens/s over 2 x 3 x 4 + 1 x 8 x 2
    assert eq.throughput_per_cost(100, 2.0, tp_a=2, n_a=3, cost_a=4, tp_e=1, n_e=8, cost_e=2) == exactly(1.25)


@pytest.mark.parametrize(("name", "microseconds"), [("mixtral-8x22b", 893), ("dbrx", 1250), ("scaled-moe", 1042)])
def test_the_latency_budget_of_a_stage(name, microseconds):
    assert round(eq.latency_budget_s(0.150, 3, CATALOGUE.model(name).num_sparse_layers) * 1e6) == microseconds


def test_every_defect_is_named_with_the_place_that_handles_it():
    assert sorted(eq.DEFECTS) == [1, 2, 3, 4, 5, 6, 7, 8]


# ------------------------------------------------------------------------------------------------------- the roofline


def test_a_small_gemm_waits_for_memory_and_a_large_one_for_arithmetic():
    assert gemm_s(1.0, 1e6, 2, 1000.0, GPU, GIVEN) == exactly(2_001_000 / 500e9)
    assert gemm_s(1000.0, 1e6, 2, 1000.0, GPU, GIVEN) == exactly(2e9 / 50e12)
    assert gemm_s(100.0, 1e6, 2, 0.0, GPU, GIVEN) == exactly(4e-6)  # both: 100 rows of 2 FLOPs at 100 FLOPs a value


def test_a_collective_moves_all_but_the_own_part():
    assert collective_s(1e6, 1, GPU, GIVEN) == 0
    assert collective_s(1e6, 4, GPU, GIVEN) == exactly(5e-6 + 750e3 / 50e9)
    assert collective_s(1e6, 8, GPU, GIVEN) == exactly(5e-6 + 875e3 / 50e9)


def test_a_collective_across_nodes_is_as_fast_as_a_nodes_nics_or_its_inside():
    assert collective_s(1e6, 16, GPU, GIVEN) == exactly(20e-6 + 937.5e3 / 40e9)  # 8 NICs of 5 GB/s
    assert collective_s(1e6, 16, replace(GPU, network_bytes_per_s=1e12), GIVEN) == exactly(20e-6 + 937.5e3 / 50e9)


def test_an_attention_stage_by_hand():
    projections = (60_000 + 4 * 100 * 100 * 2) / 500e9
    cache, router = 5000 * 200 / 500e9, (800 + 40_000) / 500e9
    alone = attention_layer_s(MODEL, GPU, 1, 100.0, 5000.0, GIVEN)
    assert alone == exactly(projections + cache + router + 3e-6) == exactly(5.3616e-6)
    # two GPUs: half of weights and cache, two collectives of 20,000 bytes, of which each moves half
    assert attention_layer_s(MODEL, GPU, 2, 100.0, 5000.0, GIVEN) == exactly(
        (30_000 + 80_000) / 500e9 + cache / 2 + (400 + 40_000) / 500e9 + 2 * (5e-6 + 10_000 / 50e9) + 3e-6
    )


def test_long_contexts_are_limited_by_arithmetic_only_where_heads_share_keys():
    slow = replace(GPU, flops_per_s=1e12)  # 500 GFLOPS: 400 FLOPs per 200 bytes take longer than 500 GB/s
    short, long = (attention_layer_s(MODEL, slow, 1, 1.0, context, GIVEN) for context in (1e6, 2e6))
    assert long - short == pytest.approx(1e6 * 400 / 0.5e12)


def test_shared_experts_and_dense_layers_take_attention_time():
    model = replace(MODEL, num_layers=3, num_dense_layers=1, dense_intermediate_size=400, shared_intermediate_size=200)
    every_layer = (60_000 + 80_000) / 500e9 + 5000 * 200 / 500e9 + 3e-6
    shared = (2 * 60_400 + 40_000) / 500e9
    dense = (2 * 120_000 + 80_000) / 500e9
    assert attention_layer_s(model, GPU, 1, 100.0, 5000.0, GIVEN) == exactly(
        (3 * every_layer + 2 * shared + 1 * dense) / 2
    )


def test_an_expert_stage_by_hand():
    # 1000 pairs on 4 experts: rows in and out and three intermediate widths, four experts' weights
    memory = (1000 * (200 + 600) * 2 + 4 * 120_000) / 500e9
    assert expert_layer_s(MODEL, GPU, 1, 1000.0, 4.0, GIVEN) == exactly(memory + 2e-6) == exactly(6.16e-6)
    slow = replace(GPU, flops_per_s=10e12)
    assert expert_layer_s(MODEL, slow, 1, 1000.0, 4.0, GIVEN) == exactly(120e6 / 5e12 + 2e-6)
    assert expert_layer_s(MODEL, slow, 2, 1000.0, 4.0, GIVEN) == exactly(
        60e6 / 5e12 + 2e-6 + 2 * (5e-6 + 100_000 / 50e9)
    )


def test_a_sliced_expert_reads_a_slice_of_its_weights():
    memory = (10 * (200 + 600 / 4) * 2 + 2 * 120_000 / 4) / 500e9
    assert expert_gemm_s(MODEL, GPU, 10.0, 2.0, GIVEN, slices=4) == exactly(memory + 2e-6)


def test_the_head_reads_its_weights_and_writes_logits():
    pair = Roofline(MODEL, GPU, 1, GPU, 1, GIVEN)
    assert pair.pass_s(10.0) == exactly((200_000 + 2 * 10 * 1000 * 4) / 500e9 + 3e-6)


def test_communication_is_the_slower_of_a_sender_and_a_receiver():
    pair = Roofline(MODEL, GPU, 1, GPU, 2, GIVEN)
    # messages of 4000 bytes reach 0.4 of 10 GB/s: 4 of them 4 us; of 2000 bytes a third: 8 of them 4.8 us
    assert pair.comm_s(4000.0, 8.0, 4.0) == exactly((4.8e-6 + 10e-6) * 2)
    assert pair.comm_s(4000.0, 4.0, 4.0) == exactly((4.0e-6 + 10e-6) * 2)


def test_communication_is_eq_6_corrected_with_one_expert_per_node():
    b_a, n_a = 96.0, 5.0
    pair = Roofline(MODEL, GPU, 2, replace(GPU, network_bytes_per_s=4e9), 1, GIVEN)
    mean_s = eq.eq6_corrected_s(
        b_a=b_a, b_e=b_a * n_a * 2 / 4, h=100, K=2, E=4, tp_a=2, tp_e=1, W_a=10e9, W_e=4e9, util=GIVEN.network_at,
        value_bytes=2,
    )  # fmt: skip
    message = b_a * nodes_per_token(MODEL, 1.0) / 4 * 100 * 2
    assert pair.comm_s(message, n_a, 4.0) == exactly((mean_s + 10e-6) * 2)


def test_compute_is_interpolated_over_the_logarithm_of_rows():
    given = replace(GIVEN, compute=((1.0, 0.1), (100.0, 0.5)))
    assert [given.compute_at(rows) for rows in (0.0, 1.0, 10.0, 100.0, 1e6)] == pytest.approx([0.1, 0.1, 0.3, 0.5, 0.5])
    assert gemm_s(10.0, 1e6, 2, 0.0, replace(GPU, memory_bytes_per_s=1e15), given) == exactly(20e6 / 30e12)


def test_a_message_of_half_bytes_reaches_half():
    assert GIVEN.network_at(1000.0) == exactly(0.25)
    assert GIVEN.network_at(1e12) == pytest.approx(0.5)


# ------------------------------------------------------------------------------------------------- routing in the mean


@pytest.mark.parametrize(("num_experts", "top_k"), [(6, 1), (6, 2), (6, 4), (6, 6), (8, 2), (8, 3), (4, 4)])
def test_nodes_per_token_is_the_mean_over_all_choices_of_experts(num_experts, top_k):
    model = replace(MODEL, num_experts=num_experts, top_k=top_k)
    for experts_per_node in (one for one in range(1, num_experts + 1) if num_experts % one == 0):
        choices = itertools.combinations(range(num_experts), top_k)
        counted = mean(len({expert // experts_per_node for expert in chosen}) for chosen in choices)
        assert nodes_per_token(model, float(experts_per_node)) == pytest.approx(counted)


def test_a_token_of_a_large_model_reaches_few_nodes_more_than_once():
    deepseek = CATALOGUE.model("deepseek-v3")
    assert nodes_per_token(deepseek, 1.0) == pytest.approx(8)
    assert nodes_per_token(deepseek, 256.0) == pytest.approx(1)
    assert nodes_per_token(deepseek, 32.0) == pytest.approx(8 * (1 - math.comb(224, 8) / math.comb(256, 8)))


@pytest.mark.parametrize("num_tokens", [1, 2, 3])
def test_active_experts_is_the_mean_over_all_choices_of_all_tokens(num_tokens):
    choices = list(itertools.combinations(range(4), 2))
    for held in (1, 2, 4):
        drawn = itertools.product(choices, repeat=num_tokens)
        counted = mean(len({expert for chosen in tokens for expert in chosen if expert < held}) for tokens in drawn)
        assert active_experts(MODEL, float(held), float(num_tokens)) == pytest.approx(counted)


def test_every_expert_is_active_when_all_are_chosen_or_tokens_are_many():
    assert active_experts(replace(MODEL, top_k=4), 4.0, 1.0) == 4
    assert active_experts(MODEL, 4.0, 1000.0) == pytest.approx(4)
    assert active_experts(MODEL, 4.0, 0.0) == 0


# ------------------------------------------------------------------------------------------------------------- memory


def test_an_attention_node_holds_weights_cache_slots_and_activations():
    sizes = {"micro_batch": 10.0, "num_micro_batches": 3.0, "mean_len": 50.0, "num_expert_nodes": 4.0}
    cache, slots = 3 * 10 * 50 * 400, 2 * 4 * 3 * 10 * 200
    activations = 10 * (6 * 100 * 2 + 4 * 1000)
    assert attention_node_bytes(MODEL, 1, GIVEN, **sizes) == 521_600 + cache + slots + activations + 1e6
    assert attention_node_bytes(MODEL, 5, GIVEN, **sizes) == 521_600 + cache + slots + activations + 5e6
    # ten GPUs for five KV heads: each is kept twice
    assert attention_node_bytes(MODEL, 10, GIVEN, **sizes) == 521_600 + 2 * cache + slots + activations + 10e6


def test_an_expert_node_holds_experts_slots_and_activations():
    held = expert_node_bytes(
        MODEL, 2, GIVEN, micro_batch=10.0, num_micro_batches=3.0, num_attention_nodes=5.0, experts_per_node=2.0
    )
    weights, slots, activations = 2 * 240_000, 2 * 3 * 5 * 10 * 200, 5 * 10 * 2 * 2 / 4 * (200 + 600) * 2
    assert held == weights + slots + activations + 2e6


def test_latent_rows_are_kept_whole_by_every_gpu_of_a_group():
    deepseek = CATALOGUE.model("deepseek-v3")
    assert [kv_shards(deepseek, tp) for tp in (1, 8)] == [1, 1]
    assert [kv_shards(MODEL, tp) for tp in (1, 4, 8)] == [1, 4, 5]
    sizes = {"micro_batch": 1.0, "num_micro_batches": 1.0, "num_expert_nodes": 0.0}
    with_row, without = (attention_node_bytes(deepseek, 8, GIVEN, mean_len=mean, **sizes) for mean in (1.0, 0.0))
    assert with_row - without == 8 * 70_272


def test_a_sliding_window_bounds_what_is_read_in_the_layers_that_have_it():
    model = replace(MODEL, sliding_window=4096)
    assert [context_len(model, mean_len) for mean_len in (100.0, 5000.0)] == [100.0, 4096.0]
    assert context_len(MODEL, 5000.0) == 5000.0
    gpt_oss = CATALOGUE.model("gpt-oss-120b")
    assert [context_len(gpt_oss, mean_len) for mean_len in (100.0, 1128.0)] == [100.0, 628.0]
    assert gpt_oss.total_values == pytest.approx(116.8e9, rel=2e-3)
    assert model_shape_from_json(gpt_oss.to_json()) == gpt_oss


# ------------------------------------------------------------------------------------- arrays of candidates, one number


def deepseek_like():
    return replace(MODEL, num_layers=5, num_dense_layers=2, dense_intermediate_size=300, shared_intermediate_size=100)


CURVED = replace(GIVEN, compute=((1.0, 0.2), (512.0, 0.6)))
PAIR = Roofline(deepseek_like(), GPU, 2, GPU, 4, CURVED)
FORMULAS = {
    "compute_at": lambda a, b, c: CURVED.compute_at(a),
    "network_at": lambda a, b, c: CURVED.network_at(a),
    "gemm": lambda a, b, c: gemm_s(a, 1000 * b, 2, c, GPU, CURVED),
    "collective alone": lambda a, b, c: collective_s(a, 1, GPU, CURVED),
    "collective": lambda a, b, c: collective_s(a, 4, GPU, CURVED),
    "collective across nodes": lambda a, b, c: collective_s(a, 32, GPU, CURVED),
    "context": lambda a, b, c: context_len(replace(MODEL, sliding_window=50), a),
    "attention": lambda a, b, c: attention_layer_s(MODEL, GPU, 2, a, b, CURVED),
    "attention, dense layers": lambda a, b, c: attention_layer_s(deepseek_like(), GPU, 2, a, b, CURVED),
    "expert gemm": lambda a, b, c: expert_gemm_s(MODEL, GPU, a, c, CURVED, slices=2),
    "expert": lambda a, b, c: expert_layer_s(MODEL, GPU, 4, a, c, CURVED),
    "active": lambda a, b, c: active_experts(MODEL, c, a),
    "nodes per token": lambda a, b, c: nodes_per_token(MODEL, c),
    "roofline attention": lambda a, b, c: PAIR.attention_s(a, b),
    "roofline pass": lambda a, b, c: PAIR.pass_s(a),
    "roofline expert": lambda a, b, c: PAIR.expert_s(a, c, c),
    "roofline comm": lambda a, b, c: PAIR.comm_s(a, b, c),
    "attention bytes": lambda a, b, c: attention_node_bytes(
        MODEL, 8, GIVEN, micro_batch=a, num_micro_batches=c, mean_len=b, num_expert_nodes=c
    ),
    "expert bytes": lambda a, b, c: expert_node_bytes(
        MODEL, 8, GIVEN, micro_batch=a, num_micro_batches=b, num_attention_nodes=b, experts_per_node=c
    ),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_a_formula_gives_the_same_for_an_array_as_for_each_number(name):
    formula = FORMULAS[name]
    a, b = np.array([1.0, 7.0, 64.0, 5000.0]), np.array([3.0, 100.0, 9.0, 20000.0])
    c = np.array([1.0, 2.0, 4.0, 1.0])
    whole = formula(a, b, c)
    assert np.shape(whole) == (4,)
    one_by_one = [float(formula(float(x), float(y), float(z))) for x, y, z in zip(a, b, c, strict=True)]
    assert whole.tolist() == pytest.approx(one_by_one, rel=1e-14)


def test_a_deployments_costs_for_the_simulator_are_the_pairs():
    costs = DeploymentCosts(PAIR, num_attention_nodes=3, num_expert_nodes=2, experts_per_node=2)
    assert costs.attention_s(8, 400) == PAIR.attention_s(8.0, 400.0)
    assert costs.pass_s(8) == PAIR.pass_s(8.0)
    assert costs.expert_s(24.0, 2) == PAIR.expert_s(24.0, 2.0, 2.0)
    assert costs.comm_s(1600) == PAIR.comm_s(1600.0, 3.0, 2.0)
    assert costs.comm_s(0) > 0  # an empty message is still announced
