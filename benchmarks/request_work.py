"""A request's work without a server: parsing, templates, a database, sorting, cached objects.

    request_work.py LOOPS PROCESSES [OBJECTS]

So many processes take turns on one core, as more workers than cores do, and each does LOOPS
requests. For `page-primer bench --command`, which adds up their processor time.
"""

import collections
import decimal
import hashlib
import json
import os
import re
import sqlite3
import string
import subprocess
import sys

OBJECTS = int(sys.argv[3]) if len(sys.argv) > 3 else 100_000
rows = [
    {"id": i, "name": f"user {i}", "tags": ["a", "b", str(i)], "score": i * 1.5} for i in range(60)
]
table = sqlite3.connect(":memory:")
table.execute("create table users (id integer primary key, name text, score real)")
table.executemany("insert into users values (:id, :name, :score)", rows)
template = string.Template("<li class='$cls'>$name: $score</li>")
word = re.compile(r"(\w+)\s+(\d+)")


class User:
    def __init__(self, id, name, tags, score):
        self.id, self.name, self.tags, self.score = id, name, tags, score

    def __lt__(self, other):
        return (self.score, self.name) < (other.score, other.name)


cache = {i: User(i, f"cached {i}", [], i * 0.5) for i in range(OBJECTS)}


def request(n):
    seen = sum(cache[(n * 7919 + k * 104729) % len(cache)].score for k in range(200))
    users = sorted(User(**row) for row in json.loads(json.dumps(rows)))
    page = "".join(
        template.substitute(cls="odd" if u.id % 2 else "even", name=u.name, score=u.score)
        for u in users
    )
    found = collections.Counter(m[1] for m in word.finditer(page))
    got = table.execute(
        "select name, sum(score) from users where id % ? = 0 group by name", (n % 7 + 2,)
    ).fetchall()
    total = sum(decimal.Decimal(str(score)) for _, score in got)
    return hashlib.sha256(f"{page}{found}{total}{seen}".encode()).hexdigest()


os.sched_setaffinity(0, [sorted(os.sched_getaffinity(0))[-1]])
others = [
    subprocess.Popen([sys.executable, __file__, sys.argv[1], "1", str(OBJECTS)])
    for _ in range(int(sys.argv[2]) - 1)
]
for number in range(int(sys.argv[1])):
    request(number)
if sum(abs(other.wait()) for other in others):
    sys.exit("a process failed")
