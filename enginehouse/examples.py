"""The examples below each command's help. Tests parse every one of them, and run those that need no cluster of their own.

A line that begins with "#" says what comes next. What stands behind "#" in a command's line is a comment of the shell.
"""

EXAMPLES: dict[str, tuple[str, ...]] = {
    "": (
        "enginehouse up demo=examples/demo-model        # build, load and serve; Ctrl-C ends it",
        'enginehouse generate "In the beginning"        # in another terminal',
        "enginehouse bench --concurrency 1,4,8",
    ),
    "up": (
        "enginehouse up demo=examples/demo-model",
        "enginehouse up demo other --executors 2        # names that are in the store",
        'enginehouse up demo -- enginehouse generate "In the beginning" --model demo',
        "enginehouse up demo --certs ./certs            # mutual TLS; made by `enginehouse certs ./certs`",
        "enginehouse up demo --json                     # a line of JSON with all addresses when ready",
    ),
    "unload": ("enginehouse unload 3a5856b94c2d", "enginehouse unload 3a58 --executor 10.0.0.5:8411 --drain 1h"),
    "load": (
        "enginehouse load demo",
        "enginehouse load demo --executor 10.0.0.5:8411 --executor 10.0.0.6:8411",
    ),
    "build": (
        "enginehouse build examples/demo-model --name demo",
        "enginehouse build Qwen/Qwen2.5-0.5B-Instruct --dtype bfloat16",
        "enginehouse build examples/demo-model --builder 127.0.0.1:8401 --upload",
        "enginehouse build bench/models/llama-3.1-8b --dummy-weights     # measure a model without its weights",
        "enginehouse build examples/demo-model --name demo-awq --quant W4A16_AWQ --calib-samples 16",
    ),
    "quantize": (
        "enginehouse quantize examples/demo-model --output demo.int8 --quant W8A16",
        "enginehouse quantize examples/demo-model --output demo.awq --quant W4A16_AWQ --group-size 64 --report",
        "enginehouse quantize Qwen/Qwen2.5-0.5B --output qwen.fp8 --quant FP8 --kv-cache-quant FP8 --calib-data texts/",
    ),
    "builds": (
        "enginehouse builds ls",
        "enginehouse builds logs 20260101T120000-abcdef",
    ),
    "builds ls": ("enginehouse builds ls --builder 127.0.0.1:8401",),
    "builds logs": (
        "enginehouse builds logs 20260101T120000-abcdef",
        "enginehouse builds logs 20260101T120000-abcdef --json     # an object a line",
    ),
    "builds cancel": ("enginehouse builds cancel 20260101T120000-abcdef",),
    "plan": (
        "enginehouse plan examples/demo-model",
        "enginehouse plan examples/demo-model --gpu H100 --input-len 1024 --output-len 256",
        "enginehouse plan meta-llama/Llama-3.1-8B --gpu L40S --dtype fp8 --batch 1 --batch 32",
        "enginehouse plan demo --memory 64 --bandwidth 90 --flops 2       # an engine, and a device of your own",
        "enginehouse plan --gpu list",
    ),
    "generate": (
        'enginehouse generate "In the beginning" --max-tokens 64 --stats',
        'enginehouse generate "In the beginning" --temperature 0 --json',
        "enginehouse generate - --model demo < prompt.txt",
        'enginehouse generate "12 345 678" --token-ids',
        'enginehouse generate "The year was" --regex " 1[0-9]{3}"',
    ),
    "chat": ('enginehouse chat --model demo --system "Answer in one sentence."',),
    "bench": (
        "enginehouse bench --requests 16 --concurrency 4 --input-len 32 --output-len 16",
        "enginehouse bench --requests 8 --concurrency 1,2,4 --input-len 16-48 --output-len 8-16 --seed 1 --out sweep.json",
        "enginehouse bench --requests 8 --rate 4 --input-len 32 --output-len 8 --json",
        "enginehouse bench --requests 8 --concurrency 1,2,4 --input-len 16 --output-len 8 --plot sweep.svg",
    ),
    "models": (
        "enginehouse models                             # what the gateway serves",
        "enginehouse models --store ./store             # what a store has names for",
        "enginehouse models set demo 4f1c09aa2b7d",
    ),
    "models set": ("enginehouse models set demo 4f1c09aa2b7d", "enginehouse models set stable demo"),
    "models history": ("enginehouse models history demo",),
    "models rollback": ("enginehouse models rollback demo", "enginehouse models rollback demo --to 2"),
    "models rename": ("enginehouse models rename demo old-demo",),
    "models rm": ("enginehouse models rm old-demo",),
    "engines": (
        "enginehouse engines ls",
        "enginehouse engines inspect demo",
        "enginehouse engines verify demo --store ./store",
    ),
    "engines ls": ("enginehouse engines ls --json",),
    "engines inspect": ("enginehouse engines inspect demo",),
    "engines verify": (
        "enginehouse engines verify demo",
        "enginehouse engines verify demo --trusted-keys trusted.pem",
    ),
    "engines rm": ("enginehouse engines rm 4f1c09aa2b7d",),
    "engines sign": ("enginehouse engines sign demo --key signing.pem",),
    "engines gc": ("enginehouse engines gc --dry-run", "enginehouse engines gc --grace 7d"),
    "keys generate": ("enginehouse keys generate signing.pem",),
    "keys add": (
        "enginehouse keys add api-keys.json acme --out acme.key",
        "enginehouse keys add api-keys.json acme --model 'llama-*' --max-streams 8 --tokens-per-minute 60000",
        "enginehouse keys add api-keys.json guest --expires 7d",
    ),
    "keys ls": ("enginehouse keys ls api-keys.json",),
    "keys revoke": ("enginehouse keys revoke api-keys.json 4f0c9b21",),
    "certs": (
        "enginehouse certs ./certs",
        "enginehouse certs ./certs --host gateway.example.com --host 10.0.0.7",
    ),
    "keys show": ("enginehouse keys show signing.pem > trusted.pem",),
    "completion": (
        "# bash: once for this shell, or for all by the second line",
        'eval "$(enginehouse completion bash)"',
        "enginehouse completion bash > ~/.local/share/bash-completion/completions/enginehouse",
        "# zsh: a folder of your $fpath, before compinit",
        'enginehouse completion zsh > "${fpath[1]}/_enginehouse"',
        "# fish",
        "enginehouse completion fish > ~/.config/fish/completions/enginehouse.fish",
    ),
}
