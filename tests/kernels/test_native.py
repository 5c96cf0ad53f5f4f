"""The products with bfloat16 weights that are widened in registers, against plain torch."""

from __future__ import annotations

import threading
from concurrent.futures import Future

import pytest
import torch
from torch.nn import functional

from msi.device.choice import precision_on
from msi.device.cpu import CpuDevice
from msi.kernels import SWIGLU, Activation
from msi.kernels.cpu import CpuKernels
from msi.kernels.native import compiled as native
from msi.kernels.native.bank import NativeExpertBank
from msi.kernels.plain import PlainExpertBank
from msi.kernels.routing import PackedRows
from msi.precision import Precision

LIBRARY = native.native_library()
pytestmark = pytest.mark.skipif(LIBRARY is None, reason="the native products cannot be compiled here")
WIDENED = Precision("bfloat16", "float32", "float32", "float32", "none", "float32")


def values(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return bool((found - wanted).abs().max() <= 4e-6 * wanted.abs().max())


@pytest.mark.parametrize(("num_outputs", "depth"), [(16, 2), (80, 100), (208, 258)])
def test_products_are_those_of_the_same_weights_in_float32(num_outputs, depth):
    weight, rows = values(num_outputs, depth).to(torch.bfloat16), values(200, depth, seed=1)
    panels = native.pack(LIBRARY, weight)
    wanted = functional.linear(rows.double(), weight.double())
    everything = native.linear(LIBRARY, rows, panels)
    assert close(everything, wanted)
    for num_rows in (1, 2, 3, 4, 5, 6, 7, 8, 96, 97, 199):
        assert torch.equal(native.linear(LIBRARY, rows[:num_rows], panels), everything[:num_rows]), (
            "a row's numbers depend on how many are beside it"
        )


@pytest.mark.parametrize("num_outputs", [32, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_linear_of_bfloat16_weights_takes_rows_of_any_dtype(num_outputs, dtype, monkeypatch):
    weight, bias, rows = values(num_outputs, 24).to(torch.bfloat16), values(num_outputs), values(5, 24).to(dtype)
    wanted = functional.linear(rows.float(), weight.float(), bias).to(dtype)
    for library in (LIBRARY, None):
        monkeypatch.setattr("msi.kernels.cpu.native_library", lambda library=library: library)
        found = CpuKernels(has_bf16_units=False).linear(weight, bias)(rows)
        assert found.dtype is dtype
        assert torch.allclose(found.float(), wanted.float(), rtol=2e-2 if dtype is torch.bfloat16 else 1e-5, atol=1e-5)


HIDDEN, INNER, NUM_EXPERTS, K = 48, 80, 5, 2


CLAMPED = Activation(alpha=1.702, limit=1.5, up_offset=1.0)
KINDS = {"plain": (SWIGLU, False), "biases": (SWIGLU, True), "clamped": (CLAMPED, False), "both": (CLAMPED, True)}


def banks(activation: Activation = SWIGLU, has_bias: bool = False) -> tuple[NativeExpertBank, PlainExpertBank]:
    native_bank = NativeExpertBank(LIBRARY, 1, NUM_EXPERTS, HIDDEN, INNER, "bfloat16", activation, has_bias)
    gate_up, down = torch.empty(1, NUM_EXPERTS, 2 * INNER, HIDDEN), torch.empty(1, NUM_EXPERTS, HIDDEN, INNER)
    of_plain = (torch.empty(gate_up.shape[:3]), torch.empty(down.shape[:3])) if has_bias else None
    plain = PlainExpertBank(gate_up, down, of_plain, activation)
    for expert in range(NUM_EXPERTS):
        biases = (values(2 * INNER, seed=200 + expert), values(HIDDEN, seed=300 + expert)) if has_bias else None
        gate_up, down = values(2 * INNER, HIDDEN, seed=expert), values(HIDDEN, INNER, seed=100 + expert)
        native_bank.put(0, expert, gate_up.to(torch.bfloat16), down.to(torch.bfloat16), biases)
        plain.put(0, expert, gate_up.to(torch.bfloat16).float(), down.to(torch.bfloat16).float(), biases)
    return native_bank, plain


def landed_rows(*num_rows: int) -> PackedRows:
    """Of so many seats with a lane each; some experts are elsewhere."""
    most = max(num_rows)
    shape = (len(num_rows), 1, most)
    generator = torch.Generator().manual_seed(3)
    ids = torch.rand(*shape, NUM_EXPERTS, generator=generator).argsort(dim=-1)[..., :K].to(torch.int32)
    ids[torch.rand(*shape, K, generator=generator) < 0.2] = -1
    return PackedRows(values(*shape, HIDDEN), torch.rand(*shape, K, generator=generator), ids)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_rows", [(1,), (7,), (3, 9), (150, 1)])
def test_a_bank_adds_up_each_rows_experts_as_plain_torch_does(num_rows, kind):
    landed, seats = landed_rows(*num_rows), list(enumerate(num_rows))
    found, wanted = ({seat: torch.zeros(1, num, HIDDEN) for seat, num in seats} for _ in range(2))
    native_bank, plain = banks(*KINDS[kind])
    native_bank.run(0, 0, seats, landed, found)
    plain.run(0, 0, seats, landed, wanted)
    for seat, _ in seats:
        assert close(found[seat], wanted[seat])
    assert torch.equal(native_bank.num_rows, plain.num_rows)
    expert_bytes = 3 * HIDDEN * INNER * 2
    assert native_bank.weight_bytes_read == int(native_bank.num_rows.count_nonzero()) * expert_bytes


@pytest.mark.parametrize("kind", KINDS)
def test_a_bank_that_is_arranged_anew_computes_the_same_and_asks_for_weights_that_it_lacks(kind):
    landed = landed_rows(4)
    landed.topk_ids.fill_(2)
    old, _ = banks(*KINDS[kind])
    new = old.arranged([[2, None]] * len(old.num_rows))
    answers = {0: torch.zeros(1, 4, HIDDEN)}
    old.run(0, 0, [(0, 4)], landed, answers)
    before = answers[0].clone()
    landed.topk_ids.fill_(0)
    new.run(0, 0, [(0, 4)], landed, answers)
    assert torch.equal(answers[0], before)
    for missing in (1, 7):
        landed.topk_ids.fill_(missing)
        with pytest.raises(AssertionError, match="one has no weights here"):
            new.run(0, 0, [(0, 4)], landed, answers)


def test_what_is_not_finite_stays_so_past_the_limit():
    landed = landed_rows(4)
    landed.hidden[0, 0, 1, 3] = float("nan")
    landed.topk_ids.fill_(2)
    native_bank, _ = banks(CLAMPED, True)
    answers = {0: torch.zeros(1, 4, HIDDEN)}
    native_bank.run(0, 0, [(0, 4)], landed, answers)
    assert answers[0][0].isnan().any(dim=-1).tolist() == [False, True, False, False]


async def test_bfloat16_weights_stay_what_they_are_where_a_cpu_widens_them_and_nothing_else_was_asked(monkeypatch):
    monkeypatch.setattr("msi.device.cpu.has_bf16_units", lambda: False)
    device = CpuDevice(num_threads=1)
    assert precision_on(device, Precision(), torch.bfloat16) == WIDENED
    assert precision_on(device, Precision(), torch.float32) == Precision.of("float32")
    assert precision_on(device, Precision(compute="float32"), torch.bfloat16) == Precision.of("float32")
    WIDENED.check_is_built()
    await device.close()


def test_without_a_compiler_torch_computes(monkeypatch, caplog, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native, "COMPILER", "no-compiler")
    with caplog.at_level("INFO", logger=native.__name__):
        assert native.native_library.__wrapped__() is None
    assert "the CPU computes with torch's products alone: there is no no-compiler" in caplog.text


def test_a_compiler_that_takes_too_long_is_said_with_its_cost_and_serves_the_next_start(monkeypatch, caplog, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native, "COMPILES_WITHIN_S", 0.01)
    goes_on, said_late = threading.Event(), threading.Event()

    def compile_slowly(made):
        assert goes_on.wait(20)
        made.write_text("made")

    def say_late(making, say=native._say_late):
        say(making)
        said_late.set()

    monkeypatch.setattr(native, "_compile", compile_slowly)
    monkeypatch.setattr(native, "_say_late", say_late)
    assert native.native_library.__wrapped__() is None
    (first,) = caplog.messages
    assert "takes longer than 0.01 s" in first
    assert "a token takes up to about twice the time, and bfloat16 weights twice the memory" in first
    assert "start again" in first
    goes_on.set()
    assert said_late.wait(20)
    assert caplog.messages[1:] == ["the compiler is through: from the next start on the CPU computes with what it made"]
    assert native._compiled().read_text() == "made"


def test_a_compiler_that_fails_after_nobody_waits_any_more_is_said(caplog):
    making = Future()
    making.set_exception(native.Unusable("g++ said 'killed'"))
    native._say_late(making)
    assert caplog.messages == ["the compiler failed, so the next start waits for it again: g++ said 'killed'"]


def test_a_folder_that_others_can_write_to_is_no_place_for_code(monkeypatch, caplog, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "msi").mkdir()
    (tmp_path / "msi").chmod(0o777)
    with caplog.at_level("INFO", logger=native.__name__):
        assert native.native_library.__wrapped__() is None
    assert "can be written by others" in caplog.text
