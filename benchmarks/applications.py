"""Applications that benchmarks serve: WSGI, `application`. Each answers in more than one way where
PATHS says so. One that is run as a program prepares what it needs (a database) first.
"""

DJANGO = """
import os, sys
import django
from django.conf import settings
settings.configure(
    SECRET_KEY="x", ALLOWED_HOSTS=["*"], ROOT_URLCONF=__name__, DEBUG=False,
    INSTALLED_APPS=["django.contrib.contenttypes", "django.contrib.auth", "django.contrib.sessions",
                    "django.contrib.admin", "django.contrib.messages"],
    MIDDLEWARE=["django.middleware.common.CommonMiddleware",
                "django.contrib.sessions.middleware.SessionMiddleware",
                "django.contrib.auth.middleware.AuthenticationMiddleware"],
    DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3",
                           "NAME": os.path.abspath("database")}},
    TEMPLATES=[{"BACKEND": "django.template.backends.django.DjangoTemplates"}],
)
django.setup()
from django.contrib.auth.models import Group
from django.core.wsgi import get_wsgi_application
from django.http import HttpResponse
from django.template import engines
from django.urls import path
import django.contrib.admin.sites, django.forms.models, django.core.mail

template = engines["django"].from_string(
    "{% for g in groups %}<li>{{ g.pk }}: {{ g.name|upper }}</li>{% endfor %}")

def index(request):
    return HttpResponse(template.render({"groups": [
        {"pk": n, "name": f"group {n}"} for n in range(50)]}))

def stored(request):
    groups = Group.objects.filter(name__contains="1").order_by("name")
    return HttpResponse("".join(f"<li>{group.pk}: {group.name}</li>" for group in groups))

urlpatterns = [path("", index), path("stored", stored)]
application = get_wsgi_application()

if __name__ == "__main__":
    from django.core.management import call_command
    call_command("migrate", verbosity=0)
    Group.objects.bulk_create(Group(name=f"group {i}") for i in range(50))
"""

FLASK = """
import sqlite3
from flask import Flask, render_template_string
application = Flask(__name__)
connection = None

@application.get("/")
def index():
    global connection
    if connection is None:
        connection = sqlite3.connect(":memory:", check_same_thread=False)
        connection.execute("create table t (id integer, name text)")
        connection.executemany("insert into t values (?, ?)", [(i, f"g {i}") for i in range(50)])
    rows = connection.execute("select id, name from t where name like '%1%' order by name")
    return render_template_string(
        "{% for i, n in rows %}<li>{{ i }}: {{ n|upper }}</li>{% endfor %}", rows=rows.fetchall())
"""

SMALL = """
import json, sqlite3, hashlib, decimal, logging, urllib.parse
def application(environ, start_response):
    body = json.dumps({"<li>": hashlib.sha256(b"x" * 1000).hexdigest()}).encode()
    start_response("200 OK", [("Content-Length", str(len(body)))])
    return [body]
"""

ARRAYS = """
import sys
sys.modules["pyarrow"] = None  # which pandas loads where it is installed
import numpy, pandas
frame = pandas.DataFrame({"group": numpy.arange(20000) % 37, "value": numpy.arange(20000.0)})
def application(environ, start_response):
    found = frame.groupby("group")["value"].agg(["mean", "std"]).sort_values("mean")
    product = numpy.linalg.inv(numpy.eye(50) + 1) @ numpy.arange(50.0)
    body = f"<li>{found.iloc[0]}{product.sum()}".encode()
    start_response("200 OK", [("Content-Length", str(len(body)))])
    return [body]
"""

DUCKDB = """
import numpy, pandas, duckdb
frame = pandas.DataFrame({"group": numpy.arange(20000) % 37, "value": numpy.arange(20000.0)})
base = duckdb.connect(config={"threads": 1})
base.register("frame", frame)
def application(environ, start_response):
    own = base.cursor()
    found = own.execute('select "group", avg(value) as mean from frame group by 1 order by 2').df()
    found = found.join(frame.groupby("group")["value"].agg(["std"]), on="group")
    body = f"<li>{found.iloc[0]}".encode()
    start_response("200 OK", [("Content-Length", str(len(body)))])
    return [body]
"""

TORCH = """
import torch
torch.set_num_threads(1)
layers = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 8))
def application(environ, start_response):
    with torch.no_grad():
        body = f"<li>{layers(torch.ones(4, 64)).sum().item()}".encode()
    start_response("200 OK", [("Content-Length", str(len(body)))])
    return [body]
"""

# Django's and Flask's `application` is a WSGI application; this wraps it.
COLLECTING = """
import gc
_application, _count = application, 0
def application(environ, start_response):
    global _count
    _count += 1
    if _count % 50 == 0:
        gc.collect()
    return _application(environ, start_response)
"""

# Answers at /@arenas with its process and the addresses of mappings that hold small objects, which
# only the process itself can tell of arenas older than page-primer's.
ARENAS = """
_asked = application
def application(environ, start_response):
    if environ["PATH_INFO"] != "/@arenas":
        return _asked(environ, start_response)
    import json, os
    from page_primer.heap import arenas
    from page_primer.kernel import smaps
    found = [(m.start, m.end) for m in arenas.find(smaps.read_maps())]
    start_response("200 OK", [])
    return [("<li>" + json.dumps([os.getpid(), found])).encode()]
"""

APPLICATIONS = {
    "django": DJANGO, "flask": FLASK, "small": SMALL, "arrays": ARRAYS, "duckdb": DUCKDB,
    "torch": TORCH,
    "pyarrow": ARRAYS.replace('sys.modules["pyarrow"] = None', "import pyarrow"),
}  # fmt: skip

PATHS = {"django": ("/", "/stored")}
PREPARED = frozenset(("django",))  # as programs
