"""How each kernel runs on an NVIDIA GPU: grids, BlockSpecs and tile sizes, one file per operator."""
