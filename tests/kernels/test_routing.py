"""The router's choice, counting and packing of a GPU."""

from __future__ import annotations

import pytest
import torch

from msi.kernels import SigmoidRouting, fp8
from msi.kernels.kernels import Outboxes
from msi.kernels.norm import Norm, rms_norm
from msi.kernels.plain import PlainKernels
from msi.kernels.routing import (
    PackedRows,
    answer_row_bytes,
    hidden_bytes,
    hidden_rows,
    row_bytes,
    topk_sigmoid,
    topk_softmax,
)
from msi.kernels.triton.kernels import TritonKernels
from tests.everyday import mostly_slow, thorough
from tests.kernels.device import DEVICE, TOLERANCES

DTYPES = (torch.float32, torch.bfloat16)
NAN = float("nan")
PLAIN, TRITON = PlainKernels(DEVICE), TritonKernels(DEVICE)


@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "k"),
    mostly_slow([(37, 8, 2), (5, 60, 4), (1, 128, 8), (0, 7, 3), (20, 3, 3), (9, 5, 1), (4, 256, 6)], keep=4),
)
def test_a_softmax_router_chooses_as_the_plain_one(num_tokens, num_experts, k, renormalise):
    torch.manual_seed(0)
    logits = torch.randn(num_tokens, num_experts, device=DEVICE)
    weights, ids = TRITON.topk_softmax(logits, k, renormalise)
    expected, expected_ids = topk_softmax(logits, k, renormalise)
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(weights, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_among_equal_logits_the_lowest_id_is_chosen(dtype):
    torch.manual_seed(0)
    logits = (torch.randn(50, 12) * 2).round().div(2).to(dtype).to(DEVICE)
    weights, ids = TRITON.topk_softmax(logits, 5, False)
    probabilities = torch.softmax(logits.float(), dim=-1)
    _, order = logits.float().sort(dim=-1, descending=True, stable=True)
    assert torch.equal(ids, order[:, :5])
    torch.testing.assert_close(weights, probabilities.gather(1, ids))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy says so, a GPU does not
def test_what_is_not_finite_shows_in_its_rows_weights_and_nowhere_else():
    logits = torch.randn(6, 7)
    logits[1, 3] = NAN
    logits[2] = NAN
    logits[3, 5] = torch.inf
    logits[4, :6] = -torch.inf
    for renormalise in (False, True):
        weights, ids = (one.cpu() for one in TRITON.topk_softmax(logits.to(DEVICE), 3, renormalise))
        assert weights.isfinite().all(dim=-1).tolist() == [True, False, False, False, True, True]
        assert all(len(set(row)) == 3 and set(row) <= set(range(7)) for row in ids.tolist())


@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize("routing", [SigmoidRouting(), SigmoidRouting(4, 2, 2.5), SigmoidRouting(3, 3, 0.5)], ids=str)
def test_a_sigmoid_router_chooses_as_the_plain_one(routing, renormalise):
    torch.manual_seed(0)
    logits, bias = torch.randn(19, 12, device=DEVICE), torch.randn(12, device=DEVICE)
    weights, ids = TRITON.topk_sigmoid(logits, bias, 4, renormalise, routing)
    expected, expected_ids = topk_sigmoid(logits, bias, 4, renormalise, routing)
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(weights, expected)


def packed_answers(num_nodes, num_rows, hidden, num_counted):
    """Answers in eight bits, as they land, and what they stand for; whatever lies between them is poison."""
    rows = torch.randn(num_nodes, num_rows, hidden)
    rows[:, :, hidden // 2 :] *= 100.0
    landed = torch.full((num_nodes, num_rows, answer_row_bytes(hidden, fp8.E4M3)), 0xEE, dtype=torch.uint8)
    answers = hidden_rows(landed, hidden, fp8.E4M3)
    for node, count in enumerate(num_counted):
        answers[node, :count] = fp8.pack(rows[node, :count])
    return answers.to(DEVICE)


def outboxes_of(num_nodes, num_rows, hidden, k, dtype):
    """Of poison, with the memory they lie in."""
    memory = torch.full((num_nodes, num_rows, row_bytes(hidden, k, dtype)), 0xEE, dtype=torch.uint8, device=DEVICE)
    rows = [PackedRows.view(of_node, hidden, k, dtype) for of_node in memory]
    counts = torch.full((num_nodes,), -9, dtype=torch.int32)
    return memory, Outboxes(rows, counts if DEVICE.type == "cpu" else counts.pin_memory())


@pytest.mark.parametrize(
    ("num_tokens", "num_nodes", "num_experts", "k", "hidden", "dtype"),
    [
        *((*one, dtype) for one in ((37, 3, 8, 2, 48), (1, 1, 4, 1, 16), (0, 2, 4, 2, 16)) for dtype in DTYPES),
        *mostly_slow([(70, 9, 20, 4, 2064, torch.bfloat16), (300, 2, 4, 3, 16, torch.float32)], keep=0),
        *(thorough(70, 9, 20, 4, 2064, torch.float32), thorough(300, 2, 4, 3, 16, torch.bfloat16)),
    ],
    ids=str,
)
def test_rows_leave_and_come_back_as_the_plain_ones(num_tokens, num_nodes, num_experts, k, hidden, dtype):
    torch.manual_seed(4)
    local_ids = torch.full((num_nodes, num_experts), -1, dtype=torch.int32)
    for expert in range(num_experts - (num_nodes > 2)):  # an expert may be nowhere
        local_ids[expert % num_nodes, expert] = expert // num_nodes
    local_ids = local_ids.to(DEVICE)
    normed = torch.randn(num_tokens, hidden, device=DEVICE).to(dtype)
    weights, ids = topk_softmax(torch.randn(num_tokens, num_experts, device=DEVICE), k, True)
    residual = torch.randn(num_tokens, hidden, device=DEVICE).to(dtype)
    norm = Norm(rms_norm, torch.randn(hidden, device=DEVICE).to(dtype), 1e-5)
    answers = torch.randn(num_nodes, num_tokens + 2, hidden + 8, device=DEVICE).to(dtype)[..., :hidden]
    results = []
    for kernels in (PLAIN, TRITON):
        memory, boxes = outboxes_of(num_nodes, num_tokens + 2, hidden, k, dtype)
        sent = kernels.pack(normed, weights, ids, local_ids, boxes)
        if DEVICE.type != "cpu":
            torch.cuda.synchronize()
        ours = residual.clone()
        counts, poisoned = boxes.counts.tolist(), answers.clone()
        for node, count in enumerate(counts):
            poisoned[node, count:] = NAN
            if kernels is TRITON:
                assert (memory[node, count:] == 0xEE).all(), "rows beyond the last are nobody's"
        rows = [
            (out.hidden[:count], out.topk_weights[:count], out.topk_ids[:count])
            for out, count in zip(boxes.rows, counts, strict=True)
        ]
        results.append((counts, sent.long(), rows, kernels.combine_norm(ours, poisoned, sent, norm), ours))
    plain, fast = results
    assert plain[0] == fast[0]
    assert torch.equal(plain[1], fast[1])
    for one, two in zip(plain[2], fast[2], strict=True):
        assert all(map(torch.equal, one, two))
    for one, two in zip(plain[3:], fast[3:], strict=True):
        torch.testing.assert_close(two, one, rtol=3 * TOLERANCES[dtype], atol=3 * TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("num_tokens", "num_nodes", "num_experts", "k", "hidden"),
    [(9, 3, 8, 2, 48), (3, 2, 4, 1, 200), *mostly_slow([(12, 9, 20, 4, 2064), (5, 1, 4, 3, 18)], keep=0)],
)
def test_rows_in_eight_bits_leave_and_come_back_bit_for_bit_as_the_plain_ones(
    num_tokens, num_nodes, num_experts, k, hidden, dtype
):
    torch.manual_seed(5)
    local_ids = torch.full((num_nodes, num_experts), -1, dtype=torch.int32)
    for expert in range(num_experts):
        local_ids[expert % num_nodes, expert] = expert // num_nodes
    local_ids = local_ids.to(DEVICE)
    normed = torch.randn(num_tokens, hidden).to(dtype)
    normed[0], normed[1, 3] = 0.0, NAN
    normed = normed.to(DEVICE)
    weights, ids = topk_softmax(torch.randn(num_tokens, num_experts, device=DEVICE), k, True)
    residual = torch.randn(num_tokens, hidden, device=DEVICE).to(dtype)
    norm = Norm(rms_norm, torch.randn(hidden, device=DEVICE).to(dtype), 1e-5)
    written = hidden_bytes(hidden, fp8.E4M3) + 8 * k
    results = []
    for kernels in (PLAIN, TRITON):
        memory, boxes = outboxes_of(num_nodes, num_tokens + 2, hidden, k, fp8.E4M3)
        sent = kernels.pack(normed, weights, ids, local_ids, boxes)
        counts, ours = boxes.counts.tolist(), residual.clone()
        if kernels is TRITON:
            assert (memory[..., written:] == 0xEE).all()
            assert all((memory[node, count:] == 0xEE).all() for node, count in enumerate(counts))
        torch.manual_seed(6)
        answers = packed_answers(num_nodes, num_tokens + 2, hidden, counts)
        rows = [memory[node, :count, :written].cpu() for node, count in enumerate(counts)]
        results.append((counts, sent.long(), rows, kernels.combine_norm(ours, answers, sent, norm), ours))
    plain, fast = results
    assert plain[0] == fast[0]
    assert torch.equal(plain[1], fast[1])
    meant = torch.ones(written, dtype=torch.bool)
    meant[hidden : -(-hidden // 4) * 4] = False  # scales begin at a multiple of four
    for one, two in zip(plain[2], fast[2], strict=True):
        assert (one != two)[:, meant].sum() <= (0 if DEVICE.type == "cpu" else one.numel() // 50)
    for one, two in zip(plain[3:], fast[3:], strict=True):
        assert (two.float() - one.float()).norm() <= TOLERANCES[dtype] * one.float().norm()
    exact = fp8.unpack(fast[2][-1], hidden, torch.float64)
    row = int((fast[1][-1] == 0).nonzero()[0])
    error = (exact[0] - normed[row].double().cpu()).abs()
    assert (error <= normed[row].double().cpu().abs() / 16 + 1e-3).all() or row == 1
