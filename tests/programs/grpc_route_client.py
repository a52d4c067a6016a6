"""Calls methods of grpc_server.py, and says in JSON what came of each call. Usage: grpc_route_client.py HOST:PORT CALLS

CALLS is a list in JSON: [{"method": "Unary", "times": 10, "metadata": {"env": "canary"}}, ...]; a method may have a
service in front. The answer has for each {"codes": {"OK": 10}, "servers": {"v1": 10}, "saw": {"": 10}, "details": ""}.
"""
import json
import sys
from collections import Counter

import grpc

channel = grpc.insecure_channel(sys.argv[1])
answers = []
for call in json.loads(sys.argv[2]):
    method = call["method"] if "/" in call["method"] else "lab.Echo/" + call["method"]
    codes, servers, saw, details = Counter(), Counter(), Counter(), ""
    stub = channel.unary_unary("/" + method)
    for _ in range(call.get("times", 1)):
        done = stub.future(b"hello", timeout=10, metadata=tuple(call.get("metadata", {}).items()))
        try:
            done.result()
        except grpc.RpcError as error:
            details = error.details()
        codes[done.code().name] += 1
        trailers = dict(done.trailing_metadata() or ())
        servers[trailers.get("served-by", "")] += 1
        saw[trailers.get("saw-route", "")] += 1
    answers.append({"codes": codes, "servers": servers, "saw": saw, "details": details})
print(json.dumps({"calls": answers}))
