# AnyUp Lab in a container. The tests check what it names, but do not build it.
#   docker build -t anyup-lab .                                  # PyTorch's default wheels: CUDA, and CPU where there is no GPU
#   docker build -t anyup-lab --build-arg TORCH_INDEX=URL .      # URL: PyTorch's index of wheels without CUDA; gigabytes smaller
#   docker run --rm -v "$PWD/outputs:/home/lab/outputs" anyup-lab -m experiments.upsample
#   docker run --rm --gpus all -v "$PWD/outputs:/home/lab/outputs" anyup-lab -m experiments.ablate experiment=quickstart
# The folder outputs must be writable for user 1000. MAML's package is not included (see README.md).
ARG PYTHON=3.11
FROM python:${PYTHON}-slim

ARG UV_VERSION=0.13.9
ARG TORCH_INDEX=""

WORKDIR /opt/anyup-lab
COPY pyproject.toml README.md LICENSE ./
COPY anyup_lab anyup_lab
COPY core core
COPY extensions extensions
COPY experiments experiments
COPY configs configs
# uv, and not pip, because it keeps to the tested versions of pyproject.toml.
RUN pip install --no-cache-dir "uv==${UV_VERSION}" \
    && uv pip install --system --no-cache \
        ${TORCH_INDEX:+--index "${TORCH_INDEX}" --index-strategy unsafe-best-match} ".[cluster,joblib]"

RUN useradd --create-home --uid 1000 lab
USER lab
WORKDIR /home/lab
ENTRYPOINT ["python"]
CMD ["-m", "experiments.upsample"]
