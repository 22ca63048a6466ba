# The server, from the same lock as everything else.
#
#   docker build -t whence .
#   docker run --shm-size 2g -p 9000:9000 -p 9090:9090 -v "$PWD/out/repository:/repository:ro" whence
#
# With a GPU: add --gpus all. Settings: mount a file over /etc/whence/serve.yaml, or set WHENCE_SERVE_<NAME>.

FROM python:3.12-slim AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python -m venv /opt/whence
ENV PATH=/opt/whence/bin:$PATH
WORKDIR /src
# First what changes seldom: every distribution by its hash, nothing resolved anew.
COPY requirements.lock ./
RUN pip install --require-hashes --no-deps -r requirements.lock
COPY clients/python clients/python
COPY pyproject.toml README.md ./
COPY concepts concepts
COPY offline offline
COPY service service
COPY demo demo
RUN pip install --no-deps --no-build-isolation ./clients/python .

FROM python:3.12-slim
RUN useradd --create-home --uid 10001 whence && mkdir -p /etc/whence /repository && chown whence /repository
COPY --from=build /opt/whence /opt/whence
COPY deploy/serve.yaml /etc/whence/serve.yaml
ENV PATH=/opt/whence/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    WHENCE_SERVE_REPOSITORY=/repository
USER whence
WORKDIR /home/whence
# gRPC and Prometheus metrics.
EXPOSE 9000 9090
# The health service, asked through the port that callers use.
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 CMD ["python", "-m", "service.health", "9000"]
# Stopping takes as long as the last answer, at most.
STOPSIGNAL SIGTERM
CMD ["whence-serve", "--config", "/etc/whence/serve.yaml"]
