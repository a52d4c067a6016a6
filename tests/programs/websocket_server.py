"""Echoes messages over WebSocket. Usage: websocket_server.py PORT"""
import asyncio
import sys

import websockets


async def echo(socket, *_):
    async for message in socket:
        await socket.send(message)


async def main():
    async with websockets.serve(echo, None, int(sys.argv[1]), max_size=None):
        print("ready", flush=True)
        await asyncio.Future()


asyncio.run(main())
