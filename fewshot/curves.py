"""Training curves: every column of a log.jsonl against the step."""

import json
from pathlib import Path


def plot(log: Path, out: Path) -> None:
    """Plot every number of a log.jsonl against the step, one panel each, to `out` (png), unless there are none."""
    from matplotlib.figure import Figure  # here, so that a recipe's --help does not wait for it

    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    names = sorted({name for line in lines for name in line} - {"step", "seconds"})
    if not names:
        return
    columns = min(4, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(3.2 * columns, 2.4 * rows), layout="constrained")  # without pyplot: needs no display
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis, name in zip(axes.flat, names, strict=False):
        points = [(line["step"], line[name]) for line in lines if name in line]
        axis.plot(*zip(*points, strict=True), linewidth=1, marker="." if len(points) < 30 else None)
        axis.set_title(name, fontsize=9)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(names) :]:
        axis.axis("off")
    figure.savefig(out, dpi=110)
