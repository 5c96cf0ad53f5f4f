"""What an operator asks of a running instance: who is there, what holds what, and workers that are to come or to go."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from msi.control.changes import ChangesOfPlacement
from msi.control.members import Instruction, Member
from msi.control.membership import Cluster
from msi.control.orders import Order, Ordered
from msi.control.rebalancing import Rebalancing
from msi.control.slow_workers import SlowWorkerPolicy
from msi.errors import ConfigError, EngineError, Unavailable
from msi.placement import Placement
from msi.placement_change import spread_evenly

log = logging.getLogger(__name__)

SLOW_LEAVES_WITHIN_S = 60.0  # of an expert worker, which then stays if it cannot
Launcher = Callable[..., None]  # tells the process that started this one


class Operator:
    """Of one instance.

    Args:
        carry_out: what the cluster says is to be done.
        address: of the coordinator, for sentences.
        num_moved: requests that have moved between attention workers.

    Attributes:
        launcher: who starts workers here, where somebody does.
        slow: has those leave that are slow for long, as an operator would.
    """

    def __init__(
        self,
        cluster: Cluster,
        changes: ChangesOfPlacement,
        balance: Rebalancing,
        carry_out: Callable[[Sequence[Instruction]], None],
        address: str,
        clock: Callable[[], float],
        num_moved: Callable[[], int] = lambda: 0,
    ) -> None:
        self.launcher: Launcher | None = None
        self._cluster = cluster
        self._changes = changes
        self._balance = balance
        self._carry_out = carry_out
        self._address = address
        self._coming: Counter[str] = Counter()  # by role: workers that orders wait for
        self._known: dict[int, Member] = {}  # by identity: who was there before, or has come for an order
        self._given_up: dict[str, list[str]] = {}  # by role: why those cannot work that will not come
        self._clock = clock
        self.slow = SlowWorkerPolicy(cluster.plan.slow, cluster, self._let_go_slow, lambda: self.launcher is not None)
        self._num_moved = num_moved
        self._waits: list[tuple[Callable[[], bool], asyncio.Future[None]]] = []

    def look(self) -> None:
        """After whatever happened."""
        for worker_id in self._cluster.take_staying():
            if self.launcher is not None:
                self.launcher(keep=worker_id)
        for wait in [one for one in self._waits if one[1].done() or one[0]()]:
            self._waits.remove(wait)
            if not wait[1].done():
                wait[1].set_result(None)

    async def obey(self, order: Order) -> Ordered:
        """The answer, once it is done."""
        try:
            match order.verb:
                case "status":
                    text, report = self._cluster.sentence(self._clock()), self._status()
                case "placement":
                    text, report = self._placement_text(), self._placement()
                case "drain" | "remove":
                    text, report = await self._let_go(order)
                case "add":
                    text, report = await self._add(order)
                case "rebalance":
                    text, report = await self._rebalance(), self._placement()
                case _:
                    raise ConfigError(f"{order.verb!r} is nothing that a coordinator does")
        except EngineError as error:
            return Ordered(order.number, failure=str(error))
        return Ordered(order.number, text, json.dumps(report))

    async def _rebalance(self) -> str:
        """By what was counted; evenly where too little was."""
        if (question := self._balance.asked()) is None:
            await self._changes.ask(spread_evenly, "spread evenly")
        elif await self._balance.answer(question, is_asked=True) is None:
            return f"nothing better was found for what experts had to do; {self._placement_text()}"
        return self._placement_text()

    # -- what there is -----------------------------------------------------------------------------------------------

    def _status(self) -> dict[str, Any]:
        cluster = self._cluster
        return {
            "status": cluster.sentence(self._clock()),
            "micro_batches": cluster.num_lanes,
            "wanted": cluster.plan.wanted,
            "room_for": cluster.plan.most,
            "workers": [
                {
                    "worker_id": one.worker_id, "role": one.role, "state": one.state, "pid": one.pid, "host": one.host,
                    "incarnation": one.incarnation, "num_running": one.status.num_running, "reason": one.reason,
                    "slowness": self.slow.ratio(one.worker_id, one.incarnation),
                }
                for one in cluster.stats()
            ],
            "requests_moved": self._num_moved(),
            "placement": self._placement(),
        }  # fmt: skip

    def _placement(self) -> dict[str, Any]:
        placing = self._cluster.placing
        names = {member.place.node: member.worker_id for member in self._cluster.live("expert")}
        placement = placing.used_by("attention")[0]

        def told_by_name(of: Placement) -> dict[str, list[int]]:
            return {
                names.get(node, f"node {node}"): list(of.held_by(node))
                for node in range(of.num_nodes)
                if node in names or of.held_by(node)
            }

        return {
            "version": placement.version,
            "stage": placing.stage,
            "remark": placing.remark,
            "last_failure": placing.failure,
            "expert_rows": self._balance.expert_rows(),
            "layer_rows": self._balance.rows(),
            "experts": told_by_name(placement),
            "layers": [told_by_name(placement.of_layer(layer)) for layer in range(len(placement.further) + 1)]
            if placement.further
            else [],
        }

    def _placement_text(self) -> str:
        told = self._placement()
        experts, layers = told["experts"], told["layers"]
        held = [f"{name}: {_held(experts[name], [of_layer.get(name, ()) for of_layer in layers])}" for name in experts]
        return f"placement {told['version']} ({told['stage']}): {'; '.join(held)}"

    # -- workers that go and come ------------------------------------------------------------------------------------

    async def _let_go(self, order: Order) -> tuple[str, dict[str, Any]]:
        member = self._cluster.ask_to_leave(order.worker_id, self._clock() + order.within_s, self._carry_out)
        if order.verb == "remove" and self.launcher is not None:
            self.launcher(forget=order.worker_id)
        await self._until(lambda: not (member.is_live and member.is_leaving))
        if member.is_live:
            reason = self._cluster.placing.failure or "its experts have no other place"
            raise Unavailable(f"{order.worker_id} stays: {reason}")
        return f"{order.worker_id} has left ({member.reason})", self._status()

    def _let_go_slow(self, member: Member, why: str) -> None:
        """Not started again, where it would be as slow. Raises ConfigError: it cannot leave."""
        by = math.inf if member.role == "attention" else self._clock() + SLOW_LEAVES_WITHIN_S
        self._cluster.ask_to_leave(member.worker_id, by, self._carry_out, why)
        if self.launcher is not None:
            self.launcher(forget=member.worker_id)

    async def replace(self, role: str) -> None:
        """One that was slow has gone: another one comes in its place."""
        answer = await self.obey(Order(0, "add", role=role))
        if answer.failure:
            log.warning("nobody came in the place of a slow %s worker: %s", role, answer.failure)
        else:
            log.warning("%s, in the place of a slow one", answer.text)

    def given_up(self, worker_id: str, role: str, why: str) -> None:
        """The launcher says of one that was to come that it cannot work."""
        if self._coming[role]:
            self._given_up.setdefault(role, []).append(f"{worker_id} was started and cannot work: {why}")
            self.look()

    async def _add(self, order: Order) -> tuple[str, dict[str, Any]]:
        cluster, role = self._cluster, order.role
        if role not in cluster.plan.most or cluster.plan.is_colocated:
            raise ConfigError(f"there is no role {role!r} for more workers here; give attention or expert")
        live, most = cluster.live(role), cluster.plan.most[role]
        if not self._coming.total():
            self._known.clear()
        if not self._coming[role]:
            self._known.update((id(member), member) for member in live)
        num_under_way = max(0, self._coming[role] - sum(id(member) not in self._known for member in live))
        if len(live) + num_under_way >= most:
            under_way = f", with {num_under_way} on their way" if num_under_way else ""
            raise ConfigError(
                f"there is room for {most} {role} workers, and so many are there{under_way}; start the instance with a "
                f"larger `max_{role}_workers`"
            )
        if self.launcher is None:
            command = " ".join(["msi-launch", "MODEL", "--role", role, "--coordinator", self._address])
            raise ConfigError(f"nobody starts workers for this instance; start one where it is to run: {command}")
        self._coming[role] += 1
        try:
            come = await self._newcomer(role, self.launcher)
        finally:
            self._coming[role] -= 1
            if not self._coming[role]:
                self._given_up.pop(role, None)
        return f"{come.worker_id} (pid {come.pid}) has come", self._status()

    async def _newcomer(self, role: str, launcher: Launcher) -> Member:
        """One that is started and has come; of two that are waited for each has come for one order.

        Raises:
            Unavailable: it did not come in time, or cannot work.
        """
        cluster, found, failed = self._cluster, list[Member](), list[str]()
        launcher(start=role)

        def is_decided() -> bool:
            if not found and not failed:
                new = (one for one in cluster.live(role) if id(one) not in self._known and cluster.is_of_use(one))
                found.extend(itertools.islice(new, 1))
                self._known.update((id(member), member) for member in found)
            if not found and not failed and (failures := self._given_up.get(role)):
                failed.append(failures.pop(0))
            return bool(found or failed)

        timeout_s = cluster.plan.timeouts.start_timeout_s
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._until(is_decided)
        if not found:
            raise Unavailable(failed[0] if failed else f"no {role} worker came within {timeout_s:g} s")
        return found[0]

    async def _until(self, condition: Callable[[], bool]) -> None:
        if not condition():
            future = asyncio.get_running_loop().create_future()
            self._waits.append((condition, future))
            await future


def _held(experts: Sequence[int], layers: Sequence[Sequence[int]]) -> str:
    """In words; `layers`: [] where all are alike."""
    if not layers:
        return " ".join(map(str, experts))
    least, most = min(map(len, layers)), max(map(len, layers))
    return f"{least if least == most else f'{least} to {most}'} of each of {len(layers)} layers"
