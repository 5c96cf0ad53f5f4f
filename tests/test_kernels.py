"""The plain-torch operations against definitions written out by hand."""

from __future__ import annotations

import math
from collections import Counter

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from msi.attention.pass_inputs import PassInputs
from msi.kernels import BLOCK_TOKENS, Activation, SigmoidRouting
from msi.kernels.cpu import CpuKernels
from msi.kernels.experts import activate, gated_mlp, sigmoid_gated, silu_and_mul
from msi.kernels.kernels import Outboxes
from msi.kernels.norm import HeadNorm, Norm, layer_norm, norm_heads, norm_projections, rms_norm
from msi.kernels.paged_attention import AttentionShape, kv_rows, write_kv
from msi.kernels.plain import PlainKernels
from msi.kernels.replicas import PlacementTables, choose_replicas
from msi.kernels.rope import apply_rope, rope_frequencies, rope_table
from msi.kernels.routing import PackedRows, row_bytes, topk_sigmoid, topk_softmax
from msi.kernels.turns import TURNS, homes_of, in_turns, wheel_of, whose_turn
from msi.placement import Placement, place_evenly
from msi.types import MicroBatch
from tests.layered import homes_in

PLAIN, CPU = PlainKernels(torch.device("cpu")), CpuKernels()


def test_rms_norm_is_its_definition():
    hidden, weight = torch.randn(5, 8), torch.randn(8)
    expected = hidden / torch.sqrt((hidden**2).mean(-1, keepdim=True) + 1e-5) * weight
    torch.testing.assert_close(rms_norm(hidden, weight, 1e-5), expected)


def test_layer_norm_is_its_definition():
    hidden, weight = torch.randn(5, 8), torch.randn(8)
    centred = hidden - hidden.mean(-1, keepdim=True)
    expected = centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-5) * weight
    torch.testing.assert_close(layer_norm(hidden, weight, 1e-5), expected)


def test_queries_and_keys_are_normed_head_by_head_and_values_left_alone():
    query, key, value = torch.randn(5, 3, 4), torch.randn(5, 2, 4), torch.randn(5, 2, 4)
    query_weight, key_weight = torch.randn(4), torch.randn(4)
    heads = torch.cat([query, key, value], dim=1)
    norm_heads(heads, HeadNorm(torch.cat([query_weight.expand(3, -1), key_weight.expand(2, -1)]), 1e-6))
    expected = torch.cat([rms_norm(query, query_weight, 1e-6), rms_norm(key, key_weight, 1e-6), value], dim=1)
    torch.testing.assert_close(heads, expected)


def test_queries_and_keys_are_normed_as_wholes_and_values_left_alone():
    query, key, value = torch.randn(5, 12), torch.randn(5, 8), torch.randn(5, 8)
    query_weight, key_weight = torch.randn(12), torch.randn(8)
    qkv = torch.cat([query, key, value], dim=1)
    norm_projections(qkv, query_weight, key_weight, 1e-6)
    expected = torch.cat([rms_norm(query, query_weight, 1e-6), rms_norm(key, key_weight, 1e-6), value], dim=1)
    torch.testing.assert_close(qkv, expected)


def test_a_shared_expert_is_a_gated_mlp_times_a_sigmoid_per_row():
    rows, gate_up, down, gate = torch.randn(5, 4), torch.randn(12, 4), torch.randn(4, 6), torch.randn(1, 4)

    def mlp(rows):
        return gated_mlp(rows, lambda x: x @ gate_up.T, lambda x: x @ down.T)

    inner = torch.nn.functional.silu(rows @ gate_up[:6].T) * (rows @ gate_up[6:].T)
    torch.testing.assert_close(mlp(rows), inner @ down.T)
    scale = 1 / (1 + torch.exp(-(rows @ gate[0])))
    torch.testing.assert_close(sigmoid_gated(rows, lambda x: x @ gate.T, mlp), inner @ down.T * scale[:, None])


def test_rope_rotates_pairs_by_position_times_frequency():
    heads = torch.randn(3, 2, 8)
    original = heads.clone()
    cos, sin = rope_table(torch.tensor([0, 5, 9]), rope_frequencies(8, 1e4), torch.float32)
    apply_rope(heads, cos, sin)
    torch.testing.assert_close(heads[0], original[0])
    for token, position in ((1, 5), (2, 9)):
        for pair in range(4):
            angle = position / 1e4 ** (2 * pair / 8)
            x, y = original[token, 1, pair], original[token, 1, pair + 4]
            assert heads[token, 1, pair] == pytest.approx(float(x * math.cos(angle) - y * math.sin(angle)), abs=1e-5)
            assert heads[token, 1, pair + 4] == pytest.approx(
                float(y * math.cos(angle) + x * math.sin(angle)), abs=1e-5
            )


def inputs_of(query_lens, context_lens, tables):
    """A pass over sequences of these lengths, its tokens all the same."""
    positions = [
        at for query, context in zip(query_lens, context_lens, strict=True) for at in range(context - query, context)
    ]
    lens = (tuple(query_lens), tuple(context_lens), tuple(map(tuple, tables)))
    return PassInputs(lambda tensor: tensor).lay_out(MicroBatch((5,) * len(positions), tuple(positions), *lens))[1]


def test_rope_leaves_what_lies_beyond_its_table_alone():
    heads = torch.randn(3, 2, 8)
    original = heads.clone()
    table = rope_table(torch.tensor([0, 5, 9]), rope_frequencies(4, 1e4), torch.float32)
    apply_rope(heads, *table)
    alone = original[..., :4].clone()
    apply_rope(alone, *table)
    assert torch.equal(heads[..., :4], alone)
    assert torch.equal(heads[..., 4:], original[..., 4:])


@pytest.mark.parametrize("kernels", [PLAIN, CPU], ids=["plain", "cpu"])
@pytest.mark.parametrize("window", [None, 7, 40])
@pytest.mark.parametrize("has_sinks", [False, True], ids=["no sinks", "sinks"])
def test_paged_attention_equals_attention_over_each_sequence_alone(kernels, window, has_sinks):
    torch.manual_seed(0)
    num_heads, num_kv_heads, head_dim = 6, 2, 8
    query_lens, context_lens = [1, 1, 5, 1, 20], [3, 40, 33, 90, 20]
    cache = torch.randn(64, 2, BLOCK_TOKENS, num_kv_heads, head_dim)
    order = iter((torch.randperm(63) + 1).tolist())
    tables = [[next(order) for _ in range(-(-length // BLOCK_TOKENS))] for length in context_lens]
    query = torch.randn(sum(query_lens), num_heads, head_dim)
    inputs = inputs_of(query_lens, context_lens, tables)
    shape = AttentionShape(num_heads, num_kv_heads, head_dim, window)
    plan = kernels.plan_attention(inputs, inputs, shape, torch.float32)
    sinks = torch.randn(num_heads) * 3 if has_sinks else None
    result = kernels.paged_attention(query, cache, plan, sinks)
    row = 0
    for query_len, length, table in zip(query_lens, context_lens, tables, strict=True):
        kv = cache[table].transpose(1, 2).flatten(0, 1)[:length]
        for offset in range(query_len):
            position = length - query_len + offset
            first = 0 if window is None else max(0, position - window + 1)
            for head in range(num_heads):
                keys, values = (kv[first : position + 1, part, head // 3] for part in (0, 1))
                scores = keys @ query[row + offset, head] / math.sqrt(head_dim)
                if sinks is not None:
                    scores = torch.cat([scores, sinks[head : head + 1]])
                weights = torch.softmax(scores, 0)[: len(keys)]
                torch.testing.assert_close(result[row + offset, head], weights @ values, atol=1e-5, rtol=1e-4)
        row += query_len


def test_written_keys_and_values_are_where_the_slots_say():
    cache = torch.zeros(4, 2, BLOCK_TOKENS, 1, 2)
    kv = torch.randn(3, 2, 1, 2)
    slots = torch.tensor([1 * BLOCK_TOKENS + 15, 2 * BLOCK_TOKENS, 3 * BLOCK_TOKENS + 7], dtype=torch.int32)
    write_kv(cache, kv, kv_rows(slots))
    torch.testing.assert_close(cache[1, :, 15], kv[0])
    torch.testing.assert_close(cache[2, :, 0], kv[1])
    torch.testing.assert_close(cache[3, :, 7], kv[2])
    assert int((cache != 0).any(dim=-1).any(dim=-1).sum()) == 6


@pytest.mark.parametrize("renormalise", [True, False])
def test_topk_softmax_is_softmax_then_topk(renormalise):
    logits = torch.randn(9, 5)
    weights, ids = topk_softmax(logits, 2, renormalise)
    expected, expected_ids = torch.topk(torch.softmax(logits, -1), 2)
    if renormalise:
        expected = expected / expected.sum(-1, keepdim=True)
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(weights, expected)


@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize("routing", [SigmoidRouting(), SigmoidRouting(4, 2, 2.5), SigmoidRouting(3, 3, 0.5)], ids=str)
def test_topk_sigmoid_chooses_by_the_bias_and_weighs_without(routing, renormalise):
    torch.manual_seed(0)
    logits, bias, k = torch.randn(9, 12), torch.randn(12), 4
    weights, ids = topk_sigmoid(logits, bias, k, renormalise, routing)
    for token in range(9):
        scores = [1 / (1 + math.exp(-float(logit))) for logit in logits[token]]
        choice = [score + float(one) for score, one in zip(scores, bias, strict=True)]
        size = 12 // routing.num_groups
        groups = [choice[start : start + size] for start in range(0, 12, size)]
        best = sorted(range(len(groups)), key=lambda group: -sum(sorted(groups[group])[-2:]))
        inside = [expert for expert in range(12) if expert // size in best[: routing.num_chosen_groups]]
        chosen = sorted(inside, key=lambda expert: -choice[expert])[:k]
        assert ids[token].tolist() == chosen
        total = sum(scores[expert] for expert in chosen) if renormalise else 1.0
        expected = torch.tensor([scores[expert] / total * routing.scale for expert in chosen])
        torch.testing.assert_close(weights[token], expected)


def test_an_activation_is_its_definition():
    gate_up = torch.randn(5, 8) * 3
    gate_up[0, 0] = math.nan
    gate, up = gate_up[:, :4].clamp(max=1.5), gate_up[:, 4:].clamp(-1.5, 1.5)
    expected = gate * torch.sigmoid(1.7 * gate) * (up + 1)
    found = activate(gate_up, Activation(alpha=1.7, limit=1.5, up_offset=1.0))
    torch.testing.assert_close(found, expected, equal_nan=True)
    assert found[0, 0].isnan()
    free = activate(gate_up[1:], Activation(alpha=1.7))
    torch.testing.assert_close(free, (gate_up[:, :4] * torch.sigmoid(1.7 * gate_up[:, :4]) * gate_up[:, 4:])[1:])


@pytest.mark.parametrize("kernels", [PLAIN, CPU], ids=["plain", "cpu"])
def test_experts_with_biases_add_each_to_its_product(kernels):
    torch.manual_seed(0)
    gate_up, down, biases = torch.randn(3, 12, 8), torch.randn(3, 8, 6), (torch.randn(3, 12), torch.randn(3, 8))
    activation = Activation(alpha=1.7, limit=1.5, up_offset=1.0)
    bank = kernels.expert_bank(
        num_layers=1, num_experts=2, hidden_size=8, inner_size=6, dtype=torch.float32, activation=activation,
        has_bias=True,
    )  # fmt: skip
    for expert in range(2):
        bank.put(0, expert, gate_up[expert], down[expert], (biases[0][expert], biases[1][expert]))
    bank = bank.arranged([[1, None, 0]])
    bank.put(0, 1, gate_up[2], down[2], (biases[0][2], biases[1][2]))
    order, ids = [1, 2, 0], torch.tensor([[0, 1], [2, 1], [-1, 0], [1, 2]], dtype=torch.int32)
    slots = PackedRows(torch.randn(1, 1, 4, 8), torch.rand(1, 1, 4, 2), ids.view(1, 1, 4, 2))
    answers = {0: torch.zeros(1, 4, 8)}
    bank.run(0, 0, [(0, 4)], slots, answers)
    expected = torch.zeros(4, 8)
    for row in range(4):
        for choice, local in enumerate(ids[row].tolist()):
            if local >= 0:
                expert = order[local]
                inner = activate(slots.hidden[0, 0, row] @ gate_up[expert].T + biases[0][expert], activation)
                output = inner @ down[expert].T + biases[1][expert]
                expected[row] += slots.topk_weights[0, 0, row, choice] * output
    torch.testing.assert_close(answers[0][0], expected, atol=1e-4, rtol=1e-4)


def dense_moe(hidden, topk_ids, topk_weights, gate_up, down):
    result = torch.zeros_like(hidden)
    for row in range(hidden.shape[0]):
        for slot in range(topk_ids.shape[1]):
            expert = int(topk_ids[row, slot])
            inner = silu_and_mul(hidden[row : row + 1] @ gate_up[expert].T)
            result[row] += topk_weights[row, slot] * (inner @ down[expert].T)[0]
    return result


def with_replica(placement, expert, node):
    """The placement with this expert on that node, too."""
    held = placement.experts[node]
    grown = held if expert in held else (*held, expert)
    experts = (*placement.experts[:node], grown, *placement.experts[node + 1 :])
    return Placement(experts, placement.num_experts, placement.version + 1)


def chosen_in_words(topk_ids, placement):
    """The node of each expert of each row: its nodes in turn, beginning at the sum of the row's number and its ids.

    Seven, eight or nine nodes do not share sixty turns evenly: the first have one more, and it is a wheel of its own.
    """
    chosen = []
    for number, ids in enumerate(topk_ids):
        nodes = [homes_in(placement, expert) for expert in ids]
        wheels = [one * (TURNS // len(one)) if TURNS % len(one) == 0 else uneven_wheel(one) for one in nodes]
        chosen.append([wheel[(number + sum(ids)) % TURNS] for wheel in wheels])
    return chosen


def uneven_wheel(nodes):
    return [nodes[replica] for replica in wheel_of(in_turns([1] * len(nodes)))]


def nodes_of(replicas, tables):
    """The one node that holds each replica."""
    holds = tables.local_ids[:, replicas] >= 0
    assert (holds.sum(dim=0) == 1).all()
    return holds.to(torch.int32).argmax(dim=0).tolist()


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from([PLAIN, CPU]), st.sampled_from([PLAIN, CPU]))
def test_combining_what_was_dispatched_equals_the_dense_computation(data, attention, experts):
    """For any placement, and whoever computes: rows packed per node, experts run there, partial sums added back."""
    num_experts = data.draw(st.integers(1, 9), "experts")
    num_nodes = data.draw(st.integers(1, num_experts), "nodes")
    k = data.draw(st.integers(1, min(4, num_experts)), "k")
    num_tokens = data.draw(st.integers(1, 12), "tokens")
    torch.manual_seed(data.draw(st.integers(0, 1000), "seed"))
    hidden_size, inner = 8, 6
    hidden = torch.randn(num_tokens, hidden_size)
    gate_up = torch.randn(num_experts, 2 * inner, hidden_size)
    down = torch.randn(num_experts, hidden_size, inner)
    topk_weights, topk_ids = attention.topk_softmax(torch.randn(num_tokens, num_experts), k, renormalise=True)

    placement = place_evenly(num_experts, num_nodes)
    assert [expert for node in range(num_nodes) for expert in placement.experts[node]] == [*range(num_experts)]
    extra = data.draw(st.lists(st.tuples(st.integers(0, num_nodes - 1), st.integers(0, num_experts - 1))), "replicas")
    for node, expert in extra:
        placement = with_replica(placement, expert, node)
    tables = PlacementTables.of(placement.experts, num_experts)
    node_of = chosen_in_words(topk_ids.tolist(), placement)
    replicas = choose_replicas(topk_ids, tables)
    assert nodes_of(replicas, tables) == node_of

    seat, lane = 1, 2  # of slots whose other rows hold what no result may
    memory = torch.full((num_nodes, 2, 3, num_tokens, row_bytes(hidden_size, k, torch.float32)), 255, dtype=torch.uint8)
    slots = [PackedRows.view(of_node, hidden_size, k, torch.float32) for of_node in memory]
    outboxes = [PackedRows.view(of_node[seat, lane], hidden_size, k, torch.float32) for of_node in memory]
    answers = torch.full((num_nodes, 3, num_tokens, hidden_size), torch.nan)
    counts = torch.full((num_nodes,), -1, dtype=torch.int32)
    sent = attention.pack(hidden, topk_weights, replicas, tables.local_ids, Outboxes(outboxes, counts))
    for node, count in enumerate(counts.tolist()):
        members = placement.experts[node]
        bank = experts.expert_bank(
            num_layers=2, num_experts=len(members), hidden_size=hidden_size, inner_size=inner, dtype=torch.float32
        )
        for local, expert in enumerate(members):
            bank.put(1, local, gate_up[expert], down[expert])
        if count:
            bank.run(1, lane, [(seat, count)], slots[node], {seat: answers[node]})
            all_sent = zip(topk_ids.flatten().tolist(), (one for nodes in node_of for one in nodes), strict=True)
            came = Counter(expert for expert, its_node in all_sent if its_node == node)
            assert bank.num_rows.tolist() == [[0] * len(members), [came[expert] for expert in members]]
            num_hit = len(came)
            assert bank.weight_bytes_read == (num_hit if experts is CPU else len(members)) * 3 * inner * hidden_size * 4
    result = torch.zeros_like(hidden)
    ones = Norm(rms_norm, torch.ones(hidden_size), 1e-6)
    normed = attention.combine_norm(result, answers[:, lane], sent, ones)
    expected = dense_moe(hidden, topk_ids, topk_weights, gate_up, down)
    torch.testing.assert_close(result, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(normed, rms_norm(result, ones.weight, 1e-6))
    assert counts.sum() == sum(len(set(nodes)) for nodes in node_of), "a token travels once to each node that it needs"


@pytest.mark.parametrize("kernels", [PLAIN, CPU], ids=["plain", "cpu"])
def test_rows_of_several_seats_are_computed_together_and_go_back_to_their_own(kernels):
    torch.manual_seed(0)
    gate_up, down = torch.randn(3, 12, 8), torch.randn(3, 8, 6)
    bank = kernels.expert_bank(num_layers=1, num_experts=3, hidden_size=8, inner_size=6, dtype=torch.float32)
    for expert in range(3):
        bank.put(0, expert, gate_up[expert], down[expert])
    topk_ids = torch.randint(0, 3, (4, 2, 5, 2)).to(torch.int32)
    slots = PackedRows(torch.randn(4, 2, 5, 8), torch.rand(4, 2, 5, 2), topk_ids)
    answers = {seat: torch.zeros(2, 5, 8) for seat in range(4)}
    bank.run(0, 1, [(3, 2), (0, 5)], slots, answers)
    for seat, num_rows in ((0, 5), (1, 0), (2, 0), (3, 2)):
        rows = (slots.hidden[seat, 1], slots.topk_ids[seat, 1], slots.topk_weights[seat, 1])
        expected = dense_moe(*rows, gate_up, down)
        torch.testing.assert_close(answers[seat][1, :num_rows], expected[:num_rows], atol=1e-4, rtol=1e-4)
        assert not answers[seat][1, num_rows:].any()
        assert not answers[seat][0].any()


EVERYWHERE = Placement(((0, 1, 2, 3), (3, 2, 1, 0), (1, 0, 3, 2)), 4)


@pytest.mark.parametrize(
    "topk_ids",
    [torch.tensor([[0]] * 300), torch.arange(300)[:, None] % 4, torch.tensor([[1, 3]] * 300)],
    ids=["one expert alone", "each in turn", "one pair alone"],
)
def test_rows_spread_evenly_over_the_nodes_of_their_experts(topk_ids):
    tables = PlacementTables.of(EVERYWHERE.experts, 4)
    replicas = choose_replicas(topk_ids, tables)
    assert torch.equal(replicas, choose_replicas(topk_ids, tables)), "the same every time"
    nodes = nodes_of(replicas, tables)
    assert all(len(set(row)) == 1 for row in nodes), "experts on the same nodes meet at one"
    assert Counter(row[0] for row in nodes) == {0: 100, 1: 100, 2: 100}


def test_one_row_a_pass_spreads_by_what_it_chose():
    tables = PlacementTables.of(EVERYWHERE.experts, 4)
    chosen = [nodes_of(choose_replicas(torch.tensor([pair]), tables), tables) for pair in ([0, 1], [0, 2], [0, 3])]
    assert sorted(row[0] for (row,) in chosen) == [0, 1, 2]


def test_rows_go_to_nodes_that_are_there_where_one_has_their_expert():
    placement = Placement(((0, 1), (1, 2), (2, 3)), 4)
    topk_ids = torch.tensor([[0, 1], [1, 2], [2, 3]] * 8)
    for missing in range(3):
        tables = PlacementTables.of(placement.experts, 4, missing=(missing,))
        assert tables.most_replicas == 2, "tables have one shape"
        chosen = zip(topk_ids.tolist(), nodes_of(choose_replicas(topk_ids, tables), tables), strict=True)
        for experts, nodes in chosen:
            for expert, node in zip(experts, nodes, strict=True):
                others = [one for one in homes_in(placement, expert) if one != missing]
                assert node in (others or homes_in(placement, expert))


@pytest.mark.parametrize("shares", [[60], [30, 30], [45, 15], [0, 60], [1, 58, 1], [20, 20, 20], [7, 13, 17, 23]])
def test_replicas_get_their_shares_as_evenly_as_turns_allow(shares):
    wheel = wheel_of(shares)
    assert [wheel.count(replica) for replica in range(len(shares))] == shares
    for first in range(TURNS):
        for length in (6, 20):
            came = Counter((wheel * 2)[first : first + length])
            assert all(abs(came[replica] - share * length / TURNS) <= 2 for replica, share in enumerate(shares))


@given(st.lists(st.floats(0, 1e9), min_size=1, max_size=9))
def test_weights_become_turns_by_their_size(weights):
    turns = in_turns(weights)
    assert sum(turns) == TURNS
    assert min(turns) >= 0
    total = sum(weights)
    assert total == 0 or all(
        abs(turn - TURNS * weight / total) < 1 for turn, weight in zip(turns, weights, strict=True)
    )


def test_rows_go_where_shares_say_and_to_others_where_those_are_missing():
    placement = Placement(((0, 1), (1, 0), (0, 2)), 3, shares=((60, 0, 0), (15, 45), (60,)))
    topk_ids = torch.tensor([[0, 1]] * 120)
    tables = PlacementTables.of(placement.experts, 3, shares=placement.shares)
    assert [Counter(column) for column in zip(*nodes_of(choose_replicas(topk_ids, tables), tables), strict=True)] == [
        {0: 120}, {0: 30, 1: 90},
    ]  # fmt: skip
    tables = PlacementTables.of(placement.experts, 3, missing=(0,), shares=placement.shares)
    assert [Counter(column) for column in zip(*nodes_of(choose_replicas(topk_ids, tables), tables), strict=True)] == [
        {1: 60, 2: 60}, {1: 120},
    ]  # fmt: skip
    twin = whose_turn(topk_ids.numpy(), numpy.arange(120), tables.wheels.numpy())
    assert (torch.from_numpy(twin) + topk_ids * 3 == choose_replicas(topk_ids, tables)).all(), "numpy's is the same"


def test_layers_that_differ_have_tables_of_their_own_in_one_piece_of_memory():
    layers = [(((0, 1), (1, 0), (0, 2)), ((60, 0, 0), (15, 45), (60,))), (((2,), (0,), (1,)), ())]
    tables = PlacementTables.of_layers(layers, 3, missing=(1,))
    assert (tables.local_ids.shape, tables.wheels.shape, tables.most_replicas) == ((2, 3, 12), (2, 3, TURNS), 3)
    topk_ids = torch.tensor([[0, 1], [2, 0], [1, 2]] * 20)
    for layer, (experts, shares) in enumerate(layers):
        of_layer, alone = tables.of_layer(layer), PlacementTables.of(experts, 3, missing=(1,), shares=shares)
        assert of_layer.local_ids.data_ptr() % 16 == tables.local_ids.data_ptr() % 16
        ids, own = (choose_replicas(topk_ids, one) for one in (of_layer, alone))
        assert torch.equal(of_layer.local_ids[:, ids], alone.local_ids[:, own]), "as if all were like this one"
        nobody = of_layer.with_nobody().local_ids[:, -1]
        assert torch.equal(tables.with_nobody().of_layer(layer).local_ids[:, -1], nobody)
        assert nobody.tolist() == [-1] * 3
    alike = PlacementTables.of(EVERYWHERE.experts, 4)
    assert alike.of_layer(7) is alike


@given(num_nodes=st.integers(1, 5), num_experts=st.integers(1, 6), num_layers=st.integers(1, 3), draw=st.data())
def test_tables_are_those_that_homes_and_turns_one_by_one_come_to(num_nodes, num_experts, num_layers, draw):
    nodes = st.integers(0, num_nodes - 1)
    layers = []
    for _ in range(num_layers):
        held = [[] for _ in range(num_nodes)]
        for expert in range(num_experts):
            for node in draw.draw(st.sets(nodes, min_size=1)):
                held[node].append(expert)
        held = [draw.draw(st.permutations(of_node + [-1] * draw.draw(st.integers(0, 1)))) for of_node in held]
        counts = [len(of_one) for of_one in homes_of(held, num_experts)]
        shares = [in_turns([draw.draw(st.integers(0, 9)) for _ in range(count)]) for count in counts]
        layers.append((held, shares if draw.draw(st.booleans()) else ()))
    missing = draw.draw(st.sets(nodes))
    tables = PlacementTables.of_layers(layers, num_experts, missing=missing)
    every = [of_one for held, _ in layers for of_one in homes_of(held, num_experts)]
    assert tables.most_replicas == max(map(len, every))
    assert tables.local_ids.shape[-2] == 1 + max(home.node for of_one in every for home in of_one)
    for layer, (held, shares) in enumerate(layers):
        of_layer = tables.of_layer(layer)
        expected = torch.full_like(of_layer.local_ids, -1)
        for expert, of_one in enumerate(homes_of(held, num_experts, missing, shares)):
            for replica, home in enumerate(of_one):
                expected[home.node, expert * tables.most_replicas + replica] = home.local_id
            assert of_layer.wheels[expert].tolist() == wheel_of(in_turns([home.share for home in of_one]))
        assert torch.equal(of_layer.local_ids, expected)


@pytest.mark.parametrize("num_experts", [5, 8, 15, 16, 31])
def test_tables_of_layers_are_what_a_gpus_kernels_were_compiled_for(num_experts):
    """They tell apart what begins at, or is, a multiple of 16."""
    one, other = place_evenly(num_experts, 1).experts, (tuple(range(num_experts))[::-1],)
    tables, alone = (
        PlacementTables.of_layers([(one, ()), (other, ())], num_experts),
        PlacementTables.of(one, num_experts),
    )
    for of_layers, of_one in ((tables, alone), (tables.with_nobody(), alone.with_nobody())):
        widths = [of.local_ids.shape[-1] for of in (of_layers, of_one)]
        assert widths[0] % 4 == 0, "four bytes each"
        assert widths[0] % 16 == 0 if widths[1] % 16 == 0 else widths[0] % 16


def test_without_replicas_there_is_nothing_to_choose():
    tables, topk_ids = PlacementTables.of(place_evenly(7, 3).experts, 7), torch.tensor([[0, 6], [2, 3], [5, 1]])
    assert tables.most_replicas == 1
    assert torch.equal(choose_replicas(topk_ids, tables), topk_ids)


@pytest.mark.parametrize("kernels", [PLAIN, CPU], ids=["plain", "cpu"])
def test_a_bank_that_is_arranged_anew_keeps_its_experts(kernels):
    torch.manual_seed(0)
    gate_up, down = torch.randn(3, 12, 8), torch.randn(3, 8, 6)
    bank = kernels.expert_bank(num_layers=2, num_experts=2, hidden_size=8, inner_size=6, dtype=torch.float32)
    for layer in range(2):
        for expert in range(2):
            bank.put(layer, expert, gate_up[expert], down[expert])
    grown = bank.arranged([[1, None, 0]] * 2)
    for layer in range(2):
        grown.put(layer, 1, gate_up[2], down[2])
    order = torch.tensor([1, 2, 0])
    slots = PackedRows(
        torch.randn(1, 1, 5, 8), torch.rand(1, 1, 5, 2), torch.randint(0, 3, (1, 1, 5, 2)).to(torch.int32)
    )
    answers = {0: torch.zeros(1, 5, 8)}
    grown.run(1, 0, [(0, 5)], slots, answers)
    expected = dense_moe(
        slots.hidden[0, 0], slots.topk_ids[0, 0], slots.topk_weights[0, 0], gate_up[order], down[order]
    )
    torch.testing.assert_close(answers[0][0], expected, atol=1e-4, rtol=1e-4)
    assert not bank.num_rows.any()
