"""Decode folders that qjax exported without qjax, and load them with transformers.

    python tests/references/write_exports.py OUT        # in the project's environment
    python tests/references/check_exports.py OUT        # with torch, transformers, compressed-tensors

For each folder below OUT: every quantized weight, decoded by decode_exports.py (compressed-tensors'
own decompression, or code written from the formats' specifications), against the float32 weight that
qjax says it holds (relative to the largest, 1e-6: one rounding of float32), and the logits of
transformers on the decoded weights (1e-4). Then, for compressed-tensors, transformers loads the
folder itself with its own reading of the config; dequantized, each of its weights must be the
same at the precision of the scales' dtype. Exits with 1 after any difference.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

HERE = Path(__file__).parent
RUN_TIME_SCALES = (".input_scale", ".input_global_scale", ".k_scale", ".v_scale")


def decode(folder: Path) -> bool:
    """Weights and logits through decode_exports.py."""
    command = [sys.executable, HERE / "decode_exports.py", folder, "--complete", "--logits"]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    lines = (done.stderr + done.stdout).strip().splitlines()
    bad = [line for line in lines if "MISMATCH" in line or "Error" in line]
    print(f"{folder.name}: {lines[-1]}", *bad, sep="\n    " if bad else "")
    return done.returncode == 0


def load(folder: Path) -> bool:
    """Weights of the model that transformers makes of the folder."""
    model, info = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        quantization_config=CompressedTensorsConfig(dequantize=True),
        output_loading_info=True,
    )
    problems = {name: sorted(keys) for name, keys in info.items() if keys}
    unexpected = [k for k in problems.pop("unexpected_keys", ()) if not k.endswith(RUN_TIME_SCALES)]
    reference = np.load(folder / "reference.npz")
    modules = dict(model.named_modules())
    worst = 0.0
    for key in reference:
        if key.startswith("deq::"):
            got = modules[key.removeprefix("deq::")].weight.detach().float().numpy()
            want = reference[key]
            worst = max(worst, float(np.abs(got - want).max() / np.abs(want).max()))
    good = not problems and not unexpected and worst <= 2**-8
    print(f"{folder.name}: transformers loads it, weights within {worst:.2g}", problems, unexpected)
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", help="folders whose name contains this")
    args = parser.parse_args()
    torch.set_num_threads(1)
    folders = sorted(p.parent for p in args.out.glob("*/reference.npz"))
    folders = [f for f in folders if not args.only or args.only in f.name]
    failed = []
    for folder in folders:
        good = decode(folder)
        config = json.loads((folder / "config.json").read_text())["quantization_config"]
        # transformers 5.23 dequantizes every dense layer by the first config group's format.
        if config["quant_method"] == "compressed-tensors" and len(config["config_groups"]) == 1:
            good &= load(folder)
        if not good:
            failed.append(folder.name)
    print(f"{len(folders)} folders, {len(failed)} failed {failed or ''}")
    return 1 if failed or not folders else 0


if __name__ == "__main__":
    sys.exit(main())
