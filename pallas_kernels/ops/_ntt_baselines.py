"""Products of polynomials as FLINT has them, to be timed beside ours."""
