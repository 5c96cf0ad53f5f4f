"""Equations 3 to 8 of the MegaScale-Infer paper (arXiv 2504.02263), each as written and as corrected here.

Side by side, so that a reader can check ours against the paper's line by line. Single numbers, seconds, bytes and
bytes per second; notation in the arguments' names. Eq 3, 4 and 5 without their corrections are what
`msi.planner.pipeline` has; DEFECTS says what is wrong with which equation, and where it is put right.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from msi.planner.pipeline import Stages, eq5_s, isolated_pass_s

DEFECTS: Mapping[int, str] = {
    1: "Eq 6 counts elements, and Util takes the whole: bytes, and the message of one pair (eq6_corrected_s)",
    2: "the FFN of a SwiGLU expert has three matrices (ModelShape.expert_values; ffn_flops)",
    3: "Eq 8 assumes heads x head_dim = h and no buffers (eq8_corrected_bytes; performance.attention_node_bytes)",
    4: "one expert per node does not scale: experts_per_node (balance_corrected; search)",
    5: "shared experts and dense layers are missing (performance.attention_layer_s)",
    6: "n_a's formula ignores k2 and k4 (balance_corrected), and the search goes around it",
    7: "T_c as a mean: one slow hop stalls the pipeline (Assumptions.tail)",
    8: "T_a = T_e, or the most attention nodes with T_e <= T_a: both reported (balance, largest_balanced)",
}
Util = Callable[[float], float]


def eq3_as_written(stages: Stages) -> int:
    """Smallest m with m T_f >= 2 (T_f + T_c)."""
    return math.ceil(2 * (1 + stages.comm_s / stages.forward_s) - 1e-12)


def eq3_corrected(stages: Stages) -> int:
    """Smallest m with m T_f >= T_a + T_e + 2 T_c: Eq 3 is sufficient, not necessary."""
    return math.ceil(stages.round_trip_s / stages.forward_s - 1e-12)


def eq4_bounds_s(stages: Stages, m: int, num_layers: int) -> tuple[float, float]:
    """T_iter of one micro-batch when the pipeline is full: at least, at most."""
    forward_s = stages.forward_s
    return stages.round_trip_s + m * forward_s * (num_layers - 1), m * forward_s * num_layers


def eq5_as_written_s(stages: Stages, m: int, num_layers: int) -> float:
    """T_total of the whole global batch."""
    return eq5_s(stages, m, num_layers)


def eq5_corrected_s(stages: Stages, m: int, num_layers: int) -> float:
    """The max form: holds when the pipeline is not full, too."""
    return isolated_pass_s(stages, m, num_layers)


def eq6_as_written_s(
    *, b_a: float, b_e: float, h: int, K: int, tp_a: int, tp_e: int, W_a: float, W_e: float, util: Util
) -> float:
    """T_c = max of what an attention GPU sends and an expert GPU receives, in elements."""
    sent, received = b_a * h * K / tp_a, b_e * h / tp_e
    return max(sent / (W_a * util(sent)), received / (W_e * util(received)))


def eq6_corrected_s(
    *,
    b_a: float,
    b_e: float,
    h: int,
    K: int,
    E: int,
    tp_a: int,
    tp_e: int,
    W_a: float,
    W_e: float,
    util: Util,
    value_bytes: float,
) -> float:
    """Defect 1. Bytes; Util of the message of one pair, b_a K / E h bytes, as each GPU of the node sends its part."""
    pair = b_a * K / E * h * value_bytes
    sent, received = b_a * h * K * value_bytes / tp_a, b_e * h * value_bytes / tp_e
    return max(sent / (W_a * util(pair / tp_a)), received / (W_e * util(pair / tp_e)))


def eq7(iteration_s: float, slo_s: float) -> bool:
    """T_iter <= SLO."""
    return iteration_s <= slo_s


def eq8_as_written_bytes(*, m: int, b_a: float, s: float, h: int, L: int, g: float, attention_values: float) -> float:
    """KV cache and weights in bf16, 4 m b_a s h L / g + 2 P_a; must stay below tp_a C_a."""
    return 4 * m * b_a * s * h * L / g + 2 * attention_values


def eq8_corrected_bytes(
    *, m: int, b_a: float, s: float, kv_bytes_per_token: float, attention_bytes: float, buffer_bytes: float
) -> float:
    """Defect 3."""
    return m * b_a * s * kv_bytes_per_token + attention_bytes + buffer_bytes


def ffn_flops_as_written(h: int, h_ffn: int, rows: float) -> float:
    """FFN input (h, h') and output (h', h)."""
    return 2 * rows * 2 * h * h_ffn


def ffn_flops_corrected(h: int, h_ffn: int, rows: float) -> float:
    """Defect 2: FFN input is (h, 2 h')."""
    return 2 * rows * 3 * h * h_ffn


def balance_as_written(k1: float, k3: float, E: int, K: int) -> float:
    """n_a = k1 E / (k3 K), from Eq 1 with k2 = k4 = 0."""
    return k1 * E / (k3 * K)


def balance_corrected(
    k1: float, k2: float, k3: float, k4: float, *, E: int, K: int, b_a: float, experts_per_node: int = 1
) -> float:
    """n_a with T_a(b_a) = T_e: defects 4 and 6. 0.0 where even an empty expert batch is slower.

    A node's (token, expert) pairs are b_a n_a K experts_per_node / E; k3 is per pair.
    """
    pairs_each = b_a * K * experts_per_node / E
    return max(0.0, (k1 * b_a + k2 - k4) / (k3 * pairs_each))


def largest_balanced(balance: float) -> int:
    """The most attention nodes with T_e <= T_a (defect 8), at least one."""
    return max(1, math.floor(balance + 1e-9))


def throughput_per_cost(
    B: float, total_s: float, *, tp_a: int, n_a: int, cost_a: float, tp_e: int, n_e: int, cost_e: float
) -> float:
    """Tokens per second and unit of cost; the paper has E expert nodes."""
    return B / total_s / (tp_a * n_a * cost_a + tp_e * n_e * cost_e)


def latency_budget_s(tpot_s: float, m: int, num_layers: int) -> float:
    """T_f at which the steady pass of a full pipeline takes the whole TPOT limit."""
    return tpot_s / (m * num_layers)
