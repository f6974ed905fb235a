# For machines with NVIDIA GPUs: what the README installs by hand. The wheel of torch brings its CUDA libraries with it, so that
# the machine needs a driver and nvidia-container-toolkit only; the compiler that Triton calls comes with this image.
#
#   docker build -t preference-training .
#   docker run --gpus all --shm-size 8g -v "$PWD/runs:/workspace/runs" preference-training python train.py loss=dpo
FROM python:3.11.14-bookworm
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /workspace
COPY . .
RUN pip install --no-cache-dir -r requirements.txt
CMD ["python", "train.py"]
