"""Requests to a small Django application, in one process: django_work.py LOOPS MARKS. Each pair of
time.process_time() calls encloses LOOPS requests."""

import django
from django.conf import settings

settings.configure(
    SECRET_KEY="of no matter", ALLOWED_HOSTS=["*"], ROOT_URLCONF=__name__, USE_TZ=True,
    INSTALLED_APPS=["django.contrib.contenttypes", "django.contrib.auth"],
    DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}},
    MIDDLEWARE=["django.middleware.common.CommonMiddleware"],
    TEMPLATES=[{"BACKEND": "django.template.backends.django.DjangoTemplates"}],
)  # fmt: skip
django.setup()

from django.contrib.auth.models import User  # noqa: E402
from django.core.management import call_command  # noqa: E402
from django.http import HttpResponse, JsonResponse  # noqa: E402
from django.template import engines  # noqa: E402
from django.test import Client  # noqa: E402
from django.urls import path  # noqa: E402
from marks import measure  # noqa: E402

call_command("migrate", verbosity=0)
User.objects.bulk_create(User(username=f"user{n}", email=f"u{n}@example.org") for n in range(300))
TEMPLATE = engines["django"].from_string(
    "<table>{% for user in users %}<tr class='{% cycle 'odd' 'even' %}'>"
    "<td>{{ user.username|title }}</td><td>{{ user.email }}</td>"
    "<td>{{ user.date_joined|date:'Y-m-d' }}</td></tr>{% endfor %}</table>"
)


def listed(request):
    users = User.objects.filter(id__gt=int(request.GET.get("since", 0))).order_by("id")[:20]
    return HttpResponse(TEMPLATE.render({"users": users}, request))


def one(request, number):
    user = User.objects.get(pk=number)
    return JsonResponse({"id": user.pk, "name": user.get_username(), "email": user.email})


urlpatterns = [path("users", listed), path("users/<int:number>", one)]
client = Client()


def visit(number):
    assert client.get(f"/users?since={number * 7 % 280}").status_code == 200
    assert client.get(f"/users/{1 + number * 11 % 300}").status_code == 200


measure(visit, warm=20)
