#!/bin/bash
# qwq-32b-ucm-mooncake: 2 nodes, 6 processes; from configs/deployments/qwq-32b-ucm-mooncake.toml
# Runs in the current directory, where files and logs go: bash SCRIPT ADDRESS [check | request | bench]
set -u
DEPLOYMENT=configs/deployments/qwq-32b-ucm-mooncake.toml

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

start_192_168_10_1() {
trap 'kill $(jobs -p) 2> /dev/null' EXIT
trap 'exit 143' INT TERM

cat > ./mooncake.json <<'END_OF_FILE'
{
    "metadata_server": "P2PHANDSHAKE",
    "protocol": "ascend",
    "device_name": "",
    "master_server_address": "192.168.10.1:50088",
    "global_segment_size": "1GB"
}
END_OF_FILE

mkdir -p /vllm-workspace/unified-cache-management/examples
cat > /vllm-workspace/unified-cache-management/examples/ucm_config_example.yaml <<'END_OF_FILE'
ucm_connectors:
  - ucm_connector_name: "UcmPipelineStore"
    ucm_connector_config:
      store_pipeline: "Cache|Posix"
      storage_backends: "/mnt/test1"
      cache_buffer_capacity_gb: 64
enable_event_sync: true
use_layerwise: true
END_OF_FILE

# mooncake_master: tcp://192.168.10.1:50088
(
export LD_LIBRARY_PATH="/usr/local/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
exec mooncake_master \
  --port 50088 \
  --eviction_high_watermark_ratio 0.9 \
  --eviction_ratio 0.1 \
  --default_kv_lease_ttl 11000
) > mooncake_master.log 2>&1 &

ready mooncake_master tcp://192.168.10.1:50088
# prefill-0: http://192.168.10.1:9000/health
(
export HCCL_IF_IP=192.168.10.1
export GLOO_SOCKET_IFNAME=eth0
export TP_SOCKET_IFNAME=eth0
export HCCL_SOCKET_IFNAME=eth0
export OMP_PROC_BIND=false
export OMP_NUM_THREADS=10
export ASCEND_RT_VISIBLE_DEVICES=0,1,2,3
export PYTHONHASHSEED=0
export MOONCAKE_CONFIG_PATH=./mooncake.json
export LD_LIBRARY_PATH="/usr/local/lib:/usr/local/Ascend/ascend-toolkit/latest/python/site-packages${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
export PYTHONPATH="${PYTHONPATH:+$PYTHONPATH:}/vllm-workspace/vllm"
export PYTORCH_NPU_ALLOC_CONF=expandable_segments:True
export TASK_QUEUE_ENABLE=1
export VLLM_USE_MODELSCOPE=True
exec vllm serve /models/QwQ-32B \
  --host 0.0.0.0 \
  --port 9000 \
  --tensor-parallel-size 4 \
  --no-enable-expert-parallel \
  --gpu-memory-utilization 0.92 \
  --enforce-eager \
  --seed 1024 \
  --max-model-len 17000 \
  --max-num-batched-tokens 8000 \
  --trust-remote-code \
  --max-num-seqs 4 \
  --quantization None \
  --kv-transfer-config '{"kv_connector": "MultiConnector", "kv_role": "kv_producer", "engine_id": "0", "kv_connector_extra_config": {"connectors": [{"kv_connector": "MooncakeConnectorV1", "kv_role": "kv_producer", "kv_port": 36000, "kv_connector_extra_config": {"prefill": {"dp_size": 1, "tp_size": 4}, "decode": {"dp_size": 1, "tp_size": 4}}}, {"kv_connector": "UCMConnector", "kv_role": "kv_both", "kv_connector_module_path": "ucm.integration.vllm.ucm_connector", "kv_connector_extra_config": {"UCM_CONFIG_FILE": "/vllm-workspace/unified-cache-management/examples/ucm_config_example.yaml"}}]}}'
) > prefill-0.log 2>&1 &

# prefill-1: http://192.168.10.1:9001/health
(
export HCCL_IF_IP=192.168.10.1
export GLOO_SOCKET_IFNAME=eth0
export TP_SOCKET_IFNAME=eth0
export HCCL_SOCKET_IFNAME=eth0
export OMP_PROC_BIND=false
export OMP_NUM_THREADS=10
export ASCEND_RT_VISIBLE_DEVICES=4,5,6,7
export PYTHONHASHSEED=0
export MOONCAKE_CONFIG_PATH=./mooncake.json
export LD_LIBRARY_PATH="/usr/local/lib:/usr/local/Ascend/ascend-toolkit/latest/python/site-packages${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
export PYTHONPATH="${PYTHONPATH:+$PYTHONPATH:}/vllm-workspace/vllm"
export PYTORCH_NPU_ALLOC_CONF=expandable_segments:True
export TASK_QUEUE_ENABLE=1
export VLLM_USE_MODELSCOPE=True
exec vllm serve /models/QwQ-32B \
  --host 0.0.0.0 \
  --port 9001 \
  --tensor-parallel-size 4 \
  --no-enable-expert-parallel \
  --gpu-memory-utilization 0.92 \
  --enforce-eager \
  --seed 1024 \
  --max-model-len 17000 \
  --max-num-batched-tokens 8000 \
  --trust-remote-code \
  --max-num-seqs 4 \
  --quantization None \
  --kv-transfer-config '{"kv_connector": "MultiConnector", "kv_role": "kv_producer", "engine_id": "1", "kv_connector_extra_config": {"connectors": [{"kv_connector": "MooncakeConnectorV1", "kv_role": "kv_producer", "kv_port": 36004, "kv_connector_extra_config": {"prefill": {"dp_size": 1, "tp_size": 4}, "decode": {"dp_size": 1, "tp_size": 4}}}, {"kv_connector": "UCMConnector", "kv_role": "kv_both", "kv_connector_module_path": "ucm.integration.vllm.ucm_connector", "kv_connector_extra_config": {"UCM_CONFIG_FILE": "/vllm-workspace/unified-cache-management/examples/ucm_config_example.yaml"}}]}}'
) > prefill-1.log 2>&1 &

ready prefill-0 http://192.168.10.1:9000/health
ready prefill-1 http://192.168.10.1:9001/health
ready decode-0 http://192.168.10.2:9000/health
ready decode-1 http://192.168.10.2:9001/health
# proxy: http://192.168.10.1:7850/health
(
exec pd-proxy \
  --host 0.0.0.0 \
  --port 7850 \
  --contract pull \
  --prefiller-hosts 192.168.10.1 192.168.10.1 \
  --prefiller-ports 9000 9001 \
  --decoder-hosts 192.168.10.2 192.168.10.2 \
  --decoder-ports 9000 9001
) > proxy.log 2>&1 &

wait
}

check_192_168_10_1() {
for i in {0..7}; do hccn_tool -i $i -lldp -g | grep Ifname; done
for i in {0..7}; do hccn_tool -i $i -link -g; done
for i in {0..7}; do hccn_tool -i $i -net_health -g; done
for i in {0..7}; do hccn_tool -i $i -netdetect -g; done
for i in {0..7}; do hccn_tool -i $i -gateway -g; done
cat /etc/hccn.conf
for i in {0..7}; do hccn_tool -i $i -ip -g; done
for i in {0..7}; do hccn_tool -i $i -tls -g; done | grep switch
}

start_192_168_10_2() {
trap 'kill $(jobs -p) 2> /dev/null' EXIT
trap 'exit 143' INT TERM

cat > ./mooncake.json <<'END_OF_FILE'
{
    "metadata_server": "P2PHANDSHAKE",
    "protocol": "ascend",
    "device_name": "",
    "master_server_address": "192.168.10.1:50088",
    "global_segment_size": "1GB"
}
END_OF_FILE

ready mooncake_master tcp://192.168.10.1:50088
# decode-0: http://192.168.10.2:9000/health
(
export HCCL_IF_IP=192.168.10.2
export GLOO_SOCKET_IFNAME=eth0
export TP_SOCKET_IFNAME=eth0
export HCCL_SOCKET_IFNAME=eth0
export OMP_PROC_BIND=false
export OMP_NUM_THREADS=10
export ASCEND_RT_VISIBLE_DEVICES=0,1,2,3
export PYTHONHASHSEED=0
export MOONCAKE_CONFIG_PATH=./mooncake.json
export LD_LIBRARY_PATH="/usr/local/lib:/usr/local/Ascend/ascend-toolkit/latest/python/site-packages${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
export PYTHONPATH="${PYTHONPATH:+$PYTHONPATH:}/vllm-workspace/vllm"
export PYTORCH_NPU_ALLOC_CONF=expandable_segments:True
export TASK_QUEUE_ENABLE=1
export VLLM_USE_MODELSCOPE=True
exec vllm serve /models/QwQ-32B \
  --host 0.0.0.0 \
  --port 9000 \
  --tensor-parallel-size 4 \
  --no-enable-expert-parallel \
  --gpu-memory-utilization 0.92 \
  --seed 1024 \
  --max-model-len 17000 \
  --max-num-batched-tokens 8000 \
  --trust-remote-code \
  --max-num-seqs 4 \
  --quantization None \
  --compilation-config '{"cudagraph_mode": "FULL_DECODE_ONLY"}' \
  --kv-transfer-config '{"kv_connector": "MooncakeConnectorV1", "kv_role": "kv_consumer", "kv_port": 36000, "engine_id": "2", "kv_connector_extra_config": {"prefill": {"dp_size": 1, "tp_size": 4}, "decode": {"dp_size": 1, "tp_size": 4}}}'
) > decode-0.log 2>&1 &

# decode-1: http://192.168.10.2:9001/health
(
export HCCL_IF_IP=192.168.10.2
export GLOO_SOCKET_IFNAME=eth0
export TP_SOCKET_IFNAME=eth0
export HCCL_SOCKET_IFNAME=eth0
export OMP_PROC_BIND=false
export OMP_NUM_THREADS=10
export ASCEND_RT_VISIBLE_DEVICES=4,5,6,7
export PYTHONHASHSEED=0
export MOONCAKE_CONFIG_PATH=./mooncake.json
export LD_LIBRARY_PATH="/usr/local/lib:/usr/local/Ascend/ascend-toolkit/latest/python/site-packages${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
export PYTHONPATH="${PYTHONPATH:+$PYTHONPATH:}/vllm-workspace/vllm"
export PYTORCH_NPU_ALLOC_CONF=expandable_segments:True
export TASK_QUEUE_ENABLE=1
export VLLM_USE_MODELSCOPE=True
exec vllm serve /models/QwQ-32B \
  --host 0.0.0.0 \
  --port 9001 \
  --tensor-parallel-size 4 \
  --no-enable-expert-parallel \
  --gpu-memory-utilization 0.92 \
  --seed 1024 \
  --max-model-len 17000 \
  --max-num-batched-tokens 8000 \
  --trust-remote-code \
  --max-num-seqs 4 \
  --quantization None \
  --compilation-config '{"cudagraph_mode": "FULL_DECODE_ONLY"}' \
  --kv-transfer-config '{"kv_connector": "MooncakeConnectorV1", "kv_role": "kv_consumer", "kv_port": 36004, "engine_id": "3", "kv_connector_extra_config": {"prefill": {"dp_size": 1, "tp_size": 4}, "decode": {"dp_size": 1, "tp_size": 4}}}'
) > decode-1.log 2>&1 &

wait
}

check_192_168_10_2() {
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
curl http://192.168.10.1:7850/v1/completions -H 'Content-Type: application/json' -d '{"model": "/models/QwQ-32B", "prompt": "Who are you?", "max_tokens": 100, "temperature": 0}'
}

bench() {
vllm bench serve \
  --backend vllm \
  --model /models/QwQ-32B \
  --host 192.168.10.1 \
  --port 7850 \
  --seed 123456 \
  --dataset-name random \
  --num-prompts 10 \
  --random-input-len 8000 \
  --random-output-len 1000 \
  --request-rate inf \
  --ignore-eos
}

case "${1-}" in
  192.168.10.1) if [ "${2-}" = check ]; then check_192_168_10_1; else start_192_168_10_1; fi ;;
  192.168.10.2) if [ "${2-}" = check ]; then check_192_168_10_2; else start_192_168_10_2; fi ;;
  request) request ;;
  bench) bench ;;
  *) echo "usage: bash $0 ADDRESS [check] | request | bench; ADDRESS: 192.168.10.1 192.168.10.2" >&2; exit 2 ;;
esac
