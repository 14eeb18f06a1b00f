#!/usr/bin/env bash
# The benchmark of seed 001, `benchmark_serving.py` there and `vllm bench serve` today: 256 random prompts of 4,096
# tokens, four a second and four at a time, answers of exactly 1,536 (docs/benchmarks.md).
# usage: benchmark_serving.sh URL MODEL TOKENIZER [FLAG...]
#   MODEL is the name it serves, TOKENIZER the directory of its tokenizer. A further FLAG of `vllm bench serve` wins
#   over the recipe's.
set -euo pipefail
. "$(dirname "$0")/address.sh"
[ $# -ge 3 ] || { sed -n 's/^# usage/usage/p' "$0" >&2; exit 2; }
recipe_address "$1"
recipe_needs vllm "the environment of \`make test-vllm\` has it, PATH=.venv-vllm/bin:\$PATH"
exec vllm bench serve \
  --backend vllm \
  --dataset-name random \
  --random-input-len 4096 \
  --random-output-len 1536 \
  --num-prompts 256 \
  --ignore-eos \
  --model "$2" \
  --tokenizer "$3" \
  --host "$host" \
  --port "$port" \
  --endpoint /v1/completions \
  --max-concurrency 4 \
  --request-rate 4 \
  "${@:4}"
