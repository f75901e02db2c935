#!/usr/bin/env bash
# Everything that only a GPU shows, in three calls of at most nine minutes and without a network.
#
#   bench/on_gpu.sh [kernels|tests|peers|all] [--rehearse] [DIR]
#
# kernels  every tile of every kernel against float64, then every kernel's time inside a captured
#          step, then the benchmark's rows, our columns
# tests    the tests marked gpu, and kernels under compute-sanitizer where there is one
# peers    the benchmark's rows, all other columns, then ncu on the three slowest kernels
# all      the three of them in the time of one (default)
#
# Each call is of use alone; a second one with the same folder goes on where the first one ended.
# Leaves environment.txt, doctor.txt, tiles.jsonl, kernels.json, tests.txt, bench.json, bench.md, the
# ncu.csv, choices that were measured and Triton's cache in DIR, bench/results/<device> by default. PYTHON names the
# interpreter (python3); MINUTES the time there is (9). --rehearse does the same on a CPU with a few
# tests, some kernels in Triton's interpreter and one small row. What fails does not stop what comes
# next; the exit status is 0 only if all passed and no row was refused or left out.
set -uo pipefail
cd "$(dirname "$0")/.." || exit

stage=all device=cuda out=
for argument in "$@"; do
  case $argument in
    all | kernels | tests | peers) stage=$argument ;;
    --rehearse) device=cpu ;;
    -*)
      echo "on_gpu.sh: expected kernels, tests, peers, all, --rehearse or a folder, got $argument" >&2
      exit 2
      ;;
    *) out=$argument ;;
  esac
done
python=${PYTHON:-python3}
seconds=$((${MINUTES:-9} * 60))
failed=()

remaining() { echo $((seconds - SECONDS > 1 ? seconds - SECONDS : 1)); }

# What this stage may take: all that is left, or a third of the whole where all three run.
share() {
  local left third
  left=$(remaining) third=$((seconds / 3))
  [ "$stage" = all ] && [ "$third" -lt "$left" ] && left=$third
  echo "$left"
}

# Runs a command for at most that many seconds and notes whether it passed. An interrupt lets a
# program write what it has.
run_stage() {
  local name=$1 limit=$2 status
  shift 2
  echo "== $name, at most $limit s"
  timeout --signal=INT --kill-after=10 "$limit" "$@"
  status=$?
  case $status in
    0) echo "== $name: passed" ;;
    124 | 137) failed+=("$name (time limit of $limit s)") ;;
    *) failed+=("$name (exit status $status)") ;;
  esac
  return "$status"
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
export PYTHONUNBUFFERED=1

# Of a compiled kernel only its machine code is read again; its texts are many times larger.
pack_cache() {
  [ -d "$TRITON_CACHE_DIR" ] || return
  find "$TRITON_CACHE_DIR" -type f \( -name '*.ttir' -o -name '*.ttgir' -o -name '*.llir' \
    -o -name '*.ptx' -o -name '*.source' \) -exec truncate -s 0 {} +
  tar -czf "$out/triton-cache.tgz" -C "$(dirname "$TRITON_CACHE_DIR")" triton-cache
}
if [ "$device" = cuda ]; then
  folder=$(mktemp -d)
  export TRITON_CACHE_DIR="$folder/triton-cache"
  [ -f "$out/triton-cache.tgz" ] && tar -xzf "$out/triton-cache.tgz" -C "$folder"
  trap 'pack_cache; rm -rf "$folder"' EXIT
fi
"$python" -m lasem_fast doctor | tee "$out/doctor.txt"

# A cache of Triton's serves another machine only if its library is the same file.
environment() {
  "$python" - <<'PYTHON'
import hashlib, platform
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

print("python", platform.python_version())
for package in ("torch", "triton", "numpy", "pytest", "pytest-xdist"):
    try:
        print(package, metadata.version(package))
    except metadata.PackageNotFoundError:
        print(package, "not installed")
spec = find_spec("triton")
for library in sorted(Path(spec.origin).parent.glob("_C/libtriton*.so")) if spec else []:
    print("sha256 of", library.name, hashlib.sha256(library.read_bytes()).hexdigest())
PYTHON
  command -v nvidia-smi >/dev/null &&
    nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv
  for tool in ptxas ncu compute-sanitizer; do
    command -v $tool >/dev/null && echo "$tool: $($tool --version | tail -1)"
  done
}
environment >"$out/environment.txt" 2>&1

# Bits that do not depend on which stream a matrix product runs on.
export CUBLAS_WORKSPACE_CONFIG=:4096:8
workers=12
[ "$device" = cpu ] && workers=0

tiles() {
  local arguments=(--device "$device" --workers "$workers")
  if [ "$device" = cpu ]; then
    arguments+=(--dtypes fp32 --pools 2 --channels 3 --size 2 --few)
    export TRITON_INTERPRET=1
  fi
  "$python" -m bench.tiles "${arguments[@]}" "$@"
}

bench() {
  local suite=gpu timing=3 limit=$1 columns=$2
  [ "$device" = cpu ] && suite=smoke timing=0
  # the row that is under way when the budget ends still has a quarter of the time
  run_stage "bench, $columns" "$limit" "$python" -m bench.run --suite "$suite" \
    --device "$device" --columns "$columns" --seconds "$timing" --budget $((limit * 3 / 4)) \
    --out "$out/bench.json"
  [ -f "$out/bench.json" ] && "$python" -m bench.report "$out/bench.json" >"$out/bench.md"
}

# Every row in a process of its own, so that its kernels are compiled beside the others'; what is
# timed meanwhile is thrown away.
compile_rows() {
  local row scratch=$folder/rows rows=()
  mkdir -p "$scratch"
  while read -r row; do
    XDG_CACHE_HOME="$scratch/$row" timeout --signal=INT --kill-after=10 "$1" "$python" \
      -m bench.run --suite gpu --columns ours --seconds 0 --row "$row" \
      --out "$scratch/$row.json" >"$scratch/$row.txt" 2>&1 &
    rows+=($!)
  done < <("$python" -m bench.run --suite gpu --list)
  wait "${rows[@]}"  # a bare wait waits for the tee that this output goes to as well
  echo "== rows compiled after $SECONDS s"
}

kernels_stage() {
  local begin=$SECONDS limit
  limit=$(share)
  export -f tiles
  export python device workers
  # small images of many samples too: boxes of one pixel leave out taps that meet only padding
  local all="tiles --out '$out/tiles.jsonl'"
  [ "$device" = cuda ] &&
    all+=" && tiles --size 2 --samples 130 --pools 1 --channels 64 --out '$out/tiles.jsonl'"
  if ! run_stage tiles $((limit * 6 / 10)) bash -c "$all"; then
    # the compiler that comes with Triton has been at fault elsewhere
    if [ "$device" = cuda ] && command -v ptxas >/dev/null; then
      TRITON_PTXAS_PATH=$(command -v ptxas) TRITON_CACHE_DIR="$folder/other-cache" run_stage \
        "tiles, another ptxas" $((limit / 5)) bash -c "tiles --out '$out/tiles-ptxas.jsonl'"
    fi
  fi
  [ "$device" = cuda ] && export LASEM_FAST_CHOICES=measure
  if [ "$device" = cuda ]; then
    compile_rows $(((limit - SECONDS + begin) / 3))
    run_stage "kernel times" $(((limit - SECONDS + begin) / 3)) "$python" -m bench.kernel_times \
      --family boxes gathering --out "$out/kernels.json"
  fi
  limit=$((limit - SECONDS + begin))
  bench $((limit > 1 ? limit : 1)) ours
  "$python" -m lasem_fast choices show >"$out/choices.txt" 2>&1
}

# pytest.ini options of the suite need plugins that may not be there: none of them is used.
pytest=("$python" -m pytest -o addopts= -q --strict-markers -p no:cacheprovider)
# A capture that fails may spoil those that come after it in its process.
failing="test_a_stage_that_waits"
tests_stage() {
  local files side=()
  mapfile -t files < <(grep -l --include='*.py' -r 'mark\.gpu' tests)
  if [ "$device" = cpu ]; then
    run_stage tests "$(share)" "${pytest[@]}" tests/test_backend_parity.py \
      -m "not gpu" -k "torch and pool"
    return
  fi
  "$python" -c "import xdist" 2>/dev/null && side=(-n "$workers")
  run_stage tests $(($(share) * 7 / 10)) "${pytest[@]}" "${side[@]}" -m gpu -ra \
    -k "not $failing" "${files[@]}"
  run_stage "tests, failing captures" 60 "${pytest[@]}" -m gpu -ra -k "$failing" "${files[@]}"
  if command -v compute-sanitizer >/dev/null; then
    workers=0
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 run_stage compute-sanitizer "$(share)" \
      compute-sanitizer --tool memcheck --error-exitcode 9 \
      "$python" -m bench.tiles --few --dtypes bf16 tf32 --pools 2 --channels 72 --size 10 \
      --out "$out/sanitized.jsonl"
  else
    echo "== compute-sanitizer: not on this machine"
  fi
}

# Of the kernels of one row on which a step spends the most: where their time goes.
profiled="residual-17 8 groups b10 bf16 cuda"
busy=avg.pct_of_peak_sustained_active moved=throughput.avg.pct_of_peak_sustained_elapsed
metrics=gpu__time_duration.sum,sm__warps_active.$busy,sm__pipe_tensor_cycles_active.$busy
metrics+=,sm__$moved,lts__$moved,dram__$moved

peers_stage() {
  local kernels
  bench "$(share)" peers
  [ -f "$out/kernels.json" ] && command -v ncu >/dev/null || return 0
  kernels=$("$python" -m bench.profiled_step "$profiled" --slowest 3 "$out/kernels.json") || return
  run_stage ncu "$(remaining)" ncu --clock-control none --profile-from-start off \
    --kernel-name "regex:$kernels" --metrics "$metrics" --csv --log-file "$out/ncu.csv" \
    "$python" -m bench.profiled_step "$profiled"
}

for one in kernels tests peers; do
  if [ "$stage" = all ] || [ "$stage" = $one ]; then
    ${one}_stage > >(tee "$out/$one.txt") 2>&1
  fi
done

echo "== results in $out after $SECONDS s"
if [ ${#failed[@]} -gt 0 ]; then
  printf '== failed: %s\n' "${failed[@]}"
  exit 1
fi
