"""Profiles: what is read and refused, what lies between measured points, and what contention does to stages."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from msi.errors import ConfigError
from msi.planner.interpolation import Curve, Surface, fit_line
from msi.planner.profile import (
    AttentionPoint,
    CommPoint,
    ExpertPoint,
    Fits,
    PassPoint,
    Profile,
    RoutingPoint,
    SchedulingPoint,
    read_profile,
    to_json,
)
from msi.planner.profiled_costs import ProfiledCosts, StageConditions
from msi.planner.stage_costs import StageCosts
from msi.precision import Precision
from msi.profiler.process import passes_of_prompts, time_scheduling
from msi.settings import SchedulerLimits

# alone T_a = 1 + b (1 + s/100) ms, T_e = active (2 + rows per expert) ms; overlapped twice and 1.5 times as much
PROFILE = Profile(
    device="cpu",
    host="a processor, 2 cores",
    num_cores=2,
    date="2026-11-22",
    model="mid",
    config_digest="ab" * 32,
    precision=Precision.of("float32"),
    attention=tuple(
        AttentionPoint(1, contention, b, s, factor * (1 + b * (1 + s / 100)) / 1e3)
        for contention, factor in (("alone", 1), ("overlapped", 2))
        for b in (1, 4, 16)
        for s in (100, 200)
    ),
    expert=tuple(
        ExpertPoint(1, contention, 8, active, active * rows, factor * active * (2 + rows) / 1e3)
        for contention, factor in (("alone", 1), ("overlapped", 1.5))
        for active in (1, 8)
        for rows in (1, 4)
    ),
    passes=tuple(
        PassPoint(1, contention, seqs, factor * (10 + seqs) / 1e3)
        for contention, factor in (("alone", 1), ("overlapped", 2))
        for seqs in (1, 16)
    ),
    comm=(CommPoint("inproc", 100, 1e-4), CommPoint("shm", 1000, 2e-4), CommPoint("shm", 3000, 4e-4)),
    scheduling=(SchedulingPoint(1, 1e-3), SchedulingPoint(11, 2e-3)),
    routing=(RoutingPoint(1, 2.0), RoutingPoint(5, 4.0), RoutingPoint(9, 7.0)),
)
MSI_PROFILE = "from msi_launch.profile import main; main()"
ROOT = Path(__file__).parent.parent
ONE_BY_ONE = StageConditions(threads=1, num_experts=8, transport="shm")


def values() -> dict:
    return json.loads(json.dumps(to_json(PROFILE)))


# -- the file --------------------------------------------------------------------------------------------------------


def test_what_is_written_reads_back(tmp_path):
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(to_json(PROFILE)))
    assert read_profile(path) == read_profile(str(path)) == read_profile(values()) == PROFILE


def test_the_file_has_the_documented_keys():
    assert list(values()) == [
        "schema_version", "kind", "device", "host", "num_cores", "date", "model", "config_digest", "dtype",
        "precision", "attention", "expert", "pass", "comm", "control",
    ]  # fmt: skip
    assert values()["attention"][0] == {
        "threads": 1, "contention": "alone", "num_tokens": 1, "context_len": 100, "seconds": 0.003,
    }  # fmt: skip


def test_control_may_be_left_out():
    without = values()
    del without["control"]
    assert (read_profile(without).scheduling, read_profile(without).routing) == ((), ())
    with pytest.raises(ConfigError, match="the profile of mid has no routing; measure it"):
        read_profile(without).active_experts(8, 4)


def changed(path: str, value: object) -> dict:
    """The profile with one value replaced, or left out if it is None."""
    found = copy.deepcopy(values())
    *parents, last = [int(part) if part.isdigit() else part for part in path.split("/")]
    inner = found
    for part in parents:
        inner = inner[part]
    if value is None:
        del inner[last]
    else:
        inner[last] = value
    return found


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        ("kind", "msi-plan", "kind 'msi-plan'; a profile has 'msi-profile'"),
        ("schema_version", 2, "schema_version 2, and 1 is read here; measure it again"),
        ("model", None, "has no model; is the file whole"),
        ("num_cores", 0, "num_cores is 0; it must be an integer above 0"),
        ("expert", None, "has no expert; is the file whole"),
        ("expert", [], "expert has no points; measure at least one"),
        ("comm", {}, "comm has no points"),
        ("comm/1", 3, r"comm\[1\] is 3; it must be an object"),
        ("attention/2/seconds", -0.5, r"attention\[2\].seconds is -0.5; it must be a number above 0"),
        ("attention/2/seconds", float("nan"), r"attention\[2\].seconds is nan"),
        ("attention/2/seconds", True, r"attention\[2\].seconds is True"),
        ("attention/2/num_tokens", -4, r"attention\[2\].num_tokens is -4; it must be an integer above 0"),
        ("attention/2/num_tokens", 1, r"the sizes of attention\[2\] do not ascend: \(1, 100\) after \(1, 200\)"),
        ("pass/1/num_seqs", 1, r"the sizes of pass\[1\] do not ascend"),
        ("comm/1/num_bytes", 3000, r"the sizes of comm\[2\] do not ascend: \(3000,\) after \(3000,\)"),
        ("pass/0/threads", None, r"has no pass\[0\].threads; is the file whole"),
        ("pass/0/contention", "busy", r"pass\[0\].contention is 'busy'; it must be alone or overlapped"),
        ("comm/0/transport", "pigeon", r"comm\[0\].transport is 'pigeon'; it must be inproc or shm or tcp"),
        ("expert/0/num_active_experts", 2, r"expert\[0\] has 2 active experts, more than its experts or its rows \(1"),
        ("control", 3, "control is 3; it must be an object"),
        ("control/scheduling/0/seconds", 0, r"scheduling\[0\].seconds is 0"),
        ("control/routing/1/num_tokens", 1, r"the sizes of routing\[1\] do not ascend"),
    ],
)
def test_a_profile_that_is_not_whole_is_refused_by_file_and_key(tmp_path, path, value, sentence):
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(changed(path, value)))
    with pytest.raises(ConfigError, match=sentence) as caught:
        read_profile(file)
    assert str(file) in str(caught.value)


def test_a_file_that_is_cut_off_is_refused(tmp_path):
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(values())[:-200])
    with pytest.raises(ConfigError, match=r"mine.json is not JSON, or only part of it .*; measure it again"):
        read_profile(file)


def test_a_file_that_is_not_there_or_no_object_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"none.json cannot be read: No such file"):
        read_profile(tmp_path / "none.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"list.json holds list; a profile is a JSON object"):
        read_profile(tmp_path / "list.json")
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"bytes.json is not JSON"):
        read_profile(tmp_path / "bytes.json")


# -- between points --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("points", "line"),
    [
        ([(1, 3), (2, 5), (3, 7)], (2, 1)),
        ([(0, 0), (1, 2), (2, 1)], (0.5, 0.5)),  # by hand: slope sum(dx dy) / sum(dx^2) = 1 / 2
        ([(1, 1), (2, 4)], (1.8, 0)),  # free: 3 x - 2; through the origin: 9 / 5
        ([(1, 5), (2, 3)], (0, 4)),  # falling
        ([(4, 6)], (0, 6)),
    ],
)
def test_lines_have_the_least_squares_and_nothing_below_zero(points, line):
    assert fit_line(points) == pytest.approx(line)


def test_a_curve_is_linear_between_points_flat_before_and_goes_on_after_them():
    curve = Curve({10: 1.0, 20: 3.0})
    assert [curve.at(x) for x in (5, 10, 15, 20, 30)] == pytest.approx([1, 1, 2, 3, 5])
    assert Curve({1: 3.0, 2: 2.0}).at(9) == 2.0  # what falls at the end is noise


def test_a_surface_is_linear_in_both_sizes_and_beyond_them():
    surface = Surface({(1, 10): 2.0, (1, 20): 4.0, (3, 10): 4.0, (3, 20): 10.0})
    assert surface.at(1, 15) == 3.0
    assert surface.at(2, 15) == 5.0
    assert surface.at(5, 10) == 6.0
    assert surface.at(0.5, 10) == 1.5
    assert surface.at(-9, 10) == 0.0
    assert surface.at(np.array([1, 2]), np.array([[10], [20]])).tolist() == [[2, 3], [4, 7]]


def test_the_papers_constants_by_hand():
    # at s=150: T_a = 1 + 2.5 b ms; of one of eight busy experts: T_e = 2 + rows ms
    assert PROFILE.fits(threads=1, context_len=150) == Fits(
        pytest.approx(2.5e-3), pytest.approx(1e-3), pytest.approx(1e-3), pytest.approx(2e-3)
    )
    with pytest.raises(ConfigError, match=r"no attention times of mid for 4 threads alone, but 1 alone, 1 overlapped"):
        PROFILE.fits(threads=4, context_len=150)


# -- costs -----------------------------------------------------------------------------------------------------------


def test_active_experts_are_those_that_the_router_was_seen_to_choose():
    assert PROFILE.active_experts(8, 3) == 3.0
    assert PROFILE.active_experts(4, 3) == 1.5  # a node with half of them
    assert PROFILE.active_experts(8, np.array([1, 9, 99])).tolist() == [2, 7, 8]


def test_one_micro_batch_at_a_time_has_the_times_measured_alone():
    costs: StageCosts = ProfiledCosts(PROFILE, ONE_BY_ONE)
    assert costs.attention_s(4, 4 * 150) == pytest.approx(11e-3)
    assert costs.expert_s(16, 8) == pytest.approx(32e-3)
    assert costs.expert_s(6, 3) == pytest.approx(12e-3)  # 2 rows each, 3 of 8 experts
    assert costs.pass_s(6) == pytest.approx(16e-3 + 1.5e-3)  # head and sampling, and the scheduler
    assert costs.comm_s(2000) == pytest.approx(3e-4)
    assert all(isinstance(one, float) for one in (costs.attention_s(4, 600), costs.expert_s(16, 8), costs.pass_s(1)))


def test_arrays_of_sizes_give_arrays():
    costs = ProfiledCosts(PROFILE, ONE_BY_ONE)
    b = np.array([1, 4, 8, 64])
    assert costs.attention_s(b, b * 150).tolist() == pytest.approx([3.5e-3, 11e-3, 21e-3, 161e-3])
    assert costs.expert_s(b * 2.0, np.minimum(b, 8)).shape == (4,)
    assert costs.comm_s(b).tolist() == [2e-4] * 4


def test_sides_that_compute_at_the_same_time_take_what_was_measured_overlapped():
    costs = ProfiledCosts(PROFILE, StageConditions(1, 8, "shm", num_micro_batches=2))
    assert costs.attention_s(4, 600) == pytest.approx(22e-3)
    assert costs.expert_s(16, 8) == pytest.approx(48e-3)
    assert costs.pass_s(6) == pytest.approx(32e-3 + 1.5e-3)


def test_the_longer_stage_is_disturbed_only_while_the_shorter_one_runs():
    costs = ProfiledCosts(PROFILE, StageConditions(1, 8, "shm", num_micro_batches=2)).settled(4, 600, 16, 8)
    assert costs.attention_s(4, 600) == pytest.approx(22e-3)  # runs beside the experts from start to end
    # 22 ms beside attention are 22/48 of the experts' work; the rest goes at the speed of 32 ms for all of it
    assert costs.expert_s(16, 8) == pytest.approx(22e-3 + (1 - 22 / 48) * 32e-3)
    alone = ProfiledCosts(PROFILE, ONE_BY_ONE)
    assert alone.settled(4, 600, 16, 8) is alone


def test_a_colocated_process_does_one_thing_at_a_time_and_sends_nothing():
    costs = ProfiledCosts(PROFILE, StageConditions(1, 8, "inproc", num_micro_batches=2, is_colocated=True))
    assert costs.attention_s(4, 600) == pytest.approx(11e-3)
    assert costs.comm_s(5000) == 0.0


def test_workers_of_one_side_compute_beside_each_other():
    costs = ProfiledCosts(PROFILE, StageConditions(1, 8, "shm", num_attention=2))
    assert costs.attention_s(4, 600) == pytest.approx(22e-3)
    assert costs.expert_s(16, 8) == pytest.approx(32e-3)  # there is one, and attention waits for it


def test_more_workers_than_cores_share_them_fairly():
    costs = ProfiledCosts(PROFILE, StageConditions(1, 8, "shm", num_attention=2, num_micro_batches=2))
    assert costs.attention_s(4, 600) == pytest.approx(22e-3 * 3 / 2)
    assert costs.expert_s(16, 8) == pytest.approx(48e-3 * 3 / 2)


def test_a_node_with_fewer_experts_takes_the_times_of_as_many_active_ones():
    costs = ProfiledCosts(PROFILE, StageConditions(1, 4, "shm"))
    assert costs.expert_s(8, 4) == pytest.approx(16e-3)


def test_settings_that_were_not_measured_are_refused():
    with pytest.raises(ConfigError, match=r"no transport 'tcp'; it has inproc, shm"):
        ProfiledCosts(PROFILE, StageConditions(1, 8, "tcp"))
    with pytest.raises(ConfigError, match=r"no attention times of mid for 2 threads alone, but .* --threads 2"):
        ProfiledCosts(PROFILE, StageConditions(2, 8, "shm"))


# -- measured --------------------------------------------------------------------------------------------------------


def run(*arguments: object) -> str:
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=110, check=True
    ).stdout


@pytest.mark.parametrize(("num_seqs", "max_model_len"), [(1, 1024), (96, 1024), (192, 160), (512, 4096)])
def test_scheduling_is_timed_however_many_sequences_there_are(num_seqs, max_model_len):
    limits = SchedulerLimits(max_model_len, max_num_seqs=num_seqs, max_num_batched_tokens=512)
    times = time_scheduling(limits, num_seqs, 128, 20)
    assert len(times) >= 20
    assert min(times) > 0


@pytest.mark.parametrize(("num_seqs", "expected"), [(1, 1), (8, 1), (9, 2), (192, 30)])
def test_prompts_of_many_sequences_take_passes_in_which_others_decode_already(num_seqs, expected):
    assert passes_of_prompts(num_seqs, 64, 512) == expected


@pytest.mark.slow
def test_a_quick_profile_of_this_machine_reads_back_and_predicts(tiny_model, tmp_path):
    path = tmp_path / "profile.json"
    run("-c", MSI_PROFILE, tiny_model, "--quick", "--transport", "inproc,shm", "-o", path)
    profile = read_profile(path)
    assert (profile.device, profile.precision, profile.model) == ("cpu", Precision.of("float32"), tiny_model.name)
    assert {(one.threads, one.contention) for one in profile.attention} == {(1, "alone"), (1, "overlapped")}
    assert {(one.num_tokens, one.context_len) for one in profile.attention} == {(1, 16), (1, 64), (4, 16), (4, 64)}
    assert {(one.num_experts, one.num_active_experts) for one in profile.expert} == {(7, 1), (7, 7)}
    assert [one.transport for one in profile.comm] == ["shm", "shm", "inproc", "inproc"]
    assert [one.num_seqs for one in profile.scheduling] == [1, 4]
    assert profile.routing[0] == RoutingPoint(1, 2.0)  # one token's top 2
    assert 2 < profile.routing[1].active_experts <= 7
    said = run(
        "tools/compare_simulated.py", tiny_model, "--profile", path, "--predict-only", "--json",
        "--layout", "2+1/m2/t1", "--layout", "colocated", "--batch", 8,
    )  # fmt: skip
    rows = json.loads(said)["rows"]
    assert [row["layout"] for row in rows] == ["2+1/m2/t1", "colocated/m1/t1"]
    assert all(row["predicted"]["simulated_tokens_per_s"] > 0 for row in rows)
