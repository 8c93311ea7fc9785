#!/bin/bash
# Everything that is measured on GPUs, in one go, the most valuable first:
#   bench/gpu.sh OUT [MODEL.gguf] [timed|checks|ranks|more ...]
# Of two GPUs the first is timed while the second is tested, each with half of the cores; then both run engines of two ranks; then
# comes the rest. MODEL.gguf (Qwen2.5-Coder-0.5B) is quantized in all forms, and answers questions.
# OUT gets a log of each command, its JSON, and in OUT/summary a line at its end: name, exit status, seconds. What has a line is
# not run again: the same command goes on where it was cut off. $COMMIT is told in results where git knows none.
# Exit status: 0 if all in OUT/summary have ended with 0.
set -u
cd "$(dirname "$0")/.."
out=$(realpath -m "${1:?"give a directory for the results"}") || exit 2
model= parts= python=${PYTHON:-python3}
shift
for argument; do
  case $argument in *.gguf) model=$(realpath -m "$argument") ;; *) parts="$parts $argument" ;; esac
done
parts=" ${parts:-timed checks ranks more} "
mkdir -p "$out" && touch "$out/summary"
export PYTHONUNBUFFERED=1
export NCCL_NVLS_ENABLE=0 TORCH_SYMM_MEM_DISABLE_MULTICAST=1  # multicast needs rights that containers often have not
gpus=$("$python" -c '
import bench.gpu_grpc, bench.gpu_load, bench.quantize, bench.real, executor_svc.compile, executor_svc.server, executor_svc.worker
import importlib.metadata, torch
importlib.metadata.version("enginehouse")  # which its sources alone do not tell: carry enginehouse.egg-info, or install it
print(torch.cuda.device_count())') || exit 2
{ nvidia-smi; nvidia-smi topo -m; nproc; free -g; df -h "$out" "${TMPDIR:-/tmp}"; "$python" -m pip list; } >"$out/machine" 2>&1
[ "$gpus" -gt 0 ] || { echo "torch finds no GPU here" >&2; exit 2; }

# Bytecode, as an installed package has it: in an image without it, each process compiles all that it imports (1.5 s of torch's).
nice "$python" -m compileall -q -j 4 . $("$python" -c 'import site; print(*site.getsitepackages())') >/dev/null 2>&1 &

run() {  # NAME SECONDS COMMAND ...: at most so many seconds, whatever comes of it
  local name=$1 limit=$2 began=$SECONDS status
  shift 2
  grep -q "^$name " "$out/summary" && return
  timeout -k 10 "$limit" "$@" >"$out/$name.log" 2>&1
  status=$?
  echo "$name $status $((SECONDS - began))" | tee -a "$out/summary"
}

bench() {  # NAME SECONDS PROGRAM ...
  local name=$1 limit=$2
  shift 2
  run "$name" "$limit" "$python" -m "bench.$@" --out "$out/$name.json"
}

ranks_of() {  # NAME SECONDS ARGUMENTS OF bench.gpu ...
  local name=$1 limit=$2
  shift 2
  run "$name" "$limit" "$python" -m torch.distributed.run --nproc-per-node 2 -m bench.gpu "$@" --out "$out/$name.json"
}

of_8b=bench/models/llama-3.1-8b
one_gpu() { bench bf16 300 gpu --tune --profile 1 8 64 256 -4096; }

quantized() { [ ! -f "$model" ] || bench quantize 900 quantize "$model" --tokens 50000; }

timed() {
  one_gpu
  bench fp8 240 gpu --tune --model $of_8b-fp8 --profile 1 256
  bench start 400 start
  bench start_fp8 300 start --model $of_8b-fp8
  bench fp8_kv 180 gpu --tune --model $of_8b-fp8 --kv-cache-dtype fp8 --only mixed_s itl_ms_b256 --profile 256
  bench grpc 240 gpu_grpc --rounds 3
  bench int4 300 gpu --tune --model $of_8b-int4 --only itl_ms_b1 itl_ms_b8 itl_ms_b64
  bench int8 300 gpu --tune --model $of_8b-int8 --only itl_ms_b1 itl_ms_b8 itl_ms_b64
  bench batch512 200 gpu --tune --batch 512 --only mixed_s
}

checks() {
  bench load 780 gpu_load --minutes 10 --kv-blocks 600 &
  run tests 900 "$python" -m pytest tests/gpu --ignore tests/gpu/test_gpu_ranks.py -p no:benchmark -n 8 -vv -rfE --durations 20 \
    --junitxml "$out/tests.xml" &
  {
    run sanitize 300 bench/sanitize.sh
    run racecheck 300 bench/sanitize.sh racecheck
    quantized
  } &
  wait
}

ranks() {
  run rank_tests 300 "$python" -m pytest tests/gpu/test_gpu_ranks.py -vv -rfE --durations 20
  run all_reduce 120 "$python" -m torch.distributed.run --standalone --nproc-per-node 2 -m bench.all_reduce --out "$out/all_reduce.json"
  ranks_of tp2 200 --tune --tp 2 --only itl_ms_b1 itl_ms_b64 ttft_ms_4096 mixed_s
  ENGINEHOUSE_ALL_REDUCE_BYTES=0 ranks_of tp2_nccl 150 --tune --tp 2 --only itl_ms_b1 itl_ms_b64 ttft_ms_4096
  one_gpu
  ranks_of pp2 200 --tune --pp 2 --only mixed_s itl_ms_b1
  ranks_of pp2_batch512 200 --tune --pp 2 --batch 512 --only mixed_s
  ranks_of pp2_tokens1024 200 --tune --pp 2 --batch 512 --tokens 1024 --only mixed_s itl_ms_b1
  ranks_of 70b_tp2 300 --tune --tp 2 --model bench/models/llama-3.1-70b --only itl_ms_b1 mixed_s --requests 256
  bench start_ranks_memory 300 start_ranks --gigabytes 16 --tp 2 --rounds 2 --dir /dev/shm  # of a store that no disk limits
  bench start_ranks 500 start_ranks --gigabytes 16 --tp 2 --rounds 2
}

more() {
  CUDA_VISIBLE_DEVICES=$((gpus - 1)) quantized &  # where the model came too late to be tested with the rest
  [ ! -f "$model" ] || bench real 200 real "$model"
  bench sampling 120 sampling
  bench products_packed 300 products --kind int4 int8 w8a8
  bench products 300 products --kind fp8 dense
  bench attention 300 attention
  wait
}

on() {  # GPU PART: alone there, where the part was asked for
  case $parts in *" $2 "*) ;; *) return ;; esac
  local half=$(($(nproc) / 2)) cores=0-$(($(nproc) - 1))
  [ "$gpus" -eq 1 ] || cores=$(($1 * half))-$((($1 + 1) * half - 1))
  taskset -cp "$cores" $BASHPID >/dev/null
  CUDA_VISIBLE_DEVICES=$((gpus > 1 ? $1 : 0)) "$2"
}

if [ "$gpus" -gt 1 ]; then
  (on 0 timed) &
  (on 1 checks) &
  wait
  case $parts in *" ranks "*) CUDA_VISIBLE_DEVICES=0,1 ranks ;; esac
else
  (on 0 timed)
  (on 0 checks)
fi
(on 0 more)
! grep -qv '^[^ ]* 0 ' "$out/summary"  # is there a line of another status?
