"""What a decode step of a server on a CPU consists of, by samples of its scheduler: a table and a picture.

    python -m benchmarks.step_profile [--tokens 1000] [--batch 1] [--budget 256] [--seconds 12]

Starts a server, lets it decode behind a prompt of `--tokens` tokens for `--seconds`, and has py-spy (which SGLang brings along)
look at the scheduler's main thread 200 times a second. A sample counts for the first of `PARTS` that it stands in. py-spy must
be allowed to look at other processes, as root is. Run it alone. Writes JSON, Markdown and SVG to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import psutil  # type: ignore[import-untyped]
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer

from benchmarks.latency import decode_ms, together
from benchmarks.results_file import command_of, write_results
from benchmarks.servers import Server, model_folder, serve
from examples.agent import FACTS, make_document
from sglang_clusterkv.tools.demo_model import default_out

RATE = 200  # samples a second
SCHEDULER = "sglang::scheduler"
MOST_NEW = 2048  # tokens of a request, for which the pool has room
FRAME = re.compile(r"(?P<function>.+) \((?:.*/)?(?P<file>[^/]+)\.py(?::\d+)?\)")


class Function(NamedTuple):
    """As Python finds it; a stack names it by its qualified name and its file."""

    module: str
    name: str

    @property
    def frame(self) -> tuple[str, str]:
        """(qualified name, file without its suffix), as `frames` has it."""
        return self.name, self.module.rpartition(".")[2]


# On the main thread's stacks alone.
STEP = Function("sglang.srt.managers.scheduler", "Scheduler.run_event_loop")
COMPILED = Function("sglang_clusterkv.kernels.threads_cpu", "run")
ATTENTION = Function("sglang_clusterkv.serving.backend", "ClusterKVAttnBackend.forward_decode")
LAYER = Function("sglang_clusterkv.serving.cpu_decoder", "Layer.forward")
UNTOUCHED = Function("sglang_clusterkv.serving.cpu_decoder", "Stack.begin")
HEAD = Function("sglang_clusterkv.serving.runtime", "before_forward")
LOGITS = Function("sglang.srt.layers.logits_processor", "LogitsProcessor._compute_lm_head")
SAMPLE = Function("sglang.srt.model_executor.model_runner", "ModelRunner.sample")
FORWARD = Function("sglang.srt.managers.tp_worker", "TpModelWorker.forward_batch_generation")


class Part(NamedTuple):
    """Samples that stand in all of these functions."""

    title: str
    functions: tuple[Function, ...]
    compiled: bool = False
    ours: bool = True

    @property
    def whose(self) -> str:
        """In words."""
        return "SGLang's" if not self.ours else "ours, compiled" if self.compiled else "ours, Python"


# In this order: a sample is of the first that it stands in.
PARTS = (
    Part("attention", (ATTENTION, COMPILED), compiled=True),
    Part("attention's calls", (ATTENTION,)),
    Part("layers: products, norms, rotation, gate", (LAYER, COMPILED), compiled=True),
    Part("logits", (LOGITS, COMPILED), compiled=True),
    Part("a look at every layer: is it as it was?", (UNTOUCHED,)),
    Part("layers' calls", (LAYER,)),
    Part("lists and clusters of the step", (HEAD,)),
    Part("sampling", (SAMPLE,), ours=False),
    Part("SGLang's forward", (FORWARD,), ours=False),
    Part("SGLang's scheduler", (STEP,), ours=False),
)
NAMED = list(dict.fromkeys(function for part in PARTS for function in part.functions))


def frames(stack: str) -> set[tuple[str, str]]:
    """(qualified name, file without its suffix) of each frame of a stack of py-spy's raw format."""
    return {(found["function"], found["file"]) for frame in stack.split(";") if (found := FRAME.fullmatch(frame))}


def count(raw: str) -> dict[str, int]:
    """Samples of each part.

    Args:
        raw: what `py-spy record -f raw` wrote: a line per stack, its frames from the outermost on, and its samples.
    """
    found: Counter[str] = Counter()
    for line in raw.splitlines():
        stack, _, samples = line.rpartition(" ")
        standing = frames(stack)
        if STEP.frame not in standing:
            continue
        (part, *_) = (part for part in PARTS if all(function.frame in standing for function in part.functions))
        found[part.title] += int(samples)
    return {part.title: found[part.title] for part in PARTS}


def look(pid: int, seconds: int) -> str:
    """Samples of a process's threads, as py-spy's raw format has them.

    Raises:
        SystemExit: py-spy is not there, or may not look.
    """
    py_spy = str(Path(sys.executable).with_name("py-spy"))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "stacks"
        command = [py_spy, "record", "-p", str(pid), "-r", str(RATE), "-d", str(seconds), "-f", "raw", "-o", str(file)]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except FileNotFoundError:
            raise SystemExit(f"{py_spy} is not there: `pip install py-spy`") from None
        except subprocess.CalledProcessError as error:
            raise SystemExit(f"py-spy could not look at the server, as root it may: {error.stderr.strip()}") from None
        return file.read_text(encoding="utf-8")


def scheduler_of(server: Server) -> int:
    """Process id of a server's scheduler."""
    found = [
        child.pid for child in psutil.Process(server.process.pid).children(recursive=True) if SCHEDULER in child.name()
    ]
    if len(found) != 1:
        raise SystemExit(f"the server has {len(found)} processes named {SCHEDULER}: {server.log} tells why")
    return found[0]


def measure(server: Server, prompts: list[list[int]], seconds: int, context: int) -> dict[str, Any]:
    """Milliseconds per token, and samples of each part while all prompts decode.

    Raises:
        SystemExit: there is no room for so many seconds in the context, or they ended before.
    """
    together(server, prompts, 8)  # prefilled; what the first request compiles is compiled
    step_ms = decode_ms(together(server, prompts, 48))
    # They decode from before the first sample to behind the last one, though py-spy slows them a little or the machine is busy.
    tokens = round(1000 * (seconds + 2) / step_ms) + 50
    room = min(context - len(prompts[0]) - 1, MOST_NEW)
    if tokens > room:
        least = f"--seconds {max(1, int((room - 50) * step_ms / 1000 - 2))}"
        raise SystemExit(f"{seconds} s are {tokens} tokens, and behind the prompt is room for {room}: {least}")
    decoding = threading.Thread(target=together, args=(server, prompts, tokens), daemon=True)
    decoding.start()
    server.stream(prompts[0], 1)  # answered once the others have had their first tokens
    samples = count(look(scheduler_of(server), seconds))
    still = decoding.is_alive()
    decoding.join()
    if not still:
        raise SystemExit("the requests ended before the samples: the machine is not steady, run it again")
    if not any(samples.values()):
        raise SystemExit(f"no sample is of {STEP.name}: SGLang's or py-spy's names are others")
    return {"step_ms": step_ms, "samples": samples, "seconds": seconds, "new_tokens": tokens}


def table(found: dict[str, Any]) -> str:
    """The parts as Markdown, the largest first."""
    total = sum(found["samples"].values())
    lines = ["| | of a step | ms | whose |", "|---|---|---|---|"]
    for part in sorted(PARTS, key=lambda part: -found["samples"][part.title]):
        share = found["samples"][part.title] / total
        lines.append(f"| {part.title} | {100 * share:.1f} % | {share * found['step_ms']:.2f} | {part.whose} |")
    return "\n".join(lines)


def picture(found: dict[str, Any], title: str) -> Any:
    """The parts as bars, the largest above."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    total = sum(found["samples"].values())
    colours = {"ours, compiled": "tab:blue", "ours, Python": "tab:orange", "SGLang's": "tab:gray"}
    figure, axes = pyplot.subplots(figsize=(9, 4), layout="constrained")
    for part in sorted(PARTS, key=lambda part: found["samples"][part.title]):
        share = 100 * found["samples"][part.title] / total
        (bar,) = axes.barh(part.title, share, color=colours[part.whose])
        axes.annotate(f" {share:.1f} %", (share, bar.get_y() + bar.get_height() / 2), va="center", fontsize=8)
    axes.legend(
        [pyplot.Rectangle((0, 0), 1, 1, color=colour) for colour in colours.values()], colours, loc="lower right"
    )
    axes.set_xlabel("% of the scheduler's main thread")
    figure.suptitle(title, fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def main() -> None:
    """Start a server, look at it, write what it was seen to do."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--budget", type=int, default=256)
    parser.add_argument("--candidates", type=int, default=1024)
    parser.add_argument("--seconds", type=int, default=12)
    parser.add_argument("--model", type=model_folder, default=None, help="a folder, default: the demo model")
    args = parser.parse_args()
    model = args.model or default_out()
    document = AutoTokenizer.from_pretrained(model)(make_document(args.tokens + 1500, FACTS)).input_ids[: args.tokens]
    prompts = [document[:-1] + [100 + i] for i in range(args.batch)]
    context = AutoConfig.from_pretrained(model).get_text_config().max_position_embeddings
    config = {"budget_tokens": args.budget, "candidate_tokens": args.candidates}
    log = Path(tempfile.mkdtemp()) / "server.log"
    print(f"starting a server; its log: {log}", flush=True)
    pool = ["--max-total-tokens", str(args.tokens + args.batch * MOST_NEW)]
    with tqdm(total=2, leave=False, unit="part") as bar, serve(model, log, *pool, config=config) as server:
        bar.update()
        found = measure(server, prompts, args.seconds, context)
        bar.update()
    body = table(found)
    print(f"{found['step_ms']:.1f} ms a step\n\n{body}")
    samples = sum(found["samples"].values())
    what = f"{model.name}, float32, {args.tokens:,} tokens, batch {args.batch}, budget {args.budget}"
    write_results(
        f"step-profile-{args.tokens}-b{args.batch}",
        title="What a decode step consists of",
        setting=f"{what}, candidates {args.candidates}; {found['step_ms']:.1f} ms a step, {samples} samples",
        command=command_of("benchmarks.step_profile"),
        body=body,
        data=found,
        figure=picture(found, f"A decode step of {what}"),
    )


if __name__ == "__main__":
    main()
