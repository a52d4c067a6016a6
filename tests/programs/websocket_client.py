"""Talks to websocket_server.py and says in JSON what it saw. Usage: websocket_client.py URL"""
import asyncio
import json
import sys

import websockets


async def main():
    async with websockets.connect(sys.argv[1], max_size=None) as socket:
        echoed = 0
        for number in range(200):
            text = f"message {number}"
            await socket.send(text)
            echoed += await socket.recv() == text
        big = bytes(range(256)) * 4096
        await socket.send(big)
        whole = await socket.recv() == big
        pong = await socket.ping()
        await asyncio.wait_for(pong, 10)
    print(json.dumps({"echoed": echoed, "whole": whole, "closed": socket.close_code}))


asyncio.run(main())
