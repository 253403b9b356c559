"""docs/compatibility.md: what is served, how far SGLang's flags were tried beside it, and the table of what is refused.

python -m sglang_clusterkv.serving.compat_page > docs/compatibility.md
"""

from typing import NamedTuple

from sglang_clusterkv.serving.compat import (
    BACKEND,
    HOST_TIER_REFUSALS,
    RECALL_EXTEND_REFUSALS,
    REFUSALS,
    TRACE_REFUSALS,
)


class Beside(NamedTuple):
    """A flag or a route of SGLang's that needs nothing of ours, and how far that was tried."""

    what: str
    status: str


_RUN = "run on the CPU (tests/serving/test_flags.py)"
_ANSWERED = "started on the CPU, a request answered"
_READ = "read in SGLang's source, not run"

BESIDE: tuple[Beside, ...] = (
    Beside("sessions, `--enable-streaming-session`", _RUN),
    Beside("`/pause_generation`, in place and by retraction", _RUN),
    Beside("`/update_weights_from_disk`", _RUN),
    Beside("weights from tensors, over a process group or IPC", _READ),
    Beside("`--enable-priority-scheduling`", _RUN),
    Beside(
        "`--tokenizer-worker-num`",
        f"{_RUN}; on a busy CPU with SGLANG_UVICORN_WORKER_HEALTHCHECK_TIMEOUT above 10 (seconds), or a process is ended "
        "before it has started",
    ),
    Beside("`--tool-call-parser`, `--reasoning-parser`, `--enable-cache-report`", _RUN),
    Beside("`--enable-return-hidden-states`, `--enable-custom-logit-processor`", _RUN),
    Beside("`/v1/completions`, `/v1/chat/completions`, `/v1/messages`, `/v1/score`", _RUN),
    Beside("`--enable-session-radix-cache`, `--disable-radix-cache`, `--disable-overlap-schedule`", _ANSWERED),
    Beside("`--skip-tokenizer-init`, `--enable-tokenizer-batch-encode`, `--num-continuous-decode-steps`", _ANSWERED),
    Beside("`--dp-size 2`, `--enable-torch-compile`, `--cpu-offload-gb`", _ANSWERED),
    Beside(
        "`SGLANG_RUST_SERVER=1`",
        f"{_ANSWERED}; its `/server_info` has nothing of ours, `/metrics` has, and its responses have no traces",
    ),
    Beside(
        "`--enable-prefill-delayer`",
        f"{_ANSWERED}; on a CPU the overlap schedule stays on with it, and an idle server awake",
    ),
    Beside("`--grpc-mode`", "its scheduler started on the CPU; no client of it was tried"),
    Beside("LoRA", f"refused on a CPU; on a GPU {_READ}. SGLang loads no adapter that brings tokens of its own"),
    Beside(
        "`--enable-memory-saver`",
        f"refused on a CPU; on a GPU {_READ}: a released server keeps its clusters' memory, 13 to 15 % of the KV cache",
    ),
    Beside(
        "`/release_memory_occupation`, `/resume_memory_occupation`",
        f"{_RUN}, where they are answered and nothing is given away; on a GPU {_READ}",
    ),
    Beside(
        "`host_ratio` above 1 on a GPU, `--tp-size` beside it",
        f"{_READ}; its seams are tested with stand-ins (tests/serving/test_host_tier_cuda.py), its kernels in Triton's "
        "interpreter. CUDA graphs are off with it",
    ),
    Beside(
        "`--enable-hierarchical-cache`",
        f"refused on a CPU; on a GPU {_READ}; its seams are tested with stand-ins (tests/serving/test_hicache.py). What comes "
        "back from the host is clustered anew",
    ),
)


class Release(NamedTuple):
    """A release of SGLang, and what `make check SGLANG=...` said of it beside the newest one's packages."""

    version: str
    checked: str
    served: str


RELEASES: tuple[Release, ...] = (
    Release("0.5.23, the newest", "all as expected", "yes: all tests"),
    Release(
        "0.5.22",
        "all as expected; six symbols differ from 0.5.23's, and the table knows it",
        "yes: test_abuse.py, test_scheduler_server.py and test_server.py of tests/serving on the CPU, but for the test of "
        "retraction, in which nothing had to be retracted",
    ),
    Release("0.5.21", "26 symbols differ, those of KV slots' translation most of all", "no: the start is refused"),
)


SPECULATIVE = """`--speculative-algorithm` is refused. What SGLang 0.5.23 asks of a backend there (read in its source, EAGLE
and NGRAM), and what serving it would take:

- The step that verifies (`ForwardMode.TARGET_VERIFY`) is a call of `forward_extend` with `spec_info.draft_token_num` queries
  for each request, behind a prefix of `seq_lens` tokens. Where drafts are a tree, `spec_info.custom_mask` says which of them
  each one sees: drafts by drafts on a CPU, prefix and drafts on a GPU. On a CPU our prefill takes no mask, so it would get
  one; on a GPU SGLang's own backend takes it. That is a small step, but with EAGLE as with NGRAM every decode step is one that
  verifies, so all of them would be dense: all that clusters cost, and nothing recalled. So it alone is not offered.
- On a CPU SGLang builds and checks trees by its package `sgl_kernel`, compiled for CPUs. A platform from outside, such as this
  plugin's for machines without an accelerator, it refuses there by name (`reject_out_of_tree_path`), and the package of a GPU
  does not load. So where this plugin is tested, nothing that verifies can run, with any backend.
- To recall, the chain must take several queries of a request. Score, refine and attend hold one per query head; queries of a
  request would be further rows of the same tile, over one choice of clusters for all of them, and attention among the drafts
  themselves a small masked part of its own beside base and recalled tokens.
- A step's lists follow from lengths that the host knows. After a verification a request is 1 to `draft_token_num` tokens
  longer, and with the overlap schedule the host learns how many a step later: lists would need lengths from the device, or
  bounds.
- Drafts that were refused leave keys in slots that are written again, and accepted ones of a tree are moved to their places
  (`move_kv_cache`). Both are in the window as long as `draft_token_num` is at most `window_tokens`, and the window must be
  counted from accepted lengths.
- The draft model of EAGLE has a KV pool of its own at the same slots, which must get neither clusters nor our allocator's
  notes twice, and traces, counts and `reproducible` go by accepted tokens."""


def compatibility_markdown() -> str:
    """The text of docs/compatibility.md, from the table."""
    rows = "\n".join(f"| {row.name} | {row.sentence} |" for row in REFUSALS)
    host_tier = "\n".join(f"| {row.name} | {row.sentence} |" for row in HOST_TIER_REFUSALS)
    trace = "\n".join(f"| {row.name} | {row.sentence} |" for row in TRACE_REFUSALS)
    recall = "\n".join(f"| {row.name} | {row.sentence} |" for row in RECALL_EXTEND_REFUSALS)
    releases = "\n".join(f"| {row.version} | {row.checked} | {row.served} |" for row in RELEASES)
    beside = "\n".join(f"| {row.what} | {row.status} |" for row in BESIDE)
    return f"""# Compatibility

<!-- Written by `python -m sglang_clusterkv.serving.compat_page > docs/compatibility.md`: change compat.py and
compat_page.py, not this. -->

## SGLang

0.5.23 or 0.5.22, unmodified. `sglang-clusterkv check` compares every symbol that the plugin relies on with the installed
SGLang; the server does the same at start and ends with one sentence where something differs. Python 3.11 or newer, Linux.

`make check SGLANG=0.5.22` fetches another release's wheel, lays it before the packages of the environment and prints what
differs: so the cost of a release is known the day it comes.

<!-- no figures -->
| SGLang | `make check SGLANG=` | served |
|---|---|---|
{releases}

## Served

- Decoder-only models with multi-head or grouped-query attention over one KV pool (Llama, Qwen 2 and 3, Mistral, SmolLM, Phi,
  ...), key and value heads of one size that is a multiple of 16, KV in bf16, fp16, fp32 or fp8. Run here: SmolLM2-135M,
  Qwen2.5-Coder-1.5B and a random Llama, on the CPU, and tiny models of the architectures in [models.md](models.md). With
  learned attention sinks, too (gpt-oss; on a CPU it takes `--moe-runner-backend triton`).
- The radix cache, chunked prefill, overlap scheduling, retraction, aborts, streaming, grammars (regex, JSON), `n` > 1,
  tensor parallelism, data parallelism by whole replicas, `sgl.Engine`, SGLang frontend programs, `--enable-metrics`.
- Not beam search: SGLang answers it with 400 at any page size but 1.
- `--kv-cache-dtype fp8_e4m3` and `fp8_e5m2`, and fp8 where a checkpoint asks for it, with the factors of keys and values that
  it brings: half of bf16's bytes, clusters as large as ever ([quality.md](quality.md#a-kv-cache-in-8-bits)). On a GPU SGLang
  prefills from it as it does without clusterkv. A host tier keeps its bytes as they are.
- Page sizes from 2; 16 unless set. (Below 8 with a smaller `tokens_per_cluster`.)
- CPU: kernels of our own. CUDA: prefill by SGLang's own backends ([gpu.md](gpu.md#prefill)), clustering and decode by our
  Triton kernels, decode steps in CUDA graphs. CUDA has not been run yet.

## Flags and routes beside it

| what | where it stands |
|---|---|
{beside}

Not served, answered with 400: embeddings as input (`input_embeds`, `positional_embed_overrides`) and scores at chosen positions
(`token_indices_to_pool`, `/v1/score` with `score_extraction_token_id`).

## Served densely

Exact, counted in `dense_steps` or `dense_layer_calls` (`/server_info`, `/metrics`) with the reason:

| reason | which |
|---|---|
| `short` | requests shorter than `dense_below_tokens` |
| `budget` | the budget covers all clustered tokens |
| `dirty` | the row's pages have just been replaced by the radix tree's: a step or two |
| `window` | sinks, gaps and window are too many beside what is clustered |
| `fault` | our own code failed for the request: counted in `faults`, tried again later |
| `sliding` | layers with a sliding window (Gemma 3) |
| `logit_cap` | layers that cap their logits, where others do not |
| `shared_kv` | layers that read another layer's KV |
| `first_layers` | layers below `dense_layers` |
| `faster` | on a GPU, a batch that has so few clustered tokens that dense is likely faster (`dense_below`) |

## Speculative decoding

{SPECULATIVE}

## Values and keys of different size

Refused (`different value size`). Of the models that SGLang 0.5.23 has without MLA one has them, MiMo-V2: keys of 192
channels, values of 128 (read in its source, not run). Most of its layers slide, with kv heads of their own number, so SGLang
keeps their KV in a second pool, which is refused on its own account (`hybrid SWA`); one pool for all has no room for both
numbers. So a width of values would let no model in by itself. What it takes beside two pools:

- a second width in the index's geometry: value rows and their codec, and the mean value of a segment, which lies in quarters
  on the same pages as the mean key and the variance;
- in host rows, which are a key and a value side by side, and in the moves between tiers;
- in attend, estimate, merge and encode, their outputs and the workspace: of values `CHANNELS` in Triton and `channels` in
  numba are a constant of their own there. Score, select, refine, codes and k-means see keys alone;
- in the bytes per token that SGLang sizes its pool by.

## Refused

The start ends with `--attention-backend {BACKEND} cannot serve this:` and the sentence.

| what | sentence |
|---|---|
{rows}

With a `host_ratio` above 1 ([memory.md](memory.md)) also these, `dense_layers` above 0, and, found once the model is loaded,
layers that cap their logits and `host_kv_dtype` int8 over an fp8 KV cache. On a CPU HiCache and `--enable-memory-saver` are
refused in any case.

| what | sentence |
|---|---|
{host_tier}

With `"trace": true` ([explain.md](explain.md)) also these, and on a CPU a KV cache in float16, which is known once the model is
loaded.

| what | sentence |
|---|---|
{trace}

With `recall_extend_tokens` above 0 also this.

| what | sentence |
|---|---|
{recall}
"""


if __name__ == "__main__":
    print(compatibility_markdown(), end="")
