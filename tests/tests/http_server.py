"""A HTTP/1.1 server that misbehaves on request, and writes down what it was asked.

usage: http_server.py NAME PORT DIRECTORY

DIRECTORY/mode, read at each request: ok (or no file), fail (503), reset (RST).
DIRECTORY/requests: one line for each request: method, path, x-undermesh-attempt.
"""

import asyncio
import hashlib
import os
import socket
import struct
import sys

NAME, PORT, DIRECTORY = sys.argv[1], int(sys.argv[2]), sys.argv[3]
LOG = open(os.path.join(DIRECTORY, "requests"), "a", buffering=1)
CHUNK = b"u" * 65536


def mode():
    try:
        with open(os.path.join(DIRECTORY, "mode")) as file:
            return file.read().strip()
    except FileNotFoundError:
        return "ok"


async def head_of(reader):
    lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    method, path, _ = lines[0].split(" ")
    headers = {}
    for line in lines[1:]:
        if line:
            name, value = line.split(":", 1)
            headers[name.lower()] = value.strip()
    return method, path, headers


async def body_of(reader, headers):
    digest, length = hashlib.sha256(), 0

    async def take(count):
        nonlocal length
        while count:
            data = await reader.read(min(count, 1 << 20))
            if not data:
                raise asyncio.IncompleteReadError(b"", count)
            digest.update(data)
            length += len(data)
            count -= len(data)

    if headers.get("transfer-encoding") == "chunked":
        while True:
            size = int((await reader.readline()).split(b";")[0], 16)
            await take(size)
            await reader.readline()
            if not size:
                break
    else:
        await take(int(headers.get("content-length", "0")))
    return length, digest.hexdigest()


def reset(writer):
    linger = struct.pack("ii", 1, 0)
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    writer.transport.abort()


async def answer(writer, status, body, more=""):
    head = f"HTTP/1.1 {status}\r\ncontent-length: {len(body)}\r\nserver-name: {NAME}\r\n{more}\r\n"
    writer.write(head.encode() + body)
    await writer.drain()


async def serve(reader, writer):
    try:
        while True:
            method, path, headers = await head_of(reader)
            length, digest = await body_of(reader, headers)
            LOG.write(f"{method} {path} {headers.get('x-undermesh-attempt', '-')}\n")
            how = mode()
            if how == "reset":
                return reset(writer)
            if how == "fail":
                await answer(writer, "503 Service Unavailable", b"broken\n")
            elif path == "/headers":
                text = "".join(f"{name}: {value}\n" for name, value in headers.items())
                await answer(writer, "200 OK", text.encode())
            elif path.startswith("/bytes/"):
                count = int(path.rsplit("/", 1)[1])
                writer.write(f"HTTP/1.1 200 OK\r\ncontent-length: {count}\r\n\r\n".encode())
                while count:
                    part = CHUNK[: min(count, len(CHUNK))]
                    writer.write(part)
                    count -= len(part)
                    await writer.drain()
            elif path == "/half":
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\nhalf")
                await writer.drain()
                return writer.close()
            elif path == "/sink":
                await answer(writer, "200 OK", f"{length} {digest}\n".encode())
            else:
                await answer(writer, "200 OK", f"{NAME}\n".encode())
    except (asyncio.IncompleteReadError, ConnectionError):
        pass
    finally:
        writer.close()


async def main():
    server = await asyncio.start_server(serve, None, PORT, limit=1 << 20, backlog=1024)
    async with server:
        await server.serve_forever()


asyncio.run(main())
