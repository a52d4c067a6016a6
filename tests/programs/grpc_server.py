"""A gRPC server without generated code: messages are bytes. Usage: grpc_server.py PORT NAME

Writes `ready` when it listens, and one line in JSON when SIGTERM ends it.
"""
import json
import signal
import sys
import threading
import time
from concurrent import futures

import grpc

counts = {"unary": 0, "server_stream": 0, "client_stream": 0, "bidi": 0, "failed": 0, "flaky": 0, "cancelled": 0,
          "deadlines": []}
lock = threading.Lock()


def count(name):
    with lock:
        counts[name] += 1
        return counts[name]


def unary(request, context):
    count("unary")
    seen = dict(context.invocation_metadata())
    context.set_trailing_metadata((("served-by", NAME), ("saw-route", seen.get("x-route", ""))))
    return request


def server_stream(request, context):
    count("server_stream")
    for number in range(int(request)):
        yield b"%d" % number


def client_stream(requests, context):
    count("client_stream")
    return b"%d" % sum(len(request) for request in requests)


def bidi(requests, context):
    count("bidi")
    for request in requests:
        yield request


def fail(request, context):
    count("failed")
    context.abort(grpc.StatusCode[request.decode()], "as it was asked to")


def flaky(request, context):
    """Every other call is unavailable."""
    if count("flaky") % 2:
        context.abort(grpc.StatusCode.UNAVAILABLE, "every other call")
    return request


def slow(request, context):
    """Waits until it is cancelled or its deadline is over, and tells how much time it was given."""
    remaining = context.time_remaining()
    with lock:
        counts["deadlines"].append(None if remaining is None else round(remaining, 3))
    ended = threading.Event()
    context.add_callback(ended.set)
    if ended.wait(20):
        count("cancelled")
    return request


rpc = grpc.method_handlers_generic_handler("lab.Echo", {
    "Unary": grpc.unary_unary_rpc_method_handler(unary),
    "ServerStream": grpc.unary_stream_rpc_method_handler(server_stream),
    "ClientStream": grpc.stream_unary_rpc_method_handler(client_stream),
    "Bidi": grpc.stream_stream_rpc_method_handler(bidi),
    "Fail": grpc.unary_unary_rpc_method_handler(fail),
    "Flaky": grpc.unary_unary_rpc_method_handler(flaky),
    "Slow": grpc.unary_unary_rpc_method_handler(slow),
})

PORT, NAME = sys.argv[1], sys.argv[2]
server = grpc.server(futures.ThreadPoolExecutor(32))
server.add_generic_rpc_handlers((rpc,))
if server.add_insecure_port("[::]:" + PORT) == 0:
    sys.exit("cannot listen on " + PORT)
server.start()
print("ready", flush=True)
stop = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: stop.set())
stop.wait()
# What was cancelled a moment ago is still on its way.
time.sleep(0.2)
print(json.dumps(counts), flush=True)
server.stop(0)
