#!/usr/bin/env bash
# Puts pure-Python packages that the benchmark needs, or compares with, into a folder that travels with the
# checkout to a machine without a network; bench.py finds them there, after what is installed.
#   gpu/bundle.sh [FOLDER]     the folder is gpu/bring, and what was in it is replaced
# PYTHON chooses the interpreter that has pip; TARGET the Python version of the other machine.
set -euo pipefail
folder=${1:-$(dirname "$0")/bring}

packages=(
  chex==0.1.92 toolz==1.2.0 # losses
  einops==0.8.2 jaxtyping==0.3.11 wadler-lindig==0.1.8 # arrays
  trl==1.16.0 datasets==5.2.0 dill==0.4.1 multiprocess==0.70.19 # the other side
)

made=$(mktemp -d)
trap 'rm -rf "$made"' EXIT
"${PYTHON:-python3}" -m pip install --quiet --no-deps --no-compile --only-binary=:all: \
  --platform any --implementation py --python-version "${TARGET:-3.12}" --target "$made" "${packages[@]}"
echo '*' >"$made/.gitignore"
rm -rf "$folder"
mkdir -p "$(dirname "$folder")"
cp -r "$made" "$folder"
du -sh "$folder"
