"""How else pictures are drawn than one by one, at a model's own size: what follows the slash of a group's name."""

from dataclasses import dataclass

from gpuless.cards import FP8_ATTENTION


@dataclass(frozen=True, slots=True)
class Variant:
    """A kernel of attention, if it is not native; `side`: pixels wide and high; how many pictures at once."""

    attention: str = ""
    side: int | None = None
    pictures: int = 1

    def size(self, own: tuple[int, int]) -> tuple[int, int]:
        """Width and height: the model's own, if nothing else is said."""
        return (self.side, self.side) if self.side else own


VARIANTS = {
    "": Variant(),
    FP8_ATTENTION: Variant(attention=FP8_ATTENTION),
    "512": Variant(side=512),
    "512x4": Variant(side=512, pictures=4),
}


def variant_of(group: str) -> Variant:
    """What a group's name says of it; KeyError if that is nothing known."""
    return VARIANTS[group.partition("/")[2]]


def decoding_of(group: str) -> str:
    """The group in which the pictures of `group` are decoded."""
    return f"vae/{group.partition('/')[2]}" if variant_of(group).side else "vae"
