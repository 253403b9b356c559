"""A made trace: text with a needle, sets that stay alike from step to step, and a needle that the number's steps read.

Not a model's: what is recalled is drawn, in runs of neighbours, with an overlap between steps as SmolLM2's have. The needle's
tokens are recalled in nearly every step by nearly every head, and get most of the mass where the answer's number is written.
"""

from __future__ import annotations

import base64
from typing import Any

import numpy as np

NEEDLE = " The number that Ada wrote on the wall is 48213."
ANSWER = "The number that Ada wrote down is 48213."
SUBJECTS = [
    "The river",
    "The old harbour",
    "A letter",
    "The garden",
    "Her brother",
    "The museum",
    "A narrow road",
    "The clock",
]
VERBS = ["was known for", "stood near", "had been sold with", "reminded people of", "opened onto", "lay behind"]
OBJECTS = [
    "a row of birches",
    "the mill",
    "two stone bridges",
    "an empty market",
    "the winter of that year",
    "blue paint",
]
# A document is somebody's text: none of this may become markup or script.
MARKUP = ' Then it said "<b>bold</b> & </script>" and <!-- nothing --> more.'
RUN = 4  # neighbours that are recalled together


def words(text: str) -> list[str]:
    """Tokens of a text: words with the space before them, signs and digits by themselves."""
    out: list[str] = []
    for character in text:
        last = out[-1] if out else ""
        if (character.isalpha() and last[-1:].isalpha()) or (last == " " and not character.isspace()):
            out[-1] += character
        else:
            out.append(character)
    return out


def made_text(tokens: int, seed: int = 0) -> list[str]:
    """Pieces of a prompt of so many tokens, with the needle at two fifths of it, and the markup after it."""
    generator = np.random.default_rng(seed)
    pieces, rest = [], words(NEEDLE) + words(MARKUP)
    while len(pieces) < tokens - len(rest):
        sentence = " ".join(generator.choice(part) for part in (SUBJECTS, VERBS, OBJECTS))
        pieces += words(f" {sentence}.")
        if rest and len(pieces) >= 0.4 * tokens:
            pieces += rest
            rest = []
    return (pieces + [" the"] * tokens)[:tokens]


def needle_span(pieces: list[str]) -> range:
    """The needle's tokens."""
    needle = words(NEEDLE)
    begin = next(at for at in range(len(pieces)) if pieces[at : at + len(needle)] == needle)
    return range(begin, begin + len(needle))


def number_tokens(pieces: list[str], prompt_tokens: int) -> list[int]:
    """The answer's tokens that are digits, as positions."""
    return [at for at in range(prompt_tokens, len(pieces)) if pieces[at].strip().isdigit()]


def encoded(values: Any, dtype: str) -> str:
    return base64.b64encode(np.asarray(values, dtype).tobytes()).decode()


def made_trace(
    prompt_tokens: int = 600,
    answer_tokens: int = 24,
    layers: int = 4,
    heads: int = 2,
    budget: int = 64,
    *,
    overlap: float = 0.65,
    compare: bool = False,
    quest: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """A trace of docs/explain.md's format; the first layer does not recall, and the first two decode steps are dense."""
    generator = np.random.default_rng(seed)
    prompt, answer = made_text(prompt_tokens, seed), words(ANSWER)
    answer = (answer + words(" It is on the wall, as the letter says, and nobody has painted over it.") * 20)[
        :answer_tokens
    ]
    pieces = prompt + answer
    needle, numbers = needle_span(pieces), number_tokens(pieces, prompt_tokens)
    sinks, window = 4, 48
    recalling = list(range(1, layers))
    dense = {prompt_tokens: "short", prompt_tokens + 1: "dirty"}
    steps = [
        {
            "token": token,
            "dense": dense.get(token),
            "base": [[0, sinks], [token + 1 - window, token + 1]],
            "clustered": token + 1 - window - sinks,
            "bytes_read": 256 * layers * heads * (budget + window + sinks + prompt_tokens // 8),
            "bytes_dense": 512 * layers * heads * (token + 1),
        }
        for token in range(prompt_tokens, len(pieces) - 1)
    ]
    for step in steps:
        if step["dense"]:
            step["bytes_read"] = step["bytes_dense"]
    sparse = [step["token"] for step in steps if step["dense"] is None]
    recalled, weights, mass = [], [], []
    for _ in recalling:
        positions, shares, parts = drawn_layer(
            generator, sparse, heads, budget, (sinks, window), overlap, needle, numbers
        )
        recalled.append(encoded(positions, "<u2"))
        weights.append(encoded(shares, "u1"))
        mass.append(encoded(parts, "<f2"))
    per_cluster = 8
    numbered = [np.stack([drawn_clusters(generator, prompt_tokens, sinks) for _ in range(heads)]) for _ in recalling]
    spread = [
        [encoded(generator.uniform(0.1, 2, prompt_tokens // per_cluster + 1), "<f2") for _ in range(heads)]
    ] * len(recalling)
    trace = {
        "format": "clusterkv-trace",
        "version": 1,
        "position_bytes": 2,
        "server": {
            "model": "made",
            "clusterkv": {"budget_tokens": budget, "estimate": True},
            "page_size": 16,
            "layers": layers,
            "kv_heads": heads,
            "recalling_layers": recalling,
            "sglang": "0.5.23",
            "sglang_clusterkv": "0.2.0",
        },
        "request": {
            "rid": "made",
            "prompt_tokens": prompt_tokens,
            "cached_tokens": 0,
            "answer_tokens": answer_tokens,
            "dropped_steps": 0,
        },
        "token_ids": list(range(len(pieces))),
        "pieces": pieces,
        "steps": steps,
        "recalled": recalled,
        "mass": mass,
        "weights": weights,
        "clusters": [encoded(clusters, "<i4") for clusters in numbered],
        "cluster_spread": spread,
    }
    if quest:
        trace["quest"] = [
            encoded(drawn_pages(generator, sparse, heads, budget // 16, needle), "<u2") for _ in recalling
        ]
    if compare:
        parts_at = answer_tokens // 2
        trace["compare"] = {
            "model": "made, dense",
            "token_ids": [*range(prompt_tokens, prompt_tokens + parts_at), 7, 8, 9],
            "pieces": [*answer[:parts_at], " another", " ending", "."],
            "logprobs": [-0.1] * (parts_at + 3),
            "kl": [0.001 * (at + 1) for at in range(parts_at)] + [0.4],
            "first_difference": parts_at,
        }
    return trace


def drawn_layer(
    generator: np.random.Generator,
    sparse: list[int],
    heads: int,
    budget: int,
    base: tuple[int, int],
    overlap: float,
    needle: range,
    numbers: list[int],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Recalled positions with their counts, weights, and [steps, heads, 3] shares of one layer."""
    sinks, window = base
    positions, weights = [np.zeros(0, np.int64)], [np.zeros(0, np.uint8)]
    parts = np.zeros((len(sparse), heads, 3))
    last = [np.zeros(0, np.int64) for _ in range(heads)]
    for step, token in enumerate(sparse):
        for head in range(heads):
            allowed = token + 1 - window
            kept = generator.permutation(last[head])[: int(overlap * budget)]
            begins = generator.integers(sinks, allowed - RUN, 2 * (budget - len(kept)) // RUN + budget // 8)
            drawn = (begins[:, None] + np.arange(RUN)).reshape(-1)
            read = list(needle) if generator.random() < 0.9 or token + 1 in numbers else []
            order = np.concatenate([np.array(read, np.int64), kept, drawn])
            _, first = np.unique(order, return_index=True)
            chosen = np.sort(order[np.sort(first)][:budget])
            share = np.exp(generator.normal(0, 1.5, len(chosen)))
            in_needle = (chosen >= needle.start) & (chosen < needle.stop)
            share = np.where(in_needle, share.max() if token + 1 in numbers else np.median(share), share)
            parts[step, head] = generator.dirichlet([30, 60, 6])
            share *= parts[step, head, 1] / share.sum()
            weights.append(np.clip(np.rint(255 + 8 * np.log2(share)), 1, 255).astype(np.uint8))
            positions += [[len(chosen)], chosen]
            last[head] = chosen
    return np.concatenate(positions), np.concatenate(weights), parts


def drawn_pages(generator: np.random.Generator, sparse: list[int], heads: int, count: int, needle: range) -> np.ndarray:
    """Pages for each step and head, as the format has them: none of them has the needle, but for the first head."""
    sets = []
    for token in sparse:
        for head in range(heads):
            pages = set(range(1, (token - 48) // 16))
            missing = set() if head == 0 else {at // 16 for at in needle}
            kept = {at // 16 for at in needle} if head == 0 else set()
            drawn = generator.permutation(sorted(pages - missing - kept))[: count - len(kept)]
            sets.append(np.r_[count, np.sort(np.r_[drawn, sorted(kept)])])
    return np.concatenate(sets)


def drawn_clusters(generator: np.random.Generator, tokens: int, sinks: int, segment: int = 1024) -> np.ndarray:
    """[tokens] cluster numbers: each segment's tokens in clusters of its own, some eight in each; the sinks in none."""
    numbers = np.full(tokens, -1)
    for begin in range(sinks, tokens, segment):
        length = min(segment, tokens - begin)
        drawn = generator.integers(0, max(1, length // 8), length)
        numbers[begin : begin + length] = begin // 8 + drawn
    return numbers
