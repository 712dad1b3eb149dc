"""The worker's configuration: the module to import, and page-primer's options."""

broker_url = "redis://localhost:6379/0"
result_backend = "redis://localhost:6379/0"
broker_connection_retry_on_startup = True

imports = ["page_primer.integrations.celery"]
page_primer = {"limit": "128M"}
