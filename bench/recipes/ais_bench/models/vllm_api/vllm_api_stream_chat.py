"""ais_bench's stream-chat client as seed 003 sets it; ais_bench.sh says where, which model and which tokenizer.

mmengine fills in what stands in double braces from the environment, in a file that imports nothing: so the type is
named by its path.
"""

models = [
    {
        "attr": "service",
        "type": "ais_bench.benchmark.models.VLLMCustomAPIChatStream",
        "abbr": "vllm-api-stream-chat",
        "path": "{{$RECIPE_TOKENIZER:}}",
        "model": "{{$RECIPE_MODEL:}}",
        "request_rate": 28,
        "retry": 2,
        "host_ip": "{{$RECIPE_HOST:}}",
        "host_port": int("{{$RECIPE_PORT:}}"),
        "max_out_len": 10,
        "batch_size": 1536,
        "trust_remote_code": True,
        "generation_kwargs": {"temperature": 0, "seed": 1024, "ignore_eos": False},
    }
]
