"""Tokens in few bits: standardised, coded one by one, and attended to without being decoded."""

from momentkv.codes.attention import attend_codes
from momentkv.codes.fit import misfit
from momentkv.codes.packing import (
    AUTO,
    BITS,
    PLANES,
    SPLIT,
    bits_as_text,
    bits_from_text,
    pack,
    pair_of_bits,
    row_bytes,
    unpack,
)
from momentkv.codes.records import MOST, Coded, Coding, centre, coarse, decode, encode, record_bytes, step_dtype
from momentkv.codes.standard import Standard

__all__ = [
    "AUTO",
    "BITS",
    "MOST",
    "PLANES",
    "SPLIT",
    "Coded",
    "Coding",
    "Standard",
    "attend_codes",
    "bits_as_text",
    "bits_from_text",
    "centre",
    "coarse",
    "decode",
    "encode",
    "misfit",
    "pack",
    "pair_of_bits",
    "record_bytes",
    "row_bytes",
    "step_dtype",
    "unpack",
]
