"""Stores of a tile: the address of the first element in 64 bits, those of the others as 32-bit distances from it."""

from __future__ import annotations

from ._triton import jit, tl


@jit
def store_tile(
    out_ptr: tl.tensor,
    layer: tl.tensor,
    first_row: tl.tensor,
    first_column: tl.tensor,
    tile: tl.tensor,
    p: tl.tensor,
    d: tl.tensor,
) -> None:
    """``tile`` [BLOCK_P, BLOCK_D] to rows first_row.. and columns first_column.. of ``out`` [layers, p, d], contiguous.

    64 bits for every element would take as many registers again as two tiles do. BLOCK_P * d must stay below 2^31.
    """
    rows = tl.arange(0, tile.shape[0])[:, None]
    columns = tl.arange(0, tile.shape[1])[None, :]
    first = out_ptr + (layer.to(tl.int64) * p + first_row) * d + first_column
    tl.store(first + (rows * d + columns), tile, mask=(rows < p - first_row) & (columns < d - first_column))
