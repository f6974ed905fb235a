#!/bin/bash
# Fetch what a machine lacks for gpu_check.py that has torch, transformers, accelerate, peft, pandas, pyarrow, xxhash, psutil and rich,
# but no network:
#   bash benchmarks/gpu_parts/make_wheels.sh FOLDER [trl]      then, there: python benchmarks/gpu_check.py --wheels FOLDER
# For Python 3.12 on x86-64 Linux; PYTHON names the interpreter that runs pip here. With trl, its comparison runs too.
set -eu
folder=$1
mkdir -p "$folder"
packages=(hydra-core==1.3.8 omegaconf==2.3.1 datasets==5.2.0 dill==0.4.0 multiprocess beautifulsoup4==4.15.0 soupsieve
  uniplot==0.23.2 readchar bitsandbytes==0.50.2)
if [ $# -gt 1 ]; then packages+=(trl==1.16.0); fi
platforms=(--platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 --platform manylinux_2_17_x86_64 --platform any)
python=${PYTHON:-python3}
for package in "${packages[@]}"; do
  "$python" -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 "${platforms[@]}" -d "$folder" "$package"
done
# Hydra's parser, which comes as source only.
"$python" -m pip wheel -q --no-deps -w "$folder" antlr4-python3-runtime==4.9.3
du -sm "$folder"
