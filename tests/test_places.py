"""Many requests for an instance that takes few: those that it has no room for wait, and are no errors."""

from __future__ import annotations

import asyncio

import pytest

from msi import LLM, SamplingParams, Unavailable
from msi.offline import places
from msi.offline.places import Places


class Instance:
    """Takes so many choices at a time, and refuses others."""

    def __init__(self, room):
        self.room = room
        self.taken = self.most = self.refused = 0

    async def answer(self, num_choices):
        if self.taken + num_choices > self.room:
            self.refused += 1
            raise Unavailable("it is full")
        self.taken += num_choices
        self.most = max(self.most, self.taken)
        await asyncio.sleep(0)
        self.taken -= num_choices
        return num_choices


@pytest.mark.parametrize(("most", "room"), [(4, 100), (100, 4), (1, 4), (7, 7), (100, 1000)])
async def test_all_are_answered_whatever_there_is_room_for(most, room):
    instance = Instance(room)
    asker = Places(most, lambda: True)
    wanted = [1 + at % min(room, 5) for at in range(60)]
    async with asyncio.timeout(30):
        found = await asyncio.gather(
            *(asker.run(count, lambda count=count: instance.answer(count)) for count in wanted)
        )
    assert found == wanted
    assert instance.most <= max(most, 5)
    assert room < most or not instance.refused


async def test_one_with_more_choices_than_places_is_asked_alone():
    instance = Instance(100)
    asker = Places(3, lambda: True)
    assert await asyncio.gather(*(asker.run(50, lambda: instance.answer(50)) for _ in range(5))) == [50] * 5
    assert instance.most == 50


async def test_what_takes_nothing_is_not_waited_for(monkeypatch):
    with pytest.raises(Unavailable):
        await Places(3, lambda: False).run(1, lambda: Instance(0).answer(1))
    monkeypatch.setattr(places, "PATIENCE_S", 0.05)
    monkeypatch.setattr(places, "AGAIN_AFTER_S", 0.01)
    with pytest.raises(Unavailable):
        await Places(3, lambda: True).run(1, lambda: Instance(0).answer(1))


async def test_cancelling_gives_the_place_to_the_next():
    asker = Places(1, lambda: True)
    first = asyncio.ensure_future(asker.run(1, asyncio.Event().wait))
    await asyncio.sleep(0)
    second = asyncio.ensure_future(asker.run(1, lambda: Instance(1).answer(1)))
    await asyncio.sleep(0)
    first.cancel()
    assert await asyncio.wait_for(second, 10) == 1


def test_an_instance_with_little_room_answers_many(tiny_model):
    options = {
        "transport": "inproc",
        "threads_per_worker": 1,
        "micro_batches": 1,
        "max_num_seqs": 2,
        "max_num_waiting": 2,
    }
    params = SamplingParams(max_tokens=2, ignore_eos=True, n=2)
    with LLM(tiny_model, **options) as llm:
        answers = llm.generate([f"It is {at}" for at in range(12)], params)
    assert [len(answer.outputs) for answer in answers] == [2] * 12
