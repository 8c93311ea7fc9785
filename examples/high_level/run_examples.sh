#!/usr/bin/env bash
# All tasks that need nothing but a model: ./run_examples.sh <llama-model-path>
set -euo pipefail
MODEL=${1:?usage: $0 <llama-model-path>}
PYTHON=${PYTHON:-python3}
PROMPT=${PROMPT:-In the beginning God created the}
HERE=$(dirname "$0")
for task in run_llm_generate run_llm_generate_async_example run_llm_save_and_load run_llm_with_custom_tokenizer \
    run_llm_without_tokenizer run_llm_with_sampling run_llm_with_kv_cache_config run_llm_with_quantization; do
  echo "== $task"
  "$PYTHON" "$HERE/llm_examples.py" --task "$task" --prompt "$PROMPT" --hf_model_dir "$MODEL"
done
