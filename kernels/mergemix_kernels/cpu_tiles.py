"""How the CPU kernels cut their work, for the caches that most processors have."""

LANES = 32  # one cache line of 16-bit elements; LLVM spreads it over the registers that the machine has
LINE_BYTES = 64
ROWS = 4  # rows of a low-rank product that are computed together, from one load of its right factor
# Elements of each source between two outputs: what the first output read, the others find in a cache.
BLOCK_ELEMENTS = 2048
# Sources that are read side by side: lines of more, at the same place in their pages, would push each other
# out of an 8-way first-level cache.
SIDE_BY_SIDE = 8
PREFETCH_BYTES = 1024
# Sources that are read from files are read and summed so many bytes at a time: they stay in the second-level cache.
STEP_BYTES = 1 << 18
UNREAD = 0xFFFFFFFF  # what no largest magnitude is
# The right factor of a low-rank product is taken in panels of columns that stay in the second-level cache
# for all rows of a range; a strip of ROWS rows of the product stays in the first.
PANEL_BYTES = 1 << 18
STRIP_COLUMNS = 512
