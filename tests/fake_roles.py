"""Real workers on fake devices and cards: two attention and two expert workers, from requests to tokens.

Roles, halves, links, waves and servers are the product's; what computes are the plain kernels. Time is virtual and
stands still as long as anybody can go on: whoever waits for time has waited for what will not come. `play` says what
went wrong with a run.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc

import torch

from msi.attention.role import AttentionRole
from msi.control.messages import Assignment, ExpertAddress, PassDone, RequestsFailed, Topology
from msi.device.fake.device import FakeDevice
from msi.device.fake.transport import FakeTransport
from msi.device.fake.world import FakeWorld
from msi.experts.role import ExpertRole
from msi.kernels.plain import PlainKernels
from msi.placement import place_with_replicas
from msi.precision import Precision
from msi.settings import LinkShape, SchedulerLimits, Timeouts
from msi.simulator.clock import SimulationStalled, run_virtual
from msi.types import Place, Request, SamplingParams
from msi.worker.loading import ModelFiles
from msi.worker.torch_host import TorchModel

ATTENTIONS, NODES, LANES = 2, 2, 3
BLOCKS = 12
DEPTH = LANES  # of the experts' devices, as a GPU would have it
LIMIT_S = 60.0  # virtual


class _HostMemory:
    """What weights are loaded onto, once for all worlds: nothing writes to them."""

    def __init__(self):
        self.kernels = PlainKernels(torch.device("cpu"))

    def free_memory_bytes(self):
        return 1 << 40

    def upload(self, tensor):
        return tensor


class Model:
    """A checkpoint, its weights for every worker, and what transformers makes of some prompts (`tests.reference`)."""

    def __init__(self, path, expected, redundancy=0, holds=False):
        self.files, self.expected, self.holds = ModelFiles(path), expected, holds
        self.placement = place_with_replicas(self.files.config.num_experts, NODES, redundancy)
        self._parts = {}

    def assignment(self, role, node, incarnation=1):
        return Assignment(
            instance="fake",
            worker_id=f"{role}-{node}",
            role=role,
            place=Place(node),
            incarnation=incarnation,
            placement=self.placement,
            num_seats=ATTENTIONS,
            is_colocated=False,
            memory_share=1.0,
            limits=SchedulerLimits(max_model_len=64, max_num_batched_tokens=16),
            link=LinkShape(LANES, slot_rows=16),
            timeouts=Timeouts(),
            precision=Precision.of("float32"),
        )

    def on(self, device, assignment):
        who = assignment.role, assignment.place
        if who not in self._parts:
            self._parts[who] = self.files.load(assignment, _HostMemory())
        return TorchModel(self.files, self._parts[who], assignment, device, 1.0)


class Play:
    """Workers of one world, and what becomes of their requests."""

    def __init__(self, model, world, loses_node):
        self.model, self.world, self.loses_node = model, world, loses_node
        self.clock = asyncio.get_running_loop().time
        self.attentions, self.experts, self.tasks = [], {}, []
        self.tokens, self.failures, self.open = {}, [], set()
        self.all_ended = asyncio.Event()

    async def start(self):
        for node in range(NODES):
            await self.start_expert(node, incarnation=1)
        for index in range(ATTENTIONS):
            assignment, device = self.model.assignment("attention", index), FakeDevice(self.world)
            loaded, transport = self.model.on(device, assignment), self.new_transport("attention", device)
            role = AttentionRole(assignment, loaded, transport, BLOCKS, self.report, clock=self.clock)
            if not self.model.holds:
                role.links.link.nodes.hold_s = 0.0
            self.attentions.append(role)
            self.tasks.append(asyncio.create_task(role.run()))
        await asyncio.sleep(0)
        for role in self.attentions:
            role.use_lanes(LANES)
        self.tell_of_experts()

    def new_transport(self, side, device):
        return FakeTransport(device)

    async def start_expert(self, node, incarnation):
        assignment, device = self.model.assignment("expert", node, incarnation), FakeDevice(self.world)
        transport = self.new_transport("expert", device)
        role = ExpertRole(assignment, self.model.on(device, assignment), transport, clock=self.clock)
        role.half.depth = DEPTH
        address = ExpertAddress(assignment.place, assignment.worker_id, incarnation, await role.listen())
        self.experts[node] = role, transport, address

    def tell_of_experts(self):
        for role in self.attentions:
            role.links.use_topology(Topology(tuple(address for _, _, address in self.experts.values()), {}))

    async def lose_expert(self, node):
        """A new one takes its place."""
        role, transport, address = self.experts.pop(node)
        role.close()
        await transport.close()
        await self.world.quiet()
        await self.start_expert(node, address.incarnation + 1)
        self.tell_of_experts()

    def submit(self, name):
        for index, role in enumerate(self.attentions):
            for number, one in enumerate(self.model.expected):
                request_id = f"{name}/{index}/{number}"
                self.open.add(request_id)
                self.tokens[request_id] = ()
                params = SamplingParams(max_tokens=len(one.tokens), temperature=0.0, ignore_eos=True, seed=0)
                role.requests.submit(Request(request_id, one.prompt, params))

    def report(self, message):
        if isinstance(message, RequestsFailed):
            self.failures.append(str(message.failure))
            self.open -= set(message.request_ids)
        elif isinstance(message, PassDone):
            for progress in message.progress:
                self._take(progress)
        if self.num_late and not self.loses_node:
            self.failures.append("somebody was late, and no time has passed")
        if not self.open or self.failures:
            self.all_ended.set()

    def _take(self, progress):
        request_id = progress.request_id
        tokens = self.tokens[request_id] = self.tokens[request_id] + progress.token_ids
        if self._expected(request_id)[: len(tokens)] != tokens:
            self.failures.append(f"{request_id} has other tokens")
        if progress.is_last:
            self.open.discard(request_id)

    def _expected(self, request_id):
        return self.model.expected[int(request_id.rpartition("/")[2])].tokens

    async def end(self):
        """Until no request is left."""
        self.all_ended.clear()
        if self.open:
            ended = asyncio.ensure_future(self.all_ended.wait())
            await asyncio.wait([ended, *self.tasks], return_when=asyncio.FIRST_COMPLETED)
            ended.cancel()

    @property
    def num_late(self):
        """Seats that others did not wait for."""
        counters = [role.counters() for role, _, _ in self.experts.values()]
        return sum(of_one.evictions + of_one.alone_batches for of_one in counters)

    @property
    def num_packed_again(self):
        """Turns."""
        return sum(role.links.link.counters.packed_again for role in self.attentions)

    async def close(self):
        for task in self.tasks:
            task.cancel()
        for ended in await asyncio.gather(*self.tasks, return_exceptions=True):
            if isinstance(ended, Exception):
                raise ended


async def _play(model, seed, loses_node):
    world = FakeWorld(seed)
    play = Play(model, world, loses_node)
    await play.start()
    play.submit("first")
    if loses_node:
        await world.quiet(max_steps=250 + world.chance.randrange(250))
        await play.lose_expert(world.chance.randrange(NODES))
        await play.end()
        if not model.holds:
            assert play.failures, "nothing was under way"
            play.failures.clear()
        elif not play.failures:
            assert play.num_packed_again, "nothing was under way"
        play.submit("second")
    await play.end()
    await play.close()
    return next(iter(play.failures), "")


def play(model, seed, left_out=contextlib.nullcontext, loses_node=False):
    """What went wrong, or "".

    Args:
        left_out: makes what leaves a synchronisation out, while it is entered.
        loses_node: an expert worker is lost in the middle: where nothing is held, requests begin again.
    """
    with left_out():  # what cannot be left out is no catch
        try:
            return run_virtual(_play(model, seed, loses_node), LIMIT_S)
        except (SimulationStalled, Exception) as error:
            return f"{type(error).__name__}: {error}"
        finally:
            gc.collect(0)
