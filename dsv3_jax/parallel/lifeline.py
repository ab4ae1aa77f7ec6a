"""Connections that tell every process of a job at once when one of them is gone, and which.

JAX's own heartbeats take minutes, and end the others without a name. Here each process holds a TCP
connection to process 0. The kernel closes those of a process that dies, at once, and its keep-alive probes
find a host that is gone in `SILENCE` seconds; a process that is only busy, however long, is never taken
for lost. Process 0 tells the others, and all end.

Each peer says one thing, when it leaves: "bye", or the exit code with which it ends before the others.
Process 0 says one line to all, "INDEX NAME HOW": who has left, and how: "lost", "bye" or an exit code.
"""

import contextlib
import ctypes
import os
import secrets
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

# Of a process that ends because another is gone.
EXIT_LOST = 4
# Seconds until the connection to a host that does not answer is given up.
SILENCE = 20
CONTINUES = "the same command continues from the last checkpoint"
# How processes end that were asked to stop.
STOPPED = {"130", "143"}


class Lifeline:
    """Watches the job from a thread of its own, from when it is made until `bye`.

    Args:
      index: this process.
      count: of the job; above 1.
      host: where the others reach process 0.
      from_first: gives every process what the function given to it returns in process 0.

    Raises:
      OSError: the processes cannot reach each other.
    """

    def __init__(
        self, index: int, count: int, host: str, from_first: Callable[[Callable[[], list[Any]]], list[Any]]
    ):
        self.index, self.count, self.name = index, count, socket.gethostname()
        self._leaving = False
        self._hub: Any = None  # Of a peer: its connection to process 0.
        self._peers: dict[socket.socket, tuple[int, str]] = {}  # Of process 0.
        _delay_abort()
        if index == 0:
            listener = _listener()
            token = secrets.token_hex(8)  # So that a stranger's connection is not taken for a process.
            from_first(lambda: [listener.getsockname()[1], token])
            with listener:
                self._gather(listener, token)
            watch = self._watch_peers
        else:
            port, token = from_first(list)
            self._hub = socket.create_connection((host, port), timeout=60)
            self._hub.sendall(f"{token} {index} {self.name}\n".encode())
            self._hub_name = _line(self._hub)
            if not self._hub_name:
                raise OSError(f"process 0 at {host}:{port} closed the connection")
            _keep_alive(self._hub)
            watch = self._watch_hub
        self._thread = threading.Thread(target=watch, name="lifeline", daemon=True)
        self._thread.start()

    def bye(self) -> None:
        """Leaves at the end of a run, when all have come to it."""
        self._leaving = True
        if self.index == 0:
            self._tell_peers(f"0 {self.name} bye")
        else:
            _send(self._hub, "bye")
        self._thread.join(SILENCE)
        for connection in (self._hub, *self._peers):
            if connection is not None:
                connection.close()

    def leave(self, code: int) -> None:
        """Tells the others that this process is about to end with `code`, so that they end too."""
        if self._leaving:
            return
        self._leaving = True
        if self.index == 0:
            self._tell_peers(f"0 {self.name} {code}")
            self._wait_for_peers()
        else:
            _send(self._hub, str(code))

    def _gather(self, listener: socket.socket, token: str) -> None:
        listener.settimeout(60)
        while len(self._peers) < self.count - 1:
            try:
                peer, _ = listener.accept()
            except TimeoutError:
                came = {index for index, _ in self._peers.values()}
                missing = ", ".join(str(i) for i in range(1, self.count) if i not in came)
                raise OSError(f"process {missing} did not connect to process 0 on {self.name}") from None
            peer.settimeout(10)
            words = _line(peer).split(" ", 2)
            if len(words) == 3 and secrets.compare_digest(words[0], token):
                self._peers[peer] = int(words[1]), words[2]
                _send(peer, self.name)
                _keep_alive(peer)
            else:
                peer.close()

    def _watch_peers(self) -> None:
        with selectors.DefaultSelector() as selector:
            for peer in self._peers:
                selector.register(peer, selectors.EVENT_READ)
            while selector.get_map():
                for key, _ in selector.select():
                    peer: Any = key.fileobj
                    selector.unregister(peer)
                    how = _line(peer) or "lost"
                    if how != "bye" and not self._leaving:
                        index, name = self._peers.pop(peer)
                        self._tell_peers(f"{index} {name} {how}")
                        self._wait_for_peers()
                        self._end(index, name, how)

    def _watch_hub(self) -> None:
        line = _line(self._hub)
        index, name, how = line.rsplit(" ", 2) if line else ("0", self._hub_name, "lost")
        if how != "bye" and not self._leaving:
            self._end(int(index), name, how)

    def _tell_peers(self, line: str) -> None:
        for peer in list(self._peers):
            _send(peer, line)

    def _wait_for_peers(self, seconds: float = 5.0) -> None:
        """Until they have read what was sent, and ended: our end would break their connections first."""
        end = time.monotonic() + seconds
        for peer in list(self._peers):
            while time.monotonic() < end:
                peer.settimeout(max(0.01, end - time.monotonic()))
                if not _line(peer):
                    break

    def _end(self, index: int, name: str, how: str) -> NoReturn:
        who = f"process {index} of {self.count}, on {name},"
        if how in STOPPED:
            message = f"stopped, as {who} was asked to"
        else:
            message = f"{who} was lost" if how == "lost" else f"{who} ended with exit code {how}"
        # Written to the descriptor: the main thread may be writing to the stream, or never return to Python.
        os.write(2, f"\n{message}; {CONTINUES}\n".encode())
        os._exit(EXIT_LOST if how == "lost" else int(how))


def _listener() -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=4096)
    return socket.create_server(("", 0), backlog=4096)


def _keep_alive(connection: socket.socket) -> None:
    """No time limit on silence, and probes by the kernel: it is the host that has to answer, not Python."""
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    probes = {"TCP_KEEPIDLE": SILENCE // 4, "TCP_KEEPINTVL": SILENCE // 4, "TCP_KEEPCNT": 3}
    for option, value in (probes | {"TCP_USER_TIMEOUT": 1000 * SILENCE}).items():
        if hasattr(socket, option):  # Not on every platform.
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def _send(connection: socket.socket, line: str) -> None:
    with contextlib.suppress(OSError):  # It is gone, which the watching thread sees too.
        connection.sendall(f"{line}\n".encode())


def _line(connection: socket.socket) -> str:
    """The next line, "" where the connection is closed, broken or silent for too long."""
    data = b""
    try:
        while not data.endswith(b"\n"):
            more = connection.recv(1)
            if not more:
                return ""
            data += more
    except OSError:
        return ""
    return data.decode(errors="replace").strip()


def _delay_abort() -> None:
    """JAX aborts a process as soon as process 0 is gone, and without its name: give the lifeline time.

    The C library's own `sleep` becomes the handler of SIGABRT, called with the signal's number: 6 seconds,
    after which the process aborts as it would have. Nothing of Python runs in the aborting thread.
    """
    if sys.platform.startswith("linux"):
        library = ctypes.CDLL(None)
        library.signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
        library.signal.restype = ctypes.c_void_p
        library.signal(signal.SIGABRT, ctypes.cast(library.sleep, ctypes.c_void_p))
