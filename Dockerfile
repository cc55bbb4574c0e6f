# Two images from one file:
#
#   docker build -t penstock .                          the gateway, for engines that run elsewhere
#   docker build -t penstock-engine --target engine .   the gateway and vLLM, for a machine with GPUs
#
# Both serve /etc/penstock/penstock.yaml on port 8080, as a user of their own.

# The wheel holds the request path as machine code, for this Python; the engine's image has another one, and makes its own.
FROM python:3.11.14-slim-trixie AS wheel
WORKDIR /src
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc=4:* libc6-dev=2.* \
    && rm -rf /var/lib/apt/lists/*
COPY requirements.lock requirements-compile.lock ./
RUN pip install --no-cache-dir hatchling==1.27.0 \
    && pip install --no-cache-dir --no-deps --require-hashes -r requirements.lock -r requirements-compile.lock
COPY pyproject.toml README.md LICENSE ./
COPY scripts/compile.py scripts/compile.py
COPY gateway gateway
COPY engines engines
RUN pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /wheels .


# The gateway has an environment of its own, which is not in PATH: `python3` stays the interpreter that has vLLM, and
# is what a model's `engine.python` must say.
FROM vllm/vllm-openai:v0.33.0 AS engine
RUN --mount=type=bind,source=requirements.lock,target=/tmp/requirements.lock \
    --mount=type=bind,from=wheel,source=/src,target=/tmp/src,rw \
    python3 -m venv /opt/penstock \
    && /opt/penstock/bin/pip install --no-cache-dir --no-deps --require-hashes -r /tmp/requirements.lock \
    && /opt/penstock/bin/pip install --no-cache-dir --no-deps /tmp/src \
    && ln -s /opt/penstock/bin/penstock /usr/local/bin/penstock \
    && useradd --uid 10001 --user-group --create-home --home-dir /var/lib/penstock penstock \
    && install -d -o penstock -g penstock /var/lib/penstock/.cache
ENV HOME=/var/lib/penstock
WORKDIR /var/lib/penstock
USER 10001:10001
EXPOSE 8080
HEALTHCHECK --interval=10s --timeout=5s --start-period=10s CMD ["python3", "-c", "import http.client, sys; c = http.client.HTTPConnection('127.0.0.1', 8080, timeout=3); c.request('GET', '/health/live'); sys.exit(c.getresponse().status != 200)"]
ENTRYPOINT ["penstock"]
CMD ["serve", "--config", "/etc/penstock/penstock.yaml", "--host", "0.0.0.0", "--port", "8080"]


FROM python:3.11.14-slim-trixie AS gateway
RUN --mount=type=bind,source=requirements.lock,target=/tmp/requirements.lock \
    --mount=type=bind,from=wheel,source=/wheels,target=/tmp/wheels \
    pip install --no-cache-dir --no-deps --require-hashes -r /tmp/requirements.lock \
    && pip install --no-cache-dir --no-deps /tmp/wheels/*.whl \
    && useradd --uid 10001 --user-group --create-home --home-dir /var/lib/penstock penstock
ENV HOME=/var/lib/penstock
WORKDIR /var/lib/penstock
USER 10001:10001
EXPOSE 8080
HEALTHCHECK --interval=10s --timeout=5s --start-period=10s CMD ["python3", "-c", "import http.client, sys; c = http.client.HTTPConnection('127.0.0.1', 8080, timeout=3); c.request('GET', '/health/live'); sys.exit(c.getresponse().status != 200)"]
ENTRYPOINT ["penstock"]
CMD ["serve", "--config", "/etc/penstock/penstock.yaml", "--host", "0.0.0.0", "--port", "8080"]
