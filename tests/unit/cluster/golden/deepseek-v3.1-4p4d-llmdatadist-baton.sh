#!/bin/bash
# deepseek-v3.1-4p4d-llmdatadist-baton: 8 nodes, 73 processes; from configs/deployments/deepseek-v3.1-4p4d-llmdatadist-baton.toml
# Runs in the current directory, where files and logs go: bash SCRIPT ADDRESS [check | request | bench]
set -u
DEPLOYMENT=configs/deployments/deepseek-v3.1-4p4d-llmdatadist-baton.toml

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

mkdir -p ./prefill-0
cat > ./prefill-0/run_dp_template.sh <<'END_OF_FILE'
#!/bin/bash
# prefill-0 on 192.0.0.1. Arguments: devices, port, data-parallel size, rank, address,
# RPC port, tensor-parallel size, ports of its sidecars and of their metrics
cd "$(dirname "$0")/.." || exit 1
export HCCL_IF_IP=192.0.0.1
export GLOO_SOCKET_IFNAME=eth0
export TP_SOCKET_IFNAME=eth0
export HCCL_SOCKET_IFNAME=eth0
export OMP_PROC_BIND=false
export OMP_NUM_THREADS=10
export ASCEND_RT_VISIBLE_DEVICES="$1"
export VLLM_RPC_TIMEOUT=3600000
export VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS=30000
export HCCL_EXEC_TIMEOUT=204
export HCCL_CONNECT_TIMEOUT=120
export VLLM_USE_V1=1
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
  --max-model-len 17000 \
  --trust-remote-code \
  --quantization ascend \
  --no-enable-prefix-caching \
  --speculative-config '{"num_speculative_tokens": 1, "method": "deepseek_mtp"}' \
  --max-num-batched-tokens 16384 \
  --max-num-seqs 4 \
  --additional-config '{"ascend_scheduler_config": {"enabled": false}, "torchair_graph_config": {"enabled": false}}' \
  --kv-transfer-config '{"kv_connector": "BatonConnector", "kv_role": "kv_producer", "engine_id": "deepseek-v3.1-4p4d-llmdatadist-baton-prefill-0-dp'"$4"'", "kv_connector_module_path": "engine_adapter.vllm_connector", "kv_connector_extra_config": {"listen": "192.0.0.1:'"$8"'", "metrics_port": '"$9"'}}'
END_OF_FILE

bash ./prefill-0/run_dp_template.sh 0,1,2,3,4,5,6,7 7100 2 0 192.0.0.1 12321 8 36000 39000 > prefill-0-dp0.log 2>&1 &
bash ./prefill-0/run_dp_template.sh 8,9,10,11,12,13,14,15 7101 2 1 192.0.0.1 12321 8 36008 39008 > prefill-0-dp1.log 2>&1 &
ready prefill-0-dp0 http://192.0.0.1:7100/health
ready prefill-0-dp1 http://192.0.0.1:7101/health
ready prefill-1-dp0 http://192.0.0.2:7100/health
ready prefill-1-dp1 http://192.0.0.2:7101/health
ready prefill-2-dp0 http://192.0.0.3:7100/health
ready prefill-2-dp1 http://192.0.0.3:7101/health
ready prefill-3-dp0 http://192.0.0.4:7100/health
ready prefill-3-dp1 http://192.0.0.4:7101/health
ready decode-0-dp0 http://192.0.0.5:7100/health
ready decode-0-dp1 http://192.0.0.5:7101/health
ready decode-0-dp2 http://192.0.0.5:7102/health
ready decode-0-dp3 http://192.0.0.5:7103/health
ready decode-0-dp4 http://192.0.0.5:7104/health
ready decode-0-dp5 http://192.0.0.5:7105/health
ready decode-0-dp6 http://192.0.0.5:7106/health
ready decode-0-dp7 http://192.0.0.5:7107/health
ready decode-0-dp8 http://192.0.0.5:7108/health
ready decode-0-dp9 http://192.0.0.5:7109/health
ready decode-0-dp10 http://192.0.0.5:7110/health
ready decode-0-dp11 http://192.0.0.5:7111/health
ready decode-0-dp12 http://192.0.0.5:7112/health
ready decode-0-dp13 http://192.0.0.5:7113/health
ready decode-0-dp14 http://192.0.0.5:7114/health
ready decode-0-dp15 http://192.0.0.5:7115/health
ready decode-0-dp16 http://192.0.0.6:7100/health
ready decode-0-dp17 http://192.0.0.6:7101/health
ready decode-0-dp18 http://192.0.0.6:7102/health
ready decode-0-dp19 http://192.0.0.6:7103/health
ready decode-0-dp20 http://192.0.0.6:7104/health
ready decode-0-dp21 http://192.0.0.6:7105/health
ready decode-0-dp22 http://192.0.0.6:7106/health
ready decode-0-dp23 http://192.0.0.6:7107/health
ready decode-0-dp24 http://192.0.0.6:7108/health
ready decode-0-dp25 http://192.0.0.6:7109/health
ready decode-0-dp26 http://192.0.0.6:7110/health
ready decode-0-dp27 http://192.0.0.6:7111/health
ready decode-0-dp28 http://192.0.0.6:7112/health
ready decode-0-dp29 http://192.0.0.6:7113/health
ready decode-0-dp30 http://192.0.0.6:7114/health
ready decode-0-dp31 http://192.0.0.6:7115/health
ready decode-0-dp32 http://192.0.0.7:7100/health
ready decode-0-dp33 http://192.0.0.7:7101/health
ready decode-0-dp34 http://192.0.0.7:7102/health
ready decode-0-dp35 http://192.0.0.7:7103/health
ready decode-0-dp36 http://192.0.0.7:7104/health
ready decode-0-dp37 http://192.0.0.7:7105/health
ready decode-0-dp38 http://192.0.0.7:7106/health
ready decode-0-dp39 http://192.0.0.7:7107/health
ready decode-0-dp40 http://192.0.0.7:7108/health
ready decode-0-dp41 http://192.0.0.7:7109/health
ready decode-0-dp42 http://192.0.0.7:7110/health
ready decode-0-dp43 http://192.0.0.7:7111/health
ready decode-0-dp44 http://192.0.0.7:7112/health
ready decode-0-dp45 http://192.0.0.7:7113/health
ready decode-0-dp46 http://192.0.0.7:7114/health
ready decode-0-dp47 http://192.0.0.7:7115/health
ready decode-0-dp48 http://192.0.0.8:7100/health
ready decode-0-dp49 http://192.0.0.8:7101/health
ready decode-0-dp50 http://192.0.0.8:7102/health
ready decode-0-dp51 http://192.0.0.8:7103/health
ready decode-0-dp52 http://192.0.0.8:7104/health
ready decode-0-dp53 http://192.0.0.8:7105/health
ready decode-0-dp54 http://192.0.0.8:7106/health
ready decode-0-dp55 http://192.0.0.8:7107/health
ready decode-0-dp56 http://192.0.0.8:7108/health
ready decode-0-dp57 http://192.0.0.8:7109/health
ready decode-0-dp58 http://192.0.0.8:7110/health
ready decode-0-dp59 http://192.0.0.8:7111/health
ready decode-0-dp60 http://192.0.0.8:7112/health
ready decode-0-dp61 http://192.0.0.8:7113/health
ready decode-0-dp62 http://192.0.0.8:7114/health
ready decode-0-dp63 http://192.0.0.8:7115/health
# proxy: http://192.0.0.1:1999/health
(
exec pd-proxy \
  --host 192.0.0.1 \
  --port 1999 \
  --contract pull \
  --prefiller-hosts 192.0.0.1 192.0.0.1 192.0.0.2 192.0.0.2 192.0.0.3 192.0.0.3 192.0.0.4 192.0.0.4 \
  --prefiller-ports 7100 7101 7100 7101 7100 7101 7100 7101 \
  --decoder-hosts 192.0.0.5 192.0.0.5 192.0.0.5 192.0.0.5 192.0.0.5 192.0.0.5 192.0.0.5 192.0.0.5 192.0.0.5 192.0.0.5 192.0.0.5 192.0.0.5 192.0.0.5 192.0.0.5 192.0.0.5 192.0.0.5 192.0.0.6 192.0.0.6 192.0.0.6 192.0.0.6 192.0.0.6 192.0.0.6 192.0.0.6 192.0.0.6 192.0.0.6 192.0.0.6 192.0.0.6 192.0.0.6 192.0.0.6 192.0.0.6 192.0.0.6 192.0.0.6 192.0.0.7 192.0.0.7 192.0.0.7 192.0.0.7 192.0.0.7 192.0.0.7 192.0.0.7 192.0.0.7 192.0.0.7 192.0.0.7 192.0.0.7 192.0.0.7 192.0.0.7 192.0.0.7 192.0.0.7 192.0.0.7 192.0.0.8 192.0.0.8 192.0.0.8 192.0.0.8 192.0.0.8 192.0.0.8 192.0.0.8 192.0.0.8 192.0.0.8 192.0.0.8 192.0.0.8 192.0.0.8 192.0.0.8 192.0.0.8 192.0.0.8 192.0.0.8 \
  --decoder-ports 7100 7101 7102 7103 7104 7105 7106 7107 7108 7109 7110 7111 7112 7113 7114 7115 7100 7101 7102 7103 7104 7105 7106 7107 7108 7109 7110 7111 7112 7113 7114 7115 7100 7101 7102 7103 7104 7105 7106 7107 7108 7109 7110 7111 7112 7113 7114 7115 7100 7101 7102 7103 7104 7105 7106 7107 7108 7109 7110 7111 7112 7113 7114 7115
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

mkdir -p ./prefill-1
cat > ./prefill-1/run_dp_template.sh <<'END_OF_FILE'
#!/bin/bash
# prefill-1 on 192.0.0.2. Arguments: devices, port, data-parallel size, rank, address,
# RPC port, tensor-parallel size, ports of its sidecars and of their metrics
cd "$(dirname "$0")/.." || exit 1
export HCCL_IF_IP=192.0.0.2
export GLOO_SOCKET_IFNAME=eth0
export TP_SOCKET_IFNAME=eth0
export HCCL_SOCKET_IFNAME=eth0
export OMP_PROC_BIND=false
export OMP_NUM_THREADS=10
export ASCEND_RT_VISIBLE_DEVICES="$1"
export VLLM_RPC_TIMEOUT=3600000
export VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS=30000
export HCCL_EXEC_TIMEOUT=204
export HCCL_CONNECT_TIMEOUT=120
export VLLM_USE_V1=1
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
  --max-model-len 17000 \
  --trust-remote-code \
  --quantization ascend \
  --no-enable-prefix-caching \
  --speculative-config '{"num_speculative_tokens": 1, "method": "deepseek_mtp"}' \
  --max-num-batched-tokens 16384 \
  --max-num-seqs 4 \
  --additional-config '{"ascend_scheduler_config": {"enabled": false}, "torchair_graph_config": {"enabled": false}}' \
  --kv-transfer-config '{"kv_connector": "BatonConnector", "kv_role": "kv_producer", "engine_id": "deepseek-v3.1-4p4d-llmdatadist-baton-prefill-1-dp'"$4"'", "kv_connector_module_path": "engine_adapter.vllm_connector", "kv_connector_extra_config": {"listen": "192.0.0.2:'"$8"'", "metrics_port": '"$9"'}}'
END_OF_FILE

bash ./prefill-1/run_dp_template.sh 0,1,2,3,4,5,6,7 7100 2 0 192.0.0.2 12321 8 36000 39000 > prefill-1-dp0.log 2>&1 &
bash ./prefill-1/run_dp_template.sh 8,9,10,11,12,13,14,15 7101 2 1 192.0.0.2 12321 8 36008 39008 > prefill-1-dp1.log 2>&1 &
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

mkdir -p ./prefill-2
cat > ./prefill-2/run_dp_template.sh <<'END_OF_FILE'
#!/bin/bash
# prefill-2 on 192.0.0.3. Arguments: devices, port, data-parallel size, rank, address,
# RPC port, tensor-parallel size, ports of its sidecars and of their metrics
cd "$(dirname "$0")/.." || exit 1
export HCCL_IF_IP=192.0.0.3
export GLOO_SOCKET_IFNAME=eth0
export TP_SOCKET_IFNAME=eth0
export HCCL_SOCKET_IFNAME=eth0
export OMP_PROC_BIND=false
export OMP_NUM_THREADS=10
export ASCEND_RT_VISIBLE_DEVICES="$1"
export VLLM_RPC_TIMEOUT=3600000
export VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS=30000
export HCCL_EXEC_TIMEOUT=204
export HCCL_CONNECT_TIMEOUT=120
export VLLM_USE_V1=1
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
  --max-model-len 17000 \
  --trust-remote-code \
  --quantization ascend \
  --no-enable-prefix-caching \
  --speculative-config '{"num_speculative_tokens": 1, "method": "deepseek_mtp"}' \
  --max-num-batched-tokens 16384 \
  --max-num-seqs 4 \
  --additional-config '{"ascend_scheduler_config": {"enabled": false}, "torchair_graph_config": {"enabled": false}}' \
  --kv-transfer-config '{"kv_connector": "BatonConnector", "kv_role": "kv_producer", "engine_id": "deepseek-v3.1-4p4d-llmdatadist-baton-prefill-2-dp'"$4"'", "kv_connector_module_path": "engine_adapter.vllm_connector", "kv_connector_extra_config": {"listen": "192.0.0.3:'"$8"'", "metrics_port": '"$9"'}}'
END_OF_FILE

bash ./prefill-2/run_dp_template.sh 0,1,2,3,4,5,6,7 7100 2 0 192.0.0.3 12321 8 36000 39000 > prefill-2-dp0.log 2>&1 &
bash ./prefill-2/run_dp_template.sh 8,9,10,11,12,13,14,15 7101 2 1 192.0.0.3 12321 8 36008 39008 > prefill-2-dp1.log 2>&1 &
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

mkdir -p ./prefill-3
cat > ./prefill-3/run_dp_template.sh <<'END_OF_FILE'
#!/bin/bash
# prefill-3 on 192.0.0.4. Arguments: devices, port, data-parallel size, rank, address,
# RPC port, tensor-parallel size, ports of its sidecars and of their metrics
cd "$(dirname "$0")/.." || exit 1
export HCCL_IF_IP=192.0.0.4
export GLOO_SOCKET_IFNAME=eth0
export TP_SOCKET_IFNAME=eth0
export HCCL_SOCKET_IFNAME=eth0
export OMP_PROC_BIND=false
export OMP_NUM_THREADS=10
export ASCEND_RT_VISIBLE_DEVICES="$1"
export VLLM_RPC_TIMEOUT=3600000
export VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS=30000
export HCCL_EXEC_TIMEOUT=204
export HCCL_CONNECT_TIMEOUT=120
export VLLM_USE_V1=1
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
  --max-model-len 17000 \
  --trust-remote-code \
  --quantization ascend \
  --no-enable-prefix-caching \
  --speculative-config '{"num_speculative_tokens": 1, "method": "deepseek_mtp"}' \
  --max-num-batched-tokens 16384 \
  --max-num-seqs 4 \
  --additional-config '{"ascend_scheduler_config": {"enabled": false}, "torchair_graph_config": {"enabled": false}}' \
  --kv-transfer-config '{"kv_connector": "BatonConnector", "kv_role": "kv_producer", "engine_id": "deepseek-v3.1-4p4d-llmdatadist-baton-prefill-3-dp'"$4"'", "kv_connector_module_path": "engine_adapter.vllm_connector", "kv_connector_extra_config": {"listen": "192.0.0.4:'"$8"'", "metrics_port": '"$9"'}}'
END_OF_FILE

bash ./prefill-3/run_dp_template.sh 0,1,2,3,4,5,6,7 7100 2 0 192.0.0.4 12321 8 36000 39000 > prefill-3-dp0.log 2>&1 &
bash ./prefill-3/run_dp_template.sh 8,9,10,11,12,13,14,15 7101 2 1 192.0.0.4 12321 8 36008 39008 > prefill-3-dp1.log 2>&1 &
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

start_192_0_0_5() {
trap 'kill $(jobs -p) 2> /dev/null' EXIT
trap 'exit 143' INT TERM

mkdir -p ./decode-0
cat > ./decode-0/run_dp_template.sh <<'END_OF_FILE'
#!/bin/bash
# decode-0 on 192.0.0.5. Arguments: devices, port, data-parallel size, rank, address,
# RPC port, tensor-parallel size, ports of its sidecars and of their metrics
cd "$(dirname "$0")/.." || exit 1
export HCCL_IF_IP=192.0.0.5
export GLOO_SOCKET_IFNAME=eth0
export TP_SOCKET_IFNAME=eth0
export HCCL_SOCKET_IFNAME=eth0
export OMP_PROC_BIND=false
export OMP_NUM_THREADS=10
export ASCEND_RT_VISIBLE_DEVICES="$1"
export VLLM_RPC_TIMEOUT=3600000
export VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS=30000
export HCCL_EXEC_TIMEOUT=204
export HCCL_CONNECT_TIMEOUT=120
export VLLM_USE_V1=1
export HCCL_BUFFSIZE=1024
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
  --seed 1024 \
  --max-model-len 17000 \
  --trust-remote-code \
  --quantization ascend \
  --no-enable-prefix-caching \
  --speculative-config '{"num_speculative_tokens": 1, "method": "deepseek_mtp"}' \
  --max-num-batched-tokens 256 \
  --max-num-seqs 28 \
  --additional-config '{"ascend_scheduler_config": {"enabled": false}, "multistream_overlap_shared_expert": true, "torchair_graph_config": {"enabled": true, "enable_multistream_mla": true, "graph_batch_sizes": [28], "enable_super_kernel": true, "use_cached_graph": true}}' \
  --kv-transfer-config '{"kv_connector": "BatonConnector", "kv_role": "kv_consumer", "engine_id": "deepseek-v3.1-4p4d-llmdatadist-baton-decode-0-dp'"$4"'", "kv_connector_module_path": "engine_adapter.vllm_connector", "kv_connector_extra_config": {"listen": "192.0.0.5:'"$8"'", "metrics_port": '"$9"'}}'
END_OF_FILE

bash ./decode-0/run_dp_template.sh 0 7100 64 0 192.0.0.5 12321 1 36000 39000 > decode-0-dp0.log 2>&1 &
bash ./decode-0/run_dp_template.sh 1 7101 64 1 192.0.0.5 12321 1 36001 39001 > decode-0-dp1.log 2>&1 &
bash ./decode-0/run_dp_template.sh 2 7102 64 2 192.0.0.5 12321 1 36002 39002 > decode-0-dp2.log 2>&1 &
bash ./decode-0/run_dp_template.sh 3 7103 64 3 192.0.0.5 12321 1 36003 39003 > decode-0-dp3.log 2>&1 &
bash ./decode-0/run_dp_template.sh 4 7104 64 4 192.0.0.5 12321 1 36004 39004 > decode-0-dp4.log 2>&1 &
bash ./decode-0/run_dp_template.sh 5 7105 64 5 192.0.0.5 12321 1 36005 39005 > decode-0-dp5.log 2>&1 &
bash ./decode-0/run_dp_template.sh 6 7106 64 6 192.0.0.5 12321 1 36006 39006 > decode-0-dp6.log 2>&1 &
bash ./decode-0/run_dp_template.sh 7 7107 64 7 192.0.0.5 12321 1 36007 39007 > decode-0-dp7.log 2>&1 &
bash ./decode-0/run_dp_template.sh 8 7108 64 8 192.0.0.5 12321 1 36008 39008 > decode-0-dp8.log 2>&1 &
bash ./decode-0/run_dp_template.sh 9 7109 64 9 192.0.0.5 12321 1 36009 39009 > decode-0-dp9.log 2>&1 &
bash ./decode-0/run_dp_template.sh 10 7110 64 10 192.0.0.5 12321 1 36010 39010 > decode-0-dp10.log 2>&1 &
bash ./decode-0/run_dp_template.sh 11 7111 64 11 192.0.0.5 12321 1 36011 39011 > decode-0-dp11.log 2>&1 &
bash ./decode-0/run_dp_template.sh 12 7112 64 12 192.0.0.5 12321 1 36012 39012 > decode-0-dp12.log 2>&1 &
bash ./decode-0/run_dp_template.sh 13 7113 64 13 192.0.0.5 12321 1 36013 39013 > decode-0-dp13.log 2>&1 &
bash ./decode-0/run_dp_template.sh 14 7114 64 14 192.0.0.5 12321 1 36014 39014 > decode-0-dp14.log 2>&1 &
bash ./decode-0/run_dp_template.sh 15 7115 64 15 192.0.0.5 12321 1 36015 39015 > decode-0-dp15.log 2>&1 &
wait
}

check_192_0_0_5() {
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

start_192_0_0_6() {
trap 'kill $(jobs -p) 2> /dev/null' EXIT
trap 'exit 143' INT TERM

mkdir -p ./decode-0
cat > ./decode-0/run_dp_template.sh <<'END_OF_FILE'
#!/bin/bash
# decode-0 on 192.0.0.6. Arguments: devices, port, data-parallel size, rank, address,
# RPC port, tensor-parallel size, ports of its sidecars and of their metrics
cd "$(dirname "$0")/.." || exit 1
export HCCL_IF_IP=192.0.0.6
export GLOO_SOCKET_IFNAME=eth0
export TP_SOCKET_IFNAME=eth0
export HCCL_SOCKET_IFNAME=eth0
export OMP_PROC_BIND=false
export OMP_NUM_THREADS=10
export ASCEND_RT_VISIBLE_DEVICES="$1"
export VLLM_RPC_TIMEOUT=3600000
export VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS=30000
export HCCL_EXEC_TIMEOUT=204
export HCCL_CONNECT_TIMEOUT=120
export VLLM_USE_V1=1
export HCCL_BUFFSIZE=1024
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
  --seed 1024 \
  --max-model-len 17000 \
  --trust-remote-code \
  --quantization ascend \
  --no-enable-prefix-caching \
  --speculative-config '{"num_speculative_tokens": 1, "method": "deepseek_mtp"}' \
  --max-num-batched-tokens 256 \
  --max-num-seqs 28 \
  --additional-config '{"ascend_scheduler_config": {"enabled": false}, "multistream_overlap_shared_expert": true, "torchair_graph_config": {"enabled": true, "enable_multistream_mla": true, "graph_batch_sizes": [28], "enable_super_kernel": true, "use_cached_graph": true}}' \
  --kv-transfer-config '{"kv_connector": "BatonConnector", "kv_role": "kv_consumer", "engine_id": "deepseek-v3.1-4p4d-llmdatadist-baton-decode-0-dp'"$4"'", "kv_connector_module_path": "engine_adapter.vllm_connector", "kv_connector_extra_config": {"listen": "192.0.0.6:'"$8"'", "metrics_port": '"$9"'}}'
END_OF_FILE

bash ./decode-0/run_dp_template.sh 0 7100 64 16 192.0.0.5 12321 1 36000 39000 > decode-0-dp16.log 2>&1 &
bash ./decode-0/run_dp_template.sh 1 7101 64 17 192.0.0.5 12321 1 36001 39001 > decode-0-dp17.log 2>&1 &
bash ./decode-0/run_dp_template.sh 2 7102 64 18 192.0.0.5 12321 1 36002 39002 > decode-0-dp18.log 2>&1 &
bash ./decode-0/run_dp_template.sh 3 7103 64 19 192.0.0.5 12321 1 36003 39003 > decode-0-dp19.log 2>&1 &
bash ./decode-0/run_dp_template.sh 4 7104 64 20 192.0.0.5 12321 1 36004 39004 > decode-0-dp20.log 2>&1 &
bash ./decode-0/run_dp_template.sh 5 7105 64 21 192.0.0.5 12321 1 36005 39005 > decode-0-dp21.log 2>&1 &
bash ./decode-0/run_dp_template.sh 6 7106 64 22 192.0.0.5 12321 1 36006 39006 > decode-0-dp22.log 2>&1 &
bash ./decode-0/run_dp_template.sh 7 7107 64 23 192.0.0.5 12321 1 36007 39007 > decode-0-dp23.log 2>&1 &
bash ./decode-0/run_dp_template.sh 8 7108 64 24 192.0.0.5 12321 1 36008 39008 > decode-0-dp24.log 2>&1 &
bash ./decode-0/run_dp_template.sh 9 7109 64 25 192.0.0.5 12321 1 36009 39009 > decode-0-dp25.log 2>&1 &
bash ./decode-0/run_dp_template.sh 10 7110 64 26 192.0.0.5 12321 1 36010 39010 > decode-0-dp26.log 2>&1 &
bash ./decode-0/run_dp_template.sh 11 7111 64 27 192.0.0.5 12321 1 36011 39011 > decode-0-dp27.log 2>&1 &
bash ./decode-0/run_dp_template.sh 12 7112 64 28 192.0.0.5 12321 1 36012 39012 > decode-0-dp28.log 2>&1 &
bash ./decode-0/run_dp_template.sh 13 7113 64 29 192.0.0.5 12321 1 36013 39013 > decode-0-dp29.log 2>&1 &
bash ./decode-0/run_dp_template.sh 14 7114 64 30 192.0.0.5 12321 1 36014 39014 > decode-0-dp30.log 2>&1 &
bash ./decode-0/run_dp_template.sh 15 7115 64 31 192.0.0.5 12321 1 36015 39015 > decode-0-dp31.log 2>&1 &
wait
}

check_192_0_0_6() {
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

start_192_0_0_7() {
trap 'kill $(jobs -p) 2> /dev/null' EXIT
trap 'exit 143' INT TERM

mkdir -p ./decode-0
cat > ./decode-0/run_dp_template.sh <<'END_OF_FILE'
#!/bin/bash
# decode-0 on 192.0.0.7. Arguments: devices, port, data-parallel size, rank, address,
# RPC port, tensor-parallel size, ports of its sidecars and of their metrics
cd "$(dirname "$0")/.." || exit 1
export HCCL_IF_IP=192.0.0.7
export GLOO_SOCKET_IFNAME=eth0
export TP_SOCKET_IFNAME=eth0
export HCCL_SOCKET_IFNAME=eth0
export OMP_PROC_BIND=false
export OMP_NUM_THREADS=10
export ASCEND_RT_VISIBLE_DEVICES="$1"
export VLLM_RPC_TIMEOUT=3600000
export VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS=30000
export HCCL_EXEC_TIMEOUT=204
export HCCL_CONNECT_TIMEOUT=120
export VLLM_USE_V1=1
export HCCL_BUFFSIZE=1024
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
  --seed 1024 \
  --max-model-len 17000 \
  --trust-remote-code \
  --quantization ascend \
  --no-enable-prefix-caching \
  --speculative-config '{"num_speculative_tokens": 1, "method": "deepseek_mtp"}' \
  --max-num-batched-tokens 256 \
  --max-num-seqs 28 \
  --additional-config '{"ascend_scheduler_config": {"enabled": false}, "multistream_overlap_shared_expert": true, "torchair_graph_config": {"enabled": true, "enable_multistream_mla": true, "graph_batch_sizes": [28], "enable_super_kernel": true, "use_cached_graph": true}}' \
  --kv-transfer-config '{"kv_connector": "BatonConnector", "kv_role": "kv_consumer", "engine_id": "deepseek-v3.1-4p4d-llmdatadist-baton-decode-0-dp'"$4"'", "kv_connector_module_path": "engine_adapter.vllm_connector", "kv_connector_extra_config": {"listen": "192.0.0.7:'"$8"'", "metrics_port": '"$9"'}}'
END_OF_FILE

bash ./decode-0/run_dp_template.sh 0 7100 64 32 192.0.0.5 12321 1 36000 39000 > decode-0-dp32.log 2>&1 &
bash ./decode-0/run_dp_template.sh 1 7101 64 33 192.0.0.5 12321 1 36001 39001 > decode-0-dp33.log 2>&1 &
bash ./decode-0/run_dp_template.sh 2 7102 64 34 192.0.0.5 12321 1 36002 39002 > decode-0-dp34.log 2>&1 &
bash ./decode-0/run_dp_template.sh 3 7103 64 35 192.0.0.5 12321 1 36003 39003 > decode-0-dp35.log 2>&1 &
bash ./decode-0/run_dp_template.sh 4 7104 64 36 192.0.0.5 12321 1 36004 39004 > decode-0-dp36.log 2>&1 &
bash ./decode-0/run_dp_template.sh 5 7105 64 37 192.0.0.5 12321 1 36005 39005 > decode-0-dp37.log 2>&1 &
bash ./decode-0/run_dp_template.sh 6 7106 64 38 192.0.0.5 12321 1 36006 39006 > decode-0-dp38.log 2>&1 &
bash ./decode-0/run_dp_template.sh 7 7107 64 39 192.0.0.5 12321 1 36007 39007 > decode-0-dp39.log 2>&1 &
bash ./decode-0/run_dp_template.sh 8 7108 64 40 192.0.0.5 12321 1 36008 39008 > decode-0-dp40.log 2>&1 &
bash ./decode-0/run_dp_template.sh 9 7109 64 41 192.0.0.5 12321 1 36009 39009 > decode-0-dp41.log 2>&1 &
bash ./decode-0/run_dp_template.sh 10 7110 64 42 192.0.0.5 12321 1 36010 39010 > decode-0-dp42.log 2>&1 &
bash ./decode-0/run_dp_template.sh 11 7111 64 43 192.0.0.5 12321 1 36011 39011 > decode-0-dp43.log 2>&1 &
bash ./decode-0/run_dp_template.sh 12 7112 64 44 192.0.0.5 12321 1 36012 39012 > decode-0-dp44.log 2>&1 &
bash ./decode-0/run_dp_template.sh 13 7113 64 45 192.0.0.5 12321 1 36013 39013 > decode-0-dp45.log 2>&1 &
bash ./decode-0/run_dp_template.sh 14 7114 64 46 192.0.0.5 12321 1 36014 39014 > decode-0-dp46.log 2>&1 &
bash ./decode-0/run_dp_template.sh 15 7115 64 47 192.0.0.5 12321 1 36015 39015 > decode-0-dp47.log 2>&1 &
wait
}

check_192_0_0_7() {
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

start_192_0_0_8() {
trap 'kill $(jobs -p) 2> /dev/null' EXIT
trap 'exit 143' INT TERM

mkdir -p ./decode-0
cat > ./decode-0/run_dp_template.sh <<'END_OF_FILE'
#!/bin/bash
# decode-0 on 192.0.0.8. Arguments: devices, port, data-parallel size, rank, address,
# RPC port, tensor-parallel size, ports of its sidecars and of their metrics
cd "$(dirname "$0")/.." || exit 1
export HCCL_IF_IP=192.0.0.8
export GLOO_SOCKET_IFNAME=eth0
export TP_SOCKET_IFNAME=eth0
export HCCL_SOCKET_IFNAME=eth0
export OMP_PROC_BIND=false
export OMP_NUM_THREADS=10
export ASCEND_RT_VISIBLE_DEVICES="$1"
export VLLM_RPC_TIMEOUT=3600000
export VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS=30000
export HCCL_EXEC_TIMEOUT=204
export HCCL_CONNECT_TIMEOUT=120
export VLLM_USE_V1=1
export HCCL_BUFFSIZE=1024
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
  --seed 1024 \
  --max-model-len 17000 \
  --trust-remote-code \
  --quantization ascend \
  --no-enable-prefix-caching \
  --speculative-config '{"num_speculative_tokens": 1, "method": "deepseek_mtp"}' \
  --max-num-batched-tokens 256 \
  --max-num-seqs 28 \
  --additional-config '{"ascend_scheduler_config": {"enabled": false}, "multistream_overlap_shared_expert": true, "torchair_graph_config": {"enabled": true, "enable_multistream_mla": true, "graph_batch_sizes": [28], "enable_super_kernel": true, "use_cached_graph": true}}' \
  --kv-transfer-config '{"kv_connector": "BatonConnector", "kv_role": "kv_consumer", "engine_id": "deepseek-v3.1-4p4d-llmdatadist-baton-decode-0-dp'"$4"'", "kv_connector_module_path": "engine_adapter.vllm_connector", "kv_connector_extra_config": {"listen": "192.0.0.8:'"$8"'", "metrics_port": '"$9"'}}'
END_OF_FILE

bash ./decode-0/run_dp_template.sh 0 7100 64 48 192.0.0.5 12321 1 36000 39000 > decode-0-dp48.log 2>&1 &
bash ./decode-0/run_dp_template.sh 1 7101 64 49 192.0.0.5 12321 1 36001 39001 > decode-0-dp49.log 2>&1 &
bash ./decode-0/run_dp_template.sh 2 7102 64 50 192.0.0.5 12321 1 36002 39002 > decode-0-dp50.log 2>&1 &
bash ./decode-0/run_dp_template.sh 3 7103 64 51 192.0.0.5 12321 1 36003 39003 > decode-0-dp51.log 2>&1 &
bash ./decode-0/run_dp_template.sh 4 7104 64 52 192.0.0.5 12321 1 36004 39004 > decode-0-dp52.log 2>&1 &
bash ./decode-0/run_dp_template.sh 5 7105 64 53 192.0.0.5 12321 1 36005 39005 > decode-0-dp53.log 2>&1 &
bash ./decode-0/run_dp_template.sh 6 7106 64 54 192.0.0.5 12321 1 36006 39006 > decode-0-dp54.log 2>&1 &
bash ./decode-0/run_dp_template.sh 7 7107 64 55 192.0.0.5 12321 1 36007 39007 > decode-0-dp55.log 2>&1 &
bash ./decode-0/run_dp_template.sh 8 7108 64 56 192.0.0.5 12321 1 36008 39008 > decode-0-dp56.log 2>&1 &
bash ./decode-0/run_dp_template.sh 9 7109 64 57 192.0.0.5 12321 1 36009 39009 > decode-0-dp57.log 2>&1 &
bash ./decode-0/run_dp_template.sh 10 7110 64 58 192.0.0.5 12321 1 36010 39010 > decode-0-dp58.log 2>&1 &
bash ./decode-0/run_dp_template.sh 11 7111 64 59 192.0.0.5 12321 1 36011 39011 > decode-0-dp59.log 2>&1 &
bash ./decode-0/run_dp_template.sh 12 7112 64 60 192.0.0.5 12321 1 36012 39012 > decode-0-dp60.log 2>&1 &
bash ./decode-0/run_dp_template.sh 13 7113 64 61 192.0.0.5 12321 1 36013 39013 > decode-0-dp61.log 2>&1 &
bash ./decode-0/run_dp_template.sh 14 7114 64 62 192.0.0.5 12321 1 36014 39014 > decode-0-dp62.log 2>&1 &
bash ./decode-0/run_dp_template.sh 15 7115 64 63 192.0.0.5 12321 1 36015 39015 > decode-0-dp63.log 2>&1 &
wait
}

check_192_0_0_8() {
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

case "${1-}" in
  192.0.0.1) if [ "${2-}" = check ]; then check_192_0_0_1; else start_192_0_0_1; fi ;;
  192.0.0.2) if [ "${2-}" = check ]; then check_192_0_0_2; else start_192_0_0_2; fi ;;
  192.0.0.3) if [ "${2-}" = check ]; then check_192_0_0_3; else start_192_0_0_3; fi ;;
  192.0.0.4) if [ "${2-}" = check ]; then check_192_0_0_4; else start_192_0_0_4; fi ;;
  192.0.0.5) if [ "${2-}" = check ]; then check_192_0_0_5; else start_192_0_0_5; fi ;;
  192.0.0.6) if [ "${2-}" = check ]; then check_192_0_0_6; else start_192_0_0_6; fi ;;
  192.0.0.7) if [ "${2-}" = check ]; then check_192_0_0_7; else start_192_0_0_7; fi ;;
  192.0.0.8) if [ "${2-}" = check ]; then check_192_0_0_8; else start_192_0_0_8; fi ;;
  request) request ;;
  *) echo "usage: bash $0 ADDRESS [check] | request; ADDRESS: 192.0.0.1 192.0.0.2 192.0.0.3 192.0.0.4 192.0.0.5 192.0.0.6 192.0.0.7 192.0.0.8" >&2; exit 2 ;;
esac
