"""A SentencePiece BPE file, `tokenizer.model`, as a fast `tokenizers.Tokenizer` with the same ids."""

import json
import struct
from collections.abc import Iterable, Iterator
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from ...files import write
from ..checkpoint import CheckpointError, read_json


class Kind(IntEnum):
    """SentencePiece.Type of sentencepiece_model.proto."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class Piece(NamedTuple):
    """A piece of the vocabulary: its text, its score, its kind."""

    text: str
    score: float
    kind: int


def build_tokenizer(file: Path, special: Iterable[str] = (), extra: Iterable[str] = ()) -> Tokenizer:
    """The tokenizer of a `tokenizer.model` of the BPE kind with byte fallback and identity normalisation.

    Control pieces, and the user-defined ones in `special`, are special tokens: found in text unless it is
    encoded with `split_special_tokens=True`. Other user-defined pieces are always found. `extra` pieces get
    the ids behind the file's own, and are found only if a caller adds them as tokens.
    """
    pieces, dummy_prefix = read_pieces(file)
    pieces += [Piece(text, 0.0, Kind.UNUSED) for text in extra]
    vocabulary = {piece.text: index for index, piece in enumerate(pieces)}
    merges = _merges(pieces, vocabulary)
    unknown = next(piece.text for piece in pieces if piece.kind == Kind.UNKNOWN)
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    # SentencePiece writes a space as "▁", and where it has a dummy prefix, one more before each text.
    space = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), space]) if dummy_prefix else space
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] * dummy_prefix)
    special = set(special) | {piece.text for piece in pieces if piece.kind in (Kind.UNKNOWN, Kind.CONTROL)}
    tokenizer.add_tokens(
        [
            AddedToken(piece.text, special=piece.text in special, normalized=False)
            for piece in pieces
            if piece.kind in (Kind.UNKNOWN, Kind.CONTROL, Kind.USER_DEFINED)
        ]
    )
    return tokenizer


def _merges(pieces: list[Piece], vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Every pair of pieces that joins into a learnt one, in SentencePiece's order: best score first."""
    merges = []
    for text, score, kind in pieces:
        if kind == Kind.NORMAL:
            for cut in range(1, len(text)):
                if (left := text[:cut]) in vocabulary and (right := text[cut:]) in vocabulary:
                    merges.append((score, (left, right)))
    return [pair for _, pair in sorted(merges, key=lambda merge: -merge[0])]


def read_pieces(file: Path) -> tuple[list[Piece], bool]:
    """The pieces of a ModelProto in the order of their ids, and whether a text gets a leading space.

    Raises CheckpointError where there is no such file.
    """
    if not file.is_file():
        raise CheckpointError(f"{file} is missing: download the model again.")
    pieces, dummy_prefix = [], True
    for number, value in _fields(file.read_bytes()):
        if number == 1:
            piece = dict(_fields(value))
            score = struct.unpack("<f", piece[2])[0] if 2 in piece else 0.0
            pieces.append(Piece(piece[1].decode(), score, piece.get(3, Kind.NORMAL)))
        elif number == 3:
            dummy_prefix = bool(dict(_fields(value)).get(3, True))
    return pieces, dummy_prefix


def add_file(file: Path, folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Put the `tokenizer.model` beside the saved tokenizer that was built of it: llama.cpp's converter
    (conversion/base.py, `_create_vocab_sentencepiece`) reads that and no tokenizer.json. What it does not ask of it,
    which pieces are found in any text and whether a text begins with a space, goes into tokenizer_config.json."""
    said = {
        "add_prefix_space": read_pieces(file)[1],
        "add_bos_token": tokenizer.add_bos_token,
        "added_tokens_decoder": {
            index: token.__getstate__() for index, token in tokenizer.added_tokens_decoder.items()
        },
    }
    write(folder / "tokenizer.model", file.read_bytes())
    settings = folder / "tokenizer_config.json"
    write(settings, json.dumps(read_json(settings) | said, ensure_ascii=False, indent=2))


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a protobuf message, (number, value), off the wire: three fields need no library.

    The messages read here number their fields below 16, so that each field begins with a single byte.
    """
    position = 0
    while position < len(message):
        number, wire_type = divmod(message[position], 8)
        position += 1
        if wire_type in (0, 2):  # a number or a length, seven bits a byte
            value = shift = 0
            while (byte := message[position]) > 127:
                value |= (byte & 127) << shift
                position, shift = position + 1, shift + 7
            value |= byte << shift
            position += 1
            if wire_type == 0:
                yield number, value
                continue
        size = {1: 8, 5: 4}.get(wire_type) or value
        yield number, message[position : position + size]
        position += size
