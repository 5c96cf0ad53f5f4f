"""Which checks a process of an instance needs, one after another, and what is said of them."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator

from ..arguments import LaunchArguments
from ..command import EXIT_SENTENCE
from . import host, model, network
from .findings import Finding


def run(arguments: LaunchArguments) -> int:
    """Says what was found on standard output, each line as it is found; the exit status: 0, or 2 where one failed."""
    found = []
    for one in findings(arguments):
        found.append(one)
        if not arguments.json:
            print(one.line(), flush=True)
    num_failed = sum(one.state == "failed" for one in found)
    if arguments.json:
        values = {"ok": not num_failed, "findings": [one.to_json() for one in found]}
        json.dump(values, sys.stdout, indent=1)
        sys.stdout.write("\n")
    else:
        print(f"{num_failed} of {len(found)} checks failed" if num_failed else f"{len(found)} checks: it can start")
    return EXIT_SENTENCE if num_failed else 0


def findings(arguments: LaunchArguments, limits: host.Limits | None = None) -> Iterator[Finding]:
    """In the order in which a start would meet them.

    Args:
        limits: in place of what this process has.
    """
    options, role = arguments.options, arguments.role
    limits = limits or host.measured_limits()
    works = role in ("", "attention", "expert", "worker")
    counts = workers_here(arguments)
    if works:
        device = host.check_device(options.host.device, max(counts), options.num_threads, limits)
        yield device
        has_device = device.state != "failed"
    serves_http = role in ("", "coordinator", "gateway") and arguments.has_gateway and arguments.prompt is None
    if serves_http:
        yield network.check_http_port(arguments.host, arguments.port)
    yield host.check_descriptors(limits)
    if role == "coordinator":
        yield network.check_coordinator_port(arguments.coordinator, arguments.trust)
        if arguments.standby:
            yield network.check_coordinator(arguments.standby)
    elif role:
        for address in arguments.coordinator.split(","):
            yield network.check_coordinator(address.strip())
        yield network.check_secret(arguments.coordinator, arguments.trust)
    for peer in arguments.hosts:
        yield from network.check_host(peer, arguments.port)
    if role == "gateway":
        return
    found, config = model.check_config(options)
    yield from found
    if config is None:
        return
    if role != "coordinator":
        yield model.check_files(options, config)
    if role in ("", "coordinator"):
        yield model.check_texts(options)
    if not works:
        return
    shape = model.shape_here(options, config)
    seat_bytes = model.seat_bytes(options, shape)
    yield host.check_sharing(options.host.transport, seat_bytes)
    yield host.check_shm_folder(limits)
    # on one host "auto" is shared memory, or TCP
    transport = "shm" if not role and options.host.transport == "auto" else options.host.transport
    rdma = network.check_rdma(options.host.rdma, transport)
    yield rdma
    num_seats = 2 * max(options.attention_workers, options.expert_workers)
    yield host.check_memlock(limits, num_seats * seat_bytes, uses_rdma=network.is_usable(rdma))
    if has_device:
        max_model_len = options.limits.max_model_len or config.max_position_embeddings
        free_bytes = model.free_device_bytes(options.host.device, limits.free_bytes)
        yield from model.check_memory(options, shape, max_model_len, counts, free_bytes)


def workers_here(arguments: LaunchArguments) -> tuple[int, int]:
    """Attention and expert workers that this start runs on this host; of a worker of any role, one of each."""
    options = arguments.options
    if arguments.role:
        return int(arguments.role != "expert"), int(arguments.role != "attention" and not options.colocated)
    return options.attention_workers, 1 if options.colocated else options.expert_workers
