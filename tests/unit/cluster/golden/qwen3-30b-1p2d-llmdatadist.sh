#!/bin/bash
# qwen3-30b-1p2d-llmdatadist: 3 nodes, 4 processes; from configs/deployments/qwen3-30b-1p2d-llmdatadist.toml
# Runs in the current directory, where files and logs go: bash SCRIPT ADDRESS [check | request | bench]
set -u
DEPLOYMENT=configs/deployments/qwen3-30b-1p2d-llmdatadist.toml

ready() {  # NAME URL: wait until it answers
  command -v curl > /dev/null || { echo "curl is needed on this node, to see when $1 is ready" >&2; exit 1; }
  until case "$2" in
    tcp://*) host="${2#tcp://}" port="${2##*:}"; host="${host%:*}"; host="${host#[}"
      (: > "/dev/tcp/${host%]}/$port") 2> /dev/null ;;
    *) curl --noproxy '*' -fsS -o /dev/null --max-time 5 "$2" 2> /dev/null ;;
  esac; do
    echo "waiting for $1 ($2)" >&2
    sleep "${READY_INTERVAL_S:-2}"
  done
}

start_192_0_0_1() {
trap 'kill $(jobs -p) 2> /dev/null' EXIT
trap 'exit 143' INT TERM

test -e ./ranktable.json || pd-cluster ranktable "$DEPLOYMENT" --ranktable-path ./ranktable.json || exit 1

# prefill-0: http://192.0.0.1:13700/health
(
export HCCL_IF_IP=192.0.0.1
export GLOO_SOCKET_IFNAME=eth0
export TP_SOCKET_IFNAME=eth0
export HCCL_SOCKET_IFNAME=eth0
export OMP_PROC_BIND=false
export OMP_NUM_THREADS=10
export ASCEND_RT_VISIBLE_DEVICES=0,1
export DISAGGREGATED_PREFILL_RANK_TABLE_PATH=./ranktable.json
export VLLM_ASCEND_LLMDD_RPC_PORT=5557
export VLLM_USE_V1=1
exec vllm serve /model/Qwen3-30B-A3B \
  --host 0.0.0.0 \
  --port 13700 \
  --tensor-parallel-size 2 \
  --enable-expert-parallel \
  --served-model-name qwen3-moe \
  --gpu-memory-utilization 0.9 \
  --enforce-eager \
  --no-enable-prefix-caching \
  --seed 1024 \
  --max-model-len 6144 \
  --max-num-batched-tokens 6144 \
  --trust-remote-code \
  --additional-config '{"torchair_graph_config": {"enabled": false}, "ascend_scheduler_config": {"enabled": true, "enable_chunked_prefill": false}}' \
  --kv-transfer-config '{"kv_connector": "LLMDataDistCMgrConnector", "kv_buffer_device": "npu", "kv_parallel_size": 1, "kv_role": "kv_producer", "kv_port": 20001, "engine_id": "0", "kv_connector_module_path": "vllm_ascend.distributed.llmdatadist_c_mgr_connector"}'
) > prefill-0.log 2>&1 &

ready prefill-0 http://192.0.0.1:13700/health
ready decode-0 http://192.0.0.2:13700/health
ready decode-1 http://192.0.0.3:13700/health
# proxy: http://192.0.0.1:8080/health
(
exec pd-proxy \
  --host 192.0.0.1 \
  --port 8080 \
  --contract pull \
  --prefiller-hosts 192.0.0.1 \
  --prefiller-ports 13700 \
  --decoder-hosts 192.0.0.2 192.0.0.3 \
  --decoder-ports 13700 13700
) > proxy.log 2>&1 &

wait
}

check_192_0_0_1() {
for i in {0..7}; do hccn_tool -i $i -lldp -g | grep Ifname; done
for i in {0..7}; do hccn_tool -i $i -link -g; done
for i in {0..7}; do hccn_tool -i $i -net_health -g; done
for i in {0..7}; do hccn_tool -i $i -netdetect -g; done
for i in {0..7}; do hccn_tool -i $i -gateway -g; done
cat /etc/hccn.conf
for i in {0..7}; do hccn_tool -i $i -ip -g; done
for i in {0..7}; do hccn_tool -i $i -tls -g; done | grep switch
}

start_192_0_0_2() {
trap 'kill $(jobs -p) 2> /dev/null' EXIT
trap 'exit 143' INT TERM

test -e ./ranktable.json || pd-cluster ranktable "$DEPLOYMENT" --ranktable-path ./ranktable.json || exit 1

# decode-0: http://192.0.0.2:13700/health
(
export HCCL_IF_IP=192.0.0.2
export GLOO_SOCKET_IFNAME=eth0
export TP_SOCKET_IFNAME=eth0
export HCCL_SOCKET_IFNAME=eth0
export OMP_PROC_BIND=false
export OMP_NUM_THREADS=10
export ASCEND_RT_VISIBLE_DEVICES=6,7
export DISAGGREGATED_PREFILL_RANK_TABLE_PATH=./ranktable.json
export VLLM_ASCEND_LLMDD_RPC_PORT=5557
export VLLM_USE_V1=1
exec vllm serve /model/Qwen3-30B-A3B \
  --host 0.0.0.0 \
  --port 13700 \
  --tensor-parallel-size 2 \
  --enable-expert-parallel \
  --served-model-name qwen3-moe \
  --gpu-memory-utilization 0.9 \
  --no-enable-prefix-caching \
  --seed 1024 \
  --max-model-len 6144 \
  --max-num-batched-tokens 6144 \
  --trust-remote-code \
  --additional-config '{"torchair_graph_config": {"enabled": false}, "ascend_scheduler_config": {"enabled": true, "enable_chunked_prefill": false}}' \
  --kv-transfer-config '{"kv_connector": "LLMDataDistCMgrConnector", "kv_buffer_device": "npu", "kv_parallel_size": 1, "kv_role": "kv_consumer", "kv_port": 20001, "engine_id": "1", "kv_connector_module_path": "vllm_ascend.distributed.llmdatadist_c_mgr_connector"}'
) > decode-0.log 2>&1 &

wait
}

check_192_0_0_2() {
for i in {0..7}; do hccn_tool -i $i -lldp -g | grep Ifname; done
for i in {0..7}; do hccn_tool -i $i -link -g; done
for i in {0..7}; do hccn_tool -i $i -net_health -g; done
for i in {0..7}; do hccn_tool -i $i -netdetect -g; done
for i in {0..7}; do hccn_tool -i $i -gateway -g; done
cat /etc/hccn.conf
for i in {0..7}; do hccn_tool -i $i -ip -g; done
for i in {0..7}; do hccn_tool -i $i -tls -g; done | grep switch
}

start_192_0_0_3() {
trap 'kill $(jobs -p) 2> /dev/null' EXIT
trap 'exit 143' INT TERM

test -e ./ranktable.json || pd-cluster ranktable "$DEPLOYMENT" --ranktable-path ./ranktable.json || exit 1

# decode-1: http://192.0.0.3:13700/health
(
export HCCL_IF_IP=192.0.0.3
export GLOO_SOCKET_IFNAME=eth0
export TP_SOCKET_IFNAME=eth0
export HCCL_SOCKET_IFNAME=eth0
export OMP_PROC_BIND=false
export OMP_NUM_THREADS=10
export ASCEND_RT_VISIBLE_DEVICES=6,7
export DISAGGREGATED_PREFILL_RANK_TABLE_PATH=./ranktable.json
export VLLM_ASCEND_LLMDD_RPC_PORT=5557
export VLLM_USE_V1=1
exec vllm serve /model/Qwen3-30B-A3B \
  --host 0.0.0.0 \
  --port 13700 \
  --tensor-parallel-size 2 \
  --enable-expert-parallel \
  --served-model-name qwen3-moe \
  --gpu-memory-utilization 0.9 \
  --no-enable-prefix-caching \
  --seed 1024 \
  --max-model-len 6144 \
  --max-num-batched-tokens 6144 \
  --trust-remote-code \
  --additional-config '{"torchair_graph_config": {"enabled": false}, "ascend_scheduler_config": {"enabled": true, "enable_chunked_prefill": false}}' \
  --kv-transfer-config '{"kv_connector": "LLMDataDistCMgrConnector", "kv_buffer_device": "npu", "kv_parallel_size": 1, "kv_role": "kv_consumer", "kv_port": 20001, "engine_id": "2", "kv_connector_module_path": "vllm_ascend.distributed.llmdatadist_c_mgr_connector"}'
) > decode-1.log 2>&1 &

wait
}

check_192_0_0_3() {
for i in {0..7}; do hccn_tool -i $i -lldp -g | grep Ifname; done
for i in {0..7}; do hccn_tool -i $i -link -g; done
for i in {0..7}; do hccn_tool -i $i -net_health -g; done
for i in {0..7}; do hccn_tool -i $i -netdetect -g; done
for i in {0..7}; do hccn_tool -i $i -gateway -g; done
cat /etc/hccn.conf
for i in {0..7}; do hccn_tool -i $i -ip -g; done
for i in {0..7}; do hccn_tool -i $i -tls -g; done | grep switch
}

request() {
curl http://192.0.0.1:8080/v1/completions -H 'Content-Type: application/json' -d '{"model": "qwen3-moe", "prompt": "Who are you?", "max_tokens": 100, "temperature": 0}'
}

case "${1-}" in
  192.0.0.1) if [ "${2-}" = check ]; then check_192_0_0_1; else start_192_0_0_1; fi ;;
  192.0.0.2) if [ "${2-}" = check ]; then check_192_0_0_2; else start_192_0_0_2; fi ;;
  192.0.0.3) if [ "${2-}" = check ]; then check_192_0_0_3; else start_192_0_0_3; fi ;;
  request) request ;;
  *) echo "usage: bash $0 ADDRESS [check] | request; ADDRESS: 192.0.0.1 192.0.0.2 192.0.0.3" >&2; exit 2 ;;
esac
