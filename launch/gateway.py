"""What runs in the process that serves HTTP; `gateway_process.py` is how one is kept."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from pathlib import Path
from typing import Any

from msi.engine import Engine
from msi.errors import ConfigError, Unavailable
from msi.instance.children import follow_launcher, tell_launcher
from msi.models.files import read_text
from msi.request_spans import open_spans
from msi.server.gateway import Gateway
from msi.watchdog import LoopWatch

from .arguments import LaunchArguments
from .command import requests_to_end, settle
from .logs import has_live_terminal

log = logging.getLogger(__name__)


async def run_gateway(arguments: LaunchArguments) -> None:
    """Until SIGTERM (or SIGINT, but for a child), and until the requests that run then have ended."""
    watch = LoopWatch("gateway")
    asked, urgent = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    # a signal to a whole group of processes is no second one for a child: its parent says what is urgent
    is_child = arguments.parent > 0
    for number in requests_to_end():
        loop.add_signal_handler(number, lambda: (urgent if asked.is_set() and not is_child else asked).set())
    loop.add_signal_handler(
        signal.SIGINT, lambda: None if arguments.parent else (urgent if asked.is_set() else asked).set()
    )
    async with Engine(address=arguments.coordinator, secret=arguments.trust.secret) as engine:
        told = asyncio.ensure_future(_follow_parent(arguments.announce, engine, asked, urgent))
        gateway = Gateway(
            engine,
            host=arguments.host,
            port=arguments.port,
            api_keys=arguments.api_keys,
            chat_template=template_of(arguments.chat_template),
            log_requests=arguments.enable_log_requests,
            log_load=not arguments.disable_log_stats and not has_live_terminal(),
            allowed_origins=arguments.allowed_origins,
            has_page=arguments.has_page,
            watch=watch,
            spans=open_spans(arguments.options.otlp_traces_endpoint, "gateway"),
        )
        watch.start()
        try:
            await gateway.prepare()
            url = await gateway.start([socket.socket(fileno=fd) for fd in arguments.http_sockets] or None)
            if not arguments.parent:
                log.info("HTTP at %s", url)
            settle()
            tell_launcher(arguments.announce, ready=True)
            await asked.wait()
        finally:
            await _close(gateway, arguments.shutdown_timeout_s, urgent)
            told.cancel()
            watch.stop()


async def _follow_parent(announce: int, engine: Engine, asked: asyncio.Event, urgent: asyncio.Event) -> None:
    await follow_launcher(announce, lambda said: _told(said, engine, asked, urgent))
    if announce >= 0 and not asked.is_set():
        engine.fail(Unavailable("the coordinator is gone: its process ended"))
        asked.set()
        urgent.set()


def _told(said: dict[str, Any], engine: Engine, asked: asyncio.Event, urgent: asyncio.Event) -> None:
    if failure := said.get("failure"):
        engine.fail(Unavailable(str(failure)))
    asked.set()
    if said.get("end"):
        urgent.set()


async def _close(gateway: Gateway, grace_s: float, urgent: asyncio.Event) -> None:
    """After the grace, or at once when it becomes urgent."""
    closing = asyncio.ensure_future(gateway.close(grace_s))
    waiting = asyncio.ensure_future(urgent.wait())
    await asyncio.wait({closing, waiting}, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    if not closing.done():
        gateway.end_requests()
    await closing


def template_of(path: Path | None) -> str:
    """The text of --chat-template, "" for none. Raises ConfigError."""
    try:
        return "" if path is None else read_text(path)
    except ConfigError as error:
        raise ConfigError(f"--chat-template: {error}") from error
