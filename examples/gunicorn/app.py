"""A small guest book: Flask in front of SQLite."""

import os
import sqlite3
from contextlib import closing

from flask import Flask, jsonify, request

DATABASE = os.environ.get("GUESTBOOK_DB", "guestbook.sqlite3")

app = Flask(__name__)


def connect() -> sqlite3.Connection:
    connection = sqlite3.connect(DATABASE)
    connection.row_factory = sqlite3.Row
    connection.execute(
        "CREATE TABLE IF NOT EXISTS entries"
        " (id INTEGER PRIMARY KEY, name TEXT NOT NULL, text TEXT NOT NULL)"
    )
    return connection


@app.get("/entries")
def entries():
    with closing(connect()) as connection:
        rows = connection.execute("SELECT * FROM entries ORDER BY id DESC LIMIT 20").fetchall()
    return jsonify([dict(row) for row in rows])


@app.post("/entries")
def add():
    entry = request.get_json()
    with closing(connect()) as connection, connection:
        cursor = connection.execute(
            "INSERT INTO entries (name, text) VALUES (?, ?)", (entry["name"], entry["text"])
        )
    return jsonify(id=cursor.lastrowid), 201
