# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Bytes that arrive from a process or a socket, and waiting for some of them.

A thread somewhere feeds; a test waits with a deadline. Nothing here knows
where the bytes come from. Everything that arrived is kept, and written to a
file as it comes if the owner wants a log.
"""

import re
import threading
import time


class Timeout(Exception):
    """What was waited for did not come in time."""


class Ended(Exception):
    """The stream ended before what was waited for came."""


class Stream:
    """An append-only buffer with a read position."""

    def __init__(self, name, log=None):
        self.name = name
        self._data = bytearray()
        self._position = 0
        self._ended = False
        self._changed = threading.Condition()
        self._log = open(log, "ab", buffering=0) if log else None

    # --- the feeding side

    def feed(self, data):
        """More bytes."""
        with self._changed:
            self._data += data
            if self._log:
                self._log.write(data)
            self._changed.notify_all()

    def end(self):
        """No more bytes will come."""
        with self._changed:
            self._ended = True
            if self._log:
                self._log.close()
                self._log = None
            self._changed.notify_all()

    # --- the reading side

    def _wait(self, found, deadline, what):
        """Wait until found() is not None; returns it."""
        end = time.monotonic() + deadline
        with self._changed:
            while True:
                result = found()
                if result is not None:
                    return result
                left = end - time.monotonic()
                if self._ended:
                    raise Ended(f"{self.name} ended before {what}; it ends "
                                f"with:\n{self.tail()}")
                if left <= 0:
                    raise Timeout(f"{self.name}: no {what} in {deadline:.0f} s"
                                  f"; so far it ends with:\n{self.tail()}")
                self._changed.wait(left)

    def expect(self, pattern, deadline):
        """Wait for a regular expression after what was read before; reading
        goes on behind it. Returns the match, of str."""
        regex = re.compile(pattern.encode(), re.MULTILINE)

        def found():
            match = regex.search(self._data, self._position)
            if match:
                self._position = match.end()
                # The buffer goes on changing: take the match out of it.
                return re.compile(pattern, re.MULTILINE).search(
                    bytes(self._data[:match.end()]).decode("latin-1"),
                    match.start())
            return None

        return self._wait(found, deadline, repr(pattern))

    def line(self, deadline):
        """The next whole line, without its end."""
        searched = self._position

        def found():
            nonlocal searched
            end = self._data.find(b"\n", searched)
            if end < 0:
                searched = len(self._data)
                return None
            data = bytes(self._data[self._position:end])
            self._position = end + 1
            return data

        data = self._wait(found, deadline, "whole line")
        return data.decode("latin-1").rstrip("\r")

    def read(self, size, deadline):
        """Exactly `size` bytes."""
        def found():
            if len(self._data) - self._position < size:
                return None
            data = bytes(self._data[self._position:self._position + size])
            self._position += size
            return data

        return self._wait(found, deadline, f"{size} bytes")

    def wait_end(self, deadline):
        """Wait for the end."""
        self._wait(lambda: True if self._ended else None, deadline, "end")

    @property
    def ended(self):
        """Has the other side closed?"""
        return self._ended

    def mark(self):
        """A position for text(since=...)."""
        with self._changed:
            return len(self._data)

    def text(self, since=0):
        """All that came, as text."""
        with self._changed:
            return bytes(self._data[since:]).decode(errors="replace")

    def tail(self, lines=20):
        """The last lines."""
        text = bytes(self._data[-8192:]).decode(errors="replace")
        return "\n".join(text.splitlines()[-lines:])
