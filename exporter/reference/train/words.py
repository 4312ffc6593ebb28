"""The reference model's own small CLIP vocabulary: every word of the grammar is one token, other words are spelled."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from pathlib import Path

from transformers import CLIPTokenizer

from exporter.reference.grammar import BACKGROUNDS, COLOURS, RELATIONS, SHAPES, SIZES

MAX_TOKENS = 32
START, END = "<|startoftext|>", "<|endoftext|>"
_END_OF_WORD = "</w>"
_FILLERS = ("a", "on", "background")


def _byte_letters() -> list[str]:
    """The printable stand-ins of the 256 bytes, in GPT-2's and CLIP's order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(others))]


def _split(word: str, merges: list[tuple[str, str]]) -> list[str]:
    """Byte-pair encoding of one word: the earliest merge first, as the tokenizer does it."""
    pieces = [*word[:-1], word[-1] + _END_OF_WORD]
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    while len(pieces) > 1:
        pairs = list(itertools.pairwise(pieces))
        best = min(pairs, key=lambda pair: ranks.get(pair, len(ranks)))
        if best not in ranks:
            break
        at = pairs.index(best)
        pieces[at : at + 2] = ["".join(best)]
    return pieces


def vocabulary(words: Iterable[str] | None = None) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Build the vocabulary and the merges.

    Merges of a later word come after those of every earlier word, so that they never break the earlier one up.

    Args:
        words: Each becomes one token; by default those of the grammar.

    Returns:
        Token to id, and the merges in order of precedence.
    """
    if words is None:
        words = [*_FILLERS, *SIZES, *COLOURS, *SHAPES, *BACKGROUNDS]
        words += [word for relation in RELATIONS for word in relation.split()]
    merges: list[tuple[str, str]] = []
    for word in dict.fromkeys(words):
        pieces = _split(word, merges)
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces[:2] = [pieces[0] + pieces[1]]
    letters = _byte_letters()
    tokens = [*letters, *(letter + _END_OF_WORD for letter in letters)]
    tokens += list(dict.fromkeys(first + second for first, second in merges))
    tokens += [START, END]
    return {token: index for index, token in enumerate(tokens)}, merges


def build_tokenizer(folder: Path) -> CLIPTokenizer:
    """Write the tokenizer's files and load them.

    Args:
        folder: Where the files go; created.

    Returns:
        The stock tokenizer, 32 tokens at most, padded with the end token.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokens, merges = vocabulary()
    (folder / "vocab.json").write_text(json.dumps(tokens, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(f"{first} {second}" for first, second in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    tokenizer = CLIPTokenizer(
        vocab=tokens,
        merges=merges,
        unk_token=END,
        bos_token=START,
        eos_token=END,
        pad_token=END,
        model_max_length=MAX_TOKENS,
    )
    tokenizer.save_pretrained(folder)
    return tokenizer
