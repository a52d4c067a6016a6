"""Connects and says nothing. Usage: silent_client.py HOST PORT

Says in JSON how the connection ended, "eof" or "reset", or "open" if it had not after a minute, and after how many seconds.
"""
import json
import socket
import sys
import time

began, end = time.monotonic(), "eof"
with socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=60) as connection:
    try:
        while connection.recv(65536):
            pass
    except TimeoutError:
        end = "open"
    except ConnectionError:
        end = "reset"
print(json.dumps({"end": end, "seconds": time.monotonic() - began}))
