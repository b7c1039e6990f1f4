#!/usr/bin/env bash
# Tests and benchmarks of a GPU with what is installed: nothing is downloaded, and less than eight minutes are taken.
#
#   bash benchmarks/gpu.sh [python] [step ...]     # python3 without; all steps without
#
# Variables: PLATFORM (cuda, or cpu to rehearse: small sizes, no compiled ways of PyTorch), SECONDS_TOTAL (for all steps),
# OUT (where results go). Every step has a time limit and writes what it finds at once; one that fails stops no other.
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit

python=${1:-python3}
[ $# -gt 0 ] && shift
chosen=" $* "
platform=${PLATFORM:-cuda}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1

case $platform in
cuda)
    device=gpu out=${OUT:-benchmarks/results} total=${SECONDS_TOTAL:-450} factor=1 sizes="--rounds 5" tutorial=""
    export JAX_PLATFORMS=cuda,cpu XLA_PYTHON_CLIENT_PREALLOCATE=false
    ;;
cpu)
    device=cpu out=${OUT:-build/rehearsal} total=${SECONDS_TOTAL:-1200} factor=3
    sizes="--rounds 1 --members 2 --rows 4 --eager" tutorial="--only cnn"
    export JAX_PLATFORMS=cpu OMP_NUM_THREADS=1
    ;;
*)
    echo "PLATFORM must be cuda or cpu; got $platform" >&2
    exit 2
    ;;
esac
mkdir -p "$out/logs" || exit
export JAXENSEMBLE_CACHE="$PWD/build/cache" # measured plans are no one else's
export TORCHINDUCTOR_COMPILE_THREADS=4      # for each of the ways that are prepared together

timing="-m benchmarks.speed --no-check --together --patience $((120 * factor)) --out $out $sizes"
# name, seconds at most, and what Python is given; the most valuable first.
steps="
machine                60 -m benchmarks.speed.machine $out
tests                 120 -m pytest tests/torch_bridge/test_gpu.py -m gpu -v --tb=short -W default -p no:cacheprovider --junitxml=$out/tests-$device.xml
tutorial              120 $timing tutorial-short $tutorial
tutorial-tf32          90 $timing tutorial-short $tutorial --tf32
tutorial-bfloat16      90 $timing tutorial-short $tutorial --dtype bfloat16
resnet18              180 $timing images --only resnet18
mobilenet_v2          180 $timing images --only mobilenet_v2
resnet18-tf32         180 $timing images --only resnet18 --tf32
mobilenet_v2-tf32     180 $timing images --only mobilenet_v2 --tf32
resnet18-bfloat16     180 $timing images --only resnet18 --dtype bfloat16
mobilenet_v2-bfloat16 180 $timing images --only mobilenet_v2 --dtype bfloat16
training              120 $timing training-short $tutorial
"

summary=""
while read -r name limit arguments; do
    [ -z "$name" ] && continue
    [ "$chosen" != "  " ] && [[ $chosen != *" $name "* ]] && continue
    left=$((total - SECONDS))
    limit=$((limit * factor < left ? limit * factor : left))
    if [ "$limit" -lt 15 ]; then
        summary+="$name: not started, $left s are left"$'\n'
        continue
    fi
    echo "== $name: $limit s at most: $python $arguments"
    start=$SECONDS
    # shellcheck disable=SC2086 # the arguments are words
    timeout --kill-after=5 "$limit" "$python" $arguments >"$out/logs/$name.txt" 2>&1 </dev/null
    status=$?
    cat "$out/logs/$name.txt"
    case $status in
    0) verdict="done" ;;
    124 | 137) verdict="stopped at its limit" ;;
    *) verdict="FAILED with status $status" ;;
    esac
    summary+="$name: $verdict, $((SECONDS - start)) s"$'\n'
    echo "== $name: $verdict, $((SECONDS - start)) s"
done <<<"$steps"
printf '== %s s in all; results in %s\n%s' "$SECONDS" "$out" "$summary" | tee "$out/logs/summary.txt"
