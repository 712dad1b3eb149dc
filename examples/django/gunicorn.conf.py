# The application's own configuration. page-primer reads this file, keeps what it says, and adds its
# hooks:
#
#     PAGE_PRIMER_FREEZE=1 gunicorn -c python:page_primer.integrations.gunicorn_conf shop.wsgi

import os

bind = "127.0.0.1:8000"
workers = 4
preload_app = True

if os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
    from page_primer.integrations import prometheus

    prometheus.export()
    child_exit = "page_primer.integrations.prometheus.child_exit"
