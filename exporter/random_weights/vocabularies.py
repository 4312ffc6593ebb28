"""Real tokenizers of the CLIP and T5 classes with a small vocabulary built here: common words of prompts, and letters.

Every text can be encoded; ids stay below the vocabulary size of the text encoder they are for.
"""

from __future__ import annotations

import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from exporter.reference.train.words import END, START, vocabulary

_TEXT = (
    "a an the of in on at with and or by to from for near under over behind photo photograph painting drawing sketch "
    "picture image portrait landscape render illustration digital art oil watercolor style detailed highly realistic "
    "cinematic light lighting soft dark bright sunset sunrise night day sky sea lake river mountain forest tree flower "
    "city street house castle room man woman child person people face eyes hair dog cat horse bird fish car boat train "
    "red green blue yellow orange purple black white gray brown gold silver small large big old new beautiful wearing "
    "sitting standing running astronaut riding robot dragon space moon sun star snow rain fire water table chair food"
)
WORDS = tuple(_TEXT.split())
"""What the two vocabularies know as whole words."""

_LETTER_SCORE = -10.0
_EXTRA_IDS = 100
_SPACE = "\u2581"


def write_tokenizer(cls: str, folder: Path, options: Mapping[str, Any]) -> int:
    """Write the files of a tokenizer.

    Args:
        cls: ``CLIPTokenizer`` or ``T5Tokenizer``.
        folder: where they go; created.
        options: `model_max_length` and, for CLIP, `pad_token`.

    Returns:
        Number of its tokens.
    """
    tokenizer = _t5(options) if cls == "T5Tokenizer" else _clip(options)
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def _clip(options: Mapping[str, Any]) -> Any:
    from transformers import CLIPTokenizer

    tokens, merges = vocabulary(WORDS)
    return CLIPTokenizer(vocab=tokens, merges=merges, unk_token=END, bos_token=START, eos_token=END, **options)


def _t5(options: Mapping[str, Any]) -> Any:
    from transformers import T5Tokenizer

    letters = [*string.digits, *string.ascii_letters, *string.punctuation]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), (_SPACE, -2.0)]
    pieces += [
        (f"{_SPACE}{word}", -3.0 - rank / 100) for rank, word in enumerate(dict.fromkeys(WORDS)) if len(word) > 1
    ]
    pieces += [(letter, _LETTER_SCORE) for letter in letters]
    pieces += [(f"<extra_id_{index}>", 0.0) for index in reversed(range(_EXTRA_IDS))]
    return T5Tokenizer(vocab=pieces, extra_ids=_EXTRA_IDS, **options)
