# The relay and every command of limiter: no root, nothing written but /data. `docker build -t limiter .`
FROM python:3.13-slim-bookworm AS build
WORKDIR /src
COPY pyproject.toml requirements.lock README.md LICENSE ./
COPY lua lua
COPY limiter limiter
RUN python -m venv /opt/limiter && /opt/limiter/bin/pip install --no-cache-dir --constraint requirements.lock .

FROM python:3.13-slim-bookworm
RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin limiter \
 && install -d -o limiter -g limiter -m 0700 /data
COPY --from=build /opt/limiter /opt/limiter
ENV PATH=/opt/limiter/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 LIMITER_RELAY__HOST=0.0.0.0
USER limiter
WORKDIR /data
VOLUME /data
EXPOSE 8080
# The port is fixed here: a node is told apart by its address. Other commands switch it off in docker-compose.yml.
HEALTHCHECK --interval=10s --timeout=3s --start-period=15s --retries=3 \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8080/healthz', timeout=2)"]
ENTRYPOINT ["limiter"]
CMD ["serve"]
