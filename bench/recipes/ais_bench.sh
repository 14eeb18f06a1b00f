#!/usr/bin/env bash
# The benchmark of seed 003: ais_bench's stream-chat client at 28 requests a second, on the eight questions beside this
# script or on a whole data set (docs/benchmarks.md). Results go under outputs/ (FLAG: --work-dir DIR).
# usage: ais_bench.sh URL MODEL TOKENIZER [FLAG...]
#   MODEL is the name it serves, TOKENIZER the directory of its tokenizer. A further FLAG of `ais_bench` wins over the
#   recipe's. AIS_BENCH_DATASETS_CACHE=DIR: data sets are DIR/ais_bench/datasets/NAME, here gsm8k.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
. "$here/address.sh"
[ $# -ge 3 ] || { sed -n 's/^# usage/usage/p' "$0" >&2; exit 2; }
recipe_address "$1"
recipe_needs ais_bench "pip install -r bench/recipes/ais_bench/requirements.txt, in an environment of its own"
export RECIPE_HOST=$host RECIPE_PORT=$port RECIPE_MODEL=$2 RECIPE_TOKENIZER=$3
export AIS_BENCH_DATASETS_CACHE=${AIS_BENCH_DATASETS_CACHE:-$here}
unset http_proxy https_proxy # as the seed: the benchmark must reach the deployment, not a web proxy
exec ais_bench \
  --config-dir "$here/ais_bench" \
  --models vllm_api_stream_chat \
  --datasets gsm8k_gen_0_shot_cot_str_perf \
  --debug \
  --mode perf \
  "${@:4}"
