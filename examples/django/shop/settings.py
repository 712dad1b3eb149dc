"""As little as Django needs."""

import os

SECRET_KEY = os.environ.get("SECRET_KEY", "for the example alone")
ALLOWED_HOSTS = ["127.0.0.1", "localhost", "django"]  # the last is Compose's name
ROOT_URLCONF = "shop.urls"
USE_TZ = True
