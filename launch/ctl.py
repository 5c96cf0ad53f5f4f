"""msi-ctl: what an operator tells an instance that runs: who is there, and workers that are to come or to go."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from pathlib import Path
from typing import Any

from msi.control.client import CoordinatorClient
from msi.control.following import way_to
from msi.control.messages import CLIENT_END
from msi.control.orders import Order, Ordered
from msi.errors import ConfigError, Unavailable
from msi.net.secret import find_secret
from msi.net.socket_dir import addresses_here

from .command import open_missing_streams, run_command
from .command_line import CommandLine, number, one_of

VERBS = {
    "status": "who is there, and what is waited for",
    "placement": "which worker holds which experts",
    "drain": "WORKER finishes what it runs, or has it go on elsewhere, and ends",
    "remove": "the same, and it is not started again",
    "add": "one worker more, of --role",
    "rebalance": "experts are placed by what they had to do, or evenly before that is known",
}
HELLO_S = 10.0
SLOW = 2.0  # times as long as the others: worth a word
NAMES_WORKER = ("drain", "remove")


def main() -> None:
    """Runs msi-ctl with the arguments of this process; does not return."""
    open_missing_streams()
    sys.exit(run(sys.argv[1:]))


def run(argv: list[str]) -> int:
    """Runs msi-ctl; the exit status."""
    return run_command("msi-ctl", lambda: _run(argv))


def parse(argv: list[str]) -> argparse.Namespace:
    """Raises ConfigError. --help and --version print, and end the process."""
    parser = CommandLine(
        "msi-ctl",
        f"Tell an instance that runs what to do: {'; '.join(f'{verb} ({what})' for verb, what in VERBS.items())}. "
        "It returns once that is done.",
        usage="msi-ctl VERB [WORKER] [options]",
    )
    parser.add_argument("verb", metavar="VERB", type=one_of(*VERBS), help=", ".join(VERBS))
    parser.add_argument("worker", metavar="WORKER", nargs="?", default="", help="such as expert-1, of drain and remove")
    add = parser.add_argument_group("options").add_argument
    add("--role", type=one_of("attention", "expert"), metavar="R", help="of the worker that is added")
    add("--within", type=number(None, 1e6), default=60.0, metavar="S",
        help="what an attention worker that leaves still runs after S seconds (60) goes on elsewhere")  # fmt: skip
    add("--coordinator", default="", metavar="ADDRESS",
        help="tcp://HOST:PORT; by default the one instance of this user on this machine")  # fmt: skip
    add("--secret-file", type=Path, metavar="FILE", help="that instance's secret; or MSI_SECRET")
    add("--json", action="store_true", help="one JSON object on standard output")
    values: argparse.Namespace = parser.parse_args(argv)
    if (values.verb in NAMES_WORKER) != bool(values.worker):
        wanted = "needs a WORKER, such as expert-1" if values.verb in NAMES_WORKER else "takes no WORKER"
        raise ConfigError(f"{values.verb} {wanted}")
    if (values.verb == "add") != bool(values.role):
        raise ConfigError(f"{values.verb} needs --role" if values.verb == "add" else f"{values.verb} takes no --role")
    return values


def _run(argv: list[str]) -> None:
    values = parse(argv)
    answer = asyncio.run(_asked(values))
    if answer.failure:
        raise Unavailable(answer.failure)
    report: dict[str, Any] = json.loads(answer.report)
    if values.json:
        print(json.dumps({"text": answer.text, **report}))
        return
    print(answer.text)
    if values.verb == "status":
        for one in report["workers"]:
            runs = f", {one['num_running']} requests" if one["role"] == "attention" else ""
            runs += f", takes {one['slowness']:.1f} times as long as the others" if one["slowness"] >= SLOW else ""
            print(f"  {one['worker_id']}: {one['reason'] or one['state']} (pid {one['pid']} on {one['host']}{runs})")
        if moved := report["requests_moved"]:
            print(f"  {moved} requests have moved between attention workers")


async def _asked(values: argparse.Namespace) -> Ordered:
    address = values.coordinator or _only_one_here()
    client = CoordinatorClient(way_to(address, CLIENT_END, find_secret(values.secret_file)))
    try:
        await client.start(HELLO_S)
        return await client.order(Order(0, values.verb, values.worker, values.role or "", values.within))
    finally:
        await client.close()


def _only_one_here() -> str:
    found = addresses_here("coordinator")
    if len(found) != 1:
        several = f"there are {len(found)} ({', '.join(found)})" if found else "there is none"
        raise ConfigError(f"{several} of this user on this machine; give --coordinator ADDRESS")
    return found[0]


if __name__ == "__main__":
    main()
