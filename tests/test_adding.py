"""Workers that an operator adds: two orders at a time, those that cannot work, and no room for more."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from msi.control.operator import Operator
from msi.control.orders import Order
from msi.settings import SlowWorkers, Timeouts


class Instance:
    """What an operator sees of one with room for four expert workers, of which two are there."""

    def __init__(self):
        self.members = []
        self.plan = SimpleNamespace(
            most={"attention": 2, "expert": 4},
            is_colocated=False,
            timeouts=Timeouts(start_timeout_s=0.3),
            slow=SlowWorkers(),
        )
        self.started = []
        self.operator = Operator(self, None, None, lambda instructions: None, "ipc:///here", lambda: 0.0)
        self.operator.launcher = lambda start: self.started.append(start)
        self.operator._status = dict
        for number in range(2):
            self.comes(f"expert-{number}")

    def comes(self, worker_id, is_ready=True):
        self.members.append(SimpleNamespace(worker_id=worker_id, role="expert", pid=1, is_ready=is_ready))
        self.operator.look()
        return self.members[-1]

    def live(self, role):
        return [one for one in self.members if one.role == role]

    def is_of_use(self, member):
        return member.is_ready

    def take_staying(self):
        return []

    async def add(self):
        """The task of an order that has been heard."""
        order = asyncio.ensure_future(self.operator.obey(Order(0, "add", role="expert")))
        await asyncio.sleep(0)
        return order


async def test_of_two_at_a_time_each_gets_a_worker_of_its_own():
    instance = Instance()
    orders = [await instance.add(), await instance.add()]
    assert instance.started == ["expert"] * 2
    instance.comes("expert-2")
    instance.comes("expert-3")
    assert [(await one).text for one in orders] == ["expert-2 (pid 1) has come", "expert-3 (pid 1) has come"]


@pytest.mark.parametrize("is_there", [False, True])
async def test_who_is_on_the_way_takes_a_place(is_there):
    """And one place, not two, once it is there and loads."""
    instance = Instance()
    orders = [await instance.add(), await instance.add()]
    if is_there:
        loading = instance.comes("expert-2", is_ready=False)
    third = await (await instance.add())
    on_their_way = "1" if is_there else "2"
    assert third.failure.startswith(
        f"there is room for 4 expert workers, and so many are there, with {on_their_way} on their way; start"
    )
    if is_there:
        loading.is_ready = True
        instance.operator.look()
    for number in range(2 + is_there, 4):
        instance.comes(f"expert-{number}")
    assert [(await one).failure for one in orders] == ["", ""]
    assert (await (await instance.add())).failure.startswith(
        "there is room for 4 expert workers, and so many are there;"
    )
    assert len(instance.started) == 2


async def test_one_that_cannot_work_fails_its_order_and_no_other():
    instance = Instance()
    orders = [await instance.add(), await instance.add()]
    instance.operator.given_up("expert-2", "expert", "there is no memory for it")
    instance.operator.given_up("attention-7", "attention", "nobody asked")
    assert (await orders[0]).failure == "expert-2 was started and cannot work: there is no memory for it"
    instance.comes("expert-3")
    assert (await orders[1]).text == "expert-3 (pid 1) has come"
    late = await instance.add()  # what an order before it was told is not told again
    assert (await late).failure == "no expert worker came within 0.3 s"


async def test_who_came_back_while_another_role_was_waited_for_is_nobodys_newcomer():
    instance = Instance()
    order = await instance.add()
    back = SimpleNamespace(worker_id="attention-0", role="attention", pid=7, is_ready=True)
    instance.members.append(back)
    instance.operator.look()
    other = asyncio.ensure_future(instance.operator.obey(Order(1, "add", role="attention")))
    await asyncio.sleep(0)
    instance.comes("expert-2")
    assert (await order).text == "expert-2 (pid 1) has come"
    assert (await other).failure == "no attention worker came within 0.3 s"
