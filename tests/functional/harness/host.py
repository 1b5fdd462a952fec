# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Where a test's processes run: this machine, or the lab's level 1.

Both offer the same: start and kill processes, talk to their streams and to
UNIX sockets, put and read files. Paths are the host's own; put() turns a path
of this machine into one of the host's. close() ends all that was started.
"""

import os
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from . import agent as wire
from .stream import Stream, Timeout

REPO = Path(__file__).resolve().parent.parent.parent.parent
sys.path.insert(0, str(REPO / "tests" / "lab"))
import lab  # noqa: E402  pylint: disable=wrong-import-position


class CommandFailed(Exception):
    """A command ended with a status other than 0."""


class Process:
    """A process on a host. stdout and stderr are Streams."""

    def __init__(self, name, logs):
        self.name = name
        self.pid = None
        self.stdout = Stream(f"{name} stdout", logs and f"{logs}.out")
        self.stderr = Stream(f"{name} stderr", logs and f"{logs}.err")

    def send(self, data):
        """Bytes for its standard input."""
        raise NotImplementedError

    def close_input(self):
        """End of its standard input."""
        raise NotImplementedError

    def kill(self, number=signal.SIGKILL):
        """Send a signal."""
        raise NotImplementedError

    def poll(self):
        """Exit status as subprocess has it, or None while it runs."""
        raise NotImplementedError

    def wait(self, deadline):
        """Wait for the end; returns the exit status."""
        raise NotImplementedError


class Connection:
    """A connected UNIX socket. `stream` is what arrives."""

    def __init__(self, name, log=None):
        self.stream = Stream(name, log)

    def send(self, data):
        """Bytes for the peer. The peer may be gone: that is seen as the end
        of the stream."""
        raise NotImplementedError

    def close(self):
        """Hang up."""
        raise NotImplementedError


class Host:
    """What both kinds of host share. `patience` multiplies deadlines."""

    patience = 1.0
    #: Where ready-made programs lie, or None: take this machine's.
    log_directory = None

    def _logs(self, name):
        return self.log_directory and str(self.log_directory / name)

    def spawn(self, argv, name=None, env=None):
        """Start a process."""
        raise NotImplementedError

    def connect(self, path, name=None, deadline=30):
        """Connect to a UNIX socket, waiting until somebody listens there."""
        end = time.monotonic() + deadline * self.patience
        while True:
            try:
                return self._connect(path, name or os.path.basename(path))
            except (FileNotFoundError, ConnectionRefusedError) as err:
                if time.monotonic() > end:
                    raise Timeout(f"nobody listens on {path}") from err
                time.sleep(0.05)

    def _connect(self, path, name):
        raise NotImplementedError

    def listen(self, path):
        """Listen on a UNIX socket; returns an object with accept(deadline)
        and close()."""
        raise NotImplementedError

    def put(self, path):
        """The host's path of a file of this machine."""
        raise NotImplementedError

    def temporary_directory(self):
        """A new directory, short enough for socket paths; removed at the
        end."""
        raise NotImplementedError

    def firmware_arguments(self):
        """QEMU's -L."""
        raise NotImplementedError

    def close(self):
        """Kill all that was started."""
        raise NotImplementedError

    def run(self, argv, deadline=60, data=b"", check=True):
        """Run to the end; returns (exit status, stdout, stderr)."""
        process = self.spawn(argv, name=None)
        if data:
            process.send(data)
        process.close_input()
        status = process.wait(deadline * self.patience)
        out, err = process.stdout.text(), process.stderr.text()
        if check and status:
            raise CommandFailed(f"{shlex.join(argv)}: status {status}\n{err}")
        return status, out, err

    def read_file(self, path):
        """A file's text."""
        return self.run(["cat", path])[1]

    def exists(self, path):
        """Is there such a path?"""
        return self.run(["test", "-e", path], check=False)[0] == 0


# ---------------------------------------------------------------- this machine

def pump(read, stream):
    """Feed a stream from a blocking read, in a thread."""
    def loop():
        try:
            while data := read():
                stream.feed(data)
        except (OSError, ValueError):
            pass
        stream.end()
    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    return thread


class LocalProcess(Process):
    """A child of this process."""

    def __init__(self, argv, name, env, logs):
        super().__init__(name, logs)
        # setpriv: a test that is killed takes its QEMUs along.
        self._child = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *argv], bufsize=0,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, env={**os.environ, **(env or {})})
        self.pid = self._child.pid
        self._pumps = [pump(lambda f=pipe: f.read(65536), stream)
                       for pipe, stream in ((self._child.stdout, self.stdout),
                                            (self._child.stderr, self.stderr))]

    def send(self, data):
        try:
            self._child.stdin.write(data)
        except BrokenPipeError:
            pass

    def close_input(self):
        self._child.stdin.close()

    def kill(self, number=signal.SIGKILL):
        self._child.send_signal(number)

    def poll(self):
        return self._child.poll()

    def wait(self, deadline):
        try:
            status = self._child.wait(deadline)
        except subprocess.TimeoutExpired:
            raise Timeout(f"{self.name} still runs after {deadline:.0f} s; "
                          f"stderr:\n{self.stderr.tail()}") from None
        for thread in self._pumps:
            thread.join(5)
        return status

    def close(self):
        """Kill it if it runs."""
        if self._child.poll() is None:
            self._child.kill()
        self.wait(10)
        self._child.stdin.close()


class LocalConnection(Connection):
    """A socket of this process."""

    def __init__(self, sock, name, log=None):
        super().__init__(name, log)
        self._socket = sock
        pump(lambda: sock.recv(65536), self.stream)

    def send(self, data):
        try:
            self._socket.sendall(data)
        except (BrokenPipeError, ConnectionResetError):
            pass

    def close(self):
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        self._socket.close()


class LocalListener:
    """A listening socket of this process."""

    def __init__(self, path):
        self.path = path
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(path)
        self._socket.listen(16)

    def accept(self, deadline):
        """The next connection."""
        self._socket.settimeout(deadline)
        try:
            sock, _ = self._socket.accept()
        except socket.timeout:
            raise Timeout(f"nobody connects to {self.path}") from None
        sock.settimeout(None)
        return LocalConnection(sock, f"peer on {self.path}")

    def close(self):
        """Listen no more."""
        self._socket.close()


class LocalHost(Host):
    """This machine."""

    def __init__(self):
        self._open = []
        self._directories = []

    def spawn(self, argv, name=None, env=None):
        process = LocalProcess([str(word) for word in argv], name or argv[0],
                               env, name and self._logs(name))
        self._open.append(process)
        return process

    def _connect(self, path, name):
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.connect(path)
        except OSError:
            sock.close()
            raise
        connection = LocalConnection(sock, name, self._logs(name))
        self._open.append(connection)
        return connection

    def listen(self, path):
        listener = LocalListener(path)
        self._open.append(listener)
        return listener

    def put(self, path):
        return str(path)

    def temporary_directory(self):
        path = tempfile.mkdtemp(prefix="vg-")
        self._directories.append(path)
        return path

    def firmware_arguments(self):
        return lab.firmware_arguments()

    def close(self):
        for thing in reversed(self._open):
            thing.close()
        for path in self._directories:
            shutil.rmtree(path, ignore_errors=True)


# ------------------------------------------------------------------------ lab

class LabProcess(Process):
    """A process in level 1."""

    def __init__(self, agent, argv, name, env, logs):
        super().__init__(name, logs)
        self._agent = agent
        self._status = None
        self._ended = threading.Event()
        words = ["", *(f"{k}={v}" for k, v in (env or {}).items()), "", *argv]
        payload = b"".join(word.encode() + b"\0" for word in words)
        self._channel, self.pid = agent.open(wire.SPAWN, payload, self._handle)

    def _handle(self, kind, payload):
        stream = {wire.OUTPUT: self.stdout, wire.ERROR: self.stderr}.get(kind)
        if stream and payload:
            stream.feed(payload)
        elif stream:
            stream.end()
        elif kind == wire.EXIT:
            self._status = os.waitstatus_to_exitcode(
                struct.unpack("<I", payload)[0])
            self.stdout.end()
            self.stderr.end()
            self._ended.set()

    def send(self, data):
        self._agent.send_input(self._channel, data)

    def close_input(self):
        self._agent.send(wire.INPUT, self._channel)

    def kill(self, number=signal.SIGKILL):
        self._agent.send(wire.SIGNAL, self._channel,
                         struct.pack("<I", int(number)))

    def poll(self):
        return self._status

    def wait(self, deadline):
        if not self._ended.wait(deadline):
            raise Timeout(f"{self.name} still runs after {deadline:.0f} s; "
                          f"stderr:\n{self.stderr.tail()}")
        return self._status


class LabConnection(Connection):
    """A socket of the agent in level 1."""

    def __init__(self, agent, name, path=None, channel=None, log=None):
        super().__init__(name, log)
        self._agent = agent
        if channel is None:
            self._channel, _ = agent.open(wire.CONNECT, path.encode(),
                                          self._handle)
        else:
            self._channel = channel
            agent.attach(channel, self._handle)

    def _handle(self, kind, payload):
        if kind == wire.OUTPUT and payload:
            self.stream.feed(payload)
        elif kind in (wire.OUTPUT, wire.EXIT):
            self.stream.end()

    def send(self, data):
        self._agent.send_input(self._channel, data)

    def close(self):
        self._agent.send(wire.CLOSE, self._channel)
        self.stream.end()


class LabListener:
    """A listening socket of the agent."""

    def __init__(self, agent, path):
        self.path = path
        self._agent = agent
        self._accepted = []
        self._changed = threading.Condition()
        self._channel, _ = agent.open(wire.LISTEN, path.encode(), self._handle)

    def _handle(self, kind, payload):
        if kind == wire.ACCEPTED:
            with self._changed:
                self._accepted.append(struct.unpack("<I", payload)[0])
                self._changed.notify_all()

    def accept(self, deadline):
        """The next connection."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._accepted, deadline):
                raise Timeout(f"nobody connects to {self.path}")
            channel = self._accepted.pop(0)
        return LabConnection(self._agent, f"peer on {self.path}",
                             channel=channel)

    def close(self):
        """Listen no more."""
        self._agent.send(wire.CLOSE, self._channel)


class LabHost(Host):
    """Level 1 of the lab."""

    patience = 5.0

    def __init__(self, directory):
        self._agent = wire.Agent(directory, 180)
        self._directories = []

    def spawn(self, argv, name=None, env=None):
        return LabProcess(self._agent, [str(word) for word in argv],
                          name or argv[0], env, name and self._logs(name))

    def _connect(self, path, name):
        return LabConnection(self._agent, name, path, log=self._logs(name))

    def listen(self, path):
        return LabListener(self._agent, path)

    def put(self, path):
        stored = lab.stored_name(path)
        if not self.exists(stored):
            mode = "755" if os.access(path, os.X_OK) else "644"
            scratch = f"{stored}.{os.getpid()}"
            self.run(["sh", "-c", 'cat >"$1" && chmod "$2" "$1" && '
                      'mv "$1" "$3"', "put", scratch, mode, stored],
                     data=Path(path).read_bytes())
        return stored

    def temporary_directory(self):
        path = self.run(["mktemp", "-d", "/tmp/vg-XXXXXX"])[1].strip()
        self._directories.append(path)
        return path

    def firmware_arguments(self):
        return ["-L", "/vg/firmware"]

    def close(self):
        for path in self._directories:
            try:
                self.run(["rm", "-rf", path], check=False)
            except (OSError, Timeout):
                pass
        self._agent.close()
