#!/bin/sh
# compute-sanitizer over bench/sanitize.py: memcheck, or the tool that is named (racecheck, initcheck, synccheck).
#   bench/sanitize.sh [TOOL]
# Exit status 0: it ran to its end and nothing was found; 9: something was found; else the run itself failed.
# The tool comes with the CUDA toolkit, or as the wheel nvidia-cuda-sanitizer-api. The first run, without it, compiles the kernels.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
tool=$(command -v compute-sanitizer || find /usr/local/cuda*/ "$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" \
  -name compute-sanitizer -type f -perm -u+x 2>/dev/null | head -n 1)
if [ -z "$tool" ]; then
  echo "compute-sanitizer is not here: install the CUDA toolkit or the wheel nvidia-cuda-sanitizer-api" >&2
  exit 2
fi
"$python" -m bench.sanitize
# Each allocation stands by itself, so that an access beyond one is seen.
PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$tool" --tool "${1:-memcheck}" --error-exitcode 9 --target-processes application-only \
  --launch-timeout 0 --report-api-errors no "$python" -m bench.sanitize
