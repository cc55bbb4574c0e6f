"""`penstock serve` with the FastAPI application under plain uvicorn: what somebody who brings their own server runs."""

import sys

from gateway import cli, runtime

if __name__ == "__main__":
    runtime.Process.http = "httptools"
    sys.argv[0] = "penstock"
    cli.main()
