"""Rewrite a checkpoint in another format, its codes and scales unchanged.

    uv run scripts/convert.py --model IN --format gptq --out DIR
    uv run scripts/convert.py --model IN --format bf16 --out DIR     # dequantized

IN is any folder, hub id or GGUF file that qjax loads. A format that cannot hold what IN holds is
refused, with the module and what to do instead; scripts/quantize.py quantizes anew.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from qjax import checkpoint


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder, hub id or GGUF file")
    parser.add_argument(
        "--format", required=True, choices=list(checkpoint.EXPORT_FORMATS), help="to write"
    )
    parser.add_argument("--out", required=True, type=Path, help="folder to write")
    parser.add_argument("--dtype", default="bfloat16", help="of what is plain (default: bfloat16)")
    parser.add_argument("--max-shard-gb", type=float, default=5.0, help="bound of one file")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing folder")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    try:
        loaded = checkpoint.load(args.model, dtype=args.dtype, progress=not args.quiet)
        folder = checkpoint.export(
            loaded.model,
            args.out,
            format=args.format,
            source=loaded,
            max_shard_bytes=int(args.max_shard_gb * 1e9),
            overwrite=args.overwrite,
            progress=not args.quiet,
        )
    except ValueError as error:
        print(f"convert: {error}", file=sys.stderr)
        return 2
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    print(f"{args.model} -> {folder}: {args.format}, {size / 1e6:.1f} MB of weights")
    return 0


if __name__ == "__main__":
    sys.exit(main())
