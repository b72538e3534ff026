#!/usr/bin/env bash
# Prepares one host of a TPU; the other scripts copy it there: host.sh ARCHIVE BUCKET.
# trainjax from the archive goes into ~/trainjax-env, the bucket becomes the folder /runs.
set -euo pipefail

if [[ ${1:---help} == --help || $# -ne 2 ]]; then
  sed -n '2,3s/^# //p' "$0"
  exit 0
fi
archive=$1 bucket=$2

# uv brings a Python of its own: that of the TPU's images may be older than trainjax takes.
if [[ ! -x ~/trainjax-env/bin/trainjax ]]; then
  mkdir -p ~/trainjax-source
  tar -xzf "$HOME/$archive" -C ~/trainjax-source
  python3 -m pip install --quiet --user uv
  ~/.local/bin/uv venv --quiet --python=3.12 ~/trainjax-env
  ~/.local/bin/uv pip install --quiet --python ~/trainjax-env/bin/python "$HOME/trainjax-source[tpu]"
fi
rm -f "$HOME/$archive"

if ! command -v gcsfuse >/dev/null; then
  source=/etc/apt/sources.list.d/gcsfuse.list
  echo "deb [signed-by=/usr/share/keyrings/cloud.google.asc] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -c -s) main" |
    sudo tee "$source" >/dev/null
  curl -fsSL https://packages.cloud.google.com/apt/doc/apt-key.gpg |
    sudo tee /usr/share/keyrings/cloud.google.asc >/dev/null
  sudo apt-get update -qq
  sudo apt-get install -y -qq gcsfuse
fi
sudo mkdir -p /runs
sudo chown "$USER" /runs
# A checkpoint gets its name by renaming its folder: in a bucket with a hierarchical namespace that is one
# step; in any other it is many, and needs the limit.
mountpoint -q /runs || gcsfuse --implicit-dirs --rename-dir-limit=100000 "$bucket" /runs
