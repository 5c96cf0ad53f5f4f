"""tools/chaos.py: what it counts, and a short run in which no client notices a lost attention worker but by a pause."""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys

import pytest

from tests.everyday import mostly_thorough, only_thorough
from tests.hosts import why_not
from tests.test_pages import ROOT
from tools import chaos
from tools.chaos import having_stood_by, left_over, why_not_together
from tools.hostility import cluster, disasters
from tools.hostility.chaos_report import Run, differences, draw, summary, write
from tools.hostility.cluster import has_successor, lines_of
from tools.hostility.disasters import KINDS, LOSS, Disaster, Disasters, num_ready
from tools.hostility.processes import Held, TcpPorts
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


def test_a_coordinator_that_took_over_may_hold_its_way_to_the_former_one_too():
    before = {"coordinator": Held(1, 33, 0), "coordinator-2": Held(1, 21, 1)}
    before["coordinator"] = having_stood_by(before)
    assert left_over(before, {"coordinator": Held(1, 42, 0)}) == []
    assert left_over(before, {"coordinator": Held(1, 63, 0)}) == ["coordinator holds 63 descriptors; 54 before"]


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


# -- a coordinator lost for good --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("faults", "has_standby", "sentence"),
    [
        ([LOSS], False, "--faults lose-coordinator needs --standby"),
        (["kill-expert", "kill-coordinator"], True, "--faults kill-coordinator is not for --standby"),
        (["add-expert"], True, "--faults add-expert is not for --standby"),
        ([LOSS, "kill-expert", "drain-expert", "lose-packets"], True, ""),
        (list(KINDS), False, ""),
    ],
)
def test_faults_that_cannot_be_are_refused_by_a_sentence(monkeypatch, capsys, faults, has_standby, sentence):
    why = why_not_together(faults, has_standby=has_standby)
    assert why.startswith(sentence)
    assert bool(why) == bool(sentence)
    words = [*(["--standby"] if has_standby else []), "--faults", *faults]
    if not why:
        assert chaos.parse(words).faults == faults
        return
    with pytest.raises(SystemExit) as ended:
        chaos.parse(words)
    assert ended.value.code == 2
    assert why in capsys.readouterr().err


def test_with_a_standby_coordinators_are_lost_for_good_by_default():
    assert chaos.parse([]).faults == list(KINDS)
    faults = chaos.parse(["--standby"]).faults
    assert faults.index(LOSS) == KINDS.index("kill-coordinator")
    assert "kill-coordinator" not in faults
    assert not why_not_together(faults, has_standby=True)


CLUSTER = {
    "launcher": 1, "coordinator": 2, "coordinator-2": 3, "attention-0": 4, "attention-1": 5, "expert-0": 6,
    "gateway": 7,
}  # fmt: skip


async def test_the_coordinator_that_leads_is_the_one_that_is_lost_and_who_stands_by_is_the_elder_then(monkeypatch):
    pids, killed = dict(CLUSTER), []

    def kill(pid, _):
        killed.append(pid)
        pids["coordinator"], pids["coordinator-2"] = pids["coordinator-2"], pid + 10

    monkeypatch.setattr(disasters, "family", lambda _: dict(pids))
    monkeypatch.setattr(disasters, "send_signal", kill)
    striking = Disasters(1, random.Random(5), [LOSS])
    struck = [one for _ in range(3) for one in await striking.strike()]
    assert killed == [2, 3, 12]
    assert {(one.kind, one.what) for one in struck} == {(LOSS, "the coordinator that leads lost for good")}


async def test_the_seed_fixes_who_is_struck_when(monkeypatch):
    monkeypatch.setattr(disasters, "family", lambda _: CLUSTER)
    monkeypatch.setattr(disasters, "send_signal", lambda *_: None)

    async def struck(seed):
        striking = Disasters(1, random.Random(seed), [LOSS, "kill-expert", "kill-attention"])
        return [one.what for _ in range(12) for one in await striking.strike()]

    assert await struck(3) == await struck(3)
    assert await struck(3) != await struck(4)
    assert len(set(await struck(3))) == 4, "three kinds, one of them of either attention worker"


def test_what_is_started_in_place_of_a_lost_coordinator_stands_by_for_the_other():
    lines = lines_of(["model"], {"attention": 1, "expert": 2}, ("tcp://h:1", "tcp://h:2"), ["--port", "80"])
    coordinating = ("model", "--role", "coordinator", "--no-gateway", "--coordinator")
    assert lines["coordinator"].first == (*coordinating, "tcp://h:1")
    assert lines["coordinator"].again == (*coordinating, "tcp://h:1", "--standby", "tcp://h:2")
    assert lines["standby"].first == lines["standby"].again == (*coordinating, "tcp://h:2", "--standby", "tcp://h:1")
    where = ("--coordinator", "tcp://h:1,tcp://h:2")
    assert lines["expert-1"].again == ("model", "--role", "expert", "--worker-id", "expert-1", *where)
    assert lines["gateway"].again == ("--role", "gateway", *where, "--port", "80")
    assert list(lines) == ["coordinator", "standby", "attention-0", "expert-0", "expert-1", "gateway"]


@pytest.mark.parametrize(
    ("of_the_elder", "of_the_younger", "is_whole"),
    [
        (TcpPorts(frozenset({21}), frozenset()), TcpPorts(frozenset(), frozenset({21})), True),
        (TcpPorts(frozenset(), frozenset()), TcpPorts(frozenset(), frozenset({21})), False),
        (TcpPorts(frozenset({21}), frozenset()), TcpPorts(frozenset(), frozenset({22})), False),
    ],
    ids=["one leads and the other hears it", "nobody has taken over yet", "who stands by has not come yet"],
)
def test_an_instance_is_whole_once_a_coordinator_leads_and_another_hears_it(
    monkeypatch, of_the_elder, of_the_younger, is_whole
):
    ports = {2: of_the_elder, 3: of_the_younger}
    monkeypatch.setattr(cluster, "coordinator_address", lambda pid: {2: "tcp://h:21", 3: "tcp://h:22"}[pid])
    monkeypatch.setattr(cluster, "tcp_ports", ports.__getitem__)
    assert has_successor(CLUSTER) is is_whole
    assert not has_successor({"coordinator": 2})


@only_thorough
@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_coordinators_are_lost_for_good_one_after_the_other_and_no_answer_changes(tmp_path):
    await survived(tmp_path, "--standby", "--faults", LOSS, "--minutes", "0.6")


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("transport", mostly_thorough(["tcp", "shm"]))
async def test_attention_workers_die_and_are_cut_off_and_no_answer_changes(tmp_path, transport):
    await survived(tmp_path, "--transport", transport, "--minutes", "0.4")


async def survived(folder, *words):
    process = await asyncio.create_subprocess_exec(
        sys.executable, "tools/chaos.py", "--every", "5", "--calm", "3", "--streams", "4", "--max-tokens", "100",
        "--json", str(folder / "seen.json"), *words,
        cwd=ROOT, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    _, complaints = await asyncio.wait_for(process.communicate(), 280)
    assert process.returncode == 0, complaints.decode()
    seen = json.loads((folder / "seen.json").read_text())
    assert seen["num_faults"] >= 2
    assert (seen["num_failed"], seen["num_changed_answers"], seen["deaths"], seen["leftovers"]) == (0, 0, [], [])
