"""Requests to a small Flask application, in one process: flask_work.py LOOPS MARKS. Each pair of
time.process_time() calls encloses LOOPS requests."""

import sqlite3

from flask import Flask, jsonify, render_template_string, request
from marks import measure

app = Flask(__name__)
connection = sqlite3.connect(":memory:")
connection.row_factory = sqlite3.Row
connection.execute("CREATE TABLE entries (id INTEGER PRIMARY KEY, name TEXT, text TEXT)")
connection.executemany(
    "INSERT INTO entries (name, text) VALUES (?, ?)",
    [(f"guest {number}", "was here, and there, " * (number % 5)) for number in range(500)],
)
PAGE = """<ul>{% for row in rows %}<li class="{{ loop.cycle('odd', 'even') }}">{{ row.name }}:
{{ row.text|title }}</li>{% endfor %}</ul>"""


@app.get("/entries")
def entries():
    since = request.args.get("since", 0, int)
    rows = connection.execute("SELECT * FROM entries WHERE id > ? LIMIT 20", (since,)).fetchall()
    return jsonify([dict(row) for row in rows])


@app.get("/page")
def page():
    rows = connection.execute("SELECT * FROM entries ORDER BY name LIMIT 30").fetchall()
    return render_template_string(PAGE, rows=rows)


@app.post("/entries")
def add():
    entry = request.get_json()
    with connection:
        connection.execute(
            "UPDATE entries SET text = ? WHERE name = ?", (entry["text"], entry["name"])
        )
    return jsonify(ok=True), 201


client = app.test_client()


def visit(number):
    assert client.get(f"/entries?since={number * 7 % 480}").status_code == 200
    assert client.get("/page").status_code == 200
    body = {"name": f"guest {number % 500}", "text": "was here"}
    assert client.post("/entries", json=body).status_code == 201


measure(visit, warm=30)
