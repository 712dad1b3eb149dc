# The application's own configuration. With
#
#     gunicorn -c python:page_primer.integrations.gunicorn_conf app:app
#
# page-primer reads this file, keeps what it says, and adds its hooks.

bind = "127.0.0.1:8000"
workers = 4


def when_ready(server):
    server.log.info("the guest book is open")
