"""Which worker is placed on which GPU of a host."""

from __future__ import annotations

import logging

import pytest

from msi.instance import processes as process_instance
from msi.instance.gpus import Gpus, num_gpus
from msi.options import InstanceOptions
from msi.settings import SHARING
from msi.worker.torch_host import share_of_gpu

TWO_AND_TWO = [
    ("expert", "expert-0"),
    ("expert", "expert-1"),
    ("attention", "attention-0"),
    ("attention", "attention-1"),
]


def placed(gpus, workers=TWO_AND_TWO):
    return [gpus.device_of(worker_id, role, [one for _, one in workers]) for role, worker_id in workers]


def test_each_has_a_gpu_to_itself_where_there_are_enough():
    gpus = Gpus("cuda", 4)
    assert placed(gpus) == ["cuda:0", "cuda:1", "cuda:2", "cuda:3"]
    assert gpus.said(["expert-0", "expert-1"]) == "cuda:0: expert-0; cuda:1: expert-1"


def test_where_there_are_fewer_experts_share_with_attention_before_two_of_a_kind_do():
    gpus = Gpus("cuda", 3)
    assert placed(gpus) == ["cuda:0", "cuda:1", "cuda:2", "cuda:0"]
    gpus = Gpus("cuda", 2)
    assert placed(gpus) == ["cuda:0", "cuda:1", "cuda:0", "cuda:1"]
    assert gpus.said([one for _, one in TWO_AND_TWO]) == (
        "cuda:0: expert-0, attention-0; cuda:1: expert-1, attention-1; "
        "workers that share a GPU have it in turns (2 of 2)"
    )


def test_who_is_started_again_is_where_it_was_and_who_comes_takes_what_is_free():
    gpus = Gpus("cuda", 4)
    placed(gpus)
    there = ["expert-0", "attention-0", "attention-1"]
    assert gpus.device_of("attention-0", "attention", there) == "cuda:2"
    assert gpus.device_of("attention-2", "attention", there) == "cuda:1", "that of a worker that has left"


@pytest.mark.parametrize(("device", "count"), [("cuda", 0), ("cuda", 1), ("cuda:2", 4), ("cpu", 4)])
def test_there_may_be_nothing_to_choose(device, count):
    gpus = Gpus(device, count)
    assert placed(gpus) == [device] * 4
    assert gpus.said(["expert-0"]) == ""


def test_attention_workers_that_share_a_gpu_share_its_memory():
    gpus = Gpus("cuda", 2)
    workers = [("attention", f"attention-{index}") for index in range(3)]
    assert placed(gpus, workers) == ["cuda:0", "cuda:1", "cuda:0"]
    assert [gpus.sharing(one) for _, one in workers] == [2, 1, 2]
    assert share_of_gpu({SHARING: "2", "LOCAL_RANK": "1"}, 0.25) == 0.5
    assert share_of_gpu({"LOCAL_RANK": "1"}, 0.25) == 1.0
    assert share_of_gpu({}, 0.25) == 0.25


def test_gpus_are_counted_as_cuda_shows_them(tmp_path):
    for name in ("nvidia0", "nvidia1", "nvidia10", "nvidiactl", "nvidia-uvm", "null"):
        (tmp_path / name).touch()
    assert num_gpus({}, tmp_path) == 3
    for listed, count in (("", 0), ("-1", 0), ("1", 1), ("0, 2", 2), ("GPU-a,GPU-b", 2), ("0,-1,1", 1)):
        assert num_gpus({"CUDA_VISIBLE_DEVICES": listed}, tmp_path) == count


async def test_workers_are_started_where_they_belong_and_the_log_says_where(monkeypatch, caplog, tiny_model):
    caplog.set_level(logging.INFO)
    started, told = [], []

    async def start(words, environment):
        started.append(words)
        told.append(environment)

    monkeypatch.setattr(process_instance, "check_device", lambda name: None)
    monkeypatch.setattr(process_instance, "num_gpus", lambda environment: 2)
    monkeypatch.setattr(process_instance.Child, "start", start)
    options = InstanceOptions.of(model=tiny_model, device="cuda", attention_workers=1, expert_workers=2)
    instance = process_instance.ProcessInstance(options, lambda error: None)
    await instance._start_workers("inproc://nowhere")
    last_told = {
        words[words.index("--worker-id") + 1]: [w for w in words if w.startswith("--device")] for words in started
    }
    assert {worker_id: told[-1] for worker_id, told in last_told.items()} == {
        "expert-0": "--device=cuda:0", "expert-1": "--device=cuda:1", "attention-0": "--device=cuda:0",
    }  # fmt: skip
    assert told == [{SHARING: "1"}] * 3
    assert "on GPUs: cuda:0: expert-0, attention-0; cuda:1: expert-1" in caplog.text
