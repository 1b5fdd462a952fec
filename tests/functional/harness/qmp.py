# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A QMP client over a Host's connection."""

import json
import threading
import time

from .stream import Ended, Timeout


class QmpError(Exception):
    """QEMU refused a command."""


class Qmp:
    """QEMU's monitor. Events are kept until somebody waits for them."""

    def __init__(self, connection, patience=1.0):
        self._connection = connection
        self._patience = patience
        self._lock = threading.Condition()
        self._answers = {}
        self._next_id = 1
        self._ended = None
        self.events = []
        threading.Thread(target=self._receive, daemon=True).start()
        self.command("qmp_capabilities")

    def _receive(self):
        try:
            while True:
                message = json.loads(self._connection.stream.line(1 << 20))
                with self._lock:
                    if "event" in message:
                        self.events.append(message)
                    elif "id" in message:
                        self._answers[message["id"]] = message
                    self._lock.notify_all()
        except (Ended, Timeout, ValueError) as err:
            with self._lock:
                self._ended = err
                self._lock.notify_all()

    def command(self, name, deadline=30, **arguments):
        """Run a command; returns what it returns."""
        with self._lock:
            number = self._next_id
            self._next_id += 1
        self._connection.send(json.dumps(
            {"execute": name, "arguments": {k.replace("_", "-"): v for k, v
                                            in arguments.items()},
             "id": number}).encode() + b"\n")
        with self._lock:
            if not self._lock.wait_for(
                    lambda: number in self._answers or self._ended,
                    deadline * self._patience):
                raise Timeout(f"QMP {name} is not answered")
            if number not in self._answers:
                raise Ended(f"QEMU hung up before it answered {name}")
            answer = self._answers.pop(number)
        if "error" in answer:
            raise QmpError(f"{name}: {answer['error']['desc']}")
        return answer["return"]

    def human(self, line):
        """A command of the human monitor; returns its output."""
        return self.command("human-monitor-command", command_line=line)

    def has_event(self, name, wait=0.2):
        """Is there such an event? Gives it a moment to come."""
        with self._lock:
            return bool(self._lock.wait_for(
                lambda: any(e["event"] == name for e in self.events), wait))

    def event(self, *names, deadline=30):
        """Wait for the first of some events, take it out of `events` and
        return its name."""
        return self._wait_for(names, deadline)["event"]

    def wait_for(self, name, deadline=30):
        """The same; returns the event's data."""
        return self._wait_for([name], deadline)["data"]

    def _wait_for(self, names, deadline):
        end = time.monotonic() + deadline * self._patience
        with self._lock:
            while True:
                for event in self.events:
                    if event["event"] in names:
                        self.events.remove(event)
                        return event
                left = end - time.monotonic()
                if left <= 0 or self._ended:
                    raise Timeout(f"no QMP event {' or '.join(names)}; seen: "
                                  f"{[e['event'] for e in self.events]}")
                self._lock.wait(left)

    def take(self, name):
        """Take all such events out of `events`; returns their data."""
        with self._lock:
            taken = [e["data"] for e in self.events if e["event"] == name]
            self.events = [e for e in self.events if e["event"] != name]
            return taken

    def close(self):
        """Hang up."""
        self._connection.close()
