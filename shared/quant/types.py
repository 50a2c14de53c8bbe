"""The table of GGML quantization types: what a row of each costs in bytes.

Invariant: ids, block sizes and bytes are those of ggml (mainline and ik_llama.cpp); tests compare them with ik's own
library. A row of n elements takes `row_header_bytes + n / block_size * bytes_per_block` bytes, and n must be a
multiple of the block size: many of ik's types start each *row* with a scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final


@dataclass(frozen=True, slots=True)
class QuantType:
    """One quantization type.

    id: the number in a GGUF's tensor table.
    name: ggml's name in upper case, as in file names ("Q4_K", "IQ2_KL").
    block_size: elements of a block.
    bytes_per_block: bytes of a block.
    row_header_bytes: bytes before a row's first block (a scale of the whole row); 0 for most types.
    """

    id: int
    name: str
    block_size: int
    bytes_per_block: int
    row_header_bytes: int = 0

    def bytes_per_row(self, n: int) -> int:
        """The bytes of a row of n elements.

        Raises:
            ValueError: n is negative or no multiple of the block size.
        """
        if n < 0 or n % self.block_size:
            raise ValueError(f"a row of {self.name} has a multiple of {self.block_size} elements, not {n}")
        return self.row_header_bytes + n // self.block_size * self.bytes_per_block

    @property
    def bits_per_weight(self) -> float:
        """Bits per element, a row's header not counted."""
        return 8 * self.bytes_per_block / self.block_size


# Types that Draftwire's own engines are meant to run.
F32: Final = QuantType(0, "F32", 1, 4)
F16: Final = QuantType(1, "F16", 1, 2)
Q4_0: Final = QuantType(2, "Q4_0", 32, 18)
Q4_1: Final = QuantType(3, "Q4_1", 32, 20)
Q5_0: Final = QuantType(6, "Q5_0", 32, 22)
Q5_1: Final = QuantType(7, "Q5_1", 32, 24)
Q8_0: Final = QuantType(8, "Q8_0", 32, 34)
Q2_K: Final = QuantType(10, "Q2_K", 256, 84)
Q3_K: Final = QuantType(11, "Q3_K", 256, 110)
Q4_K: Final = QuantType(12, "Q4_K", 256, 144)
Q5_K: Final = QuantType(13, "Q5_K", 256, 176)
Q6_K: Final = QuantType(14, "Q6_K", 256, 210)
IQ4_NL: Final = QuantType(20, "IQ4_NL", 32, 18)
IQ4_XS: Final = QuantType(23, "IQ4_XS", 256, 136)
BF16: Final = QuantType(30, "BF16", 1, 2)
IQ2_K: Final = QuantType(137, "IQ2_K", 256, 76)
IQ3_K: Final = QuantType(138, "IQ3_K", 256, 110)
IQ4_K: Final = QuantType(139, "IQ4_K", 256, 144)
IQ5_K: Final = QuantType(140, "IQ5_K", 256, 176)
IQ6_K: Final = QuantType(141, "IQ6_K", 256, 212)
IQ4_KS: Final = QuantType(144, "IQ4_KS", 256, 136, 4)
IQ2_KS: Final = QuantType(145, "IQ2_KS", 256, 70, 2)
IQ4_KSS: Final = QuantType(146, "IQ4_KSS", 256, 128, 4)
IQ5_KS: Final = QuantType(152, "IQ5_KS", 256, 168, 4)
IQ2_KT: Final = QuantType(153, "IQ2_KT", 256, 68, 4)
IQ3_KT: Final = QuantType(154, "IQ3_KT", 256, 100, 4)
IQ4_KT: Final = QuantType(155, "IQ4_KT", 256, 128, 4)
IQ3_KS: Final = QuantType(156, "IQ3_KS", 256, 102, 2)
IQ2_KL: Final = QuantType(157, "IQ2_KL", 256, 86, 2)
IQ1_KT: Final = QuantType(158, "IQ1_KT", 256, 56, 4)

PRIMARY: Final[tuple[QuantType, ...]] = (
    *(F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL, IQ4_XS),
    *(IQ2_K, IQ3_K, IQ4_K, IQ5_K, IQ6_K, IQ4_KS, IQ2_KS, IQ4_KSS, IQ5_KS, IQ2_KT, IQ3_KT, IQ4_KT, IQ3_KS, IQ2_KL),
    IQ1_KT,
)

# Types that only the ik engine runs: a GGUF that holds them can still be opened, sized and tokenized for.
# Left out on purpose: types of activations, which no file holds.
OTHER: Final[tuple[QuantType, ...]] = (
    QuantType(16, "IQ2_XXS", 256, 66),
    QuantType(17, "IQ2_XS", 256, 74),
    QuantType(18, "IQ3_XXS", 256, 98),
    QuantType(19, "IQ1_S", 256, 50),
    QuantType(21, "IQ3_S", 256, 110),
    QuantType(22, "IQ2_S", 256, 82),
    QuantType(24, "I8", 1, 1),
    QuantType(25, "I16", 1, 2),
    QuantType(26, "I32", 1, 4),
    QuantType(27, "I64", 1, 8),
    QuantType(28, "F64", 1, 8),
    QuantType(29, "IQ1_M", 256, 56),
    QuantType(34, "TQ1_0", 256, 54),
    QuantType(35, "TQ2_0", 256, 66),
    QuantType(39, "MXFP4", 32, 17),
    QuantType(41, "Q1_0_G128", 128, 18),
    QuantType(133, "Q6_0", 32, 26),
    QuantType(134, "IQ1_BN", 64, 13, 2),
    QuantType(135, "IQ2_BN", 64, 16, 4),
    QuantType(151, "Q8_KV", 32, 32, 8),
    QuantType(202, "Q4_0_R8", 32, 18),
    QuantType(206, "Q5_0_R4", 32, 22),
    QuantType(208, "Q8_0_R8", 32, 34),
    QuantType(210, "Q2_K_R4", 256, 84),
    QuantType(211, "Q3_K_R4", 256, 110),
    QuantType(212, "Q4_K_R4", 256, 144),
    QuantType(213, "Q5_K_R4", 256, 176),
    QuantType(214, "Q6_K_R4", 256, 210),
    QuantType(216, "IQ2_XXS_R4", 256, 66),
    QuantType(217, "IQ2_XS_R4", 256, 74),
    QuantType(218, "IQ3_XXS_R4", 256, 98),
    QuantType(219, "IQ1_S_R4", 32, 6, 2),
    QuantType(220, "IQ4_NL_R4", 32, 18),
    QuantType(221, "IQ3_S_R4", 256, 110),
    QuantType(222, "IQ2_S_R4", 256, 82),
    QuantType(223, "IQ4_XS_R8", 256, 136),
    QuantType(229, "IQ1_M_R4", 32, 7, 2),
    QuantType(230, "BF16_R16", 1, 2),
    QuantType(233, "Q6_0_R4", 32, 26),
    QuantType(335, "IQ2_BN_R4", 64, 16, 4),
    QuantType(337, "IQ2_K_R4", 256, 76),
    QuantType(338, "IQ3_K_R4", 256, 110),
    QuantType(339, "IQ4_K_R4", 256, 144),
    QuantType(340, "IQ5_K_R4", 256, 176),
    QuantType(344, "IQ4_KS_R4", 256, 136, 4),
    QuantType(352, "IQ5_KS_R4", 256, 168, 4),
    QuantType(397, "Q8_K_R16", 256, 258),
    QuantType(398, "Q8_KV_R8", 32, 32, 4),
    QuantType(399, "Q8_K_R8", 256, 258),
)

BY_ID: Final[Mapping[int, QuantType]] = MappingProxyType({quant.id: quant for quant in (*PRIMARY, *OTHER)})
BY_NAME: Final[Mapping[str, QuantType]] = MappingProxyType({quant.name: quant for quant in (*PRIMARY, *OTHER)})
