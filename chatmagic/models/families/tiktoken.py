"""A tiktoken file of byte-level BPE, `qwen.tiktoken`, as a fast `tokenizers.Tokenizer` with the same ids."""

import base64
from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from ..checkpoint import CheckpointError


def build_tokenizer(file: Path, pattern: str, special: Sequence[str]) -> Tokenizer:
    """The tokenizer of a rank file: each line a token in base64 and its id, which is also its merging rank.

    `pattern` is the regular expression that cuts a text into words; `special` tokens get the ids behind the
    file's. Texts are put into Unicode's NFC first, as Qwen does.

    Raises CheckpointError where there is no such file.
    """
    if not file.is_file():
        raise CheckpointError(f"{file} is missing: download the model again.")
    ranks = dict(map(bytes.split, file.read_bytes().splitlines()))
    ranks = {base64.b64decode(token): int(rank) for token, rank in ranks.items()}
    shown = _byte_characters()
    names = {token: "".join(shown[byte] for byte in token) for token in ranks}
    vocabulary = {names[token]: rank for token, rank in ranks.items()}
    merges = []
    for token in sorted(ranks, key=ranks.get):
        splits = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        pairs = sorted((ranks[a], ranks[b], a, b) for a, b in splits if a in ranks and b in ranks)
        merges += [(names[a], names[b]) for _, _, a, b in pairs]
    # tiktoken looks a whole word up before it merges: ignore_merges
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


def _byte_characters() -> list[str]:
    """The character that byte-level BPE writes for each byte (GPT-2, encoder.py: bytes_to_unicode)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(256 + others.index(byte) if byte in others else byte) for byte in range(256)]
