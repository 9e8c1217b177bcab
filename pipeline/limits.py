"""How much a stranger's file may hold or unpack to. What is beyond is refused by name, or costs one row."""

MAX_TEXT = 64 * 2**20
"""Bytes of one string in an Arrow column, characters of one line; a longer one makes its row undecodable."""
MAX_COLUMNS = 10_000
"""Columns of a file."""
MAX_ROWS = 2**31
"""Rows of a Parquet file."""
MAX_GROUP_BYTES = 16 * 2**30
"""Unpacked bytes of the columns read of one row group (pyarrow's own default is a million rows: some GiB of texts)."""
MAX_FOOTER_BYTES = 64 * 2**20
"""Bytes of a Parquet footer; parsed, it takes some twenty times that."""
MAX_THRIFT_ITEMS = 100_000
"""Items of one list in a Parquet footer: row groups, or columns with the groups they stand in."""
MAX_PACKING = 1_000
"""Bytes, or rows, that one stored byte of a Parquet column chunk or file may stand for …"""
FREE_BYTES = 64 * 2**20
"""… beyond this many bytes or rows."""
MAX_UNPACKED = 200
"""Bytes of lines per byte of their .gz or .zst file (text packs 3 to 30 times, gzip at most 1,032 times) …"""
FREE_UNPACKED = 2**30
"""… beyond this many."""
BATCH_BYTES = 2**30
"""Text of a batch, about; a batch has fewer rows where they could hold more."""
MAX_DEPTH = 50
"""Levels of nesting in JSON rows and specs."""
