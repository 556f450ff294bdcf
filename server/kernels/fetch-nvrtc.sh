#!/usr/bin/env bash
# Fetches NVIDIA's run-time compiler (NVRTC 12.9) and the headers that the CUDA kernels include, out
# of Python packages, into target/nvrtc. The build of stoker-kernels finds them there.
set -euo pipefail
cd "$(dirname "$0")/../.."

packages=(nvidia-cuda-nvrtc-cu12==12.9.86 nvidia-cuda-runtime-cu12==12.9.79 nvidia-cuda-cccl-cu12==12.9.27)
folder=target/nvrtc
stamp=$folder/${packages[0]##*==}.complete
[ -f "$stamp" ] && exit 0

mkdir -p "$folder"
work=$(mktemp -d "$folder/.fetch-XXXXXX")
trap 'rm -rf "$work"' EXIT
python=python3
if ! python3 -m pip --version >/dev/null 2>&1; then
  python3 -m venv "$work/venv" ||
    { echo "neither pip nor venv is there: 'apt-get install python3-venv'" >&2; exit 1; }
  python=$work/venv/bin/python
fi
echo "fetching NVRTC (96 MB)"
"$python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
  --dest "$work/wheels" "${packages[@]}" ||
  { echo "pip could not download ${packages[*]}: is the Python package index reachable?" >&2; exit 1; }
for wheel in "$work"/wheels/*.whl; do
  python3 -m zipfile -e "$wheel" "$work/site"
done
rm -rf "$folder/site"
mv "$work/site" "$folder/site"
touch "$stamp"
