#!/usr/bin/env bash
# All that only a card can tell, within ten minutes: is it right there, and how fast.
#
#     tests/cuda/on_a_card.sh OUT              on a machine with a card, Python 3.11 or later and CuPy; torch where there is one
#     tests/cuda/on_a_card.sh OUT --dry-run    the same steps, small, on the fake driver
#
# OUT/report.md is written anew after each step, so that a run that is cut off leaves what it found; beside it lie the log of each
# step, and the figures as JSON. A step that fails or whose tool is missing is reported, and the others run.
set -uo pipefail
cd "$(dirname "$0")/../.." || exit 1
out=$(realpath -m "${1:?the folder for the results}")
dry=${2:-}
mkdir -p "$out"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} SWL_BACKEND=cupy
python=${PYTHON:-python3}
steps=()
failed=0

report() {
  {
    echo "# swl on a card"
    echo
    echo "| step | seconds | result |"
    echo "|---|--:|---|"
    printf '%s\n' "${steps[@]}"
    for table in bandwidth bench; do
      [[ ! -s $out/$table.log ]] || printf '\n## %s\n\n%s\n' "$table" "$(<"$out/$table.log")"
    done
  } >"$out/report.md"
}

# step NAME SECONDS COMMAND...: run a command for so long at most
step() {
  local name=$1 most=$2 begin=$SECONDS status result
  shift 2
  if ! command -v "$1" >/dev/null; then
    result="no $1 here"
  else
    timeout --kill-after=10 "$most" "$@" >"$out/$name.log" 2>"$out/$name.err"
    status=$?
    result=passed
    ((status == 0)) || { result="failed: $status" && failed=1; }
    ((status != 124)) || result="cut off after $most s"
  fi
  steps+=("| $name | $((SECONDS - begin)) | $result |")
  echo "$name: $result"
  report
}

smoke='
import numpy as np, swl
z, t = np.random.default_rng(0).normal(size=(64, 5000)).astype("float32"), np.arange(64)
want, dwant = swl.cross_entropy_value_and_grad(z, t, backend="numpy")
loss, grad = swl.cross_entropy_value_and_grad(swl.asarray(z), swl.asarray(t))
assert abs(float(loss) - want) < 1e-5 and np.abs(grad.get() - dwant).max() < 1e-6
swl.check()
print("loss", float(loss), "gradient off by", np.abs(grad.get() - dwant).max())
'

if [[ $dry == --dry-run ]]; then
  step card 60 "$python" -c 'import sys; sys.path.insert(0, "tests/cuda"); import fake; sys.exit(fake.register())'
  SWL_BACKEND='' step conformance 200 "$python" -m pytest -q -p no:cacheprovider tests/test_cross_entropy.py -k "cupy-fake and out_is_written"
  SWL_BACKEND='' step bandwidth 100 "$python" tests/cuda/bandwidth.py "$out/bandwidth.json" --fake
  step sanitizer 60 compute-sanitizer "$python" -c "$smoke"
else
  step card 20 nvidia-smi
  step info 40 "$python" -m swl info
  step smoke 60 "$python" -c "$smoke"
  step bandwidth 130 "$python" tests/cuda/bandwidth.py "$out/bandwidth.json"
  step conformance 160 "$python" -m pytest --require-gpu -q -x -p no:cacheprovider --junitxml="$out/conformance.xml" \
    tests/test_cross_entropy.py tests/test_affine.py tests/test_fused.py tests/test_layers.py tests/test_laws.py tests/test_log_prob.py
  step bench 70 "$python" -m swl bench --rounds 1 losses dtypes
  step sanitizer 50 compute-sanitizer --error-exitcode 1 "$python" -c "$smoke"
  step memory 40 ncu --metrics dram__throughput.avg.pct_of_peak_sustained_elapsed --kernel-name regex:ce_ --csv "$python" -c "$smoke"
fi
exit $failed
