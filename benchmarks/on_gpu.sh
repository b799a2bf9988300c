#!/usr/bin/env bash
# Everything that needs a GPU, one step after the other, most wanted first; results under OUT (default build/gpu).
#
#   benchmarks/on_gpu.sh [SECONDS] [STEP ...]     steps below; all unless named
#
# Never two steps at once: tests beside builds once made both miss their limits (docs/log.md). Each step has a time limit
# and writes as it goes, so that a limit costs that step's rest and nothing else.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
total=${1:-3600}; shift || true
steps=${*:-tests trt bridge road world train matrix table hidden pictures taehv ops kernels play canary dataset faults soak}
out=${OUT:-build/gpu}; mkdir -p "$out"
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
begin=$(date +%s)
left() { echo $(( total - ($(date +%s) - begin) )); }

run() { # run NAME LIMIT_SECONDS command...
  local name=$1 limit=$2 rest; shift 2
  rest=$(left); [ "$rest" -gt 15 ] || { echo "$name: no time left"; return; }
  [ "$limit" -lt "$rest" ] || limit=$rest
  timeout "$limit" "$@" > "$out/$name.log" 2>&1
  echo "$name: exit $?, $(left) s left"
  grep -v '^{' "$out/$name.log" | grep -E "passed|failed|FAILED|ours|torch.compile|error" | tail -12
}

for step in $steps; do
  case $step in
    tests)   run tests 240 "$python" -m pytest -q -p no:cacheprovider -m gpu tests/ops tests/runtime tests/game tests/fused tests/batch ;;
    trt)     run trt 480 "$python" -m pytest -q -p no:cacheprovider -m gpu tests/trt ;;
    world)   run world 240 "$python" -m pytest -q -p no:cacheprovider -m gpu tests/nn tests/inference tests/sampling ;;
    train)   run train 240 "$python" -m pytest -q -p no:cacheprovider -m gpu tests/trainers ;;
    bridge)  run bridge 240 "$python" -m pytest -q -p no:cacheprovider -m gpu tests/test_tensorrt_integration.py ;;
    road)    run road 490 "$python" -m benchmarks.road --out "$out/road" ;;
    matrix)  run matrix 900 "$python" -m benchmarks.trt_matrix --seconds 150 --out "$out/trt_matrix.json" ;;
    table)   run table 900 "$python" -m benchmarks.table --seconds 880 --out "$out/decoder.json" ;;
    hidden)  run hidden 240 "$python" -m benchmarks.hidden --out "$out/hidden.json" ;;
    ops)     run ops 120 "$python" -m benchmarks.ops --out "$out/ops.json" ;;
    kernels) run kernels 200 "$python" -m benchmarks.kernels --precision bf16 fp8 int8 --out "$out/kernels.json" ;;
    play)    run play 400 "$python" -m benchmarks.play --out "$out/play.json" ;;
    pictures) run pictures 400 "$python" -m benchmarks.sana --out "$out/pictures.json" ;;
    taehv)   run taehv 400 "$python" -m benchmarks.taehv --out "$out/taehv.json" ;;
    canary)  run canary 90 "$python" -m benchmarks.canary ;;
    dataset) run dataset 300 "$python" -m benchmarks.dataset --out "$out/dataset.json" ;;
    soak)    run soak 570 "$python" -m benchmarks.soak --minutes 9 ;;
    faults)  run faults 900 "$python" -m pytest -q -p no:cacheprovider -m gpu tests/faults/test_gpu.py --full-counts -s
             cp docs/faults.md "$out/" ;;
    *)       echo "no step is called $step" >&2; exit 2 ;;
  esac
done
