"""What `merger measure` takes of a model as wide as Llama's of 8 B parameters: its peak of memory beside the plan's.

    python benchmarks/measuring.py --in FOLDER [--layers 2 4 32] [--blocks 512]

Weights are drawn once a layer's; with all 32 layers the model takes 16 GB of disk, and whole Gram matrices 33 GB more.
Model and statistics are removed. Not here: what the numbers are worth (benchmarks/methods).
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

from merger.models.checkpoint import TensorInfo
from merger.models.formats.safetensors import header

WIDTH, MIDDLE, KEYS, VOCABULARY = 4096, 14_336, 1024, 128_256
LAYER = {
    "self_attn.q_proj": (WIDTH, WIDTH), "self_attn.k_proj": (KEYS, WIDTH), "self_attn.v_proj": (KEYS, WIDTH),
    "self_attn.o_proj": (WIDTH, WIDTH), "mlp.gate_proj": (MIDDLE, WIDTH), "mlp.up_proj": (MIDDLE, WIDTH),
    "mlp.down_proj": (WIDTH, MIDDLE), "input_layernorm": (WIDTH,), "post_attention_layernorm": (WIDTH,),
}  # fmt: skip
RUN = """
import json, sys, time
from merger.run.options import Options
from merger.statistics.measure import measure_statistics
from merger.statistics.plan import plan_measurement
model, to, tokens, blocks = sys.argv[1:]
options, began = Options(to=to, threads=2), time.monotonic()
plan, store = plan_measurement(model, "gram", "random-tokens", int(tokens), 512, options, int(blocks) or None)
measure_statistics(plan, store, options)
peak = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps({"peak": peak, "planned": plan.peak_memory, "size": plan.size, "seconds": time.monotonic() - began}))
"""


def write_model(folder: Path, layers: int) -> None:
    """In bfloat16; the layers are alike."""
    shapes = {"model.embed_tokens": (VOCABULARY, WIDTH), "lm_head": (VOCABULARY, WIDTH), "model.norm": (WIDTH,)}
    shapes |= {f"model.layers.{layer}.{name}": shape for layer in range(layers) for name, shape in LAYER.items()}
    infos = [TensorInfo(f"{name}.weight", "BF16", shape, "", 0, 2 * math.prod(shape)) for name, shape in shapes.items()]
    drawn = np.random.default_rng(0).normal(0, 0.02, 1 << 24).astype(np.float32).view(np.uint32) >> 16
    folder.mkdir(parents=True)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(header(infos))
        for info in infos:
            file.write(np.resize(drawn.astype(np.uint16), info.entries).data)
    config = {"model_type": "llama", "hidden_size": WIDTH, "intermediate_size": MIDDLE, "num_hidden_layers": layers,
              "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": VOCABULARY,
              "max_position_embeddings": 8192, "architectures": ["LlamaForCausalLM"]}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


def main() -> int:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--in", dest="folder", type=Path, required=True)
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--blocks", type=int, nargs="+", default=[0, 512], help="0: whole Gram matrices")
    parser.add_argument(
        "--tokens", type=int, default=4096, help="in sequences of 512, of which 8 are summed up at once"
    )
    given = parser.parse_args()
    columns = "layers", "tokens", "`--blocks`", "all files", "memory, planned", "memory, measured", "seconds"
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for layers in given.layers:
        model, to = given.folder / "model", given.folder / "gram"
        write_model(model, layers)
        for blocks in given.blocks:
            line = [sys.executable, "-c", RUN, str(model), str(to), str(given.tokens), str(blocks)]
            found = json.loads(subprocess.run(line, check=True, capture_output=True, text=True).stdout)
            size, planned, peak = (f"{found[key] / 1e9:.1f} GB" for key in ("size", "planned", "peak"))
            told = layers, f"{given.tokens:,}", blocks or "whole", size, planned, peak, round(found["seconds"])
            print(f"| {' | '.join(map(str, told))} |", flush=True)
            shutil.rmtree(to)
        shutil.rmtree(model)
    return 0


if __name__ == "__main__":
    sys.exit(main())
