"""OpenTelemetry spans of requests, one in each process that a request passes. Off unless an endpoint is named.

A request's context travels with it as W3C's traceparent, so that all its spans are one trace, which is the client's own
where that sends the header. Needs the extra `otel`, which is imported here alone, and only where spans are wanted; a
thread of its library sends them, and what cannot be sent is dropped.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Hashable
from typing import Any

from msi.errors import ConfigError

TRACEPARENT = re.compile(r"00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
SENT_WITHIN_S = 2
KEPT = 2048  # spans that wait to be sent; more are dropped
Values = str | int | float


class Span:
    """One, until it is ended.

    Attributes:
        context: W3C's traceparent, for those that come below it.
    """

    def __init__(self, span: Any, context: str) -> None:
        self.context = context
        self._span = span

    def tell(self, **values: Values) -> None:
        """More about it: a__b is a.b there."""
        for name, value in values.items():
            self._span.set_attribute(name.replace("__", "."), value)

    def event(self, name: str) -> None:
        """Something happened now."""
        self._span.add_event(name)

    def end(self, failure: str = "") -> None:
        """Idempotent."""
        if failure and self._span.is_recording():
            from opentelemetry.trace import Status, StatusCode

            self._span.set_status(Status(StatusCode.ERROR, failure))
        self._span.end()


class SpanSender:
    """Makes and sends those of one process. `close` at its end.

    Args:
        endpoint: where they are sent, by OTLP over HTTP.
        process: whose they are.

    Raises:
        ConfigError: OpenTelemetry is not installed.
    """

    def __init__(self, endpoint: str, process: str) -> None:
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise ConfigError(
                "`otlp_traces_endpoint` needs OpenTelemetry, which is not installed here: pip install 'msi[otel]'"
            ) from error
        resource = Resource.create({"service.name": "msi", "service.instance.id": process})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        exporter = OTLPSpanExporter(endpoint=endpoint, timeout=SENT_WITHIN_S)
        self._provider.add_span_processor(BatchSpanProcessor(exporter, max_queue_size=KEPT, schedule_delay_millis=1000))
        self._tracer = self._provider.get_tracer("msi")
        self._process = process

    def begin(self, name: str, parent: str = "", **values: Values) -> Span:
        """A span that begins now, below another process's or the client's.

        Args:
            parent: a traceparent; what is none begins a trace of its own.
        """
        from opentelemetry.trace import SpanKind, set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        propagator = TraceContextTextMapPropagator()
        above = propagator.extract({"traceparent": parent}) if TRACEPARENT.fullmatch(parent) else None
        span = self._tracer.start_span(name, context=above, kind=SpanKind.SERVER)
        carrier: dict[str, str] = {}
        propagator.inject(carrier, set_span_in_context(span))
        begun = Span(span, carrier.get("traceparent", ""))
        begun.tell(msi__process=self._process, **values)
        return begun

    def close(self) -> None:
        """Sends what waits, for a moment; blocks meanwhile."""
        self._provider.force_flush(1000 * SENT_WITHIN_S)
        self._provider.shutdown()


class OpenSpans:
    """Spans of the requests that are in a process, by a key of its own for each."""

    def __init__(self, sender: SpanSender) -> None:
        self._sender = sender
        self._open: dict[Hashable, Span] = {}

    def __len__(self) -> int:
        return len(self._open)

    def begin(self, key: Hashable, name: str, parent: str, **values: Values) -> str:
        """The context for those below. The end of one that had the same key."""
        self.end(key)
        span = self._open[key] = self._sender.begin(name, parent, **values)
        return span.context

    def event(self, key: Hashable, name: str) -> None:
        if (span := self._open.get(key)) is not None:
            span.event(name)

    def end(self, key: Hashable, failure: str = "", **values: Values) -> None:
        """Idempotent."""
        if (span := self._open.pop(key, None)) is not None:
            span.tell(**values)
            span.end(failure)

    def end_where(self, is_meant: Callable[[Hashable], bool], failure: str) -> None:
        for key in [key for key in self._open if is_meant(key)]:
            self.end(key, failure)

    async def close(self) -> None:
        """Ends all; sends what waits, for a moment."""
        self.end_where(lambda key: True, "its process ends")
        await asyncio.to_thread(self._sender.close)


def open_spans(endpoint: str, process: str) -> OpenSpans | None:
    """None where there is no endpoint. Raises ConfigError: OpenTelemetry is not installed."""
    return OpenSpans(SpanSender(endpoint, process)) if endpoint else None
