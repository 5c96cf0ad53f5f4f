#!/usr/bin/env python
"""Measures how the experts' matrix products are best cut on this GPU; writes JSON for msi/kernels/triton/tuned/.

    tools/tune_kernels.py --out msi/kernels/triton/tuned --budget 60
    tools/tune_kernels.py --dry                     # goes through it in Triton's interpreter, and measures nothing

What does not agree with the first candidate, or does not fit the device, is left out. Shapes are of one layer: all
experts of a model, or as many as a node of it has.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from msi.kernels import SCALE_BLOCK  # noqa: E402
from msi.kernels.blocks import num_blocks  # noqa: E402
from msi.kernels.routing import PackedRows, row_bytes  # noqa: E402
from msi.kernels.triton.expert_bank import MAX_ROWS, TritonExpertBank  # noqa: E402
from msi.kernels.triton.launches import ExpertWeights, WaveLaunches  # noqa: E402
from msi.kernels.triton.tiles import Tiles, choose, default_tiles, file_name, to_json  # noqa: E402
from tools.gpu.expert_candidates import BLOCK_M, DOWN, GATE_UP  # noqa: E402

NUM_SEATS = 8
REPEATS = 8
MOST_ROWS = 1 << 30
FLOAT8_FACTOR = 256.0  # brings the weights here into its range


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a layer's experts on one node. `k` is of a row's choices here."""

    name: str
    hidden: int
    inner: int
    num_experts: int
    k: int


SHAPES = (
    Shape("Mixtral-8x7B", 4096, 14336, 8, 2),
    Shape("Qwen3-30B-A3B", 2048, 768, 128, 8),
    Shape("Mixtral-8x22B, one expert of a node", 6144, 16384, 1, 1),
)
DRY = Shape("small", 64, 48, 4, 2)


def tune(shapes: tuple[Shape, ...], budget_s: float, tell: Callable[[str], None]) -> dict[str, Any]:
    """What is written: of every shape that there was time for, its best tiles and how long they took."""
    ends_at = time.monotonic() + budget_s
    is_dry = not has_gpu()
    if not is_dry:
        _compile_ahead(shapes, tell)
    name = "interpreter" if is_dry else torch.cuda.get_device_name()
    found: dict[str, Any] = {
        "device": name, "date": datetime.now(UTC).strftime("%Y-%m-%d"), "torch": torch.__version__, "shapes": [],
    }  # fmt: skip
    rates = None if is_dry else _rates()
    for shape in shapes:
        entry: dict[str, Any] = {
            "name": shape.name,
            "hidden": shape.hidden,
            "inner": shape.inner,
            "dtype": "bfloat16",
            "tiles": [],
        }
        bench = Bench(shape, torch.device("cpu" if is_dry else "cuda"))
        for rows in GATE_UP:
            if time.monotonic() < ends_at:
                entry["tiles"].append(bench.best(rows, rates, ends_at, tell))
        if len(entry["tiles"]) == len(GATE_UP):
            found["shapes"].append(entry)
        if shape is shapes[0] and time.monotonic() < ends_at:
            try:
                entry["float8"] = bench.float8(rates, tell)
            except Exception as error:  # a GPU before sm_89 has none
                tell(f"{shape.name}, float8: {type(error).__name__}: {str(error)[:120]}")
        del bench
    return found


def has_gpu() -> bool:
    """Asked without the driver, which no process may have touched that others are forked from."""
    return Path("/dev/nvidiactl").exists() and os.environ.get("TRITON_INTERPRET") != "1"


class Bench:
    """Random weights of a shape, and waves that give every expert as many rows as the next."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        self.shape, self.device = shape, device
        self.dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        torch.manual_seed(0)
        sizes = (1, shape.num_experts, 2 * shape.inner, shape.hidden), (1, shape.num_experts, shape.hidden, shape.inner)
        w13, w2 = (torch.empty(size, dtype=self.dtype, device=device).normal_(std=0.02) for size in sizes)
        self.weights = ExpertWeights(w13, w2)
        self.is_dry = device.type == "cpu"

    def best(
        self, rows: int, rates: tuple[float, float] | None, ends_at: float, tell: Callable[[str], None]
    ) -> dict[str, Any]:
        """The tiles for experts of up to so many rows, and microseconds of either product and of a wave with them.

        Args:
            rates: bytes/s and operations/s that the device can do.
        """
        each = 2 if self.is_dry else min(rows, MAX_ROWS * self.shape.k // self.shape.num_experts)
        gate_ups, downs = (one[rows][:: 4 if self.is_dry else 1] for one in (GATE_UP, DOWN))
        candidates = [Tiles(rows, BLOCK_M[rows], one, DOWN[rows][0]) for one in gate_ups]
        gate_up, gate_up_s = self._fastest(candidates, each, False, ends_at, tell)
        candidates = [Tiles(rows, BLOCK_M[rows], gate_up.gate_up, one) for one in downs]
        tiles, down_s = self._fastest(candidates, each, True, ends_at, tell)
        wave_s = None if self.is_dry else self._wave_s(tiles, each)[0]
        last = list(GATE_UP)[-1]
        entry = to_json(replace(tiles, rows=MOST_ROWS if rows == last else rows)) | {
            "num_rows": each, "gate_up_us": round(gate_up_s * 1e6, 1), "down_and_answer_us": round(down_s * 1e6, 1),
        }  # fmt: skip
        if wave_s is None or rates is None:
            return entry
        values = 3 * self.shape.hidden * self.shape.inner * self.shape.num_experts
        moved_s, calculated_s = 2 * values / rates[0], 2 * values * each / rates[1]
        floor_s = max(moved_s, calculated_s)
        tell(f"{self.shape.name}, {each} rows: a wave {wave_s * 1e6:.1f} us, {floor_s / wave_s:.0%} of what can be")
        return entry | {
            "wave_us": round(wave_s * 1e6, 1), "floor_us": round(floor_s * 1e6, 1),
            "asked": 0.85 if moved_s > calculated_s else 0.65,
        }  # fmt: skip

    def _fastest(
        self, candidates: list[Tiles], rows: int, is_down: bool, ends_at: float, tell: Callable[[str], None]
    ) -> tuple[Tiles, float]:
        truth: torch.Tensor | None = None
        best: tuple[Tiles, float] | None = None
        for tiles in candidates:
            if best is not None and time.monotonic() > ends_at:
                break
            cut = tiles.down if is_down else tiles.gate_up
            try:
                launches = self._planned(tiles, rows)
                launches.gate_up(tiles)
                took_s = self.seconds(partial(launches.down_and_answer if is_down else launches.gate_up, tiles))
            except Exception as error:
                tell(f"{self.shape.name}, {rows} rows, {cut}: {type(error).__name__}: {str(error)[:120]}")
                continue
            num_pairs = rows * self.shape.num_experts
            result = (
                launches.partial_of(tiles)[: cut.splits, :num_pairs].float().sum(0)
                if is_down
                else launches.act[:num_pairs].float()
            )
            if truth is None:
                truth = result
            is_right = bool((result - truth).norm() <= 0.01 * truth.norm())
            named = f"{self.shape.name}, {rows} rows, {'down, answers' if is_down else 'gate, up'}"
            tell(f"{named}: {took_s * 1e6:7.1f} us{'' if is_right else ' WRONG'}: {cut}")
            if is_right and (best is None or took_s < best[1]):
                best = (tiles, took_s)
            del launches
        assert best is not None, f"nothing fits {self.shape}"
        return best

    def _planned(self, tiles: Tiles, rows: int) -> WaveLaunches:
        """Launches after the plan of a wave in which every expert has this many rows."""
        bank, landed, members = self._wave(tiles, rows)
        answers = torch.empty(1, landed.hidden.shape[2], self.shape.hidden, dtype=self.dtype, device=self.device)
        self._answers = answers  # of all seats; kept, as launches know no more than its address
        bank.prepare(landed, (answers[0].nbytes, answers[0, 0].nbytes), landed.dtype)
        launches = bank._launches
        assert launches is not None
        launches.descriptors.write_everywhere(0, 0, [(seat, 0, count, answers.data_ptr()) for seat, count in members])
        launches.plan(tiles.block_m)
        return launches

    def _wave(
        self, tiles: Tiles, rows: int, weights: ExpertWeights | None = None
    ) -> tuple[TritonExpertBank, PackedRows, list[tuple[int, int]]]:
        shape = self.shape
        num_rows = rows * shape.num_experts // shape.k
        each = -(-num_rows // NUM_SEATS)
        bytes_each = row_bytes(shape.hidden, shape.k, self.dtype)
        memory = torch.zeros(NUM_SEATS, 1, each, bytes_each, dtype=torch.uint8, device=self.device)
        landed = PackedRows.view(memory, shape.hidden, shape.k, self.dtype)
        torch.manual_seed(1)  # the same rows for every candidate
        landed.hidden.normal_()
        landed.topk_weights.fill_(1 / shape.k)
        pairs = torch.arange(NUM_SEATS * each * shape.k, device=self.device) % shape.num_experts
        landed.topk_ids.copy_(pairs.view(NUM_SEATS, 1, each, shape.k).to(torch.int32))
        left = [min(each, max(0, num_rows - seat * each)) for seat in range(NUM_SEATS)]
        members = [(seat, count) for seat, count in enumerate(left) if count]
        return TritonExpertBank(weights or self.weights, tiles=(tiles,), uses_graphs=False), landed, members

    def float8(self, rates: tuple[float, float] | None, tell: Callable[[str], None]) -> list[dict[str, Any]]:
        """Waves with the same weights in float8, cut as by default: how long, and how far from those in bfloat16."""
        made: list[dict[str, Any]] = []
        shape = self.shape
        w13, w2 = ((one * FLOAT8_FACTOR).to(torch.float8_e4m3fn) for one in (self.weights.w13, self.weights.w2))
        across, along = num_blocks(shape.hidden), num_blocks(shape.inner)
        scale13, scale2 = (
            torch.full((1, shape.num_experts, *size), 1 / FLOAT8_FACTOR, device=self.device)
            for size in ((2 * along, across), (across, along))
        )
        scaled = ExpertWeights(w13, w2, scale13=scale13, scale2=scale2, scale_block=SCALE_BLOCK)
        for rows in (2,) if self.is_dry else (16, 128):
            tiles = choose(default_tiles(torch.float8_e4m3fn, 227 * 1024), rows)
            _, truth = self._wave_s(choose(default_tiles(torch.bfloat16, 227 * 1024), rows), rows)
            wave_s, answers = self._wave_s(tiles, rows, scaled)
            apart = float((answers.float() - truth.float()).norm() / truth.float().norm())
            num_bytes = 3 * shape.hidden * shape.inner * shape.num_experts
            floor_s = 0.0 if rates is None else num_bytes / rates[0]
            share = f"{floor_s / wave_s:.0%} of what can be"
            tell(f"{shape.name}, {rows} rows, float8: {wave_s * 1e6:.1f} us, {share}; {apart:.3f} from bfloat16's")
            made.append({
                "num_rows": rows, "wave_us": round(wave_s * 1e6, 1), "floor_us": round(floor_s * 1e6, 1),
                "apart": round(apart, 4),
            })  # fmt: skip
        return made

    def _wave_s(self, tiles: Tiles, rows: int, weights: ExpertWeights | None = None) -> tuple[float, torch.Tensor]:
        """A whole wave, as one replayed graph; and its answers."""
        bank, landed, members = self._wave(tiles, rows, weights)
        place = torch.zeros(
            NUM_SEATS, 1, landed.hidden.shape[2], self.shape.hidden, dtype=self.dtype, device=self.device
        )
        answers = dict(enumerate(place))
        bank.run(0, 0, members, landed, answers)
        if self.is_dry:
            return 1.0, place
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            bank.run(0, 0, members, landed, answers)
        return self.seconds(graph.replay), place

    @staticmethod
    def seconds(work: Callable[[], object]) -> float:
        """The median of launches one after another; weights are more than any cache holds."""
        if not has_gpu():
            started = time.perf_counter()
            work()
            return time.perf_counter() - started
        events = [torch.cuda.Event(enable_timing=True) for _ in range(REPEATS + 1)]  # type: ignore[no-untyped-call]
        work()
        for event in events[:-1]:
            event.record()
            work()
        events[-1].record()
        torch.cuda.synchronize()
        times = sorted(begin.elapsed_time(end) for begin, end in pairwise(events))
        return float(times[len(times) // 2]) / 1e3


def _rates() -> tuple[float, float]:
    """Bytes/s of copying, read and written, and operations/s of a large product of matrices in bfloat16."""
    source = torch.empty(1 << 29, dtype=torch.bfloat16, device="cuda").normal_()
    target = torch.empty_like(source)
    square = source[: 1 << 26].view(8192, 8192)
    copy_s = Bench.seconds(lambda: target.copy_(source))
    product_s = Bench.seconds(lambda: square @ square)
    return 2 * source.nbytes / copy_s, 2 * 8192**3 / product_s


# -- compiling on all cores before anything is measured --------------------------------------------------------------


def _compile_ahead(shapes: tuple[Shape, ...], tell: Callable[[str], None]) -> None:
    """Fills Triton's cache from processes that are forked before this one has touched the GPU."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        tell("compiling as we go: this process has used the GPU already")
        return
    work = [
        (shape, tiles)
        for shape in shapes
        for rows in GATE_UP
        for tiles in _pairs(rows)
    ]  # fmt: skip
    started = time.monotonic()
    num_workers = max(1, min(14, (os.cpu_count() or 2) - 1))
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_compile, args=(work[index::num_workers],)) for index in range(num_workers)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
        if worker.is_alive():
            worker.kill()
            worker.join()
    tell(f"compiled {len(work)} pairs of kernels in {time.monotonic() - started:.1f} s with {num_workers} processes")


def _pairs(rows: int) -> Iterator[Tiles]:
    gate_up, down = GATE_UP[rows], DOWN[rows]
    for index in range(max(len(gate_up), len(down))):
        yield Tiles(rows, BLOCK_M[rows], gate_up[min(index, len(gate_up) - 1)], down[min(index, len(down) - 1)])


def _compile(work: list[tuple[Shape, Tiles]]) -> None:
    """Launches each for a wave of no rows; all weights are the same memory."""
    device = torch.device("cuda")
    most = max(2 * shape.num_experts * shape.inner * shape.hidden for shape, _ in work)
    memory = torch.empty(most, dtype=torch.bfloat16, device=device)
    landed = {}
    for shape, tiles in work:
        sizes = (
            (1, shape.num_experts, 2 * shape.inner, shape.hidden),
            (1, shape.num_experts, shape.hidden, shape.inner),
        )
        w13, w2 = (memory[: math.prod(size)].view(size) for size in sizes)
        if shape not in landed:
            bytes_each = row_bytes(shape.hidden, shape.k, torch.bfloat16)
            rows = torch.zeros(2, 1, 16, bytes_each, dtype=torch.uint8, device=device)
            landed[shape] = PackedRows.view(rows, shape.hidden, shape.k, torch.bfloat16)
        bank = TritonExpertBank(ExpertWeights(w13, w2), tiles=(tiles,), uses_graphs=False)
        bank.prepare(landed[shape], (32 * shape.hidden, 2 * shape.hidden), torch.bfloat16)
        launches = bank._launches
        assert launches is not None
        launches.planned["wave"].zero_()
        for product in (launches.gate_up, launches.down):
            try:
                product(tiles)
            except Exception:  # it is tried again, and told, when it is measured
                continue
    os._exit(0)


def write(found: dict[str, Any], folder: Path) -> Path:
    """The device's file in this folder."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{file_name(found['device'])}.json"
    path.write_text(json.dumps(found, indent=1) + "\n")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "msi/kernels/triton/tuned", help="folder of the JSON file")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds, after which no other shape is begun")
    parser.add_argument("--dry", action="store_true", help="in the interpreter, on a small shape; writes nothing")
    options = parser.parse_args()
    if not options.dry and not has_gpu():
        parser.error("there is no GPU here to measure; --dry goes through all of it in Triton's interpreter")
    found = tune((DRY,) if options.dry else SHAPES, options.budget, lambda line: print(line, flush=True))
    if options.dry:
        print(json.dumps(found, indent=1))
        return
    print(write(found, options.out))


if __name__ == "__main__":
    main()
