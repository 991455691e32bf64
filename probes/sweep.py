"""The sweep: groups of probes through child processes, every outcome a record before the next."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from probes.claims import Ledger
from probes.driver import find_cards
from probes.grid import Point
from probes.order import Group
from probes.predict import Target, cannot_fit, predict
from probes.progress import Progress
from probes.records import Environment, Meters, Outcome, Process, Record
from probes.worker import Worker

_IMPORT_TIMEOUT_S = 180.0


@dataclass(frozen=True)
class Settings:
    """How a sweep runs. gpu None means the CPU, at tiny sizes.

    budget_s: no probe starts after it; timeout_s: a probe's, load_timeout_s: a load's.
    """

    log: Path
    timeout_s: float = 300.0
    load_timeout_s: float = 300.0
    budget_s: float | None = None
    tiny: bool = False
    skip_hopeless: bool = True
    snapshots: Path | None = None


@dataclass
class Lane:
    """One device and its children: the one that measures, and one that already imports."""

    gpu: int | None
    target: Target | None
    others_used_bytes: int
    standby: Worker | None = None
    working: Worker | None = None
    environment: Environment | None = None
    import_s: float = 0.0


@dataclass
class Sweep:
    """Runs groups on lanes, one thread a lane. `errors`: what ended a lane early."""

    settings: Settings
    ledger: Ledger
    progress: Progress
    started: float = field(default_factory=time.monotonic)
    errors: list[BaseException] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)

    def run(self, groups: list[Group], lanes: list[Lane]) -> None:
        """Measure everything that is not done. Raises the first error of a lane (a full disk)."""
        work: queue.SimpleQueue[Group] = queue.SimpleQueue()
        for group in groups:
            work.put(group)
        threads = [threading.Thread(target=self._lane, args=(lane, work)) for lane in lanes]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                thread.join()
        except KeyboardInterrupt:
            self._stop.set()
            for lane in lanes:
                if lane.working is not None:
                    lane.working.kill()
            for thread in threads:
                thread.join()
            raise
        if self.errors:
            raise self.errors[0]

    def _lane(self, lane: Lane, work: queue.SimpleQueue[Group]) -> None:
        try:
            while not self._over():
                try:
                    group = work.get_nowait()
                except queue.Empty:
                    return
                self._group(lane, group)
        except BaseException as error:
            self.errors.append(error)
            self._stop.set()
        finally:
            if lane.standby is not None:
                lane.standby.close()

    def _over(self) -> bool:
        left = self.left_s()
        return self._stop.is_set() or (left is not None and left <= 0)

    def left_s(self) -> float | None:
        """Seconds of the budget that are left; None without one."""
        budget = self.settings.budget_s
        return None if budget is None else budget - (time.monotonic() - self.started)

    def _group(self, lane: Lane, group: Group) -> None:
        """One load's probes; a child that dies or hangs costs the probe in flight, not the rest."""
        claimed = set(self.ledger.claim([point.key for point in group.points]))
        left = deque(p for p in group.points if p.key in claimed)
        self.progress.already_done(len(group.points) - len(left))
        try:
            if left and lane.standby is None:
                lane.standby = self._worker(lane)  # imports while the planner predicts
            if self.settings.skip_hopeless:
                self._skip_hopeless(lane, left)
            while left and not self._over():
                worker, lane.standby = lane.standby or self._worker(lane), None
                lane.working = worker
                try:
                    self._child(lane, worker, left)
                finally:
                    lane.working = None
                    worker.close()
        finally:
            self.ledger.release(list(claimed))

    def _worker(self, lane: Lane) -> Worker:
        return Worker(lane.gpu, self.settings.log)

    def _skip_hopeless(self, lane: Lane, left: deque[Point]) -> None:
        for point in list(left):
            reason = cannot_fit(predict(point.spec, lane.target), lane.target)
            if reason is not None:
                left.remove(point)
                self._store(lane, point, "skipped", reason)

    def _child(self, lane: Lane, worker: Worker, left: deque[Point]) -> None:
        """Feed one child all of `left`; takes from it what got an outcome."""
        event = worker.next_event(_IMPORT_TIMEOUT_S)
        if event["event"] != "ready":
            self._fail(lane, left, event, worker)
            return
        lane.import_s = event["import_seconds"]
        worker.send(self._job(lane, left))
        timeout = self.settings.load_timeout_s
        while True:
            event = self._next(worker, timeout)
            kind = event["event"]
            if "environment" in event:
                lane.environment = Environment(**event["environment"])
            if kind == "loaded":
                lane.standby = lane.standby or self._worker(lane)
            elif kind == "load_failed":
                while left:
                    self._store(lane, left.popleft(), event["outcome"], event["evidence"])
                return
            elif kind == "begin":
                timeout = self.settings.timeout_s
                self.progress.begins(left[0], lane.gpu)
            elif kind == "result":
                self._result(lane, left.popleft(), event)
                if self._over():
                    return
            elif kind == "done" or kind == "budget":
                return
            else:
                self._fail(lane, left, event, worker)
                return

    def _next(self, worker: Worker, timeout_s: float) -> dict[str, Any]:
        """The next event; a child still at work well after the budget is given up unrecorded."""
        left = self.left_s()
        grace = None if left is None else max(left, 0.0) + 20.0
        if grace is not None and grace < timeout_s:
            event = worker.next_event(grace)
            return {"event": "budget"} if event["event"] == "timeout" else event
        return worker.next_event(timeout_s)

    def _job(self, lane: Lane, left: deque[Point]) -> dict[str, Any]:
        return {
            "gpu": lane.gpu,
            "weights": left[0].options.weights,
            "tiny": self.settings.tiny,
            "snapshots": str(self.settings.snapshots) if self.settings.snapshots else None,
            "others_used_bytes": lane.others_used_bytes,
            "deadline_s": self.left_s(),
            "probes": [
                {
                    "key": point.key,
                    "spec": point.spec.model_dump(mode="json"),
                    "options": point.options.model_dump(mode="json"),
                }
                for point in left
            ],
        }

    def _fail(self, lane: Lane, left: deque[Point], event: dict[str, Any], worker: Worker) -> None:
        """The child hung, died or raised: the probe in flight gets the outcome (none where the
        sweep itself was interrupted)."""
        if self._stop.is_set():
            return
        if event["event"] == "timeout":
            limit = f"{self.settings.timeout_s:.0f} s a probe, {self.settings.load_timeout_s:.0f} s a load"  # noqa: E501
            evidence = f"killed after its time ({limit}); last words: {worker.last_words()}"
            self._store(lane, left.popleft(), "timeout", evidence)
        else:
            self._store(lane, left.popleft(), "crash", event.get("evidence") or str(event))

    def _result(self, lane: Lane, point: Point, event: dict[str, Any]) -> None:
        process = {**event["process"], "import_seconds": lane.import_s}
        self._store(
            lane, point, event["outcome"], event.get("evidence"),
            meters=Meters(**event["meters"]) if event["meters"] else None,
            process=Process(**process),
        )  # fmt: skip

    def _store(
        self,
        lane: Lane,
        point: Point,
        outcome: Outcome,
        evidence: str | None,
        meters: Meters | None = None,
        process: Process | None = None,
    ) -> None:
        record = Record(
            key=point.key,
            campaign=point.campaign,
            time_utc=datetime.now(UTC).isoformat(timespec="seconds"),
            outcome=outcome,
            evidence=evidence,
            spec=point.spec,
            options=point.options,
            environment=lane.environment,
            meters=meters,
            process=process,
            predicted=predict(point.spec, lane.target),
        )
        self.ledger.append(record)
        self.progress.ends(record, self.left_s())


def lanes_for(gpus: list[int]) -> list[Lane]:
    """A lane a card, each with what the card holds before any child of ours."""
    cards = {card.index: card for card in find_cards()}
    return [
        Lane(gpu, Target(cards[gpu].name, cards[gpu].total_bytes), cards[gpu].used_bytes)
        for gpu in gpus
    ]


def cpu_lane() -> Lane:
    """The CPU as a lane; its memory is not what a probe is held against."""
    return Lane(None, None, 0)
