"""A training run's folder: options, curve as JSON lines and as a picture, checkpoints."""

import json
import math
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from qjax import checkpoint


class RunFolder:
    """What a run keeps, so that one that was killed at any moment goes on as if it had not been.

    run.json has the options that decide the curve; curve.jsonl a line per step and evaluation;
    checkpoints/step_N all that step N + 1 needs.
    """

    def __init__(self, path: Path, options: Mapping[str, Any], *, resume: bool):
        """Looks at the folder, which may hold an earlier run with the same options.

        Raises:
            ValueError: If there is a run already that should not be resumed, or with other options.
        """
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.curve = path / "curve.jsonl"
        self.rows: list[dict[str, Any]] = []
        file = path / "run.json"
        if file.exists() and not resume:
            raise ValueError(f"{path} holds a run; go on with --resume or choose another --out")
        self._earlier = json.loads(file.read_text()) if file.exists() else None
        self._options = json.loads(json.dumps(options))
        if self._earlier is not None:
            changed = [k for k, value in self._options.items() if self._earlier.get(k) != value]
            if changed:
                was = ", ".join(
                    f"{k} {self._earlier.get(k)!r} (now {self._options[k]!r})" for k in changed
                )
                raise ValueError(f"{path} was started with other options: {was}; resume with those")

    def expect(self, name: str, value: str) -> None:
        """Keeps what else decides the curve.

        Raises:
            ValueError: If it was another value when the run was started.
        """
        if self._earlier is not None and self._earlier.get(name) != value:
            raise ValueError(
                f"{self.path} was started with other {name}; resume with the same data"
            )
        self._options[name] = value

    def begin(self, step: int) -> None:
        """Makes the folder if need be, and drops what an earlier run left behind this step.

        That is the end of its curve, and a checkpoint that was not finished.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        _replace(self.path / "run.json", json.dumps(self._options, indent=2) + "\n")
        self._rewind(step)

    def last_step(self) -> int:
        """The step of the newest checkpoint, 0 if there is none."""
        return max(self._saved(), default=0)

    def _saved(self) -> list[int]:
        if not self.checkpoints.is_dir():
            return []
        names = (re.fullmatch(r"step_(\d+)", entry.name) for entry in self.checkpoints.iterdir())
        return sorted(int(name[1]) for name in names if name)

    def _rewind(self, step: int) -> None:
        rows = []
        for line in self.curve.read_text("utf-8").splitlines() if self.curve.exists() else []:
            try:
                row = json.loads(line)
            except json.JSONDecodeError:  # cut off by the kill
                continue
            if row["step"] <= step and step > 0:
                rows.append(row)
        _replace(self.curve, "".join(json.dumps(row) + "\n" for row in rows))
        self.rows = rows
        if self.checkpoints.is_dir():
            for entry in self.checkpoints.iterdir():
                if not re.fullmatch(r"step_\d+", entry.name):
                    shutil.rmtree(entry)

    def add(self, step: int, **values: Any) -> None:
        """A line of the curve."""
        row = {"step": step, **values}
        self.rows.append(row)
        with self.curve.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def save(self, step: int, model: nnx.Module, extra: Any, *, keep: int) -> None:
        """A checkpoint, which appears when it is whole; older ones than the newest `keep` go."""
        checkpoint.save(self.checkpoints / f"step_{step:08d}", model, extra)
        for old in self._saved()[:-keep]:
            shutil.rmtree(self.checkpoints / f"step_{old:08d}")

    def restore(self, step: int, model: nnx.Module, extra: Any) -> Any:
        """Fills the model from a checkpoint; returns what was saved beside it."""
        folder = self.checkpoints / f"step_{step:08d}"
        return checkpoint.restore(folder, model=model, extra=extra).extra

    def plot(self, title: str) -> Path:
        """The curve as curve.png."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import StrMethodFormatter

        figure = Figure(figsize=(7, 6), layout="constrained")
        FigureCanvasAgg(figure)
        top, bottom = figure.subplots(2, 1, sharex=True)
        steps = [r for r in self.rows if "loss" in r]
        evaluations = [r for r in self.rows if "eval_perplexity" in r]
        x = [r["step"] for r in steps]
        y = np.array([r["loss"] for r in steps])
        width = max(1, len(y) // 50)
        faint = 0.35 if width > 1 else 1.0
        top.plot(x, y, color="tab:blue", linewidth=0.8, alpha=faint, label="each step")
        if width > 1:
            smooth = np.convolve(y, np.ones(width) / width, "valid")
            top.plot(x[width - 1 :], smooth, color="tab:blue", label=f"mean of {width} steps")
        top.set(ylabel="training loss (nats per token)", title=title)
        top.legend()
        bottom.plot(
            [r["step"] for r in evaluations],
            [r["eval_perplexity"] for r in evaluations],
            color="tab:orange",
            marker="o",
            markersize=3,
            label="converted",
        )
        for row in evaluations:
            if "unquantized_perplexity" in row:
                level = row["unquantized_perplexity"]
                bottom.axhline(level, color="gray", linestyle="--", label="unquantized, untrained")
        bottom.set(xlabel="step", ylabel="held-out perplexity", yscale="log")
        bottom.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        bottom.yaxis.set_minor_formatter(StrMethodFormatter("{x:g}"))
        if evaluations:
            bottom.legend()
        partial = self.path / "curve.partial.png"
        figure.savefig(partial, dpi=120)
        file = self.path / "curve.png"
        partial.rename(file)
        return file


def perplexity(nll: float) -> float:
    """exp, without an error where a model that was trained to pieces has a huge one."""
    return math.exp(min(nll, 700.0))


def as_numbers(metrics: Mapping[str, jax.Array]) -> dict[str, float]:
    """Metrics on the host, once their step is done."""
    return {name: float(value) for name, value in metrics.items()}


def _replace(file: Path, text: str) -> None:
    partial = file.with_name(f"{file.name}.partial")
    with partial.open("w", encoding="utf-8") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    partial.rename(file)
