# Sourced by the projects' shell scripts, with `root` set to the repository: sets `python` and PYTHONPATH.
# PYTHON decides; otherwise the first of python, python3 and the environment that nox made which has torch.
# shellcheck shell=sh
has_torch() {
    "$1" -c 'import importlib.util as util, sys; sys.exit(util.find_spec("torch") is None)' 2>/dev/null
}
python=${PYTHON:-}
for candidate in python python3 "$root/.venv/bin/python"; do
    if [ -z "$python" ] && has_torch "$candidate"; then python=$candidate; fi
done
if [ -z "$python" ]; then
    echo "error: python: no interpreter with torch found; run 'pip install nox && nox -s demo' in $root, or set PYTHON" >&2
    exit 2
fi
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
