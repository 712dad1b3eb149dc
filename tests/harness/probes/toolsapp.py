"""The application that tools are attached to: a request in it stays among Python and C frames."""

import faulthandler
import json
import os
import re
import signal
import sqlite3
import sys
import time

import frames

import page_primer

PLACE = ""
TRACEBACK = open("traceback", "w")
faulthandler.register(signal.SIGUSR2, TRACEBACK, all_threads=False)  # gunicorn has SIGUSR1


def innermost():
    with open(PLACE) as place:  # a FIFO: until somebody opens it for writing
        return place.read()


def in_substitution(match):
    return frames.call_back(innermost)


def in_sort(key):
    return re.sub("key", in_substitution, key)


def hold(name):
    """sorted -> in_sort -> re.sub -> in_substitution -> C++ -> innermost -> open."""
    global PLACE
    PLACE = "release" if name == "hold" else "/dev/null"
    return sorted(["key"], key=in_sort)[0]


def count_words(text):
    return len(re.sub(r"\w+", lambda match: match[0].upper(), text).split())


def spin(seconds):
    """Work in the interpreter and in C: sorting, regular expressions, JSON, SQLite; until the file
    `enough` is there, for so many seconds at most."""
    connection = sqlite3.connect(":memory:")
    connection.create_function("count_words", 1, count_words)
    end = time.monotonic() + seconds
    rounds = 0
    while time.monotonic() < end and not os.access("enough", os.F_OK):
        rows = sorted(range(300), key=lambda number: number * 7919 % 1009)
        document = json.dumps({"rows": rows, "text": "some words to count " * 20})
        text = json.loads(document)["text"]
        connection.execute("select count_words(?)", (text,)).fetchone()
        tuple(map(str, rows))  # by way of PySequence_Tuple, where a debugger breaks
        rounds += 1
    return str(rounds)


def prime():
    return json.dumps(page_primer.prime().as_dict())


def addresses():
    names = ["PySequence_Tuple", "PyObject_GetIter", "PyUnicode_Join", "PyList_Sort",
             "PyEval_EvalCode", "PyDict_SetItem", "frames_call_back"]  # fmt: skip
    return json.dumps({name: frames.address_of(name) for name in names})


def version():
    return json.dumps({"base": sys.base_prefix, "number": "{}.{}".format(*sys.version_info)})


PATHS = {
    "hold": hold,
    "warm": hold,
    "spin": lambda _: spin(1.0),
    "prime": lambda _: prime(),
    "addresses": lambda _: addresses(),
    "version": lambda _: version(),
    "throw": lambda _: frames.throw_through(),
    "backtrace": lambda _: frames.backtrace_through(),
}


def app(environ, start_response):
    name = environ["PATH_INFO"].strip("/")
    body = PATHS.get(name, lambda _: "ok")(name).encode()
    start_response("200 OK", [("Content-Length", str(len(body)))])
    return [body]
