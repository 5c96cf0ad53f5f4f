#!/usr/bin/env python3
"""What placing experts by load is worth on this machine, beside what the simulator predicts of it.

    tools/bench_rebalance.py --repeat 3

Makes a GLM-4.5 of random weights whose routers choose experts by Zipf's law, in each layer in an order of its own, or
in one order with --alike (the biases of its routers are fitted to that on random text), profiles it, and decodes with
one attention worker and two expert workers, one thread each, m = 1, so that two cores are enough: first with experts
one after the other, then, once the instance has counted its rows, as `msi-ctl rebalance` places them, layer by layer.
The simulator runs both placements with the profile's stage times, and draws experts as often as the instance counted
them; nothing else is fitted. Prints tokens per second of both, and the gain, measured and predicted.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script's own folder is there, not the one above
from msi import Engine, SamplingParams
from msi.placement import LayerExperts, Placement, at_layer, place_evenly
from msi.planner.profile import read_profile
from msi.planner.profiled_costs import ProfiledCosts, StageConditions
from msi.settings import SchedulerLimits
from msi.simulator.deployment import Deployment
from msi.simulator.popularity import build_routing
from msi.simulator.simulation import simulate
from msi.simulator.workload import Arrival
from msi_launch.command_line import ScriptLine, integer, number

NUM_EXPERTS, TOP_K, NUM_LAYERS, NUM_NODES = 16, 2, 4, 2
VOCAB, HIDDEN, WIDTH = 2048, 512, 1024
FITTING_TOKENS, FITTING_STEPS = 4096, 400
PROMPT = 16


def parse() -> argparse.Namespace:
    parser = ScriptLine(__doc__)
    parser.add_argument("--zipf", type=number(0, 10), default=1.2, metavar="A", help="1.2")
    parser.add_argument("--alike", action="store_true", help="all layers choose the first expert most, the last least")
    parser.add_argument("--batch", type=integer(1, 512), default=192, metavar="B", help="sequences; 192")
    parser.add_argument("--tokens", type=integer(8, 4096), default=48, metavar="N", help="of an answer; 48")
    parser.add_argument(
        "--repeat", type=integer(1, 100), default=3, metavar="N", help="instances, one after another; 3"
    )
    parser.add_argument("--patience", type=number(0, 1e5), default=60.0, metavar="S", help="of the profile; 60")
    parser.add_argument("--model", type=Path, metavar="DIR", help="made there, or used if it is there; else made anew")
    values: argparse.Namespace = parser.parse_args()
    return values


# -- the model ---------------------------------------------------------------------------------------------------------


def make_model(folder: Path, popularity: str) -> None:
    """The experts of each layer are chosen by it, as `msi.simulator.popularity` names it."""
    import torch
    from transformers import AutoModelForCausalLM, Glm4MoeConfig

    torch.manual_seed(0)
    config = Glm4MoeConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=WIDTH, moe_intermediate_size=WIDTH,
        num_hidden_layers=NUM_LAYERS, num_attention_heads=8, num_key_value_heads=2, head_dim=64,
        n_routed_experts=NUM_EXPERTS, num_experts_per_tok=TOP_K, n_shared_experts=1, first_k_dense_replace=0, n_group=1,
        topk_group=1, max_position_embeddings=1024, eos_token_id=2, bos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).float().eval()
    before = place_evenly(NUM_EXPERTS, 1)
    chosen = build_routing(popularity, before, TOP_K, most_tokens=1, seed=0, num_layers=NUM_LAYERS).chosen()
    targets = [at_layer(chosen, layer) for layer in range(NUM_LAYERS)]
    text = torch.randint(3, VOCAB, (FITTING_TOKENS // 64, 64))
    for layer, target in zip(model.model.layers, targets, strict=True):
        inputs: list[Any] = []
        hook = layer.mlp.gate.register_forward_pre_hook(lambda _, given, inputs=inputs: inputs.append(given[0]))
        with torch.no_grad():
            model(text)
        hook.remove()
        rows = inputs[0].reshape(-1, HIDDEN).double()
        scores = torch.sigmoid(rows @ layer.mlp.gate.weight.detach().double().T).numpy()
        bias = fitted_bias(scores, np.array(target))
        layer.mlp.gate.e_score_correction_bias.copy_(torch.from_numpy(bias))
    model.save_pretrained(folder)


def fitted_bias(scores: np.ndarray, target: np.ndarray) -> np.ndarray:
    """[experts]: with it, the top k of these scores [tokens, experts] are those shares of tokens."""
    bias, step = np.zeros(len(target)), float(scores.std())
    for at in range(FITTING_STEPS):
        chosen = np.argpartition(-(scores + bias), TOP_K - 1, axis=1)[:, :TOP_K]
        share = np.bincount(chosen.ravel(), minlength=len(target)) / len(scores)
        bias += step * (1 - at / FITTING_STEPS) * np.clip(np.log((target + 1e-4) / (share + 1e-4)), -0.5, 0.5)
    centred: np.ndarray = bias - bias.mean()
    return centred


# -- measured ----------------------------------------------------------------------------------------------------------


async def tokens_per_s(engine: Engine, values: argparse.Namespace, chance: Random) -> float:
    """While all sequences decode."""
    firsts, lasts = [], []

    async def one(seed: int) -> None:
        prompt = [chance.randrange(3, VOCAB) for _ in range(PROMPT)]
        params = SamplingParams(max_tokens=values.tokens, temperature=1.0, seed=seed, ignore_eos=True)
        times = [time.monotonic() async for _ in engine.generate(prompt, params)]
        firsts.append(times[0])
        lasts.append((times[-1] - times[len(times) // 4]) / (len(times) - 1 - len(times) // 4))

    await asyncio.gather(*(one(seed) for seed in range(values.batch)))
    return float(values.batch / median(lasts))


async def asked(engine: Engine, *words: str) -> dict[str, Any]:
    """Of msi-ctl. Raises SystemExit with its sentence."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "msi_launch.ctl", *words, "--json", "--coordinator", engine.address,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    said, complaint = await process.communicate()
    if process.returncode:
        raise SystemExit(f"msi-ctl {' '.join(words)}: {complaint.decode().strip()}")
    answer: dict[str, Any] = json.loads(said)
    return answer


def placed(answer: dict[str, Any]) -> Placement:
    layers = [
        LayerExperts(tuple(tuple(of_layer.get(f"expert-{node}", ())) for node in range(NUM_NODES)))
        for of_layer in answer["layers"] or [answer["experts"]]
    ]
    return Placement.of_layers(layers, NUM_EXPERTS)


async def measured(
    model: Path, values: argparse.Namespace, seed: int
) -> tuple[list[float], list[Placement], list[list[float]]]:
    """Tokens per second and placements, before and after; rows of experts, by layer."""
    chance, found, placements = Random(seed), [], []
    async with Engine.local(
        model=model, attention_workers=1, expert_workers=NUM_NODES, micro_batches=1, threads_per_worker=1,
        transport="shm", max_num_seqs=values.batch, dtype="float32", enable_prefix_caching=False,
    ) as engine:  # fmt: skip
        await tokens_per_s(engine, values, chance)  # warms up
        rows: list[list[float]] = []
        for is_last in (False, True):
            placements.append(placed(await asked(engine, "placement")))
            found.append(await tokens_per_s(engine, values, chance))
            if not is_last:
                rows = (await asked(engine, "rebalance"))["layer_rows"]
        return found, placements, rows


# -- predicted ---------------------------------------------------------------------------------------------------------


def profile_of(model: Path, folder: Path, values: argparse.Namespace) -> ProfiledCosts:
    output = folder / "profile.json"
    batches = ",".join(str(max(1, values.batch // part)) for part in (4, 2, 1))
    subprocess.run(
        [
            str(Path(sys.executable).with_name("msi-profile")), str(model), "--dtype", "float32", "--threads", "1",
            "--batches", batches, "--contexts", "32,64", "--transport", "shm", "-o", str(output),
            "--patience", str(values.patience),
        ],
        check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    conditions = StageConditions(1, NUM_EXPERTS // NUM_NODES, "shm", num_attention=1, num_expert=NUM_NODES)
    return ProfiledCosts(read_profile(output), conditions)


def predicted(costs: ProfiledCosts, placement: Placement, rows: list[list[float]], values: argparse.Namespace) -> float:
    """Tokens per second."""
    deployment = Deployment(
        num_layers=NUM_LAYERS, num_experts=NUM_EXPERTS, top_k=TOP_K, num_attention=1, num_expert=NUM_NODES,
        num_micro_batches=1, row_bytes=4 * HIDDEN, answer_row_bytes=4 * HIDDEN, placement=placement,
        limits=SchedulerLimits(1024, max_num_seqs=values.batch, num_gpu_blocks_override=16 * values.batch),
    )  # fmt: skip
    arrivals = [Arrival(0.0, PROMPT, values.tokens)] * values.batch
    report = simulate(deployment, costs, arrivals, popularity=[weights_of(one) for one in rows], seed=0)
    return float(values.batch / median(one.tpot_s for one in report.requests if one.tpot_s))


def weights_of(rows: list[float]) -> list[float]:
    """With these, successive choices without replacement fall on experts as often as was counted."""
    wanted = np.maximum(np.array(rows), 1e-3 * max(rows))
    weights, before = wanted / wanted.sum(), place_evenly(NUM_EXPERTS, 1)
    for _ in range(20):
        chosen = np.array(build_routing(weights.tolist(), before, TOP_K, most_tokens=1, seed=1).chosen()[0])
        weights *= (wanted / wanted.sum()) / np.maximum(chosen / chosen.sum(), 1e-9)
        weights /= weights.sum()
    found: list[float] = weights.tolist()
    return found


def main() -> None:
    values = parse()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = values.model or folder / "model"
        if not (model / "config.json").exists():
            make_model(model, f"{'zipf' if values.alike else 'layers'}:{values.zipf}")
        costs = profile_of(model, folder, values)
        gains: list[tuple[float, float]] = []
        for seed in range(values.repeat):
            found, placements, rows = asyncio.run(measured(model, values, seed))
            foreseen = [predicted(costs, placement, rows, values) for placement in placements]
            gains.append((found[1] / found[0] - 1, foreseen[1] / foreseen[0] - 1))
            line = {
                "tokens_per_s": [round(one, 1) for one in found],
                "predicted_tokens_per_s": [round(one, 1) for one in foreseen],
                "gain": round(gains[-1][0], 4), "predicted_gain": round(gains[-1][1], 4),
                "layer_rows": rows, "experts": [layer.experts for layer in placements[1].layers],
            }  # fmt: skip
            print(json.dumps(line), flush=True)
    gain, foreseen_gain = (median(one) for one in zip(*gains, strict=True))
    off = (1 + foreseen_gain) / (1 + gain) - 1
    print(
        json.dumps({"gain": round(gain, 4), "predicted_gain": round(foreseen_gain, 4), "predicted_over": round(off, 4)})
    )


if __name__ == "__main__":
    main()
