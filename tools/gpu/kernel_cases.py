"""Every operation of a `Kernels` object as something that can be run, compared and timed.

A case says how many bytes have to be moved and how much has to be calculated at least.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from msi.attention.pass_inputs import PassInputs
from msi.kernels import BLOCK_TOKENS, NONE, SWIGLU, Activation, SigmoidRouting, fp8
from msi.kernels.kernels import Kernels, Outboxes
from msi.kernels.norm import HeadNorm, Norm, layer_norm, rms_norm
from msi.kernels.paged_attention import AttentionShape
from msi.kernels.pass_tensors import PassTensors
from msi.kernels.penalties import Penalties
from msi.kernels.plain import PlainKernels
from msi.kernels.quantized import held, joined
from msi.kernels.rope import rope_frequencies
from msi.kernels.routing import PackedRows, RowDtypes, answer_row_bytes, hidden_rows, row_bytes
from msi.types import MicroBatch
from tools.gpu.shapes import Shape

LEAST_CHUNK = 40  # queries of a prompt, which are not attended to as those of decoding are
RING = 32  # waves whose descriptors an expert bank of Triton's holds at a time


@dataclass(frozen=True, slots=True)
class Size:
    """Of a layer and what goes through it."""

    hidden: int
    inner: int
    num_experts: int
    top_k: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_tokens: int
    context_len: int
    vocab_size: int

    @staticmethod
    def of(shape: Shape, num_tokens: int, context_len: int) -> Size:
        return Size(
            shape.hidden, shape.inner, shape.num_experts, shape.top_k, shape.num_heads, shape.num_kv_heads,
            shape.head_dim, num_tokens, context_len, shape.vocab_size,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Case:
    """Something that can be run again and again.

    Attributes:
        run: on the device, without a wait.
        result: what it leaves; compared in float64.
        num_bytes, flop: that it has to move and calculate at least.
        num_warm: times that it has to be run before what is captured of it can be replayed; 0 for never, as it waits.
    """

    run: Callable[[], object]
    result: Callable[[], Tensor]
    num_bytes: float
    flop: float = 0.0
    num_warm: int = 3


class Numbers:
    """The same random numbers for every dtype: made in `given`, handed out in `dtype`."""

    def __init__(self, device: torch.device, given: torch.dtype, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self._given = given
        self.generator = torch.Generator(device).manual_seed(0)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        values = torch.randn(shape, generator=self.generator, device=self.device) * scale
        return values.to(self._given).to(self.dtype)

    def distinct(self, *shape: int) -> Tensor:
        """float32, not rounded, so that no two are equal."""
        return torch.randn(shape, generator=self.generator, device=self.device)

    def choices(self, num_rows: int, k: int, most: int) -> Tensor:
        """int64 [num_rows, k], different within a row."""
        return torch.rand(num_rows, most, generator=self.generator, device=self.device).topk(k).indices


Make = Callable[[Kernels, Size, Numbers], Case]
CLAMPED = Activation(alpha=1.702, limit=1.0, up_offset=1.0)  # gpt-oss's, of a limit that many numbers are past


# -- the operations --------------------------------------------------------------------------------------------------


def norm_case(kernels: Kernels, size: Size, numbers: Numbers) -> Case:
    hidden, norm = numbers.normal(size.num_tokens, size.hidden), _norm(size, numbers)
    normed: list[Tensor] = []
    return Case(
        lambda: normed.__setitem__(slice(None), [kernels.norm(hidden, norm)]),
        lambda: normed[0],
        2 * hidden.nbytes,
    )


def add_norm_case(kernels: Kernels, size: Size, numbers: Numbers) -> Case:
    """By a layer norm, which one family has."""
    hidden, added = numbers.normal(size.num_tokens, size.hidden), numbers.normal(size.num_tokens, size.hidden)
    norm, stream = replace(_norm(size, numbers), apply=layer_norm), torch.empty_like(hidden)
    normed = torch.empty_like(hidden)

    def run() -> None:
        normed.copy_(kernels.add_norm(stream.copy_(hidden), added, norm))

    return Case(run, lambda: torch.cat((normed.double(), stream.double())), 8 * hidden.nbytes)


def mlp_case(kernels: Kernels, size: Size, numbers: Numbers, format: str = NONE) -> Case:
    rows = numbers.normal(size.num_tokens, size.hidden)
    weights = (
        numbers.normal(2 * size.inner, size.hidden, scale=size.hidden**-0.5),
        numbers.normal(size.hidden, size.inner, scale=size.inner**-0.5),
    )
    gate_up, down = (kernels.linear(held(one, numbers.dtype, format)) for one in weights)
    found: list[Tensor] = []
    values = 3 * size.hidden * size.inner
    return Case(
        lambda: found.__setitem__(slice(None), [kernels.gated_mlp(rows, gate_up, down)]),
        lambda: found[0],
        values * (rows.itemsize if format == NONE else 1),
        2.0 * values * size.num_tokens,
    )


def rope_case(
    kernels: Kernels, size: Size, numbers: Numbers, has_norm: bool = False, in_eight_bits: bool = False
) -> Case:
    """Of fresh heads each time, as they are rotated in place; into a cache in eight bits, or as they are."""
    host, on_device = _decoding(size, numbers.device)
    num_heads = size.num_heads + 2 * size.num_kv_heads
    heads = numbers.normal(size.num_tokens, num_heads, size.head_dim)
    cache = torch.zeros(_cache_shape(size), dtype=fp8.E4M3 if in_eight_bits else numbers.dtype, device=numbers.device)
    plan = kernels.plan_attention(on_device, host, _heads(size), numbers.dtype)
    frequencies = rope_frequencies(size.head_dim, 1e4).to(numbers.device)
    table = kernels.rope_table(on_device.positions, frequencies, numbers.dtype, 1.0)
    rotated = torch.empty_like(heads)
    norm = HeadNorm(numbers.normal(size.num_heads + size.num_kv_heads, size.head_dim), 1e-5) if has_norm else None

    def run() -> None:
        rotated.copy_(heads)
        kernels.rope_and_write(rotated, size.num_heads, table, cache, plan, norm)

    def result() -> Tensor:
        return torch.cat((rotated[:, : size.num_heads].flatten().double(), cache.flatten().double()))

    kept = size.num_tokens * 2 * size.num_kv_heads * size.head_dim
    return Case(run, result, 2 * heads.nbytes - kept * (heads.itemsize - cache.itemsize))


def attention_case(
    kernels: Kernels, size: Size, numbers: Numbers, has_sinks: bool = False, in_eight_bits: bool = False
) -> Case:
    """With sinks also within a window, of half a context; of a cache in eight bits, or as it is computed in."""
    return _attention(kernels, size, numbers, _decoding(size, numbers.device), has_sinks, in_eight_bits)


def prompts_case(
    kernels: Kernels, size: Size, numbers: Numbers, has_sinks: bool = False, in_eight_bits: bool = False
) -> Case:
    """The same of a whole prompt, and of what follows a cached half of another's context."""
    num_queries = max(LEAST_CHUNK, size.num_tokens // 2)
    lens = num_queries, num_queries + size.context_len // 2
    return _attention(kernels, size, numbers, _pass(numbers.device, (num_queries,) * 2, lens), has_sinks, in_eight_bits)


def _attention(
    kernels: Kernels,
    size: Size,
    numbers: Numbers,
    inputs: tuple[PassTensors, PassTensors],
    has_sinks: bool,
    in_eight_bits: bool,
) -> Case:
    window = size.context_len // 2 if has_sinks else None
    host, on_device = inputs
    query = numbers.normal(len(host.positions), size.num_heads, size.head_dim)
    num_blocks = 1 + int(host.block_tables.max())
    cache = numbers.normal(num_blocks, 2, BLOCK_TOKENS, size.num_kv_heads, size.head_dim)
    cache = fp8.to_e4m3(cache) if in_eight_bits else cache
    plan = kernels.plan_attention(on_device, host, replace(_heads(size), sliding_window=window), numbers.dtype)
    sinks = numbers.distinct(size.num_heads) if has_sinks else None
    found: list[Tensor] = []
    lens = list(zip(host.query_lens.tolist(), host.context_lens.tolist(), strict=True))
    kept = sum(min(length, (window or length) + count - 1) for count, length in lens)
    seen = sum(min(at + 1, window or length) for count, length in lens for at in range(length - count, length))
    return Case(
        lambda: found.__setitem__(slice(None), [kernels.paged_attention(query, cache, plan, sinks)]),
        lambda: found[0],
        kept * 2 * size.num_kv_heads * size.head_dim * cache.itemsize + 2 * query.nbytes,
        4.0 * seen * size.num_heads * size.head_dim,
    )


def pack_case(kernels: Kernels, size: Size, numbers: Numbers, in_eight_bits: bool = False) -> Case:
    """Rows to two nodes and, as if each had answered with what it was sent, back; in eight bits, or as computed."""
    hidden = numbers.normal(size.num_tokens, size.hidden)
    normed, norm = numbers.normal(size.num_tokens, size.hidden), _norm(size, numbers)
    ids = numbers.choices(size.num_tokens, size.top_k, size.num_experts)
    weights = torch.full(ids.shape, 1 / size.top_k, device=numbers.device)
    half = (size.num_experts + 1) // 2
    experts = torch.arange(size.num_experts, dtype=torch.int32, device=numbers.device)
    local = torch.stack((torch.where(experts < half, experts, -1), torch.where(experts < half, -1, experts - half)))
    sent = fp8.E4M3 if in_eight_bits else numbers.dtype
    bytes_each = row_bytes(size.hidden, size.top_k, sent)
    memory = torch.full((2, size.num_tokens, bytes_each), 0xFF, dtype=torch.uint8, device=numbers.device)
    rows = [PackedRows.view(one, size.hidden, size.top_k, sent) for one in memory]
    counts = torch.zeros(2, dtype=torch.int32, pin_memory=numbers.device.type == "cuda")
    found: list[Tensor] = []
    stream = torch.empty_like(hidden)

    def run() -> None:
        stream.copy_(hidden)
        positions = kernels.pack(normed, weights, ids, local, Outboxes(rows, counts))
        answers = torch.stack([one.hidden for one in rows])
        found[:] = [kernels.combine_norm(stream, answers, positions, norm)]

    num_warm = 0 if type(kernels) is PlainKernels else 3  # which copies its counts, and waits
    return Case(run, lambda: torch.cat((found[0].double(), stream.double())), 6 * hidden.nbytes, num_warm=num_warm)


def softmax_routing_case(kernels: Kernels, size: Size, numbers: Numbers) -> Case:
    logits = numbers.distinct(size.num_tokens, size.num_experts)
    found: list[Tensor] = []

    def run() -> None:
        weights, ids = kernels.topk_softmax(logits, size.top_k, True)
        found[:] = [torch.cat((weights.double(), ids.double()))]

    return Case(run, lambda: found[0], logits.nbytes)


def sigmoid_routing_case(kernels: Kernels, size: Size, numbers: Numbers, most_groups: int = 1) -> Case:
    """Of as many groups as there can be of at least two experts each, the better half, or those that k experts need."""
    num = next(num for num in range(most_groups, 0, -1) if not size.num_experts % num and size.num_experts >= 2 * num)
    routing = SigmoidRouting(num, max(-(-num // 2), -(-size.top_k * num // size.num_experts)), 2.5)
    logits, bias = numbers.distinct(size.num_tokens, size.num_experts), numbers.distinct(size.num_experts)
    found: list[Tensor] = []

    def run() -> None:
        weights, ids = kernels.topk_sigmoid(logits, bias, size.top_k, True, routing)
        found[:] = [torch.cat((weights.double(), ids.double()))]

    return Case(run, lambda: found[0], logits.nbytes)


def draw_case(kernels: Kernels, size: Size, numbers: Numbers) -> Case:
    """Tokens by temperature, top-k, top-p and min-p; every error is another token."""
    logits = numbers.distinct(size.num_tokens, size.vocab_size) * 3
    options = torch.tensor([[0.8, 40, 0.9, 0.02, 0.0]], dtype=torch.float64).T
    options = options.repeat(1, size.num_tokens)
    options[4] = torch.linspace(0.001, 0.999, size.num_tokens, dtype=torch.float64)
    found: list[Tensor] = []
    return Case(
        lambda: found.__setitem__(slice(None), [kernels.draw(logits.clone(), options)]),
        lambda: found[0],
        logits.nbytes,
    )


def mask_case(kernels: Kernels, size: Size, numbers: Numbers) -> Case:
    """Every row held to a mask that allows one token in four; what is not is a number, so that it can be compared."""
    logits = numbers.distinct(size.num_tokens, size.vocab_size)
    rows = torch.arange(size.num_tokens, device=numbers.device)
    shape = (2, size.num_tokens, -(-size.vocab_size // 32))
    one, other = torch.randint(-(1 << 31), 1 << 31, shape, generator=numbers.generator, device=numbers.device)
    bits = (one & other).to(torch.int32)
    return Case(
        lambda: kernels.allow(logits, rows, bits), lambda: logits.clamp(min=-100.0), 2 * logits.nbytes + bits.nbytes
    )


def bias_case(kernels: Kernels, size: Size, numbers: Numbers) -> Case:
    """Of one token in four of every row, from its first on."""
    logits, num = numbers.distinct(size.num_tokens, size.vocab_size), -(-size.vocab_size // 4)
    rows = torch.arange(size.num_tokens, device=numbers.device).repeat_interleave(num)
    at = torch.stack((rows, torch.arange(num, device=numbers.device).repeat(size.num_tokens)))
    bias, changed = numbers.distinct(len(rows)), torch.empty_like(logits)

    def run() -> None:
        changed.copy_(logits)
        kernels.add_bias(changed, at, bias)

    return Case(run, lambda: changed, 2 * logits.nbytes + at.nbytes + 3 * bias.nbytes)


def penalties_case(kernels: Kernels, size: Size, numbers: Numbers) -> Case:
    """Every row with all three, for a context of random tokens, half of them its prompt's."""
    logits, num = numbers.distinct(size.num_tokens, size.vocab_size) * 3, size.num_tokens * size.context_len
    which = torch.arange(size.num_tokens, device=numbers.device).repeat(size.context_len)
    tokens = torch.randint(size.vocab_size, (num,), generator=numbers.generator, device=numbers.device)
    counts = torch.ones_like(tokens)
    counts[: num // 2] = 0
    of_row = torch.tensor([[1.2, 0.3, 0.5]], device=numbers.device).repeat(size.num_tokens, 1).T
    rows = torch.arange(size.num_tokens, device=numbers.device)
    penalties = Penalties(rows, of_row, torch.stack((which, tokens, counts)), num // 2)
    changed = torch.empty_like(logits)

    def run() -> None:
        changed.copy_(logits)
        kernels.penalise(changed, penalties)

    return Case(run, lambda: changed, 2 * logits.nbytes + 3 * which.nbytes)


def best_case(kernels: Kernels, size: Size, numbers: Numbers) -> Case:
    """Greedy tokens; every error is another token."""
    logits = numbers.distinct(size.num_tokens, size.vocab_size)
    found: list[Tensor] = []
    return Case(
        lambda: found.__setitem__(slice(None), [kernels.best(logits)[0]]), lambda: found[0].double(), logits.nbytes
    )


def experts_case(
    kernels: Kernels,
    size: Size,
    numbers: Numbers,
    activation: Activation = SWIGLU,
    has_bias: bool = False,
    format: str = NONE,
    rows_in_eight_bits: bool = False,
    answers_in_eight_bits: bool = False,
) -> Case:
    """One wave of four seats, the last without rows."""
    bank = kernels.expert_bank(
        num_layers=1, num_experts=size.num_experts, hidden_size=size.hidden, inner_size=size.inner, dtype=numbers.dtype,
        quantization=format, activation=activation, has_bias=has_bias,
    )  # fmt: skip
    for expert in range(size.num_experts):
        gate_up = numbers.normal(2 * size.inner, size.hidden, scale=size.hidden**-0.5)
        down = numbers.normal(size.hidden, size.inner, scale=size.inner**-0.5)
        biases = (numbers.normal(2 * size.inner), numbers.normal(size.hidden)) if has_bias else None
        halves = [held(half, numbers.dtype, format) for half in gate_up.chunk(2)]
        bank.put(0, expert, joined(halves), held(down, numbers.dtype, format), biases)
    each = -(-size.num_tokens // 3)
    seats = [(seat, min(each, size.num_tokens - seat * each)) for seat in range(3) if size.num_tokens > seat * each]
    sent, answered = (fp8.E4M3 if is_so else numbers.dtype for is_so in (rows_in_eight_bits, answers_in_eight_bits))
    bytes_each = row_bytes(size.hidden, size.top_k, sent)
    memory = torch.full((4, 1, each, bytes_each), 0xFF, dtype=torch.uint8, device=numbers.device)
    landed = PackedRows.view(memory, size.hidden, size.top_k, sent, numbers.dtype)
    for seat, num_rows in seats:
        rows = numbers.normal(num_rows, size.hidden)
        landed.hidden[seat, 0, :num_rows] = fp8.pack(rows) if rows_in_eight_bits else rows
        landed.topk_weights[seat, 0, :num_rows] = 1 / size.top_k
        landed.topk_ids[seat, 0, :num_rows] = numbers.choices(num_rows, size.top_k, size.num_experts).to(torch.int32)
    shape = (4, 1, each, answer_row_bytes(size.hidden, answered))
    outboxes = hidden_rows(torch.zeros(shape, dtype=torch.uint8, device=numbers.device), size.hidden, answered)
    answers = dict(enumerate(outboxes))
    ids = torch.cat([landed.topk_ids[seat, 0, :num_rows].flatten() for seat, num_rows in seats])
    active = len(set(ids.tolist()))
    if getattr(kernels, "library", None) is not None:  # which is taken, if at all, from then on
        bank.warm(size.num_experts, size.top_k, RowDtypes(numbers.dtype, sent, answered))
    bank.prepare(landed, (each * shape[-1], shape[-1]), answered)
    expert_values = 3 * size.hidden * size.inner
    return Case(
        lambda: bank.run(0, 0, seats, landed, answers),
        lambda: fp8.as_computed(
            torch.cat([answers[seat][0, :num_rows] for seat, num_rows in seats]), size.hidden, torch.float64
        ),
        active * expert_values * (numbers.dtype.itemsize if format == NONE else 1),
        2.0 * expert_values * len(ids),
        num_warm=2 * RING,  # then the ring says the same everywhere
    )


CASES: dict[str, Make] = {
    "norm": norm_case,
    "adding and layer norm": add_norm_case,
    "gated MLP": mlp_case,
    "gated MLP in float8": partial(mlp_case, format="fp8"),
    "rope and KV write": rope_case,
    "norms of heads, rope and KV write": partial(rope_case, has_norm=True),
    "paged decode attention": attention_case,
    "paged decode attention with sinks in a window": partial(attention_case, has_sinks=True),
    "rope and KV write in float8": partial(rope_case, in_eight_bits=True),
    "paged decode attention over float8": partial(attention_case, in_eight_bits=True),
    "paged decode attention over float8 with sinks in a window": partial(
        attention_case, has_sinks=True, in_eight_bits=True
    ),
    "paged attention of prompts": prompts_case,
    "paged attention of prompts with sinks in a window": partial(prompts_case, has_sinks=True),
    "paged attention of prompts over float8": partial(prompts_case, in_eight_bits=True),
    "softmax routing": softmax_routing_case,
    "sigmoid routing": sigmoid_routing_case,
    "sigmoid routing in groups": partial(sigmoid_routing_case, most_groups=8),
    "pack, combine and norm": pack_case,
    "pack, combine and norm in float8": partial(pack_case, in_eight_bits=True),
    "experts": experts_case,
    "clamped experts with biases": partial(experts_case, activation=CLAMPED, has_bias=True),
    "experts in float8": partial(experts_case, format="fp8"),
    "experts of rows in float8": partial(experts_case, rows_in_eight_bits=True),
    "experts in float8 of rows in float8, answers too": partial(
        experts_case, format="fp8", rows_in_eight_bits=True, answers_in_eight_bits=True
    ),
    "masks of allowed tokens": mask_case,
    "biases of tokens": bias_case,
    "penalties for tokens seen": penalties_case,
    "greedy tokens": best_case,
    "drawing tokens": draw_case,
}
# What they leave is in eight bits, so a number that lies between two of those may become either.
ROUNDED = frozenset({"rope and KV write in float8", "experts in float8 of rows in float8, answers too"})


def _heads(size: Size) -> AttentionShape:
    return AttentionShape(size.num_heads, size.num_kv_heads, size.head_dim)


def _norm(size: Size, numbers: Numbers) -> Norm:
    return Norm(rms_norm, numbers.normal(size.hidden), 1e-5)


def _cache_shape(size: Size) -> tuple[int, ...]:
    num_blocks = 1 + size.num_tokens * -(-size.context_len // BLOCK_TOKENS)
    return (num_blocks, 2, BLOCK_TOKENS, size.num_kv_heads, size.head_dim)


def _decoding(size: Size, device: torch.device) -> tuple[PassTensors, PassTensors]:
    """A pass of decoding sequences, host's and device's; their contexts lie between half and all of the size's."""
    count = size.num_tokens
    lens = tuple(size.context_len - (37 * sequence) % (size.context_len // 2 + 1) for sequence in range(count))
    return _pass(device, (1,) * count, lens)


def _pass(device: torch.device, query_lens: tuple[int, ...], lens: tuple[int, ...]) -> tuple[PassTensors, PassTensors]:
    """Of sequences whose blocks lie in no order."""
    blocks = -(-max(lens) // BLOCK_TOKENS)
    scattered = (torch.randperm(len(lens) * blocks, generator=torch.Generator().manual_seed(0)) + 1).tolist()
    tables = tuple(tuple(scattered[blocks * at : blocks * at + -(-n // BLOCK_TOKENS)]) for at, n in enumerate(lens))
    positions = tuple(at for num, length in zip(query_lens, lens, strict=True) for at in range(length - num, length))
    batch = MicroBatch((5,) * len(positions), positions, query_lens, lens, tables)
    on_device, host = PassInputs(lambda block: block.to(device)).lay_out(batch)
    return host, on_device
