"""Generate text with a model: a Hugging Face folder or hub id as vLLM or SGLang would load it, or a GGUF file.

    uv run scripts/generate.py "What is the capital of France?"
    uv run scripts/generate.py --model DIR --recipe W4A16 --temperature 0.7 "Tell me a story." "And a joke."
    uv run scripts/generate.py --prompts-file prompts.txt --json > completions.jsonl

Prompts are put as a user's message through the model's chat template, unless --no-chat. The text goes to
stdout, progress and statistics to stderr. Compiled functions are kept in $XDG_CACHE_HOME/qjax/xla (default
~/.cache/qjax/xla), so that a second start is quick; JAX_COMPILATION_CACHE_DIR chooses another folder.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import _arguments

from qjax import checkpoint
from qjax.generation import Completion, Generator, Increment, Prompt
from qjax.sampling import SamplingParams
from qjax.tokenizer import Tokenizer


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="texts to answer")
    parser.add_argument(
        "--prompts-file",
        metavar="FILE",
        help="a prompt per line; in a .jsonl file each line is a JSON string, a list of chat messages or a "
        "list of token ids; - is stdin",
    )
    parser.add_argument(
        "--no-chat", action="store_true", help="continue the prompts without a chat template"
    )
    parser.add_argument(
        "--stream",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="print text as it is generated, or each completion at once (default: --stream)",
    )
    parser.add_argument("--json", action="store_true", help="print a JSON line per completion")
    parser.add_argument(
        "--dry-run", action="store_true", help="print how each weight would be stored, and stop"
    )
    _arguments.add_model_arguments(parser)
    limits = parser.add_argument_group("limits")
    limits.add_argument("--max-new-tokens", type=int, default=256, help="(default: 256)")
    limits.add_argument(
        "--max-len", type=int, help="prompt and completion together (default: the model's context)"
    )
    limits.add_argument("--batch-size", type=int, default=8, help="prompts at a time (default: 8)")
    _add_sampling_arguments(parser)
    args = parser.parse_args(argv)
    if not args.dry_run and not args.prompts and args.prompts_file is None:
        parser.error("give a prompt, or --prompts-file")
    return args


def _add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling")
    group.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default: 0)")
    group.add_argument(
        "--top-k", type=int, default=0, help="draw among the k likeliest (default: off)"
    )
    group.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        help="draw among the likeliest of this mass (default: 1)",
    )
    group.add_argument(
        "--min-p",
        type=float,
        default=0.0,
        help="drop what is this much less likely than the likeliest",
    )
    group.add_argument("--repetition-penalty", type=float, default=1.0, help="(default: 1, off)")
    group.add_argument("--seed", type=int, default=0, help="(default: 0)")
    group.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="ends a completion; repeatable"
    )
    group.add_argument(
        "--stop-token-id", action="append", default=[], type=int, metavar="ID", help="likewise"
    )
    group.add_argument("--ignore-eos", action="store_true", help="go on past the end token")


def sampling_params(args: argparse.Namespace) -> SamplingParams:
    names = {field.name for field in dataclasses.fields(SamplingParams)}
    given = {name: value for name, value in vars(args).items() if name in names}
    return SamplingParams(**given, stop_token_ids=args.stop_token_id)


def read_prompts(args: argparse.Namespace) -> list[Prompt]:
    """The prompts of the command line, then those of the file."""
    prompts: list[Prompt] = list(args.prompts)
    if args.prompts_file is not None:
        file = args.prompts_file
        try:
            text = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--prompts-file {file}: can't be read: {error}") from error
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip():
                prompts.append(
                    _json_prompt(line, f"{file}:{number}") if file.endswith(".jsonl") else line
                )
    if not prompts:
        raise ValueError(f"--prompts-file {args.prompts_file}: no prompt in it; write one per line")
    if not args.no_chat:
        prompts = [[{"role": "user", "content": p}] if isinstance(p, str) else p for p in prompts]
    return prompts


def _json_prompt(line: str, where: str) -> Prompt:
    try:
        prompt = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not valid JSON: {error}") from error
    if not isinstance(prompt, str | list):
        raise ValueError(f"{where}: must be a string or a list; found {type(prompt).__name__}")
    return prompt


def print_table(args: argparse.Namespace) -> None:
    """What the loader would do with each weight."""
    rows = checkpoint.resolve(
        _arguments.model_path(args),
        recipe=args.recipe,
        dtype=_arguments.dtype(args),
        progress=not args.quiet,
    )
    cells = [("module", "shape", "weights", "activations", "bytes")]
    cells += [
        (r.path, "x".join(map(str, r.shape)), r.weights, r.activations, f"{r.nbytes}") for r in rows
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        )
    print(f"{len(rows)} weights, {sum(r.nbytes for r in rows) / 1e6:.1f} MB")


def show(
    increments: Iterable[Increment], prompts: Sequence[Prompt], args: argparse.Namespace
) -> list[Completion]:
    """Prints completions in the prompts' order; while one is shown, those after it wait."""
    texts = [""] * len(prompts)
    done: list[Completion | None] = [None] * len(prompts)
    shown = printed = 0  # the completion on its turn, and how much of its text is out
    for step in increments:
        texts[step.index] += step.text
        done[step.index] = step.completion
        while shown < len(prompts):
            completion = done[shown]
            if args.json:
                if completion is not None:
                    print(
                        json.dumps(dataclasses.asdict(completion), ensure_ascii=False), flush=True
                    )
            elif args.stream or completion is not None:
                if printed == 0 and len(prompts) > 1 and (texts[shown] or completion):
                    print(f"[{shown + 1}] ", end="")
                print(texts[shown][printed:], end="" if completion is None else "\n", flush=True)
                printed = len(texts[shown])
            if completion is None:
                break
            shown, printed = shown + 1, 0
    return [completion for completion in done if completion is not None]


def run(args: argparse.Namespace) -> None:
    if args.dry_run:
        print_table(args)
        return
    prompts, params = read_prompts(args), sampling_params(args)
    loaded = _arguments.load(args)
    generator = Generator(
        loaded.model,
        Tokenizer.load(loaded.tokenizer),
        max_len=args.max_len,
        batch_size=args.batch_size,
        kv_cache=loaded.kv_cache,
    )
    completions = show(generator.stream(prompts, params), prompts, args)
    if not args.quiet and not args.json:
        tokens = sum(c.new_tokens for c in completions)
        first = min(c.ttft_s for c in completions)
        rate = sum(c.tokens_per_s for c in completions) / len(completions)
        print(
            f"{tokens} tokens, the first after {first:.2f} s, then {rate:.1f} per second"
            + (f" and prompt, {len(completions)} prompts" if len(completions) > 1 else ""),
            file=sys.stderr,
        )


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    return _arguments.run_main("generate", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
