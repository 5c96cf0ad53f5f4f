"""One rank of one system, in a process of its own: does what it is told over a Unix socket, a line of JSON each way."""

from __future__ import annotations

import gc
import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import IO, Any

from tools.m2n.fabric import Place, Task
from tools.m2n.systems import SYSTEMS

WARM_SHARE = 10  # of the rounds, so many parts: one is not measured


def main() -> None:
    told = json.loads(sys.argv[1])
    rank = int(sys.argv[2]) if len(sys.argv) > 2 else int(os.environ["OMPI_COMM_WORLD_RANK"])
    folder = Path(told["folder"])
    place = Place(
        told["system"], rank, told["num_senders"], told["num_receivers"], folder, tuple(told["sizes"])
    )  # fmt: skip
    with socket.socket(socket.AF_UNIX) as controller:
        controller.connect(str(folder / "controller"))
        lines = controller.makefile("rw")
        fabric = SYSTEMS[place.system].open(place)
        say(lines, {"rank": rank})
        gc.collect()
        gc.freeze()
        for line in lines:
            if line == "close\n":
                break
            task = Task(*json.loads(line))
            started = time.monotonic()
            times = fabric.run(task)
            say(lines, {"times": times[len(times) // WARM_SHARE :], "took_s": time.monotonic() - started})
        fabric.close()


def say(lines: IO[str], what: dict[str, Any]) -> None:
    lines.write(json.dumps(what) + "\n")
    lines.flush()


if __name__ == "__main__":
    main()
