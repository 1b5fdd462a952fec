# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Client of the lab's agent (tests/lab/agent.c, which describes the protocol)."""

import fcntl
import os
import socket
import struct
import threading
import time
from pathlib import Path

from .stream import Timeout

MAGIC = 0x47414756
HEADER = struct.Struct("<IIII")
MAX_PAYLOAD = 32768
# In the lab's directory: somebody found that it does not answer any more.
DEAD = "dead"

RESET, SPAWN, INPUT, SIGNAL, CONNECT, LISTEN, CLOSE = range(1, 8)
HELLO, STARTED, FAILED, OUTPUT, ERROR, EXIT, ACCEPTED = range(0x81, 0x88)


class Agent:
    """One port of the agent, held for as long as this object is open."""

    def __init__(self, directory, deadline):
        self.directory = Path(directory)
        self._send_lock = threading.Lock()
        self._lock = threading.Condition()
        self._handlers = {}
        self._next_id = 1
        self._early = {}
        self._gone = None
        self._socket, self._port_lock = self._claim(time.monotonic() + deadline)
        self._handshake(deadline)
        threading.Thread(target=self._receive, daemon=True).start()

    def _claim(self, end):
        """A port that no other test uses now; waits for one."""
        while True:
            if (self.directory / DEAD).exists():
                raise Timeout(f"the lab in {self.directory} is gone")
            gone = True
            for path in sorted(self.directory.glob("port-*[0-9]")):
                lock = open(f"{path}.lock", "w", encoding="ascii")
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    port = socket.socket(socket.AF_UNIX)
                    port.connect(str(path))
                    return port, lock
                except (ConnectionRefusedError, FileNotFoundError):
                    lock.close()
                except OSError:
                    gone = False
                    lock.close()
            # Whoever gave a test this variable has talked to the lab before.
            if gone and os.environ.get("VHOST_GUARD_LAB"):
                raise Timeout(f"the lab in {self.directory} is gone")
            if time.monotonic() > end:
                raise Timeout(f"no free port of the lab in {self.directory}")
            time.sleep(0.1)

    def _handshake(self, deadline):
        """Make the agent forget its last client. The zeros end whatever
        message that one was in the middle of."""
        end = time.monotonic() + deadline
        nonce = os.urandom(16)
        reset = bytes(MAX_PAYLOAD + HEADER.size) + self._frame(RESET, 0, nonce)
        hello = self._frame(HELLO, 0, nonce)
        received = b""
        while True:
            # While the lab boots nobody reads: ask again every second.
            self._socket.settimeout(1)
            try:
                self._socket.sendall(reset)
                while hello not in received:
                    data = self._socket.recv(65536)
                    if not data:
                        raise Timeout("the lab went away")
                    received = received[-len(hello):] + data
                break
            except socket.timeout:
                if time.monotonic() > end:
                    # Those who come next need not wait as long.
                    (self.directory / DEAD).touch()
                    raise Timeout("the lab's agent does not answer") from None
        self._received = received[received.index(hello) + len(hello):]
        self._socket.settimeout(None)

    @staticmethod
    def _frame(kind, channel, payload=b""):
        return HEADER.pack(MAGIC, kind, channel, len(payload)) + payload

    def send(self, kind, channel, payload=b""):
        """One message."""
        with self._send_lock:
            self._socket.sendall(self._frame(kind, channel, payload))

    def send_input(self, channel, data):
        """Bytes for a process or a socket."""
        for at in range(0, len(data), MAX_PAYLOAD):
            self.send(INPUT, channel, data[at:at + MAX_PAYLOAD])

    def _receive(self):
        data = bytearray(self._received)
        try:
            while True:
                while len(data) >= HEADER.size:
                    magic, kind, channel, size = HEADER.unpack_from(data)
                    if magic != MAGIC:
                        raise ValueError("lost the lab's message boundaries")
                    if len(data) < HEADER.size + size:
                        break
                    payload = bytes(data[HEADER.size:HEADER.size + size])
                    del data[:HEADER.size + size]
                    # HELLOs of repeated RESETs are late, nothing more.
                    if kind != HELLO:
                        self._dispatch(kind, channel, payload)
                more = self._socket.recv(1 << 18)
                if not more:
                    raise ValueError("the lab went away")
                data += more
        except (OSError, ValueError) as err:
            with self._lock:
                self._gone = err
                handlers = list(self._handlers.values())
                self._lock.notify_all()
            for handler in handlers:
                handler(EXIT, struct.pack("<I", 0xff00))

    def _dispatch(self, kind, channel, payload):
        with self._lock:
            handler = self._handlers.get(channel)
            if handler is None:
                # A connection that was accepted and not yet picked up.
                self._early.setdefault(channel, []).append((kind, payload))
                return
        handler(kind, payload)

    def attach(self, channel, handler):
        """Have handler(kind, payload) called for a channel's messages, first
        those that have come already."""
        while True:
            with self._lock:
                early = self._early.pop(channel, None)
                if not early:
                    self._handlers[channel] = handler
                    return
            for message in early:
                handler(*message)

    def open(self, kind, payload, handler, deadline=60):
        """Start something; returns (channel, value of STARTED). Raises the
        OSError that it failed with."""
        answer = []

        def first(kind, payload):
            if not answer and kind in (STARTED, FAILED, EXIT):
                with self._lock:
                    answer.append((kind, struct.unpack("<I", payload)[0]))
                    self._lock.notify_all()
            else:
                handler(kind, payload)

        with self._lock:
            channel = self._next_id
            self._next_id += 1
            self._handlers[channel] = first
        self.send(kind, channel, payload)
        with self._lock:
            if not self._lock.wait_for(lambda: answer or self._gone, deadline):
                raise Timeout("the lab's agent does not answer")
            if not answer:
                raise Timeout(str(self._gone))
        kind, value = answer[0]
        if kind != STARTED:
            raise OSError(value, os.strerror(value))
        return channel, value

    def close(self):
        """Let go of the port; the agent kills what was started."""
        # shutdown: close alone does nothing while the thread is in recv.
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._port_lock.close()
