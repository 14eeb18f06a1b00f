#!/bin/bash
# deepseek-r1-2p2d-llmdatadist: 4 nodes, 5 processes; from configs/deployments/deepseek-r1-2p2d-llmdatadist.toml
# Runs in the current directory, where files and logs go: bash SCRIPT ADDRESS [check | request | bench]
set -u
DEPLOYMENT=configs/deployments/deepseek-r1-2p2d-llmdatadist.toml

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

start_172_19_32_175() {
trap 'kill $(jobs -p) 2> /dev/null' EXIT
trap 'exit 143' INT TERM

test -e /vllm-workspace/vllm-ascend/examples/disaggregated_prefill_v1/ranktable.json || pd-cluster ranktable "$DEPLOYMENT" --ranktable-path /vllm-workspace/vllm-ascend/examples/disaggregated_prefill_v1/ranktable.json || exit 1

# prefill-0-node0: http://172.19.32.175:20002/health
(
export HCCL_IF_IP=172.19.32.175
export GLOO_SOCKET_IFNAME=eth0
export TP_SOCKET_IFNAME=eth0
export HCCL_SOCKET_IFNAME=eth0
export OMP_PROC_BIND=false
export OMP_NUM_THREADS=100
export ASCEND_RT_VISIBLE_DEVICES=0,1,2,3,4,5,6,7
export DISAGGREGATED_PREFILL_RANK_TABLE_PATH=/vllm-workspace/vllm-ascend/examples/disaggregated_prefill_v1/ranktable.json
export VLLM_LLMDD_RPC_PORT=5559
export VLLM_USE_V1=1
exec vllm serve /models/deepseek_r1_w8a8 \
  --host 0.0.0.0 \
  --port 20002 \
  --data-parallel-size 2 \
  --data-parallel-size-local 1 \
  --data-parallel-address 172.19.32.175 \
  --data-parallel-rpc-port 13356 \
  --tensor-parallel-size 8 \
  --enable-expert-parallel \
  --served-model-name deepseek \
  --gpu-memory-utilization 0.9 \
  --enforce-eager \
  --api-server-count 2 \
  --seed 1024 \
  --max-model-len 32768 \
  --max-num-seqs 256 \
  --trust-remote-code \
  --max-num-batched-tokens 32768 \
  --kv-transfer-config '{"kv_connector": "LLMDataDistCMgrConnector", "kv_buffer_device": "npu", "kv_parallel_size": 1, "kv_role": "kv_producer", "kv_port": 20001, "engine_id": "0", "kv_connector_module_path": "vllm_ascend.distributed.llmdatadist_c_mgr_connector"}'
) > prefill-0-node0.log 2>&1 &

ready prefill-0-node0 http://172.19.32.175:20002/health
ready decode-0-node0 http://172.19.123.51:20002/health
# proxy: http://172.19.32.175:1025/health
(
exec pd-proxy \
  --host 172.19.32.175 \
  --port 1025 \
  --contract pull \
  --prefiller-hosts 172.19.32.175 \
  --prefiller-ports 20002 \
  --decoder-hosts 172.19.123.51 \
  --decoder-ports 20002
) > proxy.log 2>&1 &

wait
}

check_172_19_32_175() {
for i in {0..7}; do hccn_tool -i $i -lldp -g | grep Ifname; done
for i in {0..7}; do hccn_tool -i $i -link -g; done
for i in {0..7}; do hccn_tool -i $i -net_health -g; done
for i in {0..7}; do hccn_tool -i $i -netdetect -g; done
for i in {0..7}; do hccn_tool -i $i -gateway -g; done
cat /etc/hccn.conf
for i in {0..7}; do hccn_tool -i $i -ip -g; done
for i in {0..7}; do hccn_tool -i $i -tls -g; done | grep switch
}

start_172_19_241_49() {
trap 'kill $(jobs -p) 2> /dev/null' EXIT
trap 'exit 143' INT TERM

test -e /vllm-workspace/vllm-ascend/examples/disaggregated_prefill_v1/ranktable.json || pd-cluster ranktable "$DEPLOYMENT" --ranktable-path /vllm-workspace/vllm-ascend/examples/disaggregated_prefill_v1/ranktable.json || exit 1

# prefill-0-node1: headless
(
export HCCL_IF_IP=172.19.241.49
export GLOO_SOCKET_IFNAME=eth0
export TP_SOCKET_IFNAME=eth0
export HCCL_SOCKET_IFNAME=eth0
export OMP_PROC_BIND=false
export OMP_NUM_THREADS=100
export ASCEND_RT_VISIBLE_DEVICES=0,1,2,3,4,5,6,7
export DISAGGREGATED_PREFILL_RANK_TABLE_PATH=/vllm-workspace/vllm-ascend/examples/disaggregated_prefill_v1/ranktable.json
export VLLM_LLMDD_RPC_PORT=5559
export VLLM_USE_V1=1
exec vllm serve /models/deepseek_r1_w8a8 \
  --headless \
  --data-parallel-size 2 \
  --data-parallel-start-rank 1 \
  --data-parallel-size-local 1 \
  --data-parallel-address 172.19.32.175 \
  --data-parallel-rpc-port 13356 \
  --tensor-parallel-size 8 \
  --enable-expert-parallel \
  --served-model-name deepseek \
  --gpu-memory-utilization 0.9 \
  --enforce-eager \
  --seed 1024 \
  --max-model-len 32768 \
  --max-num-seqs 256 \
  --trust-remote-code \
  --max-num-batched-tokens 32768 \
  --kv-transfer-config '{"kv_connector": "LLMDataDistCMgrConnector", "kv_buffer_device": "npu", "kv_parallel_size": 1, "kv_role": "kv_producer", "kv_port": 20001, "engine_id": "0", "kv_connector_module_path": "vllm_ascend.distributed.llmdatadist_c_mgr_connector"}'
) > prefill-0-node1.log 2>&1 &

wait
}

check_172_19_241_49() {
for i in {0..7}; do hccn_tool -i $i -lldp -g | grep Ifname; done
for i in {0..7}; do hccn_tool -i $i -link -g; done
for i in {0..7}; do hccn_tool -i $i -net_health -g; done
for i in {0..7}; do hccn_tool -i $i -netdetect -g; done
for i in {0..7}; do hccn_tool -i $i -gateway -g; done
cat /etc/hccn.conf
for i in {0..7}; do hccn_tool -i $i -ip -g; done
for i in {0..7}; do hccn_tool -i $i -tls -g; done | grep switch
}

start_172_19_123_51() {
trap 'kill $(jobs -p) 2> /dev/null' EXIT
trap 'exit 143' INT TERM

test -e /vllm-workspace/vllm-ascend/examples/disaggregated_prefill_v1/ranktable.json || pd-cluster ranktable "$DEPLOYMENT" --ranktable-path /vllm-workspace/vllm-ascend/examples/disaggregated_prefill_v1/ranktable.json || exit 1

# decode-0-node0: http://172.19.123.51:20002/health
(
export HCCL_IF_IP=172.19.123.51
export GLOO_SOCKET_IFNAME=eth0
export TP_SOCKET_IFNAME=eth0
export HCCL_SOCKET_IFNAME=eth0
export OMP_PROC_BIND=false
export OMP_NUM_THREADS=100
export ASCEND_RT_VISIBLE_DEVICES=0,1,2,3,4,5,6,7
export DISAGGREGATED_PREFILL_RANK_TABLE_PATH=/vllm-workspace/vllm-ascend/examples/disaggregated_prefill_v1/ranktable.json
export VLLM_LLMDD_RPC_PORT=5559
export VLLM_USE_V1=1
exec vllm serve /models/deepseek_r1_w8a8 \
  --host 0.0.0.0 \
  --port 20002 \
  --data-parallel-size 4 \
  --data-parallel-size-local 2 \
  --data-parallel-address 172.19.123.51 \
  --data-parallel-rpc-port 13356 \
  --tensor-parallel-size 4 \
  --enable-expert-parallel \
  --served-model-name deepseek \
  --gpu-memory-utilization 0.9 \
  --api-server-count 2 \
  --seed 1024 \
  --max-model-len 32768 \
  --max-num-seqs 256 \
  --trust-remote-code \
  --max-num-batched-tokens 256 \
  --additional-config '{"torchair_graph_config": {"enabled": true}}' \
  --kv-transfer-config '{"kv_connector": "LLMDataDistCMgrConnector", "kv_buffer_device": "npu", "kv_parallel_size": 1, "kv_role": "kv_consumer", "kv_port": 20001, "engine_id": "1", "kv_connector_module_path": "vllm_ascend.distributed.llmdatadist_c_mgr_connector"}'
) > decode-0-node0.log 2>&1 &

wait
}

check_172_19_123_51() {
for i in {0..7}; do hccn_tool -i $i -lldp -g | grep Ifname; done
for i in {0..7}; do hccn_tool -i $i -link -g; done
for i in {0..7}; do hccn_tool -i $i -net_health -g; done
for i in {0..7}; do hccn_tool -i $i -netdetect -g; done
for i in {0..7}; do hccn_tool -i $i -gateway -g; done
cat /etc/hccn.conf
for i in {0..7}; do hccn_tool -i $i -ip -g; done
for i in {0..7}; do hccn_tool -i $i -tls -g; done | grep switch
}

start_172_19_190_36() {
trap 'kill $(jobs -p) 2> /dev/null' EXIT
trap 'exit 143' INT TERM

test -e /vllm-workspace/vllm-ascend/examples/disaggregated_prefill_v1/ranktable.json || pd-cluster ranktable "$DEPLOYMENT" --ranktable-path /vllm-workspace/vllm-ascend/examples/disaggregated_prefill_v1/ranktable.json || exit 1

# decode-0-node1: headless
(
export HCCL_IF_IP=172.19.190.36
export GLOO_SOCKET_IFNAME=eth0
export TP_SOCKET_IFNAME=eth0
export HCCL_SOCKET_IFNAME=eth0
export OMP_PROC_BIND=false
export OMP_NUM_THREADS=100
export ASCEND_RT_VISIBLE_DEVICES=0,1,2,3,4,5,6,7
export DISAGGREGATED_PREFILL_RANK_TABLE_PATH=/vllm-workspace/vllm-ascend/examples/disaggregated_prefill_v1/ranktable.json
export VLLM_LLMDD_RPC_PORT=5559
export VLLM_USE_V1=1
exec vllm serve /models/deepseek_r1_w8a8 \
  --headless \
  --data-parallel-size 4 \
  --data-parallel-start-rank 2 \
  --data-parallel-size-local 2 \
  --data-parallel-address 172.19.123.51 \
  --data-parallel-rpc-port 13356 \
  --tensor-parallel-size 4 \
  --enable-expert-parallel \
  --served-model-name deepseek \
  --gpu-memory-utilization 0.9 \
  --seed 1024 \
  --max-model-len 32768 \
  --max-num-seqs 256 \
  --trust-remote-code \
  --max-num-batched-tokens 256 \
  --additional-config '{"torchair_graph_config": {"enabled": true}}' \
  --kv-transfer-config '{"kv_connector": "LLMDataDistCMgrConnector", "kv_buffer_device": "npu", "kv_parallel_size": 1, "kv_role": "kv_consumer", "kv_port": 20001, "engine_id": "1", "kv_connector_module_path": "vllm_ascend.distributed.llmdatadist_c_mgr_connector"}'
) > decode-0-node1.log 2>&1 &

wait
}

check_172_19_190_36() {
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
curl http://172.19.32.175:1025/v1/completions -H 'Content-Type: application/json' -d '{"model": "deepseek", "prompt": "Who are you?", "max_tokens": 100, "temperature": 0}'
}

bench() {
vllm bench serve \
  --backend vllm \
  --model deepseek \
  --tokenizer /models/deepseek_r1_w8a8 \
  --host 172.19.32.175 \
  --port 1025 \
  --dataset-name random \
  --random-input-len 4096 \
  --random-output-len 1536 \
  --num-prompts 256 \
  --ignore-eos \
  --endpoint /v1/completions \
  --max-concurrency 4 \
  --request-rate 4
}

case "${1-}" in
  172.19.32.175) if [ "${2-}" = check ]; then check_172_19_32_175; else start_172_19_32_175; fi ;;
  172.19.241.49) if [ "${2-}" = check ]; then check_172_19_241_49; else start_172_19_241_49; fi ;;
  172.19.123.51) if [ "${2-}" = check ]; then check_172_19_123_51; else start_172_19_123_51; fi ;;
  172.19.190.36) if [ "${2-}" = check ]; then check_172_19_190_36; else start_172_19_190_36; fi ;;
  request) request ;;
  bench) bench ;;
  *) echo "usage: bash $0 ADDRESS [check] | request | bench; ADDRESS: 172.19.32.175 172.19.241.49 172.19.123.51 172.19.190.36" >&2; exit 2 ;;
esac
