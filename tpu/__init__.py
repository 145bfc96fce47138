"""How each kernel runs on a TPU: grids, BlockSpecs and tile sizes, one file per operator."""
