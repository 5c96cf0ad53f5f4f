"""What an answer by RDMA costs Python at least; latencies in the guest of `tools/rdma_vm.py` are held against it.

Two processes answer each other's words by a driver alone: one thread each, which sleeps for an event in one call, arms
the queue, polls it once and posts. No transport, link or event loop.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from statistics import median

from msi.net.rdma.drivers import load_driver
from msi.net.rdma.fabric import open_place
from msi.net.rdma.options import RdmaOptions
from msi.net.rdma.queues import open_queues
from msi.net.rdma.verbs import RECEIVED_IMMEDIATE, RECEIVES_PER_REFILL, Path, RemoteQueue

NUM_ROUNDS, NUM_WARM, SIGNAL_EVERY = 600, 100, 16


class End:
    """Answers a word by the next."""

    def __init__(self, driver, device):
        options = RdmaOptions(rdma_device=device)
        self.place = open_place(load_driver(driver), options)
        self.card = self.place.card
        self.card.start(64, 512)
        os.set_blocking(self.card.fd, True)
        self.queues = open_queues(self.place, options)

    def told(self):
        queues, lid = self.queues, self.place.port.lid
        ends = (queues.sends.number, queues.sends_psn), (queues.receives.number, queues.receives_psn)
        return json.dumps([(*end, self.place.gid.hex(), lid) for end in ends])

    def join(self, told):
        sends, receives = (
            RemoteQueue(number, psn, bytes.fromhex(gid), lid) for number, psn, gid, lid in json.loads(told)
        )
        path = Path(1, self.place.gid_index, self.place.port.mtu, 0, 0, 14, 6, 7)
        self.queues.receives.connect(sends, self.queues.receives_psn, path)
        self.queues.sends.connect(receives, self.queues.sends_psn, path)
        self.card.arm()

    def close(self):
        self.queues.close()
        self.card.close()

    def run(self, is_first):
        """Seconds of each round."""
        card, word = self.card, self.queues.sends.word
        times, num_used = [], 0
        began = time.perf_counter()
        if is_first:
            word(0, False)
        while len(times) < NUM_ROUNDS:
            card.take_event()
            card.arm()
            for status, opcode, _, _ in card.poll():
                assert not status, status
                if opcode != RECEIVED_IMMEDIATE:
                    continue
                now = time.perf_counter()
                times.append(now - began)
                began = now
                if not is_first or len(times) < NUM_ROUNDS:
                    word(0, not len(times) % SIGNAL_EVERY)
                num_used += 1
            if num_used >= RECEIVES_PER_REFILL:
                num_used -= RECEIVES_PER_REFILL
                card.refill()
        return times


def least(driver):
    """Prints half of the median of there and back."""
    command = [sys.executable, "-m", "tests.rdma_least", driver]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        end = End(driver, "rxe0")
        theirs = other.stdout.readline()
        print(end.told(), file=other.stdin, flush=True)
        end.join(theirs)
        other.stdout.readline()  # it is ready
        half_us = median(end.run(is_first=True)[NUM_WARM:]) / 2 * 1e6
        other.stdin.close()
        end.close()
    print(f"  a word, by the driver alone: median {half_us:.0f} us")


def answer(driver):
    end = End(driver, "rxe1")
    print(end.told(), flush=True)
    end.join(sys.stdin.readline())
    print("ready", flush=True)
    end.run(is_first=False)
    sys.stdin.read()


if __name__ == "__main__":
    answer(sys.argv[1])
