# Sourced by env.sh, and by scripts that run Python before they have an environment. Sets $root, the folder of the
# repository, and $python, the first on the PATH.
root="$(CDPATH= cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
python="$(command -v python3 || command -v python || true)"
if [ -z "$python" ]; then
    echo 'No python3 on the PATH: install Python 3.10 or newer.' >&2
    exit 1
fi
