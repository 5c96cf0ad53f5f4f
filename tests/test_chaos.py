"""tools/chaos.py: what it counts, and a short run in which no client notices a lost attention worker but by a pause."""

from __future__ import annotations

import asyncio
import json
import os
import sys

import pytest

from tests.everyday import mostly_thorough
from tests.hosts import why_not
from tests.test_pages import ROOT
from tools.chaos import left_over
from tools.hostility.chaos_report import Run, differences, draw, summary, write
from tools.hostility.disasters import Disaster, num_ready
from tools.hostility.processes import Held
from tools.hostility.streams import BUCKET_S, Gap, PacedStream
from tools.hostility.wire import Target

REASON = why_not()


@pytest.mark.parametrize(
    ("given", "changed", "repeated", "lost"),
    [("abcd", 0, 0, 0), ("abxd", 1, 0, 0), ("abcdcd", 0, 2, 0), ("ab", 0, 0, 2), ("", 0, 0, 4)],
)
def test_a_wrong_answer_is_said_by_how_it_is_wrong(given, changed, repeated, lost):
    assert differences("abcd", given) == {"changed": changed, "repeated": repeated, "lost": lost}


def paced(pieces, gaps=()):
    """Pieces per second of one stream."""
    stream = PacedStream(
        "stream-0", Target("here", 1), "a", 1, text="abcd", gaps=list(gaps), wrong=["abxd", "abcdcd"], num_wrong=2
    )
    for second, count in enumerate(pieces):
        for number in range(count):
            stream.pieces[int((second + number / count) / BUCKET_S)] += 1
    return stream


def test_stalls_recovery_and_what_throughput_was_lost_are_measured_against_the_calm():
    stream = paced([10] * 10 + [10, 0, 0, 10, 10, 10, 10, 10, 10, 10], [Gap(5.0, 0.1)])
    run = Run([stream])
    run.begin_storm(10.0)
    run.disasters.append(Disaster("kill-attention", "kill -9 of attention-0", 11.0, 14.0))
    stream.gaps += [Gap(13.0, 2.1), Gap(18.0, 0.2)]
    assert summary(run)["num_faults"] == 0, "nothing is measured of it yet"
    run.settle(20.0)
    assert stream.gaps == [], "it grows no further"
    run.storm_until = 20.0
    seen = summary(run)
    assert (seen["num_changed_answers"], seen["changed_characters"], seen["repeated_characters"]) == (2, 1, 2)
    assert (seen["calm_stall_ms"], seen["stall_max_ms"]) == (100.0, 2100.0)
    assert seen["throughput_lost"] == 0.2
    (fault,) = seen["faults"]
    assert 1.7 <= fault["recovery_s"] <= 2.0
    assert fault["whole_again_s"] == 3.0
    assert seen["by_kind"] == {"kill-attention": {"count": 1, "stall_median_ms": 2100.0, "stall_max_ms": 2100.0}}


def test_what_was_seen_is_whole_on_the_disk_at_any_time_and_a_picture_is_drawn_of_it(tmp_path):
    pytest.importorskip("matplotlib")
    run = Run([paced([10] * 20)])
    run.begin_storm(10.0)
    run.disasters.append(Disaster("kill-expert", "kill -9 of expert-0", 11.0, 14.0))
    run.settle(20.0)
    run.storm_until = 20.0
    for _ in range(2):
        write(tmp_path / "seen.json", summary(run))
    assert [one.name for one in tmp_path.iterdir()] == ["seen.json"]
    draw(tmp_path / "seen", json.loads((tmp_path / "seen.json").read_text()))
    assert (tmp_path / "seen.png").stat().st_size > 1000


def test_what_a_process_holds_more_than_before_is_said():
    before, after = {"expert-0": Held(1, 20, 6)}, {"expert-0": Held(9, 29, 15), "expert-1": Held(9, 8, 8)}
    assert left_over(before, after) == [
        "expert-0 holds 29 descriptors; 20 before", "expert-0 has 15 shared mappings; 6 before",
    ]  # fmt: skip


IN_A_NAMESPACE = """
import asyncio, json, socket, time
from tools.hostility.disasters import troubled
from tools.hostility.network import Trouble, enter_namespace

async def main():
    async def answer(reader, writer):
        while words := await reader.read(1 << 20):
            writer.write(words)
    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    async def there_and_back(size):
        began = time.monotonic()
        writer.write(bytes(size))
        await reader.readexactly(size)
        return time.monotonic() - began
    seen = {}
    for kind in ("delay-packets", "lose-packets"):
        trouble = Trouble(kind)
        seen[kind] = await there_and_back(4), await there_and_back(1 << 20)
        trouble.end()
        await there_and_back(1 << 20)
    seen["what"] = (await troubled("lose-packets", 0.01)).what
    print(json.dumps(seen))

enter_namespace()
asyncio.run(main())
"""


@pytest.mark.skipif(bool(REASON), reason=REASON)
async def test_packets_are_late_or_lost_for_a_while_and_connections_live_on(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(IN_A_NAMESPACE)
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(script), env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    told, complaints = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 0, complaints.decode()
    seen = json.loads(told)
    assert min(seen["delay-packets"]) >= 0.02, "each is ten milliseconds late at the least, there and back"
    assert seen["what"] == "one packet in twenty lost for 0.0 s"


def test_workers_that_serve_are_counted_by_the_metrics():
    lines = [
        '{role="attention",state="ready"} 2.0',
        '{role="expert",state="lost"} 1.0',
        '{role="expert",state="ready"} 1.0',
    ]
    assert num_ready("\n".join(f"msi_workers{line}" for line in lines)) == 3


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("transport", mostly_thorough(["tcp", "shm"]))
async def test_attention_workers_die_and_are_cut_off_and_no_answer_changes(tmp_path, transport):
    process = await asyncio.create_subprocess_exec(
        sys.executable, "tools/chaos.py", "--minutes", "0.4", "--every", "5", "--calm", "3", "--streams", "4",
        "--max-tokens", "100", "--transport", transport, "--json", str(tmp_path / "seen.json"),
        cwd=ROOT, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    _, complaints = await asyncio.wait_for(process.communicate(), 280)
    assert process.returncode == 0, complaints.decode()
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert seen["num_faults"] >= 2
    assert (seen["num_failed"], seen["num_changed_answers"], seen["deaths"], seen["leftovers"]) == (0, 0, [], [])
