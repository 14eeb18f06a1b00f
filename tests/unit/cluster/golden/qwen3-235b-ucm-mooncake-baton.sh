#!/bin/bash
# qwen3-235b-ucm-mooncake-baton: 4 nodes, 10 processes; from configs/deployments/qwen3-235b-ucm-mooncake-baton.toml
# Runs in the current directory, where files and logs go: bash SCRIPT ADDRESS [check | request | bench]
set -u
DEPLOYMENT=configs/deployments/qwen3-235b-ucm-mooncake-baton.toml

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

mkdir -p ./prefill-0
cat > ./prefill-0/run_dp_template.sh <<'END_OF_FILE'
#!/bin/bash
# prefill-0 on 192.168.10.1. Arguments: devices, port, data-parallel size, rank, address,
# RPC port, tensor-parallel size, ports of its sidecars and of their metrics
cd "$(dirname "$0")/.." || exit 1
export HCCL_IF_IP=192.168.10.1
export GLOO_SOCKET_IFNAME=eth0
export TP_SOCKET_IFNAME=eth0
export HCCL_SOCKET_IFNAME=eth0
export OMP_PROC_BIND=false
export OMP_NUM_THREADS=10
export ASCEND_RT_VISIBLE_DEVICES="$1"
export PYTHONHASHSEED=0
export MOONCAKE_CONFIG_PATH=./mooncake.json
export LD_LIBRARY_PATH="/usr/local/lib:/usr/local/Ascend/ascend-toolkit/latest/python/site-packages${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
export PYTHONPATH="${PYTHONPATH:+$PYTHONPATH:}/vllm-workspace/vllm"
export HCCL_BUFFSIZE=256
export PYTORCH_NPU_ALLOC_CONF=expandable_segments:False
export TASK_QUEUE_ENABLE=1
export VLLM_USE_MODELSCOPE=True
exec vllm serve /models/Qwen3-235B-A22B-W8A8 \
  --host 0.0.0.0 \
  --port "$2" \
  --data-parallel-size "$3" \
  --data-parallel-rank "$4" \
  --data-parallel-address "$5" \
  --data-parallel-rpc-port "$6" \
  --tensor-parallel-size "$7" \
  --enable-expert-parallel \
  --gpu-memory-utilization 0.92 \
  --enforce-eager \
  --seed 1024 \
  --max-model-len 17000 \
  --max-num-batched-tokens 8000 \
  --trust-remote-code \
  --max-num-seqs 4 \
  --quantization ascend \
  --kv-transfer-config '{"kv_connector": "MultiConnector", "kv_role": "kv_producer", "engine_id": "qwen3-235b-ucm-mooncake-baton-prefill-0-dp'"$4"'", "kv_connector_extra_config": {"connectors": [{"kv_connector": "BatonConnector", "kv_role": "kv_producer", "kv_connector_module_path": "engine_adapter.vllm_connector", "kv_connector_extra_config": {"listen": "192.168.10.1:'"$8"'", "metrics_port": '"$9"'}}, {"kv_connector": "UCMConnector", "kv_role": "kv_both", "kv_connector_module_path": "ucm.integration.vllm.ucm_connector", "kv_connector_extra_config": {"UCM_CONFIG_FILE": "/vllm-workspace/unified-cache-management/examples/ucm_config_example.yaml"}}]}}'
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
bash ./prefill-0/run_dp_template.sh 0,1,2,3 9000 4 0 192.168.10.1 13395 4 36000 39000 > prefill-0-dp0.log 2>&1 &
bash ./prefill-0/run_dp_template.sh 4,5,6,7 9001 4 1 192.168.10.1 13395 4 36004 39004 > prefill-0-dp1.log 2>&1 &
ready prefill-0-dp0 http://192.168.10.1:9000/health
ready prefill-0-dp1 http://192.168.10.1:9001/health
ready prefill-0-dp2 http://192.168.10.2:9000/health
ready prefill-0-dp3 http://192.168.10.2:9001/health
ready decode-0-dp0 http://192.168.10.3:9000/health
ready decode-0-dp1 http://192.168.10.3:9001/health
ready decode-0-dp2 http://192.168.10.4:9000/health
ready decode-0-dp3 http://192.168.10.4:9001/health
# proxy: http://192.168.10.1:7850/health
(
exec pd-proxy \
  --host 0.0.0.0 \
  --port 7850 \
  --contract pull \
  --prefiller-hosts 192.168.10.1 192.168.10.1 192.168.10.2 192.168.10.2 \
  --prefiller-ports 9000 9001 9000 9001 \
  --decoder-hosts 192.168.10.3 192.168.10.3 192.168.10.4 192.168.10.4 \
  --decoder-ports 9000 9001 9000 9001
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

mkdir -p ./prefill-0
cat > ./prefill-0/run_dp_template.sh <<'END_OF_FILE'
#!/bin/bash
# prefill-0 on 192.168.10.2. Arguments: devices, port, data-parallel size, rank, address,
# RPC port, tensor-parallel size, ports of its sidecars and of their metrics
cd "$(dirname "$0")/.." || exit 1
export HCCL_IF_IP=192.168.10.2
export GLOO_SOCKET_IFNAME=eth0
export TP_SOCKET_IFNAME=eth0
export HCCL_SOCKET_IFNAME=eth0
export OMP_PROC_BIND=false
export OMP_NUM_THREADS=10
export ASCEND_RT_VISIBLE_DEVICES="$1"
export PYTHONHASHSEED=0
export MOONCAKE_CONFIG_PATH=./mooncake.json
export LD_LIBRARY_PATH="/usr/local/lib:/usr/local/Ascend/ascend-toolkit/latest/python/site-packages${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
export PYTHONPATH="${PYTHONPATH:+$PYTHONPATH:}/vllm-workspace/vllm"
export HCCL_BUFFSIZE=256
export PYTORCH_NPU_ALLOC_CONF=expandable_segments:False
export TASK_QUEUE_ENABLE=1
export VLLM_USE_MODELSCOPE=True
exec vllm serve /models/Qwen3-235B-A22B-W8A8 \
  --host 0.0.0.0 \
  --port "$2" \
  --data-parallel-size "$3" \
  --data-parallel-rank "$4" \
  --data-parallel-address "$5" \
  --data-parallel-rpc-port "$6" \
  --tensor-parallel-size "$7" \
  --enable-expert-parallel \
  --gpu-memory-utilization 0.92 \
  --enforce-eager \
  --seed 1024 \
  --max-model-len 17000 \
  --max-num-batched-tokens 8000 \
  --trust-remote-code \
  --max-num-seqs 4 \
  --quantization ascend \
  --kv-transfer-config '{"kv_connector": "MultiConnector", "kv_role": "kv_producer", "engine_id": "qwen3-235b-ucm-mooncake-baton-prefill-0-dp'"$4"'", "kv_connector_extra_config": {"connectors": [{"kv_connector": "BatonConnector", "kv_role": "kv_producer", "kv_connector_module_path": "engine_adapter.vllm_connector", "kv_connector_extra_config": {"listen": "192.168.10.2:'"$8"'", "metrics_port": '"$9"'}}, {"kv_connector": "UCMConnector", "kv_role": "kv_both", "kv_connector_module_path": "ucm.integration.vllm.ucm_connector", "kv_connector_extra_config": {"UCM_CONFIG_FILE": "/vllm-workspace/unified-cache-management/examples/ucm_config_example.yaml"}}]}}'
END_OF_FILE

ready mooncake_master tcp://192.168.10.1:50088
bash ./prefill-0/run_dp_template.sh 0,1,2,3 9000 4 2 192.168.10.1 13395 4 36000 39000 > prefill-0-dp2.log 2>&1 &
bash ./prefill-0/run_dp_template.sh 4,5,6,7 9001 4 3 192.168.10.1 13395 4 36004 39004 > prefill-0-dp3.log 2>&1 &
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

start_192_168_10_3() {
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

mkdir -p ./decode-0
cat > ./decode-0/run_dp_template.sh <<'END_OF_FILE'
#!/bin/bash
# decode-0 on 192.168.10.3. Arguments: devices, port, data-parallel size, rank, address,
# RPC port, tensor-parallel size, ports of its sidecars and of their metrics
cd "$(dirname "$0")/.." || exit 1
export HCCL_IF_IP=192.168.10.3
export GLOO_SOCKET_IFNAME=eth0
export TP_SOCKET_IFNAME=eth0
export HCCL_SOCKET_IFNAME=eth0
export OMP_PROC_BIND=false
export OMP_NUM_THREADS=10
export ASCEND_RT_VISIBLE_DEVICES="$1"
export PYTHONHASHSEED=0
export MOONCAKE_CONFIG_PATH=./mooncake.json
export LD_LIBRARY_PATH="/usr/local/lib:/usr/local/Ascend/ascend-toolkit/latest/python/site-packages${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
export PYTHONPATH="${PYTHONPATH:+$PYTHONPATH:}/vllm-workspace/vllm"
export HCCL_BUFFSIZE=256
export PYTORCH_NPU_ALLOC_CONF=expandable_segments:False
export TASK_QUEUE_ENABLE=1
export VLLM_USE_MODELSCOPE=True
exec vllm serve /models/Qwen3-235B-A22B-W8A8 \
  --host 0.0.0.0 \
  --port "$2" \
  --data-parallel-size "$3" \
  --data-parallel-rank "$4" \
  --data-parallel-address "$5" \
  --data-parallel-rpc-port "$6" \
  --tensor-parallel-size "$7" \
  --enable-expert-parallel \
  --gpu-memory-utilization 0.92 \
  --seed 1024 \
  --max-model-len 17000 \
  --max-num-batched-tokens 8000 \
  --trust-remote-code \
  --max-num-seqs 4 \
  --quantization ascend \
  --compilation-config '{"cudagraph_mode": "FULL_DECODE_ONLY"}' \
  --kv-transfer-config '{"kv_connector": "BatonConnector", "kv_role": "kv_consumer", "engine_id": "qwen3-235b-ucm-mooncake-baton-decode-0-dp'"$4"'", "kv_connector_module_path": "engine_adapter.vllm_connector", "kv_connector_extra_config": {"listen": "192.168.10.3:'"$8"'", "metrics_port": '"$9"'}}'
END_OF_FILE

ready mooncake_master tcp://192.168.10.1:50088
bash ./decode-0/run_dp_template.sh 0,1,2,3 9000 4 0 192.168.10.3 13395 4 36000 39000 > decode-0-dp0.log 2>&1 &
bash ./decode-0/run_dp_template.sh 4,5,6,7 9001 4 1 192.168.10.3 13395 4 36004 39004 > decode-0-dp1.log 2>&1 &
wait
}

check_192_168_10_3() {
for i in {0..7}; do hccn_tool -i $i -lldp -g | grep Ifname; done
for i in {0..7}; do hccn_tool -i $i -link -g; done
for i in {0..7}; do hccn_tool -i $i -net_health -g; done
for i in {0..7}; do hccn_tool -i $i -netdetect -g; done
for i in {0..7}; do hccn_tool -i $i -gateway -g; done
cat /etc/hccn.conf
for i in {0..7}; do hccn_tool -i $i -ip -g; done
for i in {0..7}; do hccn_tool -i $i -tls -g; done | grep switch
}

start_192_168_10_4() {
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

mkdir -p ./decode-0
cat > ./decode-0/run_dp_template.sh <<'END_OF_FILE'
#!/bin/bash
# decode-0 on 192.168.10.4. Arguments: devices, port, data-parallel size, rank, address,
# RPC port, tensor-parallel size, ports of its sidecars and of their metrics
cd "$(dirname "$0")/.." || exit 1
export HCCL_IF_IP=192.168.10.4
export GLOO_SOCKET_IFNAME=eth0
export TP_SOCKET_IFNAME=eth0
export HCCL_SOCKET_IFNAME=eth0
export OMP_PROC_BIND=false
export OMP_NUM_THREADS=10
export ASCEND_RT_VISIBLE_DEVICES="$1"
export PYTHONHASHSEED=0
export MOONCAKE_CONFIG_PATH=./mooncake.json
export LD_LIBRARY_PATH="/usr/local/lib:/usr/local/Ascend/ascend-toolkit/latest/python/site-packages${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
export PYTHONPATH="${PYTHONPATH:+$PYTHONPATH:}/vllm-workspace/vllm"
export HCCL_BUFFSIZE=256
export PYTORCH_NPU_ALLOC_CONF=expandable_segments:False
export TASK_QUEUE_ENABLE=1
export VLLM_USE_MODELSCOPE=True
exec vllm serve /models/Qwen3-235B-A22B-W8A8 \
  --host 0.0.0.0 \
  --port "$2" \
  --data-parallel-size "$3" \
  --data-parallel-rank "$4" \
  --data-parallel-address "$5" \
  --data-parallel-rpc-port "$6" \
  --tensor-parallel-size "$7" \
  --enable-expert-parallel \
  --gpu-memory-utilization 0.92 \
  --seed 1024 \
  --max-model-len 17000 \
  --max-num-batched-tokens 8000 \
  --trust-remote-code \
  --max-num-seqs 4 \
  --quantization ascend \
  --compilation-config '{"cudagraph_mode": "FULL_DECODE_ONLY"}' \
  --kv-transfer-config '{"kv_connector": "BatonConnector", "kv_role": "kv_consumer", "engine_id": "qwen3-235b-ucm-mooncake-baton-decode-0-dp'"$4"'", "kv_connector_module_path": "engine_adapter.vllm_connector", "kv_connector_extra_config": {"listen": "192.168.10.4:'"$8"'", "metrics_port": '"$9"'}}'
END_OF_FILE

ready mooncake_master tcp://192.168.10.1:50088
bash ./decode-0/run_dp_template.sh 0,1,2,3 9000 4 2 192.168.10.3 13395 4 36000 39000 > decode-0-dp2.log 2>&1 &
bash ./decode-0/run_dp_template.sh 4,5,6,7 9001 4 3 192.168.10.3 13395 4 36004 39004 > decode-0-dp3.log 2>&1 &
wait
}

check_192_168_10_4() {
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
curl http://192.168.10.1:7850/v1/completions -H 'Content-Type: application/json' -d '{"model": "/models/Qwen3-235B-A22B-W8A8", "prompt": "Who are you?", "max_tokens": 100, "temperature": 0}'
}

bench() {
vllm bench serve \
  --backend vllm \
  --model /models/Qwen3-235B-A22B-W8A8 \
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
  192.168.10.3) if [ "${2-}" = check ]; then check_192_168_10_3; else start_192_168_10_3; fi ;;
  192.168.10.4) if [ "${2-}" = check ]; then check_192_168_10_4; else start_192_168_10_4; fi ;;
  request) request ;;
  bench) bench ;;
  *) echo "usage: bash $0 ADDRESS [check] | request | bench; ADDRESS: 192.168.10.1 192.168.10.2 192.168.10.3 192.168.10.4" >&2; exit 2 ;;
esac
