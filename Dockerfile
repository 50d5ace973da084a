# Server image. Build: docker build --tag unmask .
# Run: docker run --publish 8080:8080 --volume unmask:/data unmask
FROM python:3.13-slim AS build
WORKDIR /src
# The CPU build of torch is a fifth of the size of the default one. For a GPU, set TORCH_INDEX=https://pypi.org/simple
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# The compiler builds the kernels into the wheel; the image itself has none.
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/unmask
COPY pyproject.toml hatch_build.py constraints.txt README.md LICENSE ./
COPY unmask unmask
RUN /opt/unmask/bin/pip install --no-cache-dir --constraint constraints.txt --extra-index-url ${TORCH_INDEX} .[oidc,postgres,redis]

FROM python:3.13-slim
RUN useradd --uid 10001 --create-home unmask && install --directory --owner unmask /data
COPY --from=build /opt/unmask /opt/unmask
# /data holds models, the SQLite database and the pepper of the API keys.
ENV PATH=/opt/unmask/bin:$PATH UNMASK_HOME=/data HF_HOME=/data/huggingface PYTHONUNBUFFERED=1
VOLUME /data
USER unmask
EXPOSE 8080
# /ready answers 200 when every loaded model gives the right vector for its canary text. The first start downloads 98 MB.
HEALTHCHECK --interval=30s --timeout=5s --start-period=180s --retries=3 \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8080/ready', timeout=4)"]
ENTRYPOINT ["unmask"]
# A server that listens on all addresses needs keys. With --accounts, the log prints a link that makes the first admin.
CMD ["serve", "--host", "0.0.0.0", "--accounts"]
