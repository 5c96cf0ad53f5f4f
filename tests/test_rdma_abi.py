"""The direct driver's idea of libibverbs' structures, beside what a C compiler makes of its header."""

from __future__ import annotations

import ctypes
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from msi.net.rdma import abi

HEADER = Path("/usr/include/infiniband/verbs.h")
STRUCTURES = {
    abi.Entry: ("ibv_sge", {"address": "addr", "length": "length", "key": "lkey"}),
    abi.SendRequest: (
        "ibv_send_wr",
        {
            "id": "wr_id", "next": "next", "entries": "sg_list", "num_entries": "num_sge", "opcode": "opcode",
            "flags": "send_flags", "immediate": "imm_data", "to_address": "wr.rdma.remote_addr",
            "to_key": "wr.rdma.rkey",
        },
    ),
    abi.Channel: ("ibv_comp_channel", {"context": "context", "fd": "fd"}),
    abi.ReceiveRequest: (
        "ibv_recv_wr", {"id": "wr_id", "next": "next", "entries": "sg_list", "num_entries": "num_sge"},
    ),
    abi.QueuePairLimits: (
        "ibv_qp_cap",
        {
            "max_sends": "max_send_wr", "max_receives": "max_recv_wr", "max_send_entries": "max_send_sge",
            "max_receive_entries": "max_recv_sge", "max_inline": "max_inline_data",
        },
    ),
    abi.QueuePairInit: (
        "ibv_qp_init_attr",
        {
            "send_queue": "send_cq", "receive_queue": "recv_cq", "shared": "srq", "limits": "cap", "kind": "qp_type",
            "signals_all": "sq_sig_all",
        },
    ),
    abi.SharedInit: (
        "ibv_srq_init_attr",
        {"max_requests": "attr.max_wr", "max_entries": "attr.max_sge", "limit": "attr.srq_limit"},
    ),
    abi.Address: (
        "ibv_ah_attr",
        {
            "gid": "grh.dgid", "flow_label": "grh.flow_label", "gid_index": "grh.sgid_index",
            "hop_limit": "grh.hop_limit", "traffic_class": "grh.traffic_class", "lid": "dlid", "service_level": "sl",
            "is_global": "is_global", "port": "port_num",
        },
    ),
    abi.QueuePairAttributes: (
        "ibv_qp_attr",
        {
            "state": "qp_state", "mtu": "path_mtu", "receive_psn": "rq_psn", "send_psn": "sq_psn",
            "to_number": "dest_qp_num", "access": "qp_access_flags", "address": "ah_attr",
            "pkey_index": "pkey_index", "max_reads": "max_rd_atomic", "max_served_reads": "max_dest_rd_atomic",
            "min_rnr_timer": "min_rnr_timer", "port": "port_num", "timeout": "timeout", "retries": "retry_cnt",
            "rnr_retries": "rnr_retry", "rate_limit": "rate_limit",
        },
    ),
}  # fmt: skip
PORT = {
    "state": "state", "active_mtu": "active_mtu", "num_gids": "gid_tbl_len", "lid": "lid", "link_layer": "link_layer",
}  # fmt: skip
BYTES_BEFORE = {
    abi.MR_LOCAL_KEY: "struct ibv_mr, lkey", abi.MR_REMOTE_KEY: "struct ibv_mr, rkey",
    abi.QP_NUMBER: "struct ibv_qp, qp_num", abi.QUEUE_CONTEXT: "struct ibv_cq, context",
}  # fmt: skip
TABLE = {abi.POLL: "poll_cq", abi.ARM: "req_notify_cq", abi.POST_TO_SHARED: "post_srq_recv", abi.POST: "post_send"}
COMPLETION = {8: "status", 12: "opcode", 24: "imm_data", 28: "qp_num"}  # where `abi.COMPLETION` reads
MASKS = {
    abi.STATE | abi.PKEY_INDEX | abi.PORT | abi.ACCESS:
        "IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS",
    abi.OF_RECEIVING:
        "IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN | IBV_QP_MAX_DEST_RD_ATOMIC"
        " | IBV_QP_MIN_RNR_TIMER",
    abi.OF_SENDING:
        "IBV_QP_STATE | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY | IBV_QP_SQ_PSN | IBV_QP_MAX_QP_RD_ATOMIC",
}  # fmt: skip


def rows():
    """(what we think, the expression in C) of all."""
    for structure, (name, fields) in STRUCTURES.items():
        yield ctypes.sizeof(structure), f"sizeof(struct {name})"
        for ours, theirs in fields.items():
            yield getattr(structure, ours).offset, f"offsetof(struct {name}, {theirs})"
    for ours, theirs in PORT.items():
        yield getattr(abi.PortAttributes, ours).offset, f"offsetof(struct ibv_port_attr, {theirs})"
    for ours, theirs in BYTES_BEFORE.items():
        yield ours, f"offsetof({theirs})"
    for index, theirs in TABLE.items():
        yield (1 + index) * abi.POINTER_BYTES, f"offsetof(struct ibv_context, ops.{theirs})"
    yield abi.COMPLETION_BYTES, "sizeof(struct ibv_wc)"
    for ours, theirs in COMPLETION.items():
        yield ours, f"offsetof(struct ibv_wc, {theirs})"
    yield from MASKS.items()


def test_structures_are_as_long_as_in_c_and_their_fields_lie_where_they_do():
    assert struct.calcsize(abi.COMPLETION) == abi.COMPLETION_BYTES
    compiler = shutil.which("cc")
    if compiler is None or not HEADER.exists():
        pytest.skip(f"no C compiler, or no {HEADER} (libibverbs-dev)")
    expected = list(rows())
    asserts = "".join(f'_Static_assert({ours} == ({theirs}), "{theirs}");\n' for ours, theirs in expected)
    program = f"#include <stddef.h>\n#include <infiniband/verbs.h>\n{asserts}"
    done = subprocess.run(
        [compiler, "-fsyntax-only", "-x", "c", "-"], input=program, text=True, capture_output=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
