#!/bin/bash
# qwen2.5-vl-1p1d: 1 nodes, 3 processes; from configs/deployments/qwen2.5-vl-1p1d.toml
# Runs in the current directory, where files and logs go: bash SCRIPT ADDRESS [check | request | bench]
set -u
DEPLOYMENT=configs/deployments/qwen2.5-vl-1p1d.toml

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

# prefill-0: http://192.0.0.1:13700/health
(
export HCCL_IF_IP=192.0.0.1
export GLOO_SOCKET_IFNAME=eth0
export TP_SOCKET_IFNAME=eth0
export HCCL_SOCKET_IFNAME=eth0
export OMP_PROC_BIND=false
export OMP_NUM_THREADS=10
export ASCEND_RT_VISIBLE_DEVICES=0
exec vllm serve /model/Qwen2.5-VL-7B-Instruct \
  --host 0.0.0.0 \
  --port 13700 \
  --tensor-parallel-size 1 \
  --served-model-name qwen25vl \
  --gpu-memory-utilization 0.9 \
  --no-enable-prefix-caching \
  --seed 1024 \
  --max-model-len 40000 \
  --max-num-batched-tokens 40000 \
  --trust-remote-code \
  --kv-transfer-config '{"kv_connector": "MooncakeConnectorV1", "kv_role": "kv_producer", "kv_port": 30000, "engine_id": "0", "kv_connector_extra_config": {"prefill": {"dp_size": 1, "tp_size": 1}, "decode": {"dp_size": 1, "tp_size": 1}}}'
) > prefill-0.log 2>&1 &

# decode-0: http://192.0.0.1:13701/health
(
export HCCL_IF_IP=192.0.0.1
export GLOO_SOCKET_IFNAME=eth0
export TP_SOCKET_IFNAME=eth0
export HCCL_SOCKET_IFNAME=eth0
export OMP_PROC_BIND=false
export OMP_NUM_THREADS=10
export ASCEND_RT_VISIBLE_DEVICES=1
exec vllm serve /model/Qwen2.5-VL-7B-Instruct \
  --host 0.0.0.0 \
  --port 13701 \
  --tensor-parallel-size 1 \
  --served-model-name qwen25vl \
  --gpu-memory-utilization 0.9 \
  --no-enable-prefix-caching \
  --seed 1024 \
  --max-model-len 40000 \
  --max-num-batched-tokens 40000 \
  --trust-remote-code \
  --kv-transfer-config '{"kv_connector": "MooncakeConnectorV1", "kv_role": "kv_consumer", "kv_port": 30100, "engine_id": "1", "kv_connector_extra_config": {"prefill": {"dp_size": 1, "tp_size": 1}, "decode": {"dp_size": 1, "tp_size": 1}}}'
) > decode-0.log 2>&1 &

ready prefill-0 http://192.0.0.1:13700/health
ready decode-0 http://192.0.0.1:13701/health
# proxy: http://192.0.0.1:8080/health
(
exec pd-proxy \
  --host 192.0.0.1 \
  --port 8080 \
  --contract pull \
  --prefiller-hosts 192.0.0.1 \
  --prefiller-ports 13700 \
  --decoder-hosts 192.0.0.1 \
  --decoder-ports 13701
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

request() {
curl http://192.0.0.1:8080/v1/chat/completions -H 'Content-Type: application/json' -d '{"model": "qwen25vl", "max_completion_tokens": 100, "temperature": 0, "messages": [{"role": "system", "content": "You are a helpful assistant."}, {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://modelscope.oss-cn-beijing.aliyuncs.com/resource/qwen.png"}}, {"type": "text", "text": "What is the text in the illustration?"}]}]}'
}

case "${1-}" in
  192.0.0.1) if [ "${2-}" = check ]; then check_192_0_0_1; else start_192_0_0_1; fi ;;
  request) request ;;
  *) echo "usage: bash $0 ADDRESS [check] | request; ADDRESS: 192.0.0.1" >&2; exit 2 ;;
esac
