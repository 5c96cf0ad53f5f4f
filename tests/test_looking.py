"""Whether a core is free for who looks rather than sleeps: the decision, by values, and what it is made of."""

from __future__ import annotations

import math
import os
import threading
import time

import pytest

from msi.net.looking import Cores, Seen, Vain, is_free, quota_of, throttled_in


@pytest.mark.parametrize(
    ("num_cores", "quota", "before", "now", "free"),
    [
        (2, math.inf, Seen(1, 7, 0), Seen(2, 7, 0), True),
        (2, math.inf, Seen(2, 7, 0), Seen(3, 7, 0), False),  # more threads than cores
        (64, math.inf, Seen(3, 7, 0), Seen(9, 8, 0), False),  # another one was given ours: we may use few of them
        (64, math.inf, Seen(3, 8, 0), Seen(9, 8, 0), True),
        (64, 8.0, Seen(3, 7, 4), Seen(3, 7, 4), True),
        (64, 8.0, Seen(3, 7, 4), Seen(3, 7, 5), False),  # the quota ran out
        (64, 1.5, Seen(1, 0, 0), Seen(1, 0, 0), False),  # there is none to spare
        (2, math.inf, Seen(0, 0, 0), Seen(0, 0, 0), True),  # the kernel does not say how many run
    ],
)
def test_a_core_is_free(num_cores, quota, before, now, free):
    assert is_free(num_cores, quota, before, now) == free


def test_who_looks_in_vain_lets_twice_as_many_opportunities_go_by():
    vain, looks = Vain(), []
    for number in range(20):
        if vain.may_look():
            looks.append(number)
            vain.looked(is_rewarded=number == 14)
    assert looks == [0, 2, 6, 14, 15, 17]


def test_what_is_to_be_skipped_can_be_taken_all_at_once():
    vain = Vain()
    while vain.num_to_skip < 7:
        if vain.may_look():
            vain.looked(is_rewarded=False)
    assert vain.skip_all() == 7
    assert vain.num_to_skip == 0
    assert vain.may_look()
    vain.looked(is_rewarded=False)
    assert vain.num_to_skip == 15


def machine(tmp_path, groups, **files):
    proc, top = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "self/cgroup").write_text(groups)
    (proc / "loadavg").write_text("0.95 1.20 1.10 2/417 12345\n")
    for name, text in files.items():
        path = top / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return proc, top


@pytest.mark.parametrize(
    ("groups", "files", "quota", "counted_by"),
    [
        ("0::/\n", {}, math.inf, None),
        ("0::/\n", {"cpu.max": "max 100000\n"}, math.inf, None),
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5, "cpu.stat"),
        ("0::/a/b\n", {"a/cpu.max": "400000 100000\n", "a/b/cpu.max": "max 100000\n"}, 4.0, "a/cpu.stat"),
        ("0::/a/b\n", {"a/cpu.max": "400000 100000\n", "a/b/cpu.max": "300000 100000\n"}, 3.0, "a/b/cpu.stat"),
        ("4:memory:/x\n2:cpu,cpuacct:/y\n", {"cpu,cpuacct/y/cpu.cfs_quota_us": "250000\n",
         "cpu,cpuacct/y/cpu.cfs_period_us": "100000\n", "memory/x/cpu.max": "1 1\n"}, 2.5, "cpu,cpuacct/y/cpu.stat"),
        ("1:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, math.inf, None),
        ("0::/\n", {"cpu.max": "what is this\n"}, math.inf, None),
    ],
)  # fmt: skip
def test_a_quota_is_that_of_the_narrowest_group(tmp_path, groups, files, quota, counted_by):
    proc, top = machine(tmp_path, groups, **files)
    assert quota_of(proc, top) == (quota, counted_by and top / counted_by)


def test_what_a_quota_counts_is_found_or_nothing():
    assert throttled_in("usage_usec 5\nnr_periods 9\nnr_throttled 3\n") == 3
    assert throttled_in("usage_usec 5\n") == throttled_in("") == throttled_in("nr_throttled") == 0


def test_cores_are_those_of_the_host_and_quotas_are_asked_again_now_and_then(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr("msi.net.looking._num_pushed", lambda: 0)
    proc, top = machine(tmp_path, "0::/\n", **{"cpu.max": "200000 100000\n", "cpu.stat": "nr_throttled 0\n"})
    now = 0.0
    cores = Cores(proc=proc, groups=top, clock=lambda: now)
    assert cores.one_is_free()
    (proc / "loadavg").write_text("0.95 1.20 1.10 3/417 12345\n")
    assert not cores.one_is_free()
    (proc / "loadavg").write_text("0.95 1.20 1.10 2/417 12345\n")
    (top / "cpu.stat").write_text("nr_throttled 1\n")
    assert cores.one_is_free()
    now = 0.2
    assert not cores.one_is_free()
    assert cores.one_is_free()
    cores.close()
    cores.close()


def test_a_kernel_that_says_nothing_leaves_a_core_free(tmp_path, monkeypatch):
    monkeypatch.setattr("msi.net.looking._num_pushed", lambda: 0)  # not whether this thread was, on this machine
    cores = Cores(proc=tmp_path, groups=tmp_path)
    assert cores.quota == math.inf
    assert cores.one_is_free()
    cores.close()


def test_who_is_pushed_from_its_core_learns_of_it():
    """Two threads that never sleep on one core: each is pushed from it again and again."""
    found = []

    def look():
        os.sched_setaffinity(threading.get_native_id(), {min(os.sched_getaffinity(0))})
        ready.wait(10)
        cores = Cores()
        cores._count = 10**6  # whatever else runs here
        until = time.monotonic() + 10
        while time.monotonic() < until and not found:
            if not cores.one_is_free():
                found.append(True)
        cores.close()

    ready = threading.Barrier(2)
    threads = [threading.Thread(target=look) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found
