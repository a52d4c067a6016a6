"""Sends bytes as they are, and says in JSON what came back. Usage: raw_client.py HOST PORT MESSAGES

MESSAGES is a list in JSON of texts, whose characters are bytes (Latin-1); each goes over a connection of its own. The
answer has for each {"said": bytes likewise, "end": "eof" or "reset", or "open" if nothing
more came for two seconds, and nothing at all for ten}.
"""
import json
import socket
import sys

HOST, PORT = sys.argv[1], int(sys.argv[2])
answers = []
for message in json.loads(sys.argv[3]):
    said, end = b"", "eof"
    with socket.create_connection((HOST, PORT), timeout=10) as connection:
        try:
            connection.sendall(message.encode("latin-1"))
            while data := connection.recv(65536):
                said += data
                connection.settimeout(2)
        except TimeoutError:
            end = "open"
        except ConnectionError:
            end = "reset"
    answers.append({"said": said.decode("latin-1"), "end": end})
print(json.dumps({"answers": answers}))
