"""What a worker tells its coordinator twice a second and more: that it lives, how it is, and what it takes for true.

The full account comes from the loop. The pulse comes from a thread that no busy loop starves, and carries how long the
loop has stood still, the whole process's standing still apart.
"""

from __future__ import annotations

from dataclasses import replace

from msi.control.counters import NO_ROWS
from msi.control.lateness import read_first, sleep_late
from msi.control.messages import Assignment, Heartbeat, Pulse
from msi.control.worker_status import WorkerStatus
from msi.errors import Unavailable
from msi.net.control import MessageClient
from msi.settings import Timeouts
from msi.types import StageTimes
from msi.watchdog import LoopWatch
from msi.worker.host import Host
from msi.worker.life import Life
from msi.worker.watching import Watching

PULSES_PER_HEARTBEAT = 5


class Heartbeats:
    """Of one worker, over all its lives.

    Args:
        process: names this process among all that ever had its id.
        coordinator: its address, as it stands in sentences.
        timeouts: those of the start: how long the coordinator may be gone is said there alone.
        watch: of the loop that this runs on.
    """

    def __init__(
        self,
        process: str,
        coordinator: str,
        timeouts: Timeouts,
        host: Host,
        control: MessageClient,
        watching: Watching,
        watch: LoopWatch | None,
    ) -> None:
        self._process = process
        self._coordinator = coordinator
        self._timeouts = timeouts
        self._host = host
        self._control = control
        self._watching = watching
        self._watch = watch
        self._clock = host.clock
        self._beat_at = self._clock()
        self._busy_at_beat = 0.0
        self._excused_s = 0.0  # of the loop's lag since its last beat: the whole process stood still

    async def run(self, life: Life) -> None:
        """For as long as a life lasts. Raises Unavailable once the coordinator was silent for too long."""
        assignment, timeouts = life.assignment, self._timeouts
        heartbeat_s = assignment.timeouts.heartbeat_s
        pulse_s = heartbeat_s / PULSES_PER_HEARTBEAT
        ids = (assignment.worker_id, assignment.incarnation)
        self._control.keep_alive(lambda late_s: self._pulse(assignment, late_s), pulse_s)
        while True:
            self._control.send(Heartbeat(*ids, self._status(life), life.belief))
            self._watching.flush()
            sent_at = self._clock()
            late_s = await sleep_late(pulse_s, self._clock)
            if life.last_heard >= sent_at:  # else what runs waits for another coordinator to hear of it
                late_s += await sleep_late(heartbeat_s - pulse_s, self._clock)
            life.last_heard += late_s
            if not await read_first(self._control, self._clock):
                continue
            silent_s = self._clock() - life.last_heard
            if silent_s > max(timeouts.coordinator_grace_s, 2 * timeouts.lost_after_s):
                raise Unavailable(
                    f"{assignment.worker_id}: the coordinator at {self._coordinator} has been silent for "
                    f"{silent_s:.0f} s"
                )

    def _pulse(self, assignment: Assignment, late_s: float) -> Pulse:
        """On a thread of its own; `late_s`: that one's lateness is the process's, not the loop's."""
        self._excused_s += late_s
        silent_s = self._clock() - self._beat_at - assignment.timeouts.heartbeat_s
        return Pulse(assignment.worker_id, assignment.incarnation, self._process, max(0.0, silent_s - self._excused_s))

    def _status(self, life: Life) -> WorkerStatus:
        attention, experts = life.attention, life.experts
        times = StageTimes()
        if attention is not None:
            times = attention.measuring.times()
        elif experts is not None:
            times = experts.times()
        busy = self._busy_share()
        has_work = attention is None or not attention.requests.is_idle
        loaded_bytes, total_bytes = self._host.loaded
        return WorkerStatus(
            loaded_bytes=loaded_bytes,
            total_bytes=total_bytes,
            num_running=0 if attention is None else attention.requests.scheduler.num_running,
            num_waiting=0 if attention is None else attention.requests.num_waiting,
            num_free_blocks=0 if attention is None else attention.requests.scheduler.num_free_blocks,
            times=replace(times, busy=busy, bubble=1 - busy if has_work else 0.0),
            process=replace(
                self._host.counters(),
                at_s=self._clock(),
                busy_s=self._host.busy_s,
                control_messages_sent=self._control.num_sent,
            ),
            attention=None if attention is None else attention.counters(),
            experts=None if experts is None else experts.counters(),
            loop={} if self._watch is None else self._watch.counters(),
            peers=() if attention is None else attention.peers(),
            watched=self._watching.told(attention),
            batches=() if experts is None else experts.batch_times(),
            layer_rows=NO_ROWS if experts is None else experts.layer_rows(),
        )

    def _busy_share(self) -> float:
        now, busy_s = self._clock(), self._host.busy_s
        elapsed, self._beat_at = now - self._beat_at, now
        self._excused_s = 0.0
        computed, self._busy_at_beat = busy_s - self._busy_at_beat, busy_s
        return min(1.0, computed / elapsed) if elapsed > 0 else 0.0
