"""A program in SGLang's frontend language: one document, three branches that ask about it, and a choice between numbers.

After a `sync`, `fork` sends the document once, before the branches. Its pages are in the radix cache then, and are clustered
once for all that read them; the server's counts show it. Start a server with `make serve`, then:

    python examples/frontend.py --base-url http://127.0.0.1:30000 [--tokens 6000] [--small]
"""

from __future__ import annotations

import argparse
import sys
import time
import urllib.error
from typing import Any

import sglang as sgl

from sglang_clusterkv.tools.haystack import FACTS, make_document

ASKED, CHOSEN = FACTS[:3], FACTS[3]
CHOICES = [fact.answer for fact in FACTS if fact.answer.isdigit()]


@sgl.function
def study(s: Any, document: str, max_tokens: int) -> None:
    """A question per branch, then one choice; all of them read the document."""
    s += sgl.user_begin() + document + "\n\n"
    # fork sends what it sees of the text, and the line above may not be carried out yet: then it sends nothing, and every
    # branch prefills and clusters the document for itself.
    s.sync()
    branches = checked(s).fork(len(ASKED))
    checked(s)
    for branch, fact in zip(branches, ASKED, strict=True):
        branch += fact.question + sgl.user_end()
        branch += sgl.assistant(sgl.gen("answer", max_tokens=max_tokens, temperature=0))
    s["answers"] = [checked(branch)["answer"] for branch in branches]
    s += CHOSEN.question + sgl.user_end()
    s += sgl.assistant_begin() + CHOSEN.sentence.split(CHOSEN.answer)[0] + sgl.select("number", choices=CHOICES)


def checked(state: Any) -> Any:
    """A state of the program; RuntimeError if a request of it failed, where SGLang would wait for an answer."""
    if (error := state.error()) is not None:
        raise RuntimeError(str(error))
    return state


def read_counts(backend: Any) -> dict[str, Any]:
    """The plugin's counts of a server without data parallelism, once two readings agree: the last step's come late."""
    counts: dict[str, Any] | None = None
    while True:
        newer = backend.get_server_info()["internal_states"][0].get("clusterkv")
        if newer is None:
            sys.exit(
                "the server runs without clusterkv: start it with --attention-backend clusterkv, as `make serve` does"
            )
        if newer == counts:
            return newer
        counts = newer
        time.sleep(0.3)


def main() -> None:
    """Run the program once and print what it said and what was clustered."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--base-url", default="http://127.0.0.1:30000", help="of the server, default %(default)s")
    parser.add_argument("--api-key", help="only if the server was started with one")
    parser.add_argument("--chat-template", default="chatml", help="SGLang's name for the model's, default %(default)s")
    parser.add_argument("--tokens", type=int, default=6000, help="about how long the document is, default %(default)s")
    parser.add_argument("--small", action="store_true", help="about 1,500 tokens and 16 per answer, for a quick check")
    args = parser.parse_args()
    tokens, max_tokens = (1500, 16) if args.small else (args.tokens, 32)

    url = args.base_url.rstrip("/").removesuffix("/v1")
    try:
        backend = sgl.RuntimeEndpoint(url, api_key=args.api_key, chat_template_name=args.chat_template)
    except urllib.error.URLError as error:
        sys.exit(f"no SGLang server answers at {url} ({error.reason}): start one with `make serve`, or pass --base-url")
    except RuntimeError as error:
        sys.exit(
            f"the server at {url} refused a request ({error}): pass its key with --api-key, if it was started with one"
        )
    except KeyError:
        sys.exit(f"SGLang's frontend knows no chat template {args.chat_template}: see sglang/lang/chat_template.py")
    before = read_counts(backend)
    print(f"A document of about {tokens:,} tokens. The answers wait for its prefill: minutes on a CPU.")
    try:
        state = checked(study.run(document=make_document(tokens, FACTS), max_tokens=max_tokens, backend=backend))
    except RuntimeError as error:
        sys.exit(f"the server refused a request ({error}): a shorter document (--tokens) may fit the model")
    after = read_counts(backend)

    for fact, answer in zip([*ASKED, CHOSEN], [*state["answers"], state["number"]], strict=True):
        print(f"\n{fact.question}\n  {' '.join(answer.split())}")
    print(f"  chosen from {', '.join(CHOICES)}\n")
    for name in ("tokens_clustered", "tokens_reused", "tokens_recalled", "tokens_available", "splits"):
        print(f"{name:<16}  {after[name] - before[name]:>9,}")
    print("\nThe document is clustered once; tokens_reused adds up what the branches and the choice found clustered.")


if __name__ == "__main__":
    main()
