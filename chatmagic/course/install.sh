#!/bin/sh
# Installs the course from this folder, with no network: sh install.sh [FOLDER], by default ~/chatmagic.
# The models are read where they lie here: a share that nobody may write to will do.
set -e
here=$(cd "$(dirname "$0")" && pwd)
target=${1:-$HOME/chatmagic}
python=${PYTHON:-python@VERSION@}
"$python" -c 'import sys; sys.exit("%d.%d" % sys.version_info[:2] != "@VERSION@")' 2>/dev/null || {
    echo "The wheels here are for Python @VERSION@. Type: PYTHON=/where/it/is/python@VERSION@ sh $0 $target"; exit 1; }
mkdir -p "$target"
target=$(cd "$target" && pwd)
"$python" -m venv "$target/.venv"
bin=$target/.venv/bin
"$bin/python" -m pip install --quiet --no-index --find-links "$here/wheels" -c "$here/constraints.txt" "chatmagic[lab,serve,export,gguf]"
cp -R "$here/notebooks" "$here/docs" "$target"
"$bin/python" -m ipykernel install --prefix "$target/.venv" --name chatmagic --display-name chatmagic \
    --env OMP_WAIT_POLICY PASSIVE --env CHATMAGIC_HOME "$here/models" --env CHATMAGIC_COURSE "$target/course" >/dev/null
cat > "$target/lab.sh" <<END
#!/bin/sh
if [ "\$1" = en ]; then at=notebooks/en; shift; else at=notebooks; fi
export CHATMAGIC_HOME="$here/models" CHATMAGIC_COURSE="$target/course" PATH="$bin:\$PATH"
cd "$target" && exec "$bin/python" -m jupyterlab --LabApp.default_url=/lab/tree/\$at/00-setup.ipynb "\$@"
END
echo "To begin: sh $target/lab.sh; in English: sh $target/lab.sh en"
