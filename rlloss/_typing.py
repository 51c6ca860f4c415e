"""Shape annotations: `Float[Tensor, " B"]` is checked in tests and free in production.

Dimensions: B batch rows, T positions, N packed tokens, S sequences, G group size, H hidden width, V vocabulary.
`*tokens` is the layout of every per-token tensor: `[B, T]` padded or `[N]` packed.
"""

from typing import TYPE_CHECKING

__all__ = ["Bool", "Float", "Int"]

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
else:
    try:
        from jaxtyping import Bool, Float, Int
    except ImportError:  # jaxtyping is a test dependency; without it an annotation is its plain type

        class _Plain:
            def __class_getitem__(cls, item: tuple[type, str]) -> type:
                return item[0]

        Bool = Float = Int = _Plain
