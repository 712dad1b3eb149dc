"""Runs in the process under test: executes the statements it reads, one JSON string a line, and
answers with what they leave in `result`."""

import json
import sys

names: dict = {}
for line in sys.stdin:
    try:
        exec(json.loads(line), names)
        answer = {"result": names.pop("result", None)}
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(answer), flush=True)
