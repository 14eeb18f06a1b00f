#!/bin/bash
# deepseek-v3.1-2p1d-layerwise: 4 nodes, 37 processes; from configs/deployments/deepseek-v3.1-2p1d-layerwise.toml
# Runs in the current directory, where files and logs go: bash SCRIPT ADDRESS [check | request | bench]
set -u
DEPLOYMENT=configs/deployments/deepseek-v3.1-2p1d-layerwise.toml

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

# instead of its lines below: cd prefill-0 && python launch_online_dp.py --dp-size 2 --tp-size 8 --dp-size-local 2 --dp-rank-start 0 --dp-address 192.0.0.1 --dp-rpc-port 12321 --vllm-start-port 7100
mkdir -p ./prefill-0
cat > ./prefill-0/run_dp_template.sh <<'END_OF_FILE'
#!/bin/bash
# prefill-0 on 192.0.0.1. Arguments: devices, port, data-parallel size, rank, address,
# RPC port, tensor-parallel size
cd "$(dirname "$0")/.." || exit 1
unset ftp_proxy
unset https_proxy
unset http_proxy
export HCCL_IF_IP=192.0.0.1
export GLOO_SOCKET_IFNAME=eth0
export TP_SOCKET_IFNAME=eth0
export HCCL_SOCKET_IFNAME=eth0
export OMP_PROC_BIND=false
export OMP_NUM_THREADS=10
export ASCEND_RT_VISIBLE_DEVICES="$1"
export VLLM_VERSION=0.11.0
export VLLM_RPC_TIMEOUT=3600000
export VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS=30000
export HCCL_EXEC_TIMEOUT=204
export HCCL_CONNECT_TIMEOUT=120
export LD_PRELOAD=/path_to_jemalloc/libjemalloc.so
export PYTORCH_NPU_ALLOC_CONF=expandable_segments:True
export VLLM_ASCEND_ENABLE_MLAPO=1
export TASK_QUEUE_ENABLE=1
export HCCL_OP_EXPANSION_MODE=AIV
export VLLM_TORCH_PROFILER_DIR=./vllm_profile
export VLLM_TORCH_PROFILER_WITH_STACK=1
export VLLM_USE_V1=1
export ASCEND_BUFFER_POOL=4:8
export LD_LIBRARY_PATH="/usr/local/Ascend/ascend-toolkit/latest/python/site-packages/mooncake${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
export HCCL_BUFFSIZE=256
exec vllm serve /path_to_weight/DeepSeek-V3.1_w8a8mix_mtp \
  --host 0.0.0.0 \
  --port "$2" \
  --data-parallel-size "$3" \
  --data-parallel-rank "$4" \
  --data-parallel-address "$5" \
  --data-parallel-rpc-port "$6" \
  --tensor-parallel-size "$7" \
  --enable-expert-parallel \
  --served-model-name ds_r1 \
  --gpu-memory-utilization 0.9 \
  --enforce-eager \
  --seed 1024 \
  --max-model-len 40000 \
  --trust-remote-code \
  --quantization ascend \
  --no-enable-prefix-caching \
  --speculative-config '{"num_speculative_tokens": 1, "method": "deepseek_mtp"}' \
  --max-num-batched-tokens 16384 \
  --max-num-seqs 8 \
  --additional-config '{"recompute_scheduler_enable": true, "enable_shared_expert_dp": true}' \
  --kv-transfer-config '{"kv_connector": "MooncakeLayerwiseConnector", "kv_role": "kv_producer", "kv_port": 36000, "engine_id": "0", "kv_connector_module_path": "vllm_ascend.distributed.mooncake_layerwise_connector", "kv_connector_extra_config": {"use_ascend_direct": true, "prefill": {"dp_size": 2, "tp_size": 8}, "decode": {"dp_size": 32, "tp_size": 1}}}'
END_OF_FILE

bash ./prefill-0/run_dp_template.sh 0,1,2,3,4,5,6,7 7100 2 0 192.0.0.1 12321 8 > prefill-0-dp0.log 2>&1 &
bash ./prefill-0/run_dp_template.sh 8,9,10,11,12,13,14,15 7101 2 1 192.0.0.1 12321 8 > prefill-0-dp1.log 2>&1 &
ready prefill-0-dp0 http://192.0.0.1:7100/health
ready prefill-0-dp1 http://192.0.0.1:7101/health
ready prefill-1-dp0 http://192.0.0.2:7100/health
ready prefill-1-dp1 http://192.0.0.2:7101/health
ready decode-0-dp0 http://192.0.0.3:7100/health
ready decode-0-dp1 http://192.0.0.3:7101/health
ready decode-0-dp2 http://192.0.0.3:7102/health
ready decode-0-dp3 http://192.0.0.3:7103/health
ready decode-0-dp4 http://192.0.0.3:7104/health
ready decode-0-dp5 http://192.0.0.3:7105/health
ready decode-0-dp6 http://192.0.0.3:7106/health
ready decode-0-dp7 http://192.0.0.3:7107/health
ready decode-0-dp8 http://192.0.0.3:7108/health
ready decode-0-dp9 http://192.0.0.3:7109/health
ready decode-0-dp10 http://192.0.0.3:7110/health
ready decode-0-dp11 http://192.0.0.3:7111/health
ready decode-0-dp12 http://192.0.0.3:7112/health
ready decode-0-dp13 http://192.0.0.3:7113/health
ready decode-0-dp14 http://192.0.0.3:7114/health
ready decode-0-dp15 http://192.0.0.3:7115/health
ready decode-0-dp16 http://192.0.0.4:7100/health
ready decode-0-dp17 http://192.0.0.4:7101/health
ready decode-0-dp18 http://192.0.0.4:7102/health
ready decode-0-dp19 http://192.0.0.4:7103/health
ready decode-0-dp20 http://192.0.0.4:7104/health
ready decode-0-dp21 http://192.0.0.4:7105/health
ready decode-0-dp22 http://192.0.0.4:7106/health
ready decode-0-dp23 http://192.0.0.4:7107/health
ready decode-0-dp24 http://192.0.0.4:7108/health
ready decode-0-dp25 http://192.0.0.4:7109/health
ready decode-0-dp26 http://192.0.0.4:7110/health
ready decode-0-dp27 http://192.0.0.4:7111/health
ready decode-0-dp28 http://192.0.0.4:7112/health
ready decode-0-dp29 http://192.0.0.4:7113/health
ready decode-0-dp30 http://192.0.0.4:7114/health
ready decode-0-dp31 http://192.0.0.4:7115/health
# proxy: http://192.0.0.1:1999/health
(
exec pd-proxy \
  --host 192.0.0.1 \
  --port 1999 \
  --contract layerwise \
  --prefiller-hosts 192.0.0.1 192.0.0.1 192.0.0.2 192.0.0.2 \
  --prefiller-ports 7100 7101 7100 7101 \
  --decoder-hosts 192.0.0.3 192.0.0.3 192.0.0.3 192.0.0.3 192.0.0.3 192.0.0.3 192.0.0.3 192.0.0.3 192.0.0.3 192.0.0.3 192.0.0.3 192.0.0.3 192.0.0.3 192.0.0.3 192.0.0.3 192.0.0.3 192.0.0.4 192.0.0.4 192.0.0.4 192.0.0.4 192.0.0.4 192.0.0.4 192.0.0.4 192.0.0.4 192.0.0.4 192.0.0.4 192.0.0.4 192.0.0.4 192.0.0.4 192.0.0.4 192.0.0.4 192.0.0.4 \
  --decoder-ports 7100 7101 7102 7103 7104 7105 7106 7107 7108 7109 7110 7111 7112 7113 7114 7115 7100 7101 7102 7103 7104 7105 7106 7107 7108 7109 7110 7111 7112 7113 7114 7115
) > proxy.log 2>&1 &

wait
}

check_192_0_0_1() {
for i in {0..15}; do hccn_tool -i $i -lldp -g | grep Ifname; done
for i in {0..15}; do hccn_tool -i $i -link -g; done
for i in {0..15}; do hccn_tool -i $i -net_health -g; done
for i in {0..15}; do hccn_tool -i $i -netdetect -g; done
for i in {0..15}; do hccn_tool -i $i -gateway -g; done
cat /etc/hccn.conf
for i in {0..15}; do hccn_tool -i $i -vnic -g; done
for i in {0..15}; do hccn_tool -i $i -tls -g; done | grep switch
for i in {0..7}; do for c in 0 1; do npu-smi info -t spod-info -i $i -c $c; done; done
}

start_192_0_0_2() {
trap 'kill $(jobs -p) 2> /dev/null' EXIT
trap 'exit 143' INT TERM

# instead of its lines below: cd prefill-1 && python launch_online_dp.py --dp-size 2 --tp-size 8 --dp-size-local 2 --dp-rank-start 0 --dp-address 192.0.0.2 --dp-rpc-port 12321 --vllm-start-port 7100
mkdir -p ./prefill-1
cat > ./prefill-1/run_dp_template.sh <<'END_OF_FILE'
#!/bin/bash
# prefill-1 on 192.0.0.2. Arguments: devices, port, data-parallel size, rank, address,
# RPC port, tensor-parallel size
cd "$(dirname "$0")/.." || exit 1
unset ftp_proxy
unset https_proxy
unset http_proxy
export HCCL_IF_IP=192.0.0.2
export GLOO_SOCKET_IFNAME=eth0
export TP_SOCKET_IFNAME=eth0
export HCCL_SOCKET_IFNAME=eth0
export OMP_PROC_BIND=false
export OMP_NUM_THREADS=10
export ASCEND_RT_VISIBLE_DEVICES="$1"
export VLLM_VERSION=0.11.0
export VLLM_RPC_TIMEOUT=3600000
export VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS=30000
export HCCL_EXEC_TIMEOUT=204
export HCCL_CONNECT_TIMEOUT=120
export LD_PRELOAD=/path_to_jemalloc/libjemalloc.so
export PYTORCH_NPU_ALLOC_CONF=expandable_segments:True
export VLLM_ASCEND_ENABLE_MLAPO=1
export TASK_QUEUE_ENABLE=1
export HCCL_OP_EXPANSION_MODE=AIV
export VLLM_TORCH_PROFILER_DIR=./vllm_profile
export VLLM_TORCH_PROFILER_WITH_STACK=1
export VLLM_USE_V1=1
export ASCEND_BUFFER_POOL=4:8
export LD_LIBRARY_PATH="/usr/local/Ascend/ascend-toolkit/latest/python/site-packages/mooncake${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
export HCCL_BUFFSIZE=256
exec vllm serve /path_to_weight/DeepSeek-V3.1_w8a8mix_mtp \
  --host 0.0.0.0 \
  --port "$2" \
  --data-parallel-size "$3" \
  --data-parallel-rank "$4" \
  --data-parallel-address "$5" \
  --data-parallel-rpc-port "$6" \
  --tensor-parallel-size "$7" \
  --enable-expert-parallel \
  --served-model-name ds_r1 \
  --gpu-memory-utilization 0.9 \
  --enforce-eager \
  --seed 1024 \
  --max-model-len 40000 \
  --trust-remote-code \
  --quantization ascend \
  --no-enable-prefix-caching \
  --speculative-config '{"num_speculative_tokens": 1, "method": "deepseek_mtp"}' \
  --max-num-batched-tokens 16384 \
  --max-num-seqs 8 \
  --additional-config '{"recompute_scheduler_enable": true, "enable_shared_expert_dp": true}' \
  --kv-transfer-config '{"kv_connector": "MooncakeLayerwiseConnector", "kv_role": "kv_producer", "kv_port": 36000, "engine_id": "1", "kv_connector_module_path": "vllm_ascend.distributed.mooncake_layerwise_connector", "kv_connector_extra_config": {"use_ascend_direct": true, "prefill": {"dp_size": 2, "tp_size": 8}, "decode": {"dp_size": 32, "tp_size": 1}}}'
END_OF_FILE

bash ./prefill-1/run_dp_template.sh 0,1,2,3,4,5,6,7 7100 2 0 192.0.0.2 12321 8 > prefill-1-dp0.log 2>&1 &
bash ./prefill-1/run_dp_template.sh 8,9,10,11,12,13,14,15 7101 2 1 192.0.0.2 12321 8 > prefill-1-dp1.log 2>&1 &
wait
}

check_192_0_0_2() {
for i in {0..15}; do hccn_tool -i $i -lldp -g | grep Ifname; done
for i in {0..15}; do hccn_tool -i $i -link -g; done
for i in {0..15}; do hccn_tool -i $i -net_health -g; done
for i in {0..15}; do hccn_tool -i $i -netdetect -g; done
for i in {0..15}; do hccn_tool -i $i -gateway -g; done
cat /etc/hccn.conf
for i in {0..15}; do hccn_tool -i $i -vnic -g; done
for i in {0..15}; do hccn_tool -i $i -tls -g; done | grep switch
for i in {0..7}; do for c in 0 1; do npu-smi info -t spod-info -i $i -c $c; done; done
}

start_192_0_0_3() {
trap 'kill $(jobs -p) 2> /dev/null' EXIT
trap 'exit 143' INT TERM

# instead of its lines below: cd decode-0 && python launch_online_dp.py --dp-size 32 --tp-size 1 --dp-size-local 16 --dp-rank-start 0 --dp-address 192.0.0.3 --dp-rpc-port 12321 --vllm-start-port 7100
mkdir -p ./decode-0
cat > ./decode-0/run_dp_template.sh <<'END_OF_FILE'
#!/bin/bash
# decode-0 on 192.0.0.3. Arguments: devices, port, data-parallel size, rank, address,
# RPC port, tensor-parallel size
cd "$(dirname "$0")/.." || exit 1
unset ftp_proxy
unset https_proxy
unset http_proxy
export HCCL_IF_IP=192.0.0.3
export GLOO_SOCKET_IFNAME=eth0
export TP_SOCKET_IFNAME=eth0
export HCCL_SOCKET_IFNAME=eth0
export OMP_PROC_BIND=false
export OMP_NUM_THREADS=10
export ASCEND_RT_VISIBLE_DEVICES="$1"
export VLLM_VERSION=0.11.0
export VLLM_RPC_TIMEOUT=3600000
export VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS=30000
export HCCL_EXEC_TIMEOUT=204
export HCCL_CONNECT_TIMEOUT=120
export LD_PRELOAD=/path_to_jemalloc/libjemalloc.so
export PYTORCH_NPU_ALLOC_CONF=expandable_segments:True
export VLLM_ASCEND_ENABLE_MLAPO=1
export TASK_QUEUE_ENABLE=1
export HCCL_OP_EXPANSION_MODE=AIV
export VLLM_TORCH_PROFILER_DIR=./vllm_profile
export VLLM_TORCH_PROFILER_WITH_STACK=1
export VLLM_USE_V1=1
export ASCEND_BUFFER_POOL=4:8
export LD_LIBRARY_PATH="/usr/local/Ascend/ascend-toolkit/latest/python/site-packages/mooncake${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
export HCCL_BUFFSIZE=600
exec vllm serve /path_to_weight/DeepSeek-V3.1_w8a8mix_mtp \
  --host 0.0.0.0 \
  --port "$2" \
  --data-parallel-size "$3" \
  --data-parallel-rank "$4" \
  --data-parallel-address "$5" \
  --data-parallel-rpc-port "$6" \
  --tensor-parallel-size "$7" \
  --enable-expert-parallel \
  --served-model-name ds_r1 \
  --gpu-memory-utilization 0.94 \
  --seed 1024 \
  --max-model-len 40000 \
  --trust-remote-code \
  --quantization ascend \
  --no-enable-prefix-caching \
  --speculative-config '{"num_speculative_tokens": 1, "method": "deepseek_mtp"}' \
  --max-num-batched-tokens 256 \
  --max-num-seqs 40 \
  --compilation-config '{"cudagraph_mode": "FULL_DECODE_ONLY"}' \
  --additional-config '{"recompute_scheduler_enable": true, "multistream_overlap_shared_expert": true, "lmhead_tensor_parallel_size": 16}' \
  --kv-transfer-config '{"kv_connector": "MooncakeLayerwiseConnector", "kv_role": "kv_consumer", "kv_port": 36000, "engine_id": "2", "kv_connector_module_path": "vllm_ascend.distributed.mooncake_layerwise_connector", "kv_connector_extra_config": {"use_ascend_direct": true, "prefill": {"dp_size": 2, "tp_size": 8}, "decode": {"dp_size": 32, "tp_size": 1}}}'
END_OF_FILE

bash ./decode-0/run_dp_template.sh 0 7100 32 0 192.0.0.3 12321 1 > decode-0-dp0.log 2>&1 &
bash ./decode-0/run_dp_template.sh 1 7101 32 1 192.0.0.3 12321 1 > decode-0-dp1.log 2>&1 &
bash ./decode-0/run_dp_template.sh 2 7102 32 2 192.0.0.3 12321 1 > decode-0-dp2.log 2>&1 &
bash ./decode-0/run_dp_template.sh 3 7103 32 3 192.0.0.3 12321 1 > decode-0-dp3.log 2>&1 &
bash ./decode-0/run_dp_template.sh 4 7104 32 4 192.0.0.3 12321 1 > decode-0-dp4.log 2>&1 &
bash ./decode-0/run_dp_template.sh 5 7105 32 5 192.0.0.3 12321 1 > decode-0-dp5.log 2>&1 &
bash ./decode-0/run_dp_template.sh 6 7106 32 6 192.0.0.3 12321 1 > decode-0-dp6.log 2>&1 &
bash ./decode-0/run_dp_template.sh 7 7107 32 7 192.0.0.3 12321 1 > decode-0-dp7.log 2>&1 &
bash ./decode-0/run_dp_template.sh 8 7108 32 8 192.0.0.3 12321 1 > decode-0-dp8.log 2>&1 &
bash ./decode-0/run_dp_template.sh 9 7109 32 9 192.0.0.3 12321 1 > decode-0-dp9.log 2>&1 &
bash ./decode-0/run_dp_template.sh 10 7110 32 10 192.0.0.3 12321 1 > decode-0-dp10.log 2>&1 &
bash ./decode-0/run_dp_template.sh 11 7111 32 11 192.0.0.3 12321 1 > decode-0-dp11.log 2>&1 &
bash ./decode-0/run_dp_template.sh 12 7112 32 12 192.0.0.3 12321 1 > decode-0-dp12.log 2>&1 &
bash ./decode-0/run_dp_template.sh 13 7113 32 13 192.0.0.3 12321 1 > decode-0-dp13.log 2>&1 &
bash ./decode-0/run_dp_template.sh 14 7114 32 14 192.0.0.3 12321 1 > decode-0-dp14.log 2>&1 &
bash ./decode-0/run_dp_template.sh 15 7115 32 15 192.0.0.3 12321 1 > decode-0-dp15.log 2>&1 &
wait
}

check_192_0_0_3() {
for i in {0..15}; do hccn_tool -i $i -lldp -g | grep Ifname; done
for i in {0..15}; do hccn_tool -i $i -link -g; done
for i in {0..15}; do hccn_tool -i $i -net_health -g; done
for i in {0..15}; do hccn_tool -i $i -netdetect -g; done
for i in {0..15}; do hccn_tool -i $i -gateway -g; done
cat /etc/hccn.conf
for i in {0..15}; do hccn_tool -i $i -vnic -g; done
for i in {0..15}; do hccn_tool -i $i -tls -g; done | grep switch
for i in {0..7}; do for c in 0 1; do npu-smi info -t spod-info -i $i -c $c; done; done
}

start_192_0_0_4() {
trap 'kill $(jobs -p) 2> /dev/null' EXIT
trap 'exit 143' INT TERM

# instead of its lines below: cd decode-0 && python launch_online_dp.py --dp-size 32 --tp-size 1 --dp-size-local 16 --dp-rank-start 16 --dp-address 192.0.0.3 --dp-rpc-port 12321 --vllm-start-port 7100
mkdir -p ./decode-0
cat > ./decode-0/run_dp_template.sh <<'END_OF_FILE'
#!/bin/bash
# decode-0 on 192.0.0.4. Arguments: devices, port, data-parallel size, rank, address,
# RPC port, tensor-parallel size
cd "$(dirname "$0")/.." || exit 1
unset ftp_proxy
unset https_proxy
unset http_proxy
export HCCL_IF_IP=192.0.0.4
export GLOO_SOCKET_IFNAME=eth0
export TP_SOCKET_IFNAME=eth0
export HCCL_SOCKET_IFNAME=eth0
export OMP_PROC_BIND=false
export OMP_NUM_THREADS=10
export ASCEND_RT_VISIBLE_DEVICES="$1"
export VLLM_VERSION=0.11.0
export VLLM_RPC_TIMEOUT=3600000
export VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS=30000
export HCCL_EXEC_TIMEOUT=204
export HCCL_CONNECT_TIMEOUT=120
export LD_PRELOAD=/path_to_jemalloc/libjemalloc.so
export PYTORCH_NPU_ALLOC_CONF=expandable_segments:True
export VLLM_ASCEND_ENABLE_MLAPO=1
export TASK_QUEUE_ENABLE=1
export HCCL_OP_EXPANSION_MODE=AIV
export VLLM_TORCH_PROFILER_DIR=./vllm_profile
export VLLM_TORCH_PROFILER_WITH_STACK=1
export VLLM_USE_V1=1
export ASCEND_BUFFER_POOL=4:8
export LD_LIBRARY_PATH="/usr/local/Ascend/ascend-toolkit/latest/python/site-packages/mooncake${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
export HCCL_BUFFSIZE=600
exec vllm serve /path_to_weight/DeepSeek-V3.1_w8a8mix_mtp \
  --host 0.0.0.0 \
  --port "$2" \
  --data-parallel-size "$3" \
  --data-parallel-rank "$4" \
  --data-parallel-address "$5" \
  --data-parallel-rpc-port "$6" \
  --tensor-parallel-size "$7" \
  --enable-expert-parallel \
  --served-model-name ds_r1 \
  --gpu-memory-utilization 0.94 \
  --seed 1024 \
  --max-model-len 40000 \
  --trust-remote-code \
  --quantization ascend \
  --no-enable-prefix-caching \
  --speculative-config '{"num_speculative_tokens": 1, "method": "deepseek_mtp"}' \
  --max-num-batched-tokens 256 \
  --max-num-seqs 40 \
  --compilation-config '{"cudagraph_mode": "FULL_DECODE_ONLY"}' \
  --additional-config '{"recompute_scheduler_enable": true, "multistream_overlap_shared_expert": true, "lmhead_tensor_parallel_size": 16}' \
  --kv-transfer-config '{"kv_connector": "MooncakeLayerwiseConnector", "kv_role": "kv_consumer", "kv_port": 36000, "engine_id": "2", "kv_connector_module_path": "vllm_ascend.distributed.mooncake_layerwise_connector", "kv_connector_extra_config": {"use_ascend_direct": true, "prefill": {"dp_size": 2, "tp_size": 8}, "decode": {"dp_size": 32, "tp_size": 1}}}'
END_OF_FILE

bash ./decode-0/run_dp_template.sh 0 7100 32 16 192.0.0.3 12321 1 > decode-0-dp16.log 2>&1 &
bash ./decode-0/run_dp_template.sh 1 7101 32 17 192.0.0.3 12321 1 > decode-0-dp17.log 2>&1 &
bash ./decode-0/run_dp_template.sh 2 7102 32 18 192.0.0.3 12321 1 > decode-0-dp18.log 2>&1 &
bash ./decode-0/run_dp_template.sh 3 7103 32 19 192.0.0.3 12321 1 > decode-0-dp19.log 2>&1 &
bash ./decode-0/run_dp_template.sh 4 7104 32 20 192.0.0.3 12321 1 > decode-0-dp20.log 2>&1 &
bash ./decode-0/run_dp_template.sh 5 7105 32 21 192.0.0.3 12321 1 > decode-0-dp21.log 2>&1 &
bash ./decode-0/run_dp_template.sh 6 7106 32 22 192.0.0.3 12321 1 > decode-0-dp22.log 2>&1 &
bash ./decode-0/run_dp_template.sh 7 7107 32 23 192.0.0.3 12321 1 > decode-0-dp23.log 2>&1 &
bash ./decode-0/run_dp_template.sh 8 7108 32 24 192.0.0.3 12321 1 > decode-0-dp24.log 2>&1 &
bash ./decode-0/run_dp_template.sh 9 7109 32 25 192.0.0.3 12321 1 > decode-0-dp25.log 2>&1 &
bash ./decode-0/run_dp_template.sh 10 7110 32 26 192.0.0.3 12321 1 > decode-0-dp26.log 2>&1 &
bash ./decode-0/run_dp_template.sh 11 7111 32 27 192.0.0.3 12321 1 > decode-0-dp27.log 2>&1 &
bash ./decode-0/run_dp_template.sh 12 7112 32 28 192.0.0.3 12321 1 > decode-0-dp28.log 2>&1 &
bash ./decode-0/run_dp_template.sh 13 7113 32 29 192.0.0.3 12321 1 > decode-0-dp29.log 2>&1 &
bash ./decode-0/run_dp_template.sh 14 7114 32 30 192.0.0.3 12321 1 > decode-0-dp30.log 2>&1 &
bash ./decode-0/run_dp_template.sh 15 7115 32 31 192.0.0.3 12321 1 > decode-0-dp31.log 2>&1 &
wait
}

check_192_0_0_4() {
for i in {0..15}; do hccn_tool -i $i -lldp -g | grep Ifname; done
for i in {0..15}; do hccn_tool -i $i -link -g; done
for i in {0..15}; do hccn_tool -i $i -net_health -g; done
for i in {0..15}; do hccn_tool -i $i -netdetect -g; done
for i in {0..15}; do hccn_tool -i $i -gateway -g; done
cat /etc/hccn.conf
for i in {0..15}; do hccn_tool -i $i -vnic -g; done
for i in {0..15}; do hccn_tool -i $i -tls -g; done | grep switch
for i in {0..7}; do for c in 0 1; do npu-smi info -t spod-info -i $i -c $c; done; done
}

request() {
curl http://192.0.0.1:1999/v1/completions -H 'Content-Type: application/json' -d '{"model": "ds_r1", "prompt": "Who are you?", "max_tokens": 100, "temperature": 0}'
}

bench() {
mkdir -p ./configs/models/vllm_api
cat > ./configs/models/vllm_api/vllm_api_stream_chat.py <<'END_OF_FILE'
from ais_bench.benchmark.models import VLLMCustomAPIChatStream

models = [
    dict(
        attr="service",
        type=VLLMCustomAPIChatStream,
        abbr="vllm-api-stream-chat",
        path="/root/.cache/ds_r1",
        model="ds_r1",
        host_ip="192.0.0.1",
        host_port=1999,
        request_rate=28,
        retry=2,
        max_out_len=10,
        batch_size=1536,
        trust_remote_code=True,
        generation_kwargs=dict(temperature=0, seed=1024, ignore_eos=False),
    )
]
END_OF_FILE
unset http_proxy
unset https_proxy
ais_bench \
  --models vllm_api_stream_chat \
  --datasets gsm8k_gen_0_shot_cot_str_perf \
  --debug \
  --mode perf
}

case "${1-}" in
  192.0.0.1) if [ "${2-}" = check ]; then check_192_0_0_1; else start_192_0_0_1; fi ;;
  192.0.0.2) if [ "${2-}" = check ]; then check_192_0_0_2; else start_192_0_0_2; fi ;;
  192.0.0.3) if [ "${2-}" = check ]; then check_192_0_0_3; else start_192_0_0_3; fi ;;
  192.0.0.4) if [ "${2-}" = check ]; then check_192_0_0_4; else start_192_0_0_4; fi ;;
  request) request ;;
  bench) bench ;;
  *) echo "usage: bash $0 ADDRESS [check] | request | bench; ADDRESS: 192.0.0.1 192.0.0.2 192.0.0.3 192.0.0.4" >&2; exit 2 ;;
esac
