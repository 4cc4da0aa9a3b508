# Sourced by the other scripts. Sets $root, the folder of the repository, and $python, which runs everything: the active
# environment if it satisfies requirements.txt, else .venv in the repository, which is created or completed first.
# A script with other requirements sets $requirements_file and $environment_folder before.
source "$(dirname "${BASH_SOURCE[0]}")/python.sh"
requirements="$root/${requirements_file:-requirements.txt}"
environment="${environment_folder:-.venv}"
export HF_HUB_DISABLE_TELEMETRY="${HF_HUB_DISABLE_TELEMETRY:-1}"
# Idle threads of PyTorch spin while they wait. Left at the default, another busy process on the machine makes training on
# a few cores more than 10 times slower; a short spin costs nothing when the machine is free.
export GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-10000}"

if ! "$python" "$root/cmd/check_requirements.py" "$requirements" >/dev/null 2>&1; then
    if [ ! -x "$root/$environment/bin/python" ]; then
        echo "Creating the environment $environment with $("$python" --version), once."
        "$python" -m venv "$root/$environment"
    fi
    python="$root/$environment/bin/python"
    if ! missing="$("$python" "$root/cmd/check_requirements.py" "$requirements")"; then
        echo "Installing into $environment (PyTorch is large, this takes minutes): $missing"
        "$python" -m pip install --quiet --disable-pip-version-check -r "$requirements"
        "$python" "$root/cmd/check_requirements.py" "$requirements"
    fi
fi >&2  # what a script itself prints may be JSON
