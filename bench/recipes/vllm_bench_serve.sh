#!/usr/bin/env bash
# The benchmark of seed 004: random prompts of 8,000 tokens, all at once, answers of exactly 1,000 (docs/benchmarks.md).
# usage: vllm_bench_serve.sh URL MODEL [FLAG...]
#   MODEL is the name it serves and the directory of its tokenizer; --tokenizer DIR where they differ. A further FLAG of
#   `vllm bench serve` wins over the recipe's.
set -euo pipefail
. "$(dirname "$0")/address.sh"
[ $# -ge 2 ] || { sed -n 's/^# usage/usage/p' "$0" >&2; exit 2; }
recipe_address "$1"
recipe_needs vllm "the environment of \`make test-vllm\` has it, PATH=.venv-vllm/bin:\$PATH"
exec vllm bench serve \
  --backend vllm \
  --model "$2" \
  --host "$host" \
  --port "$port" \
  --seed 123456 \
  --dataset-name random \
  --num-prompts 10 \
  --random-input-len 8000 \
  --random-output-len 1000 \
  --request-rate inf \
  --ignore-eos \
  "${@:3}"
