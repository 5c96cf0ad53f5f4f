"""A wave through Triton's kernels, over memory whose other bytes are poison, against float64 and the plain bank."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import partial

import pytest
import torch

from msi.kernels import SCALE_BLOCK, Activation, fp8
from msi.kernels.blocks import from_blocks, to_blocks
from msi.kernels.plain import PlainExpertBank
from msi.kernels.quantized import in_float8, joined, quantize
from msi.kernels.routing import PackedRows, RowDtypes, answer_row_bytes, hidden_bytes, hidden_rows, row_bytes

pytest.importorskip("triton", reason="Triton is not installed here")

from msi.kernels.triton import expert_bank, host_rows
from msi.kernels.triton.expert_bank import TritonExpertBank, new_expert_bank
from msi.kernels.triton.launches import ExpertWeights
from msi.kernels.triton.tiles import Product, Tiles, choose, expected_rows
from tests.everyday import mostly_slow, thorough

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
POISON = 0xFF  # NaN in every format, -1 as an id
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


class Place:
    """Rows that land, and where their answers leave; all poison but what is put there."""

    def __init__(self, seats, lanes, slot_rows, k, hidden, dtype, sent=None, answered=None):
        self.shape, self.k, self.hidden, self.dtype = (seats, lanes, slot_rows), k, hidden, dtype
        sent, self.answered = sent or dtype, answered or dtype
        memory = torch.full((*self.shape, row_bytes(hidden, k, sent)), POISON, dtype=torch.uint8, device=DEVICE)
        self.landed = PackedRows.view(memory, hidden, k, sent, dtype)
        each = (lanes, slot_rows, answer_row_bytes(hidden, self.answered))
        self.memory = [torch.full(each, POISON, dtype=torch.uint8, device=DEVICE) for _ in range(seats)]
        self.answers = {seat: hidden_rows(one, hidden, self.answered) for seat, one in enumerate(self.memory)}

    def put(self, seat, lane, num_rows, num_experts, generator, share_here=0.7):
        ids = torch.stack([torch.randperm(num_experts, generator=generator)[: self.k] for _ in range(num_rows)])
        ids[torch.rand(num_rows, self.k, generator=generator) > share_here] = -1
        rows = (self.landed.hidden, self.landed.topk_ids, self.landed.topk_weights)
        hidden = torch.randn(num_rows, self.hidden, generator=generator)
        hidden = hidden if self.landed.unpacked is None else fp8.pack(hidden)
        for into, what in zip(rows, (hidden, ids, torch.rand(num_rows, self.k, generator=generator)), strict=True):
            into[seat, lane, :num_rows] = what.to(into.device, into.dtype)

    def untouched(self, written):
        """Whether all bytes are poison but those of these rows: (seat, lane, number of rows)."""
        for seat, memory in enumerate(self.memory):
            left = memory.clone()
            for its, lane, num_rows in written:
                if its == seat:
                    left[lane, :num_rows, : hidden_bytes(self.hidden, self.answered)] = POISON
            if not bool((left == POISON).all()):
                return False
        return True


def weights_of(layers, experts, hidden, inner, dtype, generator):
    w13 = torch.randn(layers, experts, 2 * inner, hidden, generator=generator) * hidden**-0.5
    w2 = torch.randn(layers, experts, hidden, inner, generator=generator) * inner**-0.5
    return w13.to(DEVICE, dtype), w2.to(DEVICE, dtype)


def expected(place, seat, lane, num_rows, w13, w2):
    """float64 [num_rows, h] with the layer's matrices [experts, ...]."""
    rows = place.landed.gather(lane, [(seat, num_rows)])
    hidden, ids, weights = (field.double() for field in (rows.hidden, rows.topk_ids, rows.topk_weights))
    result = torch.zeros_like(hidden)
    for expert in range(len(w13)):
        gate, up = (hidden @ w13[expert].double().T).chunk(2, -1)
        output = (torch.nn.functional.silu(gate) * up) @ w2[expert].double().T
        result += output * torch.where(ids == expert, weights, 0.0).sum(-1)[:, None]
    return result


def error(got, wanted):
    """Relative, of a whole block of rows."""
    return float((got.double() - wanted).norm() / wanted.norm().clamp(min=1e-9)) if wanted.numel() else 0.0


def plain_product(**changes):
    return Product(**({"block_n": 32, "block_k": 32, "num_warps": 4, "num_stages": 2} | changes))


def tiles_of(block_m=16, gate_up=None, down=None):
    return (Tiles(1 << 30, block_m, plain_product(**(gate_up or {})), plain_product(**(down or {}))),)


SHAPES = {  # seats, lanes, slot_rows, k, experts, hidden, inner
    "one of each": (1, 1, 1, 1, 1, 32, 32),
    "several seats": (3, 2, 8, 2, 4, 48, 40),
    "full slots of more rows than a chunk": (2, 2, 70, 2, 3, 32, 32),
    "many experts": (5, 3, 9, 4, 20, 64, 48),
    "k is no power of two": (4, 2, 7, 3, 5, 64, 48),
}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        *((shape, dtype) for shape in list(SHAPES)[:2] for dtype in DTYPES),
        *mostly_slow(((shape, torch.float32) for shape in list(SHAPES)[2:]), keep=0),
        *(thorough(shape, dtype) for shape in list(SHAPES)[2:] for dtype in DTYPES[1:]),
    ],
    ids=str,
)
def test_waves_are_right_and_write_nothing_but_their_rows(shape, dtype):
    """Many waves with the same launches, of all layers and lanes: empty, one row, ragged, full."""
    seats, lanes, slot_rows, k, experts, hidden, inner = SHAPES[shape]
    generator, rnd = torch.Generator().manual_seed(1), random.Random(1)
    w13, w2 = weights_of(2, experts, hidden, inner, dtype, generator)
    bank = TritonExpertBank(ExpertWeights(w13, w2), tiles=tiles_of(down={"splits": 3}))
    plain = PlainExpertBank(w13, w2)
    place = Place(seats, lanes, slot_rows, k, hidden, dtype)
    for number in range(4):
        lane, layer = rnd.randrange(lanes), rnd.randrange(2)
        counts = [rnd.choice([0, 1, slot_rows, rnd.randint(0, slot_rows)]) for _ in range(seats)]
        members = [(seat, count) for seat, count in enumerate(counts) if count or number % 2]
        rnd.shuffle(members)
        for memory in place.memory:
            memory.fill_(POISON)
        for seat, count in members:
            if count:
                place.put(seat, lane, count, experts, generator)
        bank.run(layer, lane, members, place.landed, place.answers)
        for seat, count in members:
            wanted = expected(place, seat, lane, count, w13[layer], w2[layer])
            assert error(place.answers[seat][lane, :count], wanted) < TOLERANCE[dtype]
        assert place.untouched([(seat, lane, count) for seat, count in members])
        if members:
            plain.run(layer, lane, members, place.landed, {s: a.clone() for s, a in place.answers.items()})
            assert torch.equal(bank.num_rows.cpu(), plain.num_rows.cpu())


@pytest.mark.parametrize("answered", [None, fp8.E4M3], ids=["answers as computed", "answers in eight bits"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("hidden", mostly_slow([200, 48], keep=1))
def test_waves_of_rows_in_eight_bits_are_right_and_write_nothing_but_their_rows(hidden, dtype, answered):
    seats, lanes, slot_rows, k, experts, inner = 3, 2, 8, 2, 4, 40
    generator = torch.Generator().manual_seed(2)
    w13, w2 = weights_of(2, experts, hidden, inner, dtype, generator)
    bank = TritonExpertBank(ExpertWeights(w13, w2), tiles=tiles_of(down={"splits": 3}))
    plain = PlainExpertBank(w13, w2)
    place = Place(seats, lanes, slot_rows, k, hidden, dtype, fp8.E4M3, answered)
    counts = [(0, 5), (1, 0), (2, 8)]
    for seat, count in counts:
        if count:
            place.put(seat, 1, count, experts, generator)
    theirs = {seat: answers.clone() for seat, answers in place.answers.items()}
    bank.run(1, 1, counts, place.landed, place.answers)
    assert place.untouched([(seat, 1, count) for seat, count in counts])
    plain.run(1, 1, counts, place.landed, theirs)
    for seat, count in counts:
        wanted = expected(place, seat, 1, count, w13[1], w2[1])
        for answers in (place.answers, theirs):
            found = fp8.as_computed(answers[seat][1, :count], hidden, torch.float32)
            assert error(found, wanted) < (TOLERANCE[dtype] if answered is None else 0.04)


def test_rows_without_an_expert_here_get_zeros():
    generator = torch.Generator().manual_seed(0)
    w13, w2 = weights_of(1, 3, 32, 32, torch.float32, generator)
    bank = TritonExpertBank(ExpertWeights(w13, w2), tiles=tiles_of())
    place = Place(2, 1, 5, 2, 32, torch.float32)
    place.put(1, 0, 5, 3, generator, share_here=0.0)
    bank.run(0, 0, [(1, 5)], place.landed, place.answers)
    assert not place.answers[1][0].any()
    assert not bank.num_rows.any()
    assert bank.weight_bytes_read == 0


def test_a_bank_that_was_warmed_counts_nothing_and_knows_how_many_rows_to_expect():
    generator = torch.Generator().manual_seed(0)
    w13, w2 = weights_of(1, 3, 32, 32, torch.float32, generator)
    tiles = tiles_of()[0]
    bank = TritonExpertBank(ExpertWeights(w13, w2), tiles=(replace(tiles, rows=2), replace(tiles, block_m=32)))
    bank.warm(12, 2, RowDtypes.of(torch.float32))
    assert not bank.num_rows.any()
    place = Place(2, 1, 16, 2, 32, torch.float32)
    for rows in (3, 16):  # of which an expert of ours can expect 1.1 and 6.1: either of the two
        place.put(1, 0, rows, 3, generator)
        bank.run(0, 0, [(1, rows)], place.landed, place.answers)
        wanted = expected(place, 1, 0, rows, w13[0], w2[0])
        assert error(place.answers[1][0, :rows], wanted) < TOLERANCE[torch.float32]
        assert choose(bank.tiles, expected_rows(rows, 2, 3, 12)).block_m == (16 if rows == 3 else 32)


def test_longer_waves_go_in_parts(monkeypatch):
    monkeypatch.setattr(expert_bank, "MAX_ROWS", 6)
    generator = torch.Generator().manual_seed(2)
    w13, w2 = weights_of(1, 4, 32, 32, torch.float32, generator)
    bank = TritonExpertBank(ExpertWeights(w13, w2), tiles=tiles_of())
    place = Place(3, 2, 7, 2, 32, torch.float32)
    members = [(2, 7), (0, 3), (1, 6)]
    for seat, count in members:
        place.put(seat, 1, count, 4, generator)
    bank.run(0, 1, members, place.landed, place.answers)
    for seat, count in members:
        wanted = expected(place, seat, 1, count, w13[0], w2[0])
        assert error(place.answers[seat][1, :count], wanted) < TOLERANCE[torch.float32]
    assert place.untouched([(seat, 1, count) for seat, count in members])


@pytest.mark.parametrize("how", ["is_far", "can_reach"])
def test_rows_in_host_memory_are_copied_and_never_read_twice(monkeypatch, how):
    """Memory on the other side of a bus, and memory that a kernel cannot reach."""
    monkeypatch.setattr(host_rows, how, lambda device, memory: how == "is_far")
    generator = torch.Generator().manual_seed(2)
    w13, w2 = weights_of(1, 4, 48, 32, torch.float32, generator)
    bank = TritonExpertBank(ExpertWeights(w13, w2), tiles=tiles_of())
    place = Place(3, 2, 7, 2, 48, torch.float32)
    for members in ([(2, 7), (1, 6)], [(0, 3), (2, 1)]):
        for seat, count in members:
            place.put(seat, 1, count, 4, generator)
        bank.run(0, 1, members, place.landed, place.answers)
        for seat, count in members:
            wanted = expected(place, seat, 1, count, w13[0], w2[0])
            assert error(place.answers[seat][1, :count], wanted) < TOLERANCE[torch.float32]
    assert place.untouched([(0, 1, 3), (1, 1, 6), (2, 1, 7)])


@pytest.mark.parametrize("weights_in_blocks", [False, True], ids=["float16", "scaled float8"])
def test_biases_limits_and_scales_are_those_of_the_definition(weights_in_blocks):
    generator = torch.Generator().manual_seed(4)
    hidden, inner, experts = 160, 144, 3
    w13, w2 = weights_of(2, experts, hidden, inner, torch.float32, generator)
    biases = (
        torch.randn(2, experts, 2 * inner, generator=generator),
        torch.randn(2, experts, hidden, generator=generator),
    )
    bias13, bias2 = (one.to(DEVICE, torch.float16) for one in biases)
    activation = Activation(alpha=1.702, limit=1.5, up_offset=1.0)
    if weights_in_blocks:
        halves = w13.view(2, experts, 2, inner, hidden)
        (w13, scale13, seen13), (w2, scale2, seen2) = (in_blocks(one) for one in (halves, w2))
        w13, scale13, seen13 = (one.reshape(2, experts, -1, one.shape[-1]) for one in (w13, scale13, seen13))
        weights = ExpertWeights(w13, w2, bias13, bias2, scale13, scale2, SCALE_BLOCK, activation)
    else:
        seen13, seen2 = w13.half(), w2.half()
        weights = ExpertWeights(seen13, seen2, bias13, bias2, activation=activation)
    bank = TritonExpertBank(weights, tiles=tiles_of(down={"splits": 2, "block_n": 64}))
    place = Place(1, 1, 9, 2, hidden, torch.float16)
    place.put(0, 0, 9, experts, generator)
    bank.run(1, 0, [(0, 9)], place.landed, place.answers)
    rows, ids, factors = (
        field[0, 0].double() for field in (place.landed.hidden, place.landed.topk_ids, place.landed.topk_weights)
    )
    wanted = torch.zeros_like(rows)
    for expert in range(experts):
        gate, up = (rows @ seen13[1, expert].double().T + bias13[1, expert].double()).chunk(2, -1)
        gate, up = gate.clamp(max=1.5), up.clamp(-1.5, 1.5)
        output = (gate * torch.sigmoid(1.702 * gate) * (up + 1)) @ seen2[1, expert].double().T + bias2[
            1, expert
        ].double()
        wanted += output * torch.where(ids == expert, factors, 0.0).sum(-1)[:, None]
    assert error(place.answers[0][0], wanted) < TOLERANCE[torch.float16]


def in_blocks(matrices):
    """As float8 with a scale for each block of rows and columns, and what they stand for."""
    made = [to_blocks(one) for one in matrices.flatten(0, -3)]
    packed, scales = (torch.stack(ones).unflatten(0, matrices.shape[:-2]) for ones in zip(*made, strict=True))
    seen = torch.stack([from_blocks(*one) for one in made]).unflatten(0, matrices.shape[:-2])
    return packed, scales, seen


def test_what_is_put_into_a_float8_bank_is_kept_in_blocks():
    generator = torch.Generator().manual_seed(5)
    w13, w2 = weights_of(1, 3, 136, 144, torch.float32, generator)
    shape = {"num_layers": 1, "hidden_size": 136, "inner_size": 144, "device": DEVICE}
    bank = new_expert_bank(num_experts=3, dtype=torch.float8_e4m3fn, **shape)
    for expert in range(3):
        bank.put(0, expert, w13[0, expert], w2[0, expert])
    order = [2, 0, 1]
    moved = bank.arranged([order])
    place = Place(1, 1, 5, 2, 136, torch.float16)
    place.put(0, 0, 5, 3, generator)
    moved.run(0, 0, [(0, 5)], place.landed, place.answers)
    wanted = expected(place, 0, 0, 5, w13[0, order], w2[0, order])
    assert error(place.answers[0][0], wanted) < 0.06  # three bits of mantissa
    assert moved.weight_bytes_read == len(set(place.landed.topk_ids.flatten().tolist()) - {-1}) * 3 * 136 * 144


@pytest.mark.parametrize("grain", ["block", "row"])
def test_experts_of_a_checkpoint_in_float8_are_taken_as_they_are(grain):
    generator = torch.Generator().manual_seed(6)
    hidden, inner, num_experts = 136, 144, 3
    w13, w2 = (one.cpu() for one in weights_of(1, num_experts, hidden, inner, torch.float32, generator))
    bank = new_expert_bank(
        num_layers=1, num_experts=num_experts, hidden_size=hidden, inner_size=inner, dtype=torch.float8_e4m3fn,
        device=DEVICE,
    )  # fmt: skip

    def in_rows(matrix):
        scales = matrix.abs().amax(dim=1, keepdim=True) / 448
        return in_float8((matrix / scales).to(torch.float8_e4m3fn), scales)

    make = in_rows if grain == "row" else partial(quantize, format="fp8")
    seen = []
    for expert in range(num_experts):
        gate_up, down = joined([make(half) for half in w13[0, expert].chunk(2)]), make(w2[0, expert])
        assert gate_up.grain == down.grain == grain
        bank.put(0, expert, gate_up, down)
        seen.append([one.dequantized(torch.float32) for one in (gate_up, down)])
    seen13, seen2 = (torch.stack(ones).to(DEVICE) for ones in zip(*seen, strict=True))
    assert bank.weights.scale_block == (1 if grain == "row" else SCALE_BLOCK)
    order = [2, 0, 1]
    moved = bank.arranged([order])
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float16, 2e-3)):
        place = Place(1, 1, 9, 2, hidden, dtype)
        place.put(0, 0, 9, num_experts, generator)
        moved.warm(num_experts, 2, RowDtypes.of(dtype))
        moved.run(0, 0, [(0, 9)], place.landed, place.answers)
        assert error(place.answers[0][0], expected(place, 0, 0, 9, seen13[order], seen2[order])) < tolerance
        assert place.untouched([(0, 0, 9)])


VARIANTS = {
    "weights as the tall operand": {"gate_up": {"is_swapped": True}, "down": {"is_swapped": True, "splits": 2}},
    "weights by descriptors": {"gate_up": {"is_tma": True}, "down": {"is_tma": True}},
    "both": {
        "gate_up": {"is_tma": True, "is_swapped": True},
        "down": {"is_tma": True, "is_swapped": True, "splits": 2},
    },
    "loops that are one": {"gate_up": {"is_flat": True}, "down": {"is_flat": True, "splits": 2}},
    "more rows in a tile": {"block_m": 32},
    "tiles that do not divide": {"gate_up": {"block_n": 64, "block_k": 64}, "down": {"block_n": 64, "splits": 5}},
}


@pytest.mark.parametrize(("hidden", "inner"), mostly_slow([(64, 48), (80, 96)]))
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_way_to_cut_the_products_gives_the_same(variant, hidden, inner):
    generator = torch.Generator().manual_seed(3)
    w13, w2 = weights_of(2, 4, hidden, inner, torch.float16, generator)
    bank = TritonExpertBank(ExpertWeights(w13, w2), tiles=tiles_of(**VARIANTS[variant]))
    place = Place(2, 1, 24, 2, hidden, torch.float16)
    members = [(0, 24), (1, 11)]
    for seat, count in members:
        place.put(seat, 0, count, 4, generator)
    bank.run(1, 0, members, place.landed, place.answers)
    for seat, count in members:
        wanted = expected(place, seat, 0, count, w13[1], w2[1])
        assert error(place.answers[seat][0, :count], wanted) < TOLERANCE[torch.float16]
