"""Tokens in few bits: standardised, coded one by one, and attended to without being decoded."""

from momentkv.codes.attention import attend_codes
from momentkv.codes.packing import BITS, check_bits, pack, row_bytes, unpack
from momentkv.codes.records import Coded, Coding, centre, decode, encode, record_bytes, step_dtype
from momentkv.codes.standard import Standard

__all__ = [
    "BITS",
    "Coded",
    "Coding",
    "Standard",
    "attend_codes",
    "centre",
    "check_bits",
    "decode",
    "encode",
    "pack",
    "record_bytes",
    "row_bytes",
    "step_dtype",
    "unpack",
]
