#!/usr/bin/env bash
# Puts what the benchmark needs into a folder: see --help.
set -euo pipefail

if [[ ${1:---help} == --help ]]; then
  cat <<'TEXT'
usage: [SETTING=VALUE ...] gpu/bundle.sh FOLDER

Puts pure-Python packages that gpu/bench.py needs, or compares with, into a folder (gpu/bring is where it looks)
that travels with the checkout to a machine without a network. There it finds them after what is installed.
A bundle that is in the folder already is made anew; another folder that holds something is left alone.

PYTHON   the interpreter that has pip                [python3]
TARGET   the Python version of the other machine     [3.12]
TEXT
  exit 0
fi

folder=$1 marker=.trainjax-bundle
if [[ -e $folder && ! -e $folder/$marker && -n $(ls -A "$folder") ]]; then
  echo "error: $folder holds something that is no bundle; name another folder" >&2
  exit 2
fi

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
touch "$made/$marker"
rm -rf "$folder"
mkdir -p "$(dirname "$folder")"
cp -r "$made" "$folder"
du -sh "$folder"
