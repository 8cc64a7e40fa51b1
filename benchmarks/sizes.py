"""Time and peak memory of folding and proving large models with random weights; prints JSON.

    python benchmarks/sizes.py > benchmarks/sizes.json
    python benchmarks/sizes.py --only gpt2-medium

For GPT-2 medium, large and XL: `unnorm remove DIR --tokens 0 --data TEXT`, then `unnorm verify`, each in a process of
its own. TEXT is 8 kB, so that loading, folding and proving dominate the time, not evaluation. The checkpoints are in
bfloat16 and sharded. Memory that only mirrors files (`file`) is released under pressure; the rest (`anonymous`) has to
fit. The size of the weights is given in float32, in which models are loaded.
"""

import argparse
import inspect
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from unnorm.models.load import model_path

SIZES = {"gpt2-medium": (24, 1024, 16), "gpt2-large": (36, 1280, 20), "gpt2-xl": (48, 1600, 25)}
GB = 1e9


def make(name: str, directory: Path) -> int:
    """Write a checkpoint of random weights with the bundled model's tokenizer; returns its number of parameters."""
    layers, width, heads = SIZES[name]
    tokenizer = AutoTokenizer.from_pretrained(model_path("demo"))
    config = GPT2Config(n_layer=layers, n_embd=width, n_head=heads, bos_token_id=0, eos_token_id=0)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = GPT2LMHeadModel(config)
    torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():  # As in a trained model, no gain is one and no bias is zero.
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(directory, max_shard_size="1GB")
    tokenizer.save_pretrained(directory)
    return model.num_parameters()


def measured(*arguments: object) -> dict[str, Any]:
    """Run the command line; return its seconds, the process's peak memory in GB, and its JSON output."""
    peaks = {"RssAnon": 0, "RssFile": 0, "VmHWM": 0}
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "unnorm", *map(str, arguments)], stdout=subprocess.PIPE)
    status = Path(f"/proc/{process.pid}/status")

    def watch() -> None:
        while process.poll() is None:
            try:
                lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
            except OSError:
                return
            for key in peaks:
                peaks[key] = max(peaks[key], int(lines.get(key, "0 kB").split()[0]) * 1024)
            time.sleep(0.05)

    watcher = threading.Thread(target=watch)
    watcher.start()
    out, _ = process.communicate()
    seconds = time.perf_counter() - started
    watcher.join()
    usage = {"seconds": seconds, "anonymous_gb": peaks["RssAnon"] / GB, "file_gb": peaks["RssFile"] / GB}
    return {"exit_code": process.returncode, **usage, "peak_rss_gb": peaks["VmHWM"] / GB, "json": json.loads(out)}


def measure(name: str, above: Path) -> dict[str, Any]:
    """Results for one size: make its checkpoint, remove its norms, verify the twin, and delete both."""
    original, run = above / name, above / f"{name}-run"
    parameters = make(name, original)
    text = above / "text.txt"
    text.write_text(inspect.getsource(argparse)[:8000])
    removed = measured("remove", original, "--tokens", 0, "--context", 64, "--data", text, "--out", run, "--json")
    result = removed.pop("json")
    verified = measured("verify", run, "--json")
    checks = verified.pop("json")["checks"]
    row = {
        "model": name,
        "parameters": parameters,
        "weights_gb": 4 * parameters / GB,
        "shards": len(list(original.glob("*.safetensors"))),
        "twin_shards": len(list((run / "model").glob("*.safetensors"))),
        "remove": removed,
        "verify": verified,
        "fold_max_abs_error": result["fold_max_abs_error"],
        "checks_failed": [check["name"] for check in checks if not check["passed"]],
    }
    shutil.rmtree(original)
    shutil.rmtree(run)
    return row


def main() -> None:
    """Measure the sizes that the command line asks for, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(SIZES), default=list(SIZES))
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as above:
        rows = []
        for name in args.only:
            rows.append(measure(name, Path(above)))
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    print(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
