# Decodes the demo on the host's GPU, or on its CPU without `--gpus all`:
#
#   docker build -t owl_wms .
#   docker run --rm --gpus all -v "$PWD/out:/out" -v owl_wms_cache:/cache owl_wms
#
# The host needs NVIDIA's driver and its container toolkit. CUDA's runtime, cuDNN and NVRTC come with torch's wheels, so
# no CUDA base image is needed; Triton compiles a launcher with the C compiler of this full Python image.
FROM python:3.11-bookworm

ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility,video \
    TENSORRT_CACHE_DIR=/cache \
    PIP_NO_CACHE_DIR=1 \
    PYTHONUNBUFFERED=1

# Before the sources, so that a changed source does not install 5 GB again.
COPY requirements-rtx.txt requirements-common.txt /src/
RUN pip install -r /src/requirements-rtx.txt

COPY . /src
# The cache refuses a folder that others can write to.
RUN pip install --no-deps /src && mkdir -m 0700 /cache && mkdir /out

WORKDIR /out
VOLUME ["/cache", "/out"]
ENTRYPOINT ["owl-wms"]
CMD ["demo", "--out", "/out", "--overwrite"]
