"""What is compared: our best plan and the colocated baselines, on the paper's two clusters.

End to end is one sum. A request costs prefill GPU-seconds, the compute roofline of its prompt (the same for every
system, on the GPUs that the baselines run on), and decode GPU-seconds, output_len / (tokens per second and GPU).
GPU-seconds count once, times the GPU's price, or times its power. Queueing, the KV cache's way from prefill to decode
and a batch that mixes both are not modelled.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache

from msi.planner.assumptions import BASELINES, DEFAULTS, Assumptions, Baseline
from msi.planner.colocated import best_colocated
from msi.planner.hardware import Gpu, read_catalogue
from msi.planner.model_shape import ModelShape
from msi.planner.performance import active_experts, nodes_per_token
from msi.planner.pipeline import Stages, steady_pass_s
from msi.planner.plan import Plan, Workload
from msi.planner.search import node_pair_of, search
from msi.planner.task import Limits, Objective, Pool, Task, score_of

SMALL = ("mixtral-8x22b", "dbrx")
SCALED = "scaled-moe"
MODELS = (*SMALL, SCALED)
TITLES = {"mixtral-8x22b": "Mixtral-8x22B", "dbrx": "DBRX", "scaled-moe": "Scaled-MoE"}
DEGREES = tuple(range(1, 17))  # of Figure 15


@dataclass(frozen=True, slots=True)
class Cluster:
    """GPU types that both of our sides may use, 8 nodes of 8 each; the one that baselines use; what is compared."""

    gpus: tuple[str, ...]
    baseline_gpu: str
    objective: Objective
    count: int = 64


HOMOGENEOUS = Cluster(("a800",), "a800", "gpu")  # Figures 8 and 13 to 15
HETEROGENEOUS = Cluster(("h20", "l40s"), "h20", "cost")  # Figures 9 and 10


@dataclass(frozen=True, kw_only=True)
class Setting:
    """All that the comparison rests on; a sensitivity changes one of these.

    Attributes:
        baseline_kernels: what the baselines' kernels reach, over what ours reach.
        prefill_gpu: of all systems of the heterogeneous comparison; "" for our cheapest FLOPS of the mixed cluster.
        pipeline_m: Figure 14 takes the micro-batches of the best plan with so many of them.
    """

    given: Assumptions = DEFAULTS
    workload: Workload = field(default_factory=lambda: Workload(input_len=571, output_len=159, tpot_s=0.150))
    gpus: Mapping[str, Gpu] = field(default_factory=lambda: read_catalogue().gpus)
    models: Mapping[str, ModelShape] = field(default_factory=lambda: read_catalogue().models)
    baselines: Mapping[str, Baseline] = field(default_factory=lambda: BASELINES)
    baseline_kernels: float = 1.0
    prefill_gpu: str = "h20"
    pipeline_m: int = 4


class Systems:
    """What each system reaches in one setting."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting

    def task(self, model: str, cluster: Cluster, given: Assumptions, limits: Limits) -> Task:
        setting = self.setting
        pools = tuple(Pool(setting.gpus[name], cluster.count) for name in cluster.gpus)
        return Task(
            model=setting.models[model],
            workload=setting.workload,
            attention=pools,
            expert=pools,
            objective=cluster.objective,
            given=given,
            limits=limits,
        )

    def ours(self, model: str, cluster: Cluster, *, m: int = 0, is_nccl: bool = False) -> Plan:
        """The best plan; with `m` micro-batches if given; with T_c as NCCL would make it."""
        given = self.setting.given
        if is_nccl:
            given = replace(given, tail=given.tail * given.nccl_over_m2n)  # `tail` multiplies the whole of T_c
        return _best(self.task(model, cluster, given, Limits(micro_batches=(m,)) if m else Limits()))

    def baseline(self, name: str, model: str, cluster: Cluster, *, is_tuned: bool = False) -> Plan:
        """The best colocated group; tuned: without the limit on sequences that it is shipped with."""
        setting, scale = self.setting, self.setting.baseline_kernels
        curve = tuple((rows, fraction * scale) for rows, fraction in setting.given.compute)
        given = replace(setting.given, compute=curve, memory=setting.given.memory * scale)
        own = replace(cluster, gpus=(cluster.baseline_gpu,))
        shipped = setting.baselines[name]
        baseline = replace(shipped, max_num_seqs=0) if is_tuned else shipped
        plan = _best_colocated(self.task(model, own, given, Limits()), baseline)
        assert plan is not None, f"{name} does not fit on {cluster.count} {cluster.baseline_gpu}"
        return plan

    def decode_ratio(
        self, model: str, cluster: Cluster, baseline: str, *, per: Objective = "gpu", is_tuned: bool = False
    ) -> float:
        """Decode tokens per second and GPU, price or watt: ours over the baseline's."""
        theirs = self.baseline(baseline, model, cluster, is_tuned=is_tuned)
        return score_of(self.ours(model, cluster), per) / score_of(theirs, per)

    def end_to_end_ratio(self, model: str, cluster: Cluster, baseline: str, *, per: Objective = "gpu") -> float:
        """Requests per second and GPU, price or watt: ours over the baseline's."""
        shape, output_len = self.setting.models[model], self.setting.workload.output_len

        def spent(plan: Plan, gpu: Gpu) -> float:
            return self.prefill_s(shape, gpu) * weight_of(gpu, per) + output_len / score_of(plan, per)

        baseline_gpu = self.setting.gpus[cluster.baseline_gpu]
        gpu = baseline_gpu
        if len(cluster.gpus) > 1:
            types = [self.setting.gpus[name] for name in cluster.gpus]
            cheapest = min(types, key=lambda gpu: weight_of(gpu, per) / gpu.flops_per_s)
            gpu = self.setting.gpus[self.setting.prefill_gpu] if self.setting.prefill_gpu else cheapest
        theirs = self.baseline(baseline, model, cluster)
        return spent(theirs, baseline_gpu) / spent(self.ours(model, cluster), gpu)

    def prefill_s(self, model: ModelShape, gpu: Gpu) -> float:
        """GPU-seconds of one prompt: every token's projections and K experts, causal attention, the head once."""
        input_len = self.setting.workload.input_len
        values = model.num_layers * model.projection_values
        values += model.num_sparse_layers * (model.shared_values + model.top_k * model.expert_values)
        values += model.num_dense_layers * model.dense_values
        attention_flops = model.num_layers * model.attention_flops * input_len / 2
        flops = input_len * (2 * values + attention_flops) + 2 * model.head_values
        return flops / (gpu.flops_per_s * float(self.setting.given.compute_at(input_len)))

    def pipelined(self, model: str) -> Plan:
        """Figure 14: the plan whose micro-batches are run one, two, three and four at a time. Four fit into memory."""
        return self.ours(model, HOMOGENEOUS, m=self.setting.pipeline_m)

    def pass_s(self, model: str, m: int) -> float:
        """Figure 14: the steady pass of m micro-batches."""
        plan = self.pipelined(model)
        return steady_pass_s(plan.stages, m, plan.num_layers)

    def speedup(self, model: str, m: int) -> float:
        """Figure 14: throughput of m micro-batches over that of m - 1, each micro-batch as large as before."""
        return m / (m - 1) * self.pass_s(model, m - 1) / self.pass_s(model, m)

    def sweep(self, model: str = "dbrx") -> dict[int, Replicated]:
        """Figure 15: Figure 8's plan with 1 to 16 attention nodes, the micro-batch of each kept."""
        plan = self.ours(model, HOMOGENEOUS)
        return {degree: self._replicated(model, plan, degree) for degree in DEGREES}

    def _replicated(self, name: str, plan: Plan, degree: int) -> Replicated:
        model = self.setting.models[name]
        costs = node_pair_of(self.task(name, HOMOGENEOUS, self.setting.given, Limits()), plan).costs
        tokens, experts = float(plan.micro_batch * degree), float(plan.experts_per_node)
        rows = tokens * model.top_k * experts / model.num_experts
        expert_s = costs.expert_s(rows, active_experts(model, experts, tokens), experts)
        message_rows = plan.micro_batch * nodes_per_token(model, experts) / plan.num_expert_nodes
        message_bytes = message_rows * model.row_bytes
        comm_s = costs.comm_s(message_bytes, float(degree), float(plan.num_expert_nodes))
        stages = Stages(plan.t_attention_s, float(expert_s), float(comm_s))
        tpot_s = steady_pass_s(stages, plan.num_micro_batches, plan.num_layers)
        num_gpus = degree * plan.tp_attention + plan.num_expert_gpus
        return Replicated(stages, tpot_s, tokens * plan.num_micro_batches / tpot_s, num_gpus)


@cache
def _best(task: Task) -> Plan:
    return search(task, num_plans=1)[0]


_best_colocated = cache(best_colocated)


@dataclass(frozen=True, slots=True)
class Replicated:
    """One degree of attention data parallelism."""

    stages: Stages
    tpot_s: float
    tokens_per_s: float
    num_gpus: int

    @property
    def tokens_per_s_per_gpu(self) -> float:
        return self.tokens_per_s / self.num_gpus


def best_degree(sweep: Mapping[int, Replicated], degrees: tuple[int, ...] = (1, 2, 4, 8, 16)) -> int:
    """Of the paper's degrees, the one with the most tokens per second and GPU."""
    return max(degrees, key=lambda degree: sweep[degree].tokens_per_s_per_gpu)


def weight_of(gpu: Gpu, per: Objective) -> float:
    """What a second of one GPU counts."""
    return {"gpu": 1.0, "cost": gpu.price, "watt": gpu.power_w}[per]
