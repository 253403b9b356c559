"""Pictures of results, as matplotlib figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.policies import POLICIES

EARLIER = "as it was"


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def quality_against_bytes(lines: list[dict[str, Any]], earlier: Sequence[dict[str, Any]] = ()) -> Any:
    """KL to dense over KiB read per step, of natural text and of the needles' digits; a curve per policy and change.

    Args:
        lines: of `model_level.summary`; equal-bytes rows join their policy's curve.
        earlier: likewise, of another result; its ours has a curve of its own.
    """
    from matplotlib.ticker import LogLocator, NullLocator

    figure, panels = _pyplot().subplots(1, 2, figsize=(12, 5.5), sharex=True, layout="constrained")
    curves: dict[tuple[str, str], list[tuple[float, float, float]]] = {}
    before = [line | {"change": line["change"] or EARLIER} if line["policy"] == "ours" else line for line in earlier]
    for line in [*lines, *before]:
        curve = curves.setdefault((line["policy"], line["change"]), [])
        curve.append((line["bytes"] / 1024, max(line["kl"], 1e-6), max(line["answer_kl"], 1e-6)))
    for name, change in sorted(curves, key=lambda curve: list(POLICIES).index(curve[0])):
        policy = POLICIES[name]
        style = {
            "linestyle": "-" if policy.is_method else ":",
            "marker": "o",
            "linewidth": 2.5 if name == "ours" and not change else 1.2,
            "label": f"{policy.title}, {change}" if change else policy.title,
        }
        read, *errors = zip(*sorted(curves[name, change]), strict=True)
        for axes, error in zip(panels, errors, strict=True):
            axes.plot(read, error, **style)
    for axes, title in zip(panels, ("natural text", "needles: digits of the answers"), strict=True):
        axes.set(
            xscale="log", yscale="log", title=title, xlabel="KiB read per decode step, layer and kv head (bf16 KV)"
        )
        axes.xaxis.set_major_locator(LogLocator(base=2, subs=(1.0, 1.5)))
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.grid(which="both", alpha=0.3)
    panels[0].set_ylabel("mean KL(dense || policy) per token, nats")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    return figure


def frontier(lines: list[dict[str, Any]], shares: list[float], beside: list[dict[str, Any]]) -> Any:
    """KL to dense over KiB read per step, and over the index's share of the KV cache; a point per line, by its policy's name.

    Args:
        lines: of `model_level.summary`, of ours in other formats.
        shares: of each line, of the index at head_dim 128.
        beside: lines of another result, drawn as curves over KiB.
    """
    from matplotlib.ticker import LogLocator, NullFormatter

    figure, panels = _pyplot().subplots(1, 2, figsize=(13, 6.5), sharey=True, layout="constrained")
    curves: dict[str, list[tuple[float, float]]] = {}
    for line in beside:
        curves.setdefault(line["policy"], []).append((line["bytes"] / 1024, line["kl"]))
    for name, points in curves.items():
        panels[0].plot(*zip(*sorted(points), strict=True), linestyle=":", marker="o", label=POLICIES[name].title)
    for line, share in zip(lines, shares, strict=True):
        label = line["policy"].removeprefix("ours-") + (f" {line['change']}" if line["change"] else "")
        for axes, x in zip(panels, (line["bytes"] / 1024, 100 * share), strict=True):
            axes.plot(x, line["kl"], "s" if line["policy"] == "ours" else "x", color="black")
            axes.annotate(label, (x, line["kl"]), fontsize=6, xytext=(3, 2), textcoords="offset points")
    panels[0].set(xscale="log", yscale="log", xlabel="KiB read per decode step, layer and kv head (bf16 KV)")
    panels[0].xaxis.set_major_locator(LogLocator(base=2, subs=(1.0, 1.5)))
    panels[0].xaxis.set_major_formatter("{x:.0f}")
    panels[0].xaxis.set_minor_formatter(NullFormatter())
    panels[0].set_ylabel("mean KL(dense || policy) per token, nats")
    panels[1].set_xlabel("index, % of the KV cache at head_dim 128")
    least, most = (f(line["kl"] for line in lines) for f in (min, max))
    panels[0].set_ylim(least / 2, most * 2)  # what lies far above is cut off
    for axes in panels:
        axes.grid(which="both", alpha=0.3)
    if curves:
        panels[0].legend(fontsize=8)
    return figure


def kl_over_answer(kl: np.ndarray, afresh: dict[str, float], tail: int, width: int = 100) -> Any:
    """Running mean of the KL over an answer's tokens, and the mean of its tail, so and over fresh prefixes.

    Args:
        kl: float [tokens].
        afresh: mean KL of the tail over each fresh prefix.
        tail: tokens of the tail.
        width: tokens of the running mean.
    """
    figure, axes = _pyplot().subplots(figsize=(8, 4), layout="constrained")
    running = np.convolve(kl, np.ones(width) / width, mode="valid")
    axes.plot(np.arange(len(running)) + width, running, label=f"decoded in one go, mean of {width} tokens")
    lines = {"the tail, decoded in one go": float(np.mean(kl[-tail:]))} | afresh
    for (label, value), color in zip(lines.items(), ("tab:red", "black", "tab:gray"), strict=True):
        axes.hlines(value, len(kl) - tail, len(kl), colors=color, label=label)
    axes.set(xlabel="token of the answer", ylabel="KL(dense || ours), nats", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def error_maps(found: dict[str, dict[str, Any]]) -> Any:
    """Output error of every layer and head, one map per arm, one scale."""
    figure, axes = _pyplot().subplots(1, len(found), figsize=(1.2 * len(found) + 1.5, 5), sharey=True, squeeze=False)
    most = max(np.max(arm["error"]) for arm in found.values())
    for place, (name, arm) in zip(axes[0], found.items(), strict=True):
        image = place.imshow(arm["error"], aspect="auto", vmin=0, vmax=most, cmap="viridis")
        place.set_title(name.replace(", ", "\n"), fontsize=7)
        place.set_xlabel("head", fontsize=7)
    axes[0][0].set_ylabel("layer")
    figure.colorbar(image, ax=axes, label="|output - dense| / |dense|")
    return figure
