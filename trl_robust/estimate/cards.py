"""Cards: how much memory they have, and how fast we assume them to be.

`memory_gib` is what the driver reports (nvidia-smi, MiB / 1024), which is less than the name says on some cards.

Rates are floating-point operations a second that training on large matrix products may keep up. They are ASSUMED, as a
share of what the vendor's data sheet says (dense, float32 accumulation). In bfloat16: H100 and H200 0.56 (large
products alone were measured at 790 TFLOP/s on an H200, and a training loop reaches about 70 % of such a figure), A100
0.77 and RTX 4090 0.9, whose smaller rates are easier to reach, all others 0.6. In float32, without TF32: 0.6.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """
    A graphics card.

    Args:
        name (`str`):
            As `--gpu` takes it.
        memory_gib (`float`):
            Memory, in GiB.
        bf16 (`float`, *optional*):
            Assumed rate in bfloat16 or float16, in TFLOP/s; `None` if nothing is known of the card's speed.
        fp32 (`float`, *optional*):
            Assumed rate in float32, in TFLOP/s.
    """

    name: str
    memory_gib: float
    bf16: float | None = None
    fp32: float | None = None

    def rate(self, half: bool) -> float | None:
        """
        The rate at which a run computes.

        Args:
            half (`bool`):
                Whether it computes in 16 bits.

        Returns:
            `float`: TFLOP/s, or `None`.
        """
        return self.bf16 if half else self.fp32


CARDS = (
    Card("RTX4080", 16.0, bf16=58, fp32=29),  # data sheet: 97.5 and 48.7
    Card("L4", 22.5, bf16=73, fp32=18),  # 121 and 30.3
    Card("RTX3090", 24.0, bf16=43, fp32=21),  # 71 and 35.6
    Card("RTX4090", 24.0, bf16=150, fp32=50),  # 165 and 82.6
    Card("A100-40", 39.6, bf16=240, fp32=12),  # 312 and 19.5
    Card("L40S", 45.0, bf16=217, fp32=55),  # 362 and 91.6
    Card("A6000", 48.0, bf16=93, fp32=23),  # 155 and 38.7
    Card("H100", 79.6, bf16=550, fp32=40),  # 989 and 67
    Card("A100-80", 80.0, bf16=240, fp32=12),  # 312 and 19.5
    Card("H200", 140.4, bf16=550, fp32=40),  # 989 and 67; 790 measured
)
"""Known cards, the smaller first."""


def card_named(name: str) -> Card | None:
    """
    Looks a card up.

    Args:
        name (`str`):
            Its name, in any case, with or without hyphens and spaces.

    Returns:
        [`Card`], or `None` if there is none of that name.
    """

    def plain(text: str) -> str:
        return text.lower().replace("-", "").replace("_", "").replace(" ", "")

    return next((card for card in CARDS if plain(card.name) == plain(name)), None)
