"""Workers and coordinators that die or freeze: every request ends in text or an error that names the worker.

That answers go on elsewhere as if nothing had happened is looked at in `test_attention_loss`.

Real processes, real signals. Time limits are generous; tools/ measures seconds.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from msi import Engine, RequestFailed, SamplingParams, Unavailable
from tests.everyday import mostly_thorough
from tests.tiny import save_tiny

ENDS_WITHIN_S = 20
RETURNS_WITHIN_S = 60
LONG = SamplingParams(max_tokens=450, temperature=0, ignore_eos=True)
SHORT = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)

pytestmark = [pytest.mark.timeout(180), pytest.mark.slow]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    save_tiny(path)
    return path


async def outcome(engine, prompt, params=LONG) -> tuple[str, int]:
    """How a request ended, and how many tokens came before."""
    count = 0
    try:
        async for output in engine.generate(prompt, params):
            count += len(output.token_ids)
    except (RequestFailed, Unavailable) as error:
        return str(error), count
    return "done", count


async def until(condition, within_s=RETURNS_WITHIN_S):
    deadline = time.monotonic() + within_s
    while not (result := await condition()):
        assert time.monotonic() < deadline, "did not happen in time"
        await asyncio.sleep(0.1)
    return result


async def running_requests(engine, count):
    """Long requests, all of which have produced tokens."""
    started = asyncio.Event()
    seen = set()

    async def one(index):
        tokens = 0
        try:
            async for output in engine.generate([5 + index] * 8, LONG):
                tokens += len(output.token_ids)
                seen.add(index)
                if len(seen) == count:
                    started.set()
        except (RequestFailed, Unavailable) as error:
            return str(error), tokens
        return "done", tokens

    tasks = [asyncio.create_task(one(index)) for index in range(count)]
    await asyncio.wait_for(started.wait(), ENDS_WITHIN_S)
    return tasks


def local(checkpoint, attention=2, expert=2, **options):
    return Engine.local(
        model=checkpoint, attention_workers=attention, expert_workers=expert, micro_batches=2, threads_per_worker=1,
        **options,
    )  # fmt: skip


async def serves_again(engine, former_pid, name):
    """The worker was started anew, and requests succeed on every attention worker."""

    async def is_back():
        return engine.pids[name] != former_pid and engine.status[0]

    await until(is_back)

    async def all_succeed():
        results = await asyncio.gather(*(outcome(engine, [7, 8, 9], SHORT) for _ in range(6)))
        return all(result == ("done", 4) for result in results)

    await until(all_succeed)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
async def test_what_runs_waits_for_a_lost_expert_worker_which_is_taken_back(checkpoint, number):
    async with local(checkpoint) as engine:
        others = {name: pid for name, pid in engine.pids.items() if name != "expert-1"}
        tasks = await running_requests(engine, 4)
        pid = engine.pids["expert-1"]
        os.kill(pid, number)

        async def is_noticed():
            return not engine.status[0] or engine.pids["expert-1"] != pid  # which takes no time at all

        await until(is_noticed)
        if number == signal.SIGSTOP:
            os.kill(pid, signal.SIGCONT)
        results = await asyncio.wait_for(asyncio.gather(*tasks), RETURNS_WITHIN_S)
        assert results == [("done", 450)] * 4
        if number == signal.SIGSTOP:
            await until(lambda: _succeeds(engine))
            assert engine.pids["expert-1"] == pid
        else:
            await serves_again(engine, pid, "expert-1")
        assert {name: pid for name, pid in engine.pids.items() if name != "expert-1"} == others


async def _succeeds(engine):
    return await outcome(engine, [7, 8, 9], SHORT) == ("done", 4)


@pytest.mark.parametrize("number", mostly_thorough([signal.SIGKILL, signal.SIGSTOP]))
async def test_a_lost_attention_worker_costs_no_request_and_is_taken_back(checkpoint, number):
    async with local(checkpoint) as engine:
        tasks = await running_requests(engine, 4)
        pid = engine.pids["attention-1"]
        os.kill(pid, number)
        results = await asyncio.wait_for(asyncio.gather(*tasks), 3 * ENDS_WITHIN_S)
        assert results == [("done", 450)] * 4
        assert await outcome(engine, [7, 8, 9], SHORT) == ("done", 4), "the other worker serves on"
        if number == signal.SIGSTOP:
            os.kill(pid, signal.SIGCONT)

            async def is_back():
                workers = (await engine.stats()).workers
                return any(w.worker_id == "attention-1" and w.state == "ready" and w.incarnation > 0 for w in workers)

            await until(is_back)
            assert engine.pids["attention-1"] == pid
        else:
            await serves_again(engine, pid, "attention-1")


async def test_without_its_experts_a_new_request_waits_and_then_runs(checkpoint):
    async with local(checkpoint, attention=1) as engine:
        pid = engine.pids["expert-0"]
        os.kill(pid, signal.SIGKILL)

        async def is_noticed():
            return not engine.status[0] or engine.pids["expert-0"] != pid  # which takes no time at all

        await until(is_noticed)
        is_ready, sentence = engine.status
        assert is_ready or "expert" in sentence
        assert await asyncio.wait_for(outcome(engine, [7, 8, 9], SHORT), 60) == ("done", 4)


async def test_the_death_of_a_coordinator_without_grace_ends_requests_and_leaves_no_process(checkpoint):
    async with local(checkpoint, attention=1, expert=1, coordinator_grace_s=0.5) as engine:
        pids = list(engine.pids.values())
        tasks = await running_requests(engine, 2)
        os.kill(engine.pids["coordinator"], signal.SIGKILL)
        for message, _ in await asyncio.wait_for(asyncio.gather(*tasks), ENDS_WITHIN_S):
            assert "coordinator" in message
        with pytest.raises(Unavailable, match="coordinator"):
            await anext(engine.generate([5], SHORT))
    assert not [pid for pid in pids if is_alive(pid)]


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


async def test_the_context_leaves_no_process_socket_or_shared_memory_behind(checkpoint):
    fds = set(os.listdir("/proc/self/fd"))
    async with local(checkpoint) as engine:
        pids = list(engine.pids.values())
        assert await outcome(engine, [7, 8, 9], SHORT) == ("done", 4)
        assert all(is_alive(pid) for pid in pids)
        sockets = sockets_of(pids)
        folders = {Path(path).parent for path in sockets.values() if path.startswith("/")}
        assert any(folder.name.startswith("msi-") for folder in folders)
    assert not [pid for pid in pids if is_alive(pid)]
    assert not sockets.keys() & all_sockets().keys()
    assert not [folder for folder in folders if folder.exists() and folder.name.startswith("msi-")]
    assert not [name for name in os.listdir("/dev/shm") if "msi" in name]  # memory here never has a name
    assert len(set(os.listdir("/proc/self/fd")) - fds) <= 1  # the loop's own, made at first use


def all_sockets() -> dict[str, str]:
    """Local sockets of this machine: inode to path, or "" for those without one."""
    lines = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()[1:]]
    return {fields[6]: fields[7] if len(fields) > 7 else "" for fields in lines}


def sockets_of(pids: list[int]) -> dict[str, str]:
    """Those that some processes hold."""
    held = {os.readlink(link) for pid in pids for link in Path(f"/proc/{pid}/fd").iterdir() if link.is_symlink()}
    return {inode: path for inode, path in all_sockets().items() if f"socket:[{inode}]" in held}


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
async def test_no_orphan_outlives_the_process_that_embeds_the_engine(checkpoint, number):
    script = (
        "import asyncio, sys\n"
        "from msi import Engine\n"
        "async def main():\n"
        f"    async with Engine.local(model={str(checkpoint)!r}, threads_per_worker=1) as engine:\n"
        "        print(*engine.pids.values(), flush=True)\n"
        "        await asyncio.sleep(1000)\n"
        "asyncio.run(main())\n"
    )
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", script, stdout=subprocess.PIPE)
    try:
        pids = [int(word) for word in (await asyncio.wait_for(process.stdout.readline(), 60)).split()]
        assert len(pids) == 3
        os.kill(pids[1], signal.SIGSTOP)  # even one that does not run
    finally:
        process.send_signal(number)
        await process.wait()

    async def all_gone():
        return not [pid for pid in pids if is_alive(pid)]

    await until(all_gone, 20)


async def test_a_worker_that_is_killed_again_and_again_is_started_again_and_the_others_live(checkpoint):
    """Its fourth death ended the whole instance."""
    async with local(checkpoint, attention=1) as engine:
        others = {name: pid for name, pid in engine.pids.items() if name != "expert-0"}
        for _ in range(4):
            pid = engine.pids["expert-0"]
            os.kill(pid, signal.SIGKILL)
            await serves_again(engine, pid, "expert-0")
        assert {name: pid for name, pid in engine.pids.items() if name != "expert-0"} == others


async def test_a_worker_that_is_killed_at_any_moment_of_its_start_is_replaced(checkpoint):
    """The next one was refused for the sake of the dead one, and that ended the instance."""
    async with local(checkpoint, attention=1) as engine:
        pid = engine.pids["expert-0"]
        for after_s in (0.0, 0.5, 1.0, 1.5, 2.0):
            os.kill(pid, signal.SIGKILL)

            async def is_started(former=pid):
                return engine.pids["expert-0"] != former

            await until(is_started)
            pid = engine.pids["expert-0"]
            await asyncio.sleep(after_s)
        await serves_again(engine, 0, "expert-0")


async def test_the_end_of_a_local_attention_worker_is_told_by_whoever_sees_it(checkpoint, monkeypatch):
    """It took 2.2 to 6 s, until somebody missed its heartbeats. tools/bench_losses.py measures how long it takes.

    A worker that is started again at once may have a new life, which has no reason, before anybody looks.
    """
    monkeypatch.setattr("msi.control.restarts.restart_delay_s", lambda num_failed: 2.0)
    async with local(checkpoint) as engine:
        tasks = await running_requests(engine, 4)
        os.kill(engine.pids["attention-1"], signal.SIGKILL)

        async def has_gone_on_elsewhere():
            stats = await engine.stats()
            (worker,) = (one for one in stats.workers if one.worker_id == "attention-1")
            return stats.counters["resumptions"] and worker.reason

        assert await until(has_gone_on_elsewhere) == "it was killed by signal 9"
        assert await asyncio.gather(*tasks) == [("done", 450)] * 4
