"""A process that keeps a device and does one job after the other.

A kernel that reads where it must not makes a device useless to its process, and one that never ends makes the process
useless. Either costs one job: a new process takes over.
"""

import json
import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, Self

Record = dict[str, Any]


class Worker:
    """Calls `serve(connection, *setup)` in a process of its own, which answers jobs until the connection ends."""

    def __init__(self, serve: Callable[..., None], *setup: Any):
        self.serve, self.setup = serve, setup
        self.process: Any = None
        self.connection: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def call(self, job: str, limit: float, /, **arguments: Any) -> Record:
        """The job's record, or {"error": ...}, also where no answer came within `limit` seconds."""
        if self.process is None:
            self._start()
        try:
            self.connection.send_bytes(json.dumps([job, arguments]).encode())
            if not self.connection.poll(limit):
                self.end()
                return {"error": f"no answer within {limit:.0f} s; the process was ended"}
            record = json.loads(self.connection.recv_bytes())
        except (EOFError, OSError):
            return {"error": f"the process died with exit code {self.end()}"}
        if record.get("fatal"):
            self.end()
        return record

    def end(self) -> int | None:
        """Ends the process, if there is one, and returns its exit code."""
        process, self.process = self.process, None
        if process is None:
            return None
        self.connection.close()
        process.join(1)  # one that died has not quite gone
        process.kill()
        process.join(10)
        return process.exitcode

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would share what it cannot share of a device
        self.connection, other = context.Pipe()
        self.process = context.Process(target=self.serve, args=(other, *self.setup))
        self.process.start()
        other.close()


def answers(connection: Connection, done: Callable[[str, Record], Record]) -> None:
    """Answers jobs by `done(job, arguments)` until nobody asks any more, or the answer is that it cannot go on."""
    record: Record = {}
    while not record.get("fatal"):
        try:
            job, arguments = json.loads(connection.recv_bytes())
        except EOFError:
            return
        record = done(job, arguments)
        connection.send_bytes(json.dumps(record, allow_nan=False).encode())
