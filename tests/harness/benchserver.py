"""An HTTP server for the tests of `page-primer bench`: benchserver.py PORT [BEHAVIOUR ...]."""

import http.server
import mmap
import os
import signal
import socketserver
import subprocess
import sys
import threading
import time

PORT, BEHAVIOUR = int(sys.argv[1]), sys.argv[2:]
served = 0
once = threading.Lock()


def work(seconds):
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        global served
        served += 1
        if "dies" in BEHAVIOUR and served > 100:
            with once:  # never given back
                print("out of luck", flush=True)
                os._exit(9)
        if "hangs" in BEHAVIOUR and served > 100:
            print("hanging", flush=True)
            time.sleep(600)
        if "works" in BEHAVIOUR:  # an option that does nothing but mark the variant
            work(0.003 if os.environ.get("PAGE_PRIMER_EXCLUDE") == "slow" else 0.001)
        status = 404 if self.path == "/missing" else 500 if self.path == "/broken" else 200
        body = b"hello"
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        if "counts" in BEHAVIOUR:
            print("answered", flush=True)

    def log_message(self, *_):
        pass


class Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
    daemon_threads = True
    request_queue_size = 128


for word in BEHAVIOUR:
    if word.startswith("maps="):  # pages of a file, the server's own where nobody else has them
        with open(word.removeprefix("maps="), "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        touched = sum(mapped[::4096])
if "fails" in BEHAVIOUR:
    print("no database\n\nthis is why", flush=True)
    sys.exit(3)
if "silent" in BEHAVIOUR:
    time.sleep(600)
if "stubborn" in BEHAVIOUR:
    # A grandchild in a session of its own, which nobody waits for and SIGTERM does not end.
    ignore = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    subprocess.Popen([sys.executable, "-c", ignore, *sys.argv], start_new_session=True)
if "leaves" in BEHAVIOUR:
    # A daemon: in a session of its own, and of a parent that has ended.
    sleep = [sys.executable, "-c", "import time; time.sleep(600)", *sys.argv]
    subprocess.run(["sh", "-c", 'setsid "$@" & exit', "sh", *sleep], check=True)
server = Server(("127.0.0.1", PORT), Handler)
signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())
server.serve_forever(0.05)
