# The Space, or the command, for whoever has containers: torch for CPUs, wheels only, no compiler, no root.
#
#     docker build -t merger .
#     docker run --rm -p 7860:7860 merger                                                        the Space
#     docker run --rm -e HF_TOKEN -v "$PWD:/work" merger run merges/mine.yaml --to hf://me/mine  the command
#
# BASE is any image with Python 3.11 or newer, its venv, and CA certificates; pin it by digest where you build for others.
ARG BASE=python:3.13-slim-bookworm

FROM ${BASE} AS build
ARG TORCH_INDEX=""
WORKDIR /src
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY .ci/torch .ci/torch
RUN python3 -m venv /opt/merger \
 && .ci/torch /opt/merger/bin/python
COPY merger merger
COPY templates templates
COPY examples/workflow.yml examples/
RUN /opt/merger/bin/pip install --no-cache-dir --constraint constraints.txt ".[space]" \
 && /opt/merger/bin/pip uninstall --yes uv pip \
 && find /opt/merger -name __pycache__ -prune -exec rm -rf {} +

FROM ${BASE}
RUN useradd --create-home --uid 1000 merger \
 && install -d -o merger /work
COPY --from=build /opt/merger /opt/merger
COPY space /opt/merger/app/space
COPY templates /opt/merger/app/templates
COPY examples/recipes /opt/merger/app/examples/recipes
COPY examples/workflow-parts.yml /opt/merger/app/examples/
ENV PATH=/opt/merger/bin:$PATH PYTHONPATH=/opt/merger/app PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 \
    GRADIO_SERVER_NAME=0.0.0.0 GRADIO_ANALYTICS_ENABLED=False
USER merger
WORKDIR /work
EXPOSE 7860
# The command serves nothing whose health could be looked at.
HEALTHCHECK --start-period=60s CMD grep -qzx space /proc/1/cmdline || exit 0; \
    python -c "import urllib.request as r; r.urlopen('http://127.0.0.1:7860/', timeout=5)"
ENTRYPOINT ["sh", "-c", "if [ $# -eq 0 ]; then exec python -m space; else exec merger \"$@\"; fi", "merger"]
