"""Stands in for vLLM's api_server as far as a supervisor sees it: a small HTTP server in a process of its own.

It takes vLLM's flags of which it knows a few, and is scripted by environment variables:

STANDIN_AT_START   what to do instead of serving: "exit:CODE", "hang", "say:LINE" (print it and exit 1),
                   "flag" (argparse's complaint about an unknown flag), "sigkill", "port" (as if the port were taken)
STANDIN_ONCE       a file: STANDIN_AT_START counts only while it does not exist, and it is made then
STANDIN_POOLING    serve /v1/embeddings only
STANDIN_DEAF       ignore SIGTERM
STANDIN_CHILD      start a process that ignores SIGTERM in a session of its own, like no well-bred worker would;
                   "needed": without it the engine cannot go on, and ends
STANDIN_CONTROL    a file whose words change the running engine: "unwell" (health is 503), "stuck" (requests run, but
                   no token moves), "mute" (trial requests are never answered),
                   "fragile" (the first request ends it)
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

PREFIX = "(APIServer pid=1) ERROR 11-24 06:51:03 [api_server.py:1] "


def flag(name: str) -> str:
    return next(a.partition("=")[2] for a in sys.argv if a.startswith(f"--{name}="))


def words() -> set[str]:
    control = os.environ.get("STANDIN_CONTROL")
    try:
        return set(Path(control).read_text().split()) if control else set()
    except FileNotFoundError:
        return set()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        print("access:", self.path, code)

    def reply(self, status: int, body: object) -> None:
        content = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self) -> None:
        if self.path == "/health":
            self.reply(503 if "unwell" in words() else 200, "")
        elif self.path == "/v1/models":
            card = {"id": flag("served-model-name"), "max_model_len": 2048, "root": flag("model")}
            self.reply(200 if self.has_key() else 401, {"data": [card]})
        elif self.path == "/metrics":
            stuck = "stuck" in words()
            tokens = 7 if stuck or "quiet" in words() else time.monotonic_ns()
            self.reply(
                200,
                f'vllm:num_requests_running{{engine="0"}} {2.0 if stuck else 0.0}\n'
                f'vllm:num_requests_waiting{{engine="0"}} 1.0\n'
                f'vllm:kv_cache_usage_perc{{engine="0"}} 0.25\n'
                f'vllm:generation_tokens_total{{engine="0"}} {tokens}\n',
            )
        else:
            self.reply(404, {"detail": "Not Found"})

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        print("asked:", self.path)
        if not self.has_key():
            return self.reply(401, {"error": "Unauthorized"})
        if self.path != ("/v1/embeddings" if "STANDIN_POOLING" in os.environ else "/v1/completions"):
            return self.reply(404, {"detail": "Not Found"})
        while "mute" in words():
            time.sleep(0.05)
        if "fragile" in words():
            print(PREFIX + "vllm.v1.engine.exceptions.EngineDeadError: gone")
            self.reply(500, {"error": {"message": "gone"}})
            os._exit(0)
        return self.reply(200, {"choices": [{"text": "!"}]})

    def has_key(self) -> bool:
        return self.headers["Authorization"] == f"Bearer {os.environ['VLLM_API_KEY']}"


class Server(ThreadingHTTPServer):
    daemon_threads = True


def end_with(child: "subprocess.Popen[bytes]") -> None:
    child.wait()
    print(PREFIX + "vllm.v1.engine.exceptions.EngineDeadError: a worker has died", flush=True)
    os._exit(1)


def at_start(what: str) -> None:
    verb, _, rest = what.partition(":")
    if verb == "exit":
        sys.exit(int(rest))
    if verb == "hang":
        signal.pause()
    if verb == "say":
        print(PREFIX + rest)
        sys.exit(1)
    if verb == "flag":
        print("usage: api_server.py [-h]\napi_server.py: error: unrecognized arguments: --nonsense=1")
        sys.exit(2)
    if verb == "sigkill":
        os.kill(os.getpid(), signal.SIGKILL)
    if verb == "port":
        print(PREFIX + "OSError: [Errno 98] Address already in use")
        sys.exit(1)


def main() -> None:
    print("standin says hello; cores", sorted(os.sched_getaffinity(0)))
    if "STANDIN_CHILD" in os.environ:
        ignore = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); signal.pause()"
        child = subprocess.Popen([sys.executable, "-c", ignore], start_new_session=True)
        if os.environ["STANDIN_CHILD"] == "needed":
            threading.Thread(target=end_with, args=[child], daemon=True).start()
    if "STANDIN_DEAF" in os.environ:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if what := os.environ.get("STANDIN_AT_START"):
        once = os.environ.get("STANDIN_ONCE")
        if once is None or not Path(once).exists():
            if once is not None:
                Path(once).touch()
            at_start(what)
    Server((flag("host"), int(flag("port"))), Handler).serve_forever()


if __name__ == "__main__":
    # As an interpreter that is asked whether it has vLLM.
    sys.exit(0) if "-c" in sys.argv else main()
