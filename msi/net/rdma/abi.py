"""The part of libibverbs' binary interface that the drivers use themselves: its structures, and where functions are.

What `infiniband/verbs.h` says, and has said since libibverbs.so.1 exists; `tests/test_rdma_abi.py` has a C compiler
compare. Posting, polling and arming are inline functions there: they call what the card's provider has put into a table
of the context. Every function of the library that can fail comes out as OSError.
"""

from __future__ import annotations

import ctypes
import errno
import os
from ctypes import Structure, c_char, c_int, c_size_t, c_uint8, c_uint16, c_uint32, c_uint64, c_void_p
from typing import Any

LIBRARY = "libibverbs.so.1"
POINTER_BYTES = 8

# in the table of a context's functions, which follows the pointer to its device
POLL, ARM, POST_TO_SHARED, POST = 11, 12, 20, 25
# bytes before what is read of what the library made
MR_LOCAL_KEY, MR_REMOTE_KEY, QP_NUMBER, QUEUE_CONTEXT = 36, 40, 52, 0

COMPLETION_BYTES = 48
COMPLETION = "=8xII8xII16x"  # status, opcode, immediate, the queue pair's number


class Entry(Structure):
    """ibv_sge"""

    _fields_ = (("address", c_uint64), ("length", c_uint32), ("key", c_uint32))


class SendRequest(Structure):
    """ibv_send_wr, of a write"""

    _fields_ = (
        ("id", c_uint64), ("next", c_void_p), ("entries", c_void_p), ("num_entries", c_int), ("opcode", c_int),
        ("flags", c_uint32), ("immediate", c_uint32), ("to_address", c_uint64), ("to_key", c_uint32),
        ("_of_others", c_char * 72),
    )  # fmt: skip


class Channel(Structure):
    """ibv_comp_channel"""

    _fields_ = (("context", c_void_p), ("fd", c_int), ("num_queues", c_int))


class ReceiveRequest(Structure):
    """ibv_recv_wr"""

    _fields_ = (("id", c_uint64), ("next", c_void_p), ("entries", c_void_p), ("num_entries", c_int))


class PortAttributes(Structure):
    """ibv_port_attr, as far as the library's own `ibv_query_port` fills it"""

    _fields_ = (
        ("state", c_int), ("max_mtu", c_int), ("active_mtu", c_int), ("num_gids", c_int), ("_flags", c_uint32 * 4),
        ("num_pkeys", c_uint16), ("lid", c_uint16), ("_subnet", c_uint8 * 10), ("link_layer", c_uint8),
        ("_more", c_uint8 * 17),
    )  # fmt: skip


class QueuePairLimits(Structure):
    """ibv_qp_cap"""

    _fields_ = (
        ("max_sends", c_uint32), ("max_receives", c_uint32), ("max_send_entries", c_uint32),
        ("max_receive_entries", c_uint32), ("max_inline", c_uint32),
    )  # fmt: skip


class QueuePairInit(Structure):
    """ibv_qp_init_attr"""

    _fields_ = (
        ("context", c_void_p), ("send_queue", c_void_p), ("receive_queue", c_void_p), ("shared", c_void_p),
        ("limits", QueuePairLimits), ("kind", c_int), ("signals_all", c_int),
    )  # fmt: skip


class SharedInit(Structure):
    """ibv_srq_init_attr"""

    _fields_ = (("context", c_void_p), ("max_requests", c_uint32), ("max_entries", c_uint32), ("limit", c_uint32))


class Address(Structure):
    """ibv_ah_attr"""

    _fields_ = (
        ("gid", c_uint64 * 2), ("flow_label", c_uint32), ("gid_index", c_uint8), ("hop_limit", c_uint8),
        ("traffic_class", c_uint8), ("lid", c_uint16), ("service_level", c_uint8), ("path_bits", c_uint8),
        ("rate", c_uint8), ("is_global", c_uint8), ("port", c_uint8),
    )  # fmt: skip


class QueuePairAttributes(Structure):
    """ibv_qp_attr"""

    _fields_ = (
        ("state", c_int), ("was_state", c_int), ("mtu", c_int), ("migration", c_int), ("qkey", c_uint32),
        ("receive_psn", c_uint32), ("send_psn", c_uint32), ("to_number", c_uint32), ("access", c_uint32),
        ("limits", QueuePairLimits), ("address", Address), ("other_address", Address), ("pkey_index", c_uint16),
        ("other_pkey_index", c_uint16), ("tells_drained", c_uint8), ("drains", c_uint8), ("max_reads", c_uint8),
        ("max_served_reads", c_uint8), ("min_rnr_timer", c_uint8), ("port", c_uint8), ("timeout", c_uint8),
        ("retries", c_uint8), ("rnr_retries", c_uint8), ("other_port", c_uint8), ("other_timeout", c_uint8),
        ("rate_limit", c_uint32),
    )  # fmt: skip


# which of these a change of state takes, by ibv_qp_attr_mask
STATE, ACCESS, PKEY_INDEX, PORT = 1 << 0, 1 << 3, 1 << 4, 1 << 5
OF_RECEIVING = STATE | 1 << 7 | 1 << 8 | 1 << 12 | 1 << 15 | 1 << 17 | 1 << 20  # address, mtu, psn, timer, reads, to
OF_SENDING = STATE | 1 << 9 | 1 << 10 | 1 << 11 | 1 << 13 | 1 << 16  # timeout, both retries, reads, psn


class Library:
    """libibverbs, and its functions: those that make something return its address, others nothing.

    Raises:
        ImportError: it is not installed.
    """

    def __init__(self) -> None:
        try:
            library = ctypes.CDLL(LIBRARY, use_errno=True)
        except OSError as error:
            raise ImportError(str(error)) from error
        pointer, address = c_void_p, c_void_p
        self.device_list = _making(library.ibv_get_device_list, pointer)
        self.free_device_list = library.ibv_free_device_list
        self.free_device_list.argtypes = (address,)
        self.device_name = library.ibv_get_device_name
        self.device_name.argtypes, self.device_name.restype = (address,), ctypes.c_char_p
        self.open_device = _making(library.ibv_open_device, address)
        self.close_device = _doing(library.ibv_close_device, address)
        self.query_port = _doing(library.ibv_query_port, address, c_uint8, pointer)
        self.query_gid = _doing(library.ibv_query_gid, address, c_uint8, c_int, pointer)
        self.alloc_pd = _making(library.ibv_alloc_pd, address)
        self.dealloc_pd = _doing(library.ibv_dealloc_pd, address)
        self.reg_mr = _making(library.ibv_reg_mr, address, address, c_size_t, c_int)
        # of rdma-core 34 and later
        self.reg_dmabuf_mr = (
            _making(library.ibv_reg_dmabuf_mr, address, c_uint64, c_size_t, c_uint64, c_int, c_int)
            if hasattr(library, "ibv_reg_dmabuf_mr")
            else _not_there
        )
        self.dereg_mr = _doing(library.ibv_dereg_mr, address)
        self.create_channel = _making(library.ibv_create_comp_channel, address)
        self.destroy_channel = _doing(library.ibv_destroy_comp_channel, address)
        self.create_cq = _making(library.ibv_create_cq, address, c_int, address, address, c_int)
        self.destroy_cq = _doing(library.ibv_destroy_cq, address)
        # keeps the interpreter's lock, as its channel does not block; why it failed is in errno
        self.get_cq_event = ctypes.PyDLL(LIBRARY, use_errno=True).ibv_get_cq_event
        self.get_cq_event.argtypes, self.get_cq_event.restype = (address, pointer, pointer), c_int
        self.ack_cq_events = library.ibv_ack_cq_events
        self.ack_cq_events.argtypes, self.ack_cq_events.restype = (address, c_uint32), None
        self.create_srq = _making(library.ibv_create_srq, address, pointer)
        self.destroy_srq = _doing(library.ibv_destroy_srq, address)
        self.create_qp = _making(library.ibv_create_qp, address, pointer)
        self.modify_qp = _doing(library.ibv_modify_qp, address, pointer, c_int)
        self.destroy_qp = _doing(library.ibv_destroy_qp, address)


def _making(function: Any, *argtypes: Any) -> Any:
    function.argtypes, function.restype, function.errcheck = argtypes, c_void_p, _made
    return function


def _made(address: int | None, function: Any, arguments: Any) -> int:
    if not address:
        code = ctypes.get_errno() or errno.EIO
        raise OSError(code, os.strerror(code))
    return address


def _doing(function: Any, *argtypes: Any) -> Any:
    function.argtypes, function.restype, function.errcheck = argtypes, c_int, _done
    return function


def _done(code: int, function: Any, arguments: Any) -> None:
    if code:
        code = code if code > 0 else ctypes.get_errno() or errno.EIO
        raise OSError(code, os.strerror(code))


def _not_there(*arguments: object) -> int:
    raise OSError(errno.EOPNOTSUPP, "libibverbs is older than rdma-core 34")


def table_function(context: int, index: int) -> int:
    """The address of one of a context's functions."""
    return int(c_void_p.from_address(context + (1 + index) * POINTER_BYTES).value or 0)
