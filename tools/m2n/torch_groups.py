"""torch.distributed: Gloo's isend and irecv over loopback, and NCCL's, grouped as it wants them, between GPUs.

The payload lies in the tensor that is sent. NCCL's times end when the host sees that the rows are there.
"""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist

from tools.m2n.fabric import STAMP, Place, Task, check, stamp


class TorchFabric:
    def __init__(self, place: Place) -> None:
        self._place = place
        self._is_nccl = place.system == "nccl"
        torch.set_num_threads(1)
        self._device = torch.device("cuda", place.rank) if self._is_nccl else torch.device("cpu")
        if self._is_nccl:
            torch.cuda.set_device(self._device)
        dist.init_process_group(
            place.system, init_method=f"file://{place.folder}/store", rank=place.rank, world_size=place.num_ranks
        )
        self._out = torch.zeros(place.max_bytes, dtype=torch.uint8, device=self._device)
        self._in = [torch.zeros_like(self._out) for _ in place.peers]
        self._ack = torch.zeros(1, dtype=torch.uint8, device=self._device)
        self._acks = [torch.zeros_like(self._ack) for _ in place.peers]
        self._ends = bytearray(place.max_bytes)  # of a payload, as the host sees it
        dist.barrier()

    def run(self, task: Task) -> list[float]:
        size = task.size
        sent, landed = self._out[:size], [buffer[:size] for buffer in self._in]
        times: list[float] = []
        for round_number in range(task.rounds):
            started = time.monotonic()
            if self._place.is_sender:
                self._write(sent, started, round_number)
                self._exchange(sent, landed if task.is_exchange else self._acks)
                if task.is_exchange:
                    times.append(time.monotonic() - started)
                    for buffer in landed:
                        self._read(buffer, round_number)
            elif task.is_exchange:
                self._receive(landed)
                for buffer in landed:
                    self._read(buffer, round_number)
                self._write(sent, 0.0, round_number)
                self._send(sent)
            else:
                self._receive_each(landed, round_number, times)
        return times

    def close(self) -> None:
        dist.barrier()
        dist.destroy_process_group()

    # -- messages ----------------------------------------------------------------------------------------------------

    def _exchange(self, sent: torch.Tensor, landed: list[torch.Tensor]) -> None:
        peers = self._place.peers
        self._wait(
            [("isend", sent, peer) for peer in peers], [("irecv", *one) for one in zip(landed, peers, strict=True)]
        )

    def _receive(self, landed: list[torch.Tensor]) -> None:
        self._wait([("irecv", *one) for one in zip(landed, self._place.peers, strict=True)])

    def _send(self, sent: torch.Tensor) -> None:
        self._wait([("isend", sent, peer) for peer in self._place.peers])

    def _wait(self, *groups: list[tuple[str, torch.Tensor, int]]) -> None:
        messages = [message for group in groups for message in group]
        if self._is_nccl:
            operations = [dist.P2POp(getattr(dist, verb), tensor, peer) for verb, tensor, peer in messages]
            works: list[Any] = dist.batch_isend_irecv(operations)
        else:
            works = [getattr(dist, verb)(tensor, peer) for verb, tensor, peer in messages]
        for work in works:
            work.wait()
        if self._is_nccl:
            torch.cuda.synchronize()

    def _receive_each(self, landed: list[torch.Tensor], round_number: int, times: list[float]) -> None:
        """Each message's time ends when it is there, and it is acknowledged at once; NCCL's when all are."""
        if self._is_nccl:
            self._receive(landed)
            now = time.monotonic()
            times += [now - self._read(buffer, round_number) for buffer in landed]
            self._send(self._ack)
            return
        works: list[Any] = [dist.irecv(buffer, peer) for buffer, peer in zip(landed, self._place.peers, strict=True)]
        for work, buffer, peer in zip(works, landed, self._place.peers, strict=True):
            work.wait()
            now = time.monotonic()
            times.append(now - self._read(buffer, round_number))
            self._wait([("isend", self._ack, peer)])

    # -- contents ----------------------------------------------------------------------------------------------------

    def _write(self, tensor: torch.Tensor, started: float, round_number: int) -> None:
        size = len(tensor)
        if not self._is_nccl:
            stamp(tensor.numpy().data, size, started, round_number, self._place.rank)
            return
        stamp(self._ends, size, started, round_number, self._place.rank)
        tensor[: STAMP.size] = torch.frombuffer(self._ends, dtype=torch.uint8, count=STAMP.size).to(self._device)
        tensor[-1] = self._ends[size - 1]

    def _read(self, tensor: torch.Tensor, round_number: int) -> float:
        """When its sender began the round."""
        if not self._is_nccl:
            return check(tensor.numpy().data, len(tensor), round_number)[0]
        self._ends[: STAMP.size] = bytes(tensor[: STAMP.size].cpu().numpy().data)
        self._ends[len(tensor) - 1] = int(tensor[-1])
        return check(self._ends, len(tensor), round_number)[0]
