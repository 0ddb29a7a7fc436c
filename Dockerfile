# posttrain in a container. Built and run for a CPU, over a Debian 12 base of our own with Python 3.11 in the place of python:3.11-slim; never for CUDA.
#   CPU    docker build -t posttrain .
#   CUDA   docker build -t posttrain:cuda --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 --build-arg EXTRAS=qlora,math,serve,gpu .
#   run    docker run --rm --user "$(id -u):$(id -g)" [--gpus all --ipc=host] -v "$PWD:/work" posttrain sft sft.yaml
# torch's wheels bring CUDA; the host needs the driver and NVIDIA's container toolkit.
FROM python:3.11-slim AS build
COPY pyproject.toml README.md LICENSE MANIFEST.in CHANGELOG.md constraints.txt vllm-overrides.txt /source/
COPY src /source/src
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels /source

FROM python:3.11-slim
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG EXTRAS=qlora,math,serve
# torch.compile and Triton compile with the system's compiler.
RUN apt-get update && apt-get install -y --no-install-recommends gcc g++ && rm -rf /var/lib/apt/lists/*
COPY constraints.txt /constraints.txt
RUN pip install --no-cache-dir --constraint /constraints.txt --index-url "$TORCH_INDEX" --extra-index-url https://pypi.org/simple torch
COPY --from=build /wheels /wheels
RUN pip install --no-cache-dir --constraint /constraints.txt "$(echo /wheels/posttrain-*.whl)[$EXTRAS]"
# Runs, registry and the hub's cache lie in the mounted folder and belong to the --user of `docker run`; nobody needs to be root.
ENV HF_HOME=/work/.cache/huggingface HOME=/tmp
WORKDIR /work
USER 1000:1000
ENTRYPOINT ["posttrain"]
