#!/usr/bin/env bash
# Everything that only a GPU shows, in one call of at most nine minutes and without a network.
#
#   bench/on_gpu.sh [all|tests|bench] [--rehearse] [DIR]
#
# tests   the tests marked gpu, and some of them under compute-sanitizer where there is one
# bench   the rows of the benchmark; a second call goes on where the first one ended
# all     both (default)
#
# Leaves doctor.txt, tests.txt, bench.json and bench.md in DIR, bench/results/<device> by default.
# PYTHON names the interpreter (python3); MINUTES the time there is (9). --rehearse does the same on
# a CPU with a few tests and one small row. A stage that fails does not stop the next one; the exit
# status is 0 only if all stages passed and no row was refused or left out.
set -uo pipefail
cd "$(dirname "$0")/.." || exit

stage=all device=cuda out=
for argument in "$@"; do
  case $argument in
    all | tests | bench) stage=$argument ;;
    --rehearse) device=cpu ;;
    -*)
      echo "on_gpu.sh: expected all, tests, bench, --rehearse or a folder, got $argument" >&2
      exit 2
      ;;
    *) out=$argument ;;
  esac
done
python=${PYTHON:-python3}
seconds=$((${MINUTES:-9} * 60))
failed=()

remaining() { echo $((seconds - SECONDS > 1 ? seconds - SECONDS : 1)); }

# Runs a command for at most that many seconds and notes whether it passed.
run_stage() {
  local name=$1 limit=$2 status
  shift 2
  echo "== $name, at most $limit s"
  timeout --kill-after=10 "$limit" "$@"
  status=$?
  case $status in
    0) echo "== $name: passed" ;;
    124 | 137) failed+=("$name (time limit of $limit s)") ;;
    *) failed+=("$name (exit status $status)") ;;
  esac
}

# This tree comes first whatever is installed; the C++ kernels are for CPUs and are not built.
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
install_package() {
  if ! LASEM_FAST_SKIP_EXT=1 "$python" -m pip install --quiet --no-index --no-deps \
    --no-build-isolation --disable-pip-version-check --editable . >/dev/null 2>&1; then
    echo "pip cannot install here; the package is used from this folder"
  fi
}
device_name() {
  "$python" - <<'PYTHON'
import re, sys
import torch

if not torch.cuda.is_available():
    sys.exit("on_gpu.sh: PyTorch finds no CUDA device; --rehearse runs without one")
print(re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-"))
PYTHON
}
name=rehearsal
if [ "$device" = cuda ]; then
  install_package
  name=$(device_name) || exit 2
fi
out=${out:-bench/results/$name}
mkdir -p "$out" || exit 2
"$python" -m lasem_fast doctor | tee "$out/doctor.txt"

# Bits that do not depend on which stream a matrix product runs on.
export CUBLAS_WORKSPACE_CONFIG=:4096:8

# pytest.ini options of the suite need plugins that may not be there: none of them is used.
pytest=("$python" -m pytest -o addopts= -q --strict-markers -p no:cacheprovider)
tests_stage() {
  local files limit
  mapfile -t files < <(grep -l --include='*.py' -r 'mark\.gpu' tests)
  if [ "$device" = cpu ]; then
    run_stage tests "$(remaining)" "${pytest[@]}" tests/test_backend_parity.py \
      -m "not gpu" -k "torch and pool"
    return
  fi
  limit=$(remaining)
  [ "$stage" = all ] && limit=$((limit * 4 / 10))
  run_stage tests "$limit" "${pytest[@]}" -m gpu -ra "${files[@]}"
  if command -v compute-sanitizer >/dev/null; then
    limit=$(remaining)
    [ "$stage" = all ] && limit=60
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 run_stage compute-sanitizer "$limit" \
      compute-sanitizer --tool memcheck --error-exitcode 9 "${pytest[@]}" -m gpu \
      tests/test_backend_parity.py \
      -k "test_every_net_on_the_gpu and triton and bf16 and (stage or linear)"
  else
    echo "== compute-sanitizer: not on this machine"
  fi
}

bench_stage() {
  local limit suite=gpu timing=3
  [ "$device" = cpu ] && suite=smoke timing=0
  limit=$(remaining)
  # the row that is under way when the budget ends still has a quarter of the time
  run_stage bench "$limit" "$python" -m bench.run --suite "$suite" --device "$device" \
    --seconds "$timing" --budget $((limit * 3 / 4)) --out "$out/bench.json"
}

if [ "$stage" != bench ]; then
  tests_stage > >(tee "$out/tests.txt") 2>&1
fi
if [ "$stage" != tests ]; then
  bench_stage > >(tee "$out/bench.log") 2>&1
  [ -f "$out/bench.json" ] && "$python" -m bench.report "$out/bench.json" >"$out/bench.md"
fi

echo "== results in $out after $SECONDS s"
if [ ${#failed[@]} -gt 0 ]; then
  printf '== failed: %s\n' "${failed[@]}"
  exit 1
fi
