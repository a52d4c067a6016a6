"""Calls every method of grpc_server.py and says in JSON what it saw. Usage: grpc_client.py HOST:PORT"""
import json
import sys
import time

import grpc

channel = grpc.insecure_channel(sys.argv[1])
seen = {}


def method(kind, name):
    return getattr(channel, kind)("/lab.Echo/" + name)


def code(call):
    try:
        call()
        return "OK"
    except grpc.RpcError as error:
        return error.code().name


unary = method("unary_unary", "Unary")
big = bytes(range(256)) * 4096 * 3
servers = set()
# At the same time: who is asked one after the other goes to the quickest endpoint each time, and rightly so.
calls = [unary.future(b"hello", timeout=10) for _ in range(64)]
for call in calls:
    assert call.result() == b"hello"
    servers.update(value for key, value in call.trailing_metadata() if key == "served-by")
seen["servers"] = sorted(servers)
seen["big"] = unary(big, timeout=20) == big
seen["server_stream"] = [int(one) for one in method("unary_stream", "ServerStream")(b"1000", timeout=20)] == list(range(1000))
seen["client_stream"] = int(method("stream_unary", "ClientStream")((b"x" * 1000 for _ in range(500)), timeout=20))
# Each answer must come before the next request is sent.
pending = []


def questions():
    for number in range(100):
        pending.append(number)
        yield b"%d" % number
        deadline = time.monotonic() + 10
        while pending and time.monotonic() < deadline:
            time.sleep(0.0005)


answers = []
for answer in method("stream_stream", "Bidi")(questions(), timeout=30):
    answers.append(int(answer))
    pending.clear()
seen["bidi"] = answers == list(range(100))
seen["codes"] = {name: code(lambda: method("unary_unary", "Fail")(name.encode(), timeout=10))
                 for name in ("NOT_FOUND", "PERMISSION_DENIED", "INVALID_ARGUMENT")}
slow = method("unary_unary", "Slow")
start = time.monotonic()
seen["deadline"] = code(lambda: slow(b"", timeout=1.0))
seen["deadline_took"] = round(time.monotonic() - start, 2)
call = slow.future(b"", timeout=15)
time.sleep(0.5)
call.cancel()
seen["cancel"] = call.code().name
print(json.dumps(seen))
