"""Needle questions over length and depth against any OpenAI-compatible server: `sglang-clusterkv needle`.

Each question has a document of its own with one needle, so a question depends on the seed, its length, its depth and its number
and on no other question. The documents of one length are equal up to the shallower needle, longer ones begin like shorter
ones, and the deepest needles are asked for first: a radix cache finds long prefixes.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

from sglang_clusterkv.tools.haystack import CITIES, Fact, haystack, hide, magic_number
from sglang_clusterkv.tools.json_server import Advice, JsonServer, PromptTooLong, ServerError
from sglang_clusterkv.tools.needle_report import Answer, Result, Settings, show, write

# Long enough that the tokens of a sample's first and last word do not show in the ratio.
_SAMPLE_CHARS = 4000
_ADVICE = Advice(
    kind="an OpenAI-compatible server",
    shorter="shorter --lengths",
    fewer="pass fewer --needles or --depths",
    request="--model and --max-tokens",
)


class NeedleError(ServerError):
    """Something that the user can change; the message is one sentence with the fix."""


class Endpoint(JsonServer):
    """An OpenAI-compatible server.

    Args:
        base_url: with or without /v1.
        api_key: sent as a bearer token.
        timeout_s: per request.
    """

    def __init__(self, base_url: str, api_key: str, timeout_s: float) -> None:
        super().__init__(base_url, api_key, timeout_s, _ADVICE)

    def models(self) -> list[dict[str, Any]]:
        """The served models: `id`, and `max_model_len` where the server says it."""
        reply = self.request("/v1/models")
        cards = reply.get("data") if isinstance(reply, dict) else None
        if not isinstance(cards, list) or not all(isinstance(card, dict) and "id" in card for card in cards):
            raise NeedleError(f"{self.url}/v1/models lists no models: --base-url must be an OpenAI-compatible server")
        return cards

    def ask(self, model: str, prompt: str, max_tokens: int) -> tuple[str, int]:
        """One greedy answer, and the prompt's tokens with the chat template's."""
        body = {
            "model": model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": max_tokens,
            "temperature": 0,
        }
        reply = self.request("/v1/chat/completions", body)
        try:
            # A model that was stopped before it said anything answers with null.
            return reply["choices"][0]["message"]["content"] or "", int(reply["usage"]["prompt_tokens"])
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise NeedleError(
                f"{self.url} answered without choices or usage.prompt_tokens: --base-url must be an OpenAI-compatible server"
            ) from error


def needle_of(settings: Settings, length: int, depth: int, number: int) -> Fact:
    """The needle of one question; no other question changes it."""
    rng = random.Random(f"{settings.seed}/{length}/{depth}/{number}")
    return magic_number(rng.choice(CITIES), rng.randint(10000, 99999))


def measure(result: Result, endpoint: Endpoint, context_tokens: int | None) -> None:
    """Ask all questions, with a progress bar on stderr. What was answered before an error is in the result.

    Args:
        result: takes the answers and the lengths that were skipped.
        endpoint: the server.
        context_tokens: prompt and answer that its model takes at most, or None where it does not say.
    """
    from tqdm import tqdm

    settings = result.settings
    per_length = len(settings.depths) * settings.needles
    own_tokens, tokens_per_char = _calibrate(result, endpoint)
    with tqdm(total=per_length * len(settings.lengths), unit="question", desc="needles", file=sys.stderr) as bar:

        def skip(length: int, reason: str) -> None:
            result.skipped[length] = reason
            tqdm.write(f"{length:,} tokens are left out: {reason}", file=sys.stderr)

        for length in settings.lengths:
            asked_before = len(result.answers)
            if length < own_tokens + 64:
                skip(length, f"the template and the question alone take {own_tokens} tokens")
            elif context_tokens is not None and length + settings.max_tokens > context_tokens:
                skip(
                    length,
                    f"with {settings.max_tokens} for the answer they exceed the {context_tokens:,} of the context",
                )
            else:
                chars = (length - own_tokens) / tokens_per_char
                try:
                    _ask_length(result, endpoint, length, chars, bar)
                except PromptTooLong as error:
                    skip(length, str(error))
            bar.total -= per_length - (len(result.answers) - asked_before)
            bar.refresh()


def _calibrate(result: Result, endpoint: Endpoint) -> tuple[int, float]:
    """Tokens of a prompt without a document, and tokens per character of the document, as the server counts them."""
    settings = result.settings
    question = needle_of(settings, settings.lengths[0], settings.depths[0], 0).question
    # About the shortest length: a longer sample might not fit the server.
    sample = "".join(haystack(min(_SAMPLE_CHARS, 3 * settings.lengths[0]), settings.seed)) + "\n\n"
    _, own_tokens = endpoint.ask(result.model, question, 1)
    _, tokens = endpoint.ask(result.model, sample + question, 1)
    if tokens <= own_tokens:
        raise NeedleError(
            f"{endpoint.url} counts {tokens} tokens for {len(sample)} characters: it reports no usable usage.prompt_tokens"
        )
    return own_tokens, (tokens - own_tokens) / len(sample)


def _ask_length(result: Result, endpoint: Endpoint, length: int, chars: float, bar: Any) -> None:
    settings = result.settings
    for depth in reversed(settings.depths):
        for number in range(settings.needles):
            bar.set_postfix_str(f"{length:,} tokens, depth {depth} %")
            fact = needle_of(settings, length, depth, number)
            document = hide(fact, chars, depth, settings.seed)
            text, tokens = endpoint.ask(result.model, f"{document}\n\n{fact.question}", settings.max_tokens)
            # Some models write 12,345.
            found = fact.answer in text.replace(",", "")
            result.answers.append(Answer(length, depth, tokens, fact.question, fact.answer, text, found))
            bar.update()


def run(settings: Settings, out: Path, as_json: bool) -> None:
    """Ask, print the table (or JSON) on stdout and write it with a picture into a new folder.

    Raises:
        NeedleError: nothing, or not everything, could be asked. What was answered is written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise NeedleError(f"{out} exists already and is never written over: pass another folder with --out")
    endpoint = Endpoint(settings.base_url, settings.api_key, settings.timeout_s)
    cards = endpoint.models()
    if settings.model is None and not cards:
        raise NeedleError(f"{endpoint.url}/v1/models lists no models: name one with --model")
    model = settings.model or cards[0]["id"]
    result = Result(settings, model)
    contexts = [card.get("max_model_len") for card in cards if card["id"] == model]
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise NeedleError(f"cannot make {out} ({error.strerror}): pass another folder with --out") from error
    try:
        measure(result, endpoint, contexts[0] if contexts else None)
    finally:
        if result.answers:
            show(result, as_json)
            write(result, out)
        else:
            out.rmdir()
    if not result.answers:
        raise NeedleError("nothing was asked, because no length fits: pass others with --lengths")
