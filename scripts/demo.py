"""The last step of scripts/run: serves the demo models, says when they are ready, and how to talk to them."""

import argparse
import ctypes
import http.client
import os
import re
import secrets
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STATE = ROOT / ".penstock"
ACCESS_LOG = STATE / "access.log"
PR_SET_PDEATHSIG = 1


def say(text: str = "") -> None:
    print(text, flush=True)


def kept_key(name: str) -> str:
    """The key of the last run, or a new one that only this user can read. `name`: demo or admin."""
    given = os.environ.get(f"PENSTOCK_{name.upper()}_KEY")
    if given:
        return given
    path = STATE / f"{name}-key"
    if not path.exists():
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(f"sk-{name}-{secrets.token_hex(16)}\n")
    return path.read_text().strip()


def engines(host: str, port: int) -> dict[str, bool] | None:
    """Which replicas are up; None while the gateway does not listen."""
    connection = http.client.HTTPConnection(host, port, timeout=5)
    try:
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
    except OSError:
        return None
    finally:
        connection.close()
    rows = re.findall(r'^penstock_engine_up\{.*?replica="([^"]*)".*?\} (\S+)$', text, re.MULTILINE)
    return {replica: float(value) == 1 for replica, value in rows}


def wait_ready(gateway: "subprocess.Popen[bytes]", host: str, port: int) -> bool:
    """Shows what is up and for how long we have waited. False if the gateway has ended."""
    began = time.monotonic()
    known: set[str] = set()
    told = began
    while gateway.poll() is None:
        found = engines(host, port)
        now = time.monotonic()
        if found is not None:
            for replica in sorted(r for r, up in found.items() if up and r not in known):
                known.add(replica)
                say(f"  {replica}: ready after {now - began:.0f} s")
            if found and len(known) == len(found):
                return True
        if now - told >= 10:
            told = now
            say(f"  … {now - began:.0f} s; the engines log to {STATE.name}/logs/")
        time.sleep(0.3)
    return False


def banner(base: str, key: str, admin_key: str) -> str:
    body = '{"model": "smollm2", "messages": [{"role": "user", "content": "What is the capital of France?"}]}'
    return f"""
Penstock serves on {base}
Key:       {key}
Dashboard: {base}/admin/   with the admin key {admin_key}

curl:
  curl {base}/v1/chat/completions -H "Authorization: Bearer {key}" -H "Content-Type: application/json" -d {shlex.quote(body)}

Python (pip install openai):
  from openai import OpenAI
  client = OpenAI(base_url="{base}/v1", api_key="{key}")
  print(client.chat.completions.create(model="smollm2", messages=[{{"role": "user", "content": "What is the capital of France?"}}]).choices[0].message.content)

Each request is a line of {ACCESS_LOG.relative_to(ROOT)}; metrics are at {base}/metrics. Stop with Ctrl-C.
"""


def die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/run", description=__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--config", default="configs/quickstart.yaml")
    args = parser.parse_args()
    os.chdir(ROOT)
    STATE.mkdir(exist_ok=True)
    key, admin_key = kept_key("demo"), kept_key("admin")
    say(f"Starting the engines of {args.config} (about half a minute each on a small machine) …")
    command = [sys.executable, "-m", "gateway", "serve", "--config", args.config, "--log-level", "warning"]
    command += ["--host", args.host, "--port", str(args.port)]
    with ACCESS_LOG.open("ab") as log:
        gateway = subprocess.Popen(
            command,
            stdout=log,
            env={**os.environ, "PENSTOCK_DEMO_KEY": key, "PENSTOCK_ADMIN_KEY": admin_key},
            preexec_fn=die_with_parent,  # noqa: PLW1509 - there is one thread
        )
    # Ctrl-C reaches the gateway too: it drains and ends, and so do we.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: gateway.terminate())
    reachable = "127.0.0.1" if args.host in ("0.0.0.0", "::") else args.host
    if wait_ready(gateway, reachable, args.port):
        say(banner(f"http://{reachable}:{args.port}", key, admin_key))
    return gateway.wait()


if __name__ == "__main__":
    sys.exit(main())
