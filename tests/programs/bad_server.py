"""An HTTP server that does wrong what the path says. Usage: bad_server.py PORT

Counts requests by path and writes them in JSON when SIGTERM ends it.
"""
import collections
import json
import signal
import socket
import struct
import sys
import threading
import time

counts = collections.Counter()


def reset(connection):
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def serve(connection):
    head = b""
    while b"\r\n\r\n" not in head:
        more = connection.recv(65536)
        if not more:
            return connection.close()
        head += more
    path = head.split(b" ")[1].decode().split("?")[0]
    counts[path] += 1
    send = connection.sendall
    if path == "/reset":
        return reset(connection)
    if path == "/close":
        return connection.close()
    if path == "/hang":
        time.sleep(30)
    elif path == "/half-then-fin":
        send(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n" + b"x" * 500)
    elif path == "/half-then-reset":
        send(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n" + b"x" * 500)
        time.sleep(0.2)
        return reset(connection)
    elif path == "/chunked-cut":
        send(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n")
    elif path == "/garbage":
        send(b"this is no HTTP at all\r\n\r\n")
    elif path == "/bad-length":
        send(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\ncontent-length: 7\r\n\r\nhello!!")
    elif path == "/slow":
        time.sleep(1)
        send(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
    elif path == "/until-close":
        send(b"HTTP/1.0 200 OK\r\n\r\n" + b"y" * 1000)
    elif path == "/retry-me":
        if counts[path] % 2:
            return reset(connection)
        send(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
    else:
        send(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
    connection.close()


listener = socket.create_server(("::", int(sys.argv[1])), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)


def accept():
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=serve, args=(connection,), daemon=True).start()


threading.Thread(target=accept, daemon=True).start()
print("ready", flush=True)
stop = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: stop.set())
stop.wait()
print(json.dumps(counts), flush=True)
