"""The only way out of a sandbox that has one: an HTTP proxy outside it that connects to names on a list.

Its listening socket was made in the sandbox's network namespace and is held outside: nothing of ours runs inside.
What is encrypted stays so: the list is of names that are connected to, not of what is said to them.
"""

import contextlib
import encodings.idna  # noqa: F401  of names; who became another user may not read Python's files
import ipaddress
import json
import os
import re
import select
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from pelagos.sandbox import linux
from pelagos.sandbox.container import PROXY_PORT

PORTS = (80, 443)  # of an entry without one
CONNECTIONS = 64
HEAD_BYTES, IDLE_S = 1 << 16, 300.0
_REQUEST = re.compile(
    rb"(CONNECT) ([^ :/]+|\[[0-9a-fA-F:]+\]):(\d{1,5}) HTTP/1\.[01]\r\n"
    rb"|([A-Z]+) http://([^ :/]+)(?::(\d{1,5}))?(/[^ ]*)? (HTTP/1\.[01]\r\n)"
)


def start(notes: Path, allowed: tuple[str, ...], enter: Callable[[], None], ids: tuple[int, int]) -> int:
    """Fork the proxy and return its pid; `enter` moves a process into the sandbox's network."""
    ours, theirs = socket.socketpair()

    def listen() -> None:
        enter()
        with socket.create_server(("127.0.0.1", PROXY_PORT), backlog=CONNECTIONS) as server:
            socket.send_fds(theirs, [b"s"], [server.fileno()])

    def serve() -> None:
        linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)
        fd = os.open(notes, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        linux.close_all_but([listener, fd])
        linux.become(*ids)
        linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)
        gate = threading.Semaphore(CONNECTIONS)
        with socket.socket(fileno=listener) as server:
            while True:
                client, _ = server.accept()
                gate.acquire()
                threading.Thread(target=_one, args=(client, allowed, fd, gate), daemon=True).start()

    helper = linux.fork(listen, traceback.print_exception)
    os.waitpid(helper, 0)
    theirs.close()
    listener = socket.recv_fds(ours, 1, 1)[1][0]
    ours.close()
    pid = linux.fork(serve, traceback.print_exception)
    os.close(listener)
    return pid


def addresses(host: str, port: int, allowed: tuple[str, ...]) -> list[tuple[str, int]]:
    """Return where to connect for an allowed name; PermissionError says why not. Private addresses must be listed."""
    for entry in allowed:
        name, _, listed = entry.partition(":")
        is_named = host == name or (name.startswith(".") and host.endswith(name))
        if is_named and port in ([int(listed)] if listed else PORTS):
            break
    else:
        raise PermissionError(f"{host}:{port} is not on this sandbox's list")
    found = [str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    # A name on the list may be made to point into the host's own network: only what is listed as an address may.
    usable = [a for a in found if a == host or ipaddress.ip_address(a).is_global]
    if not usable:
        raise PermissionError(f"{host} is at {found}, which is no public address")
    return [(a, port) for a in usable]


def _one(client: socket.socket, allowed: tuple[str, ...], notes: int, gate: threading.Semaphore) -> None:
    try:
        with client:
            client.settimeout(30)
            head = b""
            while b"\r\n\r\n" not in head and len(head) < HEAD_BYTES:
                if not (piece := client.recv(HEAD_BYTES)):
                    return
                head += piece
            told, say = _REQUEST.match(head), b"HTTP/1.1 %s\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
            if not told:
                client.sendall(say % b"400 expected CONNECT, or a request for an http:// address")
                return
            host = (told[2] or told[5]).decode("ascii", "replace").strip("[]").lower()
            port = int(told[3] or told[6] or 80)
            fact = {"time": round(time.time(), 3), "host": host, "port": port}
            try:
                place = addresses(host, port, allowed)[0]
                with socket.create_connection(place, 20) as server:
                    os.write(notes, json.dumps(fact | {"allowed": True, "address": place[0]}).encode() + b"\n")
                    if told[1]:
                        client.sendall(b"HTTP/1.1 200 connected\r\n\r\n")
                        rest = head[head.index(b"\r\n\r\n") + 4 :]
                    else:
                        rest = told[4] + b" " + (told[7] or b"/") + b" " + told[8] + head[told.end() :]
                    server.sendall(rest)
                    _relay(client, server)
            except PermissionError as error:
                os.write(notes, json.dumps(fact | {"allowed": False, "why": str(error)}).encode() + b"\n")
                client.sendall(say % b"403 not on this sandbox's list")
            except (OSError, UnicodeError):
                client.sendall(say % b"502 cannot connect")
    except OSError:
        pass  # the client inside is gone
    finally:
        gate.release()


def _relay(one: socket.socket, two: socket.socket) -> None:
    other, open_ends = {one: two, two: one}, {one, two}
    while open_ends:
        ready, _, _ = select.select(list(open_ends), [], [], IDLE_S)
        if not ready:
            return
        for end in ready:
            if data := end.recv(1 << 16):
                other[end].sendall(data)
            else:
                open_ends.discard(end)
                with contextlib.suppress(OSError):
                    other[end].shutdown(socket.SHUT_WR)
