"""Sizes of the tiles in which the Triton back end multiplies, and how they are chosen on a GPU."""

from __future__ import annotations

from typing import Any

import triton

# Tiles: columns, depth, warps, stages; those that were fastest somewhere on an H200, and of many
# some that need less of a GPU; those of float32 were not measured. Few pairs of an expert: weights
# stream by, and many bytes have to be on their way. Many: products of matrices.
Tiles = list[tuple[int, int, int, int]]
FLOAT32: Tiles = [(32, 32, 4, 2), (64, 32, 4, 3), (64, 32, 8, 3)]
# The interpreter runs on the CPU, where there is nothing to tune.
SMALL = (32, 32) if triton.knobs.runtime.interpret else None
# of the tiles that descriptors fetch
UP_COLUMNS, DEPTH = SMALL or (128, 64)
DOWN_COLUMNS, _ = SMALL or (256, 64)
# Activations of a block are zero from its width to the next multiple of this, which is one of the
# columns in which they are made and of the depth in which they are read.
PAD = 128


def tuned(few: Tiles, many: Tiles, rows: Tiles) -> Any:
    """Tries the tiles for the number of pairs in a block; ``rows``: for weights by descriptors."""

    def configs(tiles: Tiles) -> list[triton.Config]:
        return [
            triton.Config({"BLOCK_N": n, "BLOCK_K": k}, num_warps=warps, num_stages=stages)
            for n, k, warps, stages in tiles
        ]

    def fitting(_: Any, arguments: dict[str, Any], **constants: Any) -> list[triton.Config]:
        if constants["ROWS"]:
            return configs(rows)
        if next(iter(arguments.values())).dtype.itemsize == 4:
            return configs(FLOAT32)
        return configs(few if constants["BLOCK_M"] < 64 else many)

    return triton.autotune(
        configs=configs([(*SMALL, 4, 1)] if SMALL else few + many),
        # Triton adds the dtypes of tensors. BLOCK_M stands for the number of tokens, the distance
        # of channels for the storage; GPU is its kind, as a machine can have two.
        key=["H", "C", "BLOCK_M", "by_c", "ROWS", "ALONE", "MIXED", "GPU"],
        prune_configs_by={"early_config_prune": fitting},
        cache_results=True,
    )
